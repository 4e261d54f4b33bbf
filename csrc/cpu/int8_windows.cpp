// The windows of a convolution, and the sums of groups, in plain loops, for processors without pair products and for
// sums that 32 bits do not hold.
#include "common/windows.h"
#include "cpu/launch.h"

#include <ATen/Dispatch.h>

namespace qatfast::cpu {

void int8_conv_windows(const WindowTask& task, const Int8Rows& to) {
  AT_DISPATCH_FLOATING_TYPES(task.scale.scalar_type(), "int8_conv_windows", [&] {
    using C = scalar_t;
    const auto input = task.pointers();
    const auto* const input_scale = task.scale.const_data_ptr<C>();
    const auto rows = to.values.size(0), columns = to.values.size(1), channels = input.channels;
    const auto outputs = WindowGeometry::product(task.geometry.output_size);
    auto* const values = to.values.mutable_data_ptr<int8_t>();
    auto* const scale = to.scale.mutable_data_ptr<C>();
    auto* const zero_point = to.zero_point.mutable_data_ptr<int32_t>();
    auto* const level_sums = to.level_sums.mutable_data_ptr<int64_t>();
    parallel_for(0, rows, std::max<int64_t>(1, grain / std::max<int64_t>(1, columns)), [&](int64_t row, int64_t end) {
      for (; row < end; ++row) {
        const auto sample = row / outputs, grid = input.grid_of(sample);
        const auto output = static_cast<uint32_t>(row % outputs);
        const auto point = input.zero_point[grid];
        int8_t* const integers = values + row * columns;
        std::fill_n(integers, columns, static_cast<int8_t>(point - 128));
        int64_t sum = 0;
        input.any_tap(output, [&](int64_t tap, const auto& pixel) {
          const auto* const from = input.values_of(sample, pixel);
          int64_t levels = 0;
          for (int64_t c = 0; c < channels; ++c) {
            levels += from[c];
            integers[tap * channels + c] = static_cast<int8_t>(from[c] - 128);
          }
          sum += levels - channels * point;
          return false;
        });
        const bool has_nan = input.floats.has_nan() && input.any_tap(output, [&](int64_t, const auto& pixel) {
          int64_t c = 0;
          while (c < channels && !input.floats.is_nan(sample, c, pixel)) {
            ++c;
          }
          return c < channels;
        });
        scale[row] = has_nan ? std::numeric_limits<C>::quiet_NaN() : input_scale[grid];
        zero_point[row] = point - 128;
        level_sums[row] = sum;
      }
    });
  });
}

void int8_conv_grouped(const GroupedTask& task) {
  if (try_pair_products(task)) {
    return;
  }
  const auto by_columns = task.weight.t().contiguous();
  AT_DISPATCH_FLOATING_TYPES(task.input.scale.scalar_type(), "int8_conv_grouped", [&] {
    using C = scalar_t;
    const auto input = task.input.pointers();
    const auto weight = task.pointers<C>(by_columns);
    const auto outputs = WindowGeometry::product(task.input.geometry.output_size),
               rows = task.y.numel() / weight.outputs;
    auto* const y = task.y.mutable_data_ptr<C>();
    const auto run = [&](auto sum, auto lanes) {
      constexpr int N = lanes;
      const auto work = std::max<int64_t>(1, task.weight.numel());
      parallel_for(0, rows, std::max<int64_t>(1, grain / work), [&](int64_t row, int64_t end) {
        for (; row < end; ++row) {
          for (int64_t channel = 0; channel < weight.outputs; channel += N) {
            C values[N];
            grouped_outputs<decltype(sum)>(
                input, weight, row / outputs, static_cast<uint32_t>(row % outputs), channel, values);
            std::copy_n(values, N, y + row * weight.outputs + channel);
          }
        }
      });
    };
    if (!task.fits_int32()) {
      run(int64_t{}, std::integral_constant<int, 1>{});
    } else if (takes_four_channels(input, weight)) {
      run(int32_t{}, std::integral_constant<int, 4>{});
    } else {
      run(int32_t{}, std::integral_constant<int, 1>{});
    }
  });
}

} // namespace qatfast::cpu
