#include "ops/mask.h"

#include "common/memory.h"

namespace qatfast {

int64_t mask_bytes(const Tensor& x) {
  return (x.numel() + 7) / 8;
}

Tensor fresh_mask(const Tensor& x) {
  return fresh({mask_bytes(x)}, at::kByte, x);
}

namespace autograd {
namespace {

std::vector<c10::SymInt> contiguous_strides(c10::SymIntArrayRef sizes) {
  std::vector<c10::SymInt> strides(sizes.size(), 1);
  for (auto d = static_cast<int64_t>(sizes.size()) - 2; d >= 0; --d) {
    strides[d] = strides[d + 1] * sizes[d + 1].max(1);
  }
  return strides;
}

} // namespace

std::vector<c10::SymInt> strides_of_mask(const Tensor& output, at::IntArrayRef granularity) {
  const bool contiguous = takes_contiguous(output, {static_cast<Granularity::Kind>(granularity[0])});
  return contiguous ? contiguous_strides(output.sym_sizes()) : output.sym_strides().vec();
}

void save_mask(AutogradContext* ctx, const Tensor& mask, c10::SymIntArrayRef stride) {
  ctx->set_materialize_grads(false);
  ctx->save_for_backward({mask});
  ctx->saved_data["stride"] = stride;
}

Variable masked(AutogradContext* ctx, const Variable& grad) {
  if (!grad.defined()) {
    return {};
  }
  const auto stride = ctx->saved_data["stride"].toSymIntVector();
  return op::fake_quantize_affine_backward(grad, ctx->get_saved_variables()[0], stride);
}

} // namespace autograd
} // namespace qatfast
