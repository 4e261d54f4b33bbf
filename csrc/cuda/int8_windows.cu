// The windows of a convolution, and the sums of groups.
#include "common/windows.h"
#include "cuda/launch.h"
#include "cuda/units.cuh"

namespace qatfast::cuda {
namespace {

constexpr int window_threads = 128;
constexpr int grouped_threads = 128;

// Scales of the input and of the rows as words of 32 bits: a kernel for float and one for double take 40 KB more.
struct RowScales {
  const uint32_t* from;
  uint32_t* to;
  int words;

  __device__ __forceinline__ void set(int64_t row, int64_t grid, bool has_nan) const {
    const uint32_t nan = words == 1 ? 0x7FC00000 : 0x7FF80000;
    for (int i = 0; i < words; ++i) {
      to[row * words + i] = !has_nan ? from[grid * words + i] : i + 1 == words ? nan : 0;
    }
  }
};

struct WindowRows {
  int8_t* values;
  RowScales scale;
  int32_t* zero_point;
  int64_t* level_sums;
};

// A warp owns a row at a time, in pieces of N channels. Bound by memory: a read and a write of the windows, most reads
// from the cache.
template <int N>
__global__ void __launch_bounds__(window_threads, 8)
    windows_kernel(WindowInput input, WindowRows to, int64_t rows, int columns) {
  const auto& geometry = input.geometry;
  const int channels = static_cast<int>(input.channels), pieces = columns / N, pieces_of_tap = channels / N;
  const int64_t outputs = WindowGeometry::product(geometry.output_size);
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t{gridDim.x} * (window_threads / 32);
  for (int64_t row = int64_t{blockIdx.x} * (window_threads / 32) + threadIdx.x / 32; row < rows; row += warps) {
    const int64_t sample = row / outputs, grid = input.grid_of(sample);
    const int zero = input.zero_point[grid];
    Coordinates at, tap, pixel;
    WindowGeometry::unravel(static_cast<uint32_t>(row - sample * outputs), geometry.output_size, at);
    int64_t sum = 0;
    for (int piece = lane; piece < pieces; piece += 32) {
      const int t = piece / pieces_of_tap, c = (piece - t * pieces_of_tap) * N;
      WindowGeometry::unravel(t, geometry.kernel, tap);
      Unit<int8_t, N> integers;
      if (geometry.find_pixel(at, tap, pixel)) {
        const auto unit = *reinterpret_cast<const Unit<uint8_t, N>*>(input.values_of(sample, pixel) + c);
        int levels = -N * zero;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          levels += unit.at[i];
          integers.at[i] = static_cast<int8_t>(unit.at[i] - 128);
        }
        sum += levels;
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          integers.at[i] = static_cast<int8_t>(zero - 128);
        }
      }
      *reinterpret_cast<Unit<int8_t, N>*>(to.values + row * columns + int64_t{piece} * N) = integers;
    }
    bool has_nan = false;
    if (input.floats.has_nan()) {
      for (int k = lane; k < columns && !has_nan; k += 32) {
        WindowGeometry::unravel(k / channels, geometry.kernel, tap);
        has_nan = geometry.find_pixel(at, tap, pixel) && input.floats.is_nan(sample, k % channels, pixel);
      }
    }
    has_nan = __any_sync(0xFFFFFFFF, has_nan);
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, offset);
    }
    if (lane == 0) {
      to.scale.set(row, grid, has_nan);
      to.zero_point[row] = zero - 128;
      to.level_sums[row] = sum;
    }
  }
}

// A thread owns N neighbouring channels of an output at a time.
template <class Sum, int N, class C>
__global__ void __launch_bounds__(grouped_threads, 6)
    grouped_kernel(WindowInput input, GroupedWeight<C> weight, C* y, int64_t outputs, int64_t units) {
  const int64_t units_of_row = weight.outputs / N, stride = int64_t{gridDim.x} * grouped_threads;
  for (int64_t unit = int64_t{blockIdx.x} * grouped_threads + threadIdx.x; unit < units; unit += stride) {
    const int64_t row = unit / units_of_row, channel = (unit - row * units_of_row) * N;
    Unit<C, N> values;
    const int64_t sample = row / outputs;
    const auto output = static_cast<uint32_t>(row - sample * outputs);
    grouped_outputs<Sum>(input, weight, sample, output, channel, values.at);
    *reinterpret_cast<Unit<C, N>*>(y + unit * N) = values;
  }
}

} // namespace

void int8_conv_windows(const WindowTask& task, const Int8Rows& to) {
  const c10::cuda::CUDAGuard guard(task.values.device());
  const auto input = task.pointers();
  const auto rows = to.values.size(0), columns = to.values.size(1);
  const auto fits = [&](int64_t n) {
    return input.channels % n == 0 && is_aligned(input.values, n) && is_aligned(to.values.const_data_ptr(), n);
  };
  const auto kernel = fits(16) ? windows_kernel<16> : fits(4) ? windows_kernel<4> : windows_kernel<1>;
  const RowScales scales = {static_cast<const uint32_t*>(task.scale.const_data_ptr()),
      static_cast<uint32_t*>(to.scale.mutable_data_ptr()), static_cast<int>(to.scale.element_size() / 4)};
  kernel<<<ctas_for(rows * 32, window_threads, task.values.device().index()), window_threads, 0,
      c10::cuda::getCurrentCUDAStream()>>>(input,
      {to.values.mutable_data_ptr<int8_t>(), scales, to.zero_point.mutable_data_ptr<int32_t>(),
          to.level_sums.mutable_data_ptr<int64_t>()},
      rows, static_cast<int>(columns));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void int8_conv_grouped(const GroupedTask& task) {
  const c10::cuda::CUDAGuard guard(task.y.device());
  AT_DISPATCH_FLOATING_TYPES(task.input.scale.scalar_type(), "int8_conv_grouped", [&] {
    using C = scalar_t;
    const auto input = task.input.pointers();
    const auto by_columns = task.weight.t().contiguous();
    const auto weight = task.pointers<C>(by_columns);
    const bool by_four = task.fits_int32() && takes_four_channels(input, weight);
    const auto kernel = by_four ? grouped_kernel<int32_t, 4, C>
        : task.fits_int32()     ? grouped_kernel<int32_t, 1, C>
                                : grouped_kernel<int64_t, 1, C>;
    const auto units = task.y.numel() / (by_four ? 4 : 1);
    kernel<<<ctas_for(units, grouped_threads, task.y.device().index()), grouped_threads, 0,
        c10::cuda::getCurrentCUDAStream()>>>(
        input, weight, task.y.mutable_data_ptr<C>(), WindowGeometry::product(input.geometry.output_size), units);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

} // namespace qatfast::cuda
