#include "blocks.cuh"
#include "fused.h"
#include "given.cuh"
#include "launch.h"

#include <ATen/ops/empty.h>

namespace qatfast::cuda {
namespace {

constexpr int row_threads = 256; // of a long row
constexpr int output_threads = 128;

// Pointers to the tensors of IntegerRows.
template <class C>
struct Rows {
  int8_t* values;
  C* scale;
  int32_t* zero_point;
  int64_t* steps;
};

template <class C>
Rows<C> pointers_of(const IntegerRows& rows) {
  return {rows.values.mutable_data_ptr<int8_t>(), rows.scale.mutable_data_ptr<C>(),
      rows.zero_point.mutable_data_ptr<int32_t>(), rows.steps.mutable_data_ptr<int64_t>()};
}

// f(unit, first element, count) for every unit of a row that this thread owns; past the end are zeros.
template <class T, class F>
__device__ __forceinline__ void for_each_unit_of_row(const T* row, int64_t columns, bool aligned, F f) {
  constexpr int N = lanes<T>;
  constexpr int ahead = 4; // loads on their way at a time
  const int64_t stride = int64_t{blockDim.x} * N;
  for (int64_t first = int64_t{threadIdx.x} * N; first < columns; first += ahead * stride) {
    Unit<T> some[ahead];
    const auto count = [&](int k) {
      const int64_t left = columns - (first + k * stride);
      return static_cast<int>(left < N ? left : N);
    };
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      some[k] = load<T, N>(row + first + k * stride, count(k), aligned);
    }
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (count(k) > 0) {
        f(some[k], first + k * stride, count(k));
      }
    }
  }
}

// The range of the finite values of a row, the same for every thread of the block.
template <class T>
__device__ __forceinline__ RangeKeys<compute_t<T>> range_of_row(const T* row, int64_t columns, bool aligned) {
  using C = compute_t<T>;
  __shared__ RangeKeys<C> of_warps[row_threads / 32];
  Range<C> range;
  for_each_unit_of_row(row, columns, aligned, [&](const Unit<T>& unit, int64_t, int) {
    widen_by_piece<T, true>(range, unit);
  });
  const auto mine = range.keys();
  of_warps[threadIdx.x / 32] = {warp_max(mine.below, 32), warp_max(mine.above, 32)};
  __syncthreads();
  RangeKeys<C> keys;
  for (int i = 0; i < blockDim.x / 32; ++i) {
    keys.widen_by(of_warps[i]);
  }
  return keys;
}

// A thread block owns a row at a time: it quantizes it by the grid of all rows, which is given, or of its own range
// (`by_rows`), and adds up its steps. Bound by memory: one read, a quarter of a write; a row is still in the cache when
// it is read again.
template <class T, bool by_rows>
__global__ void __launch_bounds__(row_threads) integer_rows_kernel(const T* from, Rows<compute_t<T>> to, int64_t rows,
    int64_t columns, bool aligned, const compute_t<T>* scale, const int32_t* zero_point, RangeSpec spec, int shift) {
  using C = compute_t<T>;
  constexpr int N = lanes<T>;
  __shared__ int64_t sums[row_threads / 32];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* row_from = from + row * columns;
    ReciprocalGrid<C> either;
    int zero;
    if constexpr (by_rows) {
      const QParam<C> qparam(range_of_row(row_from, columns, aligned), spec);
      either = qparam.grid;
      zero = qparam.zero_point;
    } else {
      zero = *zero_point;
      either =
          with_reciprocal<C>({*scale, static_cast<C>(spec.quant_min - zero), static_cast<C>(spec.quant_max - zero)});
    }
    int64_t steps = 0;
    bool has_nan = false;
    with_fastest(either, [&](const auto& grid) {
      for_each_unit_of_row(row_from, columns, aligned, [&](const Unit<T>& unit, int64_t begin, int count) {
        Unit<int8_t, N> integers;
        int sum = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) { // the step of 0 is 0
          const C x = static_cast<C>(unit.at[i]);
          const int step = quantize(x, 0, grid);
          sum += step;
          integers.at[i] = static_cast<int8_t>(step + zero - shift);
          has_nan |= x != x;
        }
        steps += sum;
        store<int8_t, N>(to.values + row * columns + begin, integers, count, aligned);
      });
    });
    for (int offset = 16; offset > 0; offset /= 2) {
      steps += __shfl_xor_sync(0xFFFFFFFF, steps, offset);
    }
    sums[threadIdx.x / 32] = steps;
    const bool any_nan = __syncthreads_or(has_nan);
    if (threadIdx.x == 0) {
      for (int i = 1; i < blockDim.x / 32; ++i) {
        steps += sums[i];
      }
      to.scale[row] = any_nan ? std::numeric_limits<C>::quiet_NaN() : either.scale;
      to.zero_point[row] = zero - shift;
      to.steps[row] = steps;
    }
    __syncthreads(); // before the next row's sums
  }
}

// A thread owns N neighbouring columns of some rows, and loops. Bound by memory: one read, one write.
template <class T, int N>
__global__ void __launch_bounds__(output_threads) integer_outputs_kernel(const int32_t* products, T* y, int64_t rows,
    int64_t columns, int64_t features, Rows<compute_t<T>> x, Rows<compute_t<T>> weight, const compute_t<T>* bias) {
  using C = compute_t<T>;
  const int64_t column = (int64_t{blockIdx.x} * output_threads + threadIdx.x) * N;
  if (column >= columns) {
    return;
  }
  uint32_t weight_zero[N], weight_sum[N]; // modulo 2^32, in which the sum fits
  C weight_scale[N], offset[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    weight_zero[i] = static_cast<uint32_t>(weight.zero_point[column + i]);
    weight_sum[i] = static_cast<uint32_t>(weight.steps[column + i]) + static_cast<uint32_t>(features) * weight_zero[i];
    weight_scale[i] = weight.scale[column + i];
    offset[i] = bias ? bias[column + i] : -C(0);
  }
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const auto sums = *reinterpret_cast<const Unit<int32_t, N>*>(products + row * columns + column);
    const auto row_zero = static_cast<uint32_t>(x.zero_point[row]), row_steps = static_cast<uint32_t>(x.steps[row]);
    const C row_scale = x.scale[row];
    C values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const auto sum = static_cast<uint32_t>(sums.at[i]) - row_zero * weight_sum[i] - row_steps * weight_zero[i];
      values[i] = integer_product(static_cast<C>(static_cast<int32_t>(sum)), row_scale * weight_scale[i], offset[i]);
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
void launch_outputs(const ProductTask& task) {
  using C = compute_t<T>;
  const auto rows = task.products.size(0), columns = task.products.size(1);
  const auto across = (columns + output_threads * N - 1) / (output_threads * N);
  const int64_t busy = blocks_for(rows * across * output_threads, output_threads, task.y.device().index());
  const auto down = std::clamp<int64_t>(busy / across, 1, 65535);
  integer_outputs_kernel<T, N><<<dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), output_threads, 0,
      c10::cuda::getCurrentCUDAStream()>>>(task.products.const_data_ptr<int32_t>(), task.y.mutable_data_ptr<T>(), rows,
      columns, task.x.values.size(1), pointers_of<C>(task.x), pointers_of<C>(task.weight),
      task.bias.defined() ? task.bias.const_data_ptr<C>() : nullptr);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Threads for a row: four units of 16 bytes each, or whole warps.
template <class T>
int threads_of_row(int64_t columns) {
  int threads = 32;
  while (threads < row_threads && threads * 4 * lanes<T> < columns) {
    threads *= 2;
  }
  return threads;
}

} // namespace

void qat_linear(c10::ArrayRef<FakeQuantizeTask> weight_and_bias) {
  c10::SmallVector<FusedTask, 2> tasks;
  for (const auto& task : weight_and_bias) {
    if (task.from.numel() > 0) {
      tasks.push_back({task.from, task.to, task.spec, {}, {}});
    }
  }
  if (tasks.size() == 2 && tasks[0].from.scalar_type() == tasks[1].from.scalar_type()) {
    return launch_fused(tasks);
  }
  for (const auto& task : tasks) {
    launch_fused(task);
  }
}

void integer_rows(const at::Tensor& x, const QuantSpec& spec, const IntegerRows& to) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto rows = x.size(0), columns = x.size(1);
  const bool by_rows = spec.granularity.kind != Granularity::per_tensor;
  at::Tensor scale, zero_point;
  if (!by_rows) {
    scale = at::empty({}, to.scale.options());
    zero_point = at::empty({}, to.zero_point.options());
    choose_qparams(x, spec, scale, zero_point);
  }
  with_float_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    const auto* from = x.const_data_ptr<T>();
    const auto values = pointers_of<C>(to);
    const bool aligned = columns % lanes<T> == 0 && is_aligned(from, 16) && is_aligned(values.values, lanes<T>);
    const int threads = threads_of_row<T>(columns);
    const auto kernel = by_rows ? integer_rows_kernel<T, true> : integer_rows_kernel<T, false>;
    kernel<<<blocks_for(rows * threads, threads, x.device().index()), threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        from, values, rows, columns, aligned, by_rows ? nullptr : scale.const_data_ptr<C>(),
        by_rows ? nullptr : zero_point.const_data_ptr<int32_t>(), range_spec(spec),
        static_cast<int>(IntegerRows::shift(spec)));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void integer_outputs(const ProductTask& task) {
  const c10::cuda::CUDAGuard guard(task.y.device());
  with_float_type(task.y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    constexpr int N = sizeof(T) == 8 ? 2 : 4;
    const bool whole = task.y.size(1) % N == 0 && is_aligned(task.products.const_data_ptr(), N * sizeof(int32_t)) &&
        is_aligned(task.y.const_data_ptr(), N * sizeof(T));
    whole ? launch_outputs<T, N>(task) : launch_outputs<T, 1>(task);
  });
}

} // namespace qatfast::cuda
