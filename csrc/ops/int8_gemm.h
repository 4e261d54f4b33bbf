// The int8 GEMM of a layer: y = (sum of (q_x - zero_point_x) (q_w - zero_point_w)) * (scale_x * scale_w) + bias. The
// sum is exact at any size, so that every device returns the same bits. Devices differ in the launchers only.
#pragma once

#include "launchers.h"

namespace qatfast {

// A layer uses the int8 GEMM if its input is quantized per tensor or per token and its weight per tensor or per output
// channel (its rows, however that is written), both to at most 8 bits.
bool is_int8_input(const QuantSpec& spec);
bool is_int8_weight(const QuantSpec& spec, int64_t in_features);

// Whether a layer of this weight uses it, for specs that are not checked yet.
bool uses_int8_gemm(const at::Tensor& weight, at::IntArrayRef specs);

// How the tensors of Int8Rows are allocated. What an operator returns is separate; what stays inside a call shares one
// memory, as separate tensors take 10 % of a small layer's time.
enum class Allocation { separate, shared };

// Quantizes a matrix whose blocks are its rows, or all of it: by their own ranges or, if given, with static ones.
Int8Rows quantize_rows(const at::Tensor& matrix, const QuantSpec& spec, Allocation allocation,
    const std::optional<QParams>& qparams = std::nullopt);

// Returns x @ weight.T of int8 matrices in int32, on the CPU, exact for at most 2^16 columns.
at::Tensor int8_mm(const at::Tensor& x, const at::Tensor& weight);

// Returns (rows, out_features) of `dtype`. The bias is of the opmath type, or undefined.
at::Tensor int8_gemm(const Int8Rows& x, const Int8Rows& weight, const at::Tensor& bias, at::ScalarType dtype);

} // namespace qatfast
