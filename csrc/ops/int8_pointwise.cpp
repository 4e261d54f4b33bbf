// Convolutions of integers by kernels of one element; the CPU only.
#include "checks.h"
#include "common/memory.h"
#include "launchers.h"

namespace qatfast::kernel {
namespace {

constexpr int64_t most_pointwise_features = ((int64_t{1} << 31) - 1) / (255 * 128); // whose sums fit in 32 bits

void check_dot_products(const char* op) {
  TORCH_CHECK(cpu::has_dot_products(), op, ": expected a processor with AVX512-VNNI");
}

Tensor pointwise_result(const char* op, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, const Tensor& weight, cpu::PointwiseEpilogue epilogue) {
  check_dot_products(op);
  const bool are_integers = input.scalar_type() == at::kByte;
  if (!are_integers) {
    check_float(op, "input", input.scalar_type());
  }
  TORCH_CHECK_TYPE(input.scalar_type() != at::kDouble, op, ": expected input not to be float64");
  TORCH_CHECK_VALUE((input.dim() == 4 || input.dim() == 5) && input.movedim(1, -1).is_contiguous(), op,
      ": expected an input of 4 or 5 dimensions with the channels innermost in memory, got ", tuple(input.sizes()),
      " with strides ", tuple(input.strides()));
  TORCH_CHECK_VALUE(0 <= quant_min && quant_min < quant_max && quant_max <= 255, op,
      ": expected quant_min and quant_max to be from 0 to 255, got ", quant_min, " and ", quant_max);
  const auto features = input.size(1), outputs = epilogue.scale.numel();
  TORCH_CHECK_VALUE(features <= most_pointwise_features, op, ": expected at most ", most_pointwise_features,
      " channels, whose sums fit in 32 bits, got ", features);
  TORCH_CHECK_VALUE(is_contiguous_of(weight, at::kInt, cpu::packed_pointwise_size(outputs, features)), op,
      ": expected the packed weight of ", outputs, " outputs and ", features, " channels, got ",
      name_of(weight.scalar_type()), " of shape ", tuple(weight.sizes()));
  TORCH_CHECK_VALUE(is_contiguous_of(epilogue.scale, at::kFloat, outputs) &&
          (!epilogue.bias.defined() ||
              is_contiguous_of(epilogue.bias, epilogue.requantizes ? at::kInt : at::kFloat, outputs)),
      op, ": expected a float32 scale and a bias per output, got ", tuple(epilogue.scale.sizes()));
  const auto qparams = checked_qparams(op, input, scale, zero_point, quant_min, quant_max, Granularity{},
      are_integers ? at::kFloat : input.scalar_type(), "input");
  auto shape = input.sizes().vec();
  shape[1] = outputs;
  const auto format = input.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
  const auto y = with_few_page_faults(at::empty(shape, input.options().dtype(at::kFloat), format));
  if (y.numel() > 0) {
    cpu::pointwise({input, qparams, weight, std::move(epilogue), y});
  }
  return y;
}

} // namespace

Tensor int8_conv_pointwise_weight(const Tensor& weight) {
  constexpr auto op = "int8_conv_pointwise_weight";
  check_dot_products(op);
  TORCH_CHECK_VALUE(weight.scalar_type() == at::kChar && weight.dim() == 2 && weight.is_contiguous(), op,
      ": expected a contiguous matrix of int8, got ", name_of(weight.scalar_type()), " of shape ",
      tuple(weight.sizes()));
  return cpu::packed_pointwise_weight(weight);
}

Tensor int8_conv_pointwise(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias) {
  return pointwise_result("int8_conv_pointwise", input, scale, zero_point, quant_min, quant_max, weight,
      {weight_scale, bias.value_or(Tensor())});
}

Tensor int8_conv_pointwise_requantized(const Tensor& input, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, const Tensor& weight, const Tensor& bias, const Tensor& factor, double low,
    double high, double y_scale) {
  return pointwise_result("int8_conv_pointwise_requantized", input, scale, zero_point, quant_min, quant_max, weight,
      {factor, bias, true, static_cast<float>(low), static_cast<float>(high), static_cast<float>(y_scale)});
}

} // namespace qatfast::kernel
