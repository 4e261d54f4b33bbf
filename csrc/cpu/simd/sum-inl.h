// Sums in double whose order depends on their length only, and the loops that need them.

namespace qatfast::cpu {
namespace {

// Half of a vector of floats as doubles. (GCC would convert each quarter and join them.)
template <int start>
QATFAST_INLINE V<double> half_as_doubles(V<float> v) {
  const auto half = half_of<start, float, lanes<float>>(v, std::make_integer_sequence<int, lanes<double>>{});
#if QATFAST_VECTOR_BYTES == 64
  return _mm512_cvtps_pd(bits_as<__m256>(&half));
#elif QATFAST_VECTOR_BYTES == 32
  return _mm256_cvtps_pd(bits_as<__m128>(&half));
#else
  return __builtin_convertvector(half, V<double>);
#endif
}

// A vector as doubles, in one part or two.
template <class C>
struct Doubles {
  static constexpr int parts = lanes<C> / lanes<double>;
  V<double> part[parts];

  QATFAST_MEMBER static Doubles of(V<C> v) {
    if constexpr (parts == 1) {
      return {{v}};
    } else {
      return {{half_as_doubles<0>(v), half_as_doubles<lanes<double>>(v)}};
    }
  }
};

// Stores the sum of each chunk of n terms. f(i, lanes in use) returns those from i on, 0 in the other lanes.
template <class C, class F>
QATFAST_INLINE void sum_chunks(int64_t n, double* sums, F f) {
  constexpr int N = lanes<C>, parts = Doubles<C>::parts;
  for (int64_t chunk = 0; chunk < n; chunk += sum_chunk) {
    V<double> lane_sums[sum_lanes / lanes<double>] = {};
    const auto add = [&](int vector, const Doubles<C>& terms) __attribute__((always_inline)) {
      for (int p = 0; p < parts; ++p) {
        lane_sums[vector * parts + p] += terms.part[p];
      }
    };
    const auto end = n - chunk < sum_chunk ? n : chunk + sum_chunk;
    auto row = chunk;
    for (; row + sum_lanes <= end; row += sum_lanes) {
      for (int i = 0; i < sum_lanes / N; ++i) {
        add(i, f(row + i * N, N));
      }
    }
    for (int i = 0; i < sum_lanes / N; ++i) {
      const auto at = row + i * N;
      if (at < end) {
        add(i, f(at, end - at < N ? end - at : N));
      }
    }
    for (int half = sum_lanes / lanes<double> / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) {
        lane_sums[i] += lane_sums[i + half];
      }
    }
    *sums++ = reduce<double, lanes<double>>(lane_sums[0], [](auto p, auto q) {
      return p + q;
    });
  }
}

template <class T>
void learned_gradients_loop(
    const T* x, const T* grad, T* grad_x, int64_t n, const Grids<opmath_type<T>>& grids, double* sums) {
  using C = opmath_type<T>;
  constexpr int64_t N = lanes<C>, piece = 2 * sum_chunk; // stays in L1
  with_tile<GridKinds::static_range>(grids, 0, 1, [&](auto tile) {
    const auto grid = tile.row(0).grid;
    for (int64_t start = 0; start < n; start += piece) {
      const auto count = n - start < piece ? n - start : piece;
      uint8_t mask[piece / 8] = {};
      sum_chunks<C>(count, sums + start / sum_chunk, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
        const auto v = load_first<T, C>(x + start + i, m), dy = load_first<T, C>(grad + start + i, m);
        const auto [product, inside] = learned_gradient(v, dy, grid);
        store_bits<N>(mask, i, bits_of_lanes<element_t<std::decay_t<decltype(inside)>>, N>(inside), m);
        return Doubles<C>::of(product);
      });
      mask_loop(
          reinterpret_cast<const bits_t<T>*>(grad + start), mask, reinterpret_cast<bits_t<T>*>(grad_x + start), count);
    }
  });
}

template <class T>
void squared_errors_loop(const T* x, int64_t n, const Grids<opmath_type<T>>& grids, double* sums) {
  using C = opmath_type<T>;
  with_tile<GridKinds::static_range>(grids, 0, 1, [&](auto tile) {
    const auto grid = tile.row(0).grid;
    sum_chunks<C>(n, sums, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
      const V<C> v = finite_or_zero(load_first<T, C>(x + i, m)); // every grid holds 0
      auto errors = Doubles<C>::of(fake_quantize(v, grid));
      const auto values = Doubles<C>::of(v);
      for (int p = 0; p < Doubles<C>::parts; ++p) {
        errors.part[p] -= values.part[p];
        errors.part[p] *= errors.part[p];
      }
      return errors;
    });
  });
}

// x / scale minus the nearest level, by a product instead of the quotient.
template <bool clamps, class C>
QATFAST_INLINE V<C> approximate_offset(V<C> x, const ApproximateGrid<V<C>>& grid) {
  const auto position = x * grid.reciprocal;
  return position - nearest(clamps ? clamp(x, grid.least, grid.most) * grid.reciprocal : position);
}

// Adds the squares of these offsets of n values, a whole number of vectors, to the sums of `together` grids, whose
// additions hide each other's latency.
template <bool clamps, int together, class C>
QATFAST_INLINE void add_squared_offsets(const C* values, int64_t n, const ApproximateGrid<C>* grids, double* sums) {
  constexpr int N = lanes<C>;
  ApproximateGrid<V<C>> of[together];
  V<C> lane_sums[together] = {};
  for (int g = 0; g < together; ++g) {
    of[g] = {all_lanes(grids[g].reciprocal), all_lanes(grids[g].least), all_lanes(grids[g].most)};
  }
  for (int64_t i = 0; i < n; i += N) {
    const auto v = bits_as<V<C>>(values + i);
    for (int g = 0; g < together; ++g) {
      const auto offset = approximate_offset<clamps, C>(v, of[g]);
      if constexpr (divides_by_product<C>) {
        lane_sums[g] = fused_multiply_add(offset, offset, lane_sums[g]);
      } else {
        lane_sums[g] += offset * offset;
      }
    }
  }
  for (int g = 0; g < together; ++g) {
    sums[g] += static_cast<double>(reduce<C, N>(lane_sums[g], [](auto p, auto q) {
      return p + q;
    }));
  }
}

template <class T>
void approximate_errors_loop(
    const T* x, int64_t n, const ApproximateGrid<opmath_type<T>>* grids, int64_t count, double* sums) {
  using C = opmath_type<T>;
  constexpr int N = lanes<C>, together = 4;
  constexpr int64_t tile = 1024; // values that stay in L1, with a good chance that none is clipped
  static_assert(tile / N + 16 <= approximate_roundings);
  for (int64_t start = 0; start < n; start += tile) {
    const auto m = n - start < tile ? n - start : tile;
    alignas(64) C values[tile]; // 0, which every grid holds, for what is not finite and at the end
    V<C> least = {}, most = {};
    int64_t used = 0;
    for (; used < m; used += N) {
      const V<C> v = finite_or_zero(load_first<T, C>(x + start + used, m - used < N ? m - used : N));
      least = widen_lo(least, v);
      most = widen_hi(most, v);
      store<C, C>(values + used, v);
    }
    const C lo = reduce<C, N>(least, [](auto p, auto q) {
      return widen_lo(p, q);
    });
    const C hi = reduce<C, N>(most, [](auto p, auto q) {
      return widen_hi(p, q);
    });
    const auto left = count % together;
    for (int64_t g = 0; g < count - left; g += together) {
      bool clamps = false;
      for (int i = 0; i < together; ++i) {
        clamps |= lo < grids[g + i].least || hi > grids[g + i].most;
      }
      clamps ? add_squared_offsets<true, together>(values, used, grids + g, sums + g)
             : add_squared_offsets<false, together>(values, used, grids + g, sums + g);
    }
    for (int64_t g = count - left; g < count; ++g) {
      add_squared_offsets<true, 1>(values, used, grids + g, sums + g);
    }
  }
}

} // namespace
} // namespace qatfast::cpu
