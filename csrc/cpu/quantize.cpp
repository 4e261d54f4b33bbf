#include "cpu/launch.h"

namespace qatfast::cpu {

void quantize(const at::Tensor& from, const at::Tensor& to, const QParams& qparams, Layout layout) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from.scalar_type(), "quantize", [&] {
    const auto& loops = chosen().loops<scalar_t>();
    AT_DISPATCH_V2(to.scalar_type(), "quantize", AT_WRAP([&] {
      map_tensor(from, to, qparams, layout, loops.template integer<scalar_t>().quantize);
    }),
        at::kChar, at::kByte, at::kShort, at::kUInt16);
  });
}

} // namespace qatfast::cpu
