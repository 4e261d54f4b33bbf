// What the int8 GEMM needs besides the product: rows of integers, and the outputs from the sums.
#include "cuda/dynamic_quantize.cuh"
#include "cuda/static_quantize.cuh"
#include "cuda/launch.h"

#include <optional>

namespace qatfast::cuda {
namespace {

constexpr int row_threads = 256; // for a long row
constexpr int epilogue_threads = 128;

// Pointers to the tensors of Int8Rows.
template <class C>
struct RowPointers {
  int8_t* values;
  C* scale;
  int32_t* zero_point;
  int64_t* level_sums;
};

template <class C>
RowPointers<C> pointers_of(const Int8Rows& rows) {
  return {rows.values.mutable_data_ptr<int8_t>(), rows.scale.mutable_data_ptr<C>(),
      rows.zero_point.mutable_data_ptr<int32_t>(), rows.level_sums.mutable_data_ptr<int64_t>()};
}

// Calls f(unit, first element, count) for every unit of a row that this thread owns. Past the end are zeros.
template <class T, class F>
__device__ __forceinline__ void for_each_unit_of_row(const T* row, int64_t columns, bool aligned, F f) {
  constexpr int N = lanes<T>;
  constexpr int ahead = sizeof(T) == 2 ? 3 : 4; // loads in flight
  const int64_t stride = int64_t{blockDim.x} * N;
  for (int64_t first = int64_t{threadIdx.x} * N; first < columns; first += ahead * stride) {
    Unit<T> loaded[ahead];
    const auto count = [&](int k) {
      const int64_t left = columns - (first + k * stride);
      return static_cast<int>(left < N ? left : N);
    };
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      loaded[k] = load<T, N>(row + first + k * stride, count(k), aligned);
    }
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (count(k) > 0) {
        f(loaded[k], first + k * stride, count(k));
      }
    }
  }
}

// The range of the finite values of a row, the same in every thread of the CTA.
template <class T>
__device__ __forceinline__ RangeKeys<opmath_type<T>> range_of_row(const T* row, int64_t columns, bool aligned) {
  using C = opmath_type<T>;
  __shared__ RangeKeys<C> of_warps[row_threads / 32];
  Range<C> range;
  for_each_unit_of_row(row, columns, aligned, [&](const Unit<T>& unit, int64_t, int) {
    widen_by_piece<T, true>(range, unit);
  });
  of_warps[threadIdx.x / 32] = range.keys().of_warp();
  __syncthreads();
  RangeKeys<C> keys;
  for (int i = 0; i < blockDim.x / 32; ++i) {
    keys.widen_by(of_warps[i]);
  }
  return keys;
}

// A CTA owns a row at a time. It quantizes the row by its own range (`by_rows`) or by a given grid, and sums
// its levels. Bound by memory: one read, a quarter of a write; a row is still in the cache when it is read again.
template <class T, bool by_rows>
__global__ void __launch_bounds__(row_threads) quantize_rows_kernel(const T* from, RowPointers<opmath_type<T>> to,
    int64_t rows, int64_t columns, bool aligned, const opmath_type<T>* scale, const int32_t* zero_point,
    bool grid_per_row, QuantRange<int32_t> range, int shift) {
  using C = opmath_type<T>;
  constexpr int N = lanes<T>;
  __shared__ int64_t sums[row_threads / 32];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* row_from = from + row * columns;
    ReciprocalGrid<C> row_grid;
    int zero;
    if constexpr (by_rows) {
      const BlockGrid<C> block_grid(range_of_row(row_from, columns, aligned), range);
      row_grid = block_grid.grid;
      zero = block_grid.zero_point;
    } else {
      const int64_t index = grid_per_row ? row : 0;
      zero = zero_point[index];
      row_grid = with_reciprocal<C>(
          {scale[index], static_cast<C>(range.quant_min - zero), static_cast<C>(range.quant_max - zero)});
    }
    int64_t level_sum = 0;
    bool has_nan = false;
    with_fastest(row_grid, [&](const auto& grid) {
      for_each_unit_of_row(row_from, columns, aligned, [&](const Unit<T>& unit, int64_t begin, int count) {
        Unit<int8_t, N> integers;
        int sum = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) { // the level of 0 is 0
          const C x = static_cast<C>(unit.at[i]);
          const int level = quantize(x, 0, grid);
          sum += level;
          integers.at[i] = static_cast<int8_t>(level + zero - shift);
          has_nan |= x != x;
        }
        level_sum += sum;
        store<int8_t, N>(to.values + row * columns + begin, integers, count, aligned);
      });
    });
    for (int offset = 16; offset > 0; offset /= 2) {
      level_sum += __shfl_xor_sync(0xFFFFFFFF, level_sum, offset);
    }
    sums[threadIdx.x / 32] = level_sum;
    const bool any_nan = __syncthreads_or(has_nan);
    if (threadIdx.x == 0) {
      for (int i = 1; i < blockDim.x / 32; ++i) {
        level_sum += sums[i];
      }
      to.scale[row] = any_nan ? std::numeric_limits<C>::quiet_NaN() : row_grid.scale;
      to.zero_point[row] = zero - shift;
      to.level_sums[row] = level_sum;
    }
    __syncthreads(); // before the next row's sums
  }
}

// A thread owns N neighbouring columns of some rows, and loops. Bound by memory: one read, one write.
template <class T, int N>
__global__ void __launch_bounds__(epilogue_threads)
    int8_epilogue_kernel(const int32_t* products, T* y, int64_t rows, int64_t columns, int64_t features,
        RowPointers<opmath_type<T>> x, RowPointers<opmath_type<T>> weight, const opmath_type<T>* bias) {
  using C = opmath_type<T>;
  const int64_t column = (int64_t{blockIdx.x} * epilogue_threads + threadIdx.x) * N;
  if (column >= columns) {
    return;
  }
  uint32_t weight_zero[N], weight_sum[N]; // modulo 2^32, which the sum fits
  C weight_scale[N], offset[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    weight_zero[i] = static_cast<uint32_t>(weight.zero_point[column + i]);
    weight_sum[i] =
        static_cast<uint32_t>(weight.level_sums[column + i]) + static_cast<uint32_t>(features) * weight_zero[i];
    weight_scale[i] = weight.scale[column + i];
    offset[i] = bias ? bias[column + i] : -C(0);
  }
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const auto sums = *reinterpret_cast<const Unit<int32_t, N>*>(products + row * columns + column);
    const auto row_zero = static_cast<uint32_t>(x.zero_point[row]),
               row_level_sum = static_cast<uint32_t>(x.level_sums[row]);
    const C row_scale = x.scale[row];
    C values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const auto sum = static_cast<uint32_t>(sums.at[i]) - row_zero * weight_sum[i] - row_level_sum * weight_zero[i];
      values[i] = int8_output(static_cast<C>(static_cast<int32_t>(sum)), row_scale * weight_scale[i], offset[i]);
    }
    Unit<T, N> outputs;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      outputs.at[i] = static_cast<T>(values[i]);
    }
    store_whole(y + row * columns + column, outputs);
  }
}

template <class T, int N>
void launch_epilogue(const Int8EpilogueTask& task) {
  using C = opmath_type<T>;
  const auto rows = task.products.size(0), columns = task.products.size(1);
  const auto across = (columns + epilogue_threads * N - 1) / (epilogue_threads * N);
  const int64_t busy = ctas_for(rows * across * epilogue_threads, epilogue_threads, task.y.device().index());
  const auto down = std::clamp<int64_t>(busy / across, 1, 65535);
  int8_epilogue_kernel<T, N><<<dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), epilogue_threads, 0,
      c10::cuda::getCurrentCUDAStream()>>>(task.products.const_data_ptr<int32_t>(), task.y.mutable_data_ptr<T>(), rows,
      columns, task.x.values.size(1), pointers_of<C>(task.x), pointers_of<C>(task.weight),
      task.bias.defined() ? task.bias.const_data_ptr<C>() : nullptr);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The threads for a row: four units of 16 bytes each, in whole warps.
template <class T>
int threads_of_row(int64_t columns) {
  int threads = 32;
  while (threads < row_threads && threads * 4 * lanes<T> < columns) {
    threads *= 2;
  }
  return threads;
}

// Quantizes each row with `qparams`, of all rows or of each, or by its own range.
void launch_quantize_rows(
    const at::Tensor& x, const QuantSpec& spec, const Int8Rows& to, const std::optional<QParams>& qparams) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto rows = x.size(0), columns = x.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "qat_linear", [&] {
    using T = scalar_t;
    using C = opmath_type<T>;
    const auto* from = x.const_data_ptr<T>();
    const auto values = pointers_of<C>(to);
    const bool aligned = columns % lanes<T> == 0 && is_aligned(from, 16) && is_aligned(values.values, lanes<T>);
    const int threads = threads_of_row<T>(columns);
    const auto kernel = qparams ? quantize_rows_kernel<T, false> : quantize_rows_kernel<T, true>;
    kernel<<<ctas_for(rows * threads, threads, x.device().index()), threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        from, values, rows, columns, aligned, qparams ? qparams->scale.const_data_ptr<C>() : nullptr,
        qparams ? qparams->zero_point.const_data_ptr<int32_t>() : nullptr, qparams && qparams->scale.numel() > 1,
        spec.quant_range<int32_t>(), static_cast<int>(Int8Rows::shift(spec)));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

} // namespace

void quantize_rows(const at::Tensor& x, const QuantSpec& spec, const Int8Rows& to) {
  if (spec.granularity.kind != Granularity::per_tensor) {
    return launch_quantize_rows(x, spec, to, std::nullopt);
  }
  const QParams qparams{to.scale.new_empty({}), to.zero_point.new_empty({}), spec.quant_min(), spec.quant_max()};
  choose_qparams(x, spec, qparams.scale, qparams.zero_point);
  launch_quantize_rows(x, spec, to, qparams);
}

void quantize_rows_static(const at::Tensor& x, const QuantSpec& spec, const QParams& qparams, const Int8Rows& to) {
  launch_quantize_rows(x, spec, to, qparams);
}

void int8_epilogue(const Int8EpilogueTask& task) {
  const c10::cuda::CUDAGuard guard(task.y.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, task.y.scalar_type(), "qat_linear", [&] {
    using T = scalar_t;
    constexpr int N = sizeof(T) == 8 ? 2 : 4;
    const bool whole = task.y.size(1) % N == 0 && is_aligned(task.products.const_data_ptr(), N * sizeof(int32_t)) &&
        is_aligned(task.y.const_data_ptr(), N * sizeof(T));
    whole ? launch_epilogue<T, N>(task) : launch_epilogue<T, 1>(task);
  });
}

} // namespace qatfast::cuda
