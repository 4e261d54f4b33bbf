#include "given.cuh"
#include "launch.h"

namespace qatfast::cuda {
namespace {

// A thread owns 16 bytes at a time and loops; nothing is shared but mask bits, which threads of a warp gather into
// bytes. Bound by memory: one read, one write, one bit an element.
template <class T>
__global__ void __launch_bounds__(given_threads) fake_quantize_affine_kernel(
    const T* from, T* to, uint8_t* mask, int64_t numel, bool aligned, GivenGrids<compute_t<T>> grids) {
  using C = compute_t<T>;
  constexpr int N = lanes<T>;
  const auto only = grids.only();
  for_each_unit<N>(numel, [&](int64_t begin, int count) {
    const auto unit = load<T, N>(from + begin, count, aligned);
    C values[N] = {};
    unsigned bits = 0;
    if (count > 0) {
      grids.template for_each<N>(begin, count, only, [&](int i, C zero_point, const auto& grid) {
        const C x = static_cast<C>(unit.at[i]);
        const auto [value, passes] = fake_quantize_inside(x, grid);
        values[i] = value;
        bits |= static_cast<unsigned>(i < count && passes) << i;
      });
    }
    store<T, N>(to + begin, narrowed<T>(values), count, aligned);
    if (mask) {
      store_mask<N>(mask, begin, count, bits);
    }
  });
}

// The same for the gradient, which passes where its bit is set; U has its size, what it holds does not matter.
template <class U>
__global__ void __launch_bounds__(given_threads)
    fake_quantize_affine_backward_kernel(const U* grad, const uint8_t* mask, U* to, int64_t numel, bool aligned) {
  constexpr int N = lanes<U>;
  for_each_unit<N>(numel, [&](int64_t begin, int count) {
    const auto bits = load_mask<N>(mask, begin, count);
    auto unit = load<U, N>(grad + begin, count, aligned);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      unit.at[i] = bits >> i & 1 ? unit.at[i] : U{};
    }
    store<U, N>(to + begin, unit, count, aligned);
  });
}

template <class U>
void apply_mask(const at::Tensor& grad, const at::Tensor& mask, const at::Tensor& to) {
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto numel = grad.numel();
  const auto* from = static_cast<const U*>(grad.const_data_ptr());
  auto* out = static_cast<U*>(to.mutable_data_ptr());
  fake_quantize_affine_backward_kernel<U>
      <<<blocks_for((numel + lanes<U> - 1) / lanes<U>, given_threads, grad.device().index()), given_threads, 0,
          c10::cuda::getCurrentCUDAStream()>>>(
          from, mask.const_data_ptr<uint8_t>(), out, numel, is_aligned(from, 16) && is_aligned(out, 16));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

} // namespace

void fake_quantize_affine(
    const at::Tensor& from, const at::Tensor& to, const at::Tensor& mask, const QParams& qparams, Layout layout) {
  if (layout.numel() == 0) {
    return;
  }
  const c10::cuda::CUDAGuard guard(from.device());
  with_float_type(from.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* x = from.const_data_ptr<T>();
    auto* y = to.mutable_data_ptr<T>();
    fake_quantize_affine_kernel<T>
        <<<blocks_for((layout.numel() + lanes<T> - 1) / lanes<T>, given_threads, from.device().index()), given_threads,
            0, c10::cuda::getCurrentCUDAStream()>>>(x, y, mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr,
            layout.numel(), is_aligned(x, 16) && is_aligned(y, 16), grids_of<compute_t<T>>(qparams, layout));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void fake_quantize_affine_backward(const at::Tensor& grad, const at::Tensor& mask, const at::Tensor& to) {
  if (grad.numel() == 0) {
    return;
  }
  switch (grad.element_size()) {
    case 2:
      return apply_mask<uint16_t>(grad, mask, to);
    case 4:
      return apply_mask<uint32_t>(grad, mask, to);
    default:
      return apply_mask<uint64_t>(grad, mask, to);
  }
}

} // namespace qatfast::cuda
