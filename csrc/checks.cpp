#include "checks.h"

#include "cpu/arithmetic.h"

#include <ATen/Dispatch_v2.h>
#include <ATen/OpMathType.h>
#include <c10/core/ScalarType.h>
#include <c10/core/WrapDimMinimal.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <sstream>

namespace qatfast {

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
  TORCH_CHECK_VALUE(code.size() == LinearSpecs::code_size && code[1] >= LinearSpecs::affine_grid &&
          code[1] <= LinearSpecs::full_range_grid,
      op, ": expected a spec (num_bits, grid, kind, argument) with grid from 0 to 2, got ", tuple(code));
  const auto spec = LinearSpecs::decoded(code);
  return spec ? std::make_optional(checked_spec(op, spec->num_bits, spec->symmetric, code.slice(2), spec->narrow_range))
              : std::nullopt;
}

LinearSpecs checked_specs(const char* op, at::IntArrayRef specs) {
  TORCH_CHECK_VALUE(
      specs.size() == LinearSpecs::size, op, ": expected specs of 4 times 4 integers, got ", tuple(specs));
  const auto spec = [&](LinearSpecs::Role role) {
    return checked_spec(op, LinearSpecs::code_of(specs, role));
  };
  return {spec(LinearSpecs::input_role), spec(LinearSpecs::weight_role), spec(LinearSpecs::bias_role),
      spec(LinearSpecs::output_role)};
}

void check_float(const char* op, const char* name, at::ScalarType dtype) {
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

bool is_contiguous_of(const Tensor& x, at::ScalarType dtype, int64_t size) {
  return x.scalar_type() == dtype && x.numel() == size && x.is_contiguous();
}

bool is_vector(const Tensor& x, at::ScalarType dtype, int64_t size) {
  return x.dim() == 1 && is_contiguous_of(x, dtype, size);
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

namespace {

void check_quant_range(const char* op, int64_t quant_min, int64_t quant_max) {
  TORCH_CHECK_VALUE(-32768 <= quant_min && quant_min < quant_max && quant_max <= 65535, op,
      ": expected -32768 <= quant_min < quant_max <= 65535, got quant_min=", quant_min, ", quant_max=", quant_max);
  TORCH_CHECK_VALUE(
      quant_max - quant_min <= 65535, op, ": expected quant_max - quant_min <= 65535, got ", quant_max - quant_min);
}

// Returns qparams_shape() with the reduced dimensions as size 1, as other libraries' checkpoints store them.
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
void check_zero_point_values(
    const char* op, const char* name, const Tensor& zero_point, int64_t quant_min, int64_t quant_max) {
  using Wide = std::conditional_t<std::is_same_v<I, uint32_t> || sizeof(I) == 8, int64_t, int32_t>;
  const auto min = static_cast<Wide>(quant_min), max = static_cast<Wide>(quant_max);
  const auto* illegal = first_illegal<I>(zero_point, [=](I value) {
    const auto wide = static_cast<Wide>(value);
    return (min <= wide) & (wide <= max) & ((wide < 0) == (value < I{0})); // a large uint64 would wrap
  });
  TORCH_CHECK_VALUE(
      !illegal, op, ": expected ", name, " to be from ", quant_min, " to ", quant_max, ", got ", +*illegal);
}

} // namespace

// Checks zero points in their own dtype, before they are narrowed to int32.
void check_zero_points(
    const char* op, const char* name, const Tensor& zero_points, int64_t quant_min, int64_t quant_max) {
  if (!zero_points.is_cpu()) {
    return;
  }
  AT_DISPATCH_V2(zero_points.scalar_type(), "zero_point", AT_WRAP([&] {
    check_zero_point_values<scalar_t>(op, name, zero_points, quant_min, quant_max);
  }),
      AT_EXPAND(AT_INTEGRAL_TYPES_V2));
}

QParams checked_qparams(const char* op, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, Granularity granularity, at::ScalarType dtype, const char* of) {
  TORCH_CHECK_TYPE(scale.scalar_type() == at::toOpMathType(dtype), op, ": expected scale to be ",
      name_of(at::toOpMathType(dtype)), " for ", name_of(dtype), " ", of, ", got ", name_of(scale.scalar_type()));
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
    check_zero_points(op, "zero_point", qparams.zero_point, quant_min, quant_max);
  }
  qparams.zero_point = qparams.zero_point.to(at::kInt);
  return qparams;
}

StaticRange checked_static_range(const char* op, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, at::IntArrayRef code) {
  const auto granularity = checked_granularity(op, code);
  check_quant_range(op, quant_min, quant_max);
  check_float(op, "input", input.scalar_type());
  check_blocks(op, input, granularity);
  return {granularity,
      checked_qparams(op, input, scale, zero_point, quant_min, quant_max, granularity, input.scalar_type(), "input")};
}

void check_linear(
    const char* op, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, bool mixed_dtypes) {
  check_float(op, "input", input.scalar_type());
  check_float(op, "weight", weight.scalar_type());
  if (bias) {
    check_float(op, "bias", bias->scalar_type());
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

} // namespace qatfast
