#include "cuda/static_quantize.cuh"
#include "cuda/launch.h"

namespace qatfast::cuda {
namespace {

// A thread owns 16 bytes of x at a time and loops. Bound by memory: one read, one write. Q has the size of the result;
// the bits do not depend on its sign.
template <class T, class Q>
__global__ void __launch_bounds__(static_threads)
    quantize_kernel(const T* from, Q* to, int64_t numel, bool aligned, StaticGrids<opmath_type<T>> grids) {
  using C = opmath_type<T>;
  constexpr int N = lanes<T>;
  const auto only = grids.only();
  for_each_unit<N>(numel, [&](int64_t begin, int count) {
    if (count == 0) {
      return;
    }
    const auto unit = load<T, N>(from + begin, count, aligned);
    Unit<Q, N> integers;
    grids.template for_each<N>(begin, count, only, [&](int i, C zero_point, const auto& grid) {
      const auto zero = static_cast<int32_t>(zero_point);
      integers.at[i] = static_cast<Q>(qatfast::quantize(static_cast<C>(unit.at[i]), zero, grid));
    });
    store<Q, N>(to + begin, integers, count, aligned);
  });
}

template <class T, class Q>
void launch(const at::Tensor& from, const at::Tensor& to, const QParams& qparams, const Layout& layout) {
  const auto* x = from.const_data_ptr<T>();
  auto* q = static_cast<Q*>(to.mutable_data_ptr());
  const bool aligned = is_aligned(x, 16) && is_aligned(q, lanes<T> * sizeof(Q));
  launch_over_units<T>(
      from, quantize_kernel<T, Q>, x, q, layout.numel(), aligned, grids_of<opmath_type<T>>(qparams, layout));
}

} // namespace

void quantize(const at::Tensor& from, const at::Tensor& to, const QParams& qparams, Layout layout) {
  if (layout.numel() == 0) {
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from.scalar_type(), "quantize", [&] {
    to.element_size() == 1 ? launch<scalar_t, uint8_t>(from, to, qparams, layout)
                           : launch<scalar_t, uint16_t>(from, to, qparams, layout);
  });
}

} // namespace qatfast::cuda
