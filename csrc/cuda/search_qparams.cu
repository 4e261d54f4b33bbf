// The least squared error among the grids of 80 shrunk ranges. A CTA sums the errors of a piece of a block: each of its
// 32 warps (fewer for a small block) owns every 32nd chunk (sum.cuh), which it holds in registers for all grids. Bound
// by arithmetic: 80 quantizations per element.
//
//   small blocks   one launch: a CTA finds the range of its block, the errors and the least of them
//   others         three launches: ranges; errors, by several CTAs for a block; the least of them
#include "cuda/dynamic_quantize.cuh"
#include "cuda/launch.h"
#include "cuda/static_quantize.cuh"
#include "cuda/sum.cuh"

#include <algorithm>
#include <limits>

namespace qatfast::cuda {
namespace {

constexpr int64_t piece_size = int64_t{sum_chunk} * sum_chunk; // elements whose chunks' sums form one chunk
constexpr int range_threads = 256;

template <class T>
struct Search {
  using C = opmath_type<T>;
  const T* x;
  int64_t rows; // the blocks
  int64_t n;
  int64_t pieces; // of a block
  int groups;     // of grids; CTAs for a piece
  QuantRange<int32_t> quant_range;
  RangeKeys<C>* ranges; // of the blocks; null if CTAs find them
  double* errors;       // [block][grid][piece at every level]; null if a CTA finds the least
  int64_t stride;       // of a grid in `errors`
  C* scale;
  int32_t* zero_point;

  // The grid `index` of a block, from the largest range on.
  __device__ __forceinline__ BlockGrid<C> grid_of(const RangeKeys<C>& keys, int index) const {
    const C factor = shrinking_factor<C>(index);
    const Range<C> range{(C(0) - bits_as<C>(keys.below)) * factor, bits_as<C>(keys.above) * factor};
    return BlockGrid<C>(range.keys(), quant_range);
  }

  __device__ __forceinline__ void write(int64_t row, const RangeKeys<C>& keys, int index) const {
    const auto block_grid = grid_of(keys, index);
    scale[row] = block_grid.grid.scale;
    zero_point[row] = block_grid.zero_point;
  }
};

// Up to a chunk of a block, of whose elements each lane has every 32nd. Zeros stand for what is not finite, which every
// grid holds.
template <class T>
struct HeldChunk {
  using C = opmath_type<T>;
  static constexpr bool in_registers = sizeof(C) == 4; // float64 has no room: it is read again for each grid
  C values[in_registers ? sum_rows : 1];
  const T* from;
  int size;
  int rows;

  __device__ __forceinline__ void load(const T* x, int64_t n) {
    from = x;
    size = static_cast<int>(n >= sum_chunk ? sum_chunk : n < 0 ? 0 : n);
    rows = (size + sum_lanes - 1) / sum_lanes;
    if constexpr (in_registers) {
#pragma unroll
      for (int row = 0; row < sum_rows; ++row) {
        values[row] = read(row);
      }
    }
  }

  __device__ __forceinline__ C read(int row) const {
    const int i = row * sum_lanes + threadIdx.x % sum_lanes;
    return i < size ? finite_or_zero(static_cast<C>(from[i])) : C(0);
  }

  __device__ __forceinline__ C value(int row) const {
    if constexpr (in_registers) {
      return values[row];
    } else {
      return read(row);
    }
  }

  __device__ __forceinline__ void widen(Range<C>& range) const {
#pragma unroll(in_registers ? sum_rows : 1)
    for (int row = 0; row < sum_rows; ++row) {
      range.widen_by(value(row));
    }
  }

  // The sum of the squared errors, in every lane of the warp.
  __device__ __forceinline__ double error(const ReciprocalGrid<C>& reciprocal_grid) const {
    double sum = 0;
    with_fastest(reciprocal_grid, [&](const auto& grid) {
#pragma unroll(in_registers ? sum_rows : 1)
      for (int row = 0; row < sum_rows; ++row) {
        if (row < rows) {
          const C x = value(row);
          const double error = static_cast<double>(fake_quantize(x, grid)) - static_cast<double>(x);
          sum += error * error;
        }
      }
    });
    return sum_of_lanes(sum);
  }
};

template <class T>
__global__ void __launch_bounds__(1024) search_qparams_kernel(Search<T> search) {
  using C = opmath_type<T>;
  constexpr int kept = (shrunk_ranges + sum_lanes - 1) / sum_lanes;
  __shared__ RangeKeys<C> keys;
  __shared__ ReciprocalGrid<C> grids[shrunk_ranges];
  __shared__ double sums[shrunk_ranges][sum_lanes];
  const int lane = threadIdx.x % sum_lanes, warp = threadIdx.x / sum_lanes, warps = blockDim.x / sum_lanes;
  const int count = shrunk_ranges / search.groups;
  for (int64_t item = blockIdx.x; item < search.rows * search.pieces * search.groups; item += gridDim.x) {
    const int group = static_cast<int>(item % search.groups);
    const int64_t piece = item / search.groups % search.pieces, row = item / search.groups / search.pieces;
    const T* x = search.x + row * search.n + piece * piece_size;
    const int64_t left = search.n - piece * piece_size;
    const int64_t n = left < piece_size ? left : piece_size;
    HeldChunk<T> chunk;
    chunk.load(x + warp * sum_chunk, n - warp * sum_chunk);
    const auto for_each_chunk = [&](auto f) {
      for (int64_t begin = warp * sum_chunk; begin < n; begin += warps * sum_chunk) {
        if (n > warps * sum_chunk) { // else the chunk is held
          chunk.load(x + begin, n - begin);
        }
        f();
      }
    };
    if (threadIdx.x == 0) {
      keys = search.ranges ? search.ranges[row] : RangeKeys<C>{};
    }
    __syncthreads();
    if (!search.ranges) {
      Range<C> range;
      for_each_chunk([&] {
        chunk.widen(range);
      });
      const auto of_warp = range.keys().of_warp();
      if (lane == 0) {
        of_warp.widen_atomically(&keys);
      }
      __syncthreads();
    }
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      grids[i] = search.grid_of(keys, group * count + i).grid;
    }
    __syncthreads();
    // A warp is a lane of the next level: its sum for a grid is kept by the lane with the grid's number.
    double sum_of_grid[kept] = {};
    for_each_chunk([&] {
      for (int i = 0; i < count; ++i) {
        const double error = chunk.error(grids[i]);
#pragma unroll
        for (int k = 0; k < kept; ++k) {
          sum_of_grid[k] += i == k * sum_lanes + lane ? error : 0;
        }
      }
    });
#pragma unroll
    for (int k = 0; k < kept; ++k) {
      if (k * sum_lanes + lane < count) {
        sums[k * sum_lanes + lane][warp] = sum_of_grid[k];
      }
    }
    __syncthreads();
    for (int i = warp; i < count; i += warps) {
      const double total = sum_of_lanes(lane < warps ? sums[i][lane] : 0);
      if (lane == 0 && search.errors) {
        search.errors[(row * shrunk_ranges + group * count + i) * search.stride + piece] = total;
      } else if (lane == 0) {
        sums[i][0] = total;
      }
    }
    __syncthreads();
    if (!search.errors && threadIdx.x == 0) {
      int best = 0;
      for (int i = 1; i < shrunk_ranges; ++i) {
        best = sums[i][0] < sums[best][0] ? i : best;
      }
      search.write(row, keys, best);
    }
    __syncthreads(); // before the next item
  }
}

// A warp finds the range of a piece of 8 chunks at a time.
template <class T>
__global__ void __launch_bounds__(range_threads) search_ranges_kernel(Search<T> search) {
  constexpr int64_t step = 8 * sum_chunk;
  const int64_t steps = (search.n + step - 1) / step;
  const int64_t warps = int64_t{gridDim.x} * (range_threads / 32);
  for (int64_t item = (int64_t{blockIdx.x} * range_threads + threadIdx.x) / 32; item < search.rows * steps;
      item += warps) {
    const int64_t row = item / steps, begin = item % steps * step;
    Range<opmath_type<T>> range;
    for (int64_t at = begin; at < search.n && at < begin + step; at += sum_chunk) {
      HeldChunk<T> chunk;
      chunk.load(search.x + row * search.n + at, search.n - at);
      chunk.widen(range);
    }
    const auto of_warp = range.keys().of_warp();
    if (threadIdx.x % 32 == 0) {
      of_warp.widen_atomically(&search.ranges[row]);
    }
  }
}

// A CTA finds the least error of a block.
template <class T>
__global__ void __launch_bounds__(range_threads) search_least_kernel(Search<T> search) {
  for (int64_t row = blockIdx.x; row < search.rows; row += gridDim.x) {
    int best = 0;
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i < shrunk_ranges; ++i) {
      const double error = ordered_sum(search.errors + (row * shrunk_ranges + i) * search.stride, search.pieces);
      best = error < least ? i : best;
      least = error < least ? error : least;
    }
    if (threadIdx.x == 0) {
      search.write(row, search.ranges[row], best);
    }
  }
}

} // namespace

void search_qparams(const at::Tensor& x, const QuantSpec& spec, const at::Tensor& scale, const at::Tensor& zero_point) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto device = x.device().index();
  const auto multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  const auto rows = x.size(0), n = x.size(1), chunks = chunks_of(n), pieces = (n + piece_size - 1) / piece_size;
  int warps = 1;
  while (warps < sum_lanes && warps < chunks) {
    warps *= 2;
  }
  int groups = 1; // as many as fill the device, unless the work is small
  for (const int more : {5, 10, 20, 40}) {
    groups = chunks > 4 && rows * pieces * groups < multiprocessors ? more : groups;
  }
  const bool whole = pieces <= 1 && groups == 1;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "search_qparams", [&] {
    using T = scalar_t;
    using C = opmath_type<T>;
    Search<T> search{x.const_data_ptr<T>(), rows, n, std::max<int64_t>(1, pieces), groups, spec.quant_range<int32_t>(),
        nullptr, nullptr, 0, scale.mutable_data_ptr<C>(), zero_point.mutable_data_ptr<int32_t>()};
    at::Tensor ranges, errors; // freed in stream order
    if (!whole) {
      const auto bytes = rows * static_cast<int64_t>(sizeof(RangeKeys<C>));
      ranges = x.new_empty({bytes}, at::kByte);
      search.stride = count_of_sums(pieces);
      errors = x.new_empty({rows * shrunk_ranges * search.stride}, at::kDouble);
      search.ranges = static_cast<RangeKeys<C>*>(ranges.mutable_data_ptr());
      search.errors = errors.mutable_data_ptr<double>();
      C10_CUDA_CHECK(cudaMemsetAsync(search.ranges, 0, bytes, stream));
      search_ranges_kernel<T><<<ctas_for(rows * chunks * 4, range_threads, device), range_threads, 0, stream>>>(search);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    const int threads = warps * sum_lanes;
    search_qparams_kernel<T>
        <<<ctas_for(rows * search.pieces * groups * threads, threads, device), threads, 0, stream>>>(search);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (!whole) {
      const int few = pieces <= sum_chunk ? 32 : range_threads; // a warp adds the sums of that many pieces
      search_least_kernel<T><<<ctas_for(rows * few, few, device), few, 0, stream>>>(search);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
}

} // namespace qatfast::cuda
