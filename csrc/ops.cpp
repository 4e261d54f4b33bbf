// The table of contents of the C++ side: schemas, checks, allocation and registration of every operator.
// Checks say the words of qatfast/checks.py.
#include "ops.h"

#include "copy.h"
#include "cpu/arithmetic.h"
#include "integer_product.h"
#include "kernels.h"
#include "memory.h"
#include "specs.h"

#include <ATen/core/enum_tag.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <c10/core/ScalarType.h>
#include <c10/util/SmallVector.h>
#include <c10/util/irange.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <sstream>
#include <string>

namespace qatfast {
namespace {

// ---- what is said ----

std::string name_of(at::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);
}

// A shape as Python prints it.
std::string tuple(at::IntArrayRef sizes) {
  std::ostringstream text;
  text << '(';
  for (const auto i : c10::irange(sizes.size())) {
    text << (i > 0 ? ", " : "") << sizes[i];
  }
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

std::string name_of(Granularity granularity) {
  switch (granularity.kind) {
    case Granularity::per_channel:
      return "PerChannel(axis=" + std::to_string(granularity.argument) + ")";
    case Granularity::per_group:
      return "PerGroup(group_size=" + std::to_string(granularity.argument) + ")";
    case Granularity::per_token:
      return "PerToken()";
    default:
      return "PerTensor()";
  }
}

// ---- what is legal ----

Granularity checked_granularity(const char* op, at::IntArrayRef code) {
  TORCH_CHECK_VALUE(code.size() == 2 && code[0] >= Granularity::per_tensor && code[0] <= Granularity::per_token, op,
      ": expected granularity to be a pair (kind, argument) with kind from 0 to 3, got ", tuple(code));
  const Granularity granularity{static_cast<Granularity::Kind>(code[0]), code[1]};
  TORCH_CHECK_VALUE(granularity.kind != Granularity::per_group || granularity.argument >= 1, op,
      ": expected group_size to be at least 1, got ", granularity.argument);
  return granularity;
}

QuantSpec checked_spec(
    const char* op, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range) {
  TORCH_CHECK_VALUE(num_bits >= 2 && num_bits <= 16, op, ": expected num_bits to be from 2 to 16, got ", num_bits);
  return {num_bits, symmetric, checked_granularity(op, granularity), narrow_range};
}

std::optional<QuantSpec> checked_spec(const char* op, at::IntArrayRef code) {
  TORCH_CHECK_VALUE(code.size() == code_size && code[1] >= affine_grid && code[1] <= full_range_grid, op,
      ": expected a spec (num_bits, grid, kind, argument) with grid from 0 to 2, got ", tuple(code));
  const auto spec = spec_of(code);
  return spec ? std::make_optional(checked_spec(op, spec->num_bits, spec->symmetric, code.slice(2), spec->narrow_range))
              : std::nullopt;
}

// None for a tensor that stays in float.
struct LinearSpecs {
  std::optional<QuantSpec> input, weight, bias, output;
};

LinearSpecs checked_specs(const char* op, at::IntArrayRef specs) {
  TORCH_CHECK_VALUE(specs.size() == 4 * code_size, op, ": expected specs of 4 times 4 integers, got ", tuple(specs));
  const auto spec = [&](Role role) {
    return checked_spec(op, code_of(specs, role));
  };
  return {spec(Role::input), spec(Role::weight), spec(Role::bias), spec(Role::output)};
}

void check_float(const char* op, const char* name, const Tensor& x) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, op,
      ": expected ", name, " to be float32, float64, float16 or bfloat16, got ", name_of(dtype));
}

void check_blocks(const std::string& op, const Tensor& x, Granularity granularity) {
  if (granularity.kind == Granularity::per_tensor) {
    return;
  }
  const auto dim = x.dim();
  TORCH_CHECK_VALUE(dim > 0, op, ": expected PerTensor() for a 0-dimensional input, got ", name_of(granularity));
  if (granularity.kind == Granularity::per_channel) {
    TORCH_CHECK_VALUE(granularity.argument >= -dim && granularity.argument < dim, op, ": expected axis to be from ",
        -dim, " to ", dim - 1, " for an input of ", dim, " dimensions, got ", granularity.argument);
  } else if (granularity.kind == Granularity::per_group) {
    TORCH_CHECK_VALUE(x.size(-1) % granularity.argument == 0, op,
        ": expected the last dimension to be divisible by group_size=", granularity.argument, ", got ", x.size(-1),
        "; write PerGroup() with a divisor of ", x.size(-1));
  }
}

void check_quant_range(const char* op, int64_t quant_min, int64_t quant_max) {
  TORCH_CHECK_VALUE(-32768 <= quant_min && quant_min < quant_max && quant_max <= 65535, op,
      ": expected -32768 <= quant_min < quant_max <= 65535, got quant_min=", quant_min, ", quant_max=", quant_max);
  TORCH_CHECK_VALUE(
      quant_max - quant_min <= 65535, op, ": expected quant_max - quant_min <= 65535, got ", quant_max - quant_min);
}

void check_device(const char* op, const char* name, const Tensor& value, const Tensor& input) {
  TORCH_CHECK(value.device() == input.device(), op, ": expected ", name, " on ", input.device(),
      ", the device of input, got ", value.device());
}

at::DimVector qparams_shape(const Tensor& x, Granularity granularity) {
  switch (granularity.kind) {
    case Granularity::per_channel:
      return {x.size(granularity.argument)};
    case Granularity::per_group: {
      at::DimVector shape(x.sizes());
      shape.back() /= granularity.argument;
      return shape;
    }
    case Granularity::per_token:
      return at::DimVector(x.sizes().slice(0, x.dim() - 1));
    default:
      return {};
  }
}

// The same with reduced dimensions kept as size 1, as other libraries' checkpoints store them.
at::DimVector keepdim_shape(const Tensor& x, Granularity granularity) {
  auto shape = qparams_shape(x, granularity);
  if (granularity.by_rows()) {
    shape.push_back(1);
    return shape;
  }
  at::DimVector ones(x.dim(), 1);
  if (granularity.kind == Granularity::per_channel) {
    ones[c10::maybe_wrap_dim(granularity.argument, x.dim())] = shape[0];
  }
  return ones;
}

// The first of `values` that is not legal; all are tested before one is looked for, which is a loop of vectors.
template <class E, class F>
const E* first_illegal(const Tensor& values, F is_legal) {
  const auto* first = values.const_data_ptr<E>();
  const auto* past = first + values.numel();
  const auto illegal = std::accumulate(first, past, 0, [&](int found, E value) {
    return found | static_cast<int>(!is_legal(value));
  });
  return illegal ? std::find_if_not(first, past, is_legal) : nullptr;
}

template <class C>
void check_scale_values(const char* op, const Tensor& scale) {
  const auto* illegal = first_illegal<C>(scale, [](C value) {
    return (value > 0) & (value <= std::numeric_limits<C>::max());
  });
  TORCH_CHECK_VALUE(!illegal, op, ": expected scale to be positive and finite, got ", *illegal);
}

template <class I>
void check_zero_point_values(const char* op, const Tensor& zero_point, int64_t quant_min, int64_t quant_max) {
  using Wide = std::conditional_t<std::is_same_v<I, uint32_t> || sizeof(I) == 8, int64_t, int32_t>;
  const auto min = static_cast<Wide>(quant_min), max = static_cast<Wide>(quant_max);
  const auto* illegal = first_illegal<I>(zero_point, [=](I value) {
    const auto wide = static_cast<Wide>(value);
    return (min <= wide) & (wide <= max) & ((wide < 0) == (value < I{0})); // a large uint64 would wrap
  });
  TORCH_CHECK_VALUE(
      !illegal, op, ": expected zero_point to be from ", quant_min, " to ", quant_max, ", got ", +*illegal);
}

// Checked before they are narrowed to int32.
void check_zero_point_values(const char* op, const Tensor& zero_point, int64_t quant_min, int64_t quant_max) {
  switch (zero_point.scalar_type()) {
#define QATFAST_CASE(type, dtype) \
  case at::dtype:                 \
    return check_zero_point_values<type>(op, zero_point, quant_min, quant_max);
    QATFAST_CASE(int8_t, kChar)
    QATFAST_CASE(uint8_t, kByte)
    QATFAST_CASE(int16_t, kShort)
    QATFAST_CASE(uint16_t, kUInt16)
    QATFAST_CASE(uint32_t, kUInt32)
    QATFAST_CASE(int64_t, kLong)
    QATFAST_CASE(uint64_t, kUInt64)
#undef QATFAST_CASE
    default:
      return check_zero_point_values<int32_t>(op, zero_point, quant_min, quant_max);
  }
}

QParams checked_qparams(const char* op, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, Granularity granularity, at::ScalarType dtype, const char* of) {
  TORCH_CHECK_TYPE(scale.scalar_type() == compute_dtype(dtype), op, ": expected scale to be ",
      name_of(compute_dtype(dtype)), " for ", name_of(dtype), " ", of, ", got ", name_of(scale.scalar_type()));
  TORCH_CHECK_TYPE(at::isIntegralType(zero_point.scalar_type(), /*includeBool=*/false), op,
      ": expected zero_point to be an integer tensor, got ", name_of(zero_point.scalar_type()));
  const auto shape = qparams_shape(input, granularity);
  const auto check_one = [&](const char* name, const Tensor& value) {
    TORCH_CHECK_VALUE(value.sizes() == at::IntArrayRef(shape) ||
            (shape.empty() && value.sizes() == at::IntArrayRef({1})) ||
            value.sizes() == at::IntArrayRef(keepdim_shape(input, granularity)),
        op, ": expected ", name, " to have shape ", tuple(shape), " for ", name_of(granularity), ", got ",
        tuple(value.sizes()));
    check_device(op, name, value, input);
  };
  check_one("scale", scale);
  check_one("zero_point", zero_point);
  QParams qparams{scale.contiguous(), zero_point.contiguous(), quant_min, quant_max};
  if (input.is_cpu()) { // elsewhere reading a value would wait for the device
    const cpu::StandardArithmetic arithmetic;
    qparams.scale.scalar_type() == at::kDouble ? check_scale_values<double>(op, qparams.scale)
                                               : check_scale_values<float>(op, qparams.scale);
    check_zero_point_values(op, qparams.zero_point, quant_min, quant_max);
  }
  qparams.zero_point = qparams.zero_point.to(at::kInt);
  return qparams;
}

void check_linear(
    const char* op, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, bool mixed_dtypes) {
  check_float(op, "input", input);
  check_float(op, "weight", weight);
  if (bias) {
    check_float(op, "bias", *bias);
  }
  const auto check_operand = [&](const char* name, const Tensor& value) {
    check_device(op, name, value, input);
    TORCH_CHECK_TYPE(mixed_dtypes || value.scalar_type() == input.scalar_type(), op, ": expected ", name, " to be ",
        name_of(input.scalar_type()), ", the dtype of input, got ", name_of(value.scalar_type()));
  };
  check_operand("weight", weight);
  if (bias) {
    check_operand("bias", *bias);
  }
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": expected weight to have shape (out_features, in_features), got ",
      tuple(weight.sizes()));
  TORCH_CHECK_VALUE(input.dim() > 0 && input.size(-1) == weight.size(1), op, ": expected input to have shape (..., ",
      weight.size(1), "), the in_features of weight, got ", tuple(input.sizes()));
  if (bias) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), op, ": expected bias to have shape (",
        weight.size(0), ",), the out_features of weight, got ", tuple(bias->sizes()));
  }
}

// ---- memory ----

Tensor fresh_like(const Tensor& x, at::ScalarType dtype) {
  return with_large_pages(at::empty_like(x, x.options().dtype(dtype)));
}

// x where its memory is laid out as a Layout says; else a copy that is, and that nobody else sees.
Tensor as_blocks(const Tensor& x, Granularity granularity) {
  if (takes_contiguous(x, granularity)) {
    return x.contiguous();
  }
  return x.is_non_overlapping_and_dense() ? x : copied(x, fresh_like(x, x.scalar_type()));
}

// `values` in the strides of empty_like(x).
Tensor laid_out_like(const Tensor& x, const Tensor& values, Granularity granularity) {
  if (!takes_contiguous(x, granularity) || x.is_contiguous()) {
    return values;
  }
  auto like = at::empty_like(x, values.options());
  return like.strides() == values.strides() ? values : like.copy_(values);
}

// The dimensions of scale and zero point in the order in which the blocks of x, as_blocks, lie in memory; none where
// that is the order they have.
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

// Scale and zero point as the blocks of x, as_blocks, lie in memory.
QParams in_memory_order(const QParams& qparams, const Tensor& x, Granularity granularity) {
  const auto order = block_order(x, granularity);
  if (order.empty()) {
    return qparams;
  }
  const auto shape = qparams_shape(x, granularity);
  const auto ordered = [&](const Tensor& of_blocks) {
    return contiguous(of_blocks.view(shape).permute(order));
  };
  return {ordered(qparams.scale), ordered(qparams.zero_point), qparams.quant_min, qparams.quant_max};
}

// from -> to, so that `to` may be written: `from` itself where it is a copy already.
Tensor writable(const Tensor& x, const Tensor& from) {
  return from.is_same(x) ? with_large_pages(at::empty_like(x)) : from;
}

Tensor fake_quantized(const Tensor& x, const QuantSpec& spec) {
  const auto from = as_blocks(x, spec.granularity);
  const auto to = writable(x, from);
  QATFAST_ON(x, fake_quantize)({from, to, spec});
  return laid_out_like(x, to, spec.granularity);
}

// Whether fake_quantize may write x in this other dtype.
bool rounds_to(const Tensor& x, at::ScalarType dtype) {
  return x.is_cpu() && x.scalar_type() == at::kFloat && (dtype == at::kHalf || dtype == at::kBFloat16);
}

at::ScalarType quantized_dtype(int64_t quant_min, int64_t quant_max) {
  if (quant_min >= 0) {
    return quant_max <= 255 ? at::kByte : at::kUInt16;
  }
  TORCH_CHECK_VALUE(quant_max <= 32767,
      "quantize: expected quant_min and quant_max to fit in one of int8, uint8, int16 and uint16, got quant_min=",
      quant_min, ", quant_max=", quant_max);
  return quant_min >= -128 && quant_max <= 127 ? at::kChar : at::kShort;
}

// ---- operators ----

Tensor fake_quantize_kernel(
    const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range) {
  constexpr auto op = "fake_quantize";
  const auto spec = checked_spec(op, num_bits, symmetric, granularity, narrow_range);
  check_float(op, "input", input);
  check_blocks(op, input, spec.granularity);
  return fake_quantized(input, spec);
}

std::tuple<Tensor, Tensor> fake_quantize_affine_either(const Tensor& input, const Tensor& scale,
    const Tensor& zero_point, int64_t quant_min, int64_t quant_max, at::IntArrayRef code, bool keep_mask) {
  constexpr auto op = "fake_quantize_affine";
  const auto granularity = checked_granularity(op, code);
  check_quant_range(op, quant_min, quant_max);
  check_float(op, "input", input);
  check_blocks(op, input, granularity);
  const auto qparams =
      checked_qparams(op, input, scale, zero_point, quant_min, quant_max, granularity, input.scalar_type(), "input");
  const auto from = as_blocks(input, granularity);
  const auto to = writable(input, from);
  const auto mask = keep_mask ? at::empty({(input.numel() + 7) / 8}, input.options().dtype(at::kByte)) : Tensor();
  QATFAST_ON(input, fake_quantize_affine)(
      from, to, mask, in_memory_order(qparams, from, granularity), layout_of(from, granularity));
  return {laid_out_like(input, to, granularity), mask};
}

Tensor fake_quantize_affine_kernel(const Tensor& input, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, at::IntArrayRef granularity) {
  return std::get<0>(fake_quantize_affine_either(input, scale, zero_point, quant_min, quant_max, granularity, false));
}

std::tuple<Tensor, Tensor> fake_quantize_affine_forward_kernel(const Tensor& input, const Tensor& scale,
    const Tensor& zero_point, int64_t quant_min, int64_t quant_max, at::IntArrayRef granularity) {
  return fake_quantize_affine_either(input, scale, zero_point, quant_min, quant_max, granularity, true);
}

Tensor fake_quantize_affine_backward_kernel(const Tensor& grad, const Tensor& mask, at::IntArrayRef stride) {
  constexpr auto op = "fake_quantize_affine_backward";
  check_float(op, "grad", grad);
  check_device(op, "mask", mask, grad);
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kByte && mask.is_contiguous() &&
          mask.sizes() == at::IntArrayRef({(grad.numel() + 7) / 8}),
      op, ": expected mask to be uint8 of shape (", (grad.numel() + 7) / 8, ",), got ", name_of(mask.scalar_type()),
      " of shape ", tuple(mask.sizes()));
  TORCH_CHECK_VALUE(static_cast<int64_t>(stride.size()) == grad.dim(), op, ": expected ", grad.dim(), " strides, got ",
      tuple(stride));
  const auto to = with_large_pages(at::empty_strided(grad.sizes(), stride, grad.options()));
  TORCH_CHECK_VALUE(
      to.is_non_overlapping_and_dense(), op, ": expected the strides of a dense tensor, got ", tuple(stride));
  const bool same_order = grad.strides() == stride;
  QATFAST_ON(grad, fake_quantize_affine_backward)(same_order ? grad : copied(grad, to), mask, to);
  return to;
}

std::tuple<Tensor, Tensor> choose_qparams_kernel(
    const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range) {
  constexpr auto op = "choose_qparams";
  const auto spec = checked_spec(op, num_bits, symmetric, granularity, narrow_range);
  check_float(op, "input", input);
  check_blocks(op, input, spec.granularity);
  const auto shape = qparams_shape(input, spec.granularity);
  // Blocks of one or two elements have more results than elements: a copy of the input is cheaper than two of the results.
  const bool many_blocks = spec.granularity.kind == Granularity::per_group && spec.granularity.argument <= 2;
  const auto from = many_blocks ? contiguous(input) : as_blocks(input, spec.granularity);
  const auto order = block_order(from, spec.granularity);
  const auto empty = [&](at::ScalarType dtype) {
    const auto of_blocks = at::empty(shape, input.options().dtype(dtype));
    return order.empty() ? of_blocks : at::empty(of_blocks.permute(order).sizes(), of_blocks.options());
  };
  const auto scale = empty(compute_dtype(input.scalar_type())), zero_point = empty(at::kInt);
  QATFAST_ON(input, choose_qparams)(from, spec, scale, zero_point);
  if (order.empty()) {
    return {scale, zero_point};
  }
  at::DimVector dims(order.size());
  for (const auto i : c10::irange(order.size())) {
    dims[order[i]] = static_cast<int64_t>(i);
  }
  return {contiguous(scale.permute(dims)), contiguous(zero_point.permute(dims))};
}

Tensor quantize_kernel(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, at::IntArrayRef code) {
  constexpr auto op = "quantize";
  const auto granularity = checked_granularity(op, code);
  check_quant_range(op, quant_min, quant_max);
  check_float(op, "input", input);
  check_blocks(op, input, granularity);
  const auto qparams =
      checked_qparams(op, input, scale, zero_point, quant_min, quant_max, granularity, input.scalar_type(), "input");
  const auto dtype = quantized_dtype(quant_min, quant_max);
  const auto from = as_blocks(input, granularity);
  const auto to = fresh_like(from, dtype);
  QATFAST_ON(input, quantize)(from, to, in_memory_order(qparams, from, granularity), layout_of(from, granularity));
  return laid_out_like(input, to, granularity);
}

Tensor dequantize_kernel(
    const Tensor& input, const Tensor& scale, const Tensor& zero_point, at::IntArrayRef code, at::ScalarType dtype) {
  constexpr auto op = "dequantize";
  const auto granularity = checked_granularity(op, code);
  const auto q = input.scalar_type();
  TORCH_CHECK_TYPE(q == at::kChar || q == at::kByte || q == at::kShort || q == at::kUInt16, op,
      ": expected input to be int8, uint8, int16 or uint16, got ", name_of(q));
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, op,
      ": expected dtype to be float32, float64, float16 or bfloat16, got ", name_of(dtype));
  check_blocks(op, input, granularity);
  const auto qparams = checked_qparams(op, input, scale, zero_point, -32768, 65535, granularity, dtype, "output");
  const auto from = as_blocks(input, granularity);
  const auto to = fresh_like(from, dtype);
  QATFAST_ON(input, dequantize)(from, to, in_memory_order(qparams, from, granularity), layout_of(from, granularity));
  return laid_out_like(input, to, granularity);
}

std::tuple<Tensor, Tensor> qat_linear_forward_kernel(const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias, at::IntArrayRef specs, std::optional<at::ScalarType> dtype) {
  constexpr auto op = "qat_linear";
  check_linear(op, input, weight, bias, dtype.has_value());
  const auto spec_of_each = checked_specs(op, specs);
  const auto product_dtype = dtype.value_or(input.scalar_type());

  auto x_hat = input;
  if (const auto& spec = spec_of_each.input) {
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
    const auto to = rounds_to(from, product_dtype) ? fresh_like(from, product_dtype) : writable(value, from);
    return parameters.emplace_back(FakeQuantizeTask{from, to, *spec}).to;
  };
  const auto w_hat = add_parameter("weight", weight, spec_of_each.weight);
  const auto b_hat = bias ? add_parameter("bias", *bias, spec_of_each.bias) : Tensor();
  QATFAST_ON(input, qat_linear)(parameters);

  const auto w_product = as_dtype(w_hat, product_dtype);
  const auto b_product = bias ? std::optional<Tensor>(as_dtype(b_hat, product_dtype)) : std::nullopt;
  auto y = at::linear(as_dtype(x_hat, product_dtype), w_product, b_product);
  if (const auto& spec = spec_of_each.output) {
    check_blocks("qat_linear: output", y, spec->granularity);
    y = as_blocks(y, spec->granularity);
    QATFAST_ON(y, fake_quantize)({y, y, *spec});
  }
  return {y, spec_of_each.weight ? w_product : at::empty({0}, w_product.options())};
}

bool is_row(const Tensor& x, at::ScalarType dtype, int64_t size) {
  return x.scalar_type() == dtype && x.dim() == 1 && x.size(0) == size && x.is_contiguous();
}

QuantSpec checked_integer_spec(const char* op, const Tensor& weight, at::IntArrayRef code) {
  const auto spec = checked_spec(op, code);
  TORCH_CHECK_VALUE(weight.dim() == 2 && spec && is_integer_weight(*spec, weight.size(1)), op,
      ": expected a weight spec of at most 8 bits per tensor or per row, got ", tuple(code), " for shape ",
      tuple(weight.sizes()));
  return *spec;
}

IntegerRows integer_weight(const Tensor& weight, at::IntArrayRef code, Memory memory) {
  return integer_rows(weight, checked_integer_spec("qat_linear", weight, code), memory);
}

IntegerRows given_integer_weight(at::TensorList integers, const Tensor& weight) {
  TORCH_CHECK_VALUE(
      integers.size() == 4, "qat_linear: expected the 4 tensors of qat_linear_weight, got ", integers.size());
  for (const auto& integer : integers) {
    check_device("qat_linear", "weight_integers", integer, weight);
  }
  const auto rows = weight.size(0);
  TORCH_CHECK_VALUE(integers[0].scalar_type() == at::kChar && integers[0].sizes() == weight.sizes() &&
          integers[0].is_contiguous() && is_row(integers[1], compute_dtype(weight.scalar_type()), rows) &&
          is_row(integers[2], at::kInt, rows) && is_row(integers[3], at::kLong, rows),
      "qat_linear: expected weight_integers as qat_linear_weight gives them for this weight");
  return {integers[0], integers[1], integers[2], integers[3]};
}

// No integers given: they are made of the weight.
std::tuple<Tensor, IntegerRows> qat_linear_integers_either(const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias, at::TensorList weight_integers, at::IntArrayRef specs,
    std::optional<at::ScalarType> dtype, Memory input_memory) {
  constexpr auto op = "qat_linear";
  check_linear(op, input, weight, bias, dtype.has_value());
  const auto spec_of_each = checked_specs(op, specs);
  TORCH_CHECK_VALUE(spec_of_each.input && is_integer_input(*spec_of_each.input), op,
      ": expected an input spec of at most 8 bits per tensor or per token, got ", tuple(code_of(specs, Role::input)));
  const auto product_dtype = dtype.value_or(input.scalar_type());
  const auto compute = compute_dtype(input.scalar_type());

  const auto w = weight_integers.empty() ? integer_weight(weight, code_of(specs, Role::weight), Memory::shared)
                                         : given_integer_weight(weight_integers, weight);
  at::DimVector shape(input.sizes());
  shape.back() = weight.size(0);
  const auto rows = c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));
  const auto x =
      integer_rows(input.dim() == 2 ? input : input.reshape({rows, input.size(-1)}), *spec_of_each.input, input_memory);
  Tensor b_hat;
  if (bias) {
    const auto& spec = spec_of_each.bias;
    if (spec) {
      check_blocks("qat_linear: bias", *bias, spec->granularity);
    }
    b_hat = as_dtype(spec ? fake_quantized(*bias, *spec) : *bias, compute).contiguous();
  }
  const auto& output_spec = spec_of_each.output;
  auto y = integer_product(x, w, b_hat, output_spec ? compute : product_dtype).view(shape);
  if (output_spec) {
    check_blocks("qat_linear: output", y, output_spec->granularity);
    const auto to = rounds_to(y, product_dtype) ? fresh(y.sizes(), product_dtype, y) : y;
    QATFAST_ON(y, fake_quantize)({y, to, *output_spec});
    y = as_dtype(to, product_dtype);
  }
  return {y, x};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qat_linear_integers_forward_kernel(const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias, at::TensorList weight_integers, at::IntArrayRef specs,
    std::optional<at::ScalarType> dtype) {
  const auto [y, x] = qat_linear_integers_either(input, weight, bias, weight_integers, specs, dtype, Memory::apart);
  return {y, x.values, x.scale, x.zero_point};
}

Tensor qat_linear_integers_kernel(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::TensorList weight_integers, at::IntArrayRef specs, std::optional<at::ScalarType> dtype) {
  return std::get<0>(qat_linear_integers_either(input, weight, bias, weight_integers, specs, dtype, Memory::shared));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qat_linear_weight_kernel(const Tensor& weight, at::IntArrayRef weight_spec) {
  check_float("qat_linear", "weight", weight);
  const auto integers = integer_weight(weight, weight_spec, Memory::apart);
  return {integers.values, integers.scale, integers.zero_point, integers.steps};
}

Tensor qat_linear_kernel(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::IntArrayRef specs, std::optional<at::ScalarType> dtype) {
  if (multiplies_integers(weight, specs)) {
    return qat_linear_integers_kernel(input, weight, bias, {}, specs, dtype);
  }
  return std::get<0>(qat_linear_forward_kernel(input, weight, bias, specs, dtype));
}

// x_hat, once more from its integers; a row that held a NaN is NaN.
Tensor qat_linear_input_kernel(
    const Tensor& values, const Tensor& scale, const Tensor& zero_point, at::ScalarType dtype) {
  constexpr auto op = "qat_linear_input";
  const auto rows = values.dim() == 2 ? values.size(0) : -1;
  TORCH_CHECK_VALUE(rows >= 0 && values.scalar_type() == at::kChar && values.is_contiguous() &&
          is_row(scale, compute_dtype(dtype), rows) && is_row(zero_point, at::kInt, rows),
      op, ": expected the values, scale and zero_point of the layer's forward");
  const auto to = fresh(values.sizes(), dtype, values);
  QATFAST_ON(values, dequantize)(values, to, {scale, zero_point, -128, 127}, {1, rows, values.size(1)});
  return to;
}

// In memory of large pages, which at::mm would not ask for.
Tensor qat_linear_grad_weight_kernel(const Tensor& grad, const Tensor& input) {
  TORCH_CHECK_VALUE(grad.dim() == 2 && input.dim() == 2 && grad.size(0) == input.size(0),
      "qat_linear_grad_weight: expected the gradient and input of one layer, got ", tuple(grad.sizes()), ", ",
      tuple(input.sizes()));
  auto dw = fresh({grad.size(1), input.size(1)}, grad.scalar_type(), grad);
  return at::mm_out(dw, grad.t(), input);
}

// One memory serves for w_hat and, as that is needed no more, for dw: fresh memory of 64 MB takes as long as quantizing
// the weight.
std::tuple<Tensor, Tensor> qat_linear_integers_backward_kernel(const Tensor& grad, const Tensor& values,
    const Tensor& scale, const Tensor& zero_point, const Tensor& weight, at::IntArrayRef weight_code) {
  constexpr auto op = "qat_linear_integers_backward";
  const auto spec = checked_integer_spec(op, weight, weight_code);
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
  at::mm_out(dw, grad.t(), qat_linear_input_kernel(values, scale, zero_point, dtype));
  return {dx, dw};
}

// The same for every device: what differs is behind QATFAST_ON.
void register_kernels(torch::Library& m) {
  m.impl("fake_quantize", fake_quantize_kernel);
  m.impl("fake_quantize_affine", fake_quantize_affine_kernel);
  m.impl("fake_quantize_affine_forward", fake_quantize_affine_forward_kernel);
  m.impl("fake_quantize_affine_backward", fake_quantize_affine_backward_kernel);
  m.impl("choose_qparams", choose_qparams_kernel);
  m.impl("quantize", quantize_kernel);
  m.impl("dequantize", dequantize_kernel);
  m.impl("qat_linear", qat_linear_kernel);
  m.impl("qat_linear_forward", qat_linear_forward_kernel);
  m.impl("qat_linear_weight", qat_linear_weight_kernel);
  m.impl("qat_linear_integers", qat_linear_integers_kernel);
  m.impl("qat_linear_integers_forward", qat_linear_integers_forward_kernel);
  m.impl("qat_linear_input", qat_linear_input_kernel);
  m.impl("qat_linear_integers_backward", qat_linear_integers_backward_kernel);
  m.impl("qat_linear_grad_weight", qat_linear_grad_weight_kernel);
}

} // namespace

// granularity: (kind, argument), kind 0 per tensor, 1 per channel (axis), 2 per group (group_size), 3 per token.
// specs: see specs.h; weight_spec is one of its codes.
TORCH_LIBRARY(qatfast, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};
  m.def(
      "fake_quantize(Tensor input, int num_bits=8, bool symmetric=False, int[2] granularity=[0, 0], "
      "bool narrow_range=True) -> Tensor",
      tags);
  m.def(
      "fake_quantize_affine(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
      "int[2] granularity=[0, 0]) -> Tensor",
      tags);
  m.def(
      "choose_qparams(Tensor input, int num_bits=8, bool symmetric=False, int[2] granularity=[0, 0], "
      "bool narrow_range=True) -> (Tensor scale, Tensor zero_point)",
      tags);
  m.def(
      "quantize(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
      "int[2] granularity=[0, 0]) -> Tensor",
      tags);
  m.def(
      "dequantize(Tensor input, Tensor scale, Tensor zero_point, int[2] granularity=[0, 0], "
      "ScalarType dtype=float) -> Tensor",
      tags);
  // dtype: of the product, where it differs from the tensors' (autocast)
  m.def(
      "qat_linear(Tensor input, Tensor weight, Tensor? bias, int[] specs, *, ScalarType? dtype=None) -> Tensor", tags);

  // What autograd calls: forwards that also return what their backward needs.
  // mask: one bit per element in the memory order of the output (on a GPU of a contiguous one where blocks are rows).
  m.def(
      "fake_quantize_affine_forward(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
      "int[2] granularity=[0, 0]) -> (Tensor output, Tensor mask)",
      tags);
  m.def("fake_quantize_affine_backward(Tensor grad, Tensor mask, SymInt[] stride) -> Tensor", tags);
  // weight_hat: the fake-quantized weight in the product's dtype, of no elements where the weight stays in float
  m.def(
      "qat_linear_forward(Tensor input, Tensor weight, Tensor? bias, int[] specs, *, ScalarType? dtype=None) "
      "-> (Tensor output, Tensor weight_hat)",
      tags);

  // The same layer on integers. Those of the weight once, for any number of calls:
  m.def(
      "qat_linear_weight(Tensor weight, int[] weight_spec) "
      "-> (Tensor values, Tensor scale, Tensor zero_point, Tensor steps)",
      tags);
  m.def(
      "qat_linear_integers(Tensor input, Tensor weight, Tensor? bias, Tensor[] weight_integers, int[] specs, *, "
      "ScalarType? dtype=None) -> Tensor",
      tags);
  // values, scale and zero_point: the input's integers
  m.def(
      "qat_linear_integers_forward(Tensor input, Tensor weight, Tensor? bias, Tensor[] weight_integers, "
      "int[] specs, *, ScalarType? dtype=None) -> (Tensor output, Tensor values, Tensor scale, Tensor zero_point)",
      tags);
  m.def("qat_linear_input(Tensor values, Tensor scale, Tensor zero_point, ScalarType dtype) -> Tensor", tags);
  m.def(
      "qat_linear_integers_backward(Tensor grad, Tensor values, Tensor scale, Tensor zero_point, Tensor weight, "
      "int[] weight_spec) -> (Tensor grad_input, Tensor grad_weight)",
      tags);
  m.def("qat_linear_grad_weight(Tensor grad, Tensor input) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(qatfast, CPU, m) {
  register_kernels(m);
}

#ifdef QATFAST_CUDA
TORCH_LIBRARY_IMPL(qatfast, CUDA, m) {
  register_kernels(m);
}

TORCH_LIBRARY_IMPL(qatfast, AutocastCUDA, m) {
  m.impl("qat_linear", autograd::qat_linear_under_autocast);
  m.impl("qat_linear_integers", autograd::qat_linear_integers_under_autocast);
}
#endif

TORCH_LIBRARY_IMPL(qatfast, Autograd, m) {
  m.impl("fake_quantize", autograd::fake_quantize);
  m.impl("fake_quantize_affine", autograd::fake_quantize_affine);
  m.impl("fake_quantize_affine_backward", autograd::fake_quantize_affine_backward);
  m.impl("choose_qparams", autograd::choose_qparams);
  m.impl("quantize", autograd::quantize);
  m.impl("dequantize", autograd::dequantize);
  m.impl("qat_linear", autograd::qat_linear);
  m.impl("qat_linear_weight", autograd::qat_linear_weight);
  m.impl("qat_linear_integers", autograd::qat_linear_integers);
  // An error where one of these is differentiated: the operators above call them below autograd.
  for (const char* name : {"fake_quantize_affine_forward", "qat_linear_forward", "qat_linear_integers_forward",
           "qat_linear_input", "qat_linear_integers_backward", "qat_linear_grad_weight"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(qatfast, AutocastCPU, m) {
  m.impl("qat_linear", autograd::qat_linear_under_autocast);
  m.impl("qat_linear_integers", autograd::qat_linear_integers_under_autocast);
}

} // namespace qatfast
