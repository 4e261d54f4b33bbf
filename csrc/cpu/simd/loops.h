// The loops that each instruction set offers, as tables of serial functions. The table is chosen once, at run time.
#pragma once

#include "common/quant_range.h"

#include <ATen/OpMathType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>
#include <utility>

namespace qatfast::cpu {

using at::opmath_type;

// The grids of a matrix: row i has grid i, or column j has grid (first_column + j) / repeat % columns.
template <class C>
struct Grids {
  const C* scale;
  const int32_t* zero_point;
  C quant_min;
  C quant_max;
  bool unclamped = false; // the grids are dynamic, and choose() found that each holds all values of its block
  C factor = 0;           // of the ProductGrid, if there is one grid, which is unclamped and has one; else 0
  int64_t columns = 0;    // the number of grids of the columns; 0 if the rows have grids
  int64_t repeat = 1;
  int64_t first_column = 0;
  int64_t stride = 0; // from one row to the next, if columns have grids

  Grids from(int64_t first) const {
    Grids rest = *this;
    rest.scale += first;
    rest.zero_point += first;
    return rest;
  }
};

// One row of an int8 GEMM. The sum of (q_x - zero_point) (q_w - zero_point) over in_features is, modulo 2^32,
// products[j] - input_zero_point * weight_sum[j] - input_level_sum * weight_zero_point[j].
template <class C>
struct EpilogueRow {
  C input_scale;
  int32_t input_zero_point;
  int32_t input_level_sum;
  const C* weight_scale;            // one per column, as those below
  const int32_t* weight_zero_point; // null if all are 0
  const int32_t* weight_sum;        // of q_w
  const C* bias;                    // null if there is none
};

// Whether a loop up through memory that stores to `to` what it has loaded from `from` waits for its own stores: the
// low 12 bits of a store's address are those of one of the next loads, and more are compared later.
template <class From, class To>
static inline bool stores_delay_loads(const From* from, const To* to) {
  const auto distance = reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from);
  return sizeof(From) == sizeof(To) && distance % 4096 - 1 < 1023;
}

// All loops below take a matrix of `rows` rows of n values that follow each other in memory or begin `stride` apart.

// Conversions to and from one 8 or 16-bit integer type Q.
template <class T, class Q>
struct IntegerLoops {
  using C = opmath_type<T>;
  void (*quantize)(const T* x, Q* q, int64_t rows, int64_t n, const Grids<C>& grids);
  void (*dequantize)(const Q* q, T* y, int64_t rows, int64_t n, const Grids<C>& grids);
};

template <class T>
struct FloatLoops {
  using C = opmath_type<T>;
  // Widens the range in lo[0], hi[0] by the finite values. Returns whether all are finite.
  bool (*range)(const T* x, int64_t n, C* lo, C* hi);
  // The range of the finite values of each row. Returns whether all are finite.
  bool (*range_of_rows)(const T* x, int64_t rows, int64_t n, C* lo, C* hi);
  // The range of the finite values of each column: lo[j], hi[j]. Returns whether all are finite.
  bool (*range_of_columns)(const T* x, int64_t rows, int64_t stride, int64_t n, C* lo, C* hi);
  // Scale and zero point of n ranges. Returns whether no value in a range is clamped and all results are normal or 0.
  bool (*choose)(const C* lo, const C* hi, int64_t n, const QuantRange<C>& spec, C* scale, int32_t* zero_point);
  // The factor of the ProductGrid of an unclamped grid for values from -most to most. Returns 0 if none is found.
  C (*factor)(C most, C scale);
  // choose() for the range of each row.
  bool (*choose_qparams)(const T* x, int64_t rows, int64_t n, const QuantRange<C>& spec, C* scale, int32_t* zero_point);
  void (*fake_quantize)(const T* x, T* y, int64_t rows, int64_t n, const Grids<C>& grids);
  // Also sets the mask's bits from `first` on, which are 0 before, if the gradient passes.
  void (*fake_quantize_mask)(
      const T* x, T* y, uint8_t* mask, int64_t first, int64_t rows, int64_t n, const Grids<C>& grids);
  // fake_quantize for n values with one grid, and range.
  bool (*fake_quantize_range)(const T* x, T* y, int64_t n, const Grids<C>& grid, C* lo, C* hi);
  // The bits alone, of n values with one grid, from the first bit on.
  void (*inside)(const T* x, uint8_t* mask, int64_t n, const Grids<C>& grid);
};

// A sum's order depends on its length only: elements form chunks of 16 rows of 32 lanes. The rows of a chunk are added
// one after the other, then the halves of the lanes. The sums of chunks are added the same way (ordered_sum).
constexpr int64_t sum_lanes = 32, sum_chunk = 512;

// What an approximate error takes of a grid: 1 / scale and the ends in real units.
template <class C>
struct ApproximateGrid {
  C reciprocal;
  C least;
  C most;
};

// The loops over one block of n values that sum in this order.
template <class T>
struct SumLoops {
  using C = opmath_type<T>;
  // The gradient of the input of fake_quantize_learned; the chunks' sums of that of the scale.
  void (*learned_gradients)(const T* x, const T* grad, T* grad_x, int64_t n, const Grids<C>& grid, double* sums);
  // The chunks' sums of the squared errors of a grid over the finite values.
  void (*squared_errors)(const T* x, int64_t n, const Grids<C>& grid, double* sums);
  // Adds those of each of `count` grids to sums[i], in units of the scale's square and in any order. Each is rounded at
  // most approximate_roundings times.
  void (*approximate_errors)(const T* x, int64_t n, const ApproximateGrid<C>* grids, int64_t count, double* sums);
};
constexpr int64_t approximate_roundings = 2048;

// What the int8 GEMM needs beside the product.
template <class T>
struct Int8Loops {
  using C = opmath_type<T>;
  // Rows as int8, with the sum of each row's levels (q - zero_point). The scale of a row that holds a NaN is NaN.
  void (*quantize_rows)(
      const T* x, int8_t* q, int64_t rows, int64_t n, const Grids<C>& grids, C* scale, int64_t* level_sums);
  void (*epilogue)(const int32_t* products, T* y, int64_t n, const EpilogueRow<C>& row);
};

template <class T>
struct Loops : FloatLoops<T>,
               SumLoops<T>,
               Int8Loops<T>,
               IntegerLoops<T, int8_t>,
               IntegerLoops<T, uint8_t>,
               IntegerLoops<T, int16_t>,
               IntegerLoops<T, uint16_t> {
  template <class Q>
  const IntegerLoops<T, Q>& integer() const {
    return *this;
  }
};

// grad if the mask's bit is set, else zero, for elements of that size. The first element has a whole byte of the mask.
template <class U>
using MaskLoop = void (*)(const U* grad, const uint8_t* mask, U* to, int64_t n);

// fake_quantize of float32 with results that are rounded once more.
template <class To>
using RoundedLoop = void (*)(const float* x, To* y, int64_t rows, int64_t n, const Grids<float>& grids);

// sums = sums * scale + bias in place, over `rows` runs of n columns. Returns the largest magnitude of a sum.
using ScaleSumsLoop = float (*)(float* sums, int64_t rows, int64_t n, const float* scale, const float* bias);

// What turns the sums of n outputs into the values of integers; see requantized in quant_math.h.
struct Requantization {
  const int32_t* offset; // added to each sum, n of them
  const float* factor;   // n
  float low;
  float high;
  float scale;
};

// Overwrites `rows` runs of n sums, int32 or integers in float32, by float32 values.
using RequantizeLoop = void (*)(void* sums, int64_t rows, int64_t n, const Requantization& requantization);

// A row of outputs of a depthwise convolution: output i of channel c is the sum of tap[t][i * step + c] * weight[t][c],
// times scale[c], plus bias[c]. Levels and weights are integers whose sums stay below 2^24.
struct DepthwiseRow {
  const float* const* tap;
  int64_t taps;
  int64_t outputs;
  int64_t channels;
  int64_t step;
  const float* weight;
  const float* scale;
  const float* bias;
  float* y;
};
using DepthwiseLoop = void (*)(const DepthwiseRow& row);

struct InstructionSet {
  const char* name;
  Loops<float> f32;
  Loops<double> f64;
  Loops<c10::Half> f16;
  Loops<c10::BFloat16> bf16;
  MaskLoop<uint16_t> mask16;
  MaskLoop<uint32_t> mask32;
  MaskLoop<uint64_t> mask64;
  RoundedLoop<c10::Half> f32_to_f16;
  RoundedLoop<c10::BFloat16> f32_to_bf16;
  ScaleSumsLoop scale_sums;
  RequantizeLoop requantize_int32;
  RequantizeLoop requantize_float32;
  DepthwiseLoop depthwise;

  template <class T>
  const Loops<T>& loops() const {
    if constexpr (std::is_same_v<T, float>) {
      return f32;
    } else if constexpr (std::is_same_v<T, double>) {
      return f64;
    } else if constexpr (std::is_same_v<T, c10::Half>) {
      return f16;
    } else {
      return bf16;
    }
  }
};

extern const InstructionSet baseline;
#ifdef __x86_64__
extern const InstructionSet avx2;
extern const InstructionSet avx512;
extern const Loops<c10::BFloat16> avx512_bf16;
#endif

// The best one that torch's own CPU capability allows. ATEN_CPU_CAPABILITY=default|avx2|avx512 forces one, without
// extensions of it.
const InstructionSet& chosen();

} // namespace qatfast::cpu
