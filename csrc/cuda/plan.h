// How the blocks of a tensor are divided among the threads of a device. This is host arithmetic, for any size and
// device. A block is a quantization block; a CTA is CUDA's thread block.
#pragma once

#include "common/layout.h"

#include <array>
#include <cstdint>

namespace qatfast::cuda {

// The most threads that the kernel for dynamic ranges is compiled for, which leaves 128 registers per thread.
constexpr int max_threads = 512;
constexpr int few_threads = 128;
// What a thread keeps of its block in registers between finding the range and quantizing: units of 16 bytes (fewer of
// doubles, whose division needs registers), or elements of a column.
constexpr int held_units(int64_t item_size) {
  return item_size == 8 ? 4 : 6;
}
constexpr int held_elements = 12;
// The most channels whose ranges a CTA reduces at a time.
constexpr int max_tile_columns = 128;

struct DeviceLimits {
  int64_t multiprocessors;
  int64_t shared_memory; // bytes per CTA, less what the kernel itself needs
  int64_t resident;      // CTAs of max_threads and all shared memory that are resident together
  bool cooperative;      // whether resident CTAs may wait for each other
};

// A tile is reduced and quantized together. It is one block, or (columns) neighbouring blocks whose elements alternate
// in memory. Either `width` threads of a CTA work on one tile, or a team of whole CTAs.
struct Plan {
  Layout layout;
  bool columns = false;
  int threads = few_threads;
  int width = few_threads; // a power of 2 up to 32, or `threads`
  int64_t tiles = 0;
  int64_t team = 1;          // CTAs that share a tile
  int64_t tile_blocks = 1;   // blocks of the tensor in a tile
  int64_t units_per_run = 0; // 16-byte windows that a run of `inner` elements can touch
  int64_t grid = 0;          // CTAs
  int64_t cached = 0;        // units (columns: elements) that a thread keeps in shared memory
  int64_t shared_bytes = 0;
  bool all_held = false; // whether registers keep a thread's whole share, and no CTA waits for another
  bool barrier = false;  // whether the team waits for each other in one launch; else there are two launches

  int64_t launches() const {
    return grid == 0 ? 0 : team > 1 && !barrier ? 2 : 1;
  }
  // The numbers in the workspace: two ends of a range for every CTA and every block in its tile.
  int64_t partials() const {
    return team > 1 ? grid * tile_blocks * 2 : 0;
  }
};

// A tensor as a plan sees it.
struct Shape {
  Layout layout;
  int64_t item_size; // bytes per element
  int64_t skipped;   // elements between the 16-byte boundary before the first element and that element
};

// `quantizes`: false if only the ranges are needed, so that nothing is kept.
Plan plan_of(const Shape& shape, bool quantizes, const DeviceLimits& device);

// Plans two tensors in one launch, the larger first. The second receives a few CTAs of the same shape.
std::array<Plan, 2> plan_of_two(const std::array<Shape, 2>& shapes, const DeviceLimits& device);

} // namespace qatfast::cuda
