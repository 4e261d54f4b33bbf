#include "ops/autograd.h"

namespace qatfast::autograd {
namespace {

struct StraightThroughNode : Function<StraightThroughNode> {
  static Variable forward(AutogradContext* ctx, const Variable&, const Variable& value) {
    ctx->set_materialize_grads(false);
    return value.clone();
  }

  static variable_list backward(AutogradContext*, variable_list grads) {
    return {grads[0], Variable()};
  }
};

} // namespace

bool is_dual(const Tensor& x) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(x);
  const bool may_be = meta && (meta->is_view_ || meta->fw_grad_); // asking for the tangent takes a lock
  return may_be && x._fw_grad(/*level=*/0).defined();
}

Tensor primal_of(const Tensor& x) {
  return is_dual(x) ? x._fw_primal(/*level=*/0) : x;
}

const Tensor& with_tangent(const Tensor& y, const Tensor& tangent) {
  y._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
  return y;
}

void check_fixed(const char* op, const Tensor& scale) {
  constexpr auto cure = "; write fake_quantize_learned to train it, or scale.detach()";
  TORCH_CHECK_VALUE(!compute_requires_grad(scale), op, ": expected scale not to require grad, got one that does", cure);
  TORCH_CHECK_VALUE(!is_dual(scale), op, ": expected scale to have no tangent, got one that does", cure);
}

Tensor straight_through(const Tensor& x, const Tensor& value) {
  const auto y = StraightThroughNode::apply(primal_of(x), value);
  return is_dual(x) ? with_tangent(y, x._fw_grad(/*level=*/0).clone()) : y;
}

std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd_unless_needed(const Tensor& grad) {
  const bool needed = at::GradMode::is_enabled() || is_dual(grad);
  return needed ? std::nullopt : std::make_optional<at::AutoDispatchBelowADInplaceOrView>();
}

} // namespace qatfast::autograd
