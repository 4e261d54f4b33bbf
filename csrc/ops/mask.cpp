#include "ops/mask.h"

#include "common/memory.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <cstring>

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

// Whether the mask has no zeros, as far as it can be read: not on a GPU, where that waits, and not while values do not
// exist or a graph is recorded. (Bits past the end are zeros.)
bool passes_everywhere(const Tensor& mask) {
  using c10::impl::TorchDispatchModeKey;
  using c10::impl::TorchDispatchModeTLS;
  const bool is_plain = mask.is_cpu() && mask.has_storage() && !mask.unsafeGetTensorImpl()->is_python_dispatch() &&
      !mask.key_set().has(c10::DispatchKey::Functionalize) &&
      !TorchDispatchModeTLS::get_mode(TorchDispatchModeKey::FAKE) &&
      !TorchDispatchModeTLS::get_mode(TorchDispatchModeKey::PROXY);
  if (!is_plain || mask.numel() == 0) {
    return false;
  }
  const auto* bytes = mask.const_data_ptr<uint8_t>();
  return bytes[0] == 0xFF && std::memcmp(bytes, bytes + 1, mask.numel() - 1) == 0; // each equals the next
}

} // namespace

std::vector<c10::SymInt> strides_of_mask(const Tensor& output, at::IntArrayRef granularity) {
  const bool contiguous = needs_contiguous(output, {static_cast<Granularity::Kind>(granularity[0])});
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
  const auto mask = ctx->get_saved_variables()[0];
  if (passes_everywhere(mask)) {
    return grad;
  }
  return op::fake_quantize_affine_backward(grad, mask, ctx->saved_data["stride"].toSymIntVector());
}

} // namespace autograd
} // namespace qatfast
