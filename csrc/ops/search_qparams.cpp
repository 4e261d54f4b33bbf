#include "checks.h"
#include "common/copy.h"
#include "launchers.h"
#include "operators.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

namespace qatfast {

std::tuple<Tensor, Tensor> kernel::search_qparams(
    const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range) {
  constexpr auto op = "search_qparams";
  const auto spec = checked_spec(op, num_bits, symmetric, granularity, narrow_range);
  check_float(op, "input", input.scalar_type());
  check_blocks(op, input, spec.granularity);
  const auto shape = qparams_shape(input, spec.granularity);
  const auto blocks = blocks_of(input, spec.granularity);
  const bool by_channel = spec.granularity.kind == Granularity::per_channel;
  const auto ordered = contiguous(by_channel ? input.movedim(spec.granularity.argument, 0) : input);
  const auto rows = ordered.view({blocks, blocks > 0 ? input.numel() / blocks : 0});
  const auto scale = at::empty(shape, input.options().dtype(at::toOpMathType(input.scalar_type())));
  const auto zero_point = at::empty(shape, input.options().dtype(at::kInt));
  if (blocks > 0) {
    QATFAST_ON(input, search_qparams)(rows, spec, scale, zero_point);
  }
  return {scale, zero_point};
}

} // namespace qatfast
