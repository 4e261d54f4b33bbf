// Every operator as a C++ callable: `op::` calls it through the dispatcher, `kernel::` is what runs on a device, and
// `autograd::` is what runs on the Autograd key if results of the operator can require grad. Definitions: ops/*.cpp.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymIntArrayRef.h>

#include <optional>
#include <tuple>

namespace qatfast {

using at::Tensor;

template <class Name, class Signature>
struct Operator;

template <class Name, class Result, class... Args>
struct Operator<Name, Result(Args...)> {
  Result operator()(Args... args) const {
    static const auto handle =
        c10::Dispatcher::singleton().findSchemaOrThrow(Name::value, "").template typed<Result(Args...)>();
    return handle.call(args...);
  }

  // The kernel on the Autograd key of an operator whose results never require grad.
  static Result below_autograd(Args... args) {
    at::AutoDispatchBelowADInplaceOrView below;
    return Operator{}(args...);
  }
};

#define QATFAST_OPERATOR(name, ...)                                \
  namespace op {                                                   \
  struct name##_name {                                             \
    static constexpr const char* value = "qatfast::" #name;        \
  };                                                               \
  using name##_signature = __VA_ARGS__;                            \
  inline constexpr Operator<name##_name, name##_signature> name{}; \
  }                                                                \
  namespace kernel {                                               \
  op::name##_signature name;                                       \
  }                                                                \
  namespace autograd {                                             \
  op::name##_signature name;                                       \
  }

QATFAST_OPERATOR(fake_quantize,
    Tensor(const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range))

QATFAST_OPERATOR(choose_qparams,
    std::tuple<Tensor, Tensor>(
        const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range))

QATFAST_OPERATOR(fake_quantize_affine,
    Tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
        at::IntArrayRef granularity))

// Also returns the mask of the gradient.
QATFAST_OPERATOR(fake_quantize_affine_forward,
    std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
        int64_t quant_max, at::IntArrayRef granularity))

QATFAST_OPERATOR(
    fake_quantize_affine_backward, Tensor(const Tensor& grad, const Tensor& mask, c10::SymIntArrayRef stride))

QATFAST_OPERATOR(fake_quantize_learned,
    Tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
        at::IntArrayRef granularity))

// The gradients of input and scale.
QATFAST_OPERATOR(fake_quantize_learned_backward,
    std::tuple<Tensor, Tensor>(const Tensor& grad, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
        int64_t quant_min, int64_t quant_max, at::IntArrayRef granularity))

QATFAST_OPERATOR(search_qparams,
    std::tuple<Tensor, Tensor>(
        const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range))

// Moves the stored range; returns the scale and the zero point that quantize the input.
QATFAST_OPERATOR(observe_range,
    std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& running_min, const Tensor& running_max,
        const Tensor& num_batches, double averaging_constant, int64_t num_bits, bool symmetric,
        at::IntArrayRef granularity, bool narrow_range))

// The input quantized with that range, before it moves.
QATFAST_OPERATOR(fake_quantize_observed,
    std::tuple<Tensor, Tensor, Tensor>(const Tensor& input, const Tensor& running_min, const Tensor& running_max,
        const Tensor& num_batches, double averaging_constant, int64_t num_bits, bool symmetric,
        at::IntArrayRef granularity, bool narrow_range))

// Also returns the mask of the gradient, after the output.
QATFAST_OPERATOR(fake_quantize_observed_forward,
    std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& input, const Tensor& running_min,
        const Tensor& running_max, const Tensor& num_batches, double averaging_constant, int64_t num_bits,
        bool symmetric, at::IntArrayRef granularity, bool narrow_range))

QATFAST_OPERATOR(qparams_of_range,
    std::tuple<Tensor, Tensor>(
        const Tensor& lo, const Tensor& hi, int64_t num_bits, bool symmetric, bool narrow_range, at::ScalarType dtype))

QATFAST_OPERATOR(quantize,
    Tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
        at::IntArrayRef granularity))

QATFAST_OPERATOR(dequantize,
    Tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point, at::IntArrayRef granularity,
        at::ScalarType dtype))

QATFAST_OPERATOR(qat_linear,
    Tensor(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef specs,
        std::optional<at::ScalarType> dtype))

// Also returns the fake-quantized weight.
QATFAST_OPERATOR(qat_linear_forward,
    std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
        at::IntArrayRef specs, std::optional<at::ScalarType> dtype))

// dy.T @ x
QATFAST_OPERATOR(qat_linear_grad_weight, Tensor(const Tensor& grad, const Tensor& input))

// The weight as Int8Rows: values, scale, zero_point, level_sums.
QATFAST_OPERATOR(qat_linear_int8_weight,
    std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& weight, at::IntArrayRef weight_spec))

QATFAST_OPERATOR(qat_linear_int8,
    Tensor(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::TensorList int8_weight,
        at::IntArrayRef specs, std::optional<at::ScalarType> dtype))

// The result of the layer without its output's quantizer, in the opmath type, with the grids of input and weight if
// they are given. The bias is fake-quantized already. The gradients are those of a static input and a dynamic weight.
QATFAST_OPERATOR(qat_linear_int8_static,
    Tensor(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias_hat, at::TensorList int8_weight,
        const std::optional<Tensor>& input_scale, const std::optional<Tensor>& input_zero_point,
        const std::optional<Tensor>& weight_scale, const std::optional<Tensor>& weight_zero_point,
        at::IntArrayRef specs))

// Also returns the mask of the input's gradient, and the input as int8 values with scale and zero point.
QATFAST_OPERATOR(qat_linear_int8_static_forward,
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor& input, const Tensor& weight,
        const std::optional<Tensor>& bias_hat, at::TensorList int8_weight, const Tensor& input_scale,
        const Tensor& input_zero_point, at::IntArrayRef specs))

// The gradients of input and weight: dy @ w_hat where the mask is set, dy.T @ x_hat.
QATFAST_OPERATOR(qat_linear_int8_static_backward,
    std::tuple<Tensor, Tensor>(const Tensor& grad, const Tensor& mask, const Tensor& values, const Tensor& scale,
        const Tensor& zero_point, const Tensor& weight, at::IntArrayRef weight_spec))

// Also returns the input as int8 values with scale and zero point.
QATFAST_OPERATOR(qat_linear_int8_forward,
    std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& input, const Tensor& weight,
        const std::optional<Tensor>& bias, at::TensorList int8_weight, at::IntArrayRef specs,
        std::optional<at::ScalarType> dtype))

// The fake-quantized input from its int8 values.
QATFAST_OPERATOR(qat_linear_int8_input,
    Tensor(const Tensor& values, const Tensor& scale, const Tensor& zero_point, at::ScalarType dtype))

// The gradients of input and weight: dy @ w_hat, dy.T @ x_hat.
QATFAST_OPERATOR(qat_linear_int8_backward,
    std::tuple<Tensor, Tensor>(const Tensor& grad, const Tensor& values, const Tensor& scale, const Tensor& zero_point,
        const Tensor& weight, at::IntArrayRef weight_spec))

// The integers of a convolution's input (uint8), the mask of its gradient, scale and zero point of its grid, the zero
// point of the integers, and NaN if the input holds a NaN. The grid is the given one, or that of the stored range,
// which moves, or that of the input.
QATFAST_OPERATOR(int8_conv_input,
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor& input, const std::optional<Tensor>& scale,
        const std::optional<Tensor>& zero_point, const std::optional<Tensor>& running_min,
        const std::optional<Tensor>& running_max, const std::optional<Tensor>& num_batches, double averaging_constant,
        at::IntArrayRef input_spec, bool with_mask))

// sums * (input_scale * weight_scale) + bias, in place. Returns the largest magnitude of a sum.
QATFAST_OPERATOR(int8_conv_scale_,
    Tensor(
        const Tensor& sums, const Tensor& input_scale, const Tensor& weight_scale, const std::optional<Tensor>& bias))

// Overwrites sums (int32, or integers in float32) by the float32 values of the integers that follow from sums + offset.
QATFAST_OPERATOR(int8_requantize_,
    Tensor(const Tensor& sums, const Tensor& offset, const Tensor& factor, double low, double high, double scale))

// The result of a depthwise convolution in two dimensions, from the integers of the input.
QATFAST_OPERATOR(int8_conv_depthwise,
    Tensor(const Tensor& values, const Tensor& scale, const Tensor& shifted_zero_point, const Tensor& weight,
        const Tensor& weight_scale, const std::optional<Tensor>& bias, at::IntArrayRef kernel_size,
        at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation))

// Its gradients by input, weight (channels, taps) and bias, those that output_mask selects. That of the input passes
// where the mask, which has the order of `values`, is set.
QATFAST_OPERATOR(int8_conv_depthwise_backward,
    std::tuple<Tensor, Tensor, Tensor>(const Tensor& grad, const Tensor& values, const Tensor& scale,
        const Tensor& shifted_zero_point, const Tensor& weight_hat, const std::optional<Tensor>& mask,
        at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
        std::array<bool, 3> output_mask))

// Sets the gradient of the input to 0, in place, where the mask is not set. `values` has the mask's order.
QATFAST_OPERATOR(int8_conv_mask_, Tensor(const Tensor& grad, const Tensor& mask, const Tensor& values))

#undef QATFAST_OPERATOR

// What runs on the autocast keys.
namespace autocast {
op::qat_linear_signature qat_linear;
op::qat_linear_int8_signature qat_linear_int8;
} // namespace autocast

} // namespace qatfast
