// The loops that each instruction set offers, as tables of serial functions; chosen once, at run time.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>
#include <utility>

namespace qatfast::cpu {

// float16 and bfloat16 compute in float.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The grids of a matrix: row i has grid i, or column j has grid (first_column + j) / repeat % columns.
template <class C>
struct Grids {
  const C* scale;
  const int32_t* zero_point;
  C quant_min;
  C quant_max;
  bool unclamped = false; // every block's own range chose its grid, and choose() found that it holds all of them
  C factor = 0;           // where it is one grid, and unclamped: that of its ProductGrid, if there is one
  int64_t columns = 0;    // how many grids the columns have; 0: the rows have them
  int64_t repeat = 1;
  int64_t first_column = 0;
  int64_t stride = 0; // of columns: from one row to the next

  Grids from(int64_t first) const {
    Grids some = *this;
    some.scale += first;
    some.zero_point += first;
    return some;
  }
};

// One row of an integer product: sum of (q_x - zero_point) (q_w - zero_point) over in_features, from the products of
// q_x and q_w, is products[j] - input_zero_point * weight_sum[j] - input_steps * weight_zero_point[j], modulo 2^32.
template <class C>
struct ProductRow {
  C input_scale;
  int32_t input_zero_point;
  int32_t input_steps;              // sum of q_x - zero_point
  const C* weight_scale;            // [j], as the others
  const int32_t* weight_zero_point; // or null: all are 0
  const int32_t* weight_sum;        // of q_w
  const C* bias;                    // or null
};

// How a range becomes a grid.
template <class C>
struct RangeSpec {
  C quant_min;
  C quant_max;
  bool symmetric;
};

// All loops below take a matrix of `rows` rows of n values, one after the other in memory, or `stride` apart.

// To and from one 8 or 16-bit integer type Q.
template <class T, class Q>
struct IntegerLoops {
  using C = compute_t<T>;
  void (*quantize)(const T* x, Q* q, int64_t rows, int64_t n, const Grids<C>& grids);
  void (*dequantize)(const Q* q, T* y, int64_t rows, int64_t n, const Grids<C>& grids);
};

template <class T>
struct FloatLoops {
  using C = compute_t<T>;
  // Widens the range in lo[0], hi[0] by the finite ones of n values; whether all are.
  bool (*range)(const T* x, int64_t n, C* lo, C* hi);
  // The range of each column: lo[j], hi[j].
  bool (*range_of_columns)(const T* x, int64_t rows, int64_t stride, int64_t n, C* lo, C* hi);
  // Scale and zero point of n ranges; whether no value in a range would be clamped, and all results are normal or 0.
  bool (*choose)(const C* lo, const C* hi, int64_t n, const RangeSpec<C>& spec, C* scale, int32_t* zero_point);
  // The factor of the ProductGrid of an unclamped grid for values from -most to most; 0: none is known.
  C (*factor)(C most, C scale);
  // The same as choose, of each row.
  bool (*choose_qparams)(const T* x, int64_t rows, int64_t n, const RangeSpec<C>& spec, C* scale, int32_t* zero_point);
  void (*fake_quantize)(const T* x, T* y, int64_t rows, int64_t n, const Grids<C>& grids);
  // Also sets the mask's bits from `first` on where the gradient passes; they are 0 before.
  void (*fake_quantize_mask)(
      const T* x, T* y, uint8_t* mask, int64_t first, int64_t rows, int64_t n, const Grids<C>& grids);
};

// What the integer product needs beside the product itself.
template <class T>
struct ProductLoops {
  using C = compute_t<T>;
  // Rows as int8; the sum of a row's steps (q - zero_point); a scale of NaN for a row that holds a NaN.
  void (*integers)(const T* x, int8_t* q, int64_t rows, int64_t n, const Grids<C>& grids, C* scale, int64_t* steps);
  void (*outputs)(const int32_t* products, T* y, int64_t n, const ProductRow<C>& row);
};

template <class T>
struct Loops : FloatLoops<T>,
               ProductLoops<T>,
               IntegerLoops<T, int8_t>,
               IntegerLoops<T, uint8_t>,
               IntegerLoops<T, int16_t>,
               IntegerLoops<T, uint16_t> {
  template <class Q>
  const IntegerLoops<T, Q>& integer() const {
    return *this;
  }
};

// grad where the mask's bit is set, zero elsewhere, by size of an element; n starts at a whole byte of the mask.
template <class U>
using MaskLoop = void (*)(const U* grad, const uint8_t* mask, U* to, int64_t n);

// fake_quantize of float32, its results rounded once more.
template <class To>
using RoundedLoop = void (*)(const float* x, To* y, int64_t rows, int64_t n, const Grids<float>& grids);

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

// The best one that torch's own CPU capability allows; ATEN_CPU_CAPABILITY=default|avx2|avx512 forces one, and then no
// later instructions.
const InstructionSet& chosen();

} // namespace qatfast::cpu
