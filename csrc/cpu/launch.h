// What the CPU launchers share: the dtype switch, runs of equal grids, and parallel loops over memory.
#pragma once

#include "../kernels.h"
#include "loops.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

namespace qatfast::cpu {

constexpr int64_t grain = 32768;  // elements that are worth a thread, as in ATen
constexpr int64_t tile_rows = 64; // at most

// f(Q{}) with the C++ type of an 8 or 16-bit integer dtype.
template <class F>
void with_integer_type(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kChar:
      return f(int8_t{});
    case at::kByte:
      return f(uint8_t{});
    case at::kShort:
      return f(int16_t{});
    default:
      return f(uint16_t{});
  }
}

// Whether blocks alternate element by element: they are the columns of a matrix.
inline bool are_columns(const Layout& layout) {
  return layout.inner == 1 && layout.blocks > 1;
}

// f(offset, n, first block, each) for the pieces of memory [begin, end) in which one grid holds for all elements, or
// (each, where blocks alternate element by element) consecutive blocks' grids hold for consecutive elements.
template <class F>
void for_each_run(const Layout& layout, int64_t begin, int64_t end, F f) {
  const bool each = are_columns(layout);
  const int64_t length = each ? layout.blocks : layout.inner;
  int64_t block = each ? 0 : begin / layout.inner % layout.blocks;
  int64_t skipped = begin % length;
  while (begin < end) {
    const int64_t n = std::min(end - begin, length - skipped);
    f(begin, n, each ? skipped : block, each);
    begin += n;
    skipped = 0;
    if (!each && ++block == layout.blocks) {
      block = 0;
    }
  }
}

// f(begin, end) over [0, n) in parallel; pieces start at multiples of 64 elements, a whole number of mask bytes.
template <class F>
void parallel_over_memory(int64_t n, F f) {
  constexpr int64_t unit = 64;
  at::parallel_for(0, (n + unit - 1) / unit, grain / unit, [&](int64_t begin, int64_t end) {
    f(begin * unit, std::min(end * unit, n));
  });
}

template <class C>
Grids<C> grids_of(const QParams& qparams) {
  return {qparams.scale.const_data_ptr<C>(), qparams.zero_point.const_data_ptr<int32_t>(),
      static_cast<C>(qparams.quant_min), static_cast<C>(qparams.quant_max), false};
}

// loop(offset, n, grids) over all of a tensor with given grids.
template <class C, class F>
void map_with_grids(const Layout& layout, const Grids<C>& grids, F loop) {
  parallel_over_memory(layout.numel(), [&](int64_t begin, int64_t end) {
    for_each_run(layout, begin, end, [&](int64_t offset, int64_t n, int64_t block, bool each) {
      loop(offset, n, grids.from(block, each));
    });
  });
}

// f(first row, rows) for all rows in parallel, a tile of them at a time that stays in cache between two loops over it.
template <class F>
void for_each_tile(int64_t rows, int64_t columns, F f) {
  const int64_t grain_rows = std::max<int64_t>(1, grain / std::max<int64_t>(1, columns));
  const int64_t tile = std::clamp<int64_t>(4096 / std::max<int64_t>(1, columns), 1, tile_rows);
  at::parallel_for(0, rows, grain_rows, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += tile) {
      f(begin, std::min(tile, end - begin));
    }
  });
}

// f(offset, rows) for the rows [begin, end) of a matrix, some of them at a time: few enough to stay in cache, enough
// that what is known of a column is loaded seldom.
template <class F>
void for_each_band(int64_t begin, int64_t end, int64_t columns, F f) {
  const int64_t band = std::max<int64_t>(32, 16384 / columns);
  for (; begin < end; begin += band) {
    f(begin * columns, std::min(band, end - begin));
  }
}

// Whether every block is one run of memory, and none needs to be split among threads.
inline bool are_whole_rows(const Layout& layout) {
  return layout.outer == 1 && (layout.blocks >= at::get_num_threads() || layout.numel() <= grain);
}

// Scale and zero point of every block from the range of its values.
template <class T>
void choose_qparams_of_blocks(
    const T* x, const Layout& layout, const QuantSpec& spec, compute_t<T>* scale, int32_t* zero_point) {
  using C = compute_t<T>;
  const auto& loops = chosen().loops<T>();
  const auto min = static_cast<C>(spec.quant_min()), max = static_cast<C>(spec.quant_max());
  const auto n = layout.numel();
  if (are_whole_rows(layout)) {
    const auto blocks_a_task = std::max<int64_t>(1, grain / std::max<int64_t>(1, layout.inner));
    at::parallel_for(0, layout.blocks, blocks_a_task, [&](int64_t begin, int64_t end) {
      loops.choose_qparams(x + begin * layout.inner, end - begin, layout.inner, {min, max, spec.symmetric},
          scale + begin, zero_point + begin);
    });
    return;
  }
  // a range of every block for every task, each over its own stretch of memory
  const int64_t tasks = std::clamp<int64_t>(n / grain, 1, at::get_num_threads());
  std::vector<C> lo(tasks * layout.blocks, C(0)), hi(tasks * layout.blocks, C(0));
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      C* const task_lo = lo.data() + task * layout.blocks;
      C* const task_hi = hi.data() + task * layout.blocks;
      if (n == 0) {
        continue;
      }
      if (are_columns(layout)) {
        for_each_band(layout.outer * task / tasks, layout.outer * (task + 1) / tasks, layout.blocks,
            [&](int64_t offset, int64_t rows) {
              loops.range_of_columns(x + offset, rows, layout.blocks, task_lo, task_hi);
            });
        continue;
      }
      for_each_run(
          layout, n * task / tasks, n * (task + 1) / tasks, [&](int64_t offset, int64_t count, int64_t block, bool) {
            loops.range(x + offset, count, task_lo + block, task_hi + block);
          });
    }
  });
  for (int64_t task = 1; task < tasks; ++task) {
    for (int64_t block = 0; block < layout.blocks; ++block) {
      lo[block] = widen_lo(lo[block], lo[task * layout.blocks + block]);
      hi[block] = widen_hi(hi[block], hi[task * layout.blocks + block]);
    }
  }
  loops.choose(lo.data(), hi.data(), layout.blocks, {min, max, spec.symmetric}, scale, zero_point);
}

} // namespace qatfast::cpu
