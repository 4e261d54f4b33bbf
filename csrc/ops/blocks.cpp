#include "ops/blocks.h"

#include "checks.h"
#include "common/copy.h"
#include "launchers.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <numeric>

namespace qatfast {

Tensor fresh_like(const Tensor& x, at::ScalarType dtype) {
  if (x.is_cpu() && x.is_non_overlapping_and_dense()) { // as fresh() does
    return with_few_page_faults(at::Tensor(at::detail::empty_strided_cpu(x.sizes(), x.strides(), dtype)));
  }
  return with_few_page_faults(at::empty_like(x, x.options().dtype(dtype)));
}

Tensor as_blocks(const Tensor& x, Granularity granularity) {
  if (needs_contiguous(x, granularity)) {
    return x.contiguous();
  }
  return x.is_non_overlapping_and_dense() ? x : copied(x, fresh_like(x, x.scalar_type()));
}

Tensor laid_out_like(const Tensor& x, const Tensor& values, Granularity granularity) {
  if (!needs_contiguous(x, granularity) || x.is_contiguous()) {
    return values;
  }
  auto like = at::empty_like(x, values.options());
  return like.strides() == values.strides() ? values : like.copy_(values);
}

at::DimVector block_order(const Tensor& x, Granularity granularity) {
  at::DimVector order;
  if (granularity.by_rows() && !x.is_contiguous()) {
    at::DimVector strides(x.strides());
    strides.back() *= granularity.argument;
    order.resize(granularity.kind == Granularity::per_group ? x.dim() : x.dim() - 1);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return strides[a] > strides[b];
    });
  }
  return order;
}

QParams in_memory_order(const QParams& qparams, const Tensor& x, Granularity granularity) {
  const auto order = block_order(x, granularity);
  if (order.empty()) {
    return qparams;
  }
  const auto shape = qparams_shape(x, granularity);
  const auto ordered = [&](const Tensor& values) {
    return contiguous(values.view(shape).permute(order));
  };
  return {ordered(qparams.scale), ordered(qparams.zero_point), qparams.quant_min, qparams.quant_max};
}

Tensor result_for(const Tensor& x, const Tensor& from) {
  return from.is_same(x) ? fresh_like(x, x.scalar_type()) : from;
}

Tensor fake_quantized(const Tensor& x, const QuantSpec& spec) {
  const auto from = as_blocks(x, spec.granularity);
  const auto to = result_for(x, from);
  QATFAST_ON(x, fake_quantize)({from, to, spec});
  return laid_out_like(x, to, spec.granularity);
}

bool rounds_to(const Tensor& x, at::ScalarType dtype) {
  return x.is_cpu() && x.scalar_type() == at::kFloat && (dtype == at::kHalf || dtype == at::kBFloat16);
}

} // namespace qatfast
