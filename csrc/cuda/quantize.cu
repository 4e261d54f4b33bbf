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

// As map_kernel of static_range.cu. Threads that find a NaN all write the same to `poison`.
template <class T>
__global__ void __launch_bounds__(static_threads)
    quantize_to_uint8_kernel(const T* from, uint8_t* to, uint8_t* mask, int64_t numel, bool aligned,
        StaticGrids<opmath_type<T>> grids, int shift, int32_t* shifted_zero_point, float* poison) {
  using C = opmath_type<T>;
  constexpr int N = lanes<T>;
  const auto only = grids.only();
  const int zero_point = static_cast<int>(only.zero_point) + shift;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *shifted_zero_point = zero_point;
  }
  bool has_nan = false;
  for_each_unit<N>(numel, [&](int64_t begin, int count) {
    const auto unit = load<T, N>(from + begin, count, aligned);
    Unit<uint8_t, N> integers;
    unsigned bits = 0;
    with_fastest(only.grid, [&](const auto& grid) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const C x = static_cast<C>(unit.at[i]);
        integers.at[i] = static_cast<uint8_t>(qatfast::quantize(x, zero_point, grid));
        bits |= static_cast<unsigned>(i < count && fake_quantize_affine_forward(x, grid).second) << i;
        has_nan |= x != x;
      }
    });
    store<uint8_t, N>(to + begin, integers, count, aligned);
    if (mask) {
      store_mask<N>(mask, begin, count, bits);
    }
  });
  if (has_nan) {
    *poison = std::numeric_limits<float>::quiet_NaN();
  }
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

void quantize_to_uint8(const at::Tensor& x, const at::Tensor& values, const at::Tensor& mask, const QuantSpec& spec,
    const QParams& qparams, const at::Tensor& shifted_zero_point, const at::Tensor& poison) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "quantize", [&] {
    const auto* from = x.const_data_ptr<scalar_t>();
    auto* to = values.mutable_data_ptr<uint8_t>();
    launch_over_units<scalar_t>(x, quantize_to_uint8_kernel<scalar_t>, from, to,
        mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr, x.numel(),
        is_aligned(from, 16) && is_aligned(to, lanes<scalar_t>),
        grids_of<opmath_type<scalar_t>>(qparams, {1, 1, x.numel()}), spec.uint8_shift(),
        shifted_zero_point.mutable_data_ptr<int32_t>(), poison.mutable_data_ptr<float>());
  });
}

} // namespace qatfast::cuda
