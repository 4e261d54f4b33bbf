// Sums whose order depends on their length only.
#pragma once

#include "common/quant_math.h"

#include <algorithm>
#include <cstdint>

namespace qatfast::cpu {

inline int64_t chunks_of(int64_t n) {
  return std::max<int64_t>(1, (n + sum_chunk - 1) / sum_chunk);
}

// The sum of the lanes of a chunk, which are overwritten.
inline double sum_of_lanes(double* lanes) {
  for (int64_t half = sum_lanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) {
      lanes[l] += lanes[l + half];
    }
  }
  return lanes[0];
}

// The sum of `values`, which are overwritten. The chunks' sums of a block are values whose sum is that of the block.
inline double ordered_sum(double* values, int64_t n) {
  while (n > 1) {
    for (int64_t chunk = 0; chunk < n; chunk += sum_chunk) {
      double lanes[sum_lanes] = {};
      for (int64_t i = chunk; i < std::min(n, chunk + sum_chunk); ++i) {
        lanes[i % sum_lanes] += values[i];
      }
      values[chunk / sum_chunk] = sum_of_lanes(lanes);
    }
    n = chunks_of(n);
  }
  return values[0];
}

} // namespace qatfast::cpu
