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

// A vector of elements of T at p, as C.
template <class T, class C>
QATFAST_INLINE V<C> load(const void* p) {
  constexpr int N = lanes<C>;
  if constexpr (std::is_same_v<T, C>) {
    return bits_as<V<C>>(p);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto wide = __builtin_convertvector((bits_as<Vec<uint16_t, N>>(p)), Vec<uint32_t, N>) << 16;
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
  } else { // integers
    return __builtin_convertvector((integers_as<int32_t, N, T>(bits_as<Vec<T, N>>(p))), V<C>);
  }
}

// 16-bit floats by their bits; -0.0 becomes 0.0.
template <int N>
QATFAST_INLINE void store_half(void* p, Vec<uint16_t, N> bits) {
  const Vec<uint16_t, N> zero = {};
  bits = bits == 0x8000 ? zero : bits;
  std::memcpy(p, &bits, sizeof(bits));
}

// Rounds once, half to even, to T; what underflows in T is 0.0, never -0.0. Integer types get values that they hold.
template <class T, class C>
QATFAST_INLINE void store(void* p, V<C> v) {
  constexpr int N = lanes<C>;
  if constexpr (std::is_same_v<T, C>) {
    std::memcpy(p, &v, sizeof(v));
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto bits = bits_as<Vec<uint32_t, N>>(&v);
    const auto rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Vec<uint32_t, N> quiet_nan = Vec<uint32_t, N>{} + 0x7FC0;
    store_half<N>(p, __builtin_convertvector((v == v ? rounded : quiet_nan), Vec<uint16_t, N>));
  } else if constexpr (std::is_same_v<T, c10::Half>) {
#if QATFAST_VECTOR_BYTES == 64
    const auto narrow = _mm512_cvtps_ph(bits_as<__m512>(&v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store_half<N>(p, bits_as<Vec<uint16_t, N>>(&narrow));
#elif QATFAST_VECTOR_BYTES == 32
    const auto narrow = _mm256_cvtps_ph(bits_as<__m256>(&v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store_half<N>(p, bits_as<Vec<uint16_t, N>>(&narrow));
#else
    Vec<uint16_t, N> narrow;
    for (int i = 0; i < N; ++i) {
      narrow[i] = c10::Half(static_cast<float>(v[i])).x;
    }
    store_half<N>(p, narrow);
#endif
  } else {
    const auto narrow = integers_as<T, N, int32_t>(__builtin_convertvector(v, Vec<int32_t, N>));
    std::memcpy(p, &narrow, sizeof(narrow));
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
QATFAST_INLINE void store_some(T* p, V<C> v, int64_t n) {
  if (n == lanes<C>) {
    return store<T, C>(p, v);
  }
  unsigned char padded[lanes<C> * sizeof(T)];
  store<T, C>(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}

// zero_point and grid of a vector of elements from i on: the same for all, or each its own.
template <class C, class G>
struct SameGrid {
  V<C> zero_point;
  G grid;

  QATFAST_MEMBER SameGrid at(int64_t, int64_t) const {
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
QATFAST_INLINE void with_grid(const Grids<C>& grids, F f) {
  if (grids.each) {
    return f(EachGrid<C>{grids});
  }
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

template <class C>
struct Range {
  V<C> lo = V<C>{};
  V<C> hi = V<C>{};

  QATFAST_MEMBER void widen(V<C> x) {
    x = finite_or_zero(x);
    lo = widen_lo(lo, x);
    hi = widen_hi(hi, x);
  }
};

template <class T>
void range(const T* x, int64_t n, compute_t<T>* lo, compute_t<T>* hi, bool each) {
  using C = compute_t<T>;
  constexpr int N = lanes<C>;
  if (each) {
    for (int64_t i = 0; i < n; i += N) {
      const auto m = n - i < N ? n - i : N;
      const V<C> v = finite_or_zero(load_some<T, C>(x + i, m));
      store_some<C, C>(lo + i, widen_lo(load_some<C, C>(lo + i, m), v), m);
      store_some<C, C>(hi + i, widen_hi(load_some<C, C>(hi + i, m), v), m);
    }
    return;
  }
  Range<C> a, b, c, d; // four, to hide the latency of min and max
  int64_t i = 0;
  for (; i + 4 * N <= n; i += 4 * N) {
    a.widen(load<T, C>(x + i));
    b.widen(load<T, C>(x + i + N));
    c.widen(load<T, C>(x + i + 2 * N));
    d.widen(load<T, C>(x + i + 3 * N));
  }
  for (; i < n; i += N) {
    a.widen(i + N <= n ? load<T, C>(x + i) : load_some<T, C>(x + i, n - i));
  }
  const V<C> least = widen_lo(widen_lo(a.lo, b.lo), widen_lo(c.lo, d.lo));
  const V<C> most = widen_hi(widen_hi(a.hi, b.hi), widen_hi(c.hi, d.hi));
  C lowest = *lo, highest = *hi;
  for (int lane = 0; lane < N; ++lane) {
    lowest = widen_lo(lowest, static_cast<C>(least[lane]));
    highest = widen_hi(highest, static_cast<C>(most[lane]));
  }
  *lo = lowest;
  *hi = highest;
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
      const auto grid = at.at(i, m).grid;
      using Lane = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
      const auto [value, passes] = fake_quantize_inside(v, grid);
      const auto narrow = integers_as<int8_t, lanes<C>, Lane>(passes);
      std::memcpy(inside + i, &narrow, m);
      return value;
    });
  });
}

template <class T, class Q>
void quantize_loop(const T* x, Q* q, int64_t n, const Grids<compute_t<T>>& grids) {
  using C = compute_t<T>;
  with_grid(grids, [&](auto at) {
    map<T, Q, C>(x, q, n, [&](V<C> v, int64_t i, int64_t m) {
      const auto found = at.at(i, m);
      return quantize(v, found.zero_point, found.grid);
    });
  });
}

template <class T, class Q>
void dequantize_loop(const Q* q, T* y, int64_t n, const Grids<compute_t<T>>& grids) {
  using C = compute_t<T>;
  const auto loop = [&](auto at) {
    map<Q, T, C>(q, y, n, [&](V<C> v, int64_t i, int64_t m) {
      const auto found = at.at(i, m);
      return dequantize(v, found.zero_point, found.grid.scale);
    });
  };
  grids.each ? loop(EachGrid<C>{grids}) : loop(same_grid(grids));
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

template <class T, class Q>
constexpr IntegerLoops<T, Q> integer_loops() {
  return {quantize_loop<T, Q>, dequantize_loop<T, Q>};
}

template <class T>
constexpr Loops<T> all_loops() {
  return {{range<T>, fake_quantize_loop<T>, fake_quantize_inside_loop<T>}, integer_loops<T, int8_t>(),
      integer_loops<T, uint8_t>(), integer_loops<T, int16_t>(), integer_loops<T, uint16_t>()};
}

constexpr InstructionSet instruction_set_named(const char* name) {
  return {name, all_loops<float>(), all_loops<double>(), all_loops<c10::Half>(), all_loops<c10::BFloat16>(),
      mask_loop<uint16_t>, mask_loop<uint32_t>, mask_loop<uint64_t>};
}

} // namespace
} // namespace qatfast::cpu
