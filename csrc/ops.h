// Every operator as a C++ callable: op:: goes through the dispatcher, autograd:: is its kernel on the Autograd key.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymIntArrayRef.h>

#include <optional>
#include <tuple>

namespace qatfast {

using at::Tensor;

using FakeQuantize = Tensor(
    const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range);

using FakeQuantizeAffine = Tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, at::IntArrayRef granularity);

using FakeQuantizeAffineForward = std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& scale,
    const Tensor& zero_point, int64_t quant_min, int64_t quant_max, at::IntArrayRef granularity);

using FakeQuantizeAffineBackward = Tensor(const Tensor& grad, const Tensor& mask, c10::SymIntArrayRef stride);

using ChooseQParams = std::tuple<Tensor, Tensor>(
    const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range);

using Quantize = Tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, at::IntArrayRef granularity);

using Dequantize = Tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point,
    at::IntArrayRef granularity, at::ScalarType dtype);

using QATLinear = Tensor(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::IntArrayRef specs, std::optional<at::ScalarType> dtype);

using QATLinearForward = std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias, at::IntArrayRef specs, std::optional<at::ScalarType> dtype);

// The integers of a weight, as IntegerRows has them.
using QATLinearWeight = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& weight, at::IntArrayRef weight_spec);

using QATLinearIntegers = Tensor(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::TensorList weight_integers, at::IntArrayRef specs, std::optional<at::ScalarType> dtype);

using QATLinearIntegersForward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias, at::TensorList weight_integers, at::IntArrayRef specs,
    std::optional<at::ScalarType> dtype);

using QATLinearInput = Tensor(
    const Tensor& values, const Tensor& scale, const Tensor& zero_point, at::ScalarType dtype);

// The gradients of input and weight: dy @ w_hat, dy.T @ x_hat.
using QATLinearIntegersBackward = std::tuple<Tensor, Tensor>(const Tensor& grad, const Tensor& values,
    const Tensor& scale, const Tensor& zero_point, const Tensor& weight, at::IntArrayRef weight_spec);

// dy.T @ x
using QATLinearGradWeight = Tensor(const Tensor& grad, const Tensor& input);

// x itself where it has that dtype: even an empty conversion costs a small layer a percent.
inline Tensor as_dtype(const Tensor& x, at::ScalarType dtype) {
  return x.scalar_type() == dtype ? x : x.to(dtype);
}

namespace op {

template <class Name, class Signature>
struct Operator;

template <class Name, class Result, class... Args>
struct Operator<Name, Result(Args...)> {
  Result operator()(Args... args) const {
    static const auto handle =
        c10::Dispatcher::singleton().findSchemaOrThrow(Name::value, "").template typed<Result(Args...)>();
    return handle.call(args...);
  }
};

#define QATFAST_OPERATOR(name, Signature)                   \
  struct name##_name {                                      \
    static constexpr const char* value = "qatfast::" #name; \
  };                                                        \
  inline constexpr Operator<name##_name, Signature> name {}

QATFAST_OPERATOR(fake_quantize, FakeQuantize);
QATFAST_OPERATOR(fake_quantize_affine, FakeQuantizeAffine);
QATFAST_OPERATOR(fake_quantize_affine_forward, FakeQuantizeAffineForward);
QATFAST_OPERATOR(fake_quantize_affine_backward, FakeQuantizeAffineBackward);
QATFAST_OPERATOR(choose_qparams, ChooseQParams);
QATFAST_OPERATOR(quantize, Quantize);
QATFAST_OPERATOR(dequantize, Dequantize);
QATFAST_OPERATOR(qat_linear, QATLinear);
QATFAST_OPERATOR(qat_linear_forward, QATLinearForward);
QATFAST_OPERATOR(qat_linear_weight, QATLinearWeight);
QATFAST_OPERATOR(qat_linear_integers, QATLinearIntegers);
QATFAST_OPERATOR(qat_linear_integers_forward, QATLinearIntegersForward);
QATFAST_OPERATOR(qat_linear_input, QATLinearInput);
QATFAST_OPERATOR(qat_linear_integers_backward, QATLinearIntegersBackward);
QATFAST_OPERATOR(qat_linear_grad_weight, QATLinearGradWeight);

#undef QATFAST_OPERATOR

} // namespace op

namespace autograd {

FakeQuantize fake_quantize;
FakeQuantizeAffine fake_quantize_affine;
FakeQuantizeAffineBackward fake_quantize_affine_backward;
ChooseQParams choose_qparams;
Quantize quantize;
Dequantize dequantize;
QATLinear qat_linear;
QATLinear qat_linear_under_autocast;
QATLinearWeight qat_linear_weight;
QATLinearIntegers qat_linear_integers;
QATLinearIntegers qat_linear_integers_under_autocast;

} // namespace autograd
} // namespace qatfast
