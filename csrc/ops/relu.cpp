#include "checks.h"
#include "launchers.h"
#include "ops/autograd.h"
#include "ops/blocks.h"
#include "ops/mask.h"

#include <limits>

namespace qatfast {
namespace kernel {

Tensor relu(const Tensor& input, std::optional<double> limit) {
  return std::get<0>(relu_forward(input, limit));
}

std::tuple<Tensor, Tensor> relu_forward(const Tensor& input, std::optional<double> limit) {
  check_float("relu", "input", input.scalar_type());
  TORCH_CHECK_VALUE(!limit || *limit >= 0, "relu: expected limit to be at least 0, got ", *limit); // a NaN is not
  const auto from = as_blocks(input, {Granularity::per_tensor});
  const auto to = result_for(input, from);
  const auto mask = fresh_mask(input);
  QATFAST_ON(input, relu)(from, to, mask, limit.value_or(std::numeric_limits<double>::quiet_NaN()));
  return {laid_out_like(input, to, {Granularity::per_tensor}), mask};
}

} // namespace kernel

namespace autograd {
namespace {

struct ReLUNode : Function<ReLUNode> {
  static Variable forward(AutogradContext* ctx, const Variable& input, std::optional<double> limit) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, mask] = op::relu_forward(input, limit);
    save_mask(ctx, mask, output.sym_strides());
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {masked(ctx, grads[0]), Variable()};
  }
};

} // namespace

Tensor relu(const Tensor& input, std::optional<double> limit) {
  if (is_dual(input)) {
    const auto primal = primal_of(input);
    const auto y = relu(primal, limit);
    const auto mask = std::get<1>(op::relu_forward(primal.detach(), limit));
    return with_tangent(y, op::fake_quantize_affine_backward(input._fw_grad(/*level=*/0), mask, y.sym_strides()));
  }
  if (compute_requires_grad(input)) {
    return ReLUNode::apply(input, limit);
  }
  return op::relu.below_autograd(input, limit);
}

} // namespace autograd
} // namespace qatfast
