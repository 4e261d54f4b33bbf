// Ranges that modules keep: observe_range, and fake_quantize_observed, which quantizes in the same pass.
#include "checks.h"
#include "common/copy.h"
#include "launchers.h"
#include "ops/blocks.h"
#include "ops/mask.h"
#include "ops/observed.h"

#include <ATen/OpMathType.h>

#include <array>
#include <tuple>
#include <utility>

namespace qatfast {
namespace {

void check_state(const char* op, const char* name, const Tensor& state, at::ScalarType dtype, at::IntArrayRef shape,
    at::Device device) {
  TORCH_CHECK_VALUE(
      state.device() == device && state.scalar_type() == dtype && state.sizes() == shape && state.is_contiguous(), op,
      ": expected ", name, " to be a contiguous ", name_of(dtype), " tensor of shape ", tuple(shape), " on ", device,
      ", got ", name_of(state.scalar_type()), " of shape ", tuple(state.sizes()), " on ", state.device());
}

} // namespace

ObservedRange checked_range(const char* op, const Tensor& input, const QuantSpec& spec, const Tensor& running_min,
    const Tensor& running_max, const Tensor& num_batches, double averaging_constant) {
  TORCH_CHECK_VALUE(averaging_constant >= 0 && averaging_constant <= 1, op,
      ": expected averaging_constant to be from 0 to 1, got ", averaging_constant);
  const auto shape = qparams_shape(input, spec.granularity);
  check_state(op, "running_min", running_min, at::kFloat, shape, input.device());
  check_state(op, "running_max", running_max, at::kFloat, shape, input.device());
  check_state(op, "num_batches", num_batches, at::kLong, {}, input.device());
  return {running_min, running_max, num_batches, static_cast<float>(averaging_constant)};
}

void bump_version(const Tensor& written) {
  if (!written.is_inference()) {
    written.unsafeGetTensorImpl()->bump_version();
  }
}

void bump_versions(const ObservedRange& range) {
  bump_version(range.running_min);
  bump_version(range.running_max);
  bump_version(range.num_batches);
}

namespace kernel {
namespace {

struct Observed {
  Tensor output; // undefined if it is not wanted, like the mask
  Tensor mask;
  Tensor scale;
  Tensor zero_point;
};

enum class Wanted { grid, output, output_and_mask };

Observed observe(const char* op, Wanted wanted, const Tensor& input, const Tensor& running_min,
    const Tensor& running_max, const Tensor& num_batches, double averaging_constant, int64_t num_bits, bool symmetric,
    at::IntArrayRef granularity, bool narrow_range) {
  const auto spec = checked_spec(op, num_bits, symmetric, granularity, narrow_range);
  check_float(op, "input", input.scalar_type());
  check_blocks(op, input, spec.granularity);
  const auto range = checked_range(op, input, spec, running_min, running_max, num_batches, averaging_constant);
  const auto shape = qparams_shape(input, spec.granularity);
  // Blocks of rows lie in the order of the state only in a contiguous tensor.
  const bool is_reordered = spec.granularity.by_rows() && !input.is_contiguous();
  const bool is_copied = is_reordered || !input.is_non_overlapping_and_dense();
  const auto copy = is_reordered ? contiguous(input) : is_copied ? as_blocks(input, spec.granularity) : Tensor();
  const auto& x = is_copied ? copy : input; // see ObservedRange
  const bool in_one_pass = x.is_cpu() && !is_reordered && wanted != Wanted::grid;
  Observed result = {in_one_pass ? fresh_like(x, x.scalar_type()) : Tensor(),
      in_one_pass && wanted == Wanted::output_and_mask ? fresh_mask(x) : Tensor(),
      fresh(shape, at::toOpMathType(input.scalar_type()), x), fresh(shape, at::kInt, x)};
#ifdef QATFAST_CUDA
  if (x.is_cuda()) {
    cuda::observe_range(x, spec, range, result.scale, result.zero_point);
  } else
#endif
    cpu::fake_quantize_observed(x, result.output, result.mask, spec, range, result.scale, result.zero_point);
  bump_versions(range);
  if (!in_one_pass && wanted == Wanted::output) {
    result.output =
        fake_quantize_affine(input, result.scale, result.zero_point, spec.quant_min(), spec.quant_max(), granularity);
  } else if (!in_one_pass && wanted == Wanted::output_and_mask) {
    std::tie(result.output, result.mask) = fake_quantize_affine_forward(
        input, result.scale, result.zero_point, spec.quant_min(), spec.quant_max(), granularity);
  }
  return result;
}

} // namespace

std::tuple<Tensor, Tensor> observe_range(const Tensor& input, const Tensor& running_min, const Tensor& running_max,
    const Tensor& num_batches, double averaging_constant, int64_t num_bits, bool symmetric, at::IntArrayRef granularity,
    bool narrow_range) {
  const auto found = observe("observe_range", Wanted::grid, input, running_min, running_max, num_batches,
      averaging_constant, num_bits, symmetric, granularity, narrow_range);
  return {found.scale, found.zero_point};
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_observed(const Tensor& input, const Tensor& running_min,
    const Tensor& running_max, const Tensor& num_batches, double averaging_constant, int64_t num_bits, bool symmetric,
    at::IntArrayRef granularity, bool narrow_range) {
  const auto found = observe("fake_quantize_observed", Wanted::output, input, running_min, running_max, num_batches,
      averaging_constant, num_bits, symmetric, granularity, narrow_range);
  return {found.output, found.scale, found.zero_point};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fake_quantize_observed_forward(const Tensor& input,
    const Tensor& running_min, const Tensor& running_max, const Tensor& num_batches, double averaging_constant,
    int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range) {
  const auto found = observe("fake_quantize_observed", Wanted::output_and_mask, input, running_min, running_max,
      num_batches, averaging_constant, num_bits, symmetric, granularity, narrow_range);
  return {found.output, found.mask, found.scale, found.zero_point};
}

std::tuple<Tensor, Tensor> qparams_of_range(
    const Tensor& lo, const Tensor& hi, int64_t num_bits, bool symmetric, bool narrow_range, at::ScalarType dtype) {
  constexpr auto op = "qparams_of_range";
  constexpr std::array<int64_t, 2> per_tensor = {Granularity::per_tensor, 0};
  const auto spec = checked_spec(op, num_bits, symmetric, per_tensor, narrow_range);
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, op, ": expected dtype to be float32 or float64, got ",
      name_of(dtype));
  for (const auto& [name, end] : {std::pair("lo", lo), std::pair("hi", hi)}) {
    TORCH_CHECK_TYPE(end.scalar_type() == at::kFloat || end.scalar_type() == at::kDouble, op, ": expected ", name,
        " to be float32 or float64, got ", name_of(end.scalar_type()));
  }
  check_device(op, "hi", hi, lo);
  TORCH_CHECK_VALUE(lo.sizes() == hi.sizes(), op, ": expected lo and hi to have one shape, got ", tuple(lo.sizes()),
      " and ", tuple(hi.sizes()));
  const auto scale = fresh(lo.sizes(), dtype, lo), zero_point = fresh(lo.sizes(), at::kInt, lo);
  cpu::qparams_of_range(contiguous(as_dtype(lo, dtype)), contiguous(as_dtype(hi, dtype)), spec, scale, zero_point);
  return {scale, zero_point};
}

} // namespace kernel

namespace autograd {
namespace {

struct FakeQuantizeObservedNode : Function<FakeQuantizeObservedNode> {
  // observe(input): the operator with all arguments. The state is none of the node's, which would copy it (see
  // ObservedRange).
  template <class F>
  static variable_list forward(
      AutogradContext* ctx, const Variable& input, at::IntArrayRef granularity, const F& observe) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, mask, scale, zero_point] = observe(input);
    save_mask(ctx, mask, strides_of_mask(output, granularity));
    ctx->mark_non_differentiable({scale, zero_point});
    return {output, scale, zero_point};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {masked(ctx, grads[0]), Variable(), Variable()};
  }
};

} // namespace

std::tuple<Tensor, Tensor, Tensor> fake_quantize_observed(const Tensor& input, const Tensor& running_min,
    const Tensor& running_max, const Tensor& num_batches, double averaging_constant, int64_t num_bits, bool symmetric,
    at::IntArrayRef granularity, bool narrow_range) {
  if (is_dual(input)) {
    const auto primal = primal_of(input);
    const auto found = fake_quantize_observed(primal, running_min, running_max, num_batches, averaging_constant,
        num_bits, symmetric, granularity, narrow_range);
    const auto& [output, scale, zero_point] = found;
    const auto quant_min = quant_min_of(num_bits, symmetric, narrow_range),
               quant_max = quant_max_of(num_bits, symmetric);
    const auto mask = std::get<1>(
        op::fake_quantize_affine_forward(primal.detach(), scale, zero_point, quant_min, quant_max, granularity));
    const auto tangent =
        op::fake_quantize_affine_backward(input._fw_grad(/*level=*/0), mask, strides_of_mask(output, granularity));
    return {with_tangent(output, tangent), scale, zero_point};
  }
  if (compute_requires_grad(input)) {
    const auto observe = [&](const Variable& x) {
      return op::fake_quantize_observed_forward(
          x, running_min, running_max, num_batches, averaging_constant, num_bits, symmetric, granularity, narrow_range);
    };
    const auto found = FakeQuantizeObservedNode::apply(input, granularity, observe);
    return {found[0], found[1], found[2]};
  }
  return op::fake_quantize_observed.below_autograd(
      input, running_min, running_max, num_batches, averaging_constant, num_bits, symmetric, granularity, narrow_range);
}

} // namespace autograd
} // namespace qatfast
