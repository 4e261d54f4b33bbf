#include "cuda/static_quantize.cuh"
#include "cuda/launch.h"

namespace qatfast::cuda {
namespace {

// As map_kernel of static_range.cu. Zeros keep their sign; a NaN stays and passes the gradient.
template <class T>
__global__ void __launch_bounds__(static_threads)
    relu_kernel(const T* from, T* to, uint8_t* mask, int64_t numel, bool aligned, opmath_type<T> limit) {
  using C = opmath_type<T>;
  constexpr int N = lanes<T>;
  for_each_unit<N>(numel, [&](int64_t begin, int count) {
    auto unit = load<T, N>(from + begin, count, aligned);
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const C x = static_cast<C>(unit.at[i]);
      bits |= static_cast<unsigned>(i < count && !(x <= 0 || x >= limit)) << i;
      if (x < 0 || x > limit) {
        unit.at[i] = static_cast<T>(x < 0 ? C(0) : limit);
      }
    }
    store<T, N>(to + begin, unit, count, aligned);
    store_mask<N>(mask, begin, count, bits);
  });
}

} // namespace

void relu(const at::Tensor& from, const at::Tensor& to, const at::Tensor& mask, double limit) {
  if (from.numel() == 0) {
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from.scalar_type(), "relu", [&] {
    const auto* x = from.const_data_ptr<scalar_t>();
    auto* y = to.mutable_data_ptr<scalar_t>();
    launch_over_units<scalar_t>(from, relu_kernel<scalar_t>, x, y, mask.mutable_data_ptr<uint8_t>(), from.numel(),
        is_aligned(x, 16) && is_aligned(y, 16), static_cast<opmath_type<scalar_t>>(limit));
  });
}

} // namespace qatfast::cuda
