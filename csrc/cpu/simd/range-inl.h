// The range of the finite values of a run, of rows and of columns.

namespace qatfast::cpu {
namespace {

// The range of the finite values, found in floating point.
template <class T>
void filtered_range(const T* x, int64_t n, opmath_type<T>* lo, opmath_type<T>* hi) {
  using C = opmath_type<T>;
  constexpr int N = lanes<C>;
  V<C> least = {}, most = {};
  for (int64_t i = 0; i < n; i += N) {
    const V<C> v = finite_or_zero(load_first<T, C>(x + i, n - i < N ? n - i : N));
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
    const T* x, int64_t rows, int64_t stride, int64_t n, opmath_type<T>* lo, opmath_type<T>* hi) {
  for (int64_t j = 0; j < n; ++j) {
    lo[j] = hi[j] = 0;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < n; ++j) {
      const auto v = finite_or_zero(static_cast<opmath_type<T>>(x[row * stride + j]));
      lo[j] = widen_lo(lo[j], v);
      hi[j] = widen_hi(hi[j], v);
    }
  }
}

struct Larger {
  template <class E>
  QATFAST_MEMBER E operator()(E p, E q) const {
    return p > q ? p : q;
  }
};

// The range of floats by their bits as integers: the largest signed integer is the largest positive float, the largest
// unsigned one is the least negative float, and infinities and NaN lie beyond. That takes two operations per vector,
// and half types need no conversion.
template <class T>
struct RangeBits {
  using C = opmath_type<T>;
  using U = bits_t<T>;
  using I = std::make_signed_t<U>;
  static constexpr int N = QATFAST_VECTOR_BYTES / sizeof(T);
  static constexpr auto sign = static_cast<U>(U{1} << (8 * sizeof(T) - 1));
  static constexpr int significand_bits = std::is_same_v<T, double> ? 52
      : std::is_same_v<T, float>                                    ? 23
      : std::is_same_v<T, c10::Half>                                ? 10
                                                                    : 7;
  static constexpr auto infinity = static_cast<U>((sign - 1) >> significand_bits << significand_bits);
  Vec<U, N> below; // uninitialized: clearing an array of them takes longer than the rest
  Vec<I, N> above;

  QATFAST_MEMBER static RangeBits zero() {
    return {Vec<U, N>{}, Vec<I, N>{}};
  }
  QATFAST_MEMBER static RangeBits of(const void* x) {
    return {bits_as<Vec<U, N>>(x), bits_as<Vec<I, N>>(x)};
  }
  QATFAST_MEMBER void widen(V<C> v) { // of values in a register: &v would load them again
    static_assert(std::is_same_v<T, C>);
    below = Larger{}(reinterpret_cast<Vec<U, N>>(v), below);
    above = Larger{}(reinterpret_cast<Vec<I, N>>(v), above);
  }
  QATFAST_MEMBER void widen(const void* x) {
    below = Larger{}(bits_as<Vec<U, N>>(x), below);
    above = Larger{}(bits_as<Vec<I, N>>(x), above);
  }
  QATFAST_MEMBER void widen_first(const void* x, int64_t n) {
    const auto loaded = first_of<U, N>(x, n);
    widen(&loaded);
  }
  QATFAST_MEMBER void widen(const RangeBits& other) {
    below = Larger{}(other.below, below);
    above = Larger{}(other.above, above);
  }

  // Stores lo[i] and hi[i] of lane i, for n lanes. Returns false, and stores nothing, if one is not finite.
  QATFAST_MEMBER bool to_floats(int64_t n, C* lo, C* hi) const {
    const Vec<U, N> magnitudes = below & static_cast<U>(~sign);
    if (!all_of<I, N>((magnitudes < infinity) & (above < static_cast<I>(infinity)))) {
      return false;
    }
    const Vec<U, N> least = below >= sign ? below : Vec<U, N>{};
    const Vec<I, N> most = Larger{}(above, Vec<I, N>{});
    for (int64_t i = 0; i < N && i < n; i += lanes<C>) {
      const auto m = n - i < lanes<C> ? n - i : lanes<C>;
      const auto low = load<T, C>(reinterpret_cast<const char*>(&least) + i * sizeof(T));
      const auto high = load<T, C>(reinterpret_cast<const char*>(&most) + i * sizeof(T));
      store_first<C, C>(lo + i, low, m);
      store_first<C, C>(hi + i, high, m);
    }
    return true;
  }
};

// Joins the halves of the rows of `length` lanes in a and b, so that rows are half as long.
template <int length, class T>
QATFAST_INLINE RangeBits<T> halves_joined(const RangeBits<T>& a, const RangeBits<T>& b) {
  using Bits = RangeBits<T>;
  return {halved<length, typename Bits::U, Bits::N>(a.below, b.below, Larger{}),
      halved<length, typename Bits::I, Bits::N>(a.above, b.above, Larger{})};
}

// Joins the halves of the rows in `count` vectors, which are overwritten, until a row is one lane.
template <int count, class T>
QATFAST_INLINE RangeBits<T> reduced_rows(RangeBits<T>* bits) {
  if constexpr (count > 1) {
    for (int i = 0; i < count / 2; ++i) {
      bits[i] = halves_joined<count>(bits[2 * i], bits[2 * i + 1]);
    }
    return reduced_rows<count / 2>(bits);
  }
  return bits[0];
}

template <class T>
QATFAST_INLINE RangeBits<T> bits_of_run(const T* x, int64_t n) {
  constexpr int N = RangeBits<T>::N;
  auto a = RangeBits<T>::zero();
  if (n < N) {
    if (n > 0) {
      a.widen_first(x, n);
    }
    return a;
  }
  a = RangeBits<T>::of(x);
  int64_t i = N;
  if (n >= 8 * N) {
    auto b = a, c = a, d = a; // four accumulators hide the latency
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
    a.widen_first(x + i, n - i);
  }
  return a;
}

// Stores the range of the finite values of a run with these bits. Returns whether all are finite.
template <class T>
QATFAST_INLINE bool range_of_bits(RangeBits<T> bits, const T* x, int64_t n, opmath_type<T>* lo, opmath_type<T>* hi) {
  using Bits = RangeBits<T>;
  bits.below[0] = reduce<typename Bits::U, Bits::N>(bits.below, Larger{});
  bits.above[0] = reduce<typename Bits::I, Bits::N>(bits.above, Larger{});
  const bool is_finite = bits.to_floats(1, lo, hi);
  if (!is_finite) {
    filtered_range(x, n, lo, hi);
  }
  return is_finite;
}

template <class T>
QATFAST_INLINE bool range_of_run(const T* x, int64_t n, opmath_type<T>* lo, opmath_type<T>* hi) {
  return range_of_bits(bits_of_run(x, n), x, n, lo, hi);
}

// The ranges of up to `rows` rows, N / rows lanes each. Reducing rows together takes few operations per row.
template <int rows, class T>
QATFAST_INLINE RangeBits<T> bits_of_rows(const T* x, int64_t count, int64_t n) {
  if constexpr (rows == 1) {
    return count > 0 ? bits_of_run(x, n) : RangeBits<T>::zero();
  } else {
    constexpr int half = rows / 2;
    return halves_joined<2 * RangeBits<T>::N / rows>(
        bits_of_rows<half>(x, count, n), bits_of_rows<half>(x + half * n, count - half, n));
  }
}

// The ranges of N rows, one lane per row.
template <class T>
QATFAST_INLINE RangeBits<T> bits_of_all_rows(const T* x, int64_t count, int64_t n) {
  constexpr int N = RangeBits<T>::N;
  constexpr int unrolled = N < 4 ? N : 4;
  RangeBits<T> bits[N / unrolled];
  for (int i = 0; i < N / unrolled; ++i) {
    bits[i] = bits_of_rows<unrolled>(x + i * unrolled * n, count - i * unrolled, n);
  }
  return reduced_rows<N / unrolled>(bits);
}

// of[n]: the lanes that turn rows of n elements into rows of `length` lanes, the next power of two, by repeating the
// last element.
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

// The ranges of N rows of n < N elements, one lane per row. Rows of `length` lanes fill `length` vectors.
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
  return reduced_rows<length>(bits);
}

// Stores the range of row i as lo[i] and hi[i]. Returns whether all values are finite.
template <class T>
QATFAST_INLINE bool range_of_rows(const T* x, int64_t rows, int64_t n, opmath_type<T>* lo, opmath_type<T>* hi) {
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
      bits->widen_first(x + row * stride + j, n - j);
    }
  }
}

template <class T>
bool range_of_columns_loop(
    const T* x, int64_t rows, int64_t stride, int64_t n, opmath_type<T>* lo, opmath_type<T>* hi) {
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
bool range_of_rows_loop(const T* x, int64_t rows, int64_t n, opmath_type<T>* lo, opmath_type<T>* hi) {
  return range_of_rows(x, rows, n, lo, hi);
}

template <class T>
bool range_loop(const T* x, int64_t n, opmath_type<T>* lo, opmath_type<T>* hi) {
  opmath_type<T> least, most;
  const bool is_finite = range_of_run(x, n, &least, &most);
  *lo = widen_lo(*lo, least);
  *hi = widen_hi(*hi, most);
  return is_finite;
}

} // namespace
} // namespace qatfast::cpu
