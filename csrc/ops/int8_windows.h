// The sums of a convolution alone, which no operator returns.
#pragma once

#include <ATen/core/Tensor.h>

namespace qatfast {

// Returns those of int8_conv_grouped in int32, on processors with pair products; the scales are not read.
at::Tensor int8_conv_sums(const at::Tensor& values, const at::Tensor& scale, const at::Tensor& zero_point,
    at::TensorList int8_weight, int64_t groups, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef spread, at::IntArrayRef output_size);

} // namespace qatfast
