// How the blocks of a tensor are divided among the threads of a device: host arithmetic only, for any size and device.
#pragma once

#include "../layout.h"

#include <array>
#include <cstdint>

namespace qatfast::cuda {

// The fused kernel is compiled for this many threads at the most, and so for 128 registers a thread.
constexpr int max_threads = 512;
constexpr int few_threads = 128;
// What a thread keeps of its block in registers between finding the range and quantizing.
constexpr int held_units(int64_t item_size) { // of 16 bytes; a division of doubles needs registers itself
  return item_size == 8 ? 4 : 6;
}
constexpr int held_elements = 12; // of a column
// Channels whose ranges a thread block reduces at a time.
constexpr int max_tile_columns = 128;

struct DeviceLimits {
  int64_t multiprocessors;
  int64_t shared_memory; // bytes that one thread block may have, less what the kernel needs itself
  int64_t resident;      // thread blocks of max_threads and all shared memory that are resident together
  bool cooperative;      // whether they may wait for each other
};

// A tile is what is reduced and quantized together: one block, or (columns) neighbouring blocks whose elements
// alternate in memory. `width` threads of a thread block work on one tile, or a team of whole thread blocks does.
struct Plan {
  Layout layout;
  bool columns = false;
  int threads = few_threads;
  int width = few_threads; // a power of 2 up to 32, or `threads`
  int64_t tiles = 0;
  int64_t team = 1;          // thread blocks that share a tile
  int64_t tile_blocks = 1;   // blocks of the tensor in a tile
  int64_t units_per_run = 0; // 16-byte windows that a run of `inner` elements can touch
  int64_t grid = 0;          // thread blocks
  int64_t cached = 0;        // units (columns: elements) that a thread keeps in shared memory
  int64_t shared_bytes = 0;
  bool all_held = false; // registers keep a thread's whole share, and nobody waits for another thread block
  bool barrier = false;  // the team waits for each other in one launch; else there are two launches

  int64_t launches() const {
    return grid == 0 ? 0 : team > 1 && !barrier ? 2 : 1;
  }
  // Numbers of workspace: two ends of a range for every thread block and block of the tensor in its tile.
  int64_t partials() const {
    return team > 1 ? grid * tile_blocks * 2 : 0;
  }
};

// A tensor as a plan sees it.
struct Shape {
  Layout layout;
  int64_t item_size; // bytes an element
  int64_t skipped;   // elements from the 16-byte boundary before its first one
};

// `quantizes`: false where only the ranges are wanted, so that nothing is kept.
Plan plan_of(const Shape& shape, bool quantizes, const DeviceLimits& device);

// Two tensors in one launch, the larger first: the second gets a few thread blocks of the same shape beside the
// first's.
std::array<Plan, 2> plan_of_two(const std::array<Shape, 2>& shapes, const DeviceLimits& device);

} // namespace qatfast::cuda
