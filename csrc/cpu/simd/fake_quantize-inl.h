// fake_quantize and fake_quantize_affine, with the mask of one bit per element.

namespace qatfast::cpu {
namespace {

template <class T, class To = T>
void fake_quantize_loop(const T* x, To* y, int64_t rows, int64_t n, const Grids<opmath_type<T>>& grids) {
  using C = opmath_type<T>;
  if constexpr (divides_by_product<C> && is_half<T>) {
    if (grids.factor != 0) {
      const ProductGrid<V<C>> grid = {all_lanes(*grids.scale), all_lanes(grids.factor)};
      return map<T, To, C, Result::normal>(x, y, n, [&](V<C> v, int64_t, int64_t) {
        return fake_quantize(v, grid);
      });
    }
  }
  map_matrix<GridKinds::dynamic_range>(x, y, rows, n, grids, [](V<C> v, const auto& at, int64_t, int64_t) {
    return fake_quantize(v, at.grid);
  });
}

// One bit per lane.
template <class E, int N>
QATFAST_INLINE uint32_t bits_of_lanes(Vec<E, N> masks) {
#if QATFAST_VECTOR_BYTES == 64
  const auto lanes = bits_as<__m512i>(&masks);
  return N == 16 ? _mm512_movepi32_mask(lanes) : _mm512_movepi64_mask(lanes);
#elif QATFAST_VECTOR_BYTES == 32
  return N == 8 ? _mm256_movemask_ps(bits_as<__m256>(&masks)) : _mm256_movemask_pd(bits_as<__m256d>(&masks));
#else
  uint32_t bits = 0;
  for (int i = 0; i < N; ++i) {
    bits |= static_cast<uint32_t>(masks[i] & 1) << i;
  }
  return bits;
#endif
}

// Stores n of N bits from bit `at` of the mask on. They are 0 before, so that the order of calls does not matter.
template <int N>
QATFAST_INLINE void store_bits(uint8_t* mask, int64_t at, uint32_t bits, int64_t n) {
  mask += at / 8;
  const auto skipped = at % 8;
  if constexpr (N % 8 == 0) {
    if (skipped == 0 && n == N) {
      std::memcpy(mask, &bits, N / 8);
      return;
    }
  }
  const auto shifted = (bits & ((uint32_t{1} << n) - 1)) << skipped;
  for (int64_t done = 0; done < skipped + n; done += 8) {
    *mask++ |= static_cast<uint8_t>(shifted >> done);
  }
}

// The loop of QATFAST_MAP, with both of its formulas.
template <class T, class F, class G>
QATFAST_INLINE void map_with_mask(const T* x, T* y, uint8_t* mask, int64_t first, int64_t rows, int64_t n,
    const Grids<opmath_type<T>>& grids, F f, G with_mask) {
  using C = opmath_type<T>;
  if (!mask) {
    return map_matrix<GridKinds::static_range>(x, y, rows, n, grids, [&](V<C> v, const auto& at, int64_t, int64_t) {
      return f(v, at.grid);
    });
  }
  map_matrix<GridKinds::static_range>(x, y, rows, n, grids, [&](V<C> v, const auto& at, int64_t i, int64_t m) {
    const auto [value, passes] = with_mask(v, at.grid);
    store_bits<lanes<C>>(mask, first + i, bits_of_lanes<element_t<decltype(passes)>, lanes<C>>(passes), m);
    return value;
  });
}

#define QATFAST_MAP(name)                                                                                            \
  template <class T>                                                                                                 \
  void name##_loop(                                                                                                  \
      const T* x, T* y, uint8_t* mask, int64_t first, int64_t rows, int64_t n, const Grids<opmath_type<T>>& grids) { \
    map_with_mask(                                                                                                   \
        x, y, mask, first, rows, n, grids,                                                                           \
        [](auto v, const auto& grid) __attribute__((always_inline)) {                                                \
          return qatfast::name(v, grid);                                                                             \
        },                                                                                                           \
        [](auto v, const auto& grid) __attribute__((always_inline)) {                                                \
          return name##_forward(v, grid);                                                                            \
        });                                                                                                          \
  }
#include "operator_list.h"

// The mask of a run with this grid.
template <class T, class G>
QATFAST_INLINE void inside_run(const T* x, uint8_t* mask, int64_t n, const G& grid) {
  using C = opmath_type<T>;
  constexpr int64_t N = lanes<C>;
  std::memset(mask, 0, (n + 7) / 8);
  for (int64_t i = 0; i < n; i += N) {
    const auto m = n - i < N ? n - i : N;
    const auto passes = fake_quantize_affine_forward(load_first<T, C>(x + i, m), grid).second;
    store_bits<N>(mask, i, bits_of_lanes<element_t<std::decay_t<decltype(passes)>>, N>(passes), m);
  }
}

// Whether a grid holds every value from lo to hi: rounding is monotone, so that the ends decide.
template <class C, class G>
QATFAST_INLINE bool holds_range(C lo, C hi, const G& grid) {
  V<C> ends = {}; // every grid holds 0
  ends[0] = lo;
  ends[1] = hi;
  const auto passes = fake_quantize_affine_forward(ends, grid).second;
  return all_of<element_t<std::decay_t<decltype(passes)>>, lanes<C>>(passes);
}

// to[i] = f(x[i], row of the grid) for n values with one grid, and their mask, unless it is null. Widens the range in
// lo, hi by the finite ones; returns whether all are finite.
template <class T, class To, class F>
QATFAST_INLINE bool map_and_range(const T* x, To* to, uint8_t* mask, int64_t n, const Grids<opmath_type<T>>& grid,
    opmath_type<T>* lo, opmath_type<T>* hi, F f) {
  using C = opmath_type<T>;
  constexpr bool is_one_pass = std::is_same_v<T, C>; // the range of the others needs no conversion
  constexpr int64_t piece_in_cache = 4096;
  const auto piece = is_one_pass && !mask ? larger(n, 1) : piece_in_cache;
  bool all_finite = true;
  with_tile<GridKinds::static_range>(grid, 0, 1, [&](auto tile) {
    const auto row = tile.row(0);
    const auto pieces = (n + piece - 1) / piece;
    const bool goes_down = stores_delay_loads(x, to); // as map() does: the hardware prefetches the next piece
    for (int64_t i = 0; i < pieces; ++i) {
      const auto at = (goes_down ? pieces - 1 - i : i) * piece, count = smaller(piece, n - at);
      auto bits = is_one_pass ? RangeBits<T>::zero() : bits_of_run(x + at, count);
      map<T, To, C>(x + at, to + at, count, [&](V<C> v, int64_t, int64_t) __attribute__((always_inline)) {
        if constexpr (is_one_pass) {
          bits.widen(v);
        }
        return f(v, row);
      });
      C least, most;
      const bool is_finite = range_of_bits(bits, x + at, count, &least, &most);
      if (mask) {
        if (is_finite && count % 8 == 0 && holds_range(least, most, row.grid)) {
          std::memset(mask + at / 8, 0xFF, count / 8);
        } else {
          inside_run(x + at, mask + at / 8, count, row.grid);
        }
      }
      *lo = widen_lo(*lo, least);
      *hi = widen_hi(*hi, most);
      all_finite &= is_finite;
    }
  });
  return all_finite;
}

template <class T>
bool fake_quantize_range_loop(const T* x, T* y, uint8_t* mask, int64_t n, const Grids<opmath_type<T>>& grid,
    opmath_type<T>* lo, opmath_type<T>* hi) {
  return map_and_range(
      x, y, mask, n, grid, lo, hi, [](V<opmath_type<T>> v, const auto& row) __attribute__((always_inline)) {
        return fake_quantize(v, row.grid);
      });
}

// The mask alone, of a run with one grid.
template <class T>
void inside_loop(const T* x, uint8_t* mask, int64_t n, const Grids<opmath_type<T>>& grid) {
  with_tile<GridKinds::static_range>(grid, 0, 1, [&](auto tile) {
    inside_run(x, mask, n, tile.row(0).grid);
  });
}

} // namespace
} // namespace qatfast::cpu
