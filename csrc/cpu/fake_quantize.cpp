#include "launch.h"

#include <ATen/Config.h>

#include <thread>

namespace qatfast::cpu {
namespace {

// From T to itself, or from float to a 16-bit type.
template <class T, class To>
auto loop_of() {
  if constexpr (std::is_same_v<T, To>) {
    return chosen().loops<T>().fake_quantize;
  } else if constexpr (std::is_same_v<To, c10::Half>) {
    return chosen().f32_to_f16;
  } else {
    return chosen().f32_to_bf16;
  }
}

// Each block is quantized while it is still in cache from finding its range.
template <class T, class To>
void fake_quantize_rows(const T* x, To* y, const Layout& layout, const QuantSpec& spec) {
  using C = compute_t<T>;
  const auto choose_qparams = chosen().loops<T>().choose_qparams;
  const auto loop = loop_of<T, To>();
  const auto min = static_cast<C>(spec.quant_min()), max = static_cast<C>(spec.quant_max());
  for_each_tile(layout.blocks, layout.inner, [&](int64_t first, int64_t rows) {
    const T* from = x + first * layout.inner;
    C scale[tile_rows];
    int32_t zero_point[tile_rows];
    const bool unclamped = choose_qparams(from, rows, layout.inner, {min, max, spec.symmetric}, scale, zero_point);
    loop(from, y + first * layout.inner, rows, layout.inner, {scale, zero_point, min, max, unclamped});
  });
}

// One grid for all. Each thread finds the range of its part, waits for those of the others, and quantizes its part: a
// second parallel loop would have to wake the threads once more.
template <class T, class To>
void fake_quantize_tensor(const T* x, To* y, int64_t n, const QuantSpec& spec) {
  using C = compute_t<T>;
  struct alignas(64) Part { // a cache line each
    C lo = 0, hi = 0;
    bool is_finite = true;
  };
  constexpr int64_t unit = 64;
  const auto& loops = chosen().loops<T>();
  const auto min = static_cast<C>(spec.quant_min()), max = static_cast<C>(spec.quant_max());
  const auto loop = loop_of<T, To>();
  const int64_t units = (n + unit - 1) / unit;
  const int64_t tasks = std::clamp<int64_t>(n / grain, 1, at::get_num_threads());
  std::vector<Part> parts(tasks);
  std::atomic<int64_t> arrived{0};
  parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    const auto begin_of = [&](int64_t task) {
      return std::min(units * task / tasks * unit, n);
    };
    for (int64_t task = first; task < last; ++task) {
      auto& part = parts[task];
      const auto begin = begin_of(task);
      part.is_finite = loops.range(x + begin, begin_of(task + 1) - begin, &part.lo, &part.hi);
    }
    arrived += last - first;
    for (int spins = 0; arrived < tasks; ++spins) {
      if (spins > 1000) {
        std::this_thread::yield();
      }
    }
    Part all;
    for (const auto& part : parts) {
      all.lo = widen_lo(all.lo, part.lo);
      all.hi = widen_hi(all.hi, part.hi);
      all.is_finite &= part.is_finite;
    }
    C scale;
    int32_t zero_point;
    const bool unclamped =
        loops.choose(&all.lo, &all.hi, 1, {min, max, spec.symmetric}, &scale, &zero_point) && all.is_finite;
    const bool is_long = n >= 4096; // from here on finding the factor pays
    const C factor = unclamped && is_long ? loops.factor(std::max(-all.lo, all.hi), scale) : C(0);
    const auto begin = begin_of(first);
    loop(x + begin, y + begin, 1, begin_of(last) - begin, {&scale, &zero_point, min, max, unclamped, factor});
  });
}

// Strips of columns that stay in cache between the two loops, if there are enough of them.
template <class T, class To>
bool fake_quantize_strips(const T* x, To* y, const Layout& layout, const QuantSpec& spec) {
  using C = compute_t<T>;
  constexpr int64_t most_rows = 128;
  if (!are_columns(layout, longest_mapped) || layout.outer > most_rows) {
    return false;
  }
  const auto tasks = std::clamp<int64_t>(layout.numel() / grain, 1, at::get_num_threads());
  const Strips strips(layout, strip_columns / layout.inner, tasks);
  const auto count = layout.parts * strips.of_part, columns = layout.blocks * layout.inner;
  if (count < tasks) {
    return false;
  }
  const auto choose = chosen().loops<T>().choose;
  const auto loop = loop_of<T, To>();
  const auto min = static_cast<C>(spec.quant_min()), max = static_cast<C>(spec.quant_max());
  parallel_for(0, count, (count + tasks - 1) / tasks, [&](int64_t begin, int64_t end) {
    for_each_strip(layout, strips, begin, end, [&](int64_t, int64_t blocks, int64_t offset) {
      C lo[strip_columns], hi[strip_columns], scale[strip_columns];
      int32_t zero_point[strip_columns];
      const bool is_finite = range_of_blocks(x + offset, layout.outer, columns, blocks, layout.inner, lo, hi);
      const bool unclamped = choose(lo, hi, blocks, {min, max, spec.symmetric}, scale, zero_point) && is_finite;
      Grids<C> grids = {scale, zero_point, min, max, unclamped};
      if (blocks == layout.blocks) {
        return for_each_piece_of_columns({layout.outer, blocks, layout.inner}, 0, layout.outer * columns, grids,
            [&](int64_t piece, int64_t rows, int64_t n, const Grids<C>& of_piece) {
              loop(x + offset + piece, y + offset + piece, rows, n, of_piece);
            });
      }
      grids.columns = blocks;
      grids.repeat = layout.inner;
      grids.stride = columns;
      loop(x + offset, y + offset, layout.outer, blocks * layout.inner, grids);
    });
  });
  return true;
}

template <class T, class To>
void fake_quantize_blocks(const T* x, To* y, const Layout& layout, const QuantSpec& spec) {
  using C = compute_t<T>;
  std::vector<C> scale(layout.parts * layout.blocks);
  std::vector<int32_t> zero_point(layout.parts * layout.blocks);
  const bool unclamped = choose_qparams_of_blocks(x, layout, spec, scale.data(), zero_point.data());
  const Grids<C> grids = {
      scale.data(), zero_point.data(), static_cast<C>(spec.quant_min()), static_cast<C>(spec.quant_max()), unclamped};
  const auto loop = loop_of<T, To>();
  map_with_grids(layout, grids, [&](int64_t offset, int64_t rows, int64_t n, const Grids<C>& of_piece) {
    loop(x + offset, y + offset, rows, n, of_piece);
  });
}

// f(T{}, To{})
template <class F>
void with_types(at::ScalarType from, at::ScalarType to, F f) {
  if (from == at::kFloat && to == at::kHalf) {
    return f(float{}, c10::Half{});
  }
  if (from == at::kFloat && to == at::kBFloat16) {
    return f(float{}, c10::BFloat16{});
  }
  with_float_type(from, [&](auto type) {
    f(type, type);
  });
}

} // namespace

void fake_quantize(const FakeQuantizeTask& task) {
  const auto layout = layout_of(task.from, task.spec.granularity);
  if (layout.numel() == 0) {
    return;
  }
  with_types(task.from.scalar_type(), task.to.scalar_type(), [&](auto from_type, auto to_type) {
    using T = decltype(from_type);
    using To = decltype(to_type);
    const auto* x = task.from.const_data_ptr<T>();
    auto* y = task.to.mutable_data_ptr<To>();
    if (AT_PARALLEL_OPENMP && layout.blocks == 1) { // a pool of tasks might not run all parts at once
      fake_quantize_tensor(x, y, layout.numel(), task.spec);
    } else if (are_whole_rows(layout)) {
      fake_quantize_rows(x, y, layout, task.spec);
    } else if (!fake_quantize_strips(x, y, layout, task.spec)) {
      fake_quantize_blocks(x, y, layout, task.spec);
    }
  });
}

} // namespace qatfast::cpu
