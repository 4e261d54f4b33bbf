// Every formula of the arithmetic, once, for CPU and CUDA. There are no tensors and no loops here.
//
// T is float, double or (on the CPU) a compiler vector of them, for which `a < b ? c : d` selects lane by lane.
// The build turns contraction off (-ffp-contract=off, --fmad=false): the bits are those of separate IEEE operations.
// Linkage is internal, since the CPU compiles these once per instruction set.
//
// A block's grid is the integers from quant_min to quant_max. The level of a value is its integer less zero_point:
// level k stands for k * scale.
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
using element_t = typename ScalarOf<T>::type;

// The levels of one block: those from lo to hi.
template <class T>
struct Grid {
  T scale;
  T lo; // quant_min - zero_point
  T hi; // quant_max - zero_point
};

// The same for float, with what replaces the division by three multiplications if the scale has_reciprocal.
template <class T>
struct ReciprocalGrid : Grid<T> {
  T reciprocal; // 1 / scale, rounded
  T least;      // lo * scale, hi * scale: the ends in real units
  T most;
};

// The same for values that all lie on the grid, so that nothing is clamped.
template <class T>
struct UnclampedGrid {
  T scale;
  T reciprocal;
};

// An unclamped grid with a factor whose product has the level of the quotient for every value that can occur.
template <class T>
struct ProductGrid {
  T scale;
  T factor;
};

// Whether no intermediate result of divide() by this scale overflows, or underflows in a way that changes the quotient.
QATFAST_FORMULA auto has_reciprocal(T scale) {
  return (0x1p-96f <= scale) & (scale <= 0x1p96f);
}

// The smallest normal number of float16. 0 for other types, in which scales so small have no reciprocal.
template <class T>
constexpr float least_normal = std::numeric_limits<T>::min_exponent == -13 ? 0x1p-14f : 0;

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

// Rounds half to even, for |x| < 2^22: next to 1.5 * 2^23 (double: 2^52) floats are the integers. Never returns -0.0.
QATFAST_FORMULA T round_half_even(T x) {
  const T magic = T{} + element_t<T>(sizeof(element_t<T>) == 4 ? 0x1.8p23 : 0x1.8p52);
  return (x + magic) - magic;
}

// round_half_even, except that vectors may return -0.0: the CPU has overloads that use a rounding instruction.
QATFAST_FORMULA T nearest(T x) {
  return round_half_even(x);
}

// Returns nearest(x) as an integer; for NaN, one whose low 16 bits are 0. The CPU has overloads for vectors.
QATFAST_FORMULA std::enable_if_t<std::is_floating_point_v<T>, int32_t> nearest_integer(T x) {
  return x == x ? static_cast<int32_t>(round_half_even(x)) : 0;
}

// How many ranges search_qparams tries: the whole one, shrunk by each of the factors.
constexpr int shrunk_ranges = 80;

QATFAST_FORMULA T shrinking_factor(int index) {
  return static_cast<T>(shrunk_ranges - index) / shrunk_ranges;
}

// A range covers finite values only. It contains 0, so that replacing the others by 0 changes nothing.
QATFAST_FORMULA T finite_or_zero(T x) {
  return x - x == T{} ? x : T{};
}

QATFAST_FORMULA T widen_lo(T lo, T x) {
  return x < lo ? x : lo;
}

QATFAST_FORMULA T widen_hi(T hi, T x) {
  return x > hi ? x : hi;
}

// The number of intervals between levels that cover the width of a range; of a symmetric one, on each side of 0.
QATFAST_FORMULA T intervals_of(T quant_min, T quant_max, bool symmetric) {
  return symmetric ? quant_max : quant_max - quant_min;
}

// The width that the intervals have to cover. Returns infinity if it overflows.
QATFAST_FORMULA T width_of(T lo, T hi, bool symmetric) {
  return symmetric ? widen_hi(hi, -lo) : hi - lo;
}

// The scale for a finite width: at least the smallest normal number.
QATFAST_FORMULA T scale_of_width(T width, T intervals) {
  const T eps = T{} + std::numeric_limits<element_t<T>>::min();
  const T scale = width / intervals;
  return scale > eps ? scale : eps;
}

// The scale of a block whose finite values lie in [lo, hi], lo <= 0 <= hi.
QATFAST_FORMULA T choose_scale(T lo, T hi, T intervals, bool symmetric) {
  const T width = width_of(lo, hi, symmetric);
  return width <= std::numeric_limits<element_t<T>>::max() ? scale_of_width(width, intervals)
                                                           : hi / intervals - lo / intervals;
}

// Whether a symmetric grid has one level more below 0 than above.
QATFAST_FORMULA bool is_full_range(T quant_min, T quant_max, bool symmetric) {
  return symmetric && quant_min != -quant_max;
}

// The scale of such a grid, with which neither side is clipped.
QATFAST_FORMULA T choose_full_range_scale(T lo, T hi, T quant_min, T quant_max) {
  const T eps = T{} + std::numeric_limits<element_t<T>>::min();
  return widen_hi(eps, widen_hi(lo / quant_min, hi / quant_max));
}

// The zero point as a floating-point number; low_level is round(lo / scale).
QATFAST_FORMULA T choose_zero_point(T low_level, T quant_min, T quant_max, bool symmetric) {
  return symmetric ? T{} : clamp(quant_min - low_level, quant_min, quant_max);
}

// Whether the grid holds the whole range that it was chosen for. Rounding is monotone, so that the levels of both ends
// decide. (They may both round outwards: 255 intervals from -101.5 to 153.5.)
QATFAST_FORMULA auto holds(T low_level, T high_level, T zero_point, T quant_min, T quant_max) {
  return (quant_min <= low_level + zero_point) & (high_level + zero_point <= quant_max);
}

// a * b + c, rounded once. The CPU has overloads for vectors if the instruction set has one.
C10_HOST_DEVICE static inline float fused_multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}

// x / scale, correctly rounded: a product within two units in the last place is corrected by its exact remainder. The
// remaining error could only matter if a quotient lay very close to a midpoint between two floats. Few pairs of
// significands have such a quotient, and tests/quant_math.cpp tries them all. (Markstein 1990 has the theorem for a
// first product within one unit.)
QATFAST_FORMULA T divide(T x, T scale, T reciprocal) {
  const T quotient = x * reciprocal;
  return fused_multiply_add(fused_multiply_add(-quotient, scale, x), reciprocal, quotient);
}

// The level of x before rounding. The ends are integers, so that clamping before rounding gives the same result, and
// rounding sees small numbers only.
QATFAST_FORMULA T position_of(T x, const Grid<T>& grid) {
  return clamp(x / grid.scale, grid.lo, grid.hi);
}

// Clamps before the division, which removes infinities: an end times scale, rounded, is off by less than half a level.
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
C10_HOST_DEVICE static inline T level_of(T x, const G& grid) {
  return nearest(position_of(x, grid));
}

// What a level stands for, never -0.0. The CPU has overloads for the vectors that nearest() may return -0.0 for.
QATFAST_FORMULA T value_of(T level, T scale) {
  return level * scale;
}

template <class T, class G>
C10_HOST_DEVICE static inline T fake_quantize(T x, const G& grid) {
  return value_of(level_of(x, grid), grid.scale);
}

// The grid with one more level at each end.
QATFAST_FORMULA Grid<T> widened(const Grid<T>& grid) {
  return {grid.scale, grid.lo - 1, grid.hi + 1};
}

QATFAST_FORMULA ReciprocalGrid<T> widened(const ReciprocalGrid<T>& grid) {
  return {{grid.scale, grid.lo - 1, grid.hi + 1}, grid.reciprocal, grid.least - grid.scale, grid.most + grid.scale};
}

// The formula of the operator for static ranges; see QATFAST_MAP in operator_list.h.
template <class T, class G>
C10_HOST_DEVICE static inline T fake_quantize_affine(T x, const G& grid) {
  return fake_quantize(x, grid);
}

// Returns fake_quantize_affine(x, grid), and whether quant_min <= round(x / scale) + zero_point <= quant_max: the
// widened grid has one level outside of each end for everything outside. Vectors have all ones in a lane that is
// inside. NaN is outside.
template <class T, class G>
C10_HOST_DEVICE static inline auto fake_quantize_affine_forward(T x, const G& grid) {
  const T level = level_of(x, widened(grid));
  return std::pair(value_of(clamp(level, grid.lo, grid.hi), grid.scale), (grid.lo <= level) & (level <= grid.hi));
}

// What a learned scale may not be below: its sign does not matter, and 0 stands for the smallest normal number.
QATFAST_FORMULA T magnitude_of_learned(T scale) {
  const T eps = T{} + std::numeric_limits<element_t<T>>::min();
  const T magnitude = scale < T{} ? -scale : scale;
  return magnitude < eps ? eps : magnitude;
}

// `grad` times the derivative of fake_quantize(x, grid) by the scale (0 where x is NaN), and whether the gradient
// passes to x, as in fake_quantize_affine_forward.
template <class T, class G>
C10_HOST_DEVICE static inline auto learned_gradient(T x, T grad, const G& grid) {
  const T position = position_of(x, widened(grid));
  const T level = nearest(position);
  const T clamped = clamp(level, grid.lo, grid.hi);
  const auto inside = clamped == level;
  const T derivative = clamped - (inside ? position : T{});
  return std::pair(x == x ? grad * derivative : T{}, inside);
}

// A sum's order depends on its length only: elements form chunks of 16 rows of 32 lanes. The rows of a chunk are added
// one after the other, then the halves of the lanes. The sums of chunks are added the same way (ordered_sum).
constexpr int sum_lanes = 32, sum_rows = 16, sum_chunk = sum_rows * sum_lanes;

// The gradient of a learned scale from the sum of those products over a block of `size` elements. `levels` is the
// number of levels above 0.
QATFAST_FORMULA T learned_scale_gradient(double sum, int64_t size, int64_t levels, T scale) {
  const double factor = size > 0 ? 1 / std::sqrt(static_cast<double>(size) * (levels > 1 ? levels : 1)) : 0;
  return static_cast<T>(factor * sum) * (scale < 0 ? T(-1) : T(1));
}

// An end of a range as modules store it: the nearest float, the largest finite one beyond; never -0.0.
QATFAST_FORMULA float stored_end(T end) {
  constexpr T most = std::numeric_limits<float>::max();
  return static_cast<float>(clamp(end, -most, most)) + 0.0F;
}

// Whether a stored range is new: the first batch replaces it.
C10_HOST_DEVICE static inline bool is_new_range(float lo, float hi) {
  return lo == 0 && hi == 0;
}

// A stored end after a batch with this end. `constant` is 0 for a range that only widens, here to `wider`.
C10_HOST_DEVICE static inline float moved_end(float running, float end, float wider, float constant) {
  return (constant == 0 ? wider : running + constant * (end - running)) + 0.0F;
}

// An integer (of a vector: one per lane) whose low 16 bits are the result. NaN gives zero_point.
template <class T, class G, class I>
C10_HOST_DEVICE static inline I quantize(T x, I zero_point, const G& grid) {
  return nearest_integer(position_of(x, grid)) + zero_point;
}

QATFAST_FORMULA T dequantize(T q, T zero_point, T scale) {
  return (q - zero_point) * scale;
}

// One output of the int8 GEMM: `sum` is the exact sum rounded to T, `scale` the product of those of input and weight.
QATFAST_FORMULA T int8_output(T sum, T scale, T bias) {
  return sum * scale + bias;
}

// The value of the integer that follows from a sum with its bias, rounded to T. `factor` is the scale of the sums by
// that of the integers, `low` and `high` are integers less the zero point.
QATFAST_FORMULA T requantized(T sum, T factor, T low, T high, T scale) {
  return round_half_even(clamp(sum * factor, low, high)) * scale;
}

} // namespace qatfast
