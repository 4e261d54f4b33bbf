// Sums in double whose order depends on their length only, with the bits of cpu/sum.h.
// A warp sums a chunk (sum_chunk in quant_math.h): each of its threads is a lane.
#pragma once

#include "common/quant_math.h"

#include <cstdint>

namespace qatfast::cuda {

__host__ __device__ __forceinline__ int64_t chunks_of(int64_t n) {
  return n > sum_chunk ? (n + sum_chunk - 1) / sum_chunk : 1;
}

// The numbers that ordered_sum of n chunks' sums takes: those of every level.
inline int64_t count_of_sums(int64_t n) {
  int64_t total = n;
  while (n > 1) {
    n = chunks_of(n);
    total += n;
  }
  return total;
}

// The sum of the lanes of a warp, in every lane.
__device__ __forceinline__ double sum_of_lanes(double lane) {
#pragma unroll
  for (int half = sum_lanes / 2; half > 0; half /= 2) {
    lane += __shfl_xor_sync(0xFFFFFFFF, lane, half);
  }
  return lane;
}

// The sum of values[0] to values[n - 1], in every thread of the CTA. `values` has room for count_of_sums(n), and all
// threads of the CTA see the values.
__device__ __forceinline__ double ordered_sum(double* values, int64_t n) {
  const int lane = threadIdx.x % sum_lanes;
  const int64_t warp = threadIdx.x / sum_lanes, warps = blockDim.x / sum_lanes;
  while (n > 1) {
    double* sums = values + n;
    for (int64_t chunk = warp; chunk < chunks_of(n); chunk += warps) {
      double sum = 0;
      for (int64_t i = chunk * sum_chunk + lane; i < n && i < (chunk + 1) * sum_chunk; i += sum_lanes) {
        sum += values[i];
      }
      sum = sum_of_lanes(sum);
      if (lane == 0) {
        sums[chunk] = sum;
      }
    }
    __syncthreads();
    values = sums;
    n = chunks_of(n);
  }
  return values[0];
}

} // namespace qatfast::cuda
