#include "checks.h"
#include "common/copy.h"
#include "launchers.h"
#include "ops/autograd.h"
#include "ops/blocks.h"
#include "ops/mask.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sparse_coo_tensor.h>
#include <ATen/ops/where.h>

namespace qatfast {
namespace kernel {
namespace {

Tensor run(MapLauncher* launcher, const Tensor& input, const StaticRange& range, const Tensor& mask) {
  const auto& [granularity, qparams] = range;
  const auto from = as_blocks(input, granularity);
  const auto to = result_for(input, from);
  launcher(from, to, mask, in_memory_order(qparams, from, granularity), layout_of(from, granularity));
  return laid_out_like(input, to, granularity);
}

} // namespace

Tensor fake_quantize_affine_backward(const Tensor& grad, const Tensor& mask, c10::SymIntArrayRef sym_stride) {
  constexpr auto op = "fake_quantize_affine_backward";
  const auto stride = C10_AS_INTARRAYREF_SLOW(sym_stride);
  check_float(op, "grad", grad.scalar_type());
  check_device(op, "mask", mask, grad);
  TORCH_CHECK_VALUE(
      mask.scalar_type() == at::kByte && mask.is_contiguous() && mask.sizes() == at::IntArrayRef({mask_bytes(grad)}),
      op, ": expected mask to be uint8 of shape (", mask_bytes(grad), ",), got ", name_of(mask.scalar_type()),
      " of shape ", tuple(mask.sizes()));
  TORCH_CHECK_VALUE(static_cast<int64_t>(stride.size()) == grad.dim(), op, ": expected ", grad.dim(), " strides, got ",
      tuple(stride));
  const auto to = with_few_page_faults(at::empty_strided(grad.sizes(), stride, grad.options()));
  TORCH_CHECK_VALUE(
      to.is_non_overlapping_and_dense(), op, ": expected the strides of a dense tensor, got ", tuple(stride));
  const bool same_order = grad.strides() == stride;
  QATFAST_ON(grad, fake_quantize_affine_backward)(same_order ? grad : copied(grad, to), mask, to);
  return to;
}

} // namespace kernel

namespace autograd {
namespace {

// The node of QATFAST_MAP: `Node` has the name of the operator and both of its forms.
template <class Node>
struct MapNode : Function<Node> {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& scale,
      const Variable& zero_point, int64_t quant_min, int64_t quant_max, at::IntArrayRef granularity) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, mask] = Node::with_mask(input, scale, zero_point, quant_min, quant_max, granularity);
    save_mask(ctx, mask, strides_of_mask(output, granularity));
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(6);
    result[0] = masked(ctx, grads[0]);
    return result;
  }
};

template <class Node>
Tensor map(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
    at::IntArrayRef granularity) {
  check_fixed(Node::op_name, scale);
  if (is_dual(input)) {
    const auto primal = primal_of(input);
    const auto y = map<Node>(primal, scale, zero_point, quant_min, quant_max, granularity);
    const auto mask =
        std::get<1>(Node::with_mask(primal.detach(), scale.detach(), zero_point, quant_min, quant_max, granularity));
    const auto stride = strides_of_mask(y, granularity);
    return with_tangent(y, op::fake_quantize_affine_backward(input._fw_grad(/*level=*/0), mask, stride));
  }
  if (compute_requires_grad(input)) {
    return Node::apply(input, scale.detach(), zero_point, quant_min, quant_max, granularity);
  }
  return Node::plain.below_autograd(input, scale, zero_point, quant_min, quant_max, granularity);
}

// The operator is linear in grad, so that its gradient is the same operator.
struct FakeQuantizeAffineBackwardNode : Function<FakeQuantizeAffineBackwardNode> {
  static Variable forward(
      AutogradContext* ctx, const Variable& grad, const Variable& mask, c10::SymIntArrayRef stride) {
    save_mask(ctx, mask, stride);
    at::AutoDispatchBelowADInplaceOrView below;
    return op::fake_quantize_affine_backward(grad, mask, stride);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {masked(ctx, grads[0]), Variable(), Variable()};
  }
};

// The backward of a sparse gradient, which gives a sparse one.
Tensor masked_sparse(const Tensor& grad, const Tensor& mask, c10::SymIntArrayRef stride) {
  const auto ones = at::ones_symint(grad.sym_sizes(), grad.options().layout(at::kStrided));
  const auto inside = op::fake_quantize_affine_backward(ones, mask, stride);
  const auto coalesced = grad.coalesce();
  c10::List<std::optional<Tensor>> places;
  for (const auto& index : coalesced.indices().unbind(0)) {
    places.push_back(index);
  }
  const auto values = at::where(inside.index(places) != 0, coalesced.values(), 0);
  return at::sparse_coo_tensor(coalesced.indices(), values, grad.sizes(), grad.options(), /*is_coalesced=*/true);
}

} // namespace

Tensor fake_quantize_affine_backward(const Tensor& grad, const Tensor& mask, c10::SymIntArrayRef stride) {
  if (grad.is_sparse()) {
    return masked_sparse(grad, mask, stride);
  }
  if (is_dual(grad)) {
    const auto tangent = op::fake_quantize_affine_backward(grad._fw_grad(/*level=*/0), mask, stride);
    return with_tangent(op::fake_quantize_affine_backward(primal_of(grad), mask, stride), tangent);
  }
  if (compute_requires_grad(grad)) {
    return FakeQuantizeAffineBackwardNode::apply(grad, mask, stride);
  }
  return op::fake_quantize_affine_backward.below_autograd(grad, mask, stride);
}

} // namespace autograd

#define QATFAST_MAP(name)                                                                                        \
  Tensor kernel::name(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,     \
      int64_t quant_max, at::IntArrayRef granularity) {                                                          \
    const auto range = checked_static_range(#name, input, scale, zero_point, quant_min, quant_max, granularity); \
    return run(QATFAST_ON(input, name), input, range, /*mask=*/{});                                              \
  }                                                                                                              \
  std::tuple<Tensor, Tensor> kernel::name##_forward(const Tensor& input, const Tensor& scale,                    \
      const Tensor& zero_point, int64_t quant_min, int64_t quant_max, at::IntArrayRef granularity) {             \
    const auto range = checked_static_range(#name, input, scale, zero_point, quant_min, quant_max, granularity); \
    const auto mask = fresh_mask(input);                                                                         \
    return {run(QATFAST_ON(input, name), input, range, mask), mask};                                             \
  }                                                                                                              \
  namespace autograd {                                                                                           \
  namespace {                                                                                                    \
  struct name##_node : MapNode<name##_node> {                                                                    \
    static constexpr const char* op_name = #name;                                                                \
    static constexpr auto plain = op::name;                                                                      \
    static constexpr auto with_mask = op::name##_forward;                                                        \
  };                                                                                                             \
  }                                                                                                              \
  }                                                                                                              \
  Tensor autograd::name(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,   \
      int64_t quant_max, at::IntArrayRef granularity) {                                                          \
    return map<name##_node>(input, scale, zero_point, quant_min, quant_max, granularity);                        \
  }
#include "operator_list.h"

} // namespace qatfast
