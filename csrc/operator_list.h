// The table of contents: every operator and its launcher. Included several times, each time with other definitions of
// some of the macros, so that a signature stands in one place; therefore without an include guard.
//
//     QATFAST_OPERATOR(name, devices, gradient, schema, signature)
//     QATFAST_LAUNCHER(name, signature)
//     QATFAST_MAP(name)
//
// devices: `all`, or `cpu` if there is no CUDA kernel.
// gradient: `node`: autograd::name runs on the Autograd key; `none`: the results never require grad; `undefined`:
// differentiating the operator is an error, for operators that others call below autograd.
// signature: of op::, kernel:: and autograd::name (operators.h), or of cpu::name and cuda::name (launchers.h).
//
// QATFAST_MAP: an operator that computes each element from itself and the grid of a static range, and `name`_forward,
// which also returns the mask of its gradient. All code of both follows from two formulas of common/quant_math.h:
// `name` is the value, never -0.0, and `name`_forward that and whether the gradient passes (static_range.* of ops/,
// cpu/ and cuda/).
//
// granularity: (kind, argument), kind 0 per tensor, 1 per channel (axis), 2 per group (group_size), 3 per token.
// specs: LinearSpecs (common/qparams.h); weight_spec is one of its codes.
//
// Names in ..._forward: also returns what the backward needs.
// mask: one bit per element in the memory order of the output (on a GPU of a contiguous one if blocks are rows).

#ifndef QATFAST_OPERATOR
#define QATFAST_OPERATOR(...)
#endif
#ifndef QATFAST_LAUNCHER
#define QATFAST_LAUNCHER(...)
#endif
#ifndef QATFAST_MAP
#define QATFAST_MAP(name)                                                                                              \
  QATFAST_OPERATOR(name, all, node,                                                                                    \
      "(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int[2] granularity=[0, 0]) "      \
      "-> Tensor",                                                                                                     \
      Tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max, \
          at::IntArrayRef granularity))                                                                                \
  QATFAST_OPERATOR(name##_forward, all, undefined,                                                                     \
      "(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int[2] granularity=[0, 0]) "      \
      "-> (Tensor output, Tensor mask)",                                                                               \
      std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& scale, const Tensor& zero_point,                   \
          int64_t quant_min, int64_t quant_max, at::IntArrayRef granularity))                                          \
  QATFAST_LAUNCHER(name, MapLauncher)
#endif

QATFAST_OPERATOR(fake_quantize, all, node,
    "(Tensor input, int num_bits=8, bool symmetric=False, int[2] granularity=[0, 0], bool "
    "narrow_range=True) -> Tensor",
    Tensor(const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range))
QATFAST_LAUNCHER(fake_quantize, FakeQuantizeLauncher)

QATFAST_MAP(fake_quantize_affine)

QATFAST_OPERATOR(choose_qparams, all, none,
    "(Tensor input, int num_bits=8, bool symmetric=False, int[2] granularity=[0, 0], bool "
    "narrow_range=True) -> (Tensor scale, Tensor zero_point)",
    std::tuple<Tensor, Tensor>(
        const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range))
QATFAST_LAUNCHER(choose_qparams, ChooseQParamsLauncher)

QATFAST_OPERATOR(quantize, all, none,
    "(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int[2] "
    "granularity=[0, 0]) -> Tensor",
    Tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
        at::IntArrayRef granularity))
QATFAST_LAUNCHER(quantize, ConvertLauncher)

QATFAST_OPERATOR(dequantize, all, node,
    "(Tensor input, Tensor scale, Tensor zero_point, int[2] granularity=[0, 0], ScalarType dtype=float) "
    "-> Tensor",
    Tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point, at::IntArrayRef granularity,
        at::ScalarType dtype))
QATFAST_LAUNCHER(dequantize, ConvertLauncher)

QATFAST_OPERATOR(fake_quantize_learned, all, node,
    "(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int[2] "
    "granularity=[0, 0]) -> Tensor",
    Tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
        at::IntArrayRef granularity))
QATFAST_LAUNCHER(fake_quantize_learned, ConvertLauncher)

QATFAST_OPERATOR(search_qparams, all, none,
    "(Tensor input, int num_bits=8, bool symmetric=False, int[2] granularity=[0, 0], bool "
    "narrow_range=True) -> (Tensor scale, Tensor zero_point)",
    std::tuple<Tensor, Tensor>(
        const Tensor& input, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range))
QATFAST_LAUNCHER(search_qparams, SearchQParamsLauncher)

// dtype: of the product, if it differs from that of the tensors (autocast)
QATFAST_OPERATOR(qat_linear, all, node,
    "(Tensor input, Tensor weight, Tensor? bias, int[] specs, *, ScalarType? dtype=None) -> Tensor",
    Tensor(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef specs,
        std::optional<at::ScalarType> dtype))
QATFAST_LAUNCHER(qat_linear, QATLinearLauncher)

// Moves the stored range of a module; returns the scale and the zero point that quantize the input.
// averaging_constant: 0 for a range that only widens
QATFAST_OPERATOR(observe_range, all, none,
    "(Tensor input, Tensor(a!) running_min, Tensor(b!) running_max, Tensor(c!) num_batches, float "
    "averaging_constant, int num_bits, bool symmetric, int[2] granularity, bool narrow_range) -> (Tensor "
    "scale, Tensor zero_point)",
    std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& running_min, const Tensor& running_max,
        const Tensor& num_batches, double averaging_constant, int64_t num_bits, bool symmetric,
        at::IntArrayRef granularity, bool narrow_range))

// observe_range and fake_quantize_affine in one pass: the input is quantized with the range before it moves.
QATFAST_OPERATOR(fake_quantize_observed, all, node,
    "(Tensor input, Tensor(a!) running_min, Tensor(b!) running_max, Tensor(c!) num_batches, float "
    "averaging_constant, int num_bits, bool symmetric, int[2] granularity, bool narrow_range) -> (Tensor "
    "output, Tensor scale, Tensor zero_point)",
    std::tuple<Tensor, Tensor, Tensor>(const Tensor& input, const Tensor& running_min, const Tensor& running_max,
        const Tensor& num_batches, double averaging_constant, int64_t num_bits, bool symmetric,
        at::IntArrayRef granularity, bool narrow_range))

// lo, hi: float32 or float64; dtype: that of the scale, to which they are converted first
QATFAST_OPERATOR(qparams_of_range, cpu, none,
    "(Tensor lo, Tensor hi, int num_bits, bool symmetric, bool narrow_range, ScalarType dtype) -> "
    "(Tensor scale, Tensor zero_point)",
    std::tuple<Tensor, Tensor>(
        const Tensor& lo, const Tensor& hi, int64_t num_bits, bool symmetric, bool narrow_range, at::ScalarType dtype))

QATFAST_OPERATOR(fake_quantize_observed_forward, all, undefined,
    "(Tensor input, Tensor(a!) running_min, Tensor(b!) running_max, Tensor(c!) num_batches, float "
    "averaging_constant, int num_bits, bool symmetric, int[2] granularity, bool narrow_range) -> (Tensor "
    "output, Tensor mask, Tensor scale, Tensor zero_point)",
    std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& input, const Tensor& running_min,
        const Tensor& running_max, const Tensor& num_batches, double averaging_constant, int64_t num_bits,
        bool symmetric, at::IntArrayRef granularity, bool narrow_range))

QATFAST_OPERATOR(fake_quantize_affine_backward, all, node, "(Tensor grad, Tensor mask, SymInt[] stride) -> Tensor",
    Tensor(const Tensor& grad, const Tensor& mask, c10::SymIntArrayRef stride))
QATFAST_LAUNCHER(fake_quantize_affine_backward, FakeQuantizeAffineBackwardLauncher)

// F.relu or, with a limit, F.hardtanh(input, 0, limit): ATen's results and gradients (0 at both ends; a NaN passes it).
// Keeps one bit per element for its gradient, not the result.
QATFAST_OPERATOR(relu, all, node, "(Tensor input, float? limit=None) -> Tensor",
    Tensor(const Tensor& input, std::optional<double> limit))
QATFAST_LAUNCHER(relu, ReLULauncher)

QATFAST_OPERATOR(relu_forward, all, undefined, "(Tensor input, float? limit=None) -> (Tensor output, Tensor mask)",
    std::tuple<Tensor, Tensor>(const Tensor& input, std::optional<double> limit))

// The gradients of input and scale.
QATFAST_OPERATOR(fake_quantize_learned_backward, all, undefined,
    "(Tensor grad, Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int[2] "
    "granularity) -> (Tensor grad_input, Tensor grad_scale)",
    std::tuple<Tensor, Tensor>(const Tensor& grad, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
        int64_t quant_min, int64_t quant_max, at::IntArrayRef granularity))
QATFAST_LAUNCHER(fake_quantize_learned_backward, FakeQuantizeLearnedBackwardLauncher)

// weight_hat: the fake-quantized weight in the product's dtype, without elements if the weight stays in float
QATFAST_OPERATOR(qat_linear_forward, all, undefined,
    "(Tensor input, Tensor weight, Tensor? bias, int[] specs, *, ScalarType? dtype=None) -> (Tensor "
    "output, Tensor weight_hat)",
    std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
        at::IntArrayRef specs, std::optional<at::ScalarType> dtype))

// dy.T @ x
QATFAST_OPERATOR(qat_linear_grad_weight, all, undefined, "(Tensor grad, Tensor input) -> Tensor",
    Tensor(const Tensor& grad, const Tensor& input))

// The weight as Int8Rows, which is quantized once for any number of calls of the layers below.
QATFAST_OPERATOR(qat_linear_int8_weight, all, none,
    "(Tensor weight, int[] weight_spec) -> (Tensor values, Tensor scale, Tensor zero_point, Tensor "
    "level_sums)",
    std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& weight, at::IntArrayRef weight_spec))

// The product of an int8 GEMM, in the dtype of the scales. int8_input: Int8Rows, as int8_weight.
QATFAST_OPERATOR(int8_product, all, undefined, "(Tensor[] int8_input, Tensor[] int8_weight, Tensor? bias) -> Tensor",
    Tensor(at::TensorList int8_input, at::TensorList int8_weight, const std::optional<Tensor>& bias))

QATFAST_OPERATOR(qat_linear_int8, all, node,
    "(Tensor input, Tensor weight, Tensor? bias, Tensor[] int8_weight, int[] specs, *, ScalarType? "
    "dtype=None) -> Tensor",
    Tensor(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::TensorList int8_weight,
        at::IntArrayRef specs, std::optional<at::ScalarType> dtype))

// The result of the layer without its output's quantizer, in the opmath type, with the grids of input and weight if
// they are given. The bias is fake-quantized already. The gradients are those of a static input and a dynamic weight.
QATFAST_OPERATOR(qat_linear_int8_static, all, node,
    "(Tensor input, Tensor weight, Tensor? bias_hat, Tensor[] int8_weight, Tensor? input_scale, Tensor? "
    "input_zero_point, Tensor? weight_scale, Tensor? weight_zero_point, int[] specs) -> Tensor",
    Tensor(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias_hat, at::TensorList int8_weight,
        const std::optional<Tensor>& input_scale, const std::optional<Tensor>& input_zero_point,
        const std::optional<Tensor>& weight_scale, const std::optional<Tensor>& weight_zero_point,
        at::IntArrayRef specs))

// mask: one bit per element of the input; values, scale and zero_point: the int8 input
QATFAST_OPERATOR(qat_linear_int8_static_forward, cpu, undefined,
    "(Tensor input, Tensor weight, Tensor? bias_hat, Tensor[] int8_weight, Tensor input_scale, Tensor "
    "input_zero_point, int[] specs) -> (Tensor output, Tensor mask, Tensor values, Tensor scale, Tensor "
    "zero_point)",
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor& input, const Tensor& weight,
        const std::optional<Tensor>& bias_hat, at::TensorList int8_weight, const Tensor& input_scale,
        const Tensor& input_zero_point, at::IntArrayRef specs))

// The gradients of input and weight: dy @ w_hat where the mask is set, dy.T @ x_hat.
QATFAST_OPERATOR(qat_linear_int8_static_backward, cpu, undefined,
    "(Tensor grad, Tensor mask, Tensor values, Tensor scale, Tensor zero_point, Tensor weight, int[] "
    "weight_spec) -> (Tensor grad_input, Tensor grad_weight)",
    std::tuple<Tensor, Tensor>(const Tensor& grad, const Tensor& mask, const Tensor& values, const Tensor& scale,
        const Tensor& zero_point, const Tensor& weight, at::IntArrayRef weight_spec))

// values, scale and zero_point: the int8 input
QATFAST_OPERATOR(qat_linear_int8_forward, all, undefined,
    "(Tensor input, Tensor weight, Tensor? bias, Tensor[] int8_weight, int[] specs, *, ScalarType? "
    "dtype=None) -> (Tensor output, Tensor values, Tensor scale, Tensor zero_point)",
    std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& input, const Tensor& weight,
        const std::optional<Tensor>& bias, at::TensorList int8_weight, at::IntArrayRef specs,
        std::optional<at::ScalarType> dtype))

// The fake-quantized input from its int8 values.
QATFAST_OPERATOR(qat_linear_int8_input, all, undefined,
    "(Tensor values, Tensor scale, Tensor zero_point, ScalarType dtype) -> Tensor",
    Tensor(const Tensor& values, const Tensor& scale, const Tensor& zero_point, at::ScalarType dtype))

// The gradients of input and weight: dy @ w_hat, dy.T @ x_hat.
QATFAST_OPERATOR(qat_linear_int8_backward, all, undefined,
    "(Tensor grad, Tensor values, Tensor scale, Tensor zero_point, Tensor weight, int[] weight_spec) -> "
    "(Tensor grad_input, Tensor grad_weight)",
    std::tuple<Tensor, Tensor>(const Tensor& grad, const Tensor& values, const Tensor& scale, const Tensor& zero_point,
        const Tensor& weight, at::IntArrayRef weight_spec))

// The integers of a convolution's input (uint8), the mask of its gradient, scale and zero point of its grid, the zero
// point of the integers, and a poison: NaN if the input holds a NaN, else 0. The grid is the given one, or that of the
// stored range, which moves, or that of the input. Integers below 0 are moved up by 128, to shifted_zero_point.
QATFAST_OPERATOR(int8_conv_input, all, undefined,
    "(Tensor input, Tensor? scale, Tensor? zero_point, Tensor(a!)? running_min, Tensor(b!)? running_max, "
    "Tensor(c!)? num_batches, float averaging_constant, int[] input_spec, bool with_mask) -> (Tensor "
    "values, Tensor mask, Tensor scale, Tensor zero_point, Tensor shifted_zero_point, Tensor poison)",
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor& input, const std::optional<Tensor>& scale,
        const std::optional<Tensor>& zero_point, const std::optional<Tensor>& running_min,
        const std::optional<Tensor>& running_max, const std::optional<Tensor>& num_batches, double averaging_constant,
        at::IntArrayRef input_spec, bool with_mask))

// sums * (input_scale * weight_scale) + bias, in place. Returns the largest magnitude of a sum.
QATFAST_OPERATOR(int8_conv_scale_, cpu, undefined,
    "(Tensor(a!) sums, Tensor input_scale, Tensor weight_scale, Tensor? bias) -> Tensor largest",
    Tensor(
        const Tensor& sums, const Tensor& input_scale, const Tensor& weight_scale, const std::optional<Tensor>& bias))

// Overwrites sums (int32, or integers in float32) with the float32 values of the integers that follow from sums +
// offset.
QATFAST_OPERATOR(int8_requantize_, cpu, undefined,
    "(Tensor(a!) sums, Tensor offset, Tensor factor, float low, float high, float scale) -> Tensor(a!)",
    Tensor(const Tensor& sums, const Tensor& offset, const Tensor& factor, double low, double high, double scale))

// Sets the gradient of the input to 0, in place, where the mask is not set. `values` has the mask's order.
QATFAST_OPERATOR(int8_conv_mask_, all, undefined, "(Tensor(a!) grad, Tensor mask, Tensor values) -> Tensor(a!)",
    Tensor(const Tensor& grad, const Tensor& mask, const Tensor& values))

// The result of a depthwise convolution in two dimensions, from the integers of the input.
QATFAST_OPERATOR(int8_conv_depthwise, cpu, undefined,
    "(Tensor values, Tensor scale, Tensor shifted_zero_point, Tensor weight, Tensor weight_scale, "
    "Tensor? bias, int[] kernel_size, int[] stride, int[] padding, int[] dilation) -> Tensor",
    Tensor(const Tensor& values, const Tensor& scale, const Tensor& shifted_zero_point, const Tensor& weight,
        const Tensor& weight_scale, const std::optional<Tensor>& bias, at::IntArrayRef kernel_size,
        at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation))

// int8_conv_input and int8_conv_depthwise in one pass. If they are not wanted, values or mask may have no elements. The
// output is undefined if the poison is NaN.
QATFAST_OPERATOR(int8_conv_depthwise_forward, cpu, undefined,
    "(Tensor input, Tensor? scale, Tensor? zero_point, Tensor(a!)? running_min, Tensor(b!)? running_max, "
    "Tensor(c!)? num_batches, float averaging_constant, int[] input_spec, Tensor weight, Tensor weight_scale, "
    "Tensor? bias, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool with_values, bool with_mask) "
    "-> (Tensor values, Tensor mask, Tensor scale, Tensor zero_point, Tensor shifted_zero_point, Tensor poison, "
    "Tensor output)",
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor& input,
        const std::optional<Tensor>& scale, const std::optional<Tensor>& zero_point,
        const std::optional<Tensor>& running_min, const std::optional<Tensor>& running_max,
        const std::optional<Tensor>& num_batches, double averaging_constant, at::IntArrayRef input_spec,
        const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias,
        at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
        bool with_values, bool with_mask))

// Returns the gradients of int8_conv_depthwise by input, weight (channels, taps) and bias, those that output_mask
// selects. That of the input passes where the mask, which has the order of `values`, is set.
QATFAST_OPERATOR(int8_conv_depthwise_backward, cpu, undefined,
    "(Tensor grad, Tensor values, Tensor scale, Tensor shifted_zero_point, Tensor weight_hat, Tensor? mask, "
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool[3] output_mask) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    std::tuple<Tensor, Tensor, Tensor>(const Tensor& grad, const Tensor& values, const Tensor& scale,
        const Tensor& shifted_zero_point, const Tensor& weight_hat, const std::optional<Tensor>& mask,
        at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
        std::array<bool, 3> output_mask))

// What int8_conv_pointwise takes of a weight (outputs, channels) int8.
QATFAST_OPERATOR(int8_conv_pointwise_weight, cpu, undefined, "(Tensor weight) -> Tensor", Tensor(const Tensor& weight))

// The float32 result of a convolution by a kernel of one element. The input (batch, channels, ...) has the channels
// innermost in memory; it is uint8 integers, or floats that are quantized to them. A pixel with a NaN gives NaN.
QATFAST_OPERATOR(int8_conv_pointwise, cpu, undefined,
    "(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, Tensor weight, Tensor "
    "weight_scale, Tensor? bias) -> Tensor",
    Tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
        const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias))

// Returns the result of int8_conv_pointwise requantized as in int8_requantize_, from sum + bias.
QATFAST_OPERATOR(int8_conv_pointwise_requantized, cpu, undefined,
    "(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, Tensor weight, Tensor bias, "
    "Tensor factor, float low, float high, float y_scale) -> Tensor",
    Tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
        const Tensor& weight, const Tensor& bias, const Tensor& factor, double low, double high, double y_scale))

// The windows of a convolution (im2col) as the rows that int8_product takes. `values` are the integers of the input,
// `zero_point` is theirs. `input` and `poison` tell which rows hold a NaN; see int8_conv_input. Before the first
// element lie `padding` zeros, between neighbours `spread` - 1, as a transposed convolution reads them.
QATFAST_OPERATOR(int8_conv_windows, all, undefined,
    "(Tensor values, Tensor scale, Tensor zero_point, Tensor? input, Tensor? poison, int[] kernel_size, int[] stride, "
    "int[] padding, int[] dilation, int[] spread, int[] output_size) -> (Tensor rows, Tensor row_scale, Tensor "
    "row_zero_point, Tensor level_sums)",
    std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor& values, const Tensor& scale, const Tensor& zero_point,
        const std::optional<Tensor>& input, const std::optional<Tensor>& poison, at::IntArrayRef kernel_size,
        at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef spread,
        at::IntArrayRef output_size))
QATFAST_LAUNCHER(int8_conv_windows, Int8ConvWindowsLauncher)

// The result of a convolution with groups of the same input, in the dtype of its scale. int8_weight: as in
// int8_product, with a row (taps, channels of a group) per output.
QATFAST_OPERATOR(int8_conv_grouped, all, undefined,
    "(Tensor values, Tensor scale, Tensor zero_point, Tensor? input, Tensor? poison, Tensor[] int8_weight, Tensor? "
    "bias, int groups, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int[] spread, int[] "
    "output_size) -> Tensor",
    Tensor(const Tensor& values, const Tensor& scale, const Tensor& zero_point, const std::optional<Tensor>& input,
        const std::optional<Tensor>& poison, at::TensorList int8_weight, const std::optional<Tensor>& bias,
        int64_t groups, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
        at::IntArrayRef dilation, at::IntArrayRef spread, at::IntArrayRef output_size))
QATFAST_LAUNCHER(int8_conv_grouped, Int8ConvGroupedLauncher)

// Launchers that several operators use
QATFAST_LAUNCHER(quantize_rows, QuantizeRowsLauncher)
QATFAST_LAUNCHER(quantize_rows_static, QuantizeRowsStaticLauncher)
QATFAST_LAUNCHER(int8_epilogue, Int8EpilogueLauncher)

#undef QATFAST_OPERATOR
#undef QATFAST_LAUNCHER
#undef QATFAST_MAP
