// What the CPU launchers share: the dtype switch, runs of equal grids, and parallel loops over memory.
#pragma once

#include "../kernels.h"
#include "loops.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
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

// f(offset, rows, n, first block) for the memory [begin, end) in pieces of `rows` runs of n elements, a block each.
template <class F>
void for_each_piece(const Layout& layout, int64_t begin, int64_t end, F f) {
  int64_t block = begin / layout.inner % layout.blocks;
  int64_t skipped = begin % layout.inner;
  while (begin < end) {
    const int64_t left = end - begin;
    const bool whole = skipped == 0 && left >= layout.inner;
    const int64_t rows = whole ? std::min(left / layout.inner, layout.blocks - block) : 1;
    const int64_t n = whole ? layout.inner : std::min(left, layout.inner - skipped);
    f(begin, rows, n, block);
    begin += rows * n;
    block = (block + rows) % layout.blocks;
    skipped = 0;
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
      static_cast<C>(qparams.quant_min), static_cast<C>(qparams.quant_max)};
}

// loop(offset, rows, n, grids) over all of a tensor with given grids; what one thread does begins at a multiple of 64.
template <class C, class F>
void map_with_grids(Layout layout, Grids<C> grids, F loop) {
  grids.of_columns = are_columns(layout);
  const auto columns = layout.blocks;
  if (grids.of_columns) {
    layout = {1, layout.outer, columns}; // its rows
  }
  parallel_over_memory(layout.numel(), [&](int64_t begin, int64_t end) {
    for_each_piece(layout, begin, end, [&](int64_t offset, int64_t rows, int64_t n, int64_t block) {
      loop(offset, rows, n, grids.from(grids.of_columns ? offset % columns : block));
    });
  });
}

// f(first row, rows) for all rows in parallel, a tile of them at a time that stays in cache between two loops over it.
template <class F>
void for_each_tile(int64_t rows, int64_t columns, F f) {
  const auto rows_of = [&](int64_t elements) {
    return elements / std::max<int64_t>(1, columns);
  };
  // what fits in L1, or as many rows as are reduced together if they fit in L2
  const int64_t tile =
      std::clamp<int64_t>(std::max(rows_of(4096), std::min<int64_t>(16, rows_of(16384))), 1, tile_rows);
  at::parallel_for(0, rows, std::max<int64_t>(1, rows_of(grain)), [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += tile) {
      f(begin, std::min(tile, end - begin));
    }
  });
}

// Whether every block is one run of memory, and none needs to be split among threads.
inline bool are_whole_rows(const Layout& layout) {
  return layout.outer == 1 && (layout.blocks >= at::get_num_threads() || layout.numel() <= grain);
}

// Scale and zero point of every block from the range of its values; whether none of these would be clamped.
template <class T>
bool choose_qparams_of_blocks(
    const T* x, const Layout& layout, const QuantSpec& spec, compute_t<T>* scale, int32_t* zero_point) {
  using C = compute_t<T>;
  const auto& loops = chosen().loops<T>();
  const auto min = static_cast<C>(spec.quant_min()), max = static_cast<C>(spec.quant_max());
  const auto n = layout.numel();
  std::atomic<bool> unclamped{true};
  if (are_whole_rows(layout)) {
    const auto blocks_a_task = std::max<int64_t>(1, grain / std::max<int64_t>(1, layout.inner));
    at::parallel_for(0, layout.blocks, blocks_a_task, [&](int64_t begin, int64_t end) {
      if (!loops.choose_qparams(x + begin * layout.inner, end - begin, layout.inner, {min, max, spec.symmetric},
              scale + begin, zero_point + begin)) {
        unclamped = false;
      }
    });
    return unclamped;
  }
  // a range of every block for every task, each over its own stretch of memory
  const int64_t tasks = std::clamp<int64_t>(n / grain, 1, at::get_num_threads());
  std::vector<C> lo(tasks * layout.blocks, C(0)), hi(tasks * layout.blocks, C(0));
  at::parallel_for(0, n == 0 ? 0 : tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      C* const task_lo = lo.data() + task * layout.blocks;
      C* const task_hi = hi.data() + task * layout.blocks;
      bool is_finite = true;
      if (are_columns(layout)) {
        const auto row = layout.outer * task / tasks, end = layout.outer * (task + 1) / tasks;
        is_finite = loops.range_of_columns(x + row * layout.blocks, end - row, layout.blocks, task_lo, task_hi);
      } else {
        for_each_piece(layout, n * task / tasks, n * (task + 1) / tasks,
            [&](int64_t offset, int64_t rows, int64_t count, int64_t block) {
              for (int64_t i = 0; i < rows; ++i) {
                is_finite &= loops.range(x + offset + i * count, count, task_lo + block + i, task_hi + block + i);
              }
            });
      }
      if (!is_finite) {
        unclamped = false;
      }
    }
  });
  for (int64_t task = 1; task < tasks; ++task) {
    for (int64_t block = 0; block < layout.blocks; ++block) {
      lo[block] = widen_lo(lo[block], lo[task * layout.blocks + block]);
      hi[block] = widen_hi(hi[block], hi[task * layout.blocks + block]);
    }
  }
  return loops.choose(lo.data(), hi.data(), layout.blocks, {min, max, spec.symmetric}, scale, zero_point) && unclamped;
}

} // namespace qatfast::cpu
