// The kernel for dynamic ranges: every block of one or two tensors is quantized by its own range, in one launch.
//
// The plan (plan.h) decides what a thread, a warp and a CTA (cooperative thread array: CUDA's thread block) own. A
// small block belongs to part of a warp, a larger one to a CTA, and a large one to a team of CTAs, which meet at one
// grid barrier between the range and the quantization. The kernel is bound by memory: each element is written once, and
// read once if the block fits into the registers and shared memory of its owners, else twice.
//
//   fake_quantize_kernel          one launch
//     quantize_small_blocks       up to a warp per block
//     quantize_tiles              one or more CTAs per tile; Reduction combines their ranges
//       quantize_pieces           one thread: range, then `ready` returns the grid, then quantization
//   BlockUnits, WholeUnits, ColumnUnits   where the pieces of a block lie in memory
#pragma once

#include "launchers.h"
#include "cuda/plan.h"
#include "cuda/units.cuh"

#include <cooperative_groups.h>

namespace qatfast::cuda {

// One tensor of a launch.
struct KernelTask {
  Plan plan;
  const void* from;
  void* to;    // null if only scale and zero_point are needed
  void* scale; // null if it is not needed
  int32_t* zero_point;
  void* partials; // of a team: [CTA][block of the tile][lo, hi]
  QuantRange<int32_t> quant_range;
  bool aligned_alike; // whether from and to have the same distance from a 16-byte boundary
};

enum Phases { range = 1, apply = 2, both = 3 };

struct KernelLaunch {
  KernelTask tasks[2];
  int64_t second; // the first CTA of tasks[1]
  Phases phases;
  bool barrier;
};

// An end of a range (lo or hi) as its distance from 0, whose bits are ordered as integers: the larger is the wider.
// Atomics and warp reductions find the maximum in any order.
template <class C>
using Key = std::conditional_t<sizeof(C) == 8, unsigned long long, unsigned int>;

// The largest key of `width` neighbouring threads.
__device__ __forceinline__ unsigned long long warp_max(unsigned long long key, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    const auto other = __shfl_xor_sync(0xFFFFFFFF, key, offset);
    key = key > other ? key : other;
  }
  return key;
}

__device__ __forceinline__ unsigned int warp_max(unsigned int key, int width) {
#if __CUDA_ARCH__ >= 800
  if (width == 32) {
    return __reduce_max_sync(0xFFFFFFFF, key);
  }
#endif
  for (int offset = width / 2; offset > 0; offset /= 2) {
    const auto other = __shfl_xor_sync(0xFFFFFFFF, key, offset);
    key = key > other ? key : other;
  }
  return key;
}

template <class C>
struct RangeKeys {
  Key<C> below = 0; // of -lo
  Key<C> above = 0; // of hi

  __device__ __forceinline__ void widen_by(const RangeKeys& other) {
    below = below > other.below ? below : other.below;
    above = above > other.above ? above : other.above;
  }
  // Returns the widest of those of `width` neighbouring threads.
  __device__ __forceinline__ RangeKeys of_warp(int width = 32) const {
    return {warp_max(below, width), warp_max(above, width)};
  }
  __device__ __forceinline__ void widen_atomically(RangeKeys* keys) const {
    atomicMax(&keys->below, below);
    atomicMax(&keys->above, above);
  }
};

template <class C>
struct Range {
  C lo = 0;
  C hi = 0;

  // Ignores NaN.
  __device__ __forceinline__ void widen_by(C x) {
    lo = widen_lo(lo, x);
    hi = widen_hi(hi, x);
  }
  __device__ __forceinline__ bool is_finite() const {
    return finite_or_zero(lo) == lo && finite_or_zero(hi) == hi;
  }
  __device__ __forceinline__ RangeKeys<C> keys() const {
    return {bits_as<Key<C>>(C(0) - lo), bits_as<Key<C>>(C(0) + hi)};
  }
};

template <class C>
struct BlockGrid {
  ReciprocalGrid<C> grid;
  int32_t zero_point;
  bool holds_all; // whether no finite value of the block is clamped

  __device__ __forceinline__ BlockGrid(const RangeKeys<C>& keys, const QuantRange<int32_t>& range) {
    const C lo = C(0) - bits_as<C>(keys.below);
    const C hi = bits_as<C>(keys.above);
    const C quant_min = range.quant_min, quant_max = range.quant_max;
    const C scale = is_full_range(range.quant_min, range.quant_max, range.symmetric)
        ? choose_full_range_scale(lo, hi, quant_min, quant_max)
        : choose_scale(lo, hi, intervals_of(quant_min, quant_max, range.symmetric), range.symmetric);
    const C low_level = round_half_even(lo / scale);
    const C zero = choose_zero_point(low_level, quant_min, quant_max, range.symmetric);
    zero_point = static_cast<int32_t>(zero);
    grid = with_reciprocal<C>({scale, quant_min - zero, quant_max - zero});
    holds_all = holds(low_level, round_half_even(hi / scale), zero, quant_min, quant_max);
  }

  __device__ __forceinline__ void write(const KernelTask& task, int64_t block) const {
    if (task.scale) {
      static_cast<C*>(task.scale)[block] = grid.scale;
      task.zero_point[block] = zero_point;
    }
  }
};

// What a thread loads and stores at a time if runs are long.
template <class T>
struct WidePieces {
  using Piece = uint4;
  static constexpr int held = held_units(sizeof(T)); // pieces that a thread keeps in registers
  static constexpr int ahead = 4;                    // loads in flight per thread
  static constexpr int pair = 2;                     // the same while held pieces take registers and stores follow
};

// The 16-byte windows that the runs of one block touch: the first and the last of a run may lie partly outside of it.
template <class T>
struct BlockUnits : WidePieces<T> {
  using Index = int64_t;
  const T* from;
  T* to;
  Layout layout;
  int64_t block;
  int64_t units_per_run;
  bool aligned_alike;
  int skipped; // elements of the first window that lie before the first run

  __device__ __forceinline__ BlockUnits(const KernelTask& task, int64_t block)
      : from(static_cast<const T*>(task.from)),
        to(static_cast<T*>(task.to)),
        layout(task.plan.layout),
        block(block),
        units_per_run(task.plan.units_per_run),
        aligned_alike(task.aligned_alike) {
    from += block * layout.inner;
    to += block * layout.inner;
    skipped = distance(from);
  }

  // The number of elements between the pointer and the 16-byte boundary before it.
  static __device__ __forceinline__ int distance(const T* pointer) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / sizeof(T) % lanes<T>);
  }

  struct Place {
    int64_t start;  // of the window, in elements
    int64_t before; // elements of the run before the window: negative at its start
    int64_t left;   // elements of the run from the window's start on

    __device__ __forceinline__ bool is_whole() const {
      return before >= 0 && left >= lanes<T>;
    }
    __device__ __forceinline__ bool has(int i) const {
      return before + i >= 0 && i < left;
    }
  };

  __device__ __forceinline__ Place place(int64_t unit) const {
    if (layout.outer == 1) {
      const int64_t before = unit * lanes<T> - skipped;
      return {before, before, layout.inner - before};
    }
    const int64_t run = unit <= 0xFFFFFFFF ? static_cast<uint32_t>(unit) / static_cast<uint32_t>(units_per_run)
                                           : unit / units_per_run; // 32 bits take half the time
    const int64_t begin = run * layout.blocks * layout.inner;
    const int64_t before = (unit - run * units_per_run) * lanes<T> - distance(from + begin);
    return {begin + before, before, layout.inner - before};
  }

  // Elements outside of the block are 0, which widens no range.
  __device__ __forceinline__ uint4 load(int64_t unit) const {
    const auto at = place(unit);
    if (at.is_whole()) {
      return *reinterpret_cast<const uint4*>(from + at.start);
    }
    Unit<T> unit_values{};
#pragma unroll
    for (int i = 0; i < lanes<T>; ++i) {
      if (at.has(i)) {
        unit_values.at[i] = from[at.start + i];
      }
    }
    return bits_as<uint4>(unit_values);
  }

  __device__ __forceinline__ void store(int64_t unit, const Unit<T>& values) const {
    const auto at = place(unit);
    if (aligned_alike && at.is_whole()) {
      return store_whole(to + at.start, values);
    }
#pragma unroll
    for (int i = 0; i < lanes<T>; ++i) {
      if (at.has(i)) {
        to[at.start + i] = values.at[i];
      }
    }
  }
};

// The same for a block that is one run of whole windows (has_whole_units): no unit needs a check.
template <class T>
struct WholeUnits : WidePieces<T> {
  using Index = int;
  const uint4* from;
  T* to;

  __device__ __forceinline__ WholeUnits(const KernelTask& task, int64_t block)
      : from(reinterpret_cast<const uint4*>(static_cast<const T*>(task.from) + block * task.plan.layout.inner)),
        to(static_cast<T*>(task.to) + block * task.plan.layout.inner) {}

  __device__ __forceinline__ uint4 load(int unit) const {
    return from[unit];
  }
  __device__ __forceinline__ void store(int unit, const Unit<T>& values) const {
    store_whole(to + int64_t{unit} * lanes<T>, values);
  }
};

// The elements of one column of a block whose runs are short.
template <class T>
struct ColumnUnits {
  using Index = int64_t;
  using Piece = Unit<T, 1>;
  static constexpr int held = held_elements, ahead = 8, pair = 4;
  const T* from;
  T* to;
  int64_t stride;

  __device__ __forceinline__ Piece load(int64_t row) const {
    return {from[row * stride]};
  }
  __device__ __forceinline__ void store(int64_t row, const Unit<T, 1>& value) const {
    to[row * stride] = value.at[0];
  }
};

// Hides from the compiler that the value of `x` is unchanged.
__device__ __forceinline__ void forget(int64_t& x) {
  asm volatile("" : "+l"(x));
}
__device__ __forceinline__ void forget(int& x) {
  asm volatile("" : "+r"(x));
}

template <class T, bool finite_only = false, class C, class Piece>
__device__ __forceinline__ void widen_by_piece(Range<C>& range, const Piece& piece) {
  const auto unit = bits_as<Unit<T, sizeof(Piece) / sizeof(T)>>(piece);
#pragma unroll
  for (const T element : unit.at) {
    const C x = static_cast<C>(element);
    range.widen_by(finite_only ? finite_or_zero(x) : x);
  }
}

template <class T, class G, class Piece>
__device__ __forceinline__ auto quantized_piece(const Piece& piece, const G& grid) {
  using C = opmath_type<T>;
  constexpr int N = sizeof(Piece) / sizeof(T);
  const auto unit = bits_as<Unit<T, N>>(piece);
  C values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = fake_quantize(static_cast<C>(unit.at[i]), grid);
  }
  return narrowed<T, std::is_same_v<G, UnclampedGrid<C>>>(values);
}

// Calls f(grid) with the grid that quantizes fastest. `finite`: no value of the thread is infinite.
template <class T, class C, class F>
__device__ __forceinline__ void with_fastest(const BlockGrid<C>& block_grid, bool finite, F f) {
  if constexpr (std::is_same_v<C, float>) {
    const auto& grid = block_grid.grid;
    if (finite && block_grid.holds_all && grid.reciprocal != 0 && grid.scale >= least_normal<T>) {
      return f(UnclampedGrid<C>{grid.scale, grid.reciprocal});
    }
  }
  with_fastest(block_grid.grid, f);
}

// The ranges of a tile's blocks, from this CTA and, in a team, from all of its CTAs.
template <class C>
struct Reduction {
  const KernelTask& task;
  RangeKeys<C>* shared;   // [tile_blocks]
  RangeKeys<C>* partials; // [member][tile_blocks] of this team
  int64_t member;

  __device__ __forceinline__ void clear() const {
    __syncthreads(); // all threads have read the ranges of the previous tile
    for (int i = threadIdx.x; i < task.plan.tile_blocks; i += blockDim.x) {
      shared[i] = {};
    }
    __syncthreads();
  }

  __device__ __forceinline__ void publish() const {
    __syncthreads();
    for (int i = threadIdx.x; i < task.plan.tile_blocks; i += blockDim.x) {
      partials[member * task.plan.tile_blocks + i] = shared[i];
    }
  }

  __device__ __forceinline__ void collect() const {
    clear();
    const auto count = task.plan.team * task.plan.tile_blocks;
    RangeKeys<C> mine;
    if (task.plan.tile_blocks == 1) {
      for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        mine.widen_by(partials[i]);
      }
      mine = mine.of_warp();
      if (threadIdx.x % 32 == 0) {
        mine.widen_atomically(&shared[0]);
      }
    } else {
      for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        partials[i].widen_atomically(&shared[i % task.plan.tile_blocks]);
      }
    }
  }
};

// What one of the threads that quantize a block together does. It owns the pieces first, first + width, ... before
// `end`. It keeps the first ones in registers (`all_held`: there are no more) and the next `cached` in shared memory.
// It reads the rest again, last first, so that it starts with what is still in the L2 cache.
template <class T, bool all_held, class Units, class Ready, class Index = typename Units::Index>
__device__ __forceinline__ void quantize_pieces(const KernelTask& task, const Units& units, Index first, Index end,
    int width, Phases phases, void* cache, Ready ready) {
  using C = opmath_type<T>;
  using Piece = typename Units::Piece;
  constexpr int held_pieces = Units::held, ahead = Units::ahead, pair = Units::pair;
  const Index rest = first + held_pieces * width;
  const Index uncached = rest + (phases == both ? static_cast<Index>(task.plan.cached) : 0) * width;
  const int mine = static_cast<int>(end - first < held_pieces * width ? end - first : held_pieces * width);
  Piece held[held_pieces];
#pragma unroll
  for (int k = 0; k < held_pieces; ++k) {
    held[k] = k * width < mine ? units.load(first + k * width) : Piece{};
  }
  Range<C> range;
  bool finite = false;
  if (phases & Phases::range) {
#pragma unroll
    for (int k = 0; k < held_pieces; ++k) {
      if (k * width < mine) { // most threads of short rows hold fewer
        widen_by_piece<T>(range, held[k]);
      }
    }
    Piece* slot = static_cast<Piece*>(cache) + threadIdx.x;
    for (Index at = all_held ? end : rest; at < end; at += ahead * width) {
      Piece loaded[ahead];
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        loaded[k] = at + k * width < end ? units.load(at + k * width) : Piece{};
      }
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        if (at + k * width < end && at + k * width < uncached) {
          slot[0] = loaded[k];
          slot += blockDim.x;
        }
        widen_by_piece<T>(range, loaded[k]);
      }
    }
    finite = range.is_finite();
    if (!finite) { // rare enough to read everything again
      range = {};
      for (Index at = first; at < end; at += width) {
        widen_by_piece<T, true>(range, units.load(at));
      }
    }
  }
  const BlockGrid<C> block_grid = ready(range);
  if (!(phases & Phases::apply) || !task.to) {
    return;
  }
  forget(first); // or the addresses of the held pieces would live in registers from their loads to their stores
  const Index last = all_held || rest > end - 1 ? rest - width : rest + (end - 1 - rest) / width * width;
  with_fastest<T>(block_grid, finite, [&](const auto& grid) {
    for (Index at = last; !all_held && at >= uncached; at -= pair * width) {
      Piece loaded[pair];
#pragma unroll
      for (int k = 0; k < pair; ++k) {
        loaded[k] = at - k * width >= uncached ? units.load(at - k * width) : Piece{};
      }
#pragma unroll
      for (int k = 0; k < pair; ++k) {
        if (at - k * width >= uncached) {
          units.store(at - k * width, quantized_piece<T>(loaded[k], grid));
        }
      }
    }
    const Piece* slot = static_cast<const Piece*>(cache) + threadIdx.x;
    for (Index at = rest; !all_held && at <= last && at < uncached; at += width, slot += blockDim.x) {
      units.store(at, quantized_piece<T>(*slot, grid));
    }
#pragma unroll
    for (int k = 0; k < held_pieces; ++k) {
      if (k * width < mine) {
        units.store(first + k * width, quantized_piece<T>(held[k], grid));
      }
    }
  });
}

// Up to a warp per block: a CTA quantizes several blocks, which share nothing.
template <class T, class Units>
__device__ __forceinline__ void quantize_small_blocks(const KernelTask& task, int64_t cta) {
  using C = opmath_type<T>;
  using Index = typename Units::Index;
  const auto& plan = task.plan;
  const int width = plan.width;
  const int64_t at_a_time = blockDim.x / width;
  const int lane = threadIdx.x % width;
  for (int64_t first = cta * at_a_time; first < plan.tiles; first += plan.grid * at_a_time) {
    const int64_t block = first + threadIdx.x / width;
    const int64_t count = block < plan.tiles ? plan.layout.outer * plan.units_per_run : 0;
    const Units units(task, block);
    const auto ready = [&](const Range<C>& range) {
      const BlockGrid<C> block_grid(range.keys().of_warp(width), task.quant_range);
      if (lane == 0 && block < plan.tiles) {
        block_grid.write(task, block);
      }
      return block_grid;
    };
    quantize_pieces<T, true>(task, units, Index{lane}, static_cast<Index>(count), width, both, nullptr, ready);
  }
}

// One or more CTAs per tile. A team waits for each other in the middle, or the launch ends there.
template <class T, class Units, bool all_held>
__device__ __forceinline__ void quantize_tiles(const KernelTask& task, int64_t cta, Phases launched, bool barrier) {
  using C = opmath_type<T>;
  extern __shared__ uint4 cache[];
  __shared__ RangeKeys<C> shared[max_tile_columns];
  const auto& plan = task.plan;
  const auto& layout = plan.layout;
  const auto* from = static_cast<const T*>(task.from);
  auto* to = static_cast<T*>(task.to);
  const int64_t team = all_held ? 1 : plan.team;
  const Phases phases = all_held ? both : launched;
  const int64_t member = cta % team;
  for (int64_t tile = cta / team; tile < plan.tiles; tile += plan.grid / team) {
    const Reduction<C> reduction{
        task, shared, static_cast<RangeKeys<C>*>(task.partials) + tile * team * plan.tile_blocks, member};
    // Called by every thread. Returns the grid of the tile's block `index`.
    const auto together = [&](RangeKeys<C> keys, int index, bool contributes) -> BlockGrid<C> {
      if (phases & Phases::range) {
        reduction.clear();
        if (contributes) {
          keys.widen_atomically(&shared[index]);
        }
        if (team > 1) {
          reduction.publish();
        }
      }
      if (team > 1) {
        if (barrier) {
          cooperative_groups::this_grid().sync();
        }
        if (phases & Phases::apply) {
          reduction.collect();
        }
      }
      __syncthreads();
      const BlockGrid<C> block_grid(shared[index], task.quant_range);
      const int64_t first = tile * plan.tile_blocks;
      if ((phases & Phases::apply) && task.scale && member == 0) {
        for (int64_t i = threadIdx.x; i < plan.tile_blocks && first + i < layout.blocks; i += blockDim.x) {
          BlockGrid<C>(shared[i], task.quant_range).write(task, first + i);
        }
      }
      return block_grid;
    };
    if (!all_held && !std::is_same_v<Units, WholeUnits<T>> && plan.columns) {
      const int64_t tile_columns = plan.tile_blocks * layout.inner;
      const int step = static_cast<int>(few_threads / tile_columns * (blockDim.x / few_threads));
      const int64_t column = threadIdx.x % tile_columns;
      const int64_t place = tile * tile_columns + column;
      const int64_t row = layout.outer * member / team + threadIdx.x / tile_columns;
      const bool works = threadIdx.x / tile_columns < step && place < layout.blocks * layout.inner;
      const int64_t end = works ? layout.outer * (member + 1) / team : row;
      const ColumnUnits<T> units{from + place, to + place, layout.blocks * layout.inner};
      quantize_pieces<T, false>(task, units, row, end, step, phases, cache, [&](const Range<C>& range) {
        return together(range.keys(), static_cast<int>(column / layout.inner), works);
      });
    } else {
      using Index = typename Units::Index;
      const Units units(task, tile);
      const int64_t count = layout.outer * plan.units_per_run;
      const auto start_of = [&](int64_t member) { // shares are whole warps: no two CTAs share a memory sector
        return member == team ? count : count / 32 * member / team * 32;
      };
      const auto begin = static_cast<Index>(start_of(member)), end = static_cast<Index>(start_of(member + 1));
      const auto ready = [&](const Range<C>& range) {
        return together(range.keys().of_warp(), 0, threadIdx.x % 32 == 0);
      };
      quantize_pieces<T, all_held>(
          task, units, static_cast<Index>(begin + threadIdx.x), end, plan.width, phases, cache, ready);
    }
  }
}

// `all_held`: registers hold everything, and no team waits. The code for the rest would take registers too, and with
// half as many, twice as many threads read at a time.
template <class T, class Units, bool all_held>
__global__ void __launch_bounds__(max_threads, all_held ? 2 : 1)
    fake_quantize_kernel(const __grid_constant__ KernelLaunch launch) {
  const bool is_second = blockIdx.x >= launch.second;
  const KernelTask& task = launch.tasks[is_second];
  const int64_t cta = blockIdx.x - (is_second ? launch.second : 0);
  if (task.plan.width <= 32) {
    quantize_small_blocks<T, Units>(task, cta);
  } else {
    const auto phases = task.plan.team > 1 ? launch.phases : both;
    quantize_tiles<T, Units, all_held>(task, cta, phases, launch.barrier);
  }
  if (!all_held && launch.barrier && task.plan.team == 1) {
    cooperative_groups::this_grid().sync(); // the other tensor's team waits for all CTAs
  }
}

} // namespace qatfast::cuda
