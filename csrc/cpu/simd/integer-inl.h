// Conversions to and from integers, and what the int8 GEMM needs besides the product.

namespace qatfast::cpu {
namespace {

template <class T, class Q>
void quantize_loop(const T* x, Q* q, int64_t rows, int64_t n, const Grids<opmath_type<T>>& grids) {
  using C = opmath_type<T>;
  map_matrix<GridKinds::static_range>(x, q, rows, n, grids, [](V<C> v, const auto& at, int64_t, int64_t) {
    return quantize(v, __builtin_convertvector(at.zero_point, Vec<int32_t, lanes<C>>), at.grid);
  });
}

template <class T, class Q>
void dequantize_loop(const Q* q, T* y, int64_t rows, int64_t n, const Grids<opmath_type<T>>& grids) {
  using C = opmath_type<T>;
  map_matrix<GridKinds::plain>(q, y, rows, n, grids, [](V<C> v, const auto& at, int64_t, int64_t) {
    return dequantize(v, at.zero_point, at.grid.scale);
  });
}

template <class T>
bool quantize_range_loop(const T* x, uint8_t* q, uint8_t* mask, int64_t n, const Grids<opmath_type<T>>& grid,
    opmath_type<T>* lo, opmath_type<T>* hi) {
  using C = opmath_type<T>;
  return map_and_range(x, q, mask, n, grid, lo, hi, [](V<C> v, const auto& row) __attribute__((always_inline)) {
    return quantize(v, __builtin_convertvector(row.zero_point, Vec<int32_t, lanes<C>>), row.grid);
  });
}

template <class T>
bool quantize_finite_loop(const T* x, uint8_t* q, int64_t n, const Grids<opmath_type<T>>& grid) {
  using C = opmath_type<T>;
  V<C> not_finite = {}; // NaN in lanes that held a NaN or an infinity
  with_tile<GridKinds::static_range>(grid, 0, 1, [&](auto tile) {
    const auto row = tile.row(0);
    const auto zero_point = __builtin_convertvector(row.zero_point, Vec<int32_t, lanes<C>>);
    map<T, uint8_t, C>(x, q, n, [&](V<C> v, int64_t, int64_t) __attribute__((always_inline)) {
      not_finite += v - v;
      return quantize(v, zero_point, row.grid);
    });
  });
  return reduce<C, lanes<C>>(not_finite, [](auto p, auto q) {
    return p + q;
  }) == 0;
}

template <class T>
void quantize_rows_loop(const T* x, int8_t* q, int64_t rows, int64_t n, const Grids<opmath_type<T>>& grids,
    opmath_type<T>* scale, int64_t* level_sums) {
  using C = opmath_type<T>;
  constexpr int N = lanes<C>;
  constexpr int64_t chunk = int64_t{1} << 20; // a lane's sum of this many levels fits in 32 bits
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
      V<C> not_finite = {}; // NaN in lanes that held a NaN or an infinity
      const auto end = n - start < chunk ? n - start : chunk;
      map<T, int8_t, C>(from + start, q + row * n + start, end, [&](V<C> v, int64_t, int64_t) {
        auto level = quantize(v, Vec<int32_t, N>{}, at.grid); // 0 in the lanes past the end
        if constexpr (!std::is_same_v<std::decay_t<decltype(at.grid)>, UnclampedGrid<V<C>>>) {
          not_finite += v - v;
          level &= integers_as<int32_t, N, mask_t<C>>(v == v);
        }
        sums += level;
        return level + zero_point;
      });
      sum += reduce<int32_t, N>(sums, plus);
      is_finite &= reduce<C, N>(not_finite, plus) == 0;
    }
    bool has_nan = false;
    for (int64_t i = 0; i < n && !is_finite; ++i) {
      has_nan |= from[i] != from[i];
    }
    level_sums[row] = sum;
    scale[row] = has_nan ? std::numeric_limits<C>::quiet_NaN() : grids.scale[row];
  };
  constexpr auto size = GridTile<C>::size;
  for (int64_t row = 0; row < rows; row += size) {
    const auto count = rows - row < size ? rows - row : size;
    with_tile<GridKinds::dynamic_range>(grids, row, count, [&](auto tile) {
      for (int64_t k = 0; k < count; ++k) {
        integers_of_row(tile.row(k), row + k);
      }
    });
  }
}

template <class T>
void epilogue_loop(const int32_t* products, T* y, int64_t n, const EpilogueRow<opmath_type<T>>& row) {
  using C = opmath_type<T>;
  constexpr int N = lanes<C>;
  const auto loop = [&](auto affine, auto biased) {
    for_each_vector<C>(n, [&](int64_t j, int64_t m) __attribute__((always_inline)) {
      const auto integers = [&](const int32_t* from) {
        Vec<int32_t, N> to = {};
        std::memcpy(&to, from + j, m * sizeof(int32_t));
        return to;
      };
      auto sum = integers(products) - row.input_zero_point * integers(row.weight_sum);
      if (affine) {
        sum -= row.input_level_sum * integers(row.weight_zero_point);
      }
      const V<C> scale = row.input_scale * load_first<C, C>(row.weight_scale + j, m);
      const V<C> bias = biased ? load_first<C, C>(row.bias + j, m) : -V<C>{}; // adding -0.0 changes nothing
      store_first<T, C, Result::any>(y + j, int8_output(__builtin_convertvector(sum, V<C>), scale, bias), m);
    });
  };
  using Yes = std::true_type;
  using No = std::false_type;
  if (row.weight_zero_point) {
    row.bias ? loop(Yes{}, Yes{}) : loop(Yes{}, No{});
  } else {
    row.bias ? loop(No{}, Yes{}) : loop(No{}, No{});
  }
}

} // namespace
} // namespace qatfast::cpu
