// What kernels for static ranges share. Each thread handles one unit of neighbouring elements at a time, which may span
// several blocks.
#pragma once

#include "cuda/launch.h"
#include "launchers.h"
#include "cuda/units.cuh"

namespace qatfast::cuda {

constexpr int static_threads = 256;

template <class C>
struct StaticGrid {
  C zero_point;
  ReciprocalGrid<C> grid;
};

// The grid of every element of a tensor.
template <class C>
struct StaticGrids {
  const C* scale;
  const int32_t* zero_point;
  C quant_min;
  C quant_max;
  Layout layout;
  bool learned = false; // whether the scale is a learned one

  __device__ __forceinline__ Grid<C> grid_of(int64_t block) const {
    const C zero = static_cast<C>(zero_point[block]);
    return {learned ? magnitude_of_learned(scale[block]) : scale[block], quant_min - zero, quant_max - zero};
  }

  __device__ __forceinline__ StaticGrid<C> only() const {
    return {static_cast<C>(zero_point[0]), with_reciprocal(grid_of(0))};
  }

  // Calls f(i, zero_point, grid) for the elements begin + i of a unit of N.
  template <int N, class F>
  __device__ __forceinline__ void for_each(int64_t begin, int count, const StaticGrid<C>& only, F f) const {
    if (layout.blocks == 1) {
      with_fastest(only.grid, [&](const auto& grid) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          f(i, only.zero_point, grid);
        }
      });
      return;
    }
    int64_t run;
    if (begin <= 0xFFFFFFFF && layout.inner <= 0xFFFFFFFF) { // 32 bits take half the time
      run = static_cast<uint32_t>(begin) / static_cast<uint32_t>(layout.inner);
    } else {
      run = begin / layout.inner;
    }
    int64_t left = (run + 1) * layout.inner - begin;
    int64_t block = run % layout.blocks;
    const auto zero_of_block = [&] {
      return static_cast<C>(zero_point[block]);
    };
    C zero = zero_of_block();
    auto grid = grid_of(block);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (left == 0 && i < count) {
        left = layout.inner;
        block = block + 1 == layout.blocks ? 0 : block + 1;
        zero = zero_of_block();
        grid = grid_of(block);
      }
      --left;
      f(i, zero, grid);
    }
  }
};

template <class C>
StaticGrids<C> grids_of(const QParams& qparams, const Layout& layout) {
  return {qparams.scale.const_data_ptr<C>(), qparams.zero_point.const_data_ptr<int32_t>(),
      static_cast<C>(qparams.quant_min), static_cast<C>(qparams.quant_max), layout};
}

// Where the elements of a block lie.
struct BlockElements {
  Layout layout;
  int64_t block;

  __device__ __forceinline__ int64_t at(int64_t i) const {
    if (layout.outer == 1) {
      return block * layout.inner + i;
    }
    const int64_t run = i <= 0xFFFFFFFF && layout.inner <= 0xFFFFFFFF
        ? static_cast<uint32_t>(i) / static_cast<uint32_t>(layout.inner) // 32 bits take half the time
        : i / layout.inner;
    return i + (run * (layout.blocks - 1) + block) * layout.inner;
  }
};

// Calls f(first element, count) for every unit of N elements. Whole warps take part; past the end, count is 0.
template <int N, class F>
__device__ __forceinline__ void for_each_unit(int64_t numel, F f) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  const int lane = threadIdx.x % 32;
  for (int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x - lane; first * N < numel; first += stride) {
    const int64_t begin = (first + lane) * N;
    f(begin, static_cast<int>(numel - begin < N ? (numel > begin ? numel - begin : 0) : N));
  }
}

template <class T, int N>
__device__ __forceinline__ Unit<T, N> load(const T* from, int count, bool aligned) {
  if (aligned && count == N) {
    return *reinterpret_cast<const Unit<T, N>*>(from);
  }
  Unit<T, N> unit{};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) {
      unit.at[i] = from[i];
    }
  }
  return unit;
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const Unit<T, N>& unit, int count, bool aligned) {
  if (aligned && count == N) {
    return store_whole(to, unit);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) {
      to[i] = unit.at[i];
    }
  }
}

// A mask has one bit per element: threads with units in the same byte pass their bits to the first of them.
template <int N>
constexpr int units_per_byte = N < 8 ? 8 / N : 1;

template <int N>
__device__ __forceinline__ void store_mask(uint8_t* mask, int64_t begin, int count, unsigned bits) {
  for (int offset = 1; offset < units_per_byte<N>; offset *= 2) {
    bits |= __shfl_down_sync(0xFFFFFFFF, bits, offset) << (offset * N);
  }
  if (begin % 8 == 0 && count > 0) {
    mask[begin / 8] = static_cast<uint8_t>(bits);
  }
}

template <int N>
__device__ __forceinline__ unsigned load_mask(const uint8_t* mask, int64_t begin, int count) {
  unsigned bits = begin % 8 == 0 && count > 0 ? mask[begin / 8] : 0;
  if (N < 8) {
    bits = __shfl_sync(0xFFFFFFFF, bits, threadIdx.x % 32 / units_per_byte<N> * units_per_byte<N>);
  }
  return bits >> (begin % 8);
}

// Runs kernel(arguments) with one thread per unit of T, on the current stream.
template <class T, class... Parameters, class... Arguments>
void launch_over_units(const at::Tensor& x, void (*kernel)(Parameters...), Arguments... arguments) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto units = (x.numel() + lanes<T> - 1) / lanes<T>;
  kernel<<<ctas_for(units, static_threads, x.device().index()), static_threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

} // namespace qatfast::cuda
