// Vectors: loads and stores of every dtype, partial ones at the ends of runs, shuffles, reductions; `map` over a run.

#include <cstring>

#define QATFAST_INLINE static inline __attribute__((always_inline))
#define QATFAST_MEMBER inline __attribute__((always_inline))
#ifdef __clang__
#define QATFAST_UNROLL _Pragma("unroll")
#else
#define QATFAST_UNROLL _Pragma("GCC unroll 8")
#endif

namespace qatfast {

template <class E, int N>
struct VecOf {
  typedef E type __attribute__((vector_size(sizeof(E) * N)));
};
template <class E, int N>
using Vec = typename VecOf<E, N>::type;

// The formulas' operations that have instructions of their own.
#if QATFAST_VECTOR_BYTES == 64
QATFAST_INLINE Vec<float, 16> fused_multiply_add(Vec<float, 16> a, Vec<float, 16> b, Vec<float, 16> c) {
  return _mm512_fmadd_ps(a, b, c);
}
QATFAST_INLINE Vec<float, 16> nearest(Vec<float, 16> x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
QATFAST_INLINE Vec<float, 16> value_of(Vec<float, 16> level, Vec<float, 16> scale) {
  return fused_multiply_add(level, scale, Vec<float, 16>{});
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
QATFAST_INLINE Vec<float, 8> nearest(Vec<float, 8> x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
QATFAST_INLINE Vec<float, 8> value_of(Vec<float, 8> level, Vec<float, 8> scale) {
  return fused_multiply_add(level, scale, Vec<float, 8>{});
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

#include "common/quant_math.h"

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

// std::min and std::max, which the linker could merge with those of another instruction set.
QATFAST_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
QATFAST_INLINE int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

template <class T>
constexpr bool is_half = std::is_same_v<T, c10::Half> || std::is_same_v<T, c10::BFloat16>;

template <class T>
using bits_t = std::conditional_t<sizeof(T) == 1, uint8_t,
    std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>>;

// The element type of the result of comparing vectors of C.
template <class C>
using mask_t = std::make_signed_t<bits_t<C>>;

template <class To>
QATFAST_INLINE To bits_as(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof(To));
  return to;
}

// Converts integers in steps that halve or double their size: GCC converts by larger ratios element by element.
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

// Loads 8 or 16-bit integers as a vector of 32-bit ones. (GCC would convert each half and join them.)
template <class T>
QATFAST_INLINE auto load_as_32_bits(const void* p) {
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
  using Element = element_t<From>;
  return integers_as<T, lanes<float>, Element>(integers);
#endif
}

// Loads a vector of elements of T as C.
template <class T, class C>
QATFAST_INLINE V<C> load(const void* p) {
  constexpr int N = lanes<C>;
  if constexpr (std::is_same_v<T, C>) {
    return bits_as<V<C>>(p);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto wide = load_as_32_bits<uint16_t>(p) << 16;
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
    return __builtin_convertvector(load_as_32_bits<T>(p), V<C>);
  } else {
    return __builtin_convertvector((integers_as<int32_t, N, T>(bits_as<Vec<T, N>>(p))), V<C>);
  }
}

// What a loop stores: any number; a quantized value, which is never -0.0; or a quantized value that is also 0 or a
// normal number of its type.
enum class Result { any, quantized, normal };

// Stores 16-bit floats, given by their bits.
template <Result result, int N>
QATFAST_INLINE void store_half(void* p, Vec<uint16_t, N> bits) {
  const Vec<uint16_t, N> zero = {};
  bits = result == Result::quantized && bits == 0x8000 ? zero : bits;
  std::memcpy(p, &bits, sizeof(bits));
}

// Stores v, rounded once, half to even, to T. A quantized value that underflows in T is stored as 0.0, never -0.0.
// Integer types receive values that they hold.
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

// Stores the low bits of integers.
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

// Loads the first n >= 1 elements; the other lanes are 0.
template <class E, int N>
QATFAST_INLINE Vec<E, N> first_of(const void* p, int64_t n) {
#if QATFAST_VECTOR_BYTES == 64
  const auto used = ~uint64_t{0} >> (64 - n * static_cast<int64_t>(sizeof(E)));
  if constexpr (sizeof(E) * N == 64) {
    const auto loaded = _mm512_maskz_loadu_epi8(used, p);
    return bits_as<Vec<E, N>>(&loaded);
  } else if constexpr (sizeof(E) * N == 32) {
    const auto loaded = _mm256_maskz_loadu_epi8(static_cast<__mmask32>(used), p);
    return bits_as<Vec<E, N>>(&loaded);
  } else if constexpr (sizeof(E) * N == 16) {
    const auto loaded = _mm_maskz_loadu_epi8(static_cast<__mmask16>(used), p);
    return bits_as<Vec<E, N>>(&loaded);
  }
#endif
  Vec<E, N> loaded = {};
  std::memcpy(&loaded, p, n * sizeof(E));
  return loaded;
}

// load and store for the first n lanes. The other lanes are loaded as 0 and not stored.
template <class T, class C>
QATFAST_INLINE V<C> load_first(const T* p, int64_t n) {
  if (n == lanes<C>) {
    return load<T, C>(p);
  }
  const auto loaded = first_of<bits_t<T>, lanes<C>>(p, n);
  return load<T, C>(&loaded);
}

template <class T, class C, Result result = Result::quantized, class Values>
QATFAST_INLINE void store_first(T* p, Values v, int64_t n) {
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

// to[i] = f(from[i], i, lanes in use) over n elements, one vector at a time, up or down through memory.
template <class From, class To, class C, Result result = Result::quantized, class F>
QATFAST_INLINE void map(const From* from, To* to, int64_t n, F f) {
  constexpr int64_t N = lanes<C>;
  int64_t i = 0;
#ifdef QATFAST_BF16
  if constexpr (std::is_same_v<To, c10::BFloat16> && result == Result::normal) { // the instruction flushes subnormals
    for (; i + 2 * N <= n; i += 2 * N) {
      const auto low = f(load<From, C>(from + i), i, N), high = f(load<From, C>(from + i + N), i + N, N);
      const auto packed = _mm512_cvtne2ps_pbh(bits_as<__m512>(&high), bits_as<__m512>(&low));
      std::memcpy(to + i, &packed, sizeof(packed));
    }
  }
#endif
  const auto vectors = (n - i) / N, end = i + vectors * N;
  const bool goes_down = vectors >= 8 && stores_delay_loads(from, to);
  const auto step = goes_down ? -N : N;
  i = goes_down ? end - N : i;
  for (auto left = vectors; left > 0; --left, i += step) {
    store<To, C, result>(to + i, f(load<From, C>(from + i), i, N));
  }
  if (end < n) {
    store_first<To, C, result>(to + end, f(load_first<From, C>(from + end, n - end), end, n - end), n - end);
  }
}

// Calls f(i, lanes in use) for the vectors of n elements, in order.
template <class C, class F>
QATFAST_INLINE void for_each_vector(int64_t n, F f) {
  constexpr int64_t N = lanes<C>;
  int64_t i = 0;
  for (; i + N <= n; i += N) {
    f(i, N);
  }
  if (i < n) {
    f(i, n - i);
  }
}

// The lanes I of a and b as one vector.
template <class E, int N, int... I>
QATFAST_INLINE Vec<E, sizeof...(I)> shuffled(Vec<E, N> a, Vec<E, N> b, std::integer_sequence<int, I...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, I...);
#else // GCC before 12
  return Vec<E, sizeof...(I)>{(I < N ? a[I % N] : b[I % N])...};
#endif
}

// Lane lanes[i] of v as lane i.
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

// Rows shorter than this are processed N at a time, which fills as many vectors as a row has elements.
constexpr int64_t short_row = 32;

// of[n][i]: the rows of the lanes of vector i, if N rows of n elements fill n vectors.
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

// The N / 2 lanes from `start` on.
template <int start, class E, int N, int... I>
QATFAST_INLINE Vec<E, N / 2> half_of(Vec<E, N> v, std::integer_sequence<int, I...>) {
  return shuffled<E, N>(v, v, std::integer_sequence<int, (start + I)...>{});
}

// Reduces all lanes by f.
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

// A mask of 32-bit lanes that selects the first n.
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

// Selects, of the rows of `length` lanes that a and b hold, the half of each row that begins at its lane `start`.
template <int length, int start, class E, int N, int... I>
QATFAST_INLINE Vec<E, N> halves_of(Vec<E, N> a, Vec<E, N> b, std::integer_sequence<int, I...>) {
  constexpr int half = length / 2;
  return shuffled<E, N>(a, b, std::integer_sequence<int, (I / half * length + start + I % half)...>{});
}

// Applies f to the halves of each row of a and b, which leaves twice as many rows in a vector, half as long.
template <int length, class E, int N, class F>
QATFAST_INLINE Vec<E, N> halved(Vec<E, N> a, Vec<E, N> b, F f) {
  constexpr auto lanes = std::make_integer_sequence<int, N>{};
  return f(halves_of<length, 0, E, N>(a, b, lanes), halves_of<length, length / 2, E, N>(a, b, lanes));
}

} // namespace
} // namespace qatfast::cpu
