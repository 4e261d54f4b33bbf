// Loads, stores and conversions of 16-byte pieces of memory, which all kernels share.
#pragma once

#include "common/quant_math.h"

#include <ATen/OpMathType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace qatfast::cuda {

using at::opmath_type;

template <class T>
constexpr int lanes = 16 / sizeof(T);

// N elements that are read or written by one access if the pointer is aligned.
template <class T, int N = lanes<T>>
struct alignas(N * sizeof(T)) Unit {
  T at[N];
};

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Calls f(grid) with the grid that divides fastest. A reciprocal of 0 means that there is none.
template <class C, class F>
__device__ __forceinline__ void with_fastest(const ReciprocalGrid<C>& grid, F f) {
  if constexpr (std::is_same_v<C, float>) {
    if (grid.reciprocal != 0) {
      return f(grid);
    }
  }
  f(static_cast<const Grid<C>&>(grid));
}

template <class C>
__device__ __forceinline__ ReciprocalGrid<C> with_reciprocal(const Grid<C>& grid) {
  C reciprocal = 0;
  if constexpr (std::is_same_v<C, float>) {
    reciprocal = has_reciprocal(grid.scale) ? 1 / grid.scale : 0;
  }
  return {grid, reciprocal, grid.lo * grid.scale, grid.hi * grid.scale};
}

// Stores 2 to 16 bytes by one access. The intrinsic keeps the compiler from splitting the store to merge it with those
// of single elements.
template <class T, int N>
__device__ __forceinline__ void store_whole(T* to, const Unit<T, N>& unit) {
  constexpr int size = N * sizeof(T);
  using Word = std::conditional_t<size == 16, uint4,
      std::conditional_t<size == 8, uint2,
          std::conditional_t<size == 4, unsigned int, std::conditional_t<size == 2, unsigned short, unsigned char>>>>;
  __stwb(reinterpret_cast<Word*>(to), bits_as<Word>(unit));
}

// Two values rounded once, half to even, to T. What underflows in T becomes 0.0, never -0.0. `normal`: nothing
// underflows.
template <class T, bool normal>
__device__ __forceinline__ uint32_t rounded_pair(float a, float b) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, c10::Half>) {
    pair = bits_as<uint32_t>(__floats2half2_rn(a, b));
  } else {
    pair = bits_as<uint32_t>(__floats2bfloat162_rn(a, b));
  }
  if (normal) {
    return pair;
  }
  pair = (pair & 0xFFFF) == 0x8000 ? pair & 0xFFFF0000 : pair;
  return pair >> 16 == 0x8000 ? pair & 0xFFFF : pair;
}

// `values` as a unit of T.
template <class T, bool normal = false, class C, int N>
__device__ __forceinline__ Unit<T, N> narrowed(const C (&values)[N]) {
  Unit<T, N> unit;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const auto pair = bits_as<Unit<T, 2>>(rounded_pair<T, normal>(values[i], values[i + 1]));
      unit.at[i] = pair.at[0];
      unit.at[i + 1] = pair.at[1];
    }
  } else if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      unit.at[i] = bits_as<Unit<T, 2>>(rounded_pair<T, normal>(values[i], 0)).at[0];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      unit.at[i] = values[i];
    }
  }
  return unit;
}

} // namespace qatfast::cuda
