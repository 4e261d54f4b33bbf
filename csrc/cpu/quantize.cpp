#include "launch.h"

namespace qatfast::cpu {

void quantize(const at::Tensor& from, const at::Tensor& to, const QParams& qparams, Layout layout) {
  with_float_type(from.scalar_type(), [&](auto float_type) {
    with_integer_type(to.scalar_type(), [&](auto integer_type) {
      using T = decltype(float_type);
      using Q = decltype(integer_type);
      const auto* x = from.const_data_ptr<T>();
      auto* q = to.mutable_data_ptr<Q>();
      const auto loop = chosen().loops<T>().template integer<Q>().quantize;
      map_with_grids(
          layout, grids_of<compute_t<T>>(qparams), [&](int64_t offset, int64_t rows, int64_t n, const auto& of_piece) {
            loop(x + offset, q + offset, rows, n, of_piece);
          });
    });
  });
}

} // namespace qatfast::cpu
