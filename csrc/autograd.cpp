// One autograd Function for each differentiable operator. They call operators, never kernels, so that fake tensors,
// torch.compile and the profiler see everything, and so that gradients have gradients.
#include "integer_product.h"
#include "memory.h"
#include "ops.h"
#include "specs.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sparse_coo_tensor.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <vector>

namespace qatfast::autograd {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

namespace {

bool wants_gradient(const Tensor& x) {
  return at::GradMode::is_enabled() && x.requires_grad();
}

// Whether x has a tangent (forward-mode AD, which grad mode does not switch off).
bool is_dual(const Tensor& x) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(x);
  const bool may_be = meta && (meta->is_view_ || meta->fw_grad_); // to ask for the tangent takes a lock
  return may_be && x._fw_grad(/*level=*/0).defined();
}

// x without its tangent: torch::autograd::Function takes no duals.
Tensor primal_of(const Tensor& x) {
  return is_dual(x) ? x._fw_primal(/*level=*/0) : x;
}

// `tangent` is in memory of its own: a later write into y writes into it, too.
const Tensor& with_tangent(const Tensor& y, const Tensor& tangent) {
  y._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
  return y;
}

// A given scale gets no gradient, so one that waits for it is a mistake that nobody else would notice.
void check_fixed(const char* op, const Tensor& scale) {
  constexpr auto cure = "; write fake_quantize_learned to train it, or scale.detach()";
  TORCH_CHECK_VALUE(!wants_gradient(scale), op, ": expected scale not to require grad, got one that does", cure);
  TORCH_CHECK_VALUE(!is_dual(scale), op, ": expected scale to have no tangent, got one that does", cure);
}

// The range comes from the data itself: the gradient passes as it is, and nothing is kept.
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

// Linear in grad, so that its gradient is the same operator.
struct FakeQuantizeAffineBackwardNode : Function<FakeQuantizeAffineBackwardNode> {
  static Variable forward(
      AutogradContext* ctx, const Variable& grad, const Variable& mask, c10::SymIntArrayRef stride) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({mask});
    ctx->saved_data["stride"] = stride;
    at::AutoDispatchBelowADInplaceOrView below;
    return op::fake_quantize_affine_backward(grad, mask, stride);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(3);
    if (grads[0].defined()) {
      const auto stride = ctx->saved_data["stride"].toSymIntVector();
      result[0] = op::fake_quantize_affine_backward(grads[0], ctx->get_saved_variables()[0], stride);
    }
    return result;
  }
};

std::vector<c10::SymInt> contiguous_strides(c10::SymIntArrayRef sizes) {
  std::vector<c10::SymInt> strides(sizes.size(), 1);
  for (auto d = static_cast<int64_t>(sizes.size()) - 2; d >= 0; --d) {
    strides[d] = strides[d + 1] * sizes[d + 1].max(1);
  }
  return strides;
}

// The order of the mask's bits.
std::vector<c10::SymInt> strides_of_mask(const Tensor& output, at::IntArrayRef granularity) {
  const bool contiguous = takes_contiguous(output, {static_cast<Granularity::Kind>(granularity[0])});
  return contiguous ? contiguous_strides(output.sym_sizes()) : output.sym_strides().vec();
}

struct FakeQuantizeAffineNode : Function<FakeQuantizeAffineNode> {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& scale,
      const Variable& zero_point, int64_t quant_min, int64_t quant_max, at::IntArrayRef granularity) {
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, mask] =
        op::fake_quantize_affine_forward(input, scale, zero_point, quant_min, quant_max, granularity);
    ctx->save_for_backward({mask});
    ctx->saved_data["stride"] = strides_of_mask(output, granularity);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(6);
    if (grads[0].defined()) {
      const auto stride = ctx->saved_data["stride"].toSymIntVector();
      result[0] = op::fake_quantize_affine_backward(grads[0], ctx->get_saved_variables()[0], stride);
    }
    return result;
  }
};

// `value`, with the gradient of `x`: what a quantized copy is to its original.
struct StraightThroughNode : Function<StraightThroughNode> {
  static Variable forward(AutogradContext* ctx, const Variable&, const Variable& value) {
    ctx->set_materialize_grads(false);
    return value.clone();
  }

  static variable_list backward(AutogradContext*, variable_list grads) {
    return {grads[0], Variable()};
  }
};

Tensor straight_through(const Tensor& x, const Tensor& value) {
  const auto y = StraightThroughNode::apply(primal_of(x), value);
  return is_dual(x) ? with_tangent(y, x._fw_grad(/*level=*/0).clone()) : y;
}

// A backward that nobody differentiates skips the autograd keys of its operators: 4 % of a small layer's step.
std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd_unless_needed(const Tensor& grad) {
  const bool needed = at::GradMode::is_enabled() || is_dual(grad);
  return needed ? std::nullopt : std::make_optional<at::AutoDispatchBelowADInplaceOrView>();
}

// A gradient may be sparse: that of a table of embeddings is.
Tensor as_dense(const Tensor& grad) {
  return grad.is_sparse() ? grad.to_dense() : grad;
}

// (..., features) as (rows, features).
Tensor as_rows(const Tensor& x) {
  return x.dim() == 2 ? x : x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2);
}

// dy.T @ x_hat; a large one in large pages, by an operator that has no gradient of its own.
Tensor weight_gradient(const Tensor& dy, const Tensor& x_hat, bool is_differentiated) {
  const auto bytes = dy.sym_size(1) * x_hat.sym_size(1) * dy.element_size();
  if (is_differentiated || !dy.is_cpu() || bytes < static_cast<int64_t>(large_bytes)) {
    return at::mm(dy.t(), x_hat);
  }
  return op::qat_linear_grad_weight(dy, x_hat);
}

// x itself if the code leaves it in float.
Tensor fake_quantized(const Tensor& x, at::IntArrayRef code) {
  const auto spec = spec_of(code);
  if (!spec) {
    return x;
  }
  return op::fake_quantize(x, spec->num_bits, spec->symmetric, code.slice(2), spec->narrow_range);
}

// dx = dy @ w_hat, dw = dy.T @ x_hat, db = dy.sum(0); the engine casts them to the dtypes of their tensors.
// Kept: the input and the weight themselves, as nn.Linear does, and w_hat. x_hat is made again.
struct QATLinearNode : Function<QATLinearNode> {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight,
      const std::optional<Variable>& bias, at::IntArrayRef specs, std::optional<at::ScalarType> dtype) {
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, weight_hat] = op::qat_linear_forward(input, weight, bias, specs, dtype);
    const auto kept_if = [](bool wanted, const Variable& x) {
      return wanted ? x : Variable();
    };
    variable_list kept = {kept_if(weight.requires_grad(), input), kept_if(input.requires_grad(), weight),
        kept_if(input.requires_grad() && spec_of(code_of(specs, Role::weight)), weight_hat)};
    if (bias) {
      kept.emplace_back(); // nothing to keep of it but that there is one
    }
    ctx->save_for_backward(std::move(kept));
    if (spec_of(code_of(specs, Role::input))) {
      ctx->saved_data["input_spec"] = code_of(specs, Role::input);
    }
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(5);
    if (!grads[0].defined()) {
      return result;
    }
    const auto saved = ctx->get_saved_variables(); // may run hooks, which need autograd
    const auto grad = as_dense(grads[0]);
    const auto below = below_autograd_unless_needed(grad);
    const auto dy = as_rows(grad);
    if (ctx->needs_input_grad(0)) {
      const auto w_hat = quantized_weight(saved[1], saved[2], dy.scalar_type());
      result[0] = grad.dim() == 2 ? at::mm(dy, w_hat) : at::matmul(grad, w_hat);
    }
    if (ctx->needs_input_grad(1)) {
      const auto x_hat = as_rows(as_dtype(quantized_input(ctx, saved[0]), dy.scalar_type()));
      result[1] = weight_gradient(dy, x_hat, !below);
    }
    const bool has_bias = saved.size() == 4;
    if (has_bias && ctx->needs_input_grad(2)) {
      result[2] = dy.sum(0);
    }
    return result;
  }

 private:
  static Tensor quantized_input(AutogradContext* ctx, const Tensor& input) {
    if (ctx->saved_data.empty()) {
      return input;
    }
    return fake_quantized(input, ctx->saved_data["input_spec"].toIntVector());
  }

  // Where gradients need gradients, those of w_hat reach the weight.
  static Tensor quantized_weight(const Tensor& weight, const Tensor& weight_hat, at::ScalarType dtype) {
    if (!weight_hat.defined()) {
      return as_dtype(weight, dtype);
    }
    return as_dtype(wants_gradient(weight) ? straight_through(weight, weight_hat) : weight_hat, dtype);
  }
};

// `value` with the gradient of input `index` of the node that runs now, of which no more is kept than its place in the
// graph: a variable without elements stands there.
Tensor in_place_of_input(const Tensor& value, uint32_t index) {
  const auto stand_in = at::empty({0}, value.options());
  torch::autograd::impl::set_gradient_edge(stand_in, torch::autograd::get_current_node()->next_edge(index));
  return straight_through(stand_in, value);
}

// The same layer on integers, with the same gradients. Kept: the input's integers, from which x_hat is made again, and
// the weight itself, from which w_hat is.
struct QATLinearIntegersNode : Function<QATLinearIntegersNode> {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight,
      const std::optional<Variable>& bias, at::TensorList weight_integers, at::IntArrayRef specs,
      std::optional<at::ScalarType> dtype) {
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, values, scale, zero_point] =
        op::qat_linear_integers_forward(input, weight, bias, weight_integers, specs, dtype);
    const bool needs_input = weight.requires_grad();
    const auto kept_if = [](bool wanted, const Variable& x) {
      return wanted ? x : Variable();
    };
    variable_list kept = {kept_if(needs_input, values), kept_if(needs_input, scale), kept_if(needs_input, zero_point),
        kept_if(input.requires_grad(), weight)};
    if (bias) {
      kept.emplace_back(); // nothing to keep of it but that there is one
    }
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["weight_spec"] = code_of(specs, Role::weight);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(9); // the weight's integers, given or not, have places
    if (!grads[0].defined()) {
      return result;
    }
    const auto saved = ctx->get_saved_variables(); // may run hooks, which need autograd
    const auto grad = as_dense(grads[0]);
    const auto below = below_autograd_unless_needed(grad);
    const auto& values = saved[0];
    const auto& weight = saved[3];
    const auto dy = as_rows(grad);
    const bool needs_input = ctx->needs_input_grad(0), needs_weight = ctx->needs_input_grad(1);
    const auto spec = ctx->saved_data["weight_spec"].toIntVector();
    if (below && needs_input && needs_weight) {
      const auto [dx, dw] = op::qat_linear_integers_backward(dy, values, saved[1], saved[2], weight, spec);
      result[0] = grad.dim() == 2 ? dx : dx.view_symint(shape_of_input(grad, weight));
      result[1] = dw;
    } else {
      const auto dtype = dy.scalar_type();
      if (needs_weight) {
        auto x_hat = op::qat_linear_input(values, saved[1], saved[2], dtype);
        if (!below && weight.defined()) { // the input requires grad, whether or not this task asks for its gradient
          x_hat = as_rows(in_place_of_input(x_hat.view_symint(shape_of_input(grad, weight)), 0));
        }
        result[1] = weight_gradient(dy, x_hat, !below);
      }
      if (needs_input) {
        result[0] = at::matmul(grad, as_dtype(fake_quantized(weight, spec), dtype));
      }
    }
    const bool has_bias = saved.size() == 5;
    if (has_bias && ctx->needs_input_grad(2)) {
      result[2] = dy.sum(0);
    }
    return result;
  }

 private:
  static std::vector<c10::SymInt> shape_of_input(const Tensor& dy, const Tensor& weight) {
    auto shape = dy.sym_sizes().vec();
    shape.back() = weight.sym_size(1);
    return shape;
  }
};

// fake_quantize_affine_backward of a sparse gradient, as a sparse one.
Tensor of_sparse(const Tensor& grad, const Tensor& mask, c10::SymIntArrayRef stride) {
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

bool any_dual(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  return is_dual(input) || is_dual(weight) || (bias && is_dual(*bias));
}

// `value`, which a layer gives, with the derivatives of its product on floats: of every order, in both modes.
Tensor with_derivatives_of_product(const Tensor& value, const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias, at::IntArrayRef specs) {
  const auto hat = [&](const Tensor& x, Role role) {
    return as_dtype(fake_quantized(x, code_of(specs, role)), value.scalar_type());
  };
  const auto b_hat = bias ? std::optional<Tensor>(hat(*bias, Role::bias)) : std::nullopt;
  return straight_through(at::linear(hat(input, Role::input), hat(weight, Role::weight), b_hat), value);
}

} // namespace

Tensor fake_quantize(
    const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range) {
  if (is_dual(input)) {
    const auto y = fake_quantize(primal_of(input), num_bits, symmetric, granularity, narrow_range);
    return with_tangent(y, input._fw_grad(/*level=*/0).clone());
  }
  if (wants_gradient(input)) {
    return FakeQuantizeNode::apply(input, num_bits, symmetric, granularity, narrow_range);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return op::fake_quantize(input, num_bits, symmetric, granularity, narrow_range);
}

Tensor fake_quantize_affine(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, at::IntArrayRef granularity) {
  check_fixed("fake_quantize_affine", scale);
  if (is_dual(input)) {
    const auto primal = primal_of(input);
    const auto y = fake_quantize_affine(primal, scale, zero_point, quant_min, quant_max, granularity);
    const auto mask = std::get<1>(op::fake_quantize_affine_forward(
        primal.detach(), scale.detach(), zero_point, quant_min, quant_max, granularity));
    const auto stride = strides_of_mask(y, granularity);
    return with_tangent(y, op::fake_quantize_affine_backward(input._fw_grad(/*level=*/0), mask, stride));
  }
  if (wants_gradient(input)) {
    return FakeQuantizeAffineNode::apply(input, scale.detach(), zero_point, quant_min, quant_max, granularity);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return op::fake_quantize_affine(input, scale, zero_point, quant_min, quant_max, granularity);
}

Tensor fake_quantize_affine_backward(const Tensor& grad, const Tensor& mask, c10::SymIntArrayRef stride) {
  if (grad.is_sparse()) {
    return of_sparse(grad, mask, stride);
  }
  if (is_dual(grad)) {
    const auto tangent = op::fake_quantize_affine_backward(grad._fw_grad(/*level=*/0), mask, stride);
    return with_tangent(op::fake_quantize_affine_backward(primal_of(grad), mask, stride), tangent);
  }
  if (wants_gradient(grad)) {
    return FakeQuantizeAffineBackwardNode::apply(grad, mask, stride);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return op::fake_quantize_affine_backward(grad, mask, stride);
}

// Scales, zero points and integers never require grad.

std::tuple<Tensor, Tensor> choose_qparams(
    const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range) {
  at::AutoDispatchBelowADInplaceOrView below;
  return op::choose_qparams(input, num_bits, symmetric, granularity, narrow_range);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qat_linear_weight(const Tensor& weight, at::IntArrayRef weight_spec) {
  at::AutoDispatchBelowADInplaceOrView below;
  return op::qat_linear_weight(weight, weight_spec);
}

Tensor quantize(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, at::IntArrayRef granularity) {
  at::AutoDispatchBelowADInplaceOrView below;
  return op::quantize(input, scale, zero_point, quant_min, quant_max, granularity);
}

Tensor dequantize(const Tensor& input, const Tensor& scale, const Tensor& zero_point, at::IntArrayRef granularity,
    at::ScalarType dtype) {
  check_fixed("dequantize", scale);
  at::AutoDispatchBelowADInplaceOrView below;
  return op::dequantize(input, scale, zero_point, granularity, dtype);
}

Tensor qat_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef specs,
    std::optional<at::ScalarType> dtype) {
  if (any_dual(input, weight, bias)) {
    const auto y = [&] {
      at::AutoDispatchBelowADInplaceOrView below;
      return op::qat_linear(input, weight, bias, specs, dtype);
    }();
    return with_derivatives_of_product(y, input, weight, bias, specs);
  }
  if (wants_gradient(input) || wants_gradient(weight) || (bias && wants_gradient(*bias))) {
    if (multiplies_integers(weight, specs)) {
      return QATLinearIntegersNode::apply(input, weight, bias, at::TensorList(), specs, dtype);
    }
    return QATLinearNode::apply(input, weight, bias, specs, dtype);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return op::qat_linear(input, weight, bias, specs, dtype);
}

Tensor qat_linear_integers(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::TensorList weight_integers, at::IntArrayRef specs, std::optional<at::ScalarType> dtype) {
  if (any_dual(input, weight, bias)) {
    const auto y = [&] {
      at::AutoDispatchBelowADInplaceOrView below;
      return op::qat_linear_integers(input, weight, bias, weight_integers, specs, dtype);
    }();
    return with_derivatives_of_product(y, input, weight, bias, specs);
  }
  if (wants_gradient(input) || wants_gradient(weight) || (bias && wants_gradient(*bias))) {
    return QATLinearIntegersNode::apply(input, weight, bias, weight_integers, specs, dtype);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return op::qat_linear_integers(input, weight, bias, weight_integers, specs, dtype);
}

namespace {

// The dtype of the product under autocast; none where a tensor is float64, which autocast leaves alone.
std::optional<at::ScalarType> product_dtype(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const auto is_castable = [](const Tensor& x) {
    return x.is_floating_point() && x.scalar_type() != at::kDouble;
  };
  if (!is_castable(input) || !is_castable(weight) || (bias && !is_castable(*bias))) {
    return std::nullopt;
  }
  return at::autocast::get_autocast_dtype(input.device().type());
}

} // namespace

// The quantizers see the tensors as they are; what they give is cast for the product. An input that stays in float is
// cast here, so that backward keeps it in the smaller type.
Tensor qat_linear_under_autocast(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::IntArrayRef specs, std::optional<at::ScalarType> dtype) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto product = product_dtype(input, weight, bias);
  const auto x = product && specs.size() == 4 * code_size && !spec_of(code_of(specs, Role::input))
      ? at::autocast::cached_cast(*product, input, input.device().type())
      : input;
  return op::qat_linear(x, weight, bias, specs, product ? product : dtype);
}

Tensor qat_linear_integers_under_autocast(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::TensorList weight_integers, at::IntArrayRef specs, std::optional<at::ScalarType> dtype) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto product = product_dtype(input, weight, bias);
  return op::qat_linear_integers(input, weight, bias, weight_integers, specs, product ? product : dtype);
}

} // namespace qatfast::autograd
