// The loops that each instruction set offers, without an include guard: loops.h declares a table of them, table-inl.h
// fills it with the functions <name>_loop of the other files.
//
//     QATFAST_LOOP(name, signature)          for each float type T, with C = opmath_type<T>: <name>_loop<T>
//     QATFAST_INTEGER_LOOP(name, signature)  for each T and each 8 or 16-bit integer type Q: <name>_loop<T, Q>
//
// QATFAST_MAP of operator_list.h gives a loop too. They take a matrix of `rows` rows of n values that follow each other
// in memory or begin `stride` apart.

#ifndef QATFAST_LOOP
#define QATFAST_LOOP(...)
#endif
#ifndef QATFAST_INTEGER_LOOP
#define QATFAST_INTEGER_LOOP(...)
#endif

// Widens the range in lo[0], hi[0] by the finite values. Returns whether all are finite.
QATFAST_LOOP(range, bool(const T* x, int64_t n, C* lo, C* hi))
// The range of the finite values of each row. Returns whether all are finite.
QATFAST_LOOP(range_of_rows, bool(const T* x, int64_t rows, int64_t n, C* lo, C* hi))
// The range of the finite values of each column: lo[j], hi[j]. Returns whether all are finite.
QATFAST_LOOP(range_of_columns, bool(const T* x, int64_t rows, int64_t stride, int64_t n, C* lo, C* hi))

// Scale and zero point of n ranges. Returns whether no value in a range is clamped and all results are normal or 0.
QATFAST_LOOP(
    choose, bool(const C* lo, const C* hi, int64_t n, const QuantRange<C>& spec, C* scale, int32_t* zero_point))
// The factor of the ProductGrid of an unclamped grid for values from -most to most. Returns 0 if none is found.
QATFAST_LOOP(factor, C(C most, C scale))
// choose() for the range of each row.
QATFAST_LOOP(
    choose_qparams, bool(const T* x, int64_t rows, int64_t n, const QuantRange<C>& spec, C* scale, int32_t* zero_point))

QATFAST_LOOP(fake_quantize, void(const T* x, T* y, int64_t rows, int64_t n, const Grids<C>& grids))
// Unless the mask is null, also sets its bits from `first` on, which are 0 before, if the gradient passes.
#define QATFAST_MAP(name) \
  QATFAST_LOOP(           \
      name, void(const T* x, T* y, uint8_t* mask, int64_t first, int64_t rows, int64_t n, const Grids<C>& grids))
#include "operator_list.h"
// fake_quantize for n values with one grid, their mask from the first bit on unless it is null, and range.
QATFAST_LOOP(fake_quantize_range, bool(const T* x, T* y, uint8_t* mask, int64_t n, const Grids<C>& grid, C* lo, C* hi))
// Quantizes n values with one grid to integers, and finds mask and range as fake_quantize_range does.
QATFAST_LOOP(quantize_range, bool(const T* x, uint8_t* q, uint8_t* mask, int64_t n, const Grids<C>& grid, C* lo, C* hi))
// Quantizes n values with one grid to integers. Returns whether all are finite.
QATFAST_LOOP(quantize_finite, bool(const T* x, uint8_t* q, int64_t n, const Grids<C>& grid))
// Sets the bits of the mask of n values with one grid, from the first bit on.
QATFAST_LOOP(inside, void(const T* x, uint8_t* mask, int64_t n, const Grids<C>& grid))

// limit: NaN for ReLU
QATFAST_LOOP(relu, void(const T* x, T* y, uint8_t* mask, int64_t n, C limit))

// Over one block of n values, whose sums have the order of `sum_chunk`:
// the gradient of the input of fake_quantize_learned; the chunks' sums of that of the scale.
QATFAST_LOOP(
    learned_gradients, void(const T* x, const T* grad, T* grad_x, int64_t n, const Grids<C>& grid, double* sums))
// The chunks' sums of the squared errors of a grid over the finite values.
QATFAST_LOOP(squared_errors, void(const T* x, int64_t n, const Grids<C>& grid, double* sums))
// Adds those of each of `count` grids to sums[i], in units of the scale's square and in any order. Each is rounded at
// most approximate_roundings times.
QATFAST_LOOP(
    approximate_errors, void(const T* x, int64_t n, const ApproximateGrid<C>* grids, int64_t count, double* sums))

// For the int8 GEMM: rows as int8, with the sum of each row's levels (q - zero_point). The scale of a row that holds a
// NaN is NaN.
QATFAST_LOOP(quantize_rows,
    void(const T* x, int8_t* q, int64_t rows, int64_t n, const Grids<C>& grids, C* scale, int64_t* level_sums))
QATFAST_LOOP(epilogue, void(const int32_t* products, T* y, int64_t n, const EpilogueRow<C>& row))

QATFAST_INTEGER_LOOP(quantize, void(const T* x, Q* q, int64_t rows, int64_t n, const Grids<C>& grids))
QATFAST_INTEGER_LOOP(dequantize, void(const Q* q, T* y, int64_t rows, int64_t n, const Grids<C>& grids))

#undef QATFAST_LOOP
#undef QATFAST_INTEGER_LOOP
