// What a convolution of integers needs besides the product of a library.
#include "checks.h"
#include "common/copy.h"
#include "cpu/simd/loops.h"
#include "launchers.h"
#include "ops/blocks.h"
#include "ops/mask.h"
#include "ops/observed.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <limits>

namespace qatfast::kernel {
namespace {

// An input of a convolution and the grid that quantizes it. With `range`, that gives the grid.
struct ConvInput {
  QuantSpec spec;
  Tensor x; // dense
  QParams qparams;
  Tensor shifted_zero_point;
  std::optional<ObservedRange> range;
};

ConvInput checked_conv_input(const char* op, const Tensor& input, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& zero_point, const std::optional<Tensor>& running_min,
    const std::optional<Tensor>& running_max, const std::optional<Tensor>& num_batches, double averaging_constant,
    at::IntArrayRef code) {
  check_float(op, "input", input.scalar_type());
  const auto spec = checked_spec(op, code);
  TORCH_CHECK_VALUE(spec && spec->num_bits <= 8 && spec->granularity.kind == Granularity::per_tensor, op,
      ": expected an input spec of at most 8 bits per tensor, got ", tuple(code));
  const auto x = as_blocks(input, spec->granularity);
  const auto low = spec->quant_min(), high = spec->quant_max();
  ConvInput result = {*spec, x, {Tensor(), Tensor(), low, high}, fresh({}, at::kInt, x), std::nullopt};
  if (running_min) {
    TORCH_CHECK_VALUE(running_max && num_batches, op, ": expected running_max and num_batches with running_min");
    result.range.emplace(checked_range(op, input, *spec, *running_min, *running_max, *num_batches, averaging_constant));
    result.qparams.scale = fresh({}, at::toOpMathType(input.scalar_type()), x);
    result.qparams.zero_point = fresh({}, at::kInt, x);
  } else if (scale) {
    TORCH_CHECK_VALUE(zero_point, op, ": expected a zero point for the given scale");
    result.qparams =
        checked_qparams(op, input, *scale, *zero_point, low, high, spec->granularity, input.scalar_type(), "input");
  } else {
    std::tie(result.qparams.scale, result.qparams.zero_point) =
        choose_qparams(x, spec->num_bits, spec->symmetric, code.slice(2), spec->narrow_range);
  }
  return result;
}

void check_channels(const char* op, int64_t channels, const Tensor& weight_scale, const std::optional<Tensor>& bias) {
  TORCH_CHECK_VALUE(
      is_contiguous_of(weight_scale, at::kFloat, channels) && (!bias || is_contiguous_of(*bias, at::kFloat, channels)),
      op, ": expected a float32 weight scale and bias per channel, got ", tuple(weight_scale.sizes()));
}

Tensor poison_of(bool has_nan) {
  return at::full({}, has_nan ? std::numeric_limits<double>::quiet_NaN() : 0.0, at::kFloat);
}

} // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> int8_conv_input(const Tensor& input,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& zero_point,
    const std::optional<Tensor>& running_min, const std::optional<Tensor>& running_max,
    const std::optional<Tensor>& num_batches, double averaging_constant, at::IntArrayRef code, bool with_mask) {
  const auto of_input = checked_conv_input(
      "int8_conv_input", input, scale, zero_point, running_min, running_max, num_batches, averaging_constant, code);
  const auto& [spec, x, qparams, shifted, range] = of_input;
  const auto values = fresh_like(x, at::kByte);
  const auto mask = with_mask ? fresh_mask(x) : Tensor();
  Tensor poison;
#ifdef QATFAST_CUDA
  if (x.is_cuda()) {
    if (range) {
      cuda::observe_range(x, spec, *range, qparams.scale, qparams.zero_point);
    }
    poison = at::zeros({}, x.options().dtype(at::kFloat));
    cuda::quantize_to_uint8(x, values, mask, spec, qparams, shifted, poison);
  } else
#endif
    poison = poison_of(cpu::quantize_to_uint8(x, values, mask, spec, range, qparams, shifted));
  if (range) {
    bump_versions(*range);
  }
  return {values, with_mask ? mask : fresh({0}, at::kByte, x), qparams.scale.view(at::IntArrayRef()),
      qparams.zero_point.view(at::IntArrayRef()), shifted, poison};
}

Tensor int8_conv_scale_(
    const Tensor& sums, const Tensor& input_scale, const Tensor& weight_scale, const std::optional<Tensor>& bias) {
  constexpr auto op = "int8_conv_scale_";
  TORCH_CHECK_VALUE(sums.scalar_type() == at::kFloat && sums.dim() > 2 && sums.movedim(1, -1).is_contiguous(), op,
      ": expected float32 sums with the channels innermost in memory, got ", name_of(sums.scalar_type()), " of shape ",
      tuple(sums.sizes()), " and strides ", tuple(sums.strides()));
  const auto is_scale = [&](int64_t size) {
    return is_contiguous_of(input_scale, at::kFloat, size);
  };
  TORCH_CHECK_VALUE(is_scale(1) || is_scale(sums.size(0)), op,
      ": expected one float32 scale of the input, or one per sample, got ", tuple(input_scale.sizes()));
  check_channels(op, sums.size(1), weight_scale, bias);
  const float most = sums.numel() == 0 ? 0 : cpu::scale_sums(sums, input_scale, weight_scale, bias.value_or(Tensor()));
  bump_version(sums);
  return at::full({}, most, at::kFloat);
}

Tensor int8_requantize_(
    const Tensor& sums, const Tensor& offset, const Tensor& factor, double low, double high, double scale) {
  constexpr auto op = "int8_requantize_";
  TORCH_CHECK_VALUE(
      sums.dim() == 2 && sums.is_contiguous() && (sums.scalar_type() == at::kInt || sums.scalar_type() == at::kFloat),
      op, ": expected a contiguous matrix of int32 or float32, got ", name_of(sums.scalar_type()), " of shape ",
      tuple(sums.sizes()));
  const auto columns = sums.size(1);
  TORCH_CHECK_VALUE(is_contiguous_of(offset, at::kInt, columns) && is_contiguous_of(factor, at::kFloat, columns), op,
      ": expected one int32 offset and one float32 factor per column, got ", tuple(offset.sizes()), " and ",
      tuple(factor.sizes()));
  if (sums.numel() > 0) {
    cpu::requantize(sums, offset, factor, static_cast<float>(low), static_cast<float>(high), static_cast<float>(scale));
  }
  bump_version(sums);
  return sums;
}

Tensor int8_conv_mask_(const Tensor& grad, const Tensor& mask, const Tensor& values) {
  constexpr auto op = "int8_conv_mask_";
  check_float(op, "grad", grad.scalar_type());
  check_device(op, "mask", mask, grad);
  check_device(op, "values", values, grad);
  TORCH_CHECK_VALUE(grad.sizes() == values.sizes() && mask.scalar_type() == at::kByte && mask.is_contiguous() &&
          mask.sizes() == at::IntArrayRef({mask_bytes(grad)}),
      op, ": expected the gradient, the mask and the integers of one input, got ", tuple(grad.sizes()), ", ",
      tuple(mask.sizes()), " and ", tuple(values.sizes()));
  if (grad.strides() == values.strides() && grad.is_non_overlapping_and_dense()) {
    QATFAST_ON(grad, fake_quantize_affine_backward)(grad, mask, grad);
  } else {
    grad.copy_(fake_quantize_affine_backward(grad, mask, c10::fromIntArrayRefSlow(values.strides())));
  }
  bump_version(grad);
  return grad;
}

namespace {

// Checks the arguments of a depthwise convolution. Returns the shape of its result.
at::DimVector checked_depthwise(const char* op, const Tensor& values, const Tensor& weight, at::ScalarType weight_dtype,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const bool are_pairs = kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2;
  TORCH_CHECK_VALUE(values.dim() == 4 && are_pairs, op,
      ": expected an input of 4 dimensions and the arguments of a convolution in two dimensions, got ",
      tuple(values.sizes()));
  const auto channels = values.size(1), taps = kernel_size[0] * kernel_size[1];
  TORCH_CHECK_VALUE(weight.scalar_type() == weight_dtype && weight.is_contiguous() && kernel_size[0] > 0 && taps > 0 &&
          taps <= cpu::most_depthwise_taps && weight.dim() > 0 && weight.size(0) == channels &&
          weight.numel() == channels * taps,
      op, ": expected a weight of ", name_of(weight_dtype), " of shape ", tuple({channels, taps}), " of at most ",
      cpu::most_depthwise_taps, " columns, got ", name_of(weight.scalar_type()), " of shape ", tuple(weight.sizes()));
  at::DimVector shape = {values.size(0), channels};
  for (const size_t d : {0, 1}) {
    TORCH_CHECK_VALUE(stride[d] > 0 && padding[d] >= 0 && dilation[d] > 0, op,
        ": expected stride and dilation to be at least 1, and padding at least 0, got ", tuple(stride), ", ",
        tuple(dilation), " and ", tuple(padding));
    const auto reach = values.size(d + 2) + 2 * padding[d] - dilation[d] * (kernel_size[d] - 1) - 1;
    TORCH_CHECK_VALUE(
        reach >= 0, op, ": expected an input that is at least as large as the kernel, got ", tuple(values.sizes()));
    shape.push_back(reach / stride[d] + 1);
  }
  return shape;
}

// Checks the arguments of a depthwise convolution and the integers of its input. Returns the shape of its result.
at::DimVector checked_depthwise(const char* op, const Tensor& values, const Tensor& scale,
    const Tensor& shifted_zero_point, const Tensor& weight, at::ScalarType weight_dtype, at::IntArrayRef kernel_size,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  TORCH_CHECK_VALUE(
      values.scalar_type() == at::kByte, op, ": expected uint8 values, got ", name_of(values.scalar_type()));
  TORCH_CHECK_VALUE(is_contiguous_of(scale, at::kFloat, 1) && is_contiguous_of(shifted_zero_point, at::kInt, 1), op,
      ": expected one scale and zero point of the input");
  check_zero_points(op, "shifted_zero_point", shifted_zero_point, 0, 255);
  return checked_depthwise(op, values, weight, weight_dtype, kernel_size, stride, padding, dilation);
}

Tensor depthwise_result(at::IntArrayRef shape, const Tensor& input) {
  return with_few_page_faults(at::empty(shape, input.options().dtype(at::kFloat), at::MemoryFormat::ChannelsLast));
}

} // namespace

Tensor int8_conv_depthwise(const Tensor& values, const Tensor& scale, const Tensor& shifted_zero_point,
    const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias, at::IntArrayRef kernel_size,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  constexpr auto op = "int8_conv_depthwise";
  const auto shape = checked_depthwise(
      op, values, scale, shifted_zero_point, weight, at::kChar, kernel_size, stride, padding, dilation);
  check_channels(op, values.size(1), weight_scale, bias);
  const auto y = depthwise_result(shape, values);
  if (y.numel() > 0) {
    const cpu::DepthwiseTask task = {values.contiguous(at::MemoryFormat::ChannelsLast), Tensor(), weight, kernel_size,
        stride, padding, dilation, weight_scale, bias.value_or(Tensor()), y};
    cpu::depthwise(task.with_grid(scale, shifted_zero_point));
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> int8_conv_depthwise_forward(const Tensor& input,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& zero_point,
    const std::optional<Tensor>& running_min, const std::optional<Tensor>& running_max,
    const std::optional<Tensor>& num_batches, double averaging_constant, at::IntArrayRef input_spec,
    const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias, at::IntArrayRef kernel_size,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool with_values, bool with_mask) {
  constexpr auto op = "int8_conv_depthwise_forward";
  constexpr auto format = at::MemoryFormat::ChannelsLast;
  const auto shape = checked_depthwise(op, input, weight, at::kChar, kernel_size, stride, padding, dilation);
  check_channels(op, input.size(1), weight_scale, bias);
  TORCH_CHECK_TYPE(input.scalar_type() != at::kDouble, op, ": expected input to be float32, float16 or bfloat16, got ",
      name_of(input.scalar_type()));
  const auto of_input = checked_conv_input(
      op, input, scale, zero_point, running_min, running_max, num_batches, averaging_constant, input_spec);
  const auto& [spec, x, qparams, shifted, range] = of_input;
  const auto y = depthwise_result(shape, x);
  const bool in_one_pass = x.is_contiguous(format);
  const auto values = with_values || with_mask || !in_one_pass ? fresh_like(x, at::kByte) : Tensor();
  const auto mask = with_mask ? fresh_mask(x) : Tensor();
  const auto task_of = [&](const Tensor& from, const Tensor& kept) -> cpu::DepthwiseTask {
    return {from, kept, weight, kernel_size, stride, padding, dilation, weight_scale, bias.value_or(Tensor()), y};
  };
  bool has_nan = false;
  if (in_one_pass) {
    has_nan = cpu::quantize_and_convolve(task_of(x, values), mask, spec, range, qparams, shifted);
  } else {
    has_nan = cpu::quantize_to_uint8(x, values, mask, spec, range, qparams, shifted);
    cpu::depthwise(task_of(values.contiguous(format), Tensor()).with_grid(qparams.scale, shifted));
  }
  if (range) {
    bump_versions(*range);
  }
  const auto nothing = [&](const Tensor& made) {
    return made.defined() ? made : fresh({0}, at::kByte, x);
  };
  return {nothing(values), nothing(mask), qparams.scale.view(at::IntArrayRef()),
      qparams.zero_point.view(at::IntArrayRef()), shifted, poison_of(has_nan), y};
}

std::tuple<Tensor, Tensor, Tensor> int8_conv_depthwise_backward(const Tensor& grad, const Tensor& values,
    const Tensor& scale, const Tensor& shifted_zero_point, const Tensor& weight_hat, const std::optional<Tensor>& mask,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    std::array<bool, 3> output_mask) {
  constexpr auto op = "int8_conv_depthwise_backward";
  const auto shape = checked_depthwise(
      op, values, scale, shifted_zero_point, weight_hat, at::kFloat, kernel_size, stride, padding, dilation);
  TORCH_CHECK_VALUE(grad.scalar_type() == at::kFloat && grad.sizes() == at::IntArrayRef(shape), op,
      ": expected a float32 gradient of shape ", tuple(shape), ", got ", name_of(grad.scalar_type()), " of shape ",
      tuple(grad.sizes()));
  constexpr auto format = at::MemoryFormat::ChannelsLast;
  const auto integers = values.contiguous(format);
  const auto result = [&](int index, at::IntArrayRef sizes, at::MemoryFormat result_format) {
    return output_mask[index] ? at::empty(sizes, grad.options(), result_format) : Tensor();
  };
  auto dx = result(0, values.sizes(), format);
  const auto dw = result(1, weight_hat.sizes(), at::MemoryFormat::Contiguous);
  const auto db = result(2, {values.size(1)}, at::MemoryFormat::Contiguous);
  cpu::depthwise_backward({grad.contiguous(format), integers, *scale.const_data_ptr<float>(),
      *shifted_zero_point.const_data_ptr<int32_t>(), weight_hat, kernel_size, stride, padding, dilation, dx, dw, db});
  if (dx.defined()) {
    dx = dx.contiguous(values.suggest_memory_format());
    if (mask) {
      int8_conv_mask_(dx, *mask, values);
    }
  }
  return {dx, dw, db};
}

} // namespace qatfast::kernel
