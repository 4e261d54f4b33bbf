#include "checks.h"
#include "common/copy.h"
#include "cpu/arithmetic.h"
#include "launchers.h"
#include "operators.h"
#include "ops/blocks.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>

namespace qatfast {
namespace {

void check_state(const char* op, const char* name, const Tensor& state, at::ScalarType dtype, at::IntArrayRef shape,
    at::Device device) {
  TORCH_CHECK_VALUE(
      state.device() == device && state.scalar_type() == dtype && state.sizes() == shape && state.is_contiguous(), op,
      ": expected ", name, " to be a contiguous ", name_of(dtype), " tensor of shape ", tuple(shape), " on ", device,
      ", got ", name_of(state.scalar_type()), " of shape ", tuple(state.sizes()), " on ", state.device());
}

// The nearest float32, the largest finite one beyond; never -0.0.
float stored(double end) {
  constexpr double most = std::numeric_limits<float>::max();
  return static_cast<float>(std::clamp(end, -most, most)) + 0.0F;
}

} // namespace

std::tuple<Tensor, Tensor> kernel::observe_range(const Tensor& input, const Tensor& running_min,
    const Tensor& running_max, const Tensor& num_batches, double averaging_constant, int64_t num_bits, bool symmetric,
    at::IntArrayRef granularity, bool narrow_range) {
  constexpr auto op = "observe_range";
  const auto spec = checked_spec(op, num_bits, symmetric, granularity, narrow_range);
  check_float(op, "input", input.scalar_type());
  check_blocks(op, input, spec.granularity);
  const auto shape = qparams_shape(input, spec.granularity);
  check_state(op, "running_min", running_min, at::kFloat, shape, input.device());
  check_state(op, "running_max", running_max, at::kFloat, shape, input.device());
  check_state(op, "num_batches", num_batches, at::kLong, {}, input.device());
  const auto x = spec.granularity.by_rows() ? contiguous(input) : as_blocks(input, spec.granularity);
  const auto options = input.options().dtype(at::toOpMathType(input.scalar_type()));
  const auto scale = at::empty(shape, options), zero_point = at::empty(shape, options.dtype(at::kInt));
#ifdef QATFAST_CUDA
  if (x.is_cuda()) {
    const auto constant = static_cast<float>(averaging_constant);
    cuda::observe_range(x, spec, {running_min, running_max, num_batches, constant}, scale, zero_point);
    return {scale, zero_point};
  }
#endif
  const auto lo = at::empty(shape, options), hi = at::empty(shape, options);
  const auto has_finite = at::empty(shape, options.dtype(at::kBool));
  cpu::ranges(x, spec.granularity, lo, hi, has_finite);

  AT_DISPATCH_FLOATING_TYPES(lo.scalar_type(), op, [&] {
    const cpu::StandardArithmetic arithmetic;
    auto* low = lo.mutable_data_ptr<scalar_t>();
    auto* high = hi.mutable_data_ptr<scalar_t>();
    const auto* finite = has_finite.const_data_ptr<bool>();
    auto* running_low = running_min.mutable_data_ptr<float>();
    auto* running_high = running_max.mutable_data_ptr<float>();
    const auto constant = static_cast<float>(averaging_constant);
    const auto moved = [&](float running, float end, bool is_lower) {
      if (constant == 0) {
        return (is_lower ? std::min(running, end) : std::max(running, end)) + 0.0F;
      }
      return running + constant * (end - running) + 0.0F;
    };
    bool any_finite = false;
    for (int64_t block = 0; block < lo.numel(); ++block) {
      const auto batch_low = stored(low[block]), batch_high = stored(high[block]);
      auto &range_low = running_low[block], &range_high = running_high[block];
      const bool is_new = range_low == 0 && range_high == 0;
      low[block] = is_new ? batch_low : range_low; // what quantizes this batch
      high[block] = is_new ? batch_high : range_high;
      if (finite[block]) {
        any_finite = true;
        range_low = is_new ? batch_low : moved(range_low, batch_low, true);
        range_high = is_new ? batch_high : moved(range_high, batch_high, false);
      }
    }
    *num_batches.mutable_data_ptr<int64_t>() += any_finite;
  });
  cpu::choose_of_ranges(lo, hi, spec, scale, zero_point);
  return {scale, zero_point};
}

} // namespace qatfast
