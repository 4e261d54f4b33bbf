#include "launch.h"

namespace qatfast::cpu {
namespace {

// Each block is quantized while it is still in cache from finding its range.
template <class T>
void fake_quantize_rows(const T* x, T* y, const Layout& layout, const QuantSpec& spec) {
  using C = compute_t<T>;
  const auto& loops = chosen().loops<T>();
  const auto min = static_cast<C>(spec.quant_min()), max = static_cast<C>(spec.quant_max());
  for_each_tile(layout.blocks, layout.inner, [&](int64_t first, int64_t rows) {
    const T* from = x + first * layout.inner;
    C scale[tile_rows];
    int32_t zero_point[tile_rows];
    const bool unclamped =
        loops.choose_qparams(from, rows, layout.inner, {min, max, spec.symmetric}, scale, zero_point);
    loops.fake_quantize(
        from, y + first * layout.inner, rows, layout.inner, {scale, zero_point, min, max, false, unclamped});
  });
}

template <class T>
void fake_quantize_blocks(const T* x, T* y, const Layout& layout, const QuantSpec& spec) {
  using C = compute_t<T>;
  std::vector<C> scale(layout.blocks);
  std::vector<int32_t> zero_point(layout.blocks);
  const bool unclamped = choose_qparams_of_blocks(x, layout, spec, scale.data(), zero_point.data());
  const Grids<C> grids = {scale.data(), zero_point.data(), static_cast<C>(spec.quant_min()),
      static_cast<C>(spec.quant_max()), false, unclamped};
  const auto loop = chosen().loops<T>().fake_quantize;
  map_with_grids(layout, grids, [&](int64_t offset, int64_t rows, int64_t n, const Grids<C>& of_piece) {
    loop(x + offset, y + offset, rows, n, of_piece);
  });
}

} // namespace

void fake_quantize(const FakeQuantizeTask& task) {
  const auto layout = layout_of(task.from, task.spec.granularity);
  if (layout.numel() == 0) {
    return;
  }
  with_float_type(task.from.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* x = task.from.const_data_ptr<T>();
    auto* y = task.to.mutable_data_ptr<T>();
    if (are_whole_rows(layout) && layout.inner > 1) {
      fake_quantize_rows(x, y, layout, task.spec);
    } else {
      fake_quantize_blocks(x, y, layout, task.spec);
    }
  });
}

} // namespace qatfast::cpu
