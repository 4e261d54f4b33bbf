#include "cpu/launch.h"

namespace qatfast::cpu {

void relu(const at::Tensor& from, const at::Tensor& to, const at::Tensor& mask, double limit) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from.scalar_type(), "relu", [&] {
    using C = opmath_type<scalar_t>;
    const auto loop = chosen().loops<scalar_t>().relu;
    const auto* x = from.const_data_ptr<scalar_t>();
    auto* y = to.mutable_data_ptr<scalar_t>();
    auto* bits = mask.mutable_data_ptr<uint8_t>();
    parallel_over_memory(from.numel(), [&](int64_t begin, int64_t end) {
      loop(x + begin, y + begin, bits + begin / 8, end - begin, static_cast<C>(limit));
    });
  });
}

} // namespace qatfast::cpu
