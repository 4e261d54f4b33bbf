#include "cpu/launch.h"

#include <cmath>

namespace qatfast::cpu {
namespace {

// Whether a block has a finite value.
template <class T>
bool has_finite_value(const T* x, const Layout& layout, int64_t block) {
  const auto part = block / layout.blocks, index = block % layout.blocks;
  for (int64_t o = 0; o < layout.outer; ++o) {
    const T* run = x + ((part * layout.outer + o) * layout.blocks + index) * layout.inner;
    for (int64_t i = 0; i < layout.inner; ++i) {
      if (std::isfinite(static_cast<opmath_type<T>>(run[i]))) {
        return true;
      }
    }
  }
  return false;
}

} // namespace

void ranges(const at::Tensor& x, Granularity granularity, const at::Tensor& lo, const at::Tensor& hi,
    const at::Tensor& has_finite) {
  const auto layout = layout_of(x, granularity);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "observe_range", [&] {
    using C = opmath_type<scalar_t>;
    const StandardArithmetic arithmetic;
    const auto* values = x.const_data_ptr<scalar_t>();
    auto* low = lo.mutable_data_ptr<C>();
    auto* high = hi.mutable_data_ptr<C>();
    auto* finite = has_finite.mutable_data_ptr<bool>();
    const bool all_finite =
        for_each_range(values, layout, [&](int64_t first, int64_t blocks, const C* from_lo, const C* from_hi) {
          std::copy_n(from_lo, blocks, low + first);
          std::copy_n(from_hi, blocks, high + first);
        });
    for (int64_t block = 0; block < lo.numel(); ++block) {
      finite[block] =
          (all_finite && layout.numel() > 0) || low[block] != high[block] || has_finite_value(values, layout, block);
    }
  });
}

void choose_of_ranges(const at::Tensor& lo, const at::Tensor& hi, const QuantSpec& spec, const at::Tensor& scale,
    const at::Tensor& zero_point) {
  AT_DISPATCH_FLOATING_TYPES(lo.scalar_type(), "observe_range", [&] {
    const StandardArithmetic arithmetic;
    chosen().loops<scalar_t>().choose(lo.const_data_ptr<scalar_t>(), hi.const_data_ptr<scalar_t>(), lo.numel(),
        spec.quant_range<scalar_t>(), scale.mutable_data_ptr<scalar_t>(), zero_point.mutable_data_ptr<int32_t>());
  });
}

} // namespace qatfast::cpu
