// The fused kernel: every block of a tensor quantized by its own range, in one launch.
#pragma once

#include "plan.h"
#include "units.cuh"

#include <cooperative_groups.h>

namespace qatfast::cuda {

// One tensor of a launch.
struct BlockTask {
  Plan plan;
  const void* from;
  void* to;    // null: only scale and zero_point are wanted
  void* scale; // null: not wanted
  int32_t* zero_point;
  void* partials; // of a team: [thread block][block of the tile][lo, hi]
  int32_t quant_min;
  int32_t quant_max;
  bool symmetric;
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

  __device__ __forceinline__ void widen_by(C x) {
    x = finite_or_zero(x);
    lo = widen_lo(lo, x);
    hi = widen_hi(hi, x);
  }
  __device__ __forceinline__ RangeKeys<C> keys() const {
    return {bits_as<Key<C>>(C(0) - lo), bits_as<Key<C>>(hi)};
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

  __device__ __forceinline__ QParam(const RangeKeys<C>& keys, const BlockTask& task) {
    const C lo = C(0) - bits_as<C>(keys.below);
    const C hi = bits_as<C>(keys.above);
    const C quant_min = task.quant_min, quant_max = task.quant_max;
    const C scale = choose_scale(lo, hi, steps_of(quant_min, quant_max, task.symmetric), task.symmetric);
    const C low_step = round_half_even(lo / scale);
    zero_point = static_cast<int32_t>(choose_zero_point(low_step, quant_min, quant_max, task.symmetric));
    grid = with_reciprocal<C>(
        {scale, static_cast<C>(task.quant_min - zero_point), static_cast<C>(task.quant_max - zero_point)});
  }

  __device__ __forceinline__ void write(const BlockTask& task, int64_t block) const {
    if (task.scale) {
      static_cast<C*>(task.scale)[block] = grid.scale;
      task.zero_point[block] = zero_point;
    }
  }
};

// The 16-byte windows that the runs of one block touch: the first and the last of a run may lie partly outside of it.
template <class T>
struct BlockUnits {
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

// The compiler no longer knows that `x` is what it was.
__device__ __forceinline__ void forget(int64_t& x) {
  asm volatile("" : "+l"(x));
}

template <class T, class C>
__device__ __forceinline__ void widen_by_unit(Range<C>& range, uint4 bits) {
  const auto unit = bits_as<Unit<T>>(bits);
#pragma unroll
  for (int i = 0; i < lanes<T>; ++i) {
    range.widen_by(static_cast<C>(unit.at[i]));
  }
}

template <class T, class C>
__device__ __forceinline__ Unit<T> quantized_unit(uint4 bits, const ReciprocalGrid<C>& either) {
  const auto unit = bits_as<Unit<T>>(bits);
  C values[lanes<T>];
  with_fastest(either, [&](const auto& grid) {
#pragma unroll
    for (int i = 0; i < lanes<T>; ++i) {
      values[i] = fake_quantize(static_cast<C>(unit.at[i]), grid);
    }
  });
  return narrowed<T>(values);
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

// `width` threads quantize a block whose runs are long. A thread owns the units lane, lane + width, ...; it keeps the
// first held_units of them in registers and the next `cached` in shared memory, and reads the rest again, last first,
// so that it starts with what is still in the L2 cache.
template <class T, class Ready>
__device__ __forceinline__ void quantize_units(const BlockTask& task, const BlockUnits<T>& units, int64_t begin,
    int64_t end, int lane, Phases phases, uint4* cache, Ready ready) {
  using C = compute_t<T>;
  constexpr int held_units = cuda::held_units(sizeof(T));
  constexpr int batch = 4; // loads on their way at a time, beside those of the other threads
  constexpr int pair = 2;  // the same while the held units take registers and stores follow
  const int width = task.plan.width;
  int64_t first = begin + lane;
  const int64_t rest = first + int64_t{held_units} * width;
  const int64_t uncached = rest + (phases == both ? task.plan.cached : 0) * width;
  const int mine = static_cast<int>(end - first < held_units * width ? end - first : held_units * width);
  uint4 held[held_units];
#pragma unroll
  for (int k = 0; k < held_units; ++k) {
    held[k] = k * width < mine ? units.load(first + k * width) : uint4{};
  }
  Range<C> range;
  if (phases & Phases::range) {
#pragma unroll
    for (int k = 0; k < held_units; ++k) {
      if (k * width < mine) { // as rows are short, most threads hold fewer
        widen_by_unit<T>(range, held[k]);
      }
    }
    uint4* slot = cache + threadIdx.x;
    for (int64_t unit = rest; unit < end; unit += batch * width) {
      uint4 some[batch];
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        some[k] = unit + k * width < end ? units.load(unit + k * width) : uint4{};
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        if (unit + k * width < end && unit + k * width < uncached) {
          slot[0] = some[k];
          slot += blockDim.x;
        }
        widen_by_unit<T>(range, some[k]);
      }
    }
  }
  const ReciprocalGrid<C> grid = ready(range);
  if (!(phases & Phases::apply) || !task.to) {
    return;
  }
  forget(first); // or the addresses of the held units would live in registers from their loads to their stores
  const int64_t last = rest > end - 1 ? rest - width : rest + (end - 1 - rest) / width * width;
  for (int64_t unit = last; unit >= uncached; unit -= pair * width) {
    uint4 some[pair];
#pragma unroll
    for (int k = 0; k < pair; ++k) {
      some[k] = unit - k * width >= uncached ? units.load(unit - k * width) : uint4{};
    }
#pragma unroll
    for (int k = 0; k < pair; ++k) {
      if (unit - k * width >= uncached) {
        units.store(unit - k * width, quantized_unit<T>(some[k], grid));
      }
    }
  }
  const uint4* slot = cache + threadIdx.x;
  for (int64_t unit = rest; unit <= last && unit < uncached; unit += width, slot += blockDim.x) {
    units.store(unit, quantized_unit<T>(*slot, grid));
  }
#pragma unroll
  for (int k = 0; k < held_units; ++k) {
    if (k * width < mine) {
      units.store(first + k * width, quantized_unit<T>(held[k], grid));
    }
  }
}

// A thread block quantizes neighbouring blocks whose elements alternate in memory. A thread owns every `step`th element
// of one column; it keeps the first held_elements in registers, the next `cached` in shared memory.
template <class T, class Ready>
__device__ __forceinline__ void quantize_column(const BlockTask& task, const T* from, T* to, int64_t row, int64_t end,
    int64_t step, Phases phases, T* cache, Ready ready) {
  using C = compute_t<T>;
  const int64_t stride = task.plan.layout.blocks * task.plan.layout.inner;
  const int64_t rest = row + held_elements * step;
  const int64_t uncached = rest + (phases == both ? task.plan.cached : 0) * step;
  T held[held_elements];
#pragma unroll
  for (int k = 0; k < held_elements; ++k) {
    const int64_t at = row + k * step;
    held[k] = at < end ? from[at * stride] : T{};
  }
  Range<C> range;
  if (phases & Phases::range) {
#pragma unroll
    for (int k = 0; k < held_elements; ++k) {
      if (row + k * step < end) {
        range.widen_by(static_cast<C>(held[k]));
      }
    }
    T* slot = cache + threadIdx.x;
    for (int64_t at = rest; at < end; at += step) {
      const T x = from[at * stride];
      if (at < uncached) {
        slot[0] = x;
        slot += blockDim.x;
      }
      range.widen_by(static_cast<C>(x));
    }
  }
  const ReciprocalGrid<C> either = ready(range);
  if (!(phases & Phases::apply) || !task.to) {
    return;
  }
  const auto store = [&](int64_t at, T x) {
    C value[1];
    with_fastest(either, [&](const auto& grid) {
      value[0] = fake_quantize(static_cast<C>(x), grid);
    });
    to[at * stride] = narrowed<T>(value).at[0];
  };
  forget(row);
  const int64_t left = end - 1 - rest;
  int64_t at = left < 0 ? -1 : rest + left / step * step;
  for (; at >= uncached; at -= step) {
    store(at, from[at * stride]);
  }
  if (left >= 0) {
    const T* slot = cache + threadIdx.x + (at - rest) / step * blockDim.x;
    for (; at >= rest; at -= step, slot -= blockDim.x) {
      store(at, *slot);
    }
  }
#pragma unroll
  for (int k = 0; k < held_elements; ++k) {
    if (row + k * step < end) {
      store(row + k * step, held[k]);
    }
  }
}

// Few threads a block: up to a warp each, several blocks of the tensor in a thread block, nothing shared.
template <class T>
__device__ __forceinline__ void quantize_small_blocks(const BlockTask& task, int64_t thread_block) {
  using C = compute_t<T>;
  const auto& plan = task.plan;
  const int width = plan.width;
  const int64_t at_a_time = blockDim.x / width;
  const int lane = threadIdx.x % width;
  for (int64_t first = thread_block * at_a_time; first < plan.tiles; first += plan.grid * at_a_time) {
    const int64_t block = first + threadIdx.x / width;
    const int64_t count = block < plan.tiles ? plan.layout.outer * plan.units_per_run : 0;
    const BlockUnits<T> units(task, block);
    quantize_units<T>(task, units, 0, count, lane, both, nullptr, [&](const Range<C>& range) {
      const auto keys = range.keys();
      const QParam<C> qparam({warp_max(keys.below, width), warp_max(keys.above, width)}, task);
      if (lane == 0 && block < plan.tiles) {
        qparam.write(task, block);
      }
      return qparam.grid;
    });
  }
}

// Whole thread blocks a tile, alone or as a team that waits for each other in the middle (or ends there).
template <class T>
__device__ __forceinline__ void quantize_tiles(
    const BlockTask& task, int64_t thread_block, Phases phases, bool barrier) {
  using C = compute_t<T>;
  extern __shared__ uint4 cache[];
  __shared__ RangeKeys<C> shared[max_tile_columns];
  const auto& plan = task.plan;
  const auto& layout = plan.layout;
  const auto* from = static_cast<const T*>(task.from);
  auto* to = static_cast<T*>(task.to);
  const int64_t member = thread_block % plan.team;
  for (int64_t tile = thread_block / plan.team; tile < plan.tiles; tile += plan.grid / plan.team) {
    const Reduction<C> reduction{
        task, shared, static_cast<RangeKeys<C>*>(task.partials) + tile * plan.team * plan.tile_blocks, member};
    // every thread comes here, and gets the grid of the tile's block `index`
    const auto together = [&](RangeKeys<C> keys, int index, bool contributes) -> ReciprocalGrid<C> {
      if (phases & Phases::range) {
        reduction.clear();
        if (contributes) {
          keys.widen_atomically(&shared[index]);
        }
        if (plan.team > 1) {
          reduction.publish();
        }
      }
      if (plan.team > 1) {
        if (barrier) {
          cooperative_groups::this_grid().sync();
        }
        if (phases & Phases::apply) {
          reduction.collect();
        }
      }
      __syncthreads();
      const QParam<C> qparam(shared[index], task);
      const int64_t first = tile * plan.tile_blocks;
      if ((phases & Phases::apply) && task.scale && member == 0) {
        for (int64_t i = threadIdx.x; i < plan.tile_blocks && first + i < layout.blocks; i += blockDim.x) {
          QParam<C>(shared[i], task).write(task, first + i);
        }
      }
      return qparam.grid;
    };
    if (plan.columns) {
      const int64_t tile_columns = plan.tile_blocks * layout.inner;
      const int64_t step = few_threads / tile_columns * (blockDim.x / few_threads);
      const int64_t column = threadIdx.x % tile_columns;
      const int64_t place = tile * tile_columns + column;
      const int64_t row = layout.outer * member / plan.team + threadIdx.x / tile_columns;
      const bool works = threadIdx.x / tile_columns < step && place < layout.blocks * layout.inner;
      const int64_t end = works ? layout.outer * (member + 1) / plan.team : 0;
      quantize_column<T>(task, from + place, to + place, row, end, step, phases, reinterpret_cast<T*>(cache),
          [&](const Range<C>& range) {
            return together(range.keys(), static_cast<int>(column / layout.inner), works);
          });
    } else {
      const BlockUnits<T> units(task, tile);
      const int64_t count = layout.outer * plan.units_per_run;
      const auto start_of = [&](int64_t member) { // whole warps, so that no two thread blocks share a memory sector
        return member == plan.team ? count : count / 32 * member / plan.team * 32;
      };
      quantize_units<T>(
          task, units, start_of(member), start_of(member + 1), threadIdx.x, phases, cache, [&](const Range<C>& range) {
            const auto keys = range.keys();
            return together({warp_max(keys.below, 32), warp_max(keys.above, 32)}, 0, threadIdx.x % 32 == 0);
          });
    }
  }
}

// One launch for one or two tensors. What a thread, a warp and a thread block own is the plan's choice (plan.h): a
// small block belongs to part of a warp, a larger one to a thread block, a large one to a team of them, which meet at
// one grid barrier between its range and its quantization. Bound by memory: each element is read once where the block
// fits into the registers and shared memory of those who own it, else twice, and written once.
template <class T>
__global__ void __launch_bounds__(max_threads) fake_quantize_kernel(const __grid_constant__ BlockLaunch launch) {
  const bool is_second = blockIdx.x >= launch.second;
  const BlockTask& task = launch.tasks[is_second];
  const int64_t thread_block = blockIdx.x - (is_second ? launch.second : 0);
  if (task.plan.width <= 32) {
    quantize_small_blocks<T>(task, thread_block);
  } else {
    quantize_tiles<T>(task, thread_block, task.plan.team > 1 ? launch.phases : both, launch.barrier);
  }
  if (launch.barrier && task.plan.team == 1) {
    cooperative_groups::this_grid().sync(); // the other tensor's team waits for everyone
  }
}

} // namespace qatfast::cuda
