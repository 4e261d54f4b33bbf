#include "checks.h"
#include "ops/autograd.h"
#include "ops/blocks.h"

namespace qatfast {

Tensor kernel::fake_quantize(
    const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range) {
  constexpr auto op = "fake_quantize";
  const auto spec = checked_spec(op, num_bits, symmetric, granularity, narrow_range);
  check_float(op, "input", input.scalar_type());
  check_blocks(op, input, spec.granularity);
  return fake_quantized(input, spec);
}

namespace autograd {
namespace {

// The range comes from the data itself: the gradient passes unchanged, and nothing is kept.
struct FakeQuantizeNode : Function<FakeQuantizeNode> {
  static Variable forward(AutogradContext* ctx, const Variable& input, int64_t num_bits, bool symmetric,
      at::IntArrayRef granularity, bool narrow_range) {
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView below;
    return op::fake_quantize(input, num_bits, symmetric, granularity, narrow_range);
  }

  static variable_list backward(AutogradContext*, variable_list grads) {
    return {grads[0], Variable(), Variable(), Variable(), Variable()};
  }
};

} // namespace

Tensor fake_quantize(
    const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range) {
  if (is_dual(input)) {
    const auto y = fake_quantize(primal_of(input), num_bits, symmetric, granularity, narrow_range);
    return with_tangent(y, input._fw_grad(/*level=*/0).clone());
  }
  if (compute_requires_grad(input)) {
    return FakeQuantizeNode::apply(input, num_bits, symmetric, granularity, narrow_range);
  }
  return op::fake_quantize.below_autograd(input, num_bits, symmetric, granularity, narrow_range);
}

} // namespace autograd
} // namespace qatfast
