#include "checks.h"
#include "common/copy.h"
#include "launchers.h"
#include "operators.h"
#include "ops/blocks.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <c10/util/irange.h>

namespace qatfast {

std::tuple<Tensor, Tensor> kernel::choose_qparams(
    const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range) {
  constexpr auto op = "choose_qparams";
  const auto spec = checked_spec(op, num_bits, symmetric, granularity, narrow_range);
  check_float(op, "input", input.scalar_type());
  check_blocks(op, input, spec.granularity);
  const auto shape = qparams_shape(input, spec.granularity);
  // Blocks of one or two elements have no fewer results than elements: one copy of the input replaces two of results.
  const bool is_tiny = spec.granularity.kind == Granularity::per_group && spec.granularity.argument <= 2;
  const auto from = is_tiny ? contiguous(input) : as_blocks(input, spec.granularity);
  const auto order = block_order(from, spec.granularity);
  const auto result_of = [&](at::ScalarType dtype) {
    const auto result = at::empty(shape, input.options().dtype(dtype));
    return order.empty() ? result : at::empty(result.permute(order).sizes(), result.options());
  };
  const auto scale = result_of(at::toOpMathType(input.scalar_type())), zero_point = result_of(at::kInt);
  QATFAST_ON(input, choose_qparams)(from, spec, scale, zero_point);
  if (order.empty()) {
    return {scale, zero_point};
  }
  at::DimVector dims(order.size());
  for (const auto i : c10::irange(order.size())) {
    dims[order[i]] = static_cast<int64_t>(i);
  }
  return {contiguous(scale.permute(dims)), contiguous(zero_point.permute(dims))};
}

} // namespace qatfast
