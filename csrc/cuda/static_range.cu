#include "cuda/static_quantize.cuh"
#include "cuda/launch.h"

namespace qatfast::cuda {
namespace {

// A thread owns 16 bytes at a time and loops. Threads share only mask bits, which a warp gathers into bytes. Bound by
// memory: one read, one write, one bit per element.
template <class T, class Formula>
__global__ void __launch_bounds__(static_threads)
    map_kernel(const T* from, T* to, uint8_t* mask, int64_t numel, bool aligned, StaticGrids<opmath_type<T>> grids) {
  using C = opmath_type<T>;
  constexpr int N = lanes<T>;
  const auto only = grids.only();
  for_each_unit<N>(numel, [&](int64_t begin, int count) {
    const auto unit = load<T, N>(from + begin, count, aligned);
    C values[N] = {};
    unsigned bits = 0;
    if (count > 0) {
      grids.template for_each<N>(begin, count, only, [&](int i, C zero_point, const auto& grid) {
        const auto [value, passes] = Formula::of(static_cast<C>(unit.at[i]), grid);
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

// The gradient passes if its bit is set. U has the size of its elements, whose meaning does not matter.
template <class U>
__global__ void __launch_bounds__(static_threads)
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
  const auto* from = static_cast<const U*>(grad.const_data_ptr());
  auto* y = static_cast<U*>(to.mutable_data_ptr());
  launch_over_units<U>(grad, fake_quantize_affine_backward_kernel<U>, from, mask.const_data_ptr<uint8_t>(), y,
      grad.numel(), is_aligned(from, 16) && is_aligned(y, 16));
}

template <class Formula>
void map(const at::Tensor& from, const at::Tensor& to, const at::Tensor& mask, const QParams& qparams, Layout layout,
    bool learned = false) {
  if (layout.numel() == 0) {
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from.scalar_type(), Formula::name, [&] {
    const auto* x = from.const_data_ptr<scalar_t>();
    auto* y = to.mutable_data_ptr<scalar_t>();
    auto grids = grids_of<opmath_type<scalar_t>>(qparams, layout);
    grids.learned = learned;
    launch_over_units<scalar_t>(from, map_kernel<scalar_t, Formula>, x, y,
        mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr, layout.numel(),
        is_aligned(x, 16) && is_aligned(y, 16), grids);
  });
}

} // namespace

#define QATFAST_MAP(op)                                                                                              \
  struct op##_formula {                                                                                              \
    static constexpr const char* name = #op;                                                                         \
    template <class C, class G>                                                                                      \
    static __device__ __forceinline__ auto of(C x, const G& grid) {                                                  \
      return op##_forward(x, grid);                                                                                  \
    }                                                                                                                \
  };                                                                                                                 \
  void op(                                                                                                           \
      const at::Tensor& from, const at::Tensor& to, const at::Tensor& mask, const QParams& qparams, Layout layout) { \
    map<op##_formula>(from, to, mask, qparams, layout);                                                              \
  }
#include "operator_list.h"

void fake_quantize_learned(const at::Tensor& from, const at::Tensor& to, const QParams& qparams, Layout layout) {
  map<fake_quantize_affine_formula>(from, to, /*mask=*/{}, qparams, layout, /*learned=*/true);
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
