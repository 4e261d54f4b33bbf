#include "launch.h"

namespace qatfast::cpu {

void choose_qparams(const at::Tensor& x, const QuantSpec& spec, const at::Tensor& scale, const at::Tensor& zero_point) {
  with_float_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    choose_qparams_of_blocks(x.const_data_ptr<T>(), layout_of(x, spec.granularity), spec,
        scale.mutable_data_ptr<compute_t<T>>(), zero_point.mutable_data_ptr<int32_t>());
  });
}

} // namespace qatfast::cpu
