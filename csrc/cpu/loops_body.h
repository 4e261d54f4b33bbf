// The loops themselves: included once by each loops_<instruction set>.cpp, which sets the vector size
// QATFAST_VECTOR_BYTES and the compiler's target before (QATFAST_BF16: bfloat16 only, with its own instructions).
// Internal linkage throughout: code for one instruction set must never be linked into another's. Ends of runs are
// vectors too, masked or padded, so that there is no scalar twin.

#include <cstring>

#define QATFAST_INLINE static inline __attribute__((always_inline))
#define QATFAST_MEMBER inline __attribute__((always_inline))

namespace qatfast {

template <class E, int N>
struct VecOf {
  typedef E type __attribute__((vector_size(sizeof(E) * N)));
};
template <class E, int N>
using Vec = typename VecOf<E, N>::type;

// What the formulas take from the instruction set.
#if QATFAST_VECTOR_BYTES == 64
QATFAST_INLINE Vec<float, 16> fused_multiply_add(Vec<float, 16> a, Vec<float, 16> b, Vec<float, 16> c) {
  return _mm512_fmadd_ps(a, b, c);
}
QATFAST_INLINE Vec<int32_t, 16> nearest_integer(Vec<float, 16> x) {
  return reinterpret_cast<Vec<int32_t, 16>>(_mm512_cvtps_epi32(x));
}
QATFAST_INLINE Vec<int32_t, 8> nearest_integer(Vec<double, 8> x) {
  return reinterpret_cast<Vec<int32_t, 8>>(_mm512_cvtpd_epi32(x));
}
#elif QATFAST_VECTOR_BYTES == 32
QATFAST_INLINE Vec<float, 8> fused_multiply_add(Vec<float, 8> a, Vec<float, 8> b, Vec<float, 8> c) {
  return _mm256_fmadd_ps(a, b, c);
}
QATFAST_INLINE Vec<int32_t, 8> nearest_integer(Vec<float, 8> x) {
  return reinterpret_cast<Vec<int32_t, 8>>(_mm256_cvtps_epi32(x));
}
QATFAST_INLINE Vec<int32_t, 4> nearest_integer(Vec<double, 4> x) {
  return reinterpret_cast<Vec<int32_t, 4>>(_mm256_cvtpd_epi32(x));
}
#else
QATFAST_INLINE Vec<int32_t, 4> nearest_integer(Vec<float, 4> x);
QATFAST_INLINE Vec<int32_t, 2> nearest_integer(Vec<double, 2> x);
#endif

} // namespace qatfast

#include "../quant_math.h"

#if QATFAST_VECTOR_BYTES == 16
namespace qatfast {
QATFAST_INLINE Vec<int32_t, 4> nearest_integer(Vec<float, 4> x) {
  return __builtin_convertvector(x == x ? round_half_even(x) : Vec<float, 4>{}, Vec<int32_t, 4>);
}
QATFAST_INLINE Vec<int32_t, 2> nearest_integer(Vec<double, 2> x) {
  return __builtin_convertvector(x == x ? round_half_even(x) : Vec<double, 2>{}, Vec<int32_t, 2>);
}
} // namespace qatfast
#endif

namespace qatfast::cpu {
namespace {

template <class C>
constexpr int lanes = QATFAST_VECTOR_BYTES / sizeof(C);
template <class C>
using V = Vec<C, lanes<C>>;

template <class T>
constexpr bool is_half = std::is_same_v<T, c10::Half> || std::is_same_v<T, c10::BFloat16>;

template <class T>
using bits_t = std::conditional_t<sizeof(T) == 1, uint8_t,
    std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>>;

// An element of what a comparison of C gives.
template <class C>
using mask_t = std::make_signed_t<bits_t<C>>;

template <class To>
QATFAST_INLINE To bits_as(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof(To));
  return to;
}

// Integers to integers, halving or doubling their size a step: GCC takes a larger one element by element.
template <class To, int N, class From>
QATFAST_INLINE Vec<To, N> integers_as(Vec<From, N> v) {
  if constexpr (sizeof(To) < sizeof(From) / 2) {
    using Half = std::conditional_t<sizeof(From) == 8, int32_t, int16_t>;
    return integers_as<To, N, Half>(__builtin_convertvector(v, Vec<Half, N>));
  } else if constexpr (sizeof(To) > sizeof(From) * 2) {
    using Double =
        std::conditional_t<sizeof(From) == 2, int32_t, std::conditional_t<std::is_signed_v<From>, int16_t, uint16_t>>;
    return integers_as<To, N, Double>(__builtin_convertvector(v, Vec<Double, N>));
  } else {
    return __builtin_convertvector(v, Vec<To, N>);
  }
}

// 8 or 16-bit integers at p as a vector of 32-bit ones. (GCC would convert each half and join them.)
template <class T>
QATFAST_INLINE auto widened(const void* p) {
  using Wide = std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>;
  constexpr int N = lanes<float>;
#if QATFAST_VECTOR_BYTES == 64
  __m512i wide;
  if constexpr (sizeof(T) == 1) {
    const auto narrow = bits_as<__m128i>(p);
    wide = std::is_signed_v<T> ? _mm512_cvtepi8_epi32(narrow) : _mm512_cvtepu8_epi32(narrow);
  } else {
    const auto narrow = bits_as<__m256i>(p);
    wide = std::is_signed_v<T> ? _mm512_cvtepi16_epi32(narrow) : _mm512_cvtepu16_epi32(narrow);
  }
  return bits_as<Vec<Wide, N>>(&wide);
#else
  return integers_as<Wide, N, T>(bits_as<Vec<T, N>>(p));
#endif
}

// The low 8 or 16 bits of 32-bit integers.
template <class T, class From>
QATFAST_INLINE Vec<T, lanes<float>> narrowed(From integers) {
#if QATFAST_VECTOR_BYTES == 64
  const auto wide = bits_as<__m512i>(&integers);
  if constexpr (sizeof(T) == 1) {
    const auto narrow = _mm512_cvtepi32_epi8(wide);
    return bits_as<Vec<T, 16>>(&narrow);
  } else {
    const auto narrow = _mm512_cvtepi32_epi16(wide);
    return bits_as<Vec<T, 16>>(&narrow);
  }
#else
  using Element = scalar_t<From>;
  return integers_as<T, lanes<float>, Element>(integers);
#endif
}

// A vector of elements of T at p, as C.
template <class T, class C>
QATFAST_INLINE V<C> load(const void* p) {
  constexpr int N = lanes<C>;
  if constexpr (std::is_same_v<T, C>) {
    return bits_as<V<C>>(p);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto wide = widened<uint16_t>(p) << 16;
    return bits_as<V<C>>(&wide);
  } else if constexpr (std::is_same_v<T, c10::Half>) {
#if QATFAST_VECTOR_BYTES == 64
    const auto wide = _mm512_cvtph_ps(bits_as<__m256i>(p));
    return bits_as<V<C>>(&wide);
#elif QATFAST_VECTOR_BYTES == 32
    const auto wide = _mm256_cvtph_ps(bits_as<__m128i>(p));
    return bits_as<V<C>>(&wide);
#else
    V<C> wide;
    for (int i = 0; i < N; ++i) {
      wide[i] = static_cast<float>(bits_as<c10::Half>(static_cast<const char*>(p) + 2 * i));
    }
    return wide;
#endif
  } else if constexpr (std::is_same_v<C, float> && sizeof(T) < 4) { // integers
    return __builtin_convertvector(widened<T>(p), V<C>);
  } else {
    return __builtin_convertvector((integers_as<int32_t, N, T>(bits_as<Vec<T, N>>(p))), V<C>);
  }
}

// What a result may be: anything; quantized, and so never -0.0; or besides, zero or a normal number of its type.
enum class Result { any, quantized, normal };

// 16-bit floats by their bits.
template <Result result, int N>
QATFAST_INLINE void store_half(void* p, Vec<uint16_t, N> bits) {
  const Vec<uint16_t, N> zero = {};
  bits = result == Result::quantized && bits == 0x8000 ? zero : bits;
  std::memcpy(p, &bits, sizeof(bits));
}

// Rounds once, half to even, to T; a quantized value that underflows in T is 0.0, never -0.0. Integer types get values
// that they hold.
template <class T, class C, Result result = Result::quantized>
QATFAST_INLINE void store(void* p, V<C> v) {
  constexpr int N = lanes<C>;
  if constexpr (std::is_same_v<T, C>) {
    std::memcpy(p, &v, sizeof(v));
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto bits = bits_as<Vec<uint32_t, N>>(&v);
    const auto rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    if constexpr (result == Result::normal) {
      store_half<result, N>(p, narrowed<uint16_t>(rounded));
    } else {
      const Vec<uint32_t, N> quiet_nan = Vec<uint32_t, N>{} + 0x7FC0;
      store_half<result, N>(p, narrowed<uint16_t>(v == v ? rounded : quiet_nan));
    }
  } else if constexpr (std::is_same_v<T, c10::Half>) {
#if QATFAST_VECTOR_BYTES == 64
    const auto narrow = _mm512_cvtps_ph(bits_as<__m512>(&v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store_half<result, N>(p, bits_as<Vec<uint16_t, N>>(&narrow));
#elif QATFAST_VECTOR_BYTES == 32
    const auto narrow = _mm256_cvtps_ph(bits_as<__m256>(&v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store_half<result, N>(p, bits_as<Vec<uint16_t, N>>(&narrow));
#else
    Vec<uint16_t, N> narrow;
    for (int i = 0; i < N; ++i) {
      narrow[i] = c10::Half(static_cast<float>(v[i])).x;
    }
    store_half<result, N>(p, narrow);
#endif
  } else {
    static_assert(std::is_same_v<T, int32_t>);
    const auto integers = __builtin_convertvector(v, Vec<int32_t, N>);
    std::memcpy(p, &integers, sizeof(integers));
  }
}

// Of integers their low bits.
template <class T, class C, Result>
QATFAST_INLINE void store(void* p, Vec<int32_t, lanes<C>> v) {
  constexpr int N = lanes<C>;
  if constexpr (std::is_same_v<C, float>) {
    const auto narrow = narrowed<T>(v);
    std::memcpy(p, &narrow, sizeof(narrow));
  } else {
    const auto narrow = integers_as<T, N, int32_t>(v);
    std::memcpy(p, &narrow, sizeof(narrow));
  }
}

// The first n elements at p, 1 or more; the other lanes are 0.
template <class E, int N>
QATFAST_INLINE Vec<E, N> first_of(const void* p, int64_t n) {
#if QATFAST_VECTOR_BYTES == 64
  const auto used = ~uint64_t{0} >> (64 - n * static_cast<int64_t>(sizeof(E)));
  if constexpr (sizeof(E) * N == 64) {
    const auto some = _mm512_maskz_loadu_epi8(used, p);
    return bits_as<Vec<E, N>>(&some);
  } else if constexpr (sizeof(E) * N == 32) {
    const auto some = _mm256_maskz_loadu_epi8(static_cast<__mmask32>(used), p);
    return bits_as<Vec<E, N>>(&some);
  } else if constexpr (sizeof(E) * N == 16) {
    const auto some = _mm_maskz_loadu_epi8(static_cast<__mmask16>(used), p);
    return bits_as<Vec<E, N>>(&some);
  }
#endif
  Vec<E, N> some = {};
  std::memcpy(&some, p, n * sizeof(E));
  return some;
}

// load and store for the first n lanes; the others are 0.
template <class T, class C>
QATFAST_INLINE V<C> load_some(const T* p, int64_t n) {
  if (n == lanes<C>) {
    return load<T, C>(p);
  }
  const auto some = first_of<bits_t<T>, lanes<C>>(p, n);
  return load<T, C>(&some);
}

template <class T, class C, Result result = Result::quantized, class Values>
QATFAST_INLINE void store_some(T* p, Values v, int64_t n) {
  if (n == lanes<C>) {
    return store<T, C, result>(p, v);
  }
  unsigned char padded[lanes<C> * sizeof(T)];
  store<T, C, result>(padded, v);
#if QATFAST_VECTOR_BYTES == 64
  const auto used = ~uint64_t{0} >> (64 - n * static_cast<int64_t>(sizeof(T)));
  if constexpr (sizeof(padded) == 64) {
    return _mm512_mask_storeu_epi8(p, used, bits_as<__m512i>(padded));
  } else if constexpr (sizeof(padded) == 32) {
    return _mm256_mask_storeu_epi8(p, static_cast<__mmask32>(used), bits_as<__m256i>(padded));
  } else if constexpr (sizeof(padded) == 16) {
    return _mm_mask_storeu_epi8(p, static_cast<__mmask16>(used), bits_as<__m128i>(padded));
  }
#endif
  std::memcpy(p, padded, n * sizeof(T));
}

// to[i] = f(from[i], i, lanes in use) over n elements, a vector at a time.
template <class From, class To, class C, Result result = Result::quantized, class F>
QATFAST_INLINE void map(const From* from, To* to, int64_t n, F f) {
  constexpr int64_t N = lanes<C>;
  int64_t i = 0;
#ifdef QATFAST_BF16
  if constexpr (std::is_same_v<To, c10::BFloat16> && result == Result::normal) { // the instruction flushes subnormals
    for (; i + 2 * N <= n; i += 2 * N) {
      const auto low = f(load<From, C>(from + i), i, N), high = f(load<From, C>(from + i + N), i + N, N);
      const auto both = _mm512_cvtne2ps_pbh(bits_as<__m512>(&high), bits_as<__m512>(&low));
      std::memcpy(to + i, &both, sizeof(both));
    }
  }
#endif
  for (; i + N <= n; i += N) {
    store<To, C, result>(to + i, f(load<From, C>(from + i), i, N));
  }
  if (i < n) {
    store_some<To, C, result>(to + i, f(load_some<From, C>(from + i, n - i), i, n - i), n - i);
  }
}

// The lanes I of a and b, one after the other.
template <class E, int N, int... I>
QATFAST_INLINE Vec<E, sizeof...(I)> shuffled(Vec<E, N> a, Vec<E, N> b, std::integer_sequence<int, I...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, I...);
#else // GCC before 12
  return Vec<E, sizeof...(I)>{(I < N ? a[I % N] : b[I % N])...};
#endif
}

// The lanes of v that `lanes` names.
template <class E, int N>
QATFAST_INLINE Vec<E, N> permuted(Vec<E, N> v, Vec<mask_t<E>, N> lanes) {
#ifdef __clang__
  Vec<E, N> result;
  for (int i = 0; i < N; ++i) {
    result[i] = v[lanes[i]];
  }
  return result;
#else
  return __builtin_shuffle(v, lanes);
#endif
}

// Rows shorter than this are taken N at a time: they are as many vectors as a row has elements.
constexpr int64_t short_row = 32;

// The row, of the N of n elements each, that a lane of one of their n vectors is in.
template <int N>
struct RowsOfLanes {
  uint8_t of[short_row][short_row][N] = {};

  constexpr RowsOfLanes() {
    for (int n = 1; n < short_row; ++n) {
      for (int i = 0; i < n * N; ++i) {
        of[n][i / N][i % N] = static_cast<uint8_t>(i / n);
      }
    }
  }
};
template <int N>
constexpr RowsOfLanes<N> rows_of_lanes;

// N / 2 lanes from the one at `start` on.
template <int start, class E, int N, int... I>
QATFAST_INLINE Vec<E, N / 2> half_of(Vec<E, N> v, std::integer_sequence<int, I...>) {
  return shuffled<E, N>(v, v, std::integer_sequence<int, (start + I)...>{});
}

// f over all lanes.
template <class E, int N, class F>
QATFAST_INLINE E reduce(Vec<E, N> v, F f) {
  if constexpr (N == 2) {
    return f(v[0], v[1]);
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, N / 2>{};
    return reduce<E, N / 2>(f(half_of<0, E, N>(v, lanes), half_of<N / 2, E, N>(v, lanes)), f);
  }
}

// 0, 1, 2, ...
template <int N, int... I>
QATFAST_INLINE Vec<int32_t, N> lane_numbers(std::integer_sequence<int, I...>) {
  return Vec<int32_t, N>{I...};
}

// Whether a lane is one of the first n, as a mask of 32-bit lanes.
template <int N>
QATFAST_INLINE auto is_used(int64_t n) {
  return lane_numbers<N>(std::make_integer_sequence<int, N>{}) < static_cast<int32_t>(n);
}

template <class E, int N>
QATFAST_INLINE bool all_of(Vec<E, N> masks) {
#if QATFAST_VECTOR_BYTES == 64
  return _mm512_movepi8_mask(bits_as<__m512i>(&masks)) == ~uint64_t{0};
#elif QATFAST_VECTOR_BYTES == 32
  return _mm256_movemask_epi8(bits_as<__m256i>(&masks)) == -1;
#endif
  return reduce<E, N>(masks, [](auto p, auto q) {
    return p & q;
  }) != 0;
}

// a and b hold rows of `length` lanes: the half of each row that begins at its lane `start`.
template <int length, int start, class E, int N, int... I>
QATFAST_INLINE Vec<E, N> halves_of(Vec<E, N> a, Vec<E, N> b, std::integer_sequence<int, I...>) {
  constexpr int half = length / 2;
  return shuffled<E, N>(a, b, std::integer_sequence<int, (I / half * length + start + I % half)...>{});
}

// f over the halves of each row of a and b: twice as many rows in a vector, half as long.
template <int length, class E, int N, class F>
QATFAST_INLINE Vec<E, N> halved(Vec<E, N> a, Vec<E, N> b, F f) {
  constexpr auto lanes = std::make_integer_sequence<int, N>{};
  return f(halves_of<length, 0, E, N>(a, b, lanes), halves_of<length, length / 2, E, N>(a, b, lanes));
}

// Whether divisions are multiplications: floats, where there is a fused multiply-add.
template <class C>
constexpr bool multiplies = std::is_same_v<C, float> && QATFAST_VECTOR_BYTES >= 32;

// A value in every lane.
template <class C>
QATFAST_INLINE V<C> all_lanes(C value) {
  return value - V<C>{}; // 0 + value would turn -0.0 into 0.0, and takes an addition
}

// Some consecutive grids with what is to be computed once of each.
template <class C>
struct GridTile {
  static constexpr int64_t size = 1024;
  alignas(QATFAST_VECTOR_BYTES) C scale[size];
  alignas(QATFAST_VECTOR_BYTES) C zero_point[size];
  alignas(QATFAST_VECTOR_BYTES) C reciprocal[size]; // this one and those below: where all have one
  alignas(QATFAST_VECTOR_BYTES) C least[size];
  alignas(QATFAST_VECTOR_BYTES) C most[size];
  C quant_min;
  C quant_max;

  // Those of rows or columns from `first` on. Whether all have a reciprocal.
  QATFAST_MEMBER bool fill(const Grids<C>& grids, int64_t first, int64_t count) {
    constexpr int N = lanes<C>;
    quant_min = grids.quant_min;
    quant_max = grids.quant_max;
    const auto column = grids.columns == 0 ? 0 : (grids.first_column + first) % (grids.columns * grids.repeat);
    const bool in_order = grids.columns == 0 || (grids.repeat == 1 && column + count <= grids.columns);
    if (!in_order) {
      auto grid = column / grids.repeat, left = grids.repeat - column % grids.repeat;
      for (int64_t i = 0; i < count; ++i) {
        scale[i] = grids.scale[grid];
        zero_point[i] = static_cast<C>(grids.zero_point[grid]);
        if (--left == 0) {
          left = grids.repeat;
          grid = grid + 1 == grids.columns ? 0 : grid + 1;
        }
      }
    }
    const auto from = grids.columns == 0 ? first : column;
    bool all_have = multiplies<C>;
    for (int64_t i = 0; i < count; i += N) {
      const auto m = count - i < N ? count - i : N;
      const auto some = load_some<C, C>(in_order ? grids.scale + from + i : scale + i, m);
      const auto zero =
          in_order ? load_some<int32_t, C>(grids.zero_point + from + i, m) : load_some<C, C>(zero_point + i, m);
      store<C, C>(scale + i, some);
      store<C, C>(zero_point + i, zero);
      if constexpr (multiplies<C>) {
        all_have &= all_of<int32_t, N>(has_reciprocal(some) | ~is_used<N>(m));
        store<C, C>(reciprocal + i, 1 / some);
        store<C, C>(least + i, (quant_min - zero) * some);
        store<C, C>(most + i, (quant_max - zero) * some);
      }
    }
    return all_have;
  }
};

template <class C, class G>
struct Found {
  V<C> zero_point;
  G grid;

  // One grid per lane: that of lane by[i] becomes that of lane i.
  QATFAST_MEMBER Found permuted_by(Vec<mask_t<C>, lanes<C>> by) const {
    constexpr int N = lanes<C>;
    const auto one = [by](V<C> v) {
      return permuted<C, N>(v, by);
    };
    if constexpr (std::is_same_v<G, Grid<V<C>>>) {
      return {one(zero_point), {one(grid.scale), one(grid.lo), one(grid.hi)}};
    } else if constexpr (std::is_same_v<G, ReciprocalGrid<V<C>>>) {
      return {one(zero_point),
          {{one(grid.scale), one(grid.lo), one(grid.hi)}, one(grid.reciprocal), one(grid.least), one(grid.most)}};
    } else {
      return {one(zero_point), {one(grid.scale), one(grid.reciprocal)}};
    }
  }
};

// The grid of a row or those of a vector of columns, by how to divide.
template <template <class> class G, class C>
struct TileOf {
  static constexpr auto result = std::is_same_v<G<C>, UnclampedGrid<C>> ? Result::normal : Result::quantized;
  const GridTile<C>& tile;

  // lanes_of(array): the values of one grid in all lanes, or of one grid a lane
  template <class F>
  QATFAST_MEMBER auto found(F lanes_of) const {
    const V<C> scale = lanes_of(tile.scale), zero_point = lanes_of(tile.zero_point);
    const Grid<V<C>> grid = {scale, tile.quant_min - zero_point, tile.quant_max - zero_point};
    if constexpr (std::is_same_v<G<C>, Grid<C>>) {
      return Found<C, Grid<V<C>>>{zero_point, grid};
    } else if constexpr (std::is_same_v<G<C>, ReciprocalGrid<C>>) {
      return Found<C, ReciprocalGrid<V<C>>>{
          zero_point, {grid, lanes_of(tile.reciprocal), lanes_of(tile.least), lanes_of(tile.most)}};
    } else {
      return Found<C, UnclampedGrid<V<C>>>{zero_point, {scale, lanes_of(tile.reciprocal)}};
    }
  }
  QATFAST_MEMBER auto row(int64_t i) const {
    return found([i](const C* of_grids) {
      return all_lanes(of_grids[i]);
    });
  }
  QATFAST_MEMBER auto columns(int64_t j) const {
    return found([j](const C* of_grids) {
      return bits_as<V<C>>(of_grids + j);
    });
  }
};

// Which kinds of grid a loop is compiled for: `own` ones were chosen for the values themselves and may be unclamped.
enum class Compiled { exact, given, own };

// f(tile of the `count` grids of rows or columns from `first` on)
template <Compiled kinds, class C, class F>
QATFAST_INLINE void with_tile(const Grids<C>& grids, int64_t first, int64_t count, F f) {
  GridTile<C> tile;
  const bool all_have_reciprocals = tile.fill(grids, first, count);
  if constexpr (multiplies<C> && kinds == Compiled::own) {
    if (grids.unclamped) {
      return f(TileOf<UnclampedGrid, C>{tile});
    }
  }
  if constexpr (multiplies<C> && kinds != Compiled::exact) {
    if (all_have_reciprocals) {
      return f(TileOf<ReciprocalGrid, C>{tile});
    }
  }
  f(TileOf<Grid, C>{tile});
}

// So short that its loops are best unrolled.
constexpr int64_t common_group = 32;

// Of a tile's grids; but float32 is cast to a smaller type as a tensor is: what underflows may be -0.0.
template <class From, class To, class Tile>
constexpr Result result_of = std::is_same_v<From, float> && is_half<To> ? Result::any : Tile::result;

// to[i] = f(from[i], its grid, i, lanes in use) over a matrix, a vector at a time.
template <Compiled kinds, class From, class To, class C, class F>
QATFAST_INLINE void map_matrix(const From* from, To* to, int64_t rows, int64_t n, const Grids<C>& grids, F f) {
  constexpr auto size = GridTile<C>::size;
  constexpr int64_t N = lanes<C>;
  if (grids.columns > 0) {
    const auto stride = grids.stride;
    const int64_t band = n > size ? 32 : rows; // rows that stay in L2 while one tile after the other passes over them
    for (int64_t row = 0; row < rows; row += band) {
      const auto end = (rows - row < band ? rows : row + band) * stride;
      for (int64_t j = 0; j < n; j += size) {
        const auto m = n - j < size ? n - j : size;
        with_tile<kinds>(grids, j, m, [&](auto tile) {
          constexpr auto result = result_of<From, To, decltype(tile)>;
          int64_t at = row * stride + j;
          for (; m % 16 == 0 && at + 3 * stride < end; at += 4 * stride) { // four rows load a grid once
            for (int64_t i = 0; i < m; i += N) {
              const auto found = tile.columns(i);
              const auto one = [&](int64_t k) {
                store<To, C, result>(to + k, f(load<From, C>(from + k), found, k, N));
              };
              one(at + i);
              one(at + stride + i);
              one(at + 2 * stride + i);
              one(at + 3 * stride + i);
            }
          }
          for (; at < end; at += stride) {
            map<From, To, C, result>(from + at, to + at, m, [&](V<C> v, int64_t i, int64_t used) {
              return f(v, tile.columns(i), at + i, used);
            });
          }
        });
      }
    }
    return;
  }
  for (int64_t row = 0; row < rows; row += size) {
    const auto count = rows - row < size ? rows - row : size;
    with_tile<kinds>(grids, row, count, [&](auto tile) {
      constexpr auto result = result_of<From, To, decltype(tile)>;
      if (n == 1) {
        return map<From, To, C, result>(from + row, to + row, count, [&](V<C> v, int64_t i, int64_t used) {
          return f(v, tile.columns(i), row + i, used);
        });
      }
      if (n < short_row && n % N != 0) {
        for (int64_t k = 0; k < count; k += N) {
          const auto some = tile.columns(k);
          const auto begin = (row + k) * n, end = (count - k < N ? row + count : row + k + N) * n;
          for (int64_t i = 0; begin + i < end; i += N) {
            const auto at = begin + i, used = end - at < N ? end - at : N;
            const auto rows_of_vector = bits_as<Vec<uint8_t, N>>(rows_of_lanes<N>.of[n][i / N]);
            const auto found = some.permuted_by(integers_as<mask_t<C>, N, uint8_t>(rows_of_vector));
            store_some<To, C, result>(to + at, f(load_some<From, C>(from + at, used), found, at, used), used);
          }
        }
        return;
      }
      const auto rows_of = [&](int64_t length) __attribute__((always_inline)) {
        for (int64_t k = 0; k < count; ++k) {
          const auto found = tile.row(k);
          const auto at = (row + k) * length;
          map<From, To, C, result>(from + at, to + at, length, [&](V<C> v, int64_t i, int64_t used) {
            return f(v, found, at + i, used);
          });
        }
      };
      n == common_group ? rows_of(common_group) : rows_of(n);
    });
  }
}

// The range over the finite values, in floats.
template <class T>
void filtered_range(const T* x, int64_t n, compute_t<T>* lo, compute_t<T>* hi) {
  using C = compute_t<T>;
  constexpr int N = lanes<C>;
  V<C> least = {}, most = {};
  for (int64_t i = 0; i < n; i += N) {
    const V<C> v = finite_or_zero(load_some<T, C>(x + i, n - i < N ? n - i : N));
    least = widen_lo(least, v);
    most = widen_hi(most, v);
  }
  *lo = *hi = 0;
  for (int lane = 0; lane < N; ++lane) {
    *lo = widen_lo(*lo, static_cast<C>(least[lane]));
    *hi = widen_hi(*hi, static_cast<C>(most[lane]));
  }
}

template <class T>
void filtered_range_of_columns(
    const T* x, int64_t rows, int64_t stride, int64_t n, compute_t<T>* lo, compute_t<T>* hi) {
  for (int64_t j = 0; j < n; ++j) {
    lo[j] = hi[j] = 0;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < n; ++j) {
      const auto v = finite_or_zero(static_cast<compute_t<T>>(x[row * stride + j]));
      lo[j] = widen_lo(lo[j], v);
      hi[j] = widen_hi(hi[j], v);
    }
  }
}

struct Most {
  template <class E>
  QATFAST_MEMBER E operator()(E p, E q) const {
    return p > q ? p : q;
  }
};

// A float as an integer: of positive ones the largest signed is the largest, of negative ones the largest unsigned is
// the least; infinities and NaN lie beyond. Two operations a vector, and half types need no conversion.
template <class T>
struct RangeBits {
  using C = compute_t<T>;
  using U = bits_t<T>;
  using I = std::make_signed_t<U>;
  static constexpr int N = QATFAST_VECTOR_BYTES / sizeof(T);
  static constexpr auto sign = static_cast<U>(U{1} << (8 * sizeof(T) - 1));
  static constexpr int significand_bits = std::is_same_v<T, double> ? 52
      : std::is_same_v<T, float>                                    ? 23
      : std::is_same_v<T, c10::Half>                                ? 10
                                                                    : 7;
  static constexpr auto infinity = static_cast<U>((sign - 1) >> significand_bits << significand_bits);
  Vec<U, N> below; // left as it is when made: clearing an array of them takes longer than the rest
  Vec<I, N> above;

  QATFAST_MEMBER static RangeBits zero() {
    return {Vec<U, N>{}, Vec<I, N>{}};
  }
  QATFAST_MEMBER static RangeBits of(const void* x) {
    return {bits_as<Vec<U, N>>(x), bits_as<Vec<I, N>>(x)};
  }
  QATFAST_MEMBER void widen(const void* x) {
    below = Most{}(bits_as<Vec<U, N>>(x), below);
    above = Most{}(bits_as<Vec<I, N>>(x), above);
  }
  QATFAST_MEMBER void widen_some(const void* x, int64_t n) {
    const auto some = first_of<U, N>(x, n);
    widen(&some);
  }
  QATFAST_MEMBER void widen(const RangeBits& other) {
    below = Most{}(other.below, below);
    above = Most{}(other.above, above);
  }

  // lo[i] and hi[i] of lane i, for n lanes; nothing but false where one is not finite.
  QATFAST_MEMBER bool to_floats(int64_t n, C* lo, C* hi) const {
    const Vec<U, N> magnitudes = below & static_cast<U>(~sign);
    if (!all_of<I, N>((magnitudes < infinity) & (above < static_cast<I>(infinity)))) {
      return false;
    }
    const Vec<U, N> least = below >= sign ? below : Vec<U, N>{};
    const Vec<I, N> most = Most{}(above, Vec<I, N>{});
    for (int64_t i = 0; i < N && i < n; i += lanes<C>) {
      const auto m = n - i < lanes<C> ? n - i : lanes<C>;
      const auto low = load<T, C>(reinterpret_cast<const char*>(&least) + i * sizeof(T));
      const auto high = load<T, C>(reinterpret_cast<const char*>(&most) + i * sizeof(T));
      store_some<C, C>(lo + i, low, m);
      store_some<C, C>(hi + i, high, m);
    }
    return true;
  }
};

// Rows of `length` lanes in a, then those in b: with halves joined, so that rows are half as long.
template <int length, class T>
QATFAST_INLINE RangeBits<T> both(const RangeBits<T>& a, const RangeBits<T>& b) {
  using Bits = RangeBits<T>;
  return {halved<length, typename Bits::U, Bits::N>(a.below, b.below, Most{}),
      halved<length, typename Bits::I, Bits::N>(a.above, b.above, Most{})};
}

// The same of `count` of them, which are overwritten, until a row is one lane.
template <int count, class T>
QATFAST_INLINE RangeBits<T> merged(RangeBits<T>* bits) {
  if constexpr (count > 1) {
    for (int i = 0; i < count / 2; ++i) {
      bits[i] = both<count>(bits[2 * i], bits[2 * i + 1]);
    }
    return merged<count / 2>(bits);
  }
  return bits[0];
}

template <class T>
QATFAST_INLINE RangeBits<T> bits_of_run(const T* x, int64_t n) {
  constexpr int N = RangeBits<T>::N;
  auto a = RangeBits<T>::zero();
  if (n < N) {
    if (n > 0) {
      a.widen_some(x, n);
    }
    return a;
  }
  a = RangeBits<T>::of(x);
  int64_t i = N;
  if (n >= 8 * N) {
    auto b = a, c = a, d = a; // four, to hide the latency
    for (; i + 4 * N <= n; i += 4 * N) {
      a.widen(x + i);
      b.widen(x + i + N);
      c.widen(x + i + 2 * N);
      d.widen(x + i + 3 * N);
    }
    a.widen(b);
    c.widen(d);
    a.widen(c);
  }
  for (; i + N <= n; i += N) {
    a.widen(x + i);
  }
  if (i < n) {
    a.widen_some(x + i, n - i);
  }
  return a;
}

// lo and hi; whether all values are finite.
template <class T>
QATFAST_INLINE bool range_of_run(const T* x, int64_t n, compute_t<T>* lo, compute_t<T>* hi) {
  using Bits = RangeBits<T>;
  auto bits = bits_of_run(x, n);
  bits.below[0] = reduce<typename Bits::U, Bits::N>(bits.below, Most{});
  bits.above[0] = reduce<typename Bits::I, Bits::N>(bits.above, Most{});
  const bool is_finite = bits.to_floats(1, lo, hi);
  if (!is_finite) {
    filtered_range(x, n, lo, hi);
  }
  return is_finite;
}

// The ranges of up to `rows` rows, N / rows lanes each: together that takes a few operations a row.
template <int rows, class T>
QATFAST_INLINE RangeBits<T> bits_of_rows(const T* x, int64_t count, int64_t n) {
  if constexpr (rows == 1) {
    return count > 0 ? bits_of_run(x, n) : RangeBits<T>::zero();
  } else {
    constexpr int half = rows / 2;
    return both<2 * RangeBits<T>::N / rows>(
        bits_of_rows<half>(x, count, n), bits_of_rows<half>(x + half * n, count - half, n));
  }
}

// N of them, a lane a row.
template <class T>
QATFAST_INLINE RangeBits<T> bits_of_all_rows(const T* x, int64_t count, int64_t n) {
  constexpr int N = RangeBits<T>::N;
  constexpr int unrolled = N < 4 ? N : 4;
  RangeBits<T> bits[N / unrolled];
  for (int i = 0; i < N / unrolled; ++i) {
    bits[i] = bits_of_rows<unrolled>(x + i * unrolled * n, count - i * unrolled, n);
  }
  return merged<N / unrolled>(bits);
}

// The lanes of a vector as rows of `length` lanes, the next power of two, made of rows of n elements: the last element
// stands in the lanes that are too many.
template <int N>
struct PaddedLanes {
  uint8_t of[N][N] = {};

  constexpr PaddedLanes() {
    for (int n = 1, length = 1; n < N; ++n) {
      length = n > length ? 2 * length : length;
      for (int i = 0; i < N; ++i) {
        of[n][i] = static_cast<uint8_t>(i / length * n + (i % length < n ? i % length : n - 1));
      }
    }
  }
};
template <int N>
constexpr PaddedLanes<N> padded_lanes;

// The same of N whole rows of n elements, fewer than N: rows of `length` lanes fill as many vectors.
template <int length, class T>
QATFAST_INLINE RangeBits<T> bits_of_short_rows(const T* x, int64_t n) {
  using Bits = RangeBits<T>;
  constexpr int N = Bits::N;
  if constexpr (length < N) {
    if (n > length) {
      return bits_of_short_rows<2 * length>(x, n);
    }
  }
  Bits bits[length];
  if (n == length) {
    for (int i = 0; i < length; ++i) {
      bits[i] = Bits::of(x + i * N);
    }
  } else {
    const auto rows_of_vector = N / length;
    const auto lanes = integers_as<typename Bits::I, N, uint8_t>(bits_as<Vec<uint8_t, N>>(padded_lanes<N>.of[n]));
    for (int i = 0; i < length; ++i) {
      const auto from = x + i * rows_of_vector * n;
      const auto v = i + 1 < length ? bits_as<Vec<typename Bits::U, N>>(from)
                                    : first_of<typename Bits::U, N>(from, rows_of_vector * n);
      const auto padded = permuted<typename Bits::U, N>(v, lanes);
      bits[i] = Bits::of(&padded);
    }
  }
  return merged<length>(bits);
}

// lo[i] and hi[i] of row i; whether all values are finite.
template <class T>
QATFAST_INLINE bool range_of_rows(const T* x, int64_t rows, int64_t n, compute_t<T>* lo, compute_t<T>* hi) {
  using Bits = RangeBits<T>;
  constexpr int N = Bits::N;
  bool is_finite = true;
  for (int64_t row = 0; row < rows; row += N) {
    const auto count = rows - row < N ? rows - row : N;
    if (count < N / 4) {
      for (int64_t i = row; i < rows; ++i) {
        is_finite &= range_of_run(x + i * n, n, lo + i, hi + i);
      }
      break;
    }
    const T* from = x + row * n;
    const auto bits = count == N && n > 0 && n < N ? bits_of_short_rows<1>(from, n)
        : n == common_group                        ? bits_of_all_rows(from, count, common_group)
                                                   : bits_of_all_rows(from, count, n);
    if (!bits.to_floats(count, lo + row, hi + row)) {
      is_finite = false;
      for (int64_t i = row; i < row + count; ++i) {
        filtered_range(x + i * n, n, lo + i, hi + i);
      }
    }
  }
  return is_finite;
}

template <int rows, class T>
QATFAST_INLINE void widen_columns(const T* x, int64_t stride, int64_t n, RangeBits<T>* bits) {
  constexpr int N = RangeBits<T>::N;
  int64_t j = 0;
  for (; j + N <= n; j += N, ++bits) {
    auto wide = *bits;
    for (int row = 0; row < rows; ++row) {
      wide.widen(x + row * stride + j);
    }
    *bits = wide;
  }
  if (j < n) {
    for (int row = 0; row < rows; ++row) {
      bits->widen_some(x + row * stride + j, n - j);
    }
  }
}

template <class T>
bool range_of_columns(const T* x, int64_t rows, int64_t stride, int64_t n, compute_t<T>* lo, compute_t<T>* hi) {
  constexpr int N = RangeBits<T>::N;
  constexpr int64_t tile = 512; // columns whose ranges stay in L1
  bool is_finite = true;
  for (int64_t start = 0; start < n; start += tile) {
    const auto m = n - start < tile ? n - start : tile;
    RangeBits<T> bits[tile / N];
    for (int64_t i = 0; i < m; i += N) {
      bits[i / N] = RangeBits<T>::zero();
    }
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
      widen_columns<4>(x + row * stride + start, stride, m, bits);
    }
    for (; row < rows; ++row) {
      widen_columns<1>(x + row * stride + start, stride, m, bits);
    }
    for (int64_t i = 0; i < m; i += N) {
      const auto j = start + i, used = m - i < N ? m - i : N;
      if (!bits[i / N].to_floats(used, lo + j, hi + j)) {
        is_finite = false;
        filtered_range_of_columns(x + j, rows, stride, used, lo + j, hi + j);
      }
    }
  }
  return is_finite;
}

template <class T>
bool widen_loop(const T* x, int64_t n, compute_t<T>* lo, compute_t<T>* hi) {
  compute_t<T> least, most;
  const bool is_finite = range_of_run(x, n, &least, &most);
  *lo = widen_lo(*lo, least);
  *hi = widen_hi(*hi, most);
  return is_finite;
}

template <class T, class C = compute_t<T>>
bool choose_loop(const C* lo, const C* hi, int64_t n, const RangeSpec<C>& spec, C* scale, int32_t* zero_point) {
  constexpr int N = lanes<C>;
  const V<C> quant_min = all_lanes(spec.quant_min), quant_max = all_lanes(spec.quant_max);
  const V<C> steps = steps_of(quant_min, quant_max, spec.symmetric);
  const bool full_range = is_full_range(spec.quant_min, spec.quant_max, spec.symmetric);
  bool unclamped = multiplies<C>;
  constexpr float least_normal = std::is_same_v<T, c10::Half> ? 0x1p-14f : 0; // the others' have no reciprocal
  for (int64_t i = 0; i < n; i += N) {
    const auto m = n - i < N ? n - i : N;
    const auto least = load_some<C, C>(lo + i, m), most = load_some<C, C>(hi + i, m);
    V<C> chosen;
    if (full_range) {
      chosen = choose_full_range_scale(least, most, quant_min, quant_max);
    } else {
      const V<C> width = width_of(least, most, spec.symmetric);
      const bool fits = all_of<mask_t<C>, N>(width <= std::numeric_limits<C>::max()); // or two divisions more
      chosen = fits ? scale_of_width(width, steps) : choose_scale(least, most, steps, spec.symmetric);
    }
    store_some<C, C>(scale + i, chosen, m);
    // all of a block are 0 (as of one in the lanes past the end): every grid will do
    const auto divides = has_reciprocal(chosen) | (least == most);
    V<C> low_step, high_step;
    bool by_division = true;
    if constexpr (multiplies<C>) {
      if (all_of<mask_t<C>, N>(divides)) {
        const UnclampedGrid<V<C>> grid = {chosen, 1 / chosen};
        low_step = step_of(least, grid);
        high_step = step_of(most, grid);
        by_division = false;
      }
    }
    if (by_division) {
      low_step = round_half_even(least / chosen);
      high_step = round_half_even(most / chosen);
    }
    const V<C> zero = choose_zero_point(low_step, quant_min, quant_max, spec.symmetric);
    store_some<int32_t, C>(zero_point + i, zero, m);
    unclamped &= all_of<mask_t<C>, N>(divides & ((chosen >= least_normal) | (least == most)) &
        holds(low_step, high_step, zero, quant_min, quant_max));
  }
  return unclamped;
}

// Of a 16-bit type with few steps. Quotient and product grow with the value, and change their sign with it: they round
// to the same steps everywhere if they do for the two values of T around every midpoint between two steps. (These are
// further apart than the errors of a float: where one of them has the step of the other side, no value beyond differs.)
template <class T, class C = compute_t<T>>
C factor_loop(C most, C scale) {
  if constexpr (multiplies<C> && is_half<T>) {
    constexpr int N = lanes<C>;
    constexpr int32_t ulp = std::is_same_v<T, c10::Half> ? 1 << 13 : 1 << 16; // of T, in the bits of a float
    const auto midpoints = static_cast<int32_t>(most / scale + 1.5F);
    if (midpoints > 256) { // more than 8 bits
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
          same &= step_of(value, exact) == step_of(value, product);
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
bool choose_qparams_loop(const T* x, int64_t rows, int64_t n, const RangeSpec<compute_t<T>>& spec, compute_t<T>* scale,
    int32_t* zero_point) {
  using C = compute_t<T>;
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

template <class T, class To = T>
void fake_quantize_loop(const T* x, To* y, int64_t rows, int64_t n, const Grids<compute_t<T>>& grids) {
  using C = compute_t<T>;
  if constexpr (multiplies<C> && is_half<T>) {
    if (grids.factor != 0) {
      const ProductGrid<V<C>> grid = {all_lanes(*grids.scale), all_lanes(grids.factor)};
      return map<T, To, C, Result::normal>(x, y, n, [&](V<C> v, int64_t, int64_t) {
        return fake_quantize(v, grid);
      });
    }
  }
  map_matrix<Compiled::own>(x, y, rows, n, grids, [](V<C> v, const auto& at, int64_t, int64_t) {
    return fake_quantize(v, at.grid);
  });
}

// A bit a lane.
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

// n of N bits, from bit `at` of the mask on, in any order: they are 0 before.
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
    const T* x, T* y, uint8_t* mask, int64_t first, int64_t rows, int64_t n, const Grids<compute_t<T>>& grids) {
  using C = compute_t<T>;
  map_matrix<Compiled::given>(x, y, rows, n, grids, [&](V<C> v, const auto& at, int64_t i, int64_t m) {
    const auto [value, passes] = fake_quantize_inside(v, at.grid);
    store_bits<lanes<C>>(mask, first + i, bits_of_lanes<scalar_t<decltype(passes)>, lanes<C>>(passes), m);
    return value;
  });
}

template <class T, class Q>
void quantize_loop(const T* x, Q* q, int64_t rows, int64_t n, const Grids<compute_t<T>>& grids) {
  using C = compute_t<T>;
  map_matrix<Compiled::given>(x, q, rows, n, grids, [](V<C> v, const auto& at, int64_t, int64_t) {
    return quantize(v, __builtin_convertvector(at.zero_point, Vec<int32_t, lanes<C>>), at.grid);
  });
}

template <class T, class Q>
void dequantize_loop(const Q* q, T* y, int64_t rows, int64_t n, const Grids<compute_t<T>>& grids) {
  using C = compute_t<T>;
  map_matrix<Compiled::exact>(q, y, rows, n, grids, [](V<C> v, const auto& at, int64_t, int64_t) {
    return dequantize(v, at.zero_point, at.grid.scale);
  });
}

template <class T>
void integers_loop(const T* x, int8_t* q, int64_t rows, int64_t n, const Grids<compute_t<T>>& grids,
    compute_t<T>* scale, int64_t* steps) {
  using C = compute_t<T>;
  constexpr int N = lanes<C>;
  constexpr int64_t chunk = int64_t{1} << 20; // a lane's sum of this many steps fits in 32 bits
  const auto plus = [](auto p, auto q) {
    return p + q;
  };
  const auto integers_of_row = [&](const auto& at, int64_t row) {
    const T* from = x + row * n;
    const auto zero_point = __builtin_convertvector(at.zero_point, Vec<int32_t, N>);
    int64_t sum = 0;
    bool is_finite = true;
    for (int64_t start = 0; start < n; start += chunk) {
      Vec<int32_t, N> sums = {};
      V<C> not_finite = {}; // NaN where a lane has seen a NaN or an infinity
      const auto end = n - start < chunk ? n - start : chunk;
      map<T, int8_t, C>(from + start, q + row * n + start, end, [&](V<C> v, int64_t, int64_t) {
        auto step = quantize(v, Vec<int32_t, N>{}, at.grid); // 0 in the lanes past the end
        if constexpr (!std::is_same_v<std::decay_t<decltype(at.grid)>, UnclampedGrid<V<C>>>) {
          not_finite += v - v;
          step &= integers_as<int32_t, N, mask_t<C>>(v == v);
        }
        sums += step;
        return step + zero_point;
      });
      sum += reduce<int32_t, N>(sums, plus);
      is_finite &= reduce<C, N>(not_finite, plus) == 0;
    }
    bool has_nan = false;
    for (int64_t i = 0; i < n && !is_finite; ++i) {
      has_nan |= from[i] != from[i];
    }
    steps[row] = sum;
    scale[row] = has_nan ? std::numeric_limits<C>::quiet_NaN() : grids.scale[row];
  };
  constexpr auto size = GridTile<C>::size;
  for (int64_t row = 0; row < rows; row += size) {
    const auto count = rows - row < size ? rows - row : size;
    with_tile<Compiled::own>(grids, row, count, [&](auto tile) {
      for (int64_t k = 0; k < count; ++k) {
        integers_of_row(tile.row(k), row + k);
      }
    });
  }
}

template <class T>
void outputs_loop(const int32_t* products, T* y, int64_t n, const ProductRow<compute_t<T>>& row) {
  using C = compute_t<T>;
  constexpr int N = lanes<C>;
  const auto loop = [&](auto affine, auto biased) {
    const auto one = [&](int64_t j, int64_t m) {
      const auto integers = [&](const int32_t* from) {
        Vec<int32_t, N> to = {};
        std::memcpy(&to, from + j, m * sizeof(int32_t));
        return to;
      };
      auto sum = integers(products) - row.input_zero_point * integers(row.weight_sum);
      if (affine) {
        sum -= row.input_steps * integers(row.weight_zero_point);
      }
      const V<C> scale = row.input_scale * load_some<C, C>(row.weight_scale + j, m);
      const V<C> bias = biased ? load_some<C, C>(row.bias + j, m) : -V<C>{}; // -0.0 changes nothing
      return integer_product(__builtin_convertvector(sum, V<C>), scale, bias);
    };
    int64_t j = 0;
    for (; j + N <= n; j += N) {
      store<T, C, Result::any>(y + j, one(j, N));
    }
    if (j < n) {
      store_some<T, C, Result::any>(y + j, one(j, n - j), n - j);
    }
  };
  using Yes = std::true_type;
  using No = std::false_type;
  if (row.weight_zero_point) {
    row.bias ? loop(Yes{}, Yes{}) : loop(Yes{}, No{});
  } else {
    row.bias ? loop(No{}, Yes{}) : loop(No{}, No{});
  }
}

template <class U>
QATFAST_INLINE Vec<U, 8> masked(Vec<U, 8> grad, uint8_t mask) {
  const Vec<U, 8> bit = {1, 2, 4, 8, 16, 32, 64, 128};
  return grad & static_cast<Vec<U, 8>>(((Vec<U, 8>{} + mask) & bit) != 0);
}

template <class U>
void mask_loop(const U* grad, const uint8_t* mask, U* to, int64_t n) {
  int64_t i = 0;
#if QATFAST_VECTOR_BYTES == 64
  constexpr int64_t N = 64 / sizeof(U);
  for (; i + N <= n; i += N) {
    const auto bits =
        bits_as<std::conditional_t<N == 8, uint8_t, std::conditional_t<N == 16, uint16_t, uint32_t>>>(mask + i / 8);
    __m512i kept;
    if constexpr (N == 8) {
      kept = _mm512_maskz_loadu_epi64(bits, grad + i);
    } else if constexpr (N == 16) {
      kept = _mm512_maskz_loadu_epi32(bits, grad + i);
    } else {
      kept = _mm512_maskz_loadu_epi16(bits, grad + i);
    }
    _mm512_storeu_si512(to + i, kept);
  }
#endif
  for (; i + 8 <= n; i += 8) {
    const auto kept = masked<U>(bits_as<Vec<U, 8>>(grad + i), mask[i / 8]);
    std::memcpy(to + i, &kept, sizeof(kept));
  }
  if (i < n) {
    Vec<U, 8> value = {};
    std::memcpy(&value, grad + i, (n - i) * sizeof(U));
    const auto kept = masked<U>(value, mask[i / 8]);
    std::memcpy(to + i, &kept, (n - i) * sizeof(U));
  }
}

template <class T, class Q>
constexpr IntegerLoops<T, Q> integer_loops() {
  return {quantize_loop<T, Q>, dequantize_loop<T, Q>};
}

template <class T>
constexpr Loops<T> all_loops() {
  return {{widen_loop<T>, range_of_columns<T>, choose_loop<T>, factor_loop<T>, choose_qparams_loop<T>,
              fake_quantize_loop<T>, fake_quantize_mask_loop<T>},
      {integers_loop<T>, outputs_loop<T>}, integer_loops<T, int8_t>(), integer_loops<T, uint8_t>(),
      integer_loops<T, int16_t>(), integer_loops<T, uint16_t>()};
}

#ifndef QATFAST_BF16
constexpr InstructionSet instruction_set_named(const char* name) {
  return {name, all_loops<float>(), all_loops<double>(), all_loops<c10::Half>(), all_loops<c10::BFloat16>(),
      mask_loop<uint16_t>, mask_loop<uint32_t>, mask_loop<uint64_t>, fake_quantize_loop<float, c10::Half>,
      fake_quantize_loop<float, c10::BFloat16>};
}
#endif

} // namespace
} // namespace qatfast::cpu
