#include "launch.h"

namespace qatfast::cpu {
namespace {

template <class T>
void fake_quantize_with_mask(const T* x, T* y, uint8_t* mask, const Layout& layout, const Grids<compute_t<T>>& grids) {
  constexpr int64_t tile = 512; // elements whose bytes stay in L1 until they are packed into bits
  const auto loop = chosen().loops<T>().fake_quantize_inside;
  parallel_over_memory(layout.numel(), [&](int64_t begin, int64_t end) {
    for (int64_t start = begin; start < end; start += tile) {
      const auto stop = std::min(start + tile, end);
      uint8_t inside[tile];
      for_each_run(layout, start, stop, [&](int64_t offset, int64_t n, int64_t block, bool each) {
        loop(x + offset, y + offset, inside + (offset - start), n, grids.from(block, each));
      });
      chosen().pack(inside, mask + start / 8, stop - start);
    }
  });
}

template <class U>
void apply_mask(const at::Tensor& grad, const at::Tensor& mask, const at::Tensor& to, MaskLoop<U> loop) {
  const auto* from = static_cast<const U*>(grad.const_data_ptr());
  const auto* bits = mask.const_data_ptr<uint8_t>();
  auto* out = static_cast<U*>(to.mutable_data_ptr());
  parallel_over_memory(grad.numel(), [&](int64_t begin, int64_t end) {
    loop(from + begin, bits + begin / 8, out + begin, end - begin);
  });
}

} // namespace

void fake_quantize_affine(
    const at::Tensor& from, const at::Tensor& to, const at::Tensor& mask, const QParams& qparams, Layout layout) {
  with_float_type(from.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* x = from.const_data_ptr<T>();
    auto* y = to.mutable_data_ptr<T>();
    const auto grids = grids_of<compute_t<T>>(qparams);
    if (mask.defined()) {
      return fake_quantize_with_mask(x, y, mask.mutable_data_ptr<uint8_t>(), layout, grids);
    }
    const auto loop = chosen().loops<T>().fake_quantize;
    map_with_grids(layout, grids, [&](int64_t offset, int64_t n, const auto& of_run) {
      loop(x + offset, y + offset, n, of_run);
    });
  });
}

void fake_quantize_affine_backward(const at::Tensor& grad, const at::Tensor& mask, const at::Tensor& to) {
  const auto& best = chosen();
  switch (grad.element_size()) {
    case 2:
      return apply_mask<uint16_t>(grad, mask, to, best.mask16);
    case 4:
      return apply_mask<uint32_t>(grad, mask, to, best.mask32);
    default:
      return apply_mask<uint64_t>(grad, mask, to, best.mask64);
  }
}

} // namespace qatfast::cpu
