#include "cpu/launch.h"

namespace qatfast::cpu {
namespace {

template <class U>
void apply_mask(const at::Tensor& grad, const at::Tensor& mask, const at::Tensor& to, MaskLoop<U> loop) {
  const auto* from = static_cast<const U*>(grad.const_data_ptr());
  const auto* bits = mask.const_data_ptr<uint8_t>();
  auto* out = static_cast<U*>(to.mutable_data_ptr());
  parallel_over_memory(grad.numel(), [&](int64_t begin, int64_t end) {
    loop(from + begin, bits + begin / 8, out + begin, end - begin);
  });
}

template <class T, class C = opmath_type<T>>
void map_with_mask(const at::Tensor& from, const at::Tensor& to, const at::Tensor& mask, const QParams& qparams,
    const Layout& layout,
    void (*loop)(const T* x, T* y, uint8_t* mask, int64_t first, int64_t rows, int64_t n, const Grids<C>& grids)) {
  const auto* x = from.const_data_ptr<T>();
  auto* y = to.mutable_data_ptr<T>();
  auto* bits = mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  const auto clear = [&](int64_t begin, int64_t end) {
    if (bits) {
      std::fill(bits + begin / 8, bits + (end + 7) / 8, uint8_t{0});
    }
  };
  map_with_grids(
      layout, grids_of<C>(qparams),
      [&](int64_t offset, int64_t rows, int64_t n, const Grids<C>& grids) {
        loop(x + offset, y + offset, bits, offset, rows, n, grids);
      },
      clear);
}

} // namespace

#define QATFAST_MAP(name)                                                                                            \
  void name(                                                                                                         \
      const at::Tensor& from, const at::Tensor& to, const at::Tensor& mask, const QParams& qparams, Layout layout) { \
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from.scalar_type(), #name, [&] {                       \
      map_with_mask<scalar_t>(from, to, mask, qparams, layout, chosen().loops<scalar_t>().name);                     \
    });                                                                                                              \
  }
#include "operator_list.h"

void inside(const at::Tensor& x, const at::Tensor& mask, const QParams& qparams) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "fake_quantize_affine", [&] {
    const auto grid = grids_of<opmath_type<scalar_t>>(qparams);
    const auto loop = chosen().loops<scalar_t>().inside;
    const auto* values = x.const_data_ptr<scalar_t>();
    auto* bits = mask.mutable_data_ptr<uint8_t>();
    parallel_over_memory(x.numel(), [&](int64_t begin, int64_t end) {
      loop(values + begin, bits + begin / 8, end - begin, grid);
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
