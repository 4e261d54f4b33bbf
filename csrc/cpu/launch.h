// What the CPU launchers share: runs of equal grids, and parallel loops over memory.
#pragma once

#include "launchers.h"
#include "cpu/arithmetic.h"
#include "cpu/simd/loops.h"

#include <ATen/Dispatch_v2.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

namespace qatfast::cpu {

constexpr int64_t grain = 32768;                          // elements that are worth a thread, as in ATen
constexpr int64_t products_per_thread = int64_t{1} << 20; // likewise, of integers
constexpr int64_t tile_rows = 1024;                       // the most rows of a tile
constexpr int64_t strip_columns = 1024;                   // the most columns of a strip
constexpr int64_t joined_columns = 32;                    // shorter rows are joined
// The most elements per row of a block that is quantized as columns (longer runs fill vectors of their own), and of one
// whose range is found as columns, with one reduction for all rows.
constexpr int64_t longest_mapped = 31, longest_ranged = 256;

// at::parallel_for with tasks that all compute in the standard floating-point environment.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain_size, F f) {
  at::parallel_for(begin, end, grain_size, [&](int64_t first, int64_t last) {
    const StandardArithmetic arithmetic;
    f(first, last);
  });
}

// Whether blocks have at most `longest` elements of each row of a matrix. Loops then go along the rows, over columns.
inline bool are_columns(const Layout& layout, int64_t longest) {
  return layout.parts > 1 || (layout.outer > 1 && layout.blocks > 1 && layout.inner <= longest);
}

// The number of rows to take as one, so that it is some vectors long.
inline int64_t rows_to_join(int64_t columns, int64_t rows) {
  if (columns >= joined_columns) {
    return 1;
  }
  constexpr int64_t vector = 32, enough = 128;
  const auto whole = vector / std::gcd(columns, vector); // the fewest rows that fill whole vectors
  return std::min(rows, (enough + whole * columns - 1) / (whole * columns) * whole);
}

// Calls f(offset, rows, n, first block) for the memory [begin, end) in pieces of `rows` runs of n elements, one per
// block.
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

// Calls f(begin, end) over [0, n) in parallel. Pieces start at multiples of 64 elements, a whole number of mask bytes.
template <class F>
void parallel_over_memory(int64_t n, F f) {
  constexpr int64_t unit = 64;
  parallel_for(0, (n + unit - 1) / unit, grain / unit, [&](int64_t begin, int64_t end) {
    f(begin * unit, std::min(end * unit, n));
  });
}

template <class C>
Grids<C> grids_of(const QParams& qparams) {
  return {qparams.scale.const_data_ptr<C>(), qparams.zero_point.const_data_ptr<int32_t>(),
      static_cast<C>(qparams.quant_min), static_cast<C>(qparams.quant_max)};
}

// Calls f(offset, rows, n, grids) for the memory [begin, end) of a tensor whose blocks are columns.
template <class C, class F>
void for_each_piece_of_columns(const Layout& layout, int64_t begin, int64_t end, Grids<C> grids, F f) {
  const auto columns = layout.blocks * layout.inner, part_size = layout.outer * columns;
  grids.columns = layout.blocks;
  grids.repeat = layout.inner;
  while (begin < end) {
    const auto part = begin / part_size, left = std::min(end, (part + 1) * part_size) - begin;
    auto of_piece = grids.from(part * layout.blocks);
    of_piece.first_column = begin % columns;
    if (columns >= joined_columns && of_piece.first_column > 0) { // the end of a long row
      const auto n = std::min(left, columns - of_piece.first_column);
      of_piece.stride = n;
      f(begin, 1, n, of_piece);
      begin += n;
      continue;
    }
    const auto width = columns * rows_to_join(columns, std::max<int64_t>(1, left / columns));
    const auto rows = std::max<int64_t>(1, left / width), n = std::min(width, left);
    of_piece.stride = n;
    f(begin, rows, n, of_piece);
    begin += rows * n;
  }
}

// Calls loop(offset, rows, n, grids) over all of a tensor. The part of each thread begins at a multiple of 64 elements,
// and with before(begin, end).
template <class C, class F, class B>
void map_with_grids(const Layout& layout, const Grids<C>& grids, F loop, B before) {
  parallel_over_memory(layout.numel(), [&](int64_t begin, int64_t end) {
    before(begin, end);
    if (are_columns(layout, longest_mapped)) {
      return for_each_piece_of_columns(layout, begin, end, grids, loop);
    }
    for_each_piece(layout, begin, end, [&](int64_t offset, int64_t rows, int64_t n, int64_t block) {
      loop(offset, rows, n, grids.from(block));
    });
  });
}

template <class C, class F>
void map_with_grids(const Layout& layout, const Grids<C>& grids, F loop) {
  map_with_grids(layout, grids, loop, [](int64_t, int64_t) {});
}

// to = loop(from) over all of a tensor with static grids.
template <class C, class From, class To>
void map_tensor(const at::Tensor& from, const at::Tensor& to, const QParams& qparams, const Layout& layout,
    void (*loop)(const From* x, To* y, int64_t rows, int64_t n, const Grids<C>& grids)) {
  const auto* x = from.const_data_ptr<From>();
  auto* y = to.mutable_data_ptr<To>();
  map_with_grids(layout, grids_of<C>(qparams), [&](int64_t offset, int64_t rows, int64_t n, const Grids<C>& grids) {
    loop(x + offset, y + offset, rows, n, grids);
  });
}

// Calls f(first row, rows) for all rows in parallel, a tile of them at a time that stays in cache between two loops.
template <class F>
void for_each_tile(int64_t rows, int64_t columns, F f) {
  const auto rows_of = [&](int64_t elements) {
    return elements / std::max<int64_t>(1, columns);
  };
  // What fits in L1, or as many rows as are reduced together if they fit in L2.
  const int64_t tile =
      std::clamp<int64_t>(std::max(rows_of(4096), std::min<int64_t>(16, rows_of(16384))), 1, tile_rows);
  parallel_for(0, rows, std::max<int64_t>(1, rows_of(grain)), [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += tile) {
      f(begin, std::min(tile, end - begin));
    }
  });
}

// Whether every block is one run of memory, and none has to be split among threads.
inline bool are_whole_rows(const Layout& layout) {
  return layout.outer == 1 && layout.parts == 1 && (layout.blocks >= at::get_num_threads() || layout.numel() <= grain);
}

// The ranges of `blocks` blocks of `inner` columns each, over rows that begin `stride` apart. Returns whether all
// values are finite.
template <class T>
bool range_of_blocks(
    const T* x, int64_t rows, int64_t stride, int64_t blocks, int64_t inner, opmath_type<T>* lo, opmath_type<T>* hi) {
  using C = opmath_type<T>;
  const auto& loops = chosen().loops<T>();
  const auto columns = blocks * inner;
  const auto joined = columns == stride ? rows_to_join(columns, rows) : 1; // only rows without gaps
  if (joined == 1 && inner == 1) {
    return loops.range_of_columns(x, rows, stride, columns, lo, hi);
  }
  std::fill_n(lo, blocks, C(0));
  std::fill_n(hi, blocks, C(0));
  C column_lo[strip_columns], column_hi[strip_columns];
  const auto widen = [&](const T* from, int64_t count, int64_t n) {
    const bool is_finite = loops.range_of_columns(from, count, joined * stride, n, column_lo, column_hi);
    for (int64_t j = 0, block = 0, left = inner; j < n; ++j) {
      lo[block] = widen_lo(lo[block], column_lo[j]);
      hi[block] = widen_hi(hi[block], column_hi[j]);
      if (--left == 0) {
        left = inner;
        block = block + 1 == blocks ? 0 : block + 1;
      }
    }
    return is_finite;
  };
  bool is_finite = widen(x, rows / joined, joined * columns);
  if (rows % joined > 0) {
    is_finite &= widen(x + rows / joined * joined * stride, 1, rows % joined * columns);
  }
  return is_finite;
}

// Finds the ranges of blocks that are runs of memory: blocks [0, blocks) in each of `rows` rows. Returns whether all
// values are finite.
template <class T>
bool range_of_runs(
    const T* x, int64_t rows, int64_t stride, int64_t blocks, int64_t inner, opmath_type<T>* lo, opmath_type<T>* hi) {
  using C = opmath_type<T>;
  const auto& loops = chosen().loops<T>();
  bool is_finite = true;
  std::fill_n(lo, blocks, C(0));
  std::fill_n(hi, blocks, C(0));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      is_finite &= loops.range(x + row * stride + block * inner, inner, lo + block, hi + block);
    }
  }
  return is_finite;
}

// A tensor as strips of neighbouring blocks over all rows.
struct Strips {
  int64_t blocks;  // per strip; the last one of each part may have fewer
  int64_t of_part; // strips per part

  // Chooses as few strips of at most `most` blocks as possible, but no fewer than tasks if there are so many blocks.
  Strips(const Layout& layout, int64_t most, int64_t tasks) {
    constexpr int64_t vector = 16;
    const auto tasks_per_part = (tasks + layout.parts - 1) / layout.parts;
    const auto wanted = ((layout.blocks + most - 1) / most + tasks_per_part - 1) / tasks_per_part * tasks_per_part;
    blocks = std::max<int64_t>(1, layout.blocks / wanted);
    if (layout.inner == 1) {
      blocks = std::min(most, (blocks + vector - 1) / vector * vector);
    }
    of_part = (layout.blocks + blocks - 1) / blocks;
  }
};

// Calls f(first block, blocks, offset of its first element) for strips [begin, end).
template <class F>
void for_each_strip(const Layout& layout, const Strips& strips, int64_t begin, int64_t end, F f) {
  for (; begin < end; ++begin) {
    const auto part = begin / strips.of_part, block = begin % strips.of_part * strips.blocks;
    f(part * layout.blocks + block, std::min(strips.blocks, layout.blocks - block),
        (part * layout.outer * layout.blocks + block) * layout.inner);
  }
}

// Finds the range of the finite values of every block and calls done(first block, blocks, lo, hi), which may run in
// parallel for different blocks. Returns whether all values are finite.
template <class T, class F>
bool for_each_range(const T* x, const Layout& layout, F done) {
  if (layout.blocks == 0) {
    return true;
  }
  using C = opmath_type<T>;
  const auto& loops = chosen().loops<T>();
  const auto n = layout.numel();
  std::atomic<bool> all_finite{true};
  const auto note = [&](bool is_finite) {
    if (!is_finite) {
      all_finite = false;
    }
  };
  const auto tasks = std::clamp<int64_t>(n / grain, 1, at::get_num_threads());
  const bool by_columns = are_columns(layout, longest_ranged);
  const auto range = by_columns ? range_of_blocks<T> : range_of_runs<T>;
  const auto columns = layout.blocks * layout.inner;
  const Strips strips(layout, by_columns ? strip_columns / layout.inner : strip_columns, tasks);
  const auto count = layout.parts * strips.of_part;
  if (count >= tasks) { // every task finds whole ranges
    parallel_for(0, count, (count + tasks - 1) / tasks, [&](int64_t begin, int64_t end) {
      for_each_strip(layout, strips, begin, end, [&](int64_t first, int64_t blocks, int64_t offset) {
        C lo[strip_columns], hi[strip_columns];
        note(range(x + offset, layout.outer, columns, blocks, layout.inner, lo, hi));
        done(first, blocks, lo, hi);
      });
    });
    return all_finite;
  }
  // There are few blocks: every task finds ranges over its own stretch of memory.
  const auto blocks = layout.parts * layout.blocks;
  std::vector<C> lo(tasks * blocks, C(0)), hi(tasks * blocks, C(0));
  parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      C* const task_lo = lo.data() + task * blocks;
      C* const task_hi = hi.data() + task * blocks;
      if (by_columns) {
        const auto row = layout.outer * task / tasks, end = layout.outer * (task + 1) / tasks;
        for_each_strip(layout, strips, 0, count, [&](int64_t first_block, int64_t blocks_of_strip, int64_t offset) {
          note(range(x + offset + row * columns, end - row, columns, blocks_of_strip, layout.inner,
              task_lo + first_block, task_hi + first_block));
        });
      } else {
        for_each_piece(layout, n * task / tasks, n * (task + 1) / tasks,
            [&](int64_t offset, int64_t rows, int64_t run, int64_t block) {
              for (int64_t i = 0; i < rows; ++i) {
                note(loops.range(x + offset + i * run, run, task_lo + block + i, task_hi + block + i));
              }
            });
      }
    }
  });
  for (int64_t task = 1; task < tasks; ++task) {
    for (int64_t block = 0; block < blocks; ++block) {
      lo[block] = widen_lo(lo[block], lo[task * blocks + block]);
      hi[block] = widen_hi(hi[block], hi[task * blocks + block]);
    }
  }
  done(0, blocks, lo.data(), hi.data());
  return all_finite;
}

// Scale and zero point of every block from the range of its values. Returns whether no value is clamped.
template <class T>
bool choose_qparams_of_blocks(
    const T* x, const Layout& layout, const QuantSpec& spec, opmath_type<T>* scale, int32_t* zero_point) {
  using C = opmath_type<T>;
  const StandardArithmetic arithmetic;
  const auto& loops = chosen().loops<T>();
  const auto quant_range = spec.quant_range<C>();
  std::atomic<bool> unclamped{true};
  const auto note = [&](bool is_unclamped) {
    if (!is_unclamped) {
      unclamped = false;
    }
  };
  if (are_whole_rows(layout)) {
    const auto blocks_per_task = std::max<int64_t>(1, grain / std::max<int64_t>(1, layout.inner));
    parallel_for(0, layout.blocks, blocks_per_task, [&](int64_t begin, int64_t end) {
      note(loops.choose_qparams(
          x + begin * layout.inner, end - begin, layout.inner, quant_range, scale + begin, zero_point + begin));
    });
    return unclamped;
  }
  const bool all_finite = for_each_range(x, layout, [&](int64_t first, int64_t blocks, const C* lo, const C* hi) {
    note(loops.choose(lo, hi, blocks, quant_range, scale + first, zero_point + first));
  });
  return unclamped && all_finite;
}

} // namespace qatfast::cpu
