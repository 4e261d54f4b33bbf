// The launchers: what each device implements. Arguments are checked, dense and allocated (ops/*.cpp).
#pragma once

#include "common/qparams.h"

#include <c10/util/ArrayRef.h>
#include <c10/util/FunctionRef.h>

#include <optional>

namespace qatfast {

// One tensor that is quantized by its own range. `to` may be `from`. On the CPU, float32 may be rounded to a 16-bit
// type.
struct FakeQuantizeTask {
  at::Tensor from;
  at::Tensor to;
  QuantSpec spec;
};
using FakeQuantizeLauncher = void(const FakeQuantizeTask& task);

// `mask` receives one bit per element in memory order, set if the gradient passes; undefined if it is not needed.
using MapLauncher = void(
    const at::Tensor& from, const at::Tensor& to, const at::Tensor& mask, const QParams& qparams, Layout layout);

// `to` is `grad` if the element's bit is set, else zero; both have the memory order of the mask.
using FakeQuantizeAffineBackwardLauncher = void(const at::Tensor& grad, const at::Tensor& mask, const at::Tensor& to);

// `mask` is as above. limit: NaN if there is none
using ReLULauncher = void(const at::Tensor& from, const at::Tensor& to, const at::Tensor& mask, double limit);

// The range that a module keeps, without owning it: copies of tensors that Python holds take its lock. Blocks are in
// the order of memory.
struct ObservedRange {
  const at::Tensor& running_min; // float32, one element per block, as running_max
  const at::Tensor& running_max;
  const at::Tensor& num_batches; // int64, one element
  float averaging_constant;      // 0 for a range that only widens
};

using ChooseQParamsLauncher = void(
    const at::Tensor& x, const QuantSpec& spec, const at::Tensor& scale, const at::Tensor& zero_point);

// quantize, dequantize, and fake_quantize_learned, whose scale is a magnitude on the CPU and as the caller gave it on a
// GPU, which launches no kernel for the magnitude.
using ConvertLauncher = void(const at::Tensor& from, const at::Tensor& to, const QParams& qparams, Layout layout);

// `x`, `grad` and `grad_x` lie in memory as `layout` says (on the CPU blocks are rows); qparams.scale is that of the
// launcher fake_quantize_learned. `grad_scale` and `scale`, whose sign it takes, have one element per block.
using FakeQuantizeLearnedBackwardLauncher = void(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
    const QParams& qparams, Layout layout, const at::Tensor& grad_x, const at::Tensor& grad_scale);

// Blocks are the rows of the contiguous matrix x.
using SearchQParamsLauncher = void(
    const at::Tensor& x, const QuantSpec& spec, const at::Tensor& scale, const at::Tensor& zero_point);

// A quantized matrix as the int8 GEMM takes it. Integers of a grid above 127 are stored less `shift`.
struct Int8Rows {
  at::Tensor values;     // (rows, columns) int8, less `shift`
  at::Tensor scale;      // (rows,) of the opmath type; NaN if the row holds a NaN
  at::Tensor zero_point; // (rows,) int32, less `shift`
  at::Tensor level_sums; // (rows,) int64: the sum of q - zero_point

  static int64_t shift(const QuantSpec& spec) {
    return spec.quant_max() > 127 ? 128 : 0;
  }
};

// `x` is a contiguous matrix; its blocks are its rows, or all of it, with the ranges of their values.
using QuantizeRowsLauncher = void(const at::Tensor& x, const QuantSpec& spec, const Int8Rows& to);

// Quantizes a contiguous matrix whose blocks are its rows, or all of it, with static ranges.
using QuantizeRowsStaticLauncher = void(
    const at::Tensor& x, const QuantSpec& spec, const QParams& qparams, const Int8Rows& to);

// The outputs y (rows, out_features) from the products (rows, out_features) int32 of the int8 values.
struct Int8EpilogueTask {
  at::Tensor products;
  Int8Rows x;
  Int8Rows weight;
  at::Tensor bias; // of the opmath type, or undefined
  at::Tensor y;
};
using Int8EpilogueLauncher = void(const Int8EpilogueTask& task);

// Defined in common/windows.h.
struct WindowTask;
struct GroupedTask;

// The windows of a convolution as rows, whose integers are those of the input less 128.
using Int8ConvWindowsLauncher = void(const WindowTask& task, const Int8Rows& to);
using Int8ConvGroupedLauncher = void(const GroupedTask& task);

// The weight and the bias of one layer before its product, together, so that a device can share one launch.
using QATLinearLauncher = void(c10::ArrayRef<FakeQuantizeTask> weight_and_bias);

#define QATFAST_LAUNCHER(name, ...) \
  namespace cpu {                   \
  __VA_ARGS__ name;                 \
  }                                 \
  namespace cuda {                  \
  __VA_ARGS__ name;                 \
  }
#include "operator_list.h"

// What only the CPU has, or each device divides in its own way.
namespace cpu {

// Moves the stored range by `x`; scale and zero_point receive what quantizes `x`, and `to` the result, unless it is
// undefined. `to` is not `x`; `mask` is as in MapLauncher.
void fake_quantize_observed(const at::Tensor& x, const at::Tensor& to, const at::Tensor& mask, const QuantSpec& spec,
    const ObservedRange& range, const at::Tensor& scale, const at::Tensor& zero_point);

// Sets the bits of `mask`, as in MapLauncher, for the contiguous tensor x with one grid.
void inside(const at::Tensor& x, const at::Tensor& mask, const QParams& qparams);

// Quantizes elements [begin, end) of a tensor to `to`; begins at a multiple of 8 if there is a mask.
using QuantizeRun = c10::function_ref<void(int64_t begin, int64_t end, uint8_t* to)>;
// Calls it for all of the tensor, in parallel; if nothing is observed, any number of times for an element.
using QuantizePass = c10::function_ref<void(QuantizeRun quantize)>;

// The integers of the dense tensor x with one grid as uint8; a grid below 0 is moved up by 128, its zero point too.
// `mask` is as in MapLauncher. With `range`, that gives the grid, and moves as in
// fake_quantize_observed. `pass` is called when the grid is known; if it is null, `values` receives the integers.
// Returns whether x holds a NaN.
bool quantize_to_uint8(const at::Tensor& x, const at::Tensor& values, const at::Tensor& mask, const QuantSpec& spec,
    const std::optional<ObservedRange>& range, const QParams& qparams, const at::Tensor& shifted_zero_point,
    QuantizePass pass = nullptr);

// sums = sums * (input_scale * weight_scale) + bias in place, for the sums of a convolution, with the channels
// innermost in memory. `input_scale` has one element, or one per sample. Returns the largest magnitude of a sum.
float scale_sums(
    const at::Tensor& sums, const at::Tensor& input_scale, const at::Tensor& weight_scale, const at::Tensor& bias);

// Overwrites sums (rows, outputs), int32 or integers in float32, with the float32 values of the integers that follow
// from sums + offset; see requantized in quant_math.h.
void requantize(
    const at::Tensor& sums, const at::Tensor& offset, const at::Tensor& factor, float low, float high, float scale);

// A depthwise convolution in two dimensions of uint8 values (batch, channels, height, width), channels-last.
struct DepthwiseTask {
  at::Tensor input;  // the values, or floats that are quantized to them
  at::Tensor values; // receives those, or is undefined
  at::Tensor weight; // (channels, height * width of the kernel) int8
  at::IntArrayRef kernel_size;
  at::IntArrayRef stride;
  at::IntArrayRef padding;
  at::IntArrayRef dilation;
  at::Tensor weight_scale; // one per channel
  at::Tensor bias;         // likewise, or undefined
  at::Tensor y;            // float32, channels-last
  float input_scale = 1;
  int32_t zero_point = 0; // of the values
  bool takes_all = false; // whether all floats are quantized, each once, and not only those that are read

  DepthwiseTask with_grid(const at::Tensor& scale, const at::Tensor& shifted_zero_point) const {
    auto task = *this;
    task.input_scale = *scale.const_data_ptr<float>();
    task.zero_point = *shifted_zero_point.const_data_ptr<int32_t>();
    return task;
  }
};
void depthwise(const DepthwiseTask& task);

// quantize_to_uint8 of the input, which is channels-last, and depthwise, in one pass.
bool quantize_and_convolve(const DepthwiseTask& task, const at::Tensor& mask, const QuantSpec& spec,
    const std::optional<ObservedRange>& range, const QParams& qparams, const at::Tensor& shifted_zero_point);

// What depthwise_backward() writes: the gradients of a depthwise convolution. Those that are undefined are not needed.
struct DepthwiseBackwardTask {
  at::Tensor grad;   // float32, channels-last
  at::Tensor values; // uint8, channels-last
  float scale;
  int32_t zero_point;
  at::Tensor weight; // w_hat (channels, height * width of the kernel), contiguous
  at::IntArrayRef kernel_size;
  at::IntArrayRef stride;
  at::IntArrayRef padding;
  at::IntArrayRef dilation;
  at::Tensor grad_input;  // channels-last
  at::Tensor grad_weight; // contiguous
  at::Tensor grad_bias;
};
void depthwise_backward(const DepthwiseBackwardTask& task);

// Whether the processor multiplies pairs of int16, and whether it has no dot products of int8, which are faster.
bool has_pair_products();
bool prefers_pair_products();

// products (rows, outputs) int32 = x (rows, features) @ weight.T of contiguous int8 matrices, modulo 2^32; only with
// pair products.
void int8_mm(const at::Tensor& products, const at::Tensor& x, const at::Tensor& weight);

// int8_conv_grouped by pair products, also without groups, or the sums alone if y is int32. Returns whether they apply.
bool try_pair_products(const GroupedTask& task);

// The weight (outputs, features) int8 of a pointwise convolution in the order in which it is read, with the sum of each
// row: int32 of this size.
at::Tensor packed_pointwise_weight(const at::Tensor& weight);
int64_t packed_pointwise_size(int64_t outputs, int64_t features);

// What becomes of the sums of each output: sum * (input scale * scale) + bias, or what is requantized with the factor
// `scale` from sum + bias.
struct PointwiseEpilogue {
  at::Tensor scale;
  at::Tensor bias; // float32, or undefined; int32 if the sums are requantized
  bool requantizes = false;
  float low = 0; // see requantized in quant_math.h
  float high = 0;
  float y_scale = 0;
};

// A convolution by a kernel of one element, which is a matrix product: input and y have the channels innermost in
// memory. The input is uint8 integers, or floats that are quantized to them.
struct PointwiseTask {
  at::Tensor input;
  QParams qparams;
  at::Tensor weight; // packed
  PointwiseEpilogue epilogue;
  at::Tensor y; // float32
};
void pointwise(const PointwiseTask& task);

// Whether pointwise() can run: the chosen instruction set has dot products of uint8 and int8.
bool has_dot_products();

// Scale and zero point of blocks with the ranges lo, hi of the opmath type.
void qparams_of_range(const at::Tensor& lo, const at::Tensor& hi, const QuantSpec& spec, const at::Tensor& scale,
    const at::Tensor& zero_point);

} // namespace cpu

namespace cuda {

// Moves the stored range by `x`; scale and zero_point receive what quantizes `x`.
void observe_range(const at::Tensor& x, const QuantSpec& spec, const ObservedRange& range, const at::Tensor& scale,
    const at::Tensor& zero_point);

// As on the CPU, with a grid that is known. `poison` becomes NaN if x holds a NaN.
void quantize_to_uint8(const at::Tensor& x, const at::Tensor& values, const at::Tensor& mask, const QuantSpec& spec,
    const QParams& qparams, const at::Tensor& shifted_zero_point, const at::Tensor& poison);

} // namespace cuda

// The launcher for the device of `x`. `cuda` is defined only in a build with CUDA.
#ifdef QATFAST_CUDA
#define QATFAST_ON(x, launcher) ((x).is_cuda() ? cuda::launcher : cpu::launcher)
#else
#define QATFAST_ON(x, launcher) cpu::launcher
#endif

namespace cpu {

// "AVX512, BF16", "AVX512", "AVX2" or "baseline".
const char* instruction_set();

} // namespace cpu
} // namespace qatfast
