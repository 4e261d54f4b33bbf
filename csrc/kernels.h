// The launchers: what each device implements. Arguments are checked, dense and allocated (ops.cpp).
#pragma once

#include "layout.h"
#include "quant_math.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace qatfast {

// float16 and bfloat16 compute in float32.
inline at::ScalarType compute_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// How one tensor is quantized by its own range.
struct QuantSpec {
  int64_t num_bits;
  bool symmetric;
  Granularity granularity;
  bool narrow_range = true; // of a symmetric grid

  int64_t quant_min() const {
    return quant_min_of(num_bits, symmetric, narrow_range);
  }
  int64_t quant_max() const {
    return quant_max_of(num_bits, symmetric);
  }
};

// A given grid: `scale` in the compute dtype and `zero_point` int32 have one element a block and are contiguous.
struct QParams {
  at::Tensor scale;
  at::Tensor zero_point;
  int64_t quant_min;
  int64_t quant_max;
};

// `from` fake-quantized into `to`, which may be the same memory. On the CPU float32 may be rounded to a 16-bit type.
struct FakeQuantizeTask {
  at::Tensor from;
  at::Tensor to;
  QuantSpec spec;
};

// f(T{}) with the C++ type of a floating dtype; the op has checked that it is one.
template <class F>
void with_float_type(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kHalf:
      return f(c10::Half{});
    default:
      return f(c10::BFloat16{});
  }
}

// What every device implements, each with its loops or kernels; `cuda` is there in a build with CUDA only.
using FakeQuantizeLauncher = void(const FakeQuantizeTask& task);

// `mask` gets one bit an element in memory order, where the gradient passes; undefined: it is not wanted.
using FakeQuantizeAffineLauncher = void(
    const at::Tensor& from, const at::Tensor& to, const at::Tensor& mask, const QParams& qparams, Layout layout);
// `to` is `grad` where the bit is set and zero elsewhere; both lie in the mask's order.
using FakeQuantizeAffineBackwardLauncher = void(const at::Tensor& grad, const at::Tensor& mask, const at::Tensor& to);

using ChooseQParamsLauncher = void(
    const at::Tensor& x, const QuantSpec& spec, const at::Tensor& scale, const at::Tensor& zero_point);

// quantize and dequantize
using ConvertLauncher = void(const at::Tensor& from, const at::Tensor& to, const QParams& qparams, Layout layout);

// A matrix on integer grids, as the integer product takes it.
struct IntegerRows {
  at::Tensor values;     // (rows, columns) int8, q less `shift`
  at::Tensor scale;      // (rows,) of the compute dtype; NaN where the row holds a NaN
  at::Tensor zero_point; // (rows,) int32, less `shift`
  at::Tensor steps;      // (rows,) int64: the sum of q - zero_point

  // What takes the grid of at most 8 bits into int8.
  static int64_t shift(const QuantSpec& spec) {
    return spec.quant_max() > 127 ? 128 : 0;
  }
};

// `x` is a contiguous matrix; its blocks are its rows, or all of it.
using IntegerRowsLauncher = void(const at::Tensor& x, const QuantSpec& spec, const IntegerRows& to);

// The outputs y (rows, out_features) of the rows of x, from the products (rows, out_features) int32 of the values.
struct ProductTask {
  at::Tensor products;
  IntegerRows x;
  IntegerRows weight;
  at::Tensor bias; // of the compute dtype, or undefined
  at::Tensor y;
};
using IntegerOutputsLauncher = void(const ProductTask& task);

// The weight and the bias of one layer before its product; together, so that a device can share one launch.
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
  IntegerRowsLauncher integer_rows;                                 \
  IntegerOutputsLauncher integer_outputs;                           \
  }

QATFAST_LAUNCHERS(cpu)
QATFAST_LAUNCHERS(cuda)

#undef QATFAST_LAUNCHERS

// The launcher for the device of `x`.
#ifdef QATFAST_CUDA
#define QATFAST_ON(x, launcher) ((x).is_cuda() ? cuda::launcher : cpu::launcher)
#else
#define QATFAST_ON(x, launcher) cpu::launcher
#endif

namespace cpu {

// "AVX512", "AVX2" or "baseline".
const char* instruction_set();

} // namespace cpu
} // namespace qatfast
