// The layer on floats. A layer whose config allows it multiplies int8: qat_linear_int8.cpp.
#include "checks.h"
#include "launchers.h"
#include "ops/int8_gemm.h"
#include "ops/qat_linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/SmallVector.h>

#include <string>

namespace qatfast {

std::tuple<Tensor, Tensor> kernel::qat_linear_forward(const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias, at::IntArrayRef codes, std::optional<at::ScalarType> dtype) {
  constexpr auto op = "qat_linear";
  check_linear(op, input, weight, bias, dtype.has_value());
  const auto specs = checked_specs(op, codes);
  const auto product_dtype = dtype.value_or(input.scalar_type());

  auto x_hat = input;
  if (const auto& spec = specs.input) {
    check_blocks("qat_linear: input", input, spec->granularity);
    x_hat = fake_quantized(input, *spec);
  }
  c10::SmallVector<FakeQuantizeTask, 2> parameters;
  const auto add_parameter = [&](const char* name, const Tensor& value, const std::optional<QuantSpec>& spec) {
    if (!spec) {
      return value;
    }
    check_blocks(std::string("qat_linear: ") + name, value, spec->granularity);
    const auto from = as_blocks(value, spec->granularity);
    const auto to = rounds_to(from, product_dtype) ? fresh_like(from, product_dtype) : result_for(value, from);
    return parameters.emplace_back(FakeQuantizeTask{from, to, *spec}).to;
  };
  const auto w_hat = add_parameter("weight", weight, specs.weight);
  const auto b_hat = bias ? add_parameter("bias", *bias, specs.bias) : Tensor();
  QATFAST_ON(input, qat_linear)(parameters);

  const auto w_product = as_dtype(w_hat, product_dtype);
  const auto b_product = bias ? std::optional<Tensor>(as_dtype(b_hat, product_dtype)) : std::nullopt;
  auto y = at::linear(as_dtype(x_hat, product_dtype), w_product, b_product);
  if (const auto& spec = specs.output) {
    check_blocks("qat_linear: output", y, spec->granularity);
    y = as_blocks(y, spec->granularity);
    QATFAST_ON(y, fake_quantize)({y, y, *spec});
  }
  return {y, specs.weight ? w_product : at::empty({0}, w_product.options())};
}

Tensor kernel::qat_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::IntArrayRef specs, std::optional<at::ScalarType> dtype) {
  if (uses_int8_gemm(weight, specs)) {
    return qat_linear_int8(input, weight, bias, {}, specs, dtype);
  }
  return std::get<0>(qat_linear_forward(input, weight, bias, specs, dtype));
}

// The result is in memory of large pages, which at::mm would not ask for.
Tensor kernel::qat_linear_grad_weight(const Tensor& grad, const Tensor& input) {
  TORCH_CHECK_VALUE(grad.dim() == 2 && input.dim() == 2 && grad.size(0) == input.size(0),
      "qat_linear_grad_weight: expected the gradient and input of one layer, got ", tuple(grad.sizes()), ", ",
      tuple(input.sizes()));
  auto dw = fresh({grad.size(1), input.size(1)}, grad.scalar_type(), grad);
  return at::mm_out(dw, grad.t(), input);
}

namespace autograd {

Tensor as_dense(const Tensor& grad) {
  return grad.is_sparse() ? grad.to_dense() : grad;
}

Tensor as_rows(const Tensor& x) {
  return x.dim() == 2 ? x : x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2);
}

Tensor weight_gradient(const Tensor& dy, const Tensor& x_hat, bool is_differentiated) {
  const auto bytes = dy.sym_size(1) * x_hat.sym_size(1) * dy.element_size();
  if (is_differentiated || !dy.is_cpu() || bytes < static_cast<int64_t>(large_bytes)) {
    return at::mm(dy.t(), x_hat);
  }
  return op::qat_linear_grad_weight(dy, x_hat);
}

Tensor fake_quantized(const Tensor& x, at::IntArrayRef code) {
  const auto spec = LinearSpecs::decoded(code);
  if (!spec) {
    return x;
  }
  return op::fake_quantize(x, spec->num_bits, spec->symmetric, code.slice(2), spec->narrow_range);
}

bool is_any_dual(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  return is_dual(input) || is_dual(weight) || (bias && is_dual(*bias));
}

Tensor with_derivatives_of_product(const Tensor& value, const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias, at::IntArrayRef specs) {
  const auto hat = [&](const Tensor& x, LinearSpecs::Role role) {
    return as_dtype(fake_quantized(x, LinearSpecs::code_of(specs, role)), value.scalar_type());
  };
  const auto b_hat = bias ? std::optional<Tensor>(hat(*bias, LinearSpecs::bias_role)) : std::nullopt;
  const auto y = at::linear(hat(input, LinearSpecs::input_role), hat(weight, LinearSpecs::weight_role), b_hat);
  return straight_through(y, value);
}

namespace {

// dx = dy @ w_hat, dw = dy.T @ x_hat, db = dy.sum(0); the engine casts them to the dtypes of their tensors.
// Kept: the input and the weight themselves, as nn.Linear does, and w_hat. x_hat is computed again.
struct QATLinearNode : Function<QATLinearNode> {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight,
      const std::optional<Variable>& bias, at::IntArrayRef specs, std::optional<at::ScalarType> dtype) {
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, weight_hat] = op::qat_linear_forward(input, weight, bias, specs, dtype);
    const bool is_weight_quantized =
        LinearSpecs::decoded(LinearSpecs::code_of(specs, LinearSpecs::weight_role)).has_value();
    variable_list kept = {kept_if(weight.requires_grad(), input), kept_if(input.requires_grad(), weight),
        kept_if(input.requires_grad() && is_weight_quantized, weight_hat)};
    if (bias) {
      kept.emplace_back(); // nothing is kept of it but that there is one
    }
    ctx->save_for_backward(std::move(kept));
    const auto input_code = LinearSpecs::code_of(specs, LinearSpecs::input_role);
    if (LinearSpecs::decoded(input_code)) {
      ctx->saved_data["input_spec"] = input_code;
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

  // If gradients need gradients, those of w_hat reach the weight.
  static Tensor quantized_weight(const Tensor& weight, const Tensor& weight_hat, at::ScalarType dtype) {
    if (!weight_hat.defined()) {
      return as_dtype(weight, dtype);
    }
    return as_dtype(compute_requires_grad(weight) ? straight_through(weight, weight_hat) : weight_hat, dtype);
  }
};

} // namespace

Tensor qat_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef specs,
    std::optional<at::ScalarType> dtype) {
  if (is_any_dual(input, weight, bias)) {
    const auto y = op::qat_linear.below_autograd(input, weight, bias, specs, dtype);
    return with_derivatives_of_product(y, input, weight, bias, specs);
  }
  if (compute_requires_grad(input, weight, bias)) {
    if (uses_int8_gemm(weight, specs)) {
      return qat_linear_int8(input, weight, bias, {}, specs, dtype);
    }
    return QATLinearNode::apply(input, weight, bias, specs, dtype);
  }
  return op::qat_linear.below_autograd(input, weight, bias, specs, dtype);
}

} // namespace autograd

std::optional<at::ScalarType> autocast::product_dtype(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const auto is_castable = [](const Tensor& x) {
    return x.is_floating_point() && x.scalar_type() != at::kDouble;
  };
  if (!is_castable(input) || !is_castable(weight) || (bias && !is_castable(*bias))) {
    return std::nullopt;
  }
  return at::autocast::get_autocast_dtype(input.device().type());
}

// The quantizers see the tensors unchanged, and their results are cast for the product. An input that stays in float is
// cast here, so that backward keeps it in the smaller dtype.
Tensor autocast::qat_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::IntArrayRef specs, std::optional<at::ScalarType> dtype) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto product = product_dtype(input, weight, bias);
  const bool is_float =
      specs.size() == LinearSpecs::size && !LinearSpecs::decoded(LinearSpecs::code_of(specs, LinearSpecs::input_role));
  const auto x = product && is_float ? at::autocast::cached_cast(*product, input, input.device().type()) : input;
  return op::qat_linear(x, weight, bias, specs, product ? product : dtype);
}

} // namespace qatfast
