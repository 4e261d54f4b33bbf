#include "cuda/plan.h"

#include <ATen/ceil_div.h>

#include <algorithm>

namespace qatfast::cuda {
namespace {

constexpr int64_t unit_size = 16; // bytes of the widest access
constexpr int64_t warp = 32;
constexpr int64_t memory_line = 128; // bytes that a warp should read at a time
constexpr int64_t waves = 16;        // CTAs of few_threads per multiprocessor that keep it busy

int64_t power_of_two_from(int64_t n) {
  int64_t power = 1;
  while (power < n) {
    power *= 2;
  }
  return power;
}

// The 16-byte windows that a run of `inner` elements touches, or the most of all runs if they differ.
int64_t windows_of_a_run(const Shape& shape) {
  const auto& layout = shape.layout;
  const int64_t lanes = unit_size / shape.item_size;
  const bool same_offset = layout.outer * layout.blocks == 1 || layout.inner % lanes == 0;
  return layout.inner == 0 ? 0 : at::ceil_div((same_offset ? shape.skipped : lanes - 1) + layout.inner, lanes);
}

// The work on a tile in pieces: 16-byte units, or single elements of a column.
struct TileWork {
  int64_t per_pass; // pieces that one CTA of max_threads handles at a time
  int64_t pieces;
  int64_t piece_size;
  int64_t held; // pieces that a thread keeps in registers

  int64_t passes(int64_t team, int64_t threads) const {
    const int64_t at_a_time = per_pass * threads / max_threads;
    return at::ceil_div(at::ceil_div(pieces, team), std::max<int64_t>(1, at_a_time));
  }
};

// Chooses whole CTAs for a tile: a small one for a small tile, or a team of large ones if there are too few tiles to
// fill the device. Chooses shared memory for what registers do not hold.
void choose_threads(Plan& plan, const TileWork& work, bool quantizes, const DeviceLimits& device) {
  plan.threads = few_threads;
  while (plan.threads < max_threads && work.passes(1, plan.threads) > work.held) {
    plan.threads *= 2;
  }
  plan.width = plan.threads;
  const bool idle = plan.tiles * 2 <= device.resident;
  if (idle && work.passes(1, max_threads) > work.held) {
    const int64_t most = device.resident / plan.tiles;
    plan.team = std::clamp<int64_t>(work.passes(1, max_threads) / 2, 1, most); // a CTA pays from two passes on
    plan.barrier = plan.team > 1 && device.cooperative;
  }
  if (quantizes && (plan.team == 1 || plan.barrier)) {
    const int64_t room = device.shared_memory / (max_threads / plan.threads) / (work.piece_size * plan.threads);
    plan.cached = std::clamp<int64_t>(work.passes(plan.team, plan.threads) - work.held, 0, room);
    plan.shared_bytes = plan.cached * work.piece_size * plan.threads;
  }
  plan.all_held = !plan.columns && plan.team == 1 && work.passes(1, plan.threads) <= work.held;
  const int64_t most = device.multiprocessors * waves * few_threads / plan.threads;
  plan.grid = plan.team > 1 ? plan.tiles * plan.team : std::min(plan.tiles, most);
}

} // namespace

Plan plan_of(const Shape& shape, bool quantizes, const DeviceLimits& device) {
  const auto& layout = shape.layout;
  const auto item_size = shape.item_size;
  Plan plan;
  plan.layout = layout;
  plan.units_per_run = windows_of_a_run(shape);
  plan.columns = layout.outer > 1 && layout.blocks > 1 && layout.inner * item_size < memory_line;
  if (plan.columns) {
    const int64_t wanted = at::ceil_div(memory_line, layout.inner * item_size);
    plan.tile_blocks = std::min(layout.blocks, wanted);
    plan.tiles = at::ceil_div(layout.blocks, plan.tile_blocks);
    const int64_t width = plan.tile_blocks * layout.inner;
    // few_threads / width rows at a time, and as many more in a larger CTA
    const TileWork work{few_threads / width * (max_threads / few_threads), layout.outer, item_size, held_elements};
    choose_threads(plan, work, quantizes, device);
    return plan;
  }
  plan.tiles = layout.blocks;
  const int64_t units = layout.outer * plan.units_per_run;
  if (units <= warp * held_units(item_size) && (layout.blocks > 1 || units <= warp)) {
    // Two units per thread: the reduction and the scale cost as much as quantizing some elements.
    plan.all_held = true;
    plan.width = static_cast<int>(std::min(warp, power_of_two_from(at::ceil_div<int64_t>(units, 2))));
    plan.grid = std::min(at::ceil_div<int64_t>(plan.tiles * plan.width, plan.threads), device.multiprocessors * waves);
    return plan;
  }
  choose_threads(plan, {max_threads, units, unit_size, held_units(item_size)}, quantizes, device);
  return plan;
}

std::array<Plan, 2> plan_of_two(const std::array<Shape, 2>& shapes, const DeviceLimits& device) {
  // The second is a bias, which is rarely more than the work of one CTA.
  DeviceLimits rest = device;
  rest.resident = std::max<int64_t>(1, device.resident - 1);
  auto first = plan_of(shapes[0], true, rest);
  const DeviceLimits one_cta{1, 0, 1, false};
  auto second = plan_of(shapes[1], true, one_cta);
  second.cached = second.shared_bytes = 0;
  if (second.width > warp) {
    second.width = first.threads;
  }
  second.threads = first.threads;
  const int64_t most_held = second.threads * held_units(shapes[1].item_size);
  second.all_held = second.width <= warp || second.layout.outer * second.units_per_run <= most_held;
  second.grid = std::min<int64_t>(second.grid, 1);
  return {first, second};
}

} // namespace qatfast::cuda
