#include "given.cuh"
#include "launch.h"

namespace qatfast::cuda {
namespace {

// A thread owns 16 bytes of x at a time and loops. Bound by memory: one read, one write. Q has the size of the result;
// its sign does not change the bits.
template <class T, class Q>
__global__ void __launch_bounds__(given_threads)
    quantize_kernel(const T* from, Q* to, int64_t numel, bool aligned, GivenGrids<compute_t<T>> grids) {
  using C = compute_t<T>;
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
  quantize_kernel<T, Q><<<blocks_for((layout.numel() + lanes<T> - 1) / lanes<T>, given_threads, from.device().index()),
      given_threads, 0, c10::cuda::getCurrentCUDAStream()>>>(x, q, layout.numel(),
      is_aligned(x, 16) && is_aligned(q, lanes<T> * sizeof(Q)), grids_of<compute_t<T>>(qparams, layout));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

} // namespace

void quantize(const at::Tensor& from, const at::Tensor& to, const QParams& qparams, Layout layout) {
  if (layout.numel() == 0) {
    return;
  }
  const c10::cuda::CUDAGuard guard(from.device());
  with_float_type(from.scalar_type(), [&](auto type) {
    using T = decltype(type);
    to.element_size() == 1 ? launch<T, uint8_t>(from, to, qparams, layout)
                           : launch<T, uint16_t>(from, to, qparams, layout);
  });
}

} // namespace qatfast::cuda
