#include "checks.h"
#include "launchers.h"
#include "operators.h"
#include "ops/blocks.h"

namespace qatfast {
namespace {

at::ScalarType quantized_dtype(int64_t quant_min, int64_t quant_max) {
  if (quant_min >= 0) {
    return quant_max <= 255 ? at::kByte : at::kUInt16;
  }
  TORCH_CHECK_VALUE(quant_max <= 32767,
      "quantize: expected quant_min and quant_max to fit in one of int8, uint8, int16 and uint16, got quant_min=",
      quant_min, ", quant_max=", quant_max);
  return quant_min >= -128 && quant_max <= 127 ? at::kChar : at::kShort;
}

} // namespace

Tensor kernel::quantize(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, at::IntArrayRef code) {
  const auto [granularity, qparams] =
      checked_static_range("quantize", input, scale, zero_point, quant_min, quant_max, code);
  const auto dtype = quantized_dtype(quant_min, quant_max);
  const auto from = as_blocks(input, granularity);
  const auto to = fresh_like(from, dtype);
  QATFAST_ON(input, quantize)(from, to, in_memory_order(qparams, from, granularity), layout_of(from, granularity));
  return laid_out_like(input, to, granularity);
}

} // namespace qatfast
