// Products of int8 matrices on processors without dot products of int8, for which oneDNN has no fast product that is
// exact, and convolutions of int8 that no library computes.
#include "common/windows.h"
#include "cpu/launch.h"

#include <ATen/Dispatch.h>
#include <ATen/ceil_div.h>
#include <ATen/ops/empty.h>

#include <limits>
#include <memory>

namespace qatfast::cpu {
namespace {

// The levels of so many rows and features stay in L2, the weight's of these features in L1.
constexpr int64_t level_rows = 43 * pair_rows, level_features = 1024;

// How rows and outputs are divided into tasks. Each task packs the weight of its outputs again; if there are few rows,
// tasks divide the outputs instead.
struct PairDivision {
  int64_t rows;
  int64_t outputs;

  PairDivision(int64_t all_rows, int64_t all_outputs) : rows(level_rows), outputs(all_outputs) {
    const int64_t threads = at::get_num_threads();
    if (all_rows < threads * level_rows && all_outputs >= threads * pair_outputs) {
      outputs = at::ceil_div(at::ceil_div(all_outputs, threads), pair_outputs) * pair_outputs;
    } else {
      const auto tiles = at::ceil_div(at::ceil_div(all_rows, level_rows), threads) * threads;
      rows = at::ceil_div(at::ceil_div(all_rows, tiles), pair_rows) * pair_rows;
    }
  }
};

// Calls f(first row, rows, first output, outputs) for all tasks.
template <class F>
void for_each_task(int64_t rows, int64_t features, int64_t outputs, F f) {
  const PairDivision division(rows, outputs);
  const auto per_row = at::ceil_div(outputs, division.outputs), tasks = at::ceil_div(rows, division.rows) * per_row;
  const auto work = std::max<int64_t>(1, division.rows * features * division.outputs);
  parallel_for(0, tasks, std::max<int64_t>(1, products_per_thread / work), [&](int64_t task, int64_t end) {
    for (; task < end; ++task) {
      const auto row = task / per_row * division.rows, first = task % per_row * division.outputs;
      f(row, std::min(division.rows, rows - row), first, std::min(division.outputs, outputs - first));
    }
  });
}

// The memory of a task.
class PairMultiplier {
 public:
  PairMultiplier(int64_t rows, int64_t features)
      : rows_(rows),
        features_(features),
        width_(at::ceil_div(std::min(features, level_features), pair_features) * pair_features),
        levels_(new int16_t[rows * width_]),
        weight_(new int16_t[pair_outputs * width_]),
        edge_(new int32_t[rows * pair_outputs]) {}

  // Writes the sums of a matrix of levels with the rows of a weight. fill(k, n, to, step) writes the levels of features
  // [k, k + n), a row every `step` elements.
  template <class F>
  void operator()(const PairWeight& weight, int32_t* sums, int64_t step, F fill) {
    const auto& loops = chosen().pair_products;
    const auto whole = weight.outputs / pair_outputs * pair_outputs;
    for (int64_t row = 0; row < rows_; ++row) {
      std::fill_n(sums + row * step, whole, 0);
    }
    std::fill_n(edge_.get(), whole < weight.outputs ? rows_ * pair_outputs : 0, 0);
    for (int64_t k = 0; k < features_; k += level_features) {
      const auto n = std::min(level_features, features_ - k), width = at::ceil_div(n, pair_features) * pair_features;
      fill(k, n, levels_.get(), width);
      for (int64_t row = 0; row < rows_; ++row) {
        std::fill_n(levels_.get() + row * width + n, width - n, int16_t{0});
      }
      for (int64_t j = 0; j < weight.outputs; j += pair_outputs) {
        const auto outputs = std::min(pair_outputs, weight.outputs - j);
        loops.pack(
            {weight.values + j * weight.step + k, weight.step, outputs, weight.zero_point + j}, n, weight_.get());
        loops.multiply({levels_.get(), width, rows_, weight_.get(), at::ceil_div<int64_t>(n, 2)},
            j < whole ? sums + j : edge_.get(), j < whole ? step : pair_outputs);
      }
    }
    for (int64_t row = 0; row < rows_; ++row) {
      std::copy_n(edge_.get() + row * pair_outputs, weight.outputs - whole, sums + row * step + whole);
    }
  }

 private:
  const int64_t rows_, features_, width_;
  const std::unique_ptr<int16_t[]> levels_, weight_;
  const std::unique_ptr<int32_t[]> edge_; // the sums of the last outputs, if they do not fill a vector
};

// The levels of the windows of a convolution as rows of a matrix, [taps][channels of a group].
class WindowLevels {
 public:
  WindowLevels(const WindowInput& input, int64_t groups)
      : input_(input),
        channels_(input.channels / groups),
        outputs_(WindowGeometry::product(input.geometry.output_size)),
        // Taps of a row of the kernel that follow each other in memory.
        run_(groups == 1 && input.geometry.dilation[2] == 1 && input.geometry.spread[2] == 1 ? input.geometry.kernel[2]
                                                                                             : 1) {}

  // Features [k, k + n) of `rows` windows of a group.
  void operator()(int64_t first, int64_t rows, int64_t group, int64_t k, int64_t n, int16_t* to, int64_t step) const {
    for (int64_t row = first; row < first + rows; ++row, to += step) {
      const auto sample = row / outputs_;
      Coordinates output;
      WindowGeometry::unravel(static_cast<uint32_t>(row % outputs_), input_.geometry.output_size, output);
      const auto size = run_ * channels_;
      for (auto run = k / size; run * size < k + n; ++run) {
        const auto begin = std::max(k, run * size), end = std::min(k + n, (run + 1) * size);
        levels_of_run(sample, output, group, run, begin - run * size, end - run * size, to + begin - k);
      }
    }
  }

 private:
  // Elements [begin, end) of a run.
  void levels_of_run(int64_t sample, const Coordinates& output, int64_t group, int64_t run, int64_t begin, int64_t end,
      int16_t* to) const {
    const auto& geometry = input_.geometry;
    Coordinates tap, pixel;
    WindowGeometry::unravel(static_cast<uint32_t>(run * run_), geometry.kernel, tap);
    int64_t first = 0, inside = begin, past = end; // the taps that lie within the row of the input
    if (run_ > 1) {
      const int64_t column = int64_t{output[2]} * geometry.stride[2] - geometry.padding[2];
      first = std::clamp<int64_t>(-column, 0, run_ - 1);
      inside = std::clamp(first * channels_, begin, end);
      past = std::clamp((geometry.size[2] - column) * channels_, inside, end);
      tap[2] = static_cast<int32_t>(first);
    }
    if (inside == past || !geometry.find_pixel(output, tap, pixel)) {
      std::fill_n(to, end - begin, int16_t{0});
      return;
    }
    std::fill_n(to, inside - begin, int16_t{0});
    const auto* const from = input_.values_of(sample, pixel) + group * channels_ + inside - first * channels_;
    chosen().pair_products.levels_of_uint8(
        from, past - inside, input_.zero_point[input_.grid_of(sample)], to + inside - begin);
    std::fill_n(to + past - begin, end - past, int16_t{0});
  }

  const WindowInput& input_;
  const int64_t channels_, outputs_, run_;
};

} // namespace

bool has_pair_products() {
  return chosen().pair_products.multiply;
}

bool prefers_pair_products() {
  return chosen().prefers_pair_products;
}

void int8_mm(const at::Tensor& products, const at::Tensor& x, const at::Tensor& weight) {
  const auto rows = x.size(0), features = x.size(1), outputs = weight.size(0);
  const auto* const values = x.const_data_ptr<int8_t>();
  const auto* const rows_of_weight = weight.const_data_ptr<int8_t>();
  auto* const sums = products.mutable_data_ptr<int32_t>();
  const std::vector<int32_t> zeros(outputs, 0);
  for_each_task(rows, features, outputs, [&](int64_t row, int64_t count, int64_t first, int64_t width) {
    PairMultiplier multiply(count, features);
    multiply({rows_of_weight + first * features, features, width, zeros.data()}, sums + row * outputs + first, outputs,
        [&](int64_t k, int64_t n, int16_t* to, int64_t step) {
          for (int64_t i = 0; i < count; ++i) {
            chosen().pair_products.levels_of_int8(
                values + (row + i) * features + k, n, /*zero_point=*/0, to + i * step);
          }
        });
  });
}

namespace {

// Outputs that are multiples of the spread apart read the same taps of the kernel. They are a convolution of their own,
// without zeros between the elements of its input.
struct Phase {
  WindowGeometry geometry;
  Coordinates first_tap = {0, 0, 0}, tap_step = {1, 1, 1}; // of the whole kernel
  Coordinates first = {0, 0, 0}, step = {1, 1, 1};         // of all outputs

  bool is_whole() const {
    return WindowGeometry::product(step) == 1;
  }

  // The outputs of dimension d that begin at `begin`.
  void select(int d, int32_t begin) {
    const auto spread = geometry.spread[d], dilation = geometry.dilation[d];
    const auto place_of = [&](int32_t tap) {
      return begin + tap * dilation - geometry.padding[d];
    };
    first[d] = begin;
    step[d] = spread;
    tap_step[d] = spread / std::gcd(spread, dilation);
    const auto most = std::min(geometry.kernel[d], tap_step[d]);
    while (first_tap[d] < most && place_of(first_tap[d]) % spread != 0) {
      ++first_tap[d];
    }
    geometry.kernel[d] = first_tap[d] < most ? (geometry.kernel[d] - first_tap[d] + tap_step[d] - 1) / tap_step[d] : 0;
    geometry.padding[d] = -place_of(first_tap[d]) / spread;
    geometry.dilation[d] = tap_step[d] * dilation / spread;
    geometry.spread[d] = 1;
    geometry.output_size[d] = (geometry.output_size[d] - begin + spread - 1) / spread;
  }

  // The weight (outputs, taps * channels) at the taps of the phase.
  at::Tensor weight_of(const at::Tensor& weight, const Coordinates& kernel) const {
    const auto outputs = weight.size(0), channels = weight.size(1) / WindowGeometry::product(kernel);
    auto taps = weight.view({outputs, kernel[0], kernel[1], kernel[2], channels});
    for (int d = 0; d < WindowGeometry::dims; ++d) {
      taps = geometry.kernel[d] > 0 ? taps.slice(d + 1, first_tap[d], std::nullopt, tap_step[d])
                                    : taps.narrow(d + 1, 0, 0);
    }
    return taps.contiguous().view({outputs, WindowGeometry::product(geometry.kernel) * channels});
  }

  // The row of all outputs, of the size `all`, that is this row of the phase.
  int64_t row_of(int64_t row, const Coordinates& all) const {
    const auto windows = WindowGeometry::product(geometry.output_size);
    Coordinates at;
    WindowGeometry::unravel(static_cast<uint32_t>(row % windows), geometry.output_size, at);
    auto result = row / windows;
    for (int d = 0; d < WindowGeometry::dims; ++d) {
      result = result * all[d] + first[d] + int64_t{at[d]} * step[d];
    }
    return result;
  }
};

std::vector<Phase> phases_of(const WindowGeometry& geometry) {
  std::vector<Phase> phases = {{geometry}};
  for (int d = 0; d < WindowGeometry::dims; ++d) {
    if (geometry.spread[d] == 1 || geometry.stride[d] > 1) {
      continue;
    }
    std::vector<Phase> parts;
    for (const auto& phase : phases) {
      for (int32_t begin = 0; begin < std::min(geometry.spread[d], geometry.output_size[d]); ++begin) {
        parts.push_back(phase);
        parts.back().select(d, begin);
      }
    }
    phases = std::move(parts);
  }
  return phases;
}

// Calls f(group, first output, end) for the outputs [begin, end) of each group of `size` outputs.
template <class F>
void for_each_group(int64_t begin, int64_t end, int64_t size, F f) {
  for (auto group = begin / size; group * size < end; ++group) {
    f(group, std::max(begin, group * size), std::min(end, (group + 1) * size));
  }
}

// finish(row, first output, outputs, sums) receives the sums of each row.
template <class F>
void sums_of_windows(const GroupedTask& task, F finish) {
  const auto outputs = task.weight.size(0), of_group = outputs / task.groups;
  const auto& whole = task.input.geometry;
  const auto* const zero_point = task.weight_zero_point.const_data_ptr<int32_t>();
  for (const auto& phase : phases_of(whole)) {
    auto input = task.input.pointers();
    input.geometry = phase.geometry;
    const auto weight = phase.is_whole() ? task.weight : phase.weight_of(task.weight, whole.kernel);
    const auto features = weight.size(1);
    const auto rows = task.input.values.size(0) * WindowGeometry::product(phase.geometry.output_size);
    const WindowLevels levels(input, task.groups);
    const auto* const values = weight.const_data_ptr<int8_t>();
    for_each_task(rows, features, outputs, [&](int64_t row, int64_t count, int64_t first, int64_t width) {
      const std::unique_ptr<int32_t[]> sums(new int32_t[count * width]);
      PairMultiplier multiply(count, features);
      for_each_group(first, first + width, of_group, [&](int64_t group, int64_t begin, int64_t end) {
        multiply({values + begin * features, features, end - begin, zero_point + begin}, sums.get() + begin - first,
            width, [&](int64_t k, int64_t n, int16_t* to, int64_t step) {
              levels(row, count, group, k, n, to, step);
            });
      });
      for (int64_t i = 0; i < count; ++i) {
        finish(phase.is_whole() ? row + i : phase.row_of(row + i, whole.output_size), first, width,
            sums.get() + i * width);
      }
    });
  }
}

// Sets the outputs of a group, from `first` on, to NaN where its window holds one.
template <class C>
void spread_nan_of_window(
    const WindowInput& input, int64_t channels, int64_t group, int64_t row, C* first, int64_t count) {
  const auto windows = WindowGeometry::product(input.geometry.output_size), sample = row / windows;
  const bool has_nan = input.any_tap(static_cast<uint32_t>(row % windows), [&](int64_t, const Coordinates& pixel) {
    for (auto c = group * channels; c < (group + 1) * channels; ++c) {
      if (input.floats.is_nan(sample, c, pixel)) {
        return true;
      }
    }
    return false;
  });
  if (has_nan) {
    std::fill_n(first, count, std::numeric_limits<C>::quiet_NaN());
  }
}

// `groups` are those of the convolution, of which the task may have merged some.
template <class C>
void convolve_by_pairs(const GroupedTask& task, int64_t groups) {
  const auto input = task.input.pointers();
  const auto outputs = task.weight.size(0), of_group = outputs / groups;
  const auto windows = WindowGeometry::product(input.geometry.output_size);
  const auto* const scale = task.input.scale.const_data_ptr<C>();
  const auto* const weight_scale = task.weight_scale.const_data_ptr<C>();
  const auto* const bias = task.bias.defined() ? task.bias.const_data_ptr<C>() : nullptr;
  const std::vector<int32_t> zeros(outputs, 0); // levels have no zero point
  auto* const y = task.y.mutable_data_ptr<C>();
  const auto epilogue = chosen().loops<C>().epilogue;
  sums_of_windows(task, [&](int64_t row, int64_t first, int64_t width, const int32_t* sums) {
    auto* const to = y + row * outputs;
    epilogue(sums, to + first, width,
        {scale[input.grid_of(row / windows)], 0, 0, weight_scale + first, nullptr, zeros.data(),
            bias ? bias + first : nullptr});
    if (input.floats.has_nan()) {
      for_each_group(first, first + width, of_group, [&](int64_t group, int64_t begin, int64_t end) {
        spread_nan_of_window(input, input.channels / groups, group, row, to + begin, end - begin);
      });
    }
  });
}

// The same convolution in fewer groups, whose outputs fill vectors: of the channels of other groups, the levels of the
// weight are 0.
GroupedTask with_merged_groups(const GroupedTask& task) {
  const auto outputs = task.weight.size(0), of_group = outputs / task.groups;
  auto merged = std::clamp<int64_t>(pair_outputs / std::max<int64_t>(1, of_group), 1, task.groups);
  while (task.groups % merged != 0) {
    --merged;
  }
  if (merged == 1) {
    return task;
  }
  const auto* const zero_point = task.weight_zero_point.const_data_ptr<int32_t>();
  const auto taps = WindowGeometry::product(task.input.geometry.kernel), channels = task.weight.size(1) / taps;
  auto result = task;
  result.groups = task.groups / merged;
  result.weight = at::empty({outputs, taps * merged * channels}, task.weight.options());
  const auto* const from = task.weight.const_data_ptr<int8_t>();
  auto* to = result.weight.mutable_data_ptr<int8_t>();
  for (int64_t output = 0; output < outputs; ++output) {
    const auto place = output / of_group % merged * channels;
    for (int64_t tap = 0; tap < taps; ++tap, to += merged * channels) {
      std::fill_n(to, merged * channels, static_cast<int8_t>(zero_point[output]));
      std::copy_n(from + (output * taps + tap) * channels, channels, to + place);
    }
  }
  return result;
}

} // namespace

bool try_pair_products(const GroupedTask& given) {
  if (!has_pair_products() || !given.fits_int32()) {
    return false;
  }
  const auto task = with_merged_groups(given);
  if (task.y.scalar_type() == at::kInt) {
    auto* const y = task.y.mutable_data_ptr<int32_t>();
    const auto outputs = task.weight.size(0);
    sums_of_windows(task, [&](int64_t row, int64_t first, int64_t width, const int32_t* sums) {
      std::copy_n(sums, width, y + row * outputs + first);
    });
  } else {
    AT_DISPATCH_FLOATING_TYPES(task.y.scalar_type(), "int8_conv_grouped", [&] {
      convolve_by_pairs<scalar_t>(task, given.groups);
    });
  }
  return true;
}

} // namespace qatfast::cpu
