// Every schema and every registration.
//
// granularity: (kind, argument), kind 0 per tensor, 1 per channel (axis), 2 per group (group_size), 3 per token.
// specs: LinearSpecs (common/qparams.h); weight_spec is one of its codes.
#include "operators.h"

#include <ATen/core/enum_tag.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <vector>

namespace qatfast {

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
  m.def(
      "fake_quantize_learned(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
      "int[2] granularity=[0, 0]) -> Tensor",
      tags);
  m.def(
      "search_qparams(Tensor input, int num_bits=8, bool symmetric=False, int[2] granularity=[0, 0], "
      "bool narrow_range=True) -> (Tensor scale, Tensor zero_point)",
      tags);
  // dtype: of the product, if it differs from that of the tensors (autocast)
  m.def(
      "qat_linear(Tensor input, Tensor weight, Tensor? bias, int[] specs, *, ScalarType? dtype=None) -> Tensor", tags);

  // The stored range of a module. averaging_constant: 0 for a range that only widens
  m.def(
      "observe_range(Tensor input, Tensor(a!) running_min, Tensor(b!) running_max, Tensor(c!) num_batches, "
      "float averaging_constant, int num_bits, bool symmetric, int[2] granularity, bool narrow_range) "
      "-> (Tensor scale, Tensor zero_point)",
      tags);
  // observe_range and fake_quantize_affine in one pass; scale and zero_point are those that quantize the input
  m.def(
      "fake_quantize_observed(Tensor input, Tensor(a!) running_min, Tensor(b!) running_max, Tensor(c!) num_batches, "
      "float averaging_constant, int num_bits, bool symmetric, int[2] granularity, bool narrow_range) "
      "-> (Tensor output, Tensor scale, Tensor zero_point)",
      tags);
  // lo, hi: float32 or float64; dtype: that of the scale, to which they are converted first
  m.def(
      "qparams_of_range(Tensor lo, Tensor hi, int num_bits, bool symmetric, bool narrow_range, ScalarType dtype) "
      "-> (Tensor scale, Tensor zero_point)",
      tags);

  // What autograd calls: forwards that also return what their backward needs.
  // mask: one bit per element in the memory order of the output (on a GPU of a contiguous one if blocks are rows).
  m.def(
      "fake_quantize_affine_forward(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
      "int[2] granularity=[0, 0]) -> (Tensor output, Tensor mask)",
      tags);
  m.def(
      "fake_quantize_observed_forward(Tensor input, Tensor(a!) running_min, Tensor(b!) running_max, "
      "Tensor(c!) num_batches, float averaging_constant, int num_bits, bool symmetric, int[2] granularity, "
      "bool narrow_range) -> (Tensor output, Tensor mask, Tensor scale, Tensor zero_point)",
      tags);
  m.def("fake_quantize_affine_backward(Tensor grad, Tensor mask, SymInt[] stride) -> Tensor", tags);
  m.def(
      "fake_quantize_learned_backward(Tensor grad, Tensor input, Tensor scale, Tensor zero_point, int quant_min, "
      "int quant_max, int[2] granularity) -> (Tensor grad_input, Tensor grad_scale)",
      tags);
  // weight_hat: the fake-quantized weight in the product's dtype, without elements if the weight stays in float
  m.def(
      "qat_linear_forward(Tensor input, Tensor weight, Tensor? bias, int[] specs, *, ScalarType? dtype=None) "
      "-> (Tensor output, Tensor weight_hat)",
      tags);
  m.def("qat_linear_grad_weight(Tensor grad, Tensor input) -> Tensor", tags);

  // The same layer on int8. The weight is quantized once for any number of calls:
  m.def(
      "qat_linear_int8_weight(Tensor weight, int[] weight_spec) "
      "-> (Tensor values, Tensor scale, Tensor zero_point, Tensor level_sums)",
      tags);
  m.def(
      "qat_linear_int8(Tensor input, Tensor weight, Tensor? bias, Tensor[] int8_weight, int[] specs, *, "
      "ScalarType? dtype=None) -> Tensor",
      tags);
  m.def(
      "qat_linear_int8_static(Tensor input, Tensor weight, Tensor? bias_hat, Tensor[] int8_weight, "
      "Tensor? input_scale, Tensor? input_zero_point, Tensor? weight_scale, Tensor? weight_zero_point, int[] specs) "
      "-> Tensor",
      tags);
  // mask: one bit per element of the input; values, scale and zero_point: the int8 input
  m.def(
      "qat_linear_int8_static_forward(Tensor input, Tensor weight, Tensor? bias_hat, Tensor[] int8_weight, "
      "Tensor input_scale, Tensor input_zero_point, int[] specs) "
      "-> (Tensor output, Tensor mask, Tensor values, Tensor scale, Tensor zero_point)",
      tags);
  m.def(
      "qat_linear_int8_static_backward(Tensor grad, Tensor mask, Tensor values, Tensor scale, Tensor zero_point, "
      "Tensor weight, int[] weight_spec) -> (Tensor grad_input, Tensor grad_weight)",
      tags);
  // values, scale and zero_point: the int8 input
  m.def(
      "qat_linear_int8_forward(Tensor input, Tensor weight, Tensor? bias, Tensor[] int8_weight, "
      "int[] specs, *, ScalarType? dtype=None) -> (Tensor output, Tensor values, Tensor scale, Tensor zero_point)",
      tags);
  m.def("qat_linear_int8_input(Tensor values, Tensor scale, Tensor zero_point, ScalarType dtype) -> Tensor", tags);
  m.def(
      "qat_linear_int8_backward(Tensor grad, Tensor values, Tensor scale, Tensor zero_point, Tensor weight, "
      "int[] weight_spec) -> (Tensor grad_input, Tensor grad_weight)",
      tags);

  // A convolution of integers. values: uint8; a grid below 0 is moved up by 128, to shifted_zero_point
  // poison: NaN if the input holds a NaN, else 0
  m.def(
      "int8_conv_input(Tensor input, Tensor? scale, Tensor? zero_point, Tensor(a!)? running_min, "
      "Tensor(b!)? running_max, Tensor(c!)? num_batches, float averaging_constant, int[] input_spec, bool with_mask) "
      "-> (Tensor values, Tensor mask, Tensor scale, Tensor zero_point, Tensor shifted_zero_point, Tensor poison)",
      tags);
  m.def("int8_conv_scale_(Tensor(a!) sums, Tensor input_scale, Tensor weight_scale, Tensor? bias) -> Tensor largest",
      tags);
  m.def(
      "int8_requantize_(Tensor(a!) sums, Tensor offset, Tensor factor, float low, float high, float scale) "
      "-> Tensor(a!)",
      tags);
  m.def("int8_conv_mask_(Tensor(a!) grad, Tensor mask, Tensor values) -> Tensor(a!)", tags);
  m.def(
      "int8_conv_depthwise(Tensor values, Tensor scale, Tensor shifted_zero_point, Tensor weight, "
      "Tensor weight_scale, Tensor? bias, int[] kernel_size, int[] stride, int[] padding, int[] dilation) -> Tensor",
      tags);
  m.def(
      "int8_conv_depthwise_backward(Tensor grad, Tensor values, Tensor scale, Tensor shifted_zero_point, "
      "Tensor weight_hat, Tensor? mask, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      tags);
}

namespace {

// The same for every device; what differs is behind QATFAST_ON.
void register_kernels(torch::Library& m) {
  m.impl("fake_quantize", kernel::fake_quantize);
  m.impl("fake_quantize_affine", kernel::fake_quantize_affine);
  m.impl("fake_quantize_affine_forward", kernel::fake_quantize_affine_forward);
  m.impl("fake_quantize_affine_backward", kernel::fake_quantize_affine_backward);
  m.impl("choose_qparams", kernel::choose_qparams);
  m.impl("quantize", kernel::quantize);
  m.impl("dequantize", kernel::dequantize);
  m.impl("qat_linear", kernel::qat_linear);
  m.impl("qat_linear_forward", kernel::qat_linear_forward);
  m.impl("qat_linear_grad_weight", kernel::qat_linear_grad_weight);
  m.impl("qat_linear_int8", kernel::qat_linear_int8);
  m.impl("qat_linear_int8_weight", kernel::qat_linear_int8_weight);
  m.impl("qat_linear_int8_forward", kernel::qat_linear_int8_forward);
  m.impl("qat_linear_int8_input", kernel::qat_linear_int8_input);
  m.impl("qat_linear_int8_backward", kernel::qat_linear_int8_backward);
  m.impl("fake_quantize_learned", kernel::fake_quantize_learned);
  m.impl("fake_quantize_learned_backward", kernel::fake_quantize_learned_backward);
  m.impl("search_qparams", kernel::search_qparams);
  m.impl("observe_range", kernel::observe_range);
  m.impl("fake_quantize_observed", kernel::fake_quantize_observed);
  m.impl("fake_quantize_observed_forward", kernel::fake_quantize_observed_forward);
  m.impl("qat_linear_int8_static", kernel::qat_linear_int8_static);
}

void register_autocast(torch::Library& m) {
  m.impl("qat_linear", autocast::qat_linear);
  m.impl("qat_linear_int8", autocast::qat_linear_int8);
}

} // namespace

TORCH_LIBRARY_IMPL(qatfast, CPU, m) {
  register_kernels(m);
  m.impl("qparams_of_range", kernel::qparams_of_range);
  m.impl("qat_linear_int8_static_forward", kernel::qat_linear_int8_static_forward);
  m.impl("qat_linear_int8_static_backward", kernel::qat_linear_int8_static_backward);
  m.impl("int8_conv_input", kernel::int8_conv_input);
  m.impl("int8_conv_scale_", kernel::int8_conv_scale_);
  m.impl("int8_requantize_", kernel::int8_requantize_);
  m.impl("int8_conv_mask_", kernel::int8_conv_mask_);
  m.impl("int8_conv_depthwise", kernel::int8_conv_depthwise);
  m.impl("int8_conv_depthwise_backward", kernel::int8_conv_depthwise_backward);
}

TORCH_LIBRARY_IMPL(qatfast, AutocastCPU, m) {
  register_autocast(m);
}

#ifdef QATFAST_CUDA
TORCH_LIBRARY_IMPL(qatfast, CUDA, m) {
  register_kernels(m);
}

TORCH_LIBRARY_IMPL(qatfast, AutocastCUDA, m) {
  register_autocast(m);
}
#endif

TORCH_LIBRARY_IMPL(qatfast, Autograd, m) {
  m.impl("fake_quantize", autograd::fake_quantize);
  m.impl("fake_quantize_affine", autograd::fake_quantize_affine);
  m.impl("fake_quantize_affine_backward", autograd::fake_quantize_affine_backward);
  m.impl("dequantize", autograd::dequantize);
  m.impl("fake_quantize_learned", autograd::fake_quantize_learned);
  m.impl("fake_quantize_observed", autograd::fake_quantize_observed);
  m.impl("qat_linear", autograd::qat_linear);
  m.impl("qat_linear_int8", autograd::qat_linear_int8);
  m.impl("qat_linear_int8_static", autograd::qat_linear_int8_static);
  // Their results never require grad.
  m.impl("choose_qparams", op::choose_qparams.below_autograd);
  m.impl("search_qparams", op::search_qparams.below_autograd);
  m.impl("observe_range", op::observe_range.below_autograd);
  m.impl("qparams_of_range", op::qparams_of_range.below_autograd);
  m.impl("quantize", op::quantize.below_autograd);
  m.impl("qat_linear_int8_weight", op::qat_linear_int8_weight.below_autograd);
  // The operators above call these below autograd; differentiating one is an error.
  for (const char* name : {"fake_quantize_affine_forward", "fake_quantize_observed_forward",
           "fake_quantize_learned_backward", "qat_linear_forward", "qat_linear_grad_weight",
           "qat_linear_int8_static_forward", "qat_linear_int8_static_backward", "qat_linear_int8_forward",
           "qat_linear_int8_input", "qat_linear_int8_backward", "int8_conv_input", "int8_conv_scale_",
           "int8_requantize_", "int8_conv_depthwise", "int8_conv_depthwise_backward", "int8_conv_mask_"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

} // namespace qatfast
