#include "cuda/static_quantize.cuh"
#include "cuda/launch.h"

namespace qatfast::cuda {
namespace {

// A thread owns 16 bytes of y at a time and loops. Bound by memory: one read, one write. Q has the size of the
// integers.
template <class T, class Q>
__global__ void __launch_bounds__(static_threads) dequantize_kernel(
    const Q* from, T* to, int64_t numel, bool is_signed, bool aligned, StaticGrids<opmath_type<T>> grids) {
  using C = opmath_type<T>;
  constexpr int N = lanes<T>;
  const auto only = grids.only();
  for_each_unit<N>(numel, [&](int64_t begin, int count) {
    if (count == 0) {
      return;
    }
    const auto unit = load<Q, N>(from + begin, count, aligned);
    C values[N];
    grids.template for_each<N>(begin, count, only, [&](int i, C zero_point, const auto& grid) {
      const int32_t q = is_signed ? static_cast<std::make_signed_t<Q>>(unit.at[i]) : unit.at[i];
      values[i] = qatfast::dequantize(static_cast<C>(q), zero_point, grid.scale);
    });
    store<T, N>(to + begin, narrowed<T>(values), count, aligned);
  });
}

template <class T, class Q>
void launch(const at::Tensor& from, const at::Tensor& to, const QParams& qparams, const Layout& layout) {
  const auto* q = static_cast<const Q*>(from.const_data_ptr());
  auto* y = to.mutable_data_ptr<T>();
  const bool is_signed = from.scalar_type() == at::kChar || from.scalar_type() == at::kShort;
  const bool aligned = is_aligned(y, 16) && is_aligned(q, lanes<T> * sizeof(Q));
  launch_over_units<T>(from, dequantize_kernel<T, Q>, q, y, layout.numel(), is_signed, aligned,
      grids_of<opmath_type<T>>(qparams, layout));
}

} // namespace

void dequantize(const at::Tensor& from, const at::Tensor& to, const QParams& qparams, Layout layout) {
  if (layout.numel() == 0) {
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, to.scalar_type(), "dequantize", [&] {
    from.element_size() == 1 ? launch<scalar_t, uint8_t>(from, to, qparams, layout)
                             : launch<scalar_t, uint16_t>(from, to, qparams, layout);
  });
}

} // namespace qatfast::cuda
