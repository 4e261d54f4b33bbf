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
  map_matrix<GridKinds::dynamic_range, Result::quantized>(
      x, y, rows, n, grids, [](V<C> v, const auto& at, int64_t, int64_t) {
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

template <class T>
void fake_quantize_mask_loop(
    const T* x, T* y, uint8_t* mask, int64_t first, int64_t rows, int64_t n, const Grids<opmath_type<T>>& grids) {
  using C = opmath_type<T>;
  map_matrix<GridKinds::static_range, Result::quantized>(
      x, y, rows, n, grids, [&](V<C> v, const auto& at, int64_t i, int64_t m) {
        const auto [value, passes] = fake_quantize_inside(v, at.grid);
        store_bits<lanes<C>>(mask, first + i, bits_of_lanes<element_t<decltype(passes)>, lanes<C>>(passes), m);
        return value;
      });
}

// to[i] = f(x[i], row of the grid) for n values with one grid; widens the range in lo, hi by the finite ones in the
// same pass. Types whose range needs no conversion have a pass of their own, `separately`.
template <class T, class To, class F, class G>
QATFAST_INLINE bool map_and_range(const T* x, To* to, int64_t n, const Grids<opmath_type<T>>& grid, opmath_type<T>* lo,
    opmath_type<T>* hi, F f, G separately) {
  using C = opmath_type<T>;
  if constexpr (!std::is_same_v<T, C>) {
    const bool is_finite = range_loop(x, n, lo, hi);
    separately();
    return is_finite;
  } else {
    auto bits = RangeBits<T>::zero();
    with_tile<GridKinds::static_range>(grid, 0, 1, [&](auto tile) {
      const auto row = tile.row(0);
      map<T, To, C>(x, to, n, [&](V<C> v, int64_t, int64_t) __attribute__((always_inline)) {
        bits.widen(&v);
        return f(v, row);
      });
    });
    C least, most;
    const bool is_finite = range_of_bits(bits, x, n, &least, &most);
    *lo = widen_lo(*lo, least);
    *hi = widen_hi(*hi, most);
    return is_finite;
  }
}

template <class T>
bool fake_quantize_range_loop(
    const T* x, T* y, int64_t n, const Grids<opmath_type<T>>& grid, opmath_type<T>* lo, opmath_type<T>* hi) {
  const auto one = [](V<opmath_type<T>> v, const auto& row) __attribute__((always_inline)) {
    return fake_quantize(v, row.grid);
  };
  return map_and_range(x, y, n, grid, lo, hi, one, [&] {
    fake_quantize_loop<T>(x, y, 1, n, grid);
  });
}

// The mask alone, of a run with one grid.
template <class T>
void inside_loop(const T* x, uint8_t* mask, int64_t n, const Grids<opmath_type<T>>& grid) {
  using C = opmath_type<T>;
  constexpr int64_t N = lanes<C>;
  std::memset(mask, 0, (n + 7) / 8);
  with_tile<GridKinds::static_range>(grid, 0, 1, [&](auto tile) {
    const auto of_run = tile.row(0).grid;
    for (int64_t i = 0; i < n; i += N) {
      const auto m = n - i < N ? n - i : N;
      const auto passes = fake_quantize_inside(load_first<T, C>(x + i, m), of_run).second;
      store_bits<lanes<C>>(mask, i, bits_of_lanes<element_t<std::decay_t<decltype(passes)>>, lanes<C>>(passes), m);
    }
  });
}

} // namespace
} // namespace qatfast::cpu
