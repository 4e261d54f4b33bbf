#include "cpu/launch.h"

namespace qatfast::cpu {

void choose_qparams(const at::Tensor& x, const QuantSpec& spec, const at::Tensor& scale, const at::Tensor& zero_point) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "choose_qparams", [&] {
    choose_qparams_of_blocks(x.const_data_ptr<scalar_t>(), layout_of(x, spec.granularity), spec,
        scale.mutable_data_ptr<opmath_type<scalar_t>>(), zero_point.mutable_data_ptr<int32_t>());
  });
}

} // namespace qatfast::cpu
