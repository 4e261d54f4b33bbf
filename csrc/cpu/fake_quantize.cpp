#include "launch.h"

namespace qatfast::cpu {
namespace {

// Each block is quantized while it is still in cache from finding its range.
template <class T>
void fake_quantize_rows(const T* x, T* y, const Layout& layout, const QuantSpec& spec) {
  using C = compute_t<T>;
  const auto& loops = chosen().loops<T>();
  const auto min = static_cast<C>(spec.quant_min()), max = static_cast<C>(spec.quant_max());
  at::parallel_for(0, layout.blocks, std::max<int64_t>(1, grain / layout.inner), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const auto offset = block * layout.inner;
      C lo = 0, hi = 0;
      loops.range(x + offset, layout.inner, &lo, &hi, false);
      const C scale = choose_scale(lo, hi, min, max, spec.symmetric);
      const int32_t zero_point = choose_zero_point(lo, scale, min, max, spec.symmetric);
      loops.fake_quantize(x + offset, y + offset, layout.inner, {&scale, &zero_point, min, max, false});
    }
  });
}

template <class T>
void fake_quantize_blocks(const T* x, T* y, const Layout& layout, const QuantSpec& spec) {
  using C = compute_t<T>;
  std::vector<C> scale(layout.blocks);
  std::vector<int32_t> zero_point(layout.blocks);
  choose_qparams_of_blocks(x, layout, spec, scale.data(), zero_point.data());
  const Grids<C> grids = {
      scale.data(), zero_point.data(), static_cast<C>(spec.quant_min()), static_cast<C>(spec.quant_max()), false};
  const auto loop = chosen().loops<T>().fake_quantize;
  map_with_grids(layout, grids, [&](int64_t offset, int64_t n, const Grids<C>& of_run) {
    loop(x + offset, y + offset, n, of_run);
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
