// The launchers: what each device implements. Arguments are checked, dense and allocated (ops/*.cpp).
#pragma once

#include "common/qparams.h"

#include <c10/util/ArrayRef.h>

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
using FakeQuantizeAffineLauncher = void(
    const at::Tensor& from, const at::Tensor& to, const at::Tensor& mask, const QParams& qparams, Layout layout);

// `to` is `grad` if the element's bit is set, else zero; both have the memory order of the mask.
using FakeQuantizeAffineBackwardLauncher = void(const at::Tensor& grad, const at::Tensor& mask, const at::Tensor& to);

// The range that a module keeps. Blocks are in the order of memory.
struct ObservedRange {
  at::Tensor running_min; // float32, one element per block, as running_max
  at::Tensor running_max;
  at::Tensor num_batches;   // int64, one element
  float averaging_constant; // 0 for a range that only widens
};

using ChooseQParamsLauncher = void(
    const at::Tensor& x, const QuantSpec& spec, const at::Tensor& scale, const at::Tensor& zero_point);

// quantize and dequantize
using ConvertLauncher = void(const at::Tensor& from, const at::Tensor& to, const QParams& qparams, Layout layout);

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

// The outputs y (rows, out_features) from the products (rows, out_features) int32 of the int8 values.
struct Int8EpilogueTask {
  at::Tensor products;
  Int8Rows x;
  Int8Rows weight;
  at::Tensor bias; // of the opmath type, or undefined
  at::Tensor y;
};
using Int8EpilogueLauncher = void(const Int8EpilogueTask& task);

// The weight and the bias of one layer before its product, together, so that a device can share one launch.
using QATLinearLauncher = void(c10::ArrayRef<FakeQuantizeTask> weight_and_bias);

#define QATFAST_LAUNCHERS(device)                                   \
  namespace device {                                                \
  FakeQuantizeLauncher fake_quantize;                               \
  FakeQuantizeAffineLauncher fake_quantize_affine;                  \
  FakeQuantizeAffineBackwardLauncher fake_quantize_affine_backward; \
  ChooseQParamsLauncher choose_qparams;                             \
  ConvertLauncher quantize;                                         \
  ConvertLauncher dequantize;                                       \
  QATLinearLauncher qat_linear;                                     \
  QuantizeRowsLauncher quantize_rows;                               \
  Int8EpilogueLauncher int8_epilogue;                               \
  }

QATFAST_LAUNCHERS(cpu)
QATFAST_LAUNCHERS(cuda)

#undef QATFAST_LAUNCHERS

// Operators that only the CPU has; on other devices the reference serves.
namespace cpu {

// Moves the stored range by `x`; scale and zero_point receive what quantizes `x`, and `to` the result, unless it is
// undefined. `to` is not `x`; `mask` is as in FakeQuantizeAffineLauncher.
void fake_quantize_observed(const at::Tensor& x, const at::Tensor& to, const at::Tensor& mask, const QuantSpec& spec,
    const ObservedRange& range, const at::Tensor& scale, const at::Tensor& zero_point);

// The launcher quantize_rows for static ranges.
void quantize_rows_static(const at::Tensor& x, const QuantSpec& spec, const QParams& qparams, const Int8Rows& to);

// The mask of FakeQuantizeAffineLauncher alone, of the contiguous tensor x with one grid.
void inside(const at::Tensor& x, const at::Tensor& mask, const QParams& qparams);

// Scale and zero point of blocks with the ranges lo, hi of the opmath type.
void qparams_of_range(const at::Tensor& lo, const at::Tensor& hi, const QuantSpec& spec, const at::Tensor& scale,
    const at::Tensor& zero_point);

// Blocks are the rows of the contiguous matrices x, grad and grad_x. `sums` (rows,) of double receives the sum of each
// row of grad * t (see fake_quantize_learned).
void fake_quantize_learned_backward(const at::Tensor& x, const at::Tensor& grad, const at::Tensor& grad_x,
    const at::Tensor& sums, const QParams& qparams);

// Blocks are the rows of the contiguous matrix x.
void search_qparams(const at::Tensor& x, const QuantSpec& spec, const at::Tensor& scale, const at::Tensor& zero_point);

} // namespace cpu

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
