// How the tensors of a linear layer are quantized, as schemas write it: `int[] specs` holds four codes, those of input,
// weight, bias and output. A code is (num_bits, grid, granularity kind, granularity argument); num_bits is 0 if the
// tensor stays in float. (An empty list would do for that, but AOTInductor hands one on as None.)
#pragma once

#include "kernels.h"

#include <optional>

namespace qatfast {

constexpr size_t code_size = 4;

enum GridCode : int64_t { affine_grid, narrow_range_grid, full_range_grid };
enum class Role : size_t { input, weight, bias, output };

inline at::IntArrayRef code_of(at::IntArrayRef specs, Role role) {
  return specs.slice(static_cast<size_t>(role) * code_size, code_size);
}

// Not checked yet.
inline std::optional<QuantSpec> spec_of(at::IntArrayRef code) {
  if (code[0] == 0) {
    return std::nullopt;
  }
  const Granularity granularity{static_cast<Granularity::Kind>(code[2]), code[3]};
  return QuantSpec{code[0], code[1] != affine_grid, granularity, code[1] != full_range_grid};
}

} // namespace qatfast
