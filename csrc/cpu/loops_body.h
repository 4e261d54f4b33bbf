// The loops themselves: included once by each loops_<instruction set>.cpp, which sets QATFAST_NAME, the vector size
// QATFAST_VECTOR_BYTES and the compiler's target before. Internal linkage throughout: code for one instruction set
// must never be linked into another's. Ends of runs go through padded buffers, so that there is no scalar twin.

#include <cstring>

#define QATFAST_INLINE static inline __attribute__((always_inline))
#define QATFAST_MEMBER inline __attribute__((always_inline))

namespace qatfast {
#if QATFAST_VECTOR_BYTES == 64
QATFAST_INLINE __m512 fused_multiply_add(__m512 a, __m512 b, __m512 c) {
  return _mm512_fmadd_ps(a, b, c);
}
#elif QATFAST_VECTOR_BYTES == 32
QATFAST_INLINE __m256 fused_multiply_add(__m256 a, __m256 b, __m256 c) {
  return _mm256_fmadd_ps(a, b, c);
}
#endif
} // namespace qatfast

#include "../quant_math.h"

namespace qatfast::cpu {
namespace {

template <class E, int N>
struct VecOf {
  typedef E type __attribute__((vector_size(sizeof(E) * N)));
};
template <class E, int N>
using Vec = typename VecOf<E, N>::type;

template <class C>
constexpr int lanes = QATFAST_VECTOR_BYTES / sizeof(C);
template <class C>
using V = Vec<C, lanes<C>>;

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
    using Double = std::conditional_t<std::is_signed_v<From>, int16_t, uint16_t>;
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

// 16-bit floats by their bits; of a quantized value -0.0 becomes 0.0.
template <int N>
QATFAST_INLINE void store_half(void* p, Vec<uint16_t, N> bits, bool is_quantized) {
  const Vec<uint16_t, N> zero = {};
  bits = is_quantized && bits == 0x8000 ? zero : bits;
  std::memcpy(p, &bits, sizeof(bits));
}

// Rounds once, half to even, to T; a quantized value that underflows in T is 0.0, never -0.0. Integer types get values
// that they hold.
template <class T, class C>
QATFAST_INLINE void store(void* p, V<C> v, bool is_quantized = true) {
  constexpr int N = lanes<C>;
  if constexpr (std::is_same_v<T, C>) {
    std::memcpy(p, &v, sizeof(v));
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto bits = bits_as<Vec<uint32_t, N>>(&v);
    const auto rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Vec<uint32_t, N> quiet_nan = Vec<uint32_t, N>{} + 0x7FC0;
    store_half<N>(p, narrowed<uint16_t>(v == v ? rounded : quiet_nan), is_quantized);
  } else if constexpr (std::is_same_v<T, c10::Half>) {
#if QATFAST_VECTOR_BYTES == 64
    const auto narrow = _mm512_cvtps_ph(bits_as<__m512>(&v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store_half<N>(p, bits_as<Vec<uint16_t, N>>(&narrow), is_quantized);
#elif QATFAST_VECTOR_BYTES == 32
    const auto narrow = _mm256_cvtps_ph(bits_as<__m256>(&v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store_half<N>(p, bits_as<Vec<uint16_t, N>>(&narrow), is_quantized);
#else
    Vec<uint16_t, N> narrow;
    for (int i = 0; i < N; ++i) {
      narrow[i] = c10::Half(static_cast<float>(v[i])).x;
    }
    store_half<N>(p, narrow, is_quantized);
#endif
  } else {
    const auto integers = __builtin_convertvector(v, Vec<int32_t, N>);
    if constexpr (std::is_same_v<C, float> && sizeof(T) < 4) {
      const auto narrow = narrowed<T>(integers);
      std::memcpy(p, &narrow, sizeof(narrow));
    } else {
      const auto narrow = integers_as<T, N, int32_t>(integers);
      std::memcpy(p, &narrow, sizeof(narrow));
    }
  }
}

// The same for the first n lanes; the others are 0.
template <class T, class C>
QATFAST_INLINE V<C> load_some(const T* p, int64_t n) {
  if (n == lanes<C>) {
    return load<T, C>(p);
  }
  unsigned char padded[lanes<C> * sizeof(T)] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load<T, C>(padded);
}

template <class T, class C>
QATFAST_INLINE void store_some(T* p, V<C> v, int64_t n, bool is_quantized = true) {
  if (n == lanes<C>) {
    return store<T, C>(p, v, is_quantized);
  }
  unsigned char padded[lanes<C> * sizeof(T)];
  store<T, C>(padded, v, is_quantized);
  std::memcpy(p, padded, n * sizeof(T));
}

// zero_point and grid of a vector of elements from i on: the same for all, or each its own.
template <class C, class G>
struct SameGrid {
  V<C> zero_point;
  G grid;

  QATFAST_MEMBER const SameGrid& at(int64_t, int64_t) const {
    return *this;
  }
};

template <class C>
struct EachGrid {
  Grids<C> grids;
  struct Found {
    V<C> zero_point;
    Grid<V<C>> grid;
  };

  QATFAST_MEMBER Found at(int64_t i, int64_t n) const {
    const auto zero_point = load_some<int32_t, C>(grids.zero_point + i, n);
    const auto scale = load_some<C, C>(grids.scale + i, n);
    return {zero_point, {scale, grids.quant_min - zero_point, grids.quant_max - zero_point}};
  }
};

// to[i] = f(from[i], i, lanes in use) over n elements, a vector at a time.
template <class From, class To, class C, class F>
QATFAST_INLINE void map(const From* from, To* to, int64_t n, F f) {
  int64_t i = 0;
  for (; i + lanes<C> <= n; i += lanes<C>) {
    store<To, C>(to + i, f(load<From, C>(from + i), i, int64_t{lanes<C>}));
  }
  if (i < n) {
    store_some<To, C>(to + i, f(load_some<From, C>(from + i, n - i), i, n - i), n - i);
  }
}

template <class C>
QATFAST_INLINE SameGrid<C, Grid<V<C>>> same_grid(const Grids<C>& grids) {
  const V<C> zero_point = V<C>{} + static_cast<C>(grids.zero_point[0]);
  return {zero_point, {V<C>{} + grids.scale[0], grids.quant_min - zero_point, grids.quant_max - zero_point}};
}

template <class C, class F>
QATFAST_INLINE void with_same_grid(const Grids<C>& grids, F f) {
  const auto same = same_grid(grids);
#if QATFAST_VECTOR_BYTES >= 32 // there is a fused multiply-add
  if constexpr (std::is_same_v<C, float>) {
    if (has_reciprocal(grids.scale[0])) {
      return f(SameGrid<C, ReciprocalGrid<V<C>>>{same.zero_point, {same.grid, V<C>{} + 1 / grids.scale[0]}});
    }
  }
#endif
  f(same);
}

template <class C, class F>
QATFAST_INLINE void with_grid(const Grids<C>& grids, F f) {
  grids.each ? f(EachGrid<C>{grids}) : with_same_grid(grids, f);
}

// N / 2 lanes from the one at `start` on. Through memory where the compiler has no shuffle (GCC before 12).
template <int start, class E, int N, int... I>
QATFAST_INLINE Vec<E, N / 2> half_of(Vec<E, N> v, std::integer_sequence<int, I...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(v, v, (start + I)...);
#else
  return bits_as<Vec<E, N / 2>>(reinterpret_cast<const char*>(&v) + start * sizeof(E));
#endif
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

// f(grid) with the grids of the columns from j on.
template <class C, class F>
QATFAST_INLINE void with_grids_of_columns(const Grids<C>& grids, int64_t j, int64_t m, F f) {
  const auto found = EachGrid<C>{grids}.at(j, m);
#if QATFAST_VECTOR_BYTES >= 32
  if constexpr (std::is_same_v<C, float>) {
    const auto least = reduce<C, lanes<C>>(found.grid.scale, [](auto p, auto q) {
      return p < q ? p : q;
    });
    const auto largest = reduce<C, lanes<C>>(found.grid.scale, [](auto p, auto q) {
      return p > q ? p : q;
    });
    if (has_reciprocal(least) && has_reciprocal(largest)) { // not at the end: the lanes beyond hold 0
      return f(ReciprocalGrid<V<C>>{found.grid, 1 / found.grid.scale});
    }
  }
#endif
  f(found.grid);
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
  for (int lane = 0; lane < N; ++lane) {
    *lo = widen_lo(*lo, static_cast<C>(least[lane]));
    *hi = widen_hi(*hi, static_cast<C>(most[lane]));
  }
}

template <class T>
using bits_t = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

// A float as an integer: of positive ones the largest signed is the largest, of negative ones the largest unsigned is
// the least; infinities and NaN lie beyond. Two operations a vector, and half types need no conversion.
template <class T>
struct RangeBits {
  using U = bits_t<T>;
  using I = std::make_signed_t<U>;
  static constexpr int N = QATFAST_VECTOR_BYTES / sizeof(T);
  Vec<U, N> below = {};
  Vec<I, N> above = {};

  QATFAST_MEMBER void widen(const void* x) {
    const auto u = bits_as<Vec<U, N>>(x);
    const auto i = bits_as<Vec<I, N>>(x);
    below = u > below ? u : below;
    above = i > above ? i : above;
  }
  QATFAST_MEMBER void widen(const RangeBits& other) {
    below = other.below > below ? other.below : below;
    above = other.above > above ? other.above : above;
  }
};

template <class T>
QATFAST_INLINE void range_of_run(const T* x, int64_t n, compute_t<T>* lo, compute_t<T>* hi) {
  using C = compute_t<T>;
  using Bits = RangeBits<T>;
  constexpr int N = Bits::N;
  Bits a, b, c, d; // four, to hide the latency
  int64_t i = 0;
  for (; i + 4 * N <= n; i += 4 * N) {
    a.widen(x + i);
    b.widen(x + i + N);
    c.widen(x + i + 2 * N);
    d.widen(x + i + 3 * N);
  }
  for (; i + N <= n; i += N) {
    a.widen(x + i);
  }
  if (i < n) {
    unsigned char padded[N * sizeof(T)] = {};
    std::memcpy(padded, x + i, (n - i) * sizeof(T));
    b.widen(padded);
  }
  a.widen(b);
  c.widen(d);
  a.widen(c);
  const auto most = [](auto p, auto q) {
    return p > q ? p : q;
  };
  const auto below = reduce<typename Bits::U, N>(a.below, most);
  const auto above = static_cast<typename Bits::U>(reduce<typename Bits::I, N>(a.above, most));
  constexpr auto sign = static_cast<typename Bits::U>(typename Bits::U{1} << (8 * sizeof(T) - 1));
  const C least = below >= sign ? static_cast<C>(bits_as<T>(&below)) : C(0);
  const C largest = static_cast<C>(bits_as<T>(&above));
  if (least - least != 0 || largest - largest != 0) {
    return filtered_range(x, n, lo, hi);
  }
  *lo = widen_lo(*lo, least);
  *hi = widen_hi(*hi, largest);
}

template <class T>
void range(const T* x, int64_t n, compute_t<T>* lo, compute_t<T>* hi) {
  range_of_run(x, n, lo, hi);
}

template <class T>
void range_of_columns(const T* x, int64_t rows, int64_t columns, compute_t<T>* lo, compute_t<T>* hi) {
  using C = compute_t<T>;
  constexpr int N = lanes<C>;
  for (int64_t j = 0; j < columns; j += N) {
    const auto m = columns - j < N ? columns - j : N;
    V<C> least = load_some<C, C>(lo + j, m), most = load_some<C, C>(hi + j, m);
    for (int64_t row = 0; row < rows; ++row) {
      const V<C> v = finite_or_zero(load_some<T, C>(x + row * columns + j, m));
      least = widen_lo(least, v);
      most = widen_hi(most, v);
    }
    store_some<C, C>(lo + j, least, m);
    store_some<C, C>(hi + j, most, m);
  }
}

template <class C>
void choose_loop(const C* lo, const C* hi, int64_t n, const RangeSpec<C>& spec, C* scale, int32_t* zero_point) {
  constexpr int N = lanes<C>;
  const V<C> quant_min = V<C>{} + spec.quant_min, quant_max = V<C>{} + spec.quant_max;
  for (int64_t i = 0; i < n; i += N) {
    const auto m = n - i < N ? n - i : N;
    const auto least = load_some<C, C>(lo + i, m);
    const V<C> chosen = choose_scale(least, load_some<C, C>(hi + i, m), quant_min, quant_max, spec.symmetric);
    store_some<C, C>(scale + i, chosen, m);
    const V<C> zero = choose_zero_point(least, chosen, quant_min, quant_max, spec.symmetric);
    store_some<int32_t, C>(zero_point + i, zero, m);
  }
}

template <class T>
void choose_qparams_loop(const T* x, int64_t rows, int64_t n, const RangeSpec<compute_t<T>>& spec, compute_t<T>* scale,
    int32_t* zero_point) {
  using C = compute_t<T>;
  constexpr int64_t tile = 64;
  for (int64_t row = 0; row < rows; row += tile) {
    const auto count = rows - row < tile ? rows - row : tile;
    C lo[tile] = {}, hi[tile] = {};
    for (int64_t i = 0; i < count; ++i) {
      range_of_run(x + (row + i) * n, n, lo + i, hi + i);
    }
    choose_loop(lo, hi, count, spec, scale + row, zero_point + row);
  }
}

template <class T>
void fake_quantize_loop(const T* x, T* y, int64_t n, const Grids<compute_t<T>>& grids) {
  using C = compute_t<T>;
  with_grid(grids, [&](auto at) {
    map<T, T, C>(x, y, n, [&](V<C> v, int64_t i, int64_t m) {
      return fake_quantize(v, at.at(i, m).grid);
    });
  });
}

template <class T>
void fake_quantize_inside_loop(const T* x, T* y, uint8_t* inside, int64_t n, const Grids<compute_t<T>>& grids) {
  using C = compute_t<T>;
  with_grid(grids, [&](auto at) {
    map<T, T, C>(x, y, n, [&](V<C> v, int64_t i, int64_t m) {
      const auto& grid = at.at(i, m).grid;
      const auto [value, passes] = fake_quantize_inside(v, grid);
      if constexpr (std::is_same_v<C, float>) {
        const auto narrow = narrowed<int8_t>(passes);
        std::memcpy(inside + i, &narrow, m);
      } else {
        const auto narrow = integers_as<int8_t, lanes<C>, int64_t>(passes);
        std::memcpy(inside + i, &narrow, m);
      }
      return value;
    });
  });
}

template <class T, class Q>
void quantize_loop(const T* x, Q* q, int64_t n, const Grids<compute_t<T>>& grids) {
  using C = compute_t<T>;
  with_grid(grids, [&](auto at) {
    map<T, Q, C>(x, q, n, [&](V<C> v, int64_t i, int64_t m) {
      const auto& found = at.at(i, m);
      return quantize(v, found.zero_point, found.grid);
    });
  });
}

template <class T, class Q>
void dequantize_loop(const Q* q, T* y, int64_t n, const Grids<compute_t<T>>& grids) {
  using C = compute_t<T>;
  const auto loop = [&](auto at) {
    map<Q, T, C>(q, y, n, [&](V<C> v, int64_t i, int64_t m) {
      const auto& found = at.at(i, m);
      return dequantize(v, found.zero_point, found.grid.scale);
    });
  };
  grids.each ? loop(EachGrid<C>{grids}) : loop(same_grid(grids));
}

template <class T>
void fake_quantize_rows_loop(const T* x, T* y, int64_t rows, int64_t n, const Grids<compute_t<T>>& grids) {
  using C = compute_t<T>;
  for (int64_t row = 0; row < rows; ++row) {
    with_same_grid(grids.from(row, false), [&](auto same) {
      map<T, T, C>(x + row * n, y + row * n, n, [&](V<C> v, int64_t, int64_t) {
        return fake_quantize(v, same.grid);
      });
    });
  }
}

template <class T>
void fake_quantize_columns_loop(const T* x, T* y, int64_t rows, int64_t columns, const Grids<compute_t<T>>& grids) {
  using C = compute_t<T>;
  constexpr int N = lanes<C>;
  for (int64_t j = 0; j < columns; j += N) {
    const auto m = columns - j < N ? columns - j : N;
    with_grids_of_columns(grids, j, m, [&](const auto& grid) {
      for (int64_t row = 0; row < rows; ++row) {
        const auto at = row * columns + j;
        store_some<T, C>(y + at, fake_quantize(load_some<T, C>(x + at, m), grid), m);
      }
    });
  }
}

template <class T>
void integers_loop(const T* x, int8_t* q, int64_t rows, int64_t n, const Grids<compute_t<T>>& grids,
    compute_t<T>* scale, int64_t* steps) {
  using C = compute_t<T>;
  constexpr int N = lanes<C>;
  constexpr int64_t chunk = int64_t{1} << 20; // a lane's sum of this many steps fits in 32 bits
  for (int64_t row = 0; row < rows; ++row, x += n, q += n) {
    int64_t sum = 0;
    bool is_finite = true;
    with_same_grid(grids.from(row, false), [&](auto same) {
      for (int64_t start = 0; start < n; start += chunk) {
        Vec<int32_t, N> sums = {};
        V<C> not_finite = {}; // NaN where a lane has seen a NaN or an infinity
        map<T, int8_t, C>(x + start, q + start, n - start < chunk ? n - start : chunk, [&](V<C> v, int64_t, int64_t) {
          not_finite += v - v;
          const V<C> step = quantize(v, V<C>{}, same.grid); // 0 in the lanes past the end
          sums += __builtin_convertvector(step, Vec<int32_t, N>);
          return step + same.zero_point;
        });
        const auto plus = [](auto p, auto q) {
          return p + q;
        };
        sum += reduce<int32_t, N>(sums, plus);
        is_finite &= reduce<C, N>(not_finite, plus) == 0;
      }
    });
    bool has_nan = false;
    for (int64_t i = 0; i < n && !is_finite; ++i) {
      has_nan |= x[i] != x[i];
    }
    steps[row] = sum;
    scale[row] = has_nan ? std::numeric_limits<C>::quiet_NaN() : grids.scale[row];
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
      store<T, C>(y + j, one(j, N), false);
    }
    if (j < n) {
      store_some<T, C>(y + j, one(j, n - j), n - j, false);
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

void pack_loop(const uint8_t* inside, uint8_t* mask, int64_t n) {
  int64_t i = 0;
#if QATFAST_VECTOR_BYTES == 64
  for (; i + 64 <= n; i += 64) {
    const uint64_t bits = _mm512_movepi8_mask(bits_as<__m512i>(inside + i));
    std::memcpy(mask + i / 8, &bits, sizeof(bits));
  }
#elif QATFAST_VECTOR_BYTES == 32
  for (; i + 32 <= n; i += 32) {
    const auto bits = static_cast<uint32_t>(_mm256_movemask_epi8(bits_as<__m256i>(inside + i)));
    std::memcpy(mask + i / 8, &bits, sizeof(bits));
  }
#endif
  for (; i < n; i += 8) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, inside + i, n - i < 8 ? n - i : 8);
    mask[i / 8] = static_cast<uint8_t>((bytes & 0x0101010101010101) * 0x0102040810204080 >> 56);
  }
}

template <class T, class Q>
constexpr IntegerLoops<T, Q> integer_loops() {
  return {quantize_loop<T, Q>, dequantize_loop<T, Q>};
}

template <class T>
constexpr Loops<T> all_loops() {
  return {{range<T>, range_of_columns<T>, choose_loop<compute_t<T>>, choose_qparams_loop<T>, fake_quantize_loop<T>,
              fake_quantize_rows_loop<T>, fake_quantize_columns_loop<T>, fake_quantize_inside_loop<T>},
      {integers_loop<T>, outputs_loop<T>}, integer_loops<T, int8_t>(), integer_loops<T, uint8_t>(),
      integer_loops<T, int16_t>(), integer_loops<T, uint16_t>()};
}

constexpr InstructionSet instruction_set_named(const char* name) {
  return {name, all_loops<float>(), all_loops<double>(), all_loops<c10::Half>(), all_loops<c10::BFloat16>(),
      mask_loop<uint16_t>, mask_loop<uint32_t>, mask_loop<uint64_t>, pack_loop};
}

} // namespace
} // namespace qatfast::cpu
