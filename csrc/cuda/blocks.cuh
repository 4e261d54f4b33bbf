// The fused kernel: every block of a tensor quantized by its own range, in one launch.
#pragma once

#include "../kernels.h"
#include "plan.h"
#include "units.cuh"

#include <cooperative_groups.h>

namespace qatfast::cuda {

// A QuantSpec as kernels take it.
struct RangeSpec {
  int32_t quant_min;
  int32_t quant_max;
  bool symmetric;
};

inline RangeSpec range_spec(const QuantSpec& spec) {
  return {static_cast<int32_t>(spec.quant_min()), static_cast<int32_t>(spec.quant_max()), spec.symmetric};
}

// One tensor of a launch.
struct BlockTask {
  Plan plan;
  const void* from;
  void* to;    // null: only scale and zero_point are wanted
  void* scale; // null: not wanted
  int32_t* zero_point;
  void* partials; // of a team: [thread block][block of the tile][lo, hi]
  RangeSpec spec;
  bool aligned_alike; // from and to are at the same distance from a 16-byte boundary
};

enum Phases { range = 1, apply = 2, both = 3 };

struct BlockLaunch {
  BlockTask tasks[2];
  int64_t second; // the first thread block of tasks[1]
  Phases phases;
  bool barrier;
};

// An end of a range (lo or hi) as its distance from 0, whose bits are ordered as integers: the larger is the wider, 0
// is none. So atomics and warp reductions find it, and their order does not matter.
template <class C>
using Key = std::conditional_t<sizeof(C) == 8, unsigned long long, unsigned int>;

template <class C>
struct RangeKeys {
  Key<C> below = 0; // of -lo
  Key<C> above = 0; // of hi

  __device__ __forceinline__ void widen_by(const RangeKeys& other) {
    below = below > other.below ? below : other.below;
    above = above > other.above ? above : other.above;
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

  // NaN changes nothing.
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
struct QParam {
  ReciprocalGrid<C> grid;
  int32_t zero_point;
  bool holds_all; // finite values of the block

  __device__ __forceinline__ QParam(const RangeKeys<C>& keys, const RangeSpec& spec) {
    const C lo = C(0) - bits_as<C>(keys.below);
    const C hi = bits_as<C>(keys.above);
    const C quant_min = spec.quant_min, quant_max = spec.quant_max;
    const C scale = is_full_range(spec.quant_min, spec.quant_max, spec.symmetric)
        ? choose_full_range_scale(lo, hi, quant_min, quant_max)
        : choose_scale(lo, hi, steps_of(quant_min, quant_max, spec.symmetric), spec.symmetric);
    const C low_step = round_half_even(lo / scale);
    const C zero = choose_zero_point(low_step, quant_min, quant_max, spec.symmetric);
    zero_point = static_cast<int32_t>(zero);
    grid = with_reciprocal<C>({scale, quant_min - zero, quant_max - zero});
    holds_all = holds(low_step, round_half_even(hi / scale), zero, quant_min, quant_max);
  }

  __device__ __forceinline__ void write(const BlockTask& task, int64_t block) const {
    if (task.scale) {
      static_cast<C*>(task.scale)[block] = grid.scale;
      task.zero_point[block] = zero_point;
    }
  }
};

// What a thread loads and stores at a time where runs are long.
template <class T>
struct WidePieces {
  using Piece = uint4;
  static constexpr int held = held_units(sizeof(T)); // that a thread keeps in registers
  static constexpr int ahead = 4;                    // loads on their way at a time, beside those of other threads
  static constexpr int pair = 2;                     // the same while the held ones take registers and stores follow
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
  int skipped; // elements of the first window of the first run that are not ours

  __device__ __forceinline__ BlockUnits(const BlockTask& task, int64_t block)
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

  // Elements from the 16-byte boundary before it.
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
                                           : unit / units_per_run; // half the time where 32 bits hold it
    const int64_t begin = run * layout.blocks * layout.inner;
    const int64_t before = (unit - run * units_per_run) * lanes<T> - distance(from + begin);
    return {begin + before, before, layout.inner - before};
  }

  // What is not ours is 0, which widens no range.
  __device__ __forceinline__ uint4 load(int64_t unit) const {
    const auto at = place(unit);
    if (at.is_whole()) {
      return *reinterpret_cast<const uint4*>(from + at.start);
    }
    Unit<T> some{};
#pragma unroll
    for (int i = 0; i < lanes<T>; ++i) {
      if (at.has(i)) {
        some.at[i] = from[at.start + i];
      }
    }
    return bits_as<uint4>(some);
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

// The same where the block is one run of whole windows (see `has_whole_units`): no unit has to be looked at.
template <class T>
struct WholeUnits : WidePieces<T> {
  using Index = int;
  const uint4* from;
  T* to;

  __device__ __forceinline__ WholeUnits(const BlockTask& task, int64_t block)
      : from(reinterpret_cast<const uint4*>(static_cast<const T*>(task.from) + block * task.plan.layout.inner)),
        to(static_cast<T*>(task.to) + block * task.plan.layout.inner) {}

  __device__ __forceinline__ uint4 load(int unit) const {
    return from[unit];
  }
  __device__ __forceinline__ void store(int unit, const Unit<T>& values) const {
    store_whole(to + int64_t{unit} * lanes<T>, values);
  }
};

// The elements of one column: of a block whose runs are short.
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

// The compiler no longer knows that `x` is what it was.
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
  for (const T each : unit.at) {
    const C x = static_cast<C>(each);
    range.widen_by(finite_only ? finite_or_zero(x) : x);
  }
}

template <class T, class G, class Piece>
__device__ __forceinline__ auto quantized_piece(const Piece& piece, const G& grid) {
  using C = compute_t<T>;
  constexpr int N = sizeof(Piece) / sizeof(T);
  const auto unit = bits_as<Unit<T, N>>(piece);
  C values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = fake_quantize(static_cast<C>(unit.at[i]), grid);
  }
  return narrowed<T, std::is_same_v<G, UnclampedGrid<C>>>(values);
}

// f(grid) with the grid that quantizes fastest; `finite`: all values of the thread are, or NaN.
template <class T, class C, class F>
__device__ __forceinline__ void with_fastest(const QParam<C>& qparam, bool finite, F f) {
  if constexpr (std::is_same_v<C, float>) {
    constexpr C least_normal = std::is_same_v<T, c10::Half> ? 0x1p-14f : 0; // the others' have no reciprocal
    const auto& grid = qparam.grid;
    if (finite && qparam.holds_all && grid.reciprocal != 0 && grid.scale >= least_normal) {
      return f(UnclampedGrid<C>{grid.scale, grid.reciprocal});
    }
  }
  with_fastest(qparam.grid, f);
}

// The range of one tile's block `index`, from this thread block and, in a team, from all of it.
template <class C>
struct Reduction {
  const BlockTask& task;
  RangeKeys<C>* shared;   // [tile_blocks]
  RangeKeys<C>* partials; // [member][tile_blocks] of this team
  int64_t member;

  __device__ __forceinline__ void clear() const {
    __syncthreads(); // the tile before is done with
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
      mine = {warp_max(mine.below, 32), warp_max(mine.above, 32)};
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

// Threads quantize a block together: one owns the pieces first, first + width, ... before `end`. It keeps the first
// ones in registers (`all_held`: there are no more) and the next `cached` in shared memory, and reads the rest again,
// last first, so that it starts with what is still in the L2 cache.
template <class T, bool all_held, class Units, class Ready, class Index = typename Units::Index>
__device__ __forceinline__ void quantize_pieces(const BlockTask& task, const Units& units, Index first, Index end,
    int width, Phases phases, void* cache, Ready ready) {
  using C = compute_t<T>;
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
      if (k * width < mine) { // as rows are short, most threads hold fewer
        widen_by_piece<T>(range, held[k]);
      }
    }
    Piece* slot = static_cast<Piece*>(cache) + threadIdx.x;
    for (Index at = all_held ? end : rest; at < end; at += ahead * width) {
      Piece some[ahead];
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        some[k] = at + k * width < end ? units.load(at + k * width) : Piece{};
      }
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        if (at + k * width < end && at + k * width < uncached) {
          slot[0] = some[k];
          slot += blockDim.x;
        }
        widen_by_piece<T>(range, some[k]);
      }
    }
    finite = range.is_finite();
    if (!finite) { // rare enough to read it all again
      range = {};
      for (Index at = first; at < end; at += width) {
        widen_by_piece<T, true>(range, units.load(at));
      }
    }
  }
  const QParam<C> qparam = ready(range);
  if (!(phases & Phases::apply) || !task.to) {
    return;
  }
  forget(first); // or the addresses of the held pieces would live in registers from their loads to their stores
  const Index last = all_held || rest > end - 1 ? rest - width : rest + (end - 1 - rest) / width * width;
  with_fastest<T>(qparam, finite, [&](const auto& grid) {
    for (Index at = last; !all_held && at >= uncached; at -= pair * width) {
      Piece some[pair];
#pragma unroll
      for (int k = 0; k < pair; ++k) {
        some[k] = at - k * width >= uncached ? units.load(at - k * width) : Piece{};
      }
#pragma unroll
      for (int k = 0; k < pair; ++k) {
        if (at - k * width >= uncached) {
          units.store(at - k * width, quantized_piece<T>(some[k], grid));
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

// Few threads a block: up to a warp each, several blocks of the tensor in a thread block, nothing shared.
template <class T, class Units>
__device__ __forceinline__ void quantize_small_blocks(const BlockTask& task, int64_t thread_block) {
  using C = compute_t<T>;
  using Index = typename Units::Index;
  const auto& plan = task.plan;
  const int width = plan.width;
  const int64_t at_a_time = blockDim.x / width;
  const int lane = threadIdx.x % width;
  for (int64_t first = thread_block * at_a_time; first < plan.tiles; first += plan.grid * at_a_time) {
    const int64_t block = first + threadIdx.x / width;
    const int64_t count = block < plan.tiles ? plan.layout.outer * plan.units_per_run : 0;
    const Units units(task, block);
    const auto ready = [&](const Range<C>& range) {
      const auto keys = range.keys();
      const QParam<C> qparam({warp_max(keys.below, width), warp_max(keys.above, width)}, task.spec);
      if (lane == 0 && block < plan.tiles) {
        qparam.write(task, block);
      }
      return qparam;
    };
    quantize_pieces<T, true>(task, units, Index{lane}, static_cast<Index>(count), width, both, nullptr, ready);
  }
}

// Whole thread blocks a tile, alone or as a team that waits for each other in the middle (or ends there).
template <class T, class Units, bool all_held>
__device__ __forceinline__ void quantize_tiles(
    const BlockTask& task, int64_t thread_block, Phases launched, bool barrier) {
  using C = compute_t<T>;
  extern __shared__ uint4 cache[];
  __shared__ RangeKeys<C> shared[max_tile_columns];
  const auto& plan = task.plan;
  const auto& layout = plan.layout;
  const auto* from = static_cast<const T*>(task.from);
  auto* to = static_cast<T*>(task.to);
  const int64_t team = all_held ? 1 : plan.team;
  const Phases phases = all_held ? both : launched;
  const int64_t member = thread_block % team;
  for (int64_t tile = thread_block / team; tile < plan.tiles; tile += plan.grid / team) {
    const Reduction<C> reduction{
        task, shared, static_cast<RangeKeys<C>*>(task.partials) + tile * team * plan.tile_blocks, member};
    // every thread comes here, and gets the grid of the tile's block `index`
    const auto together = [&](RangeKeys<C> keys, int index, bool contributes) -> QParam<C> {
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
      const QParam<C> qparam(shared[index], task.spec);
      const int64_t first = tile * plan.tile_blocks;
      if ((phases & Phases::apply) && task.scale && member == 0) {
        for (int64_t i = threadIdx.x; i < plan.tile_blocks && first + i < layout.blocks; i += blockDim.x) {
          QParam<C>(shared[i], task.spec).write(task, first + i);
        }
      }
      return qparam;
    };
    if (!all_held && !std::is_same_v<Units, WholeUnits<T>> && plan.columns) {
      const int64_t tile_columns = plan.tile_blocks * layout.inner;
      const int step = static_cast<int>(few_threads / tile_columns * (blockDim.x / few_threads));
      const int64_t column = threadIdx.x % tile_columns;
      const int64_t place = tile * tile_columns + column;
      const int64_t row = layout.outer * member / team + threadIdx.x / tile_columns;
      const bool works = threadIdx.x / tile_columns < step && place < layout.blocks * layout.inner;
      const int64_t end = works ? layout.outer * (member + 1) / team : 0;
      const ColumnUnits<T> units{from + place, to + place, layout.blocks * layout.inner};
      quantize_pieces<T, false>(task, units, row, end, step, phases, cache, [&](const Range<C>& range) {
        return together(range.keys(), static_cast<int>(column / layout.inner), works);
      });
    } else {
      using Index = typename Units::Index;
      const Units units(task, tile);
      const int64_t count = layout.outer * plan.units_per_run;
      const auto start_of = [&](int64_t member) { // whole warps, so that no two thread blocks share a memory sector
        return member == team ? count : count / 32 * member / team * 32;
      };
      const auto begin = static_cast<Index>(start_of(member)), end = static_cast<Index>(start_of(member + 1));
      const auto ready = [&](const Range<C>& range) {
        const auto keys = range.keys();
        return together({warp_max(keys.below, 32), warp_max(keys.above, 32)}, 0, threadIdx.x % 32 == 0);
      };
      quantize_pieces<T, all_held>(
          task, units, static_cast<Index>(begin + threadIdx.x), end, plan.width, phases, cache, ready);
    }
  }
}

// One launch for one or two tensors. What a thread, a warp and a thread block own is the plan's choice (plan.h): a
// small block belongs to part of a warp, a larger one to a thread block, a large one to a team of them, which meet at
// one grid barrier between its range and its quantization. Bound by memory: each element is read once where the block
// fits into the registers and shared memory of those who own it, else twice, and written once.
//
// `all_held`: registers hold everything, and no team waits; the code for the rest would take registers too, and with
// half as many twice as many threads read at a time.
template <class T, class Units, bool all_held>
__global__ void __launch_bounds__(max_threads, all_held ? 2 : 1)
    fake_quantize_kernel(const __grid_constant__ BlockLaunch launch) {
  const bool is_second = blockIdx.x >= launch.second;
  const BlockTask& task = launch.tasks[is_second];
  const int64_t thread_block = blockIdx.x - (is_second ? launch.second : 0);
  if (task.plan.width <= 32) {
    quantize_small_blocks<T, Units>(task, thread_block);
  } else {
    const auto phases = task.plan.team > 1 ? launch.phases : both;
    quantize_tiles<T, Units, all_held>(task, thread_block, phases, launch.barrier);
  }
  if (!all_held && launch.barrier && task.plan.team == 1) {
    cooperative_groups::this_grid().sync(); // the other tensor's team waits for everyone
  }
}

} // namespace qatfast::cuda
