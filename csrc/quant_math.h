// Every formula of the arithmetic, once, for CPU and CUDA. No tensors, no loops.
//
// T is float, double or (on the CPU) a compiler vector of them: `a < b ? c : d` then selects lane by lane.
// Built without contraction (-ffp-contract=off, --fmad=false): the bits are those of IEEE operations one by one.
// Internal linkage, since the CPU compiles these once per instruction set.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#define QATFAST_FORMULA \
  template <class T>    \
  C10_HOST_DEVICE static inline

namespace qatfast {

template <class T, class = void>
struct ScalarOf {
  using type = T;
};
template <class T>
struct ScalarOf<T, std::void_t<decltype(std::declval<T>()[0])>> {
  using type = std::decay_t<decltype(std::declval<T>()[0])>;
};
template <class T>
using scalar_t = typename ScalarOf<T>::type;

// The integer grid of one block, less the zero point: step k in [lo, hi] stands for k * scale.
template <class T>
struct Grid {
  T scale;
  T lo; // quant_min - zero_point
  T hi; // quant_max - zero_point
};

// A float grid that divides in three multiplications, for a scale that has_reciprocal.
template <class T>
struct ReciprocalGrid : Grid<T> {
  T reciprocal; // 1 / scale, rounded
  T least;      // lo * scale, hi * scale: the ends in real units
  T most;
};

// The same where no value is outside of it: nothing has to be clamped.
template <class T>
struct UnclampedGrid {
  T scale;
  T reciprocal;
};

// Unclamped, where one multiplication is enough: by a factor that gives the step of the quotient for every value that
// can occur.
template <class T>
struct ProductGrid {
  T scale;
  T factor;
};

// Whether nothing that matters overflows or underflows in divide() by this scale.
QATFAST_FORMULA auto has_reciprocal(T scale) {
  return (0x1p-96f <= scale) & (scale <= 0x1p96f);
}

C10_HOST_DEVICE static inline int64_t quant_min_of(int64_t num_bits, bool symmetric, bool narrow_range) {
  return symmetric ? (narrow_range ? 1 : 0) - (int64_t{1} << (num_bits - 1)) : 0;
}

C10_HOST_DEVICE static inline int64_t quant_max_of(int64_t num_bits, bool symmetric) {
  return (int64_t{1} << (symmetric ? num_bits - 1 : num_bits)) - 1;
}

// NaN stays NaN: both comparisons are false.
QATFAST_FORMULA T clamp(T x, T lo, T hi) {
  x = x < lo ? lo : x;
  return x > hi ? hi : x;
}

// Half to even, never -0.0, for |x| < 2^22: next to 1.5 * 2^23 (double: 2^52) floats are the integers.
QATFAST_FORMULA T round_half_even(T x) {
  const T magic = T{} + scalar_t<T>(sizeof(scalar_t<T>) == 4 ? 0x1.8p23 : 0x1.8p52);
  return (x + magic) - magic;
}

// The same as an integer; for NaN one whose low 16 bits are 0. The CPU has its own for vectors.
QATFAST_FORMULA std::enable_if_t<std::is_floating_point_v<T>, int32_t> nearest_integer(T x) {
  return x == x ? static_cast<int32_t>(round_half_even(x)) : 0;
}

// The range covers finite values only; it starts at 0, so that 0 in place of the others changes nothing.
QATFAST_FORMULA T finite_or_zero(T x) {
  return x - x == T{} ? x : T{};
}

QATFAST_FORMULA T widen_lo(T lo, T x) {
  return x < lo ? x : lo;
}

QATFAST_FORMULA T widen_hi(T hi, T x) {
  return x > hi ? x : hi;
}

// How many steps of a grid cover the width of a range: symmetric, on each side of 0.
QATFAST_FORMULA T steps_of(T quant_min, T quant_max, bool symmetric) {
  return symmetric ? quant_max : quant_max - quant_min;
}

// What they have to cover; infinite where it overflows.
QATFAST_FORMULA T width_of(T lo, T hi, bool symmetric) {
  return symmetric ? widen_hi(hi, -lo) : hi - lo;
}

// The scale for a finite width; at least the smallest normal number.
QATFAST_FORMULA T scale_of_width(T width, T steps) {
  const T eps = T{} + std::numeric_limits<scalar_t<T>>::min();
  const T scale = width / steps;
  return scale > eps ? scale : eps;
}

// Scale of a block with finite values in [lo, hi], lo <= 0 <= hi, for that many steps.
QATFAST_FORMULA T choose_scale(T lo, T hi, T steps, bool symmetric) {
  const T width = width_of(lo, hi, symmetric);
  return width <= std::numeric_limits<scalar_t<T>>::max() ? scale_of_width(width, steps) : hi / steps - lo / steps;
}

// Whether a symmetric grid has one step more below 0 than above.
QATFAST_FORMULA bool is_full_range(T quant_min, T quant_max, bool symmetric) {
  return symmetric && quant_min != -quant_max;
}

// The scale of such a grid: neither side is clipped.
QATFAST_FORMULA T choose_full_range_scale(T lo, T hi, T quant_min, T quant_max) {
  const T eps = T{} + std::numeric_limits<scalar_t<T>>::min();
  return widen_hi(eps, widen_hi(lo / quant_min, hi / quant_max));
}

// As a float that holds an integer; low_step: lo / scale, rounded.
QATFAST_FORMULA T choose_zero_point(T low_step, T quant_min, T quant_max, bool symmetric) {
  return symmetric ? T{} : clamp(quant_min - low_step, quant_min, quant_max);
}

// Whether the grid holds what it was chosen for: rounding is monotone, so the steps of both ends tell. (255 steps from
// -101.5 to 153.5: half to even, both round outwards.)
QATFAST_FORMULA auto holds(T low_step, T high_step, T zero_point, T quant_min, T quant_max) {
  return (quant_min <= low_step + zero_point) & (high_step + zero_point <= quant_max);
}

// a * b + c, rounded once. The CPU has its own for vectors, and only where the instruction set has one.
C10_HOST_DEVICE static inline float fused_multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}

// x / scale, correctly rounded: a product within two units in the last place, then its exact remainder. What is left is
// too small to cross a midpoint between two floats: a quotient comes so near to one for few pairs of significands, and
// tests/quant_math.cpp tries them all. (Markstein 1990 has the theorem for a first product within one unit.)
QATFAST_FORMULA T divide(T x, T scale, T reciprocal) {
  const T quotient = x * reciprocal;
  return fused_multiply_add(fused_multiply_add(-quotient, scale, x), reciprocal, quotient);
}

// Where x lies on the grid, in steps that are not yet whole. The ends are integers, so that clamping before rounding
// gives the same number, and rounding sees small ones only.
QATFAST_FORMULA T position_of(T x, const Grid<T>& grid) {
  return clamp(x / grid.scale, grid.lo, grid.hi);
}

// Clamped before the division: an end times scale, rounded, is less than half a step off, and infinities are gone.
QATFAST_FORMULA T position_of(T x, const ReciprocalGrid<T>& grid) {
  return divide(clamp(x, grid.least, grid.most), grid.scale, grid.reciprocal);
}

QATFAST_FORMULA T position_of(T x, const UnclampedGrid<T>& grid) {
  return divide(x, grid.scale, grid.reciprocal);
}

QATFAST_FORMULA T position_of(T x, const ProductGrid<T>& grid) {
  return x * grid.factor;
}

// clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point
template <class T, class G>
C10_HOST_DEVICE static inline T step_of(T x, const G& grid) {
  return round_half_even(position_of(x, grid));
}

template <class T, class G>
C10_HOST_DEVICE static inline T fake_quantize(T x, const G& grid) {
  return step_of(x, grid) * grid.scale;
}

// One step more at each end.
QATFAST_FORMULA Grid<T> widened(const Grid<T>& grid) {
  return {grid.scale, grid.lo - 1, grid.hi + 1};
}

QATFAST_FORMULA ReciprocalGrid<T> widened(const ReciprocalGrid<T>& grid) {
  return {{grid.scale, grid.lo - 1, grid.hi + 1}, grid.reciprocal, grid.least - grid.scale, grid.most + grid.scale};
}

// The same, and whether quant_min <= round(x / scale) + zero_point <= quant_max: one step beyond an end is out, as
// everything further is. All ones (a vector: in each such lane) or true; false for NaN.
template <class T, class G>
C10_HOST_DEVICE static inline auto fake_quantize_inside(T x, const G& grid) {
  const T step = step_of(x, widened(grid));
  return std::pair(clamp(step, grid.lo, grid.hi) * grid.scale, (grid.lo <= step) & (step <= grid.hi));
}

// An integer, or of vectors one in each lane, whose low 16 bits are the result; NaN gives zero_point.
template <class T, class G, class I>
C10_HOST_DEVICE static inline I quantize(T x, I zero_point, const G& grid) {
  return nearest_integer(position_of(x, grid)) + zero_point;
}

QATFAST_FORMULA T dequantize(T q, T zero_point, T scale) {
  return (q - zero_point) * scale;
}

// One output of the integer product: `sum` is the exact sum rounded to T, `scale` that of input times weight.
QATFAST_FORMULA T integer_product(T sum, T scale, T bias) {
  return sum * scale + bias;
}

} // namespace qatfast
