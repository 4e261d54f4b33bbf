// Layers on int8 that Python calls in one step instead of several operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace qatfast {

// Computes observe_range and qat_linear_int8_static in one call: two from Python take longer than the loops of a small
// layer. Returns the result, and scale and zero point of the input.
std::tuple<at::Tensor, at::Tensor, at::Tensor> qat_linear_int8_observed(const at::Tensor& input,
    const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::TensorList int8_weight,
    const at::Tensor& running_min, const at::Tensor& running_max, const at::Tensor& num_batches,
    double averaging_constant, at::IntArrayRef codes);

// Computes quantize, the product of the integers and int8_requantize_ in one call, for the same reason. A row with a
// NaN gives NaN.
at::Tensor int8_linear_requantized(const at::Tensor& input, const at::Tensor& scale, const at::Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, const at::Tensor& weight, const at::Tensor& offset, const at::Tensor& factor,
    double low, double high, double y_scale);

} // namespace qatfast
