// Scale and zero point from a range.

namespace qatfast::cpu {
namespace {

template <class T, class C = opmath_type<T>>
bool choose_loop(const C* lo, const C* hi, int64_t n, const QuantRange<C>& spec, C* scale, int32_t* zero_point) {
  constexpr int N = lanes<C>;
  const V<C> quant_min = all_lanes(spec.quant_min), quant_max = all_lanes(spec.quant_max);
  const V<C> intervals = intervals_of(quant_min, quant_max, spec.symmetric);
  const bool full_range = is_full_range(spec.quant_min, spec.quant_max, spec.symmetric);
  bool unclamped = divides_by_product<C>;
  for (int64_t i = 0; i < n; i += N) {
    const auto m = n - i < N ? n - i : N;
    const auto least = load_first<C, C>(lo + i, m), most = load_first<C, C>(hi + i, m);
    V<C> chosen;
    if (full_range) {
      chosen = choose_full_range_scale(least, most, quant_min, quant_max);
    } else {
      const V<C> width = width_of(least, most, spec.symmetric);
      const bool fits = all_of<mask_t<C>, N>(width <= std::numeric_limits<C>::max()); // saves two divisions
      chosen = fits ? scale_of_width(width, intervals) : choose_scale(least, most, intervals, spec.symmetric);
    }
    store_first<C, C>(scale + i, chosen, m);
    // Every grid holds a block of zeros (as in the lanes past the end).
    const auto divides = has_reciprocal(chosen) | (least == most);
    V<C> low_level, high_level;
    bool by_division = true;
    if constexpr (divides_by_product<C>) {
      if (all_of<mask_t<C>, N>(divides)) {
        const UnclampedGrid<V<C>> grid = {chosen, 1 / chosen};
        low_level = level_of(least, grid);
        high_level = level_of(most, grid);
        by_division = false;
      }
    }
    if (by_division) {
      low_level = round_half_even(least / chosen);
      high_level = round_half_even(most / chosen);
    }
    const V<C> zero = choose_zero_point(low_level, quant_min, quant_max, spec.symmetric);
    store_first<int32_t, C>(zero_point + i, zero, m);
    unclamped &= all_of<mask_t<C>, N>(divides & ((chosen >= least_normal<T>) | (least == most)) &
        holds(low_level, high_level, zero, quant_min, quant_max));
  }
  return unclamped;
}

// The factor for a 16-bit type with few levels. Quotient and product are monotone and odd in the value: they round to
// the same levels everywhere if they do for the two values of T around every midpoint between two levels. (Neighbouring
// values of T are further apart than the errors of a float, so that only the nearest ones can differ.)
template <class T, class C = opmath_type<T>>
C factor_loop(C most, C scale) {
  if constexpr (divides_by_product<C> && is_half<T>) {
    constexpr int N = lanes<C>;
    constexpr int32_t ulp = std::is_same_v<T, c10::Half> ? 1 << 13 : 1 << 16; // of T, in the bits of a float
    const auto midpoints = static_cast<int32_t>(most / scale + 1.5F);
    if (midpoints > 256) { // the grid has more than 8 bits
      return 0;
    }
    const UnclampedGrid<V<C>> exact = {all_lanes(scale), all_lanes(1 / scale)};
    const auto numbers = lane_numbers<N>(std::make_integer_sequence<int, N>{});
    const auto agrees = [&](C factor) {
      const ProductGrid<V<C>> product = {exact.scale, all_lanes(factor)};
      Vec<int32_t, N> same = ~Vec<int32_t, N>{};
      for (int32_t k = 0; k < midpoints; k += N) {
        const V<C> midpoint = (__builtin_convertvector(numbers + k, V<C>) + C(0.5)) * exact.scale;
        const auto below = bits_as<Vec<int32_t, N>>(&midpoint) & -ulp;
        const Vec<int32_t, N> around[] = {below, below + ulp};
        for (const auto& bits : around) {
          const auto value = bits_as<V<C>>(&bits);
          same &= level_of(value, exact) == level_of(value, product);
        }
      }
      return all_of<int32_t, N>(same);
    };
    const C reciprocal = 1 / scale;
    const int32_t neighbours[] = {0, 1, -1};
    for (const auto neighbour : neighbours) {
      const auto bits = bits_as<int32_t>(&reciprocal) + neighbour;
      const auto factor = bits_as<C>(&bits);
      if (agrees(factor)) {
        return factor;
      }
    }
  }
  return 0;
}

template <class T>
bool choose_qparams_loop(const T* x, int64_t rows, int64_t n, const QuantRange<opmath_type<T>>& spec,
    opmath_type<T>* scale, int32_t* zero_point) {
  using C = opmath_type<T>;
  constexpr int64_t tile = 64;
  bool unclamped = true;
  for (int64_t row = 0; row < rows; row += tile) {
    const auto count = rows - row < tile ? rows - row : tile;
    C lo[tile], hi[tile];
    const bool is_finite = range_of_rows(x + row * n, count, n, lo, hi);
    unclamped &= choose_loop<T>(lo, hi, count, spec, scale + row, zero_point + row) && is_finite;
  }
  return unclamped;
}

} // namespace
} // namespace qatfast::cpu
