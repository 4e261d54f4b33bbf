// Convolutions of integers for which there is no product of a library: im2col, and groups.
#include "ops/int8_windows.h"

#include "checks.h"
#include "common/memory.h"
#include "common/windows.h"
#include "launchers.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

namespace qatfast::kernel {
namespace {

constexpr int64_t int32_max = std::numeric_limits<int32_t>::max();

// Returns the product of sizes, of which only the first may be more than int32_max, or a partial product that is more.
int64_t product_up_to_int32_max(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const auto size : sizes) {
    product *= size;
    if (product > int32_max) {
      break;
    }
  }
  return product;
}

WindowGeometry checked_geometry(const char* op, const Tensor& values, at::IntArrayRef kernel_size,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef spread,
    at::IntArrayRef output_size) {
  constexpr int dims = WindowGeometry::dims;
  const auto own = values.dim() - 2;
  TORCH_CHECK_VALUE(values.scalar_type() == at::kByte && 0 < own && own <= dims, op,
      ": expected uint8 values of 3 to 5 dimensions, got ", name_of(values.scalar_type()), " of shape ",
      tuple(values.sizes()));
  WindowGeometry geometry;
  const auto fill = [&](const char* name, at::IntArrayRef from, Coordinates& to, int64_t least, int32_t other) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(from.size()) == own, op, ": expected ", name, " to have ", own,
        " elements (values.dim() - 2), got ", tuple(from));
    std::fill_n(to, dims, other);
    for (int64_t d = 0; d < own; ++d) {
      TORCH_CHECK_VALUE(least <= from[d] && from[d] <= int32_max, op, ": expected ", name, " from ", least, " to ",
          int32_max, ", got ", tuple(from));
      to[dims - own + d] = static_cast<int32_t>(from[d]);
    }
  };
  fill("the size", values.sizes().slice(2), geometry.size, 0, 1);
  fill("kernel_size", kernel_size, geometry.kernel, 1, 1);
  fill("stride", stride, geometry.stride, 1, 1);
  fill("padding", padding, geometry.padding, -int32_max, 0);
  fill("dilation", dilation, geometry.dilation, 1, 1);
  fill("spread", spread, geometry.spread, 1, 1);
  fill("output_size", output_size, geometry.output_size, 0, 1);
  for (int d = 0; d < dims; ++d) {
    const auto outputs = int64_t{geometry.output_size[d]} * geometry.stride[d],
               taps = int64_t{geometry.kernel[d]} * geometry.dilation[d];
    TORCH_CHECK_VALUE(outputs + taps + std::abs(int64_t{geometry.padding[d]}) <= int32_max, op,
        ": expected windows within 2^31 elements of a dimension, got strides, dilations and padding that reach "
        "further");
  }
  const auto product_of = [](const Coordinates& sizes) {
    return product_up_to_int32_max({sizes[0], sizes[1], sizes[2]});
  };
  TORCH_CHECK_VALUE(product_of(geometry.output_size) <= int32_max, op,
      ": expected less than 2^31 windows per sample, got output_size ", tuple(output_size));
  TORCH_CHECK_VALUE(product_of(geometry.kernel) <= int32_max, op,
      ": expected windows of less than 2^31 elements, got kernel_size ", tuple(kernel_size));
  return geometry;
}

WindowTask checked_input(const char* op, const WindowGeometry& geometry, const Tensor& values, const Tensor& scale,
    const Tensor& zero_point, const std::optional<Tensor>& input, const std::optional<Tensor>& poison) {
  const auto samples = values.size(0);
  const auto is_grid = [&](const Tensor& x) {
    return (x.numel() == 1 || x.numel() == samples) && x.is_contiguous();
  };
  TORCH_CHECK_VALUE((scale.scalar_type() == at::kFloat || scale.scalar_type() == at::kDouble) &&
          zero_point.scalar_type() == at::kInt && is_grid(scale) && is_grid(zero_point) &&
          scale.numel() == zero_point.numel(),
      op, ": expected one scale (float32 or float64) and zero point (int32) of the input, or one per sample, got ",
      tuple(scale.sizes()), " and ", tuple(zero_point.sizes()));
  check_zero_points(op, "zero_point", zero_point, 0, 255);
  TORCH_CHECK_VALUE(input.has_value() == poison.has_value(), op, ": expected both input and poison, or neither");
  if (input) {
    check_float(op, "input", input->scalar_type());
    TORCH_CHECK_VALUE(input->sizes() == values.sizes() && input->scalar_type() != at::kDouble &&
            poison->scalar_type() == at::kFloat && poison->numel() == 1,
        op, ": expected the input of the values and one float32 poison, got ", name_of(input->scalar_type()),
        " of shape ", tuple(input->sizes()), " and ", name_of(poison->scalar_type()));
  }
  for (const auto& tensor : {scale, zero_point, input.value_or(values), poison.value_or(values)}) {
    check_device(op, "all tensors", tensor, values);
  }
  return {geometry, values.movedim(1, -1).contiguous(), scale, zero_point, input.value_or(Tensor()),
      poison.value_or(Tensor())};
}

// The task with a fresh result of `dtype`.
GroupedTask checked_grouped_task(const char* op, const Tensor& values, const Tensor& scale, const Tensor& zero_point,
    const std::optional<Tensor>& input, const std::optional<Tensor>& poison, at::TensorList int8_weight,
    const std::optional<Tensor>& bias, int64_t groups, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef spread, at::IntArrayRef output_size,
    at::ScalarType dtype) {
  const auto geometry = checked_geometry(op, values, kernel_size, stride, padding, dilation, spread, output_size);
  const auto task = checked_input(op, geometry, values, scale, zero_point, input, poison);
  const auto taps = WindowGeometry::product(geometry.kernel), channels = values.size(1);
  TORCH_CHECK_VALUE(int8_weight.size() >= 3, op, ": expected the values, scales and zero points of a weight, got ",
      int8_weight.size(), " tensors");
  const auto &weight = int8_weight[0], &weight_scale = int8_weight[1], &weight_zero_point = int8_weight[2];
  const auto outputs = weight_scale.numel();
  TORCH_CHECK_VALUE(groups > 0 && channels % groups == 0 && outputs % groups == 0, op,
      ": expected channels and outputs that are divisible by groups=", groups, ", got ", channels, " and ", outputs);
  TORCH_CHECK_VALUE(weight.scalar_type() == at::kChar && weight.dim() == 2 && weight.size(0) == outputs &&
          weight.size(1) == taps * (channels / groups) &&
          is_contiguous_of(weight_scale, scale.scalar_type(), outputs) &&
          is_contiguous_of(weight_zero_point, at::kInt, outputs) &&
          (!bias || is_contiguous_of(*bias, scale.scalar_type(), outputs)),
      op, ": expected an int8 weight with a row of ", taps * (channels / groups),
      " elements, a scale and a zero point per output, got ", name_of(weight.scalar_type()), " of shape ",
      tuple(weight.sizes()));
  check_zero_points(op, "the weight's zero_point", weight_zero_point, -128, 127);
  for (const auto& tensor : {weight, weight_scale, weight_zero_point, bias.value_or(values)}) {
    check_device(op, "all tensors", tensor, values);
  }
  at::DimVector shape = {values.size(0)};
  shape.append(output_size.begin(), output_size.end());
  shape.push_back(outputs);
  return {task, weight.contiguous(), weight_scale, weight_zero_point, bias.value_or(Tensor()), groups,
      fresh(shape, dtype, values)};
}

} // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> int8_conv_windows(const Tensor& values, const Tensor& scale,
    const Tensor& zero_point, const std::optional<Tensor>& input, const std::optional<Tensor>& poison,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    at::IntArrayRef spread, at::IntArrayRef output_size) {
  constexpr auto op = "int8_conv_windows";
  const auto geometry = checked_geometry(op, values, kernel_size, stride, padding, dilation, spread, output_size);
  const auto task = checked_input(op, geometry, values, scale, zero_point, input, poison);
  const auto rows = values.size(0) * WindowGeometry::product(geometry.output_size);
  const auto columns = product_up_to_int32_max({values.size(1), WindowGeometry::product(geometry.kernel)});
  TORCH_CHECK_VALUE(columns <= int32_max, op, ": expected windows of less than 2^31 elements, got ", columns);
  const Int8Rows to = {fresh({rows, columns}, at::kChar, values), fresh({rows}, scale.scalar_type(), values),
      fresh({rows}, at::kInt, values), fresh({rows}, at::kLong, values)};
  if (rows > 0) {
    QATFAST_ON(values, int8_conv_windows)(task, to);
  }
  return {to.values, to.scale, to.zero_point, to.level_sums};
}

Tensor int8_conv_grouped(const Tensor& values, const Tensor& scale, const Tensor& zero_point,
    const std::optional<Tensor>& input, const std::optional<Tensor>& poison, at::TensorList int8_weight,
    const std::optional<Tensor>& bias, int64_t groups, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef spread, at::IntArrayRef output_size) {
  const auto task = checked_grouped_task("int8_conv_grouped", values, scale, zero_point, input, poison, int8_weight,
      bias, groups, kernel_size, stride, padding, dilation, spread, output_size, scale.scalar_type());
  if (task.y.numel() > 0) {
    QATFAST_ON(values, int8_conv_grouped)(task);
  }
  return task.y.movedim(-1, 1);
}

} // namespace qatfast::kernel

namespace qatfast {

Tensor int8_conv_sums(const Tensor& values, const Tensor& scale, const Tensor& zero_point, at::TensorList int8_weight,
    int64_t groups, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, at::IntArrayRef spread, at::IntArrayRef output_size) {
  constexpr auto op = "int8_conv_sums";
  const auto task = kernel::checked_grouped_task(op, values, scale, zero_point, std::nullopt, std::nullopt, int8_weight,
      std::nullopt, groups, kernel_size, stride, padding, dilation, spread, output_size, at::kInt);
  TORCH_CHECK(values.is_cpu() && (task.y.numel() == 0 || cpu::try_pair_products(task)), op,
      ": expected a processor with pair products, and sums that 32 bits hold");
  return task.y.movedim(-1, 1);
}

} // namespace qatfast
