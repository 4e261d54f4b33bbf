#include "cpu/launch.h"

#include <ATen/Config.h>

#include <thread>

namespace qatfast::cpu {
namespace {

// The loop from T to itself, or from float to a 16-bit type.
template <class T, class To>
auto fake_quantize_loop() {
  if constexpr (std::is_same_v<T, To>) {
    return chosen().loops<T>().fake_quantize;
  } else if constexpr (std::is_same_v<To, c10::Half>) {
    return chosen().f32_to_f16;
  } else {
    return chosen().f32_to_bf16;
  }
}

// Quantizes each block while it is still in cache from finding its range.
template <class T, class To>
void fake_quantize_rows(const T* x, To* y, const Layout& layout, const QuantSpec& spec) {
  using C = opmath_type<T>;
  const auto choose_qparams = chosen().loops<T>().choose_qparams;
  const auto loop = fake_quantize_loop<T, To>();
  const auto range = spec.quant_range<C>();
  for_each_tile(layout.blocks, layout.inner, [&](int64_t first, int64_t rows) {
    const T* from = x + first * layout.inner;
    C scale[tile_rows];
    int32_t zero_point[tile_rows];
    const bool unclamped = choose_qparams(from, rows, layout.inner, range, scale, zero_point);
    loop(from, y + first * layout.inner, rows, layout.inner,
        {scale, zero_point, range.quant_min, range.quant_max, unclamped});
  });
}

// Quantizes a tensor with one grid. Each thread finds the range of its part, waits for the others, and quantizes its
// part: a second parallel loop would have to wake the threads once more.
template <class T, class To>
void fake_quantize_tensor(const T* x, To* y, int64_t n, const QuantSpec& spec) {
  using C = opmath_type<T>;
  struct alignas(64) Part { // one cache line per thread
    C lo = 0, hi = 0;
    bool is_finite = true;
  };
  constexpr int64_t unit = 64;
  const auto& loops = chosen().loops<T>();
  const auto range = spec.quant_range<C>();
  const auto loop = fake_quantize_loop<T, To>();
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
    Part whole;
    for (const auto& part : parts) {
      whole.lo = widen_lo(whole.lo, part.lo);
      whole.hi = widen_hi(whole.hi, part.hi);
      whole.is_finite &= part.is_finite;
    }
    C scale;
    int32_t zero_point;
    const bool unclamped = loops.choose(&whole.lo, &whole.hi, 1, range, &scale, &zero_point) && whole.is_finite;
    const bool is_long = n >= 4096; // a factor saves more than the search for it takes
    const C factor = unclamped && is_long ? loops.factor(std::max(-whole.lo, whole.hi), scale) : C(0);
    const auto begin = begin_of(first);
    loop(x + begin, y + begin, 1, begin_of(last) - begin,
        {&scale, &zero_point, range.quant_min, range.quant_max, unclamped, factor});
  });
}

// Quantizes strips of columns that stay in cache between the two loops. Returns false if there are too few of them.
template <class T, class To>
bool fake_quantize_strips(const T* x, To* y, const Layout& layout, const QuantSpec& spec) {
  using C = opmath_type<T>;
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
  const auto loop = fake_quantize_loop<T, To>();
  const auto range = spec.quant_range<C>();
  parallel_for(0, count, (count + tasks - 1) / tasks, [&](int64_t begin, int64_t end) {
    for_each_strip(layout, strips, begin, end, [&](int64_t, int64_t blocks, int64_t offset) {
      C lo[strip_columns], hi[strip_columns], scale[strip_columns];
      int32_t zero_point[strip_columns];
      const bool is_finite = range_of_blocks(x + offset, layout.outer, columns, blocks, layout.inner, lo, hi);
      const bool unclamped = choose(lo, hi, blocks, range, scale, zero_point) && is_finite;
      Grids<C> grids = {scale, zero_point, range.quant_min, range.quant_max, unclamped};
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
  using C = opmath_type<T>;
  std::vector<C> scale(layout.parts * layout.blocks);
  std::vector<int32_t> zero_point(layout.parts * layout.blocks);
  const bool unclamped = choose_qparams_of_blocks(x, layout, spec, scale.data(), zero_point.data());
  const auto range = spec.quant_range<C>();
  const Grids<C> grids = {scale.data(), zero_point.data(), range.quant_min, range.quant_max, unclamped};
  const auto loop = fake_quantize_loop<T, To>();
  map_with_grids(layout, grids, [&](int64_t offset, int64_t rows, int64_t n, const Grids<C>& of_piece) {
    loop(x + offset, y + offset, rows, n, of_piece);
  });
}

template <class T, class To>
void fake_quantize_as(const FakeQuantizeTask& task) {
  const auto layout = layout_of(task.from, task.spec.granularity);
  const auto* x = task.from.const_data_ptr<T>();
  auto* y = task.to.mutable_data_ptr<To>();
  if (AT_PARALLEL_OPENMP && layout.blocks == 1) { // a pool of tasks might not run all parts at once
    fake_quantize_tensor(x, y, layout.numel(), task.spec);
  } else if (are_whole_rows(layout)) {
    fake_quantize_rows(x, y, layout, task.spec);
  } else if (!fake_quantize_strips(x, y, layout, task.spec)) {
    fake_quantize_blocks(x, y, layout, task.spec);
  }
}

} // namespace

void fake_quantize(const FakeQuantizeTask& task) {
  if (task.from.numel() == 0) {
    return;
  }
  const auto from = task.from.scalar_type(), to = task.to.scalar_type();
  if (from == to) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from, "fake_quantize", [&] {
      fake_quantize_as<scalar_t, scalar_t>(task);
    });
  } else if (to == at::kHalf) {
    fake_quantize_as<float, c10::Half>(task);
  } else {
    fake_quantize_as<float, c10::BFloat16>(task);
  }
}

} // namespace qatfast::cpu
