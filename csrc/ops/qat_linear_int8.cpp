// The layer on int8, with the gradients of the layer on floats.
#include "ops/qat_linear_int8.h"

#include "checks.h"
#include "common/copy.h"
#include "launchers.h"
#include "ops/int8_gemm.h"
#include "ops/mask.h"
#include "ops/qat_linear.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace qatfast {
namespace kernel {
namespace {

QuantSpec checked_weight_spec(const char* op, const Tensor& weight, at::IntArrayRef code) {
  const auto spec = checked_spec(op, code);
  TORCH_CHECK_VALUE(weight.dim() == 2 && spec && is_int8_weight(*spec, weight.size(1)), op,
      ": expected a weight spec of at most 8 bits per tensor or per row, got ", tuple(code), " for shape ",
      tuple(weight.sizes()));
  return *spec;
}

Int8Rows quantized_weight(const Tensor& weight, at::IntArrayRef code, Allocation allocation) {
  return quantize_rows(weight, checked_weight_spec("qat_linear", weight, code), allocation);
}

// Whether the four tensors are Int8Rows of this shape.
bool are_int8_rows(at::TensorList tensors, at::IntArrayRef shape, at::ScalarType scale_dtype) {
  const auto &values = tensors[0], &scale = tensors[1], &zero_point = tensors[2], &level_sums = tensors[3];
  return values.scalar_type() == at::kChar && values.sizes() == shape && values.is_contiguous() &&
      is_vector(scale, scale_dtype, shape[0]) && is_vector(zero_point, at::kInt, shape[0]) &&
      is_vector(level_sums, at::kLong, shape[0]);
}

Int8Rows checked_int8_weight(at::TensorList int8_weight, const Tensor& weight) {
  TORCH_CHECK_VALUE(int8_weight.size() == 4, "qat_linear: expected the 4 tensors of qat_linear_int8_weight, got ",
      int8_weight.size());
  for (const auto& tensor : int8_weight) {
    check_device("qat_linear", "int8_weight", tensor, weight);
  }
  TORCH_CHECK_VALUE(are_int8_rows(int8_weight, weight.sizes(), at::toOpMathType(weight.scalar_type())),
      "qat_linear: expected int8_weight as qat_linear_int8_weight returns it for this weight");
  return {int8_weight[0], int8_weight[1], int8_weight[2], int8_weight[3]};
}

// `int8_weight` is empty if the weight is quantized here.
std::tuple<Tensor, Int8Rows> run(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::TensorList int8_weight, at::IntArrayRef codes, std::optional<at::ScalarType> dtype,
    Allocation input_allocation) {
  constexpr auto op = "qat_linear";
  check_linear(op, input, weight, bias, dtype.has_value());
  const auto specs = checked_specs(op, codes);
  TORCH_CHECK_VALUE(specs.input && is_int8_input(*specs.input), op,
      ": expected an input spec of at most 8 bits per tensor or per token, got ",
      tuple(LinearSpecs::code_of(codes, LinearSpecs::input_role)));
  const auto product_dtype = dtype.value_or(input.scalar_type());
  const auto opmath_dtype = at::toOpMathType(input.scalar_type());

  const auto weight_code = LinearSpecs::code_of(codes, LinearSpecs::weight_role);
  const auto w = int8_weight.empty() ? quantized_weight(weight, weight_code, Allocation::shared)
                                     : checked_int8_weight(int8_weight, weight);
  at::DimVector shape(input.sizes());
  shape.back() = weight.size(0);
  const auto rows = c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));
  const auto matrix = input.dim() == 2 ? input : input.reshape({rows, input.size(-1)});
  const auto x = quantize_rows(matrix, *specs.input, input_allocation);
  Tensor b_hat;
  if (bias) {
    if (specs.bias) {
      check_blocks("qat_linear: bias", *bias, specs.bias->granularity);
    }
    b_hat = as_dtype(specs.bias ? fake_quantized(*bias, *specs.bias) : *bias, opmath_dtype).contiguous();
  }
  auto y = int8_gemm(x, w, b_hat, specs.output ? opmath_dtype : product_dtype).view(shape);
  if (specs.output) {
    check_blocks("qat_linear: output", y, specs.output->granularity);
    const auto to = rounds_to(y, product_dtype) ? fresh(y.sizes(), product_dtype, y) : y;
    QATFAST_ON(y, fake_quantize)({y, to, *specs.output});
    y = as_dtype(to, product_dtype);
  }
  return {y, x};
}

std::optional<QParams> static_qparams(const char* op, const Tensor& x, const QuantSpec& spec,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& zero_point) {
  if (!scale) {
    return std::nullopt;
  }
  TORCH_CHECK_VALUE(zero_point, op, ": expected a zero point for the given scale");
  return checked_qparams(
      op, x, *scale, *zero_point, spec.quant_min(), spec.quant_max(), spec.granularity, x.scalar_type(), "input");
}

// The layer with static ranges; `mask` is undefined if it is not needed.
std::tuple<Tensor, Int8Rows> run_static(const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias_hat, at::TensorList int8_weight, const std::optional<Tensor>& input_scale,
    const std::optional<Tensor>& input_zero_point, const std::optional<Tensor>& weight_scale,
    const std::optional<Tensor>& weight_zero_point, at::IntArrayRef codes, const Tensor& mask) {
  constexpr auto op = "qat_linear";
  check_linear(op, input, weight, bias_hat, /*mixed_dtypes=*/false);
  const auto specs = checked_specs(op, codes);
  TORCH_CHECK_VALUE(uses_int8_gemm(weight, codes), op, ": expected specs of an int8 GEMM, got ", tuple(codes));
  TORCH_CHECK_VALUE(!mask.defined() || specs.input->granularity.kind == Granularity::per_tensor, op,
      ": expected an input spec per tensor where a gradient is required, got ", name_of(specs.input->granularity));
  const auto rows = c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));
  const auto matrix = contiguous(input.dim() == 2 ? input : input.reshape({rows, input.size(-1)}));
  const auto grid = static_qparams(op, input, *specs.input, input_scale, input_zero_point);
  const auto x = quantize_rows(matrix, *specs.input, mask.defined() ? Allocation::separate : Allocation::shared, grid);
  if (mask.defined()) {
    cpu::inside(matrix, mask, *grid);
  }
  const auto w = int8_weight.empty() ? quantize_rows(weight, *specs.weight, Allocation::shared,
                                           static_qparams(op, weight, *specs.weight, weight_scale, weight_zero_point))
                                     : checked_int8_weight(int8_weight, weight);
  const auto opmath_dtype = at::toOpMathType(input.scalar_type());
  const auto b_hat = bias_hat ? as_dtype(*bias_hat, opmath_dtype).contiguous() : Tensor();
  at::DimVector shape(input.sizes());
  shape.back() = weight.size(0);
  const auto y = int8_gemm(x, w, b_hat, opmath_dtype);
  return {input.dim() == 2 ? y : y.view(shape), x};
}

} // namespace

Tensor qat_linear_int8_static(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias_hat,
    at::TensorList int8_weight, const std::optional<Tensor>& input_scale, const std::optional<Tensor>& input_zero_point,
    const std::optional<Tensor>& weight_scale, const std::optional<Tensor>& weight_zero_point, at::IntArrayRef specs) {
  return std::get<0>(run_static(input, weight, bias_hat, int8_weight, input_scale, input_zero_point, weight_scale,
      weight_zero_point, specs, /*mask=*/{}));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> qat_linear_int8_static_forward(const Tensor& input,
    const Tensor& weight, const std::optional<Tensor>& bias_hat, at::TensorList int8_weight, const Tensor& input_scale,
    const Tensor& input_zero_point, at::IntArrayRef specs) {
  const auto mask = fresh_mask(input);
  const auto [y, x] = run_static(
      input, weight, bias_hat, int8_weight, input_scale, input_zero_point, std::nullopt, std::nullopt, specs, mask);
  return {y, mask, x.values, x.scale, x.zero_point};
}

std::tuple<Tensor, Tensor> qat_linear_int8_static_backward(const Tensor& grad, const Tensor& mask, const Tensor& values,
    const Tensor& scale, const Tensor& zero_point, const Tensor& weight, at::IntArrayRef weight_spec) {
  const auto gradients = qat_linear_int8_backward(grad, values, scale, zero_point, weight, weight_spec);
  const auto& dx = std::get<0>(gradients);
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kByte && mask.is_contiguous() && mask.numel() == mask_bytes(dx),
      "qat_linear_int8_static_backward: expected the mask of the layer's forward");
  QATFAST_ON(dx, fake_quantize_affine_backward)(dx, mask, dx);
  return gradients;
}

Tensor qat_linear_int8(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::TensorList int8_weight, at::IntArrayRef specs, std::optional<at::ScalarType> dtype) {
  return std::get<0>(run(input, weight, bias, int8_weight, specs, dtype, Allocation::shared));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qat_linear_int8_forward(const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias, at::TensorList int8_weight, at::IntArrayRef specs,
    std::optional<at::ScalarType> dtype) {
  const auto [y, x] = run(input, weight, bias, int8_weight, specs, dtype, Allocation::separate);
  return {y, x.values, x.scale, x.zero_point};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qat_linear_int8_weight(const Tensor& weight, at::IntArrayRef weight_spec) {
  check_float("qat_linear", "weight", weight.scalar_type());
  const auto rows = quantized_weight(weight, weight_spec, Allocation::separate);
  return {rows.values, rows.scale, rows.zero_point, rows.level_sums};
}

// A row that held a NaN is NaN.
Tensor qat_linear_int8_input(
    const Tensor& values, const Tensor& scale, const Tensor& zero_point, at::ScalarType dtype) {
  constexpr auto op = "qat_linear_int8_input";
  const auto rows = values.dim() == 2 ? values.size(0) : -1;
  TORCH_CHECK_VALUE(rows >= 0 && values.scalar_type() == at::kChar && values.is_contiguous() &&
          is_vector(scale, at::toOpMathType(dtype), rows) && is_vector(zero_point, at::kInt, rows),
      op, ": expected the values, scale and zero_point of the layer's forward");
  check_device(op, "scale", scale, values);
  check_device(op, "zero_point", zero_point, values);
  const auto to = fresh(values.sizes(), dtype, values);
  QATFAST_ON(values, dequantize)(values, to, {scale, zero_point, -128, 127}, {1, rows, values.size(1)});
  return to;
}

// w_hat and dw share memory, as the one is no longer needed when the other is written: fresh memory of 64 MB takes as
// long as quantizing the weight.
std::tuple<Tensor, Tensor> qat_linear_int8_backward(const Tensor& grad, const Tensor& values, const Tensor& scale,
    const Tensor& zero_point, const Tensor& weight, at::IntArrayRef weight_spec) {
  constexpr auto op = "qat_linear_int8_backward";
  const auto spec = checked_weight_spec(op, weight, weight_spec);
  TORCH_CHECK_VALUE(grad.dim() == 2 && grad.size(1) == weight.size(0) && values.dim() == 2 &&
          values.size(0) == grad.size(0) && values.size(1) == weight.size(1),
      op, ": expected the gradient, input and weight of one layer, got ", tuple(grad.sizes()), ", ",
      tuple(values.sizes()), ", ", tuple(weight.sizes()));
  const auto dtype = grad.scalar_type();
  const auto w_hat_then_dw = fresh(weight.sizes(), dtype, weight);
  const auto w = contiguous(weight);
  if (w.scalar_type() == dtype || rounds_to(w, dtype)) {
    QATFAST_ON(w, fake_quantize)({w, w_hat_then_dw, spec});
  } else {
    w_hat_then_dw.copy_(fake_quantized(w, spec));
  }
  auto dx = at::mm(grad, w_hat_then_dw);
  auto dw = w_hat_then_dw;
  at::mm_out(dw, grad.t(), qat_linear_int8_input(values, scale, zero_point, dtype));
  return {dx, dw};
}

Tensor int8_product(at::TensorList x, at::TensorList w, const std::optional<Tensor>& bias) {
  constexpr auto op = "int8_product";
  TORCH_CHECK_VALUE(
      x.size() == 4 && w.size() == 4, op, ": expected the 4 tensors of int8 rows, got ", x.size(), " and ", w.size());
  for (const auto& tensor : {x[1], x[2], x[3], w[0], w[1], w[2], w[3], bias.value_or(x[0])}) {
    check_device(op, "all tensors", tensor, x[0]);
  }
  const auto dtype = x[1].scalar_type();
  TORCH_CHECK_VALUE(x[0].dim() == 2 && w[0].dim() == 2 && x[0].size(1) == w[0].size(1) &&
          (dtype == at::kFloat || dtype == at::kDouble) && are_int8_rows(x, x[0].sizes(), dtype) &&
          are_int8_rows(w, w[0].sizes(), dtype) && (!bias || is_vector(*bias, dtype, w[0].size(0))),
      op, ": expected int8 rows of input and weight with as many columns, got ", tuple(x[0].sizes()), " and ",
      tuple(w[0].sizes()));
  return int8_gemm({x[0], x[1], x[2], x[3]}, {w[0], w[1], w[2], w[3]}, bias.value_or(Tensor()), dtype);
}

} // namespace kernel

namespace autograd {
namespace {

// `value` with the gradient of input `index` of the node that runs now. Of that input no more is kept than its place in
// the graph: a variable without elements stands there.
Tensor place_of_input(const Tensor& value, uint32_t index) {
  const auto stand_in = at::empty({0}, value.options());
  torch::autograd::impl::set_gradient_edge(stand_in, torch::autograd::get_current_node()->next_edge(index));
  return stand_in;
}

std::vector<c10::SymInt> shape_of_input(const Tensor& dy, const Tensor& weight) {
  auto shape = dy.sym_sizes().vec();
  shape.back() = weight.sym_size(1);
  return shape;
}

// `value`, whose gradient passes to `place` where the mask is set.
struct MaskedStraightThroughNode : Function<MaskedStraightThroughNode> {
  static Variable forward(AutogradContext* ctx, const Variable&, const Variable& value, const Variable& mask) {
    save_mask(ctx, mask, value.sym_strides());
    return value.clone();
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {masked(ctx, grads[0]), Variable(), Variable()};
  }
};

// Saves what backward_of_int8() needs: the int8 input, from which x_hat is computed again, and the weight itself, from
// which w_hat is. `mask` is that of the input's gradient, undefined if all of it passes.
void save_int8(AutogradContext* ctx, const Variable& input, const Variable& weight, bool has_bias,
    const Variable& values, const Variable& scale, const Variable& zero_point, const Variable& mask,
    at::IntArrayRef specs) {
  const bool needs_input = weight.requires_grad(), needs_weight = input.requires_grad();
  ctx->save_for_backward({kept_if(needs_input, values), kept_if(needs_input, scale), kept_if(needs_input, zero_point),
      kept_if(needs_weight, weight), kept_if(needs_weight, mask)});
  ctx->saved_data["weight_spec"] = LinearSpecs::code_of(specs, LinearSpecs::weight_role);
  ctx->saved_data["has_bias"] = has_bias;
}

// The gradients of input, weight and bias, the first three of `inputs`.
variable_list backward_of_int8(AutogradContext* ctx, const Variable& given_grad, size_t inputs) {
  variable_list result(inputs);
  if (!given_grad.defined()) {
    return result;
  }
  const auto saved = ctx->get_saved_variables(); // may run hooks, which need autograd
  const auto grad = as_dense(given_grad);
  const auto below = below_autograd_unless_needed(grad);
  const auto &values = saved[0], &scale = saved[1], &zero_point = saved[2], &weight = saved[3], &mask = saved[4];
  const auto dy = as_rows(grad);
  const bool needs_input = ctx->needs_input_grad(0), needs_weight = ctx->needs_input_grad(1);
  const auto spec = ctx->saved_data["weight_spec"].toIntVector();
  if (below && needs_input && needs_weight) {
    const auto [dx, dw] = mask.defined()
        ? op::qat_linear_int8_static_backward(dy, mask, values, scale, zero_point, weight, spec)
        : op::qat_linear_int8_backward(dy, values, scale, zero_point, weight, spec);
    result[0] = grad.dim() == 2 ? dx : dx.view_symint(shape_of_input(grad, weight));
    result[1] = dw;
  } else {
    const auto dtype = dy.scalar_type();
    if (needs_weight) {
      auto x_hat = op::qat_linear_int8_input(values, scale, zero_point, dtype);
      if (!below && weight.defined()) { // the input requires grad, whether or not this task asks for its gradient
        const auto place = place_of_input(x_hat, 0);
        const auto value = x_hat.view_symint(shape_of_input(grad, weight));
        x_hat = as_rows(
            mask.defined() ? MaskedStraightThroughNode::apply(place, value, mask) : straight_through(place, value));
      }
      result[1] = weight_gradient(dy, x_hat, !below);
    }
    if (needs_input) {
      result[0] = at::matmul(grad, as_dtype(fake_quantized(weight, spec), dtype));
      if (mask.defined()) {
        const auto dx = result[0].contiguous();
        result[0] = op::fake_quantize_affine_backward(dx, mask, dx.sym_strides());
      }
    }
  }
  if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)) {
    result[2] = dy.sum(0);
  }
  return result;
}

struct QATLinearInt8Node : Function<QATLinearInt8Node> {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight,
      const std::optional<Variable>& bias, at::TensorList int8_weight, at::IntArrayRef specs,
      std::optional<at::ScalarType> dtype) {
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, values, scale, zero_point] =
        op::qat_linear_int8_forward(input, weight, bias, int8_weight, specs, dtype);
    save_int8(ctx, input, weight, bias.has_value(), values, scale, zero_point, /*mask=*/{}, specs);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return backward_of_int8(ctx, grads[0], 9); // the four tensors of int8_weight have places, given or not
  }
};

struct QATLinearInt8StaticNode : Function<QATLinearInt8StaticNode> {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight,
      const std::optional<Variable>& bias_hat, at::TensorList int8_weight, const Variable& input_scale,
      const Variable& input_zero_point, at::IntArrayRef specs) {
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, mask, values, scale, zero_point] =
        op::qat_linear_int8_static_forward(input, weight, bias_hat, int8_weight, input_scale, input_zero_point, specs);
    save_int8(ctx, input, weight, bias_hat.has_value(), values, scale, zero_point, mask, specs);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return backward_of_int8(ctx, grads[0], 11);
  }
};

} // namespace

Tensor qat_linear_int8(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::TensorList int8_weight, at::IntArrayRef specs, std::optional<at::ScalarType> dtype) {
  if (is_any_dual(input, weight, bias)) {
    const auto y = op::qat_linear_int8.below_autograd(input, weight, bias, int8_weight, specs, dtype);
    return with_derivatives_of_product(y, input, weight, bias, specs);
  }
  if (compute_requires_grad(input, weight, bias)) {
    return QATLinearInt8Node::apply(input, weight, bias, int8_weight, specs, dtype);
  }
  return op::qat_linear_int8.below_autograd(input, weight, bias, int8_weight, specs, dtype);
}

Tensor qat_linear_int8_static(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias_hat,
    at::TensorList int8_weight, const std::optional<Tensor>& input_scale, const std::optional<Tensor>& input_zero_point,
    const std::optional<Tensor>& weight_scale, const std::optional<Tensor>& weight_zero_point, at::IntArrayRef specs) {
  constexpr auto op = "qat_linear_int8_static";
  for (const auto& scale : {input_scale, weight_scale}) {
    if (scale) {
      check_fixed(op, *scale);
    }
  }
  const bool is_dual_call = is_any_dual(input, weight, bias_hat);
  if (is_dual_call || compute_requires_grad(input, weight, bias_hat)) {
    TORCH_CHECK_VALUE(input_scale && input_zero_point && !weight_scale, op,
        ": expected a static input and a dynamic weight where a gradient is required");
  }
  if (is_dual_call) {
    const auto y = op::qat_linear_int8_static.below_autograd(
        input, weight, bias_hat, int8_weight, input_scale, input_zero_point, weight_scale, weight_zero_point, specs);
    const auto spec = checked_specs(op, specs).input.value();
    const auto code = LinearSpecs::code_of(specs, LinearSpecs::input_role);
    const auto x_hat = op::fake_quantize_affine(
        input, *input_scale, *input_zero_point, spec.quant_min(), spec.quant_max(), code.slice(2));
    const auto w_hat = fake_quantized(weight, LinearSpecs::code_of(specs, LinearSpecs::weight_role));
    return straight_through(as_dtype(at::linear(x_hat, w_hat, bias_hat), y.scalar_type()), y);
  }
  if (compute_requires_grad(input, weight, bias_hat)) {
    return QATLinearInt8StaticNode::apply(input, weight, bias_hat, int8_weight, *input_scale, *input_zero_point, specs);
  }
  return op::qat_linear_int8_static.below_autograd(
      input, weight, bias_hat, int8_weight, input_scale, input_zero_point, weight_scale, weight_zero_point, specs);
}

} // namespace autograd

Tensor autocast::qat_linear_int8(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::TensorList int8_weight, at::IntArrayRef specs, std::optional<at::ScalarType> dtype) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto product = product_dtype(input, weight, bias);
  return op::qat_linear_int8(input, weight, bias, int8_weight, specs, product ? product : dtype);
}

std::tuple<Tensor, Tensor, Tensor> qat_linear_int8_observed(const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias, at::TensorList int8_weight, const Tensor& running_min, const Tensor& running_max,
    const Tensor& num_batches, double averaging_constant, at::IntArrayRef codes) {
  constexpr auto op = "qat_linear";
  check_linear(op, input, weight, bias, /*mixed_dtypes=*/false); // before the range moves
  const auto spec = checked_specs(op, codes).input;
  TORCH_CHECK_VALUE(spec, op, ": expected an input spec for an observed input, got none");
  auto [scale, zero_point] =
      op::observe_range(input, running_min, running_max, num_batches, averaging_constant, spec->num_bits,
          spec->symmetric, LinearSpecs::code_of(codes, LinearSpecs::input_role).slice(2), spec->narrow_range);
  auto y = op::qat_linear_int8_static(
      input, weight, bias, int8_weight, scale, zero_point, std::nullopt, std::nullopt, codes);
  return {std::move(y), std::move(scale), std::move(zero_point)};
}

Tensor int8_linear_requantized(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, const Tensor& weight, const Tensor& offset, const Tensor& factor, double low, double high,
    double y_scale) {
  constexpr std::array<int64_t, 2> per_tensor = {0, 0};
  const auto columns = weight.size(1);
  TORCH_CHECK_VALUE(input.numel() > 0 && input.size(-1) == columns,
      "int8_linear_requantized: expected input to be of shape (..., ", columns, ") and not empty, got ",
      tuple(input.sizes()));
  const auto rows = input.dim() == 2 ? input : input.reshape({-1, columns});
  const auto q = op::quantize(rows, scale, zero_point, quant_min, quant_max, per_tensor);
  const auto sums = int8_mm(q, weight);
  const auto y = op::int8_requantize_(sums, offset, factor, low, high, y_scale).view(at::kFloat);
  if (std::isnan(rows.amax().item<double>())) {
    y.masked_fill_(rows.isnan().any(1, /*keepdim=*/true), std::numeric_limits<double>::quiet_NaN());
  }
  if (input.dim() == 2) {
    return y;
  }
  auto shape = input.sizes().vec();
  shape.back() = weight.size(0);
  return y.view(shape);
}

} // namespace qatfast
