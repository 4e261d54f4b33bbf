// What says how tensors are quantized: the spec of a dynamic range, the parameters of a static one, the specs of a
// layer.
#pragma once

#include "common/layout.h"
#include "common/quant_math.h"
#include "common/quant_range.h"

#include <ATen/core/Tensor.h>

#include <optional>

namespace qatfast {

// The most products of two levels of 8 bits, 255 * 255 each, whose sum fits in 32 bits.
constexpr int64_t int32_features = 33025;

// How one tensor is quantized by its own range.
struct QuantSpec {
  int64_t num_bits;
  bool symmetric;
  Granularity granularity;
  bool narrow_range = true; // of a symmetric grid

  int64_t quant_min() const {
    return quant_min_of(num_bits, symmetric, narrow_range);
  }
  int64_t quant_max() const {
    return quant_max_of(num_bits, symmetric);
  }
  // What is added to its integers to store them as uint8.
  int uint8_shift() const {
    return quant_min() < 0 ? 128 : 0;
  }
  template <class T>
  QuantRange<T> quant_range() const {
    return {static_cast<T>(quant_min()), static_cast<T>(quant_max()), symmetric};
  }
};

// A static grid. `scale` (of the opmath type) and `zero_point` (int32) are contiguous and have one element per block.
struct QParams {
  at::Tensor scale;
  at::Tensor zero_point;
  int64_t quant_min;
  int64_t quant_max;
};

// The specs of the tensors of a linear layer; a tensor without one stays in float.
//
// Schemas write them as `int[] specs` of 16 integers: a code of four for each of input, weight, bias and output. A code
// is (num_bits, grid, granularity kind, granularity argument); num_bits is 0 if the tensor stays in float. (AOTInductor
// passes an empty list on as None, so that "float" cannot be one.)
struct LinearSpecs {
  static constexpr size_t code_size = 4;
  static constexpr size_t size = 4 * code_size;
  enum Role : size_t { input_role, weight_role, bias_role, output_role };
  enum GridCode : int64_t { affine_grid, narrow_range_grid, full_range_grid };

  std::optional<QuantSpec> input, weight, bias, output;

  static at::IntArrayRef code_of(at::IntArrayRef specs, Role role) {
    return specs.slice(static_cast<size_t>(role) * code_size, code_size);
  }

  // The spec that a code stands for, whether it is legal or not.
  static std::optional<QuantSpec> decoded(at::IntArrayRef code) {
    if (code[0] == 0) {
      return std::nullopt;
    }
    const Granularity granularity{static_cast<Granularity::Kind>(code[2]), code[3]};
    return QuantSpec{code[0], code[1] != affine_grid, granularity, code[1] != full_range_grid};
  }
};

} // namespace qatfast
