#include "fused.h"
#include "launch.h"
#include "units.cuh"

#include <ATen/ops/empty.h>

namespace qatfast::cuda {
namespace {

constexpr int row_threads = 256;

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

// A thread block owns a row at a time: it quantizes it by the grid that is given for it or for all, and adds up its
// steps. Bound by memory: one read, a quarter of a write. A row's grid may lie where its results go.
template <class T>
__global__ void __launch_bounds__(row_threads)
    integer_rows_kernel(const T* from, Rows<compute_t<T>> to, int64_t rows, int64_t columns, const compute_t<T>* scale,
        const int32_t* zero_point, bool per_tensor, int shift, int quant_min, int quant_max) {
  using C = compute_t<T>;
  __shared__ unsigned long long sum; // of the steps, modulo 2^64: as good as signed
  __shared__ bool has_nan;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    if (threadIdx.x == 0) {
      sum = 0;
      has_nan = false;
    }
    const C row_scale = scale[per_tensor ? 0 : row];
    const int zero = zero_point[per_tensor ? 0 : row];
    __syncthreads();
    int64_t steps = 0;
    const auto either =
        with_reciprocal<C>({row_scale, static_cast<C>(quant_min - zero), static_cast<C>(quant_max - zero)});
    with_fastest(either, [&](const auto& grid) {
      for (int64_t i = threadIdx.x; i < columns; i += row_threads) {
        const C x = static_cast<C>(from[row * columns + i]);
        const int step = quantize(x, 0, grid);
        steps += step;
        to.values[row * columns + i] = static_cast<int8_t>(step + zero - shift);
        if (x != x) {
          has_nan = true;
        }
      }
    });
    atomicAdd(&sum, static_cast<unsigned long long>(steps));
    __syncthreads();
    if (threadIdx.x == 0) {
      to.scale[row] = has_nan ? std::numeric_limits<C>::quiet_NaN() : row_scale;
      to.zero_point[row] = zero - shift;
      to.steps[row] = static_cast<int64_t>(sum);
    }
    __syncthreads();
  }
}

// A thread owns one output at a time and loops. Bound by memory: one read, one write.
template <class T>
__global__ void __launch_bounds__(row_threads) integer_outputs_kernel(const int32_t* products, T* y, int64_t rows,
    int64_t columns, int64_t features, Rows<compute_t<T>> x, Rows<compute_t<T>> weight, const compute_t<T>* bias) {
  using C = compute_t<T>;
  const int64_t stride = int64_t{gridDim.x} * row_threads;
  for (int64_t i = int64_t{blockIdx.x} * row_threads + threadIdx.x; i < rows * columns; i += stride) {
    const int64_t row = i / columns;
    const int64_t column = i - row * columns;
    // modulo 2^32, in which the sum fits
    const auto weight_zero = static_cast<uint32_t>(weight.zero_point[column]);
    const auto weight_sum = static_cast<uint32_t>(weight.steps[column]) + static_cast<uint32_t>(features) * weight_zero;
    const auto sum = static_cast<uint32_t>(products[i]) - static_cast<uint32_t>(x.zero_point[row]) * weight_sum -
        static_cast<uint32_t>(x.steps[row]) * weight_zero;
    const C value = integer_product(
        static_cast<C>(static_cast<int32_t>(sum)), x.scale[row] * weight.scale[column], bias ? bias[column] : -C(0));
    y[i] = static_cast<T>(value);
  }
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
  const bool per_tensor = spec.granularity.kind == Granularity::per_tensor;
  const auto scale = per_tensor ? at::empty({}, to.scale.options()) : to.scale;
  const auto zero_point = per_tensor ? at::empty({}, to.zero_point.options()) : to.zero_point;
  choose_qparams(x, spec, scale, zero_point);
  with_float_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    integer_rows_kernel<T><<<blocks_for(rows * row_threads, row_threads, x.device().index()), row_threads, 0,
        c10::cuda::getCurrentCUDAStream()>>>(x.const_data_ptr<T>(), pointers_of<C>(to), rows, columns,
        scale.const_data_ptr<C>(), zero_point.const_data_ptr<int32_t>(), per_tensor,
        static_cast<int>(IntegerRows::shift(spec)), static_cast<int>(spec.quant_min()),
        static_cast<int>(spec.quant_max()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void integer_outputs(const ProductTask& task) {
  const c10::cuda::CUDAGuard guard(task.y.device());
  const auto rows = task.products.size(0), columns = task.products.size(1);
  with_float_type(task.y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    integer_outputs_kernel<T><<<blocks_for(rows * columns, row_threads, task.y.device().index()), row_threads, 0,
        c10::cuda::getCurrentCUDAStream()>>>(task.products.const_data_ptr<int32_t>(), task.y.mutable_data_ptr<T>(),
        rows, columns, task.x.values.size(1), pointers_of<C>(task.x), pointers_of<C>(task.weight),
        task.bias.defined() ? task.bias.const_data_ptr<C>() : nullptr);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

} // namespace qatfast::cuda
