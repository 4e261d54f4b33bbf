#include "checks.h"
#include "common/copy.h"
#include "cpu/arithmetic.h"
#include "launchers.h"
#include "ops/autograd.h"
#include "ops/blocks.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty_like.h>

namespace qatfast {
namespace kernel {
namespace {

// What the launchers take as the scale.
Tensor magnitude_of(const Tensor& scale) {
  if (!scale.is_cpu()) {
    return scale;
  }
  const auto result = at::empty_like(scale, at::MemoryFormat::Contiguous);
  const auto from = scale.contiguous();
  AT_DISPATCH_FLOATING_TYPES(scale.scalar_type(), "fake_quantize_learned", [&] {
    const cpu::StandardArithmetic arithmetic;
    const auto* values = from.const_data_ptr<scalar_t>();
    auto* to = result.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < from.numel(); ++i) {
      to[i] = magnitude_of_learned(values[i]);
    }
  });
  return result;
}

StaticRange checked(const char* op, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, at::IntArrayRef granularity) {
  TORCH_CHECK_TYPE(
      at::isFloatingType(input.scalar_type()) && scale.scalar_type() == at::toOpMathType(input.scalar_type()), op,
      ": expected scale to be ", name_of(at::toOpMathType(input.scalar_type())), " for ", name_of(input.scalar_type()),
      " input, got ", name_of(scale.scalar_type()));
  return checked_static_range(op, input, magnitude_of(scale), zero_point, quant_min, quant_max, granularity);
}

} // namespace

Tensor fake_quantize_learned(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, at::IntArrayRef code) {
  constexpr auto op = "fake_quantize_learned";
  check_float(op, "input", input.scalar_type());
  const auto [granularity, qparams] = checked(op, input, scale, zero_point, quant_min, quant_max, code);
  const auto from = as_blocks(input, granularity);
  const auto to = result_for(input, from);
  QATFAST_ON(input, fake_quantize_learned)
  (from, to, in_memory_order(qparams, from, granularity), layout_of(from, granularity));
  return laid_out_like(input, to, granularity);
}

std::tuple<Tensor, Tensor> fake_quantize_learned_backward(const Tensor& grad, const Tensor& input, const Tensor& scale,
    const Tensor& zero_point, int64_t quant_min, int64_t quant_max, at::IntArrayRef code) {
  constexpr auto op = "fake_quantize_learned_backward";
  check_float(op, "input", input.scalar_type());
  TORCH_CHECK_VALUE(grad.scalar_type() == input.scalar_type() && grad.sizes() == input.sizes(), op,
      ": expected grad to have the dtype and the shape of input, got ", name_of(grad.scalar_type()), " of shape ",
      tuple(grad.sizes()));
  check_device(op, "grad", grad, input);
  const auto [granularity, qparams] = checked(op, input, scale, zero_point, quant_min, quant_max, code);
  // Only CUDA's kernel takes channels that lie across a contiguous tensor.
  const bool moves = input.is_cpu() && granularity.kind == Granularity::per_channel;
  const auto in_order = [&](const Tensor& tensor) {
    return contiguous(moves ? tensor.movedim(granularity.argument, 0) : tensor);
  };
  const auto x = in_order(input), dy = in_order(grad);
  const auto blocks = blocks_of(input, granularity);
  const auto layout = moves ? Layout{1, blocks, blocks > 0 ? x.numel() / blocks : 0} : layout_of(x, granularity);
  const auto dx = fresh(x.sizes(), x.scalar_type(), x);
  const auto grad_scale = at::empty_like(scale, at::MemoryFormat::Contiguous);
  if (blocks > 0) {
    QATFAST_ON(x, fake_quantize_learned_backward)(dy, x, scale.contiguous(), qparams, layout, dx, grad_scale);
  }
  if (!moves && input.is_contiguous()) {
    return {dx, grad_scale};
  }
  const auto logical = moves ? dx.movedim(0, granularity.argument) : dx;
  auto grad_input = at::empty_like(input);
  return {logical.strides() == grad_input.strides() ? logical : copied(logical, grad_input), grad_scale};
}

} // namespace kernel

namespace autograd {
namespace {

struct FakeQuantizeLearnedNode : Function<FakeQuantizeLearnedNode> {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& scale,
      const Variable& zero_point, int64_t quant_min, int64_t quant_max, at::IntArrayRef granularity) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({input, scale, zero_point});
    ctx->saved_data["quant_min"] = quant_min;
    ctx->saved_data["quant_max"] = quant_max;
    ctx->saved_data["granularity"] = granularity;
    at::AutoDispatchBelowADInplaceOrView below;
    return op::fake_quantize_learned(input, scale, zero_point, quant_min, quant_max, granularity);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(6);
    if (grads[0].defined()) {
      const auto saved = ctx->get_saved_variables();
      const auto grad = grads[0].is_sparse() ? grads[0].to_dense() : grads[0];
      std::tie(result[0], result[1]) =
          op::fake_quantize_learned_backward(grad, saved[0], saved[1], saved[2], ctx->saved_data["quant_min"].toInt(),
              ctx->saved_data["quant_max"].toInt(), ctx->saved_data["granularity"].toIntVector());
    }
    return result;
  }
};

} // namespace

Tensor fake_quantize_learned(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, at::IntArrayRef granularity) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !is_dual(input) && !is_dual(scale), "fake_quantize_learned: forward-mode AD is not supported");
  if (compute_requires_grad(input, scale)) {
    return FakeQuantizeLearnedNode::apply(input, scale, zero_point, quant_min, quant_max, granularity);
  }
  return op::fake_quantize_learned.below_autograd(input, scale, zero_point, quant_min, quant_max, granularity);
}

} // namespace autograd
} // namespace qatfast
