#include "checks.h"
#include "launchers.h"
#include "ops/autograd.h"
#include "ops/blocks.h"

namespace qatfast {

Tensor kernel::dequantize(
    const Tensor& input, const Tensor& scale, const Tensor& zero_point, at::IntArrayRef code, at::ScalarType dtype) {
  constexpr auto op = "dequantize";
  const auto granularity = checked_granularity(op, code);
  const auto q = input.scalar_type();
  TORCH_CHECK_TYPE(q == at::kChar || q == at::kByte || q == at::kShort || q == at::kUInt16, op,
      ": expected input to be int8, uint8, int16 or uint16, got ", name_of(q));
  check_float(op, "dtype", dtype);
  check_blocks(op, input, granularity);
  const auto qparams = checked_qparams(op, input, scale, zero_point, -32768, 65535, granularity, dtype, "output");
  const auto from = as_blocks(input, granularity);
  const auto to = fresh_like(from, dtype);
  QATFAST_ON(input, dequantize)(from, to, in_memory_order(qparams, from, granularity), layout_of(from, granularity));
  return laid_out_like(input, to, granularity);
}

Tensor autograd::dequantize(const Tensor& input, const Tensor& scale, const Tensor& zero_point,
    at::IntArrayRef granularity, at::ScalarType dtype) {
  check_fixed("dequantize", scale);
  return op::dequantize.below_autograd(input, scale, zero_point, granularity, dtype);
}

} // namespace qatfast
