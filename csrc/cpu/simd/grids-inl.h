// The grid of each element of a matrix, with everything that is computed once per grid; `map_matrix`.

namespace qatfast::cpu {
namespace {

// Whether divide() replaces divisions: for float, if there is a fused multiply-add.
template <class C>
constexpr bool divides_by_product = std::is_same_v<C, float> && QATFAST_VECTOR_BYTES >= 32;

// A value in every lane.
template <class C>
QATFAST_INLINE V<C> all_lanes(C value) {
  return value - V<C>{}; // 0 + value would turn -0.0 into 0.0 and cost an addition
}

// Consecutive grids with everything that is computed once per grid.
template <class C>
struct GridTile {
  static constexpr int64_t size = 1024;
  alignas(QATFAST_VECTOR_BYTES) C scale[size];
  alignas(QATFAST_VECTOR_BYTES) C zero_point[size];
  alignas(QATFAST_VECTOR_BYTES) C reciprocal[size]; // valid, as those below, if all grids have one
  alignas(QATFAST_VECTOR_BYTES) C least[size];
  alignas(QATFAST_VECTOR_BYTES) C most[size];
  C quant_min;
  C quant_max;

  // Fills the tile with the grids of rows or columns from `first` on. Returns whether all have a reciprocal.
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
    bool have_reciprocals = divides_by_product<C>;
    for (int64_t i = 0; i < count; i += N) {
      const auto m = count - i < N ? count - i : N;
      const auto s = load_first<C, C>(in_order ? grids.scale + from + i : scale + i, m);
      const auto z =
          in_order ? load_first<int32_t, C>(grids.zero_point + from + i, m) : load_first<C, C>(zero_point + i, m);
      store<C, C>(scale + i, s);
      store<C, C>(zero_point + i, z);
      if constexpr (divides_by_product<C>) {
        have_reciprocals &= all_of<int32_t, N>(has_reciprocal(s) | ~is_used<N>(m));
        store<C, C>(reciprocal + i, 1 / s);
        store<C, C>(least + i, (quant_min - z) * s);
        store<C, C>(most + i, (quant_max - z) * s);
      }
    }
    return have_reciprocals;
  }
};

// The grid of each lane of a vector.
template <class C, class G>
struct LaneGrids {
  V<C> zero_point;
  G grid;

  // Lane i receives the grid of lane by[i].
  QATFAST_MEMBER LaneGrids permuted_by(Vec<mask_t<C>, lanes<C>> by) const {
    constexpr int N = lanes<C>;
    const auto permute = [by](V<C> v) {
      return permuted<C, N>(v, by);
    };
    if constexpr (std::is_same_v<G, Grid<V<C>>>) {
      return {permute(zero_point), {permute(grid.scale), permute(grid.lo), permute(grid.hi)}};
    } else if constexpr (std::is_same_v<G, ReciprocalGrid<V<C>>>) {
      return {permute(zero_point),
          {{permute(grid.scale), permute(grid.lo), permute(grid.hi)}, permute(grid.reciprocal), permute(grid.least),
              permute(grid.most)}};
    } else {
      return {permute(zero_point), {permute(grid.scale), permute(grid.reciprocal)}};
    }
  }
};

// The grids of a tile as one kind of grid.
template <template <class> class G, class C>
struct TileOf {
  static constexpr auto result = std::is_same_v<G<C>, UnclampedGrid<C>> ? Result::normal : Result::quantized;
  const GridTile<C>& tile;

  // lanes_of(array): one value of the array in all lanes, or neighbouring values, one per lane
  template <class F>
  QATFAST_MEMBER auto lane_grids(F lanes_of) const {
    const V<C> scale = lanes_of(tile.scale), zero_point = lanes_of(tile.zero_point);
    const Grid<V<C>> grid = {scale, tile.quant_min - zero_point, tile.quant_max - zero_point};
    if constexpr (std::is_same_v<G<C>, Grid<C>>) {
      return LaneGrids<C, Grid<V<C>>>{zero_point, grid};
    } else if constexpr (std::is_same_v<G<C>, ReciprocalGrid<C>>) {
      return LaneGrids<C, ReciprocalGrid<V<C>>>{
          zero_point, {grid, lanes_of(tile.reciprocal), lanes_of(tile.least), lanes_of(tile.most)}};
    } else {
      return LaneGrids<C, UnclampedGrid<V<C>>>{zero_point, {scale, lanes_of(tile.reciprocal)}};
    }
  }
  QATFAST_MEMBER auto row(int64_t i) const {
    return lane_grids([i](const C* values) {
      return all_lanes(values[i]);
    });
  }
  QATFAST_MEMBER auto columns(int64_t j) const {
    return lane_grids([j](const C* values) {
      return bits_as<V<C>>(values + j);
    });
  }
};

// The kinds of grid that a loop is compiled for. A static grid is clamped; a dynamic one may be unclamped.
enum class GridKinds { plain, static_range, dynamic_range };

// Calls f(tile) with the `count` grids of rows or columns from `first` on.
template <GridKinds kinds, class C, class F>
QATFAST_INLINE void with_tile(const Grids<C>& grids, int64_t first, int64_t count, F f) {
  GridTile<C> tile;
  const bool have_reciprocals = tile.fill(grids, first, count);
  if constexpr (divides_by_product<C> && kinds == GridKinds::dynamic_range) {
    if (grids.unclamped) {
      return f(TileOf<UnclampedGrid, C>{tile});
    }
  }
  if constexpr (divides_by_product<C> && kinds != GridKinds::plain) {
    if (have_reciprocals) {
      return f(TileOf<ReciprocalGrid, C>{tile});
    }
  }
  f(TileOf<Grid, C>{tile});
}

// A group size so common, and so short, that its loops are unrolled.
constexpr int64_t common_group = 32;

// What map_matrix stores. Quantized float32 in a smaller type is cast as a tensor is, so that what underflows may be
// -0.0.
template <class From, class To, class Tile>
constexpr Result stored = std::is_same_v<From, float> && is_half<To> ? Result::any : Tile::result;

// to[i] = f(from[i], its grid, i, lanes in use), quantized values, over a matrix, one vector at a time. f may load
// other tensors at i.
template <GridKinds kinds, class From, class To, class C, class F>
QATFAST_INLINE void map_matrix(const From* from, To* to, int64_t rows, int64_t n, const Grids<C>& grids, F f) {
  constexpr auto size = GridTile<C>::size;
  constexpr int64_t N = lanes<C>;
  if (grids.columns > 0) {
    const auto stride = grids.stride;
    const int64_t band = n > size ? 32 : rows; // rows that stay in L2 while the tiles pass over them
    for (int64_t row = 0; row < rows; row += band) {
      const auto end = (rows - row < band ? rows : row + band) * stride;
      for (int64_t j = 0; j < n; j += size) {
        const auto m = n - j < size ? n - j : size;
        with_tile<kinds>(grids, j, m, [&](auto tile) {
          constexpr auto result = stored<From, To, decltype(tile)>;
          int64_t at = row * stride + j;
          for (; m % 16 == 0 && at + 3 * stride < end; at += 4 * stride) { // a grid is loaded once per four rows
            for (int64_t i = 0; i < m; i += N) {
              const auto grid = tile.columns(i);
              const auto map_vector = [&](int64_t k) {
                store<To, C, result>(to + k, f(load<From, C>(from + k), grid, k, N));
              };
              map_vector(at + i);
              map_vector(at + stride + i);
              map_vector(at + 2 * stride + i);
              map_vector(at + 3 * stride + i);
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
      constexpr auto result = stored<From, To, decltype(tile)>;
      if (n == 1) {
        return map<From, To, C, result>(from + row, to + row, count, [&](V<C> v, int64_t i, int64_t used) {
          return f(v, tile.columns(i), row + i, used);
        });
      }
      if (n < short_row && n % N != 0) {
        for (int64_t k = 0; k < count; k += N) {
          const auto grids_of_rows = tile.columns(k);
          const auto begin = (row + k) * n, end = (count - k < N ? row + count : row + k + N) * n;
          for (int64_t i = 0; begin + i < end; i += N) {
            const auto at = begin + i, used = end - at < N ? end - at : N;
            const auto rows_of_vector = bits_as<Vec<uint8_t, N>>(rows_of_lanes<N>.of[n][i / N]);
            const auto grid = grids_of_rows.permuted_by(integers_as<mask_t<C>, N, uint8_t>(rows_of_vector));
            store_first<To, C, result>(to + at, f(load_first<From, C>(from + at, used), grid, at, used), used);
          }
        }
        return;
      }
      const auto rows_of = [&](int64_t length) __attribute__((always_inline)) {
        for (int64_t k = 0; k < count; ++k) {
          const auto grid = tile.row(k);
          const auto at = (row + k) * length;
          map<From, To, C, result>(from + at, to + at, length, [&](V<C> v, int64_t i, int64_t used) {
            return f(v, grid, at + i, used);
          });
        }
      };
      n == common_group ? rows_of(common_group) : rows_of(n);
    });
  }
}

} // namespace
} // namespace qatfast::cpu
