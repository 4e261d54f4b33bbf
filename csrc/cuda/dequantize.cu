#include "given.cuh"
#include "launch.h"

namespace qatfast::cuda {
namespace {

// A thread owns 16 bytes of y at a time and loops. Bound by memory: one read, one write. Q has the size of the
// integers.
template <class T, class Q>
__global__ void __launch_bounds__(given_threads) dequantize_kernel(
    const Q* from, T* to, int64_t numel, bool is_signed, bool aligned, GivenGrids<compute_t<T>> grids) {
  using C = compute_t<T>;
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
  dequantize_kernel<T, Q>
      <<<blocks_for((layout.numel() + lanes<T> - 1) / lanes<T>, given_threads, from.device().index()), given_threads, 0,
          c10::cuda::getCurrentCUDAStream()>>>(q, y, layout.numel(), is_signed,
          is_aligned(y, 16) && is_aligned(q, lanes<T> * sizeof(Q)), grids_of<compute_t<T>>(qparams, layout));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

} // namespace

void dequantize(const at::Tensor& from, const at::Tensor& to, const QParams& qparams, Layout layout) {
  if (layout.numel() == 0) {
    return;
  }
  const c10::cuda::CUDAGuard guard(from.device());
  with_float_type(to.scalar_type(), [&](auto type) {
    using T = decltype(type);
    from.element_size() == 1 ? launch<T, uint8_t>(from, to, qparams, layout)
                             : launch<T, uint16_t>(from, to, qparams, layout);
  });
}

} // namespace qatfast::cuda
