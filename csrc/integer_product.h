// A linear layer on integers: y = (sum of (q_x - zero_point_x) (q_w - zero_point_w)) * (scale_x * scale_w) + bias, the
// sum exact at any size, so that every device gives the same bits. For every device; what differs is in the launchers.
#pragma once

#include "kernels.h"

namespace qatfast {

// A layer multiplies integers where its input is quantized per tensor or per token and its weight per tensor or per
// output channel (its rows, however that is spelled), both to at most 8 bits.
bool is_integer_input(const QuantSpec& spec);
bool is_integer_weight(const QuantSpec& spec, int64_t in_features);

// The same of the specs as the schemas have them, before they are checked.
bool multiplies_integers(const at::Tensor& weight, at::IntArrayRef specs);

// Of tensors that belong together. What an operator returns lies apart; what stays inside a call shares one memory, as
// that of its own for each takes 10 % of a small layer's time.
enum class Memory { apart, shared };

// A matrix on its integer grid; its blocks are its rows, or all of it.
IntegerRows integer_rows(const at::Tensor& matrix, const QuantSpec& spec, Memory memory);

// (rows, out_features) of `dtype`; the bias is of the compute dtype, or undefined.
at::Tensor integer_product(
    const IntegerRows& x, const IntegerRows& weight, const at::Tensor& bias, at::ScalarType dtype);

} // namespace qatfast
