// Sums in double whose order depends on their length only, and the loops that need them.

namespace qatfast::cpu {
namespace {

// lanes[l] += values[l]
template <class C>
QATFAST_INLINE void add_to_lanes(double* lanes, const C* values) {
  for (int64_t l = 0; l < sum_lanes; ++l) {
    lanes[l] += static_cast<double>(values[l]);
  }
}

// Calls f(first element, elements, lane buffers) for rows of sum_lanes elements and stores the sum of each chunk.
template <class F>
QATFAST_INLINE void sum_chunks(int64_t n, double* sums, F add_row) {
  for (int64_t chunk = 0; chunk < n; chunk += sum_chunk) {
    alignas(64) double lanes[sum_lanes] = {};
    const auto end = n - chunk < sum_chunk ? n : chunk + sum_chunk;
    for (int64_t row = chunk; row < end; row += sum_lanes) {
      add_row(row, end - row < sum_lanes ? end - row : sum_lanes, lanes);
    }
    *sums++ = sum_of_lanes(lanes);
  }
}

template <class T>
void learned_gradients_loop(
    const T* x, const T* grad, T* grad_x, int64_t n, const Grids<opmath_type<T>>& grids, double* sums) {
  using C = opmath_type<T>;
  constexpr int N = lanes<C>;
  with_tile<GridKinds::static_range>(grids, 0, 1, [&](auto tile) {
    const auto grid = tile.row(0).grid;
    sum_chunks(n, sums, [&](int64_t row, int64_t count, double* lane_sums) {
      alignas(64) C products[sum_lanes] = {};
      for (int64_t i = 0; i < count; i += N) {
        const auto m = count - i < N ? count - i : N;
        const auto v = load_first<T, C>(x + row + i, m), dy = load_first<T, C>(grad + row + i, m);
        const auto [product, inside] = learned_gradient(v, dy, grid);
        store<C, C>(products + i, product);
        store_first<T, C, Result::any>(grad_x + row + i, inside ? dy : V<C>{}, m);
      }
      add_to_lanes(lane_sums, products);
    });
  });
}

// sums[g * stride + chunk] receives the sum over a chunk of the squared errors of grid g, over the finite values.
template <class T>
void squared_errors_loop(
    const T* x, int64_t n, const Grids<opmath_type<T>>& grids, int64_t count, double* sums, int64_t stride) {
  using C = opmath_type<T>;
  constexpr int N = lanes<C>;
  with_tile<GridKinds::static_range>(grids, 0, count, [&](auto tile) {
    for (int64_t chunk = 0; chunk < n; chunk += sum_chunk) {
      alignas(64) C values[sum_chunk] = {}; // zeros for what is not finite, which every grid holds
      const auto m = n - chunk < sum_chunk ? n - chunk : sum_chunk;
      map<T, C, C, Result::any>(x + chunk, values, m, [](V<C> v, int64_t, int64_t) -> V<C> {
        return finite_or_zero(v);
      });
      const auto rows = (m + sum_lanes - 1) / sum_lanes * sum_lanes;
      for (int64_t g = 0; g < count; ++g) {
        const auto grid = tile.row(g).grid;
        alignas(64) double lane_sums[sum_lanes] = {};
        for (int64_t row = 0; row < rows; row += sum_lanes) {
          alignas(64) C quantized[sum_lanes];
          for (int64_t i = 0; i < sum_lanes; i += N) {
            store<C, C>(quantized + i, fake_quantize(bits_as<V<C>>(values + row + i), grid));
          }
          for (int64_t l = 0; l < sum_lanes; ++l) {
            const double error = static_cast<double>(quantized[l]) - static_cast<double>(values[row + l]);
            lane_sums[l] += error * error;
          }
        }
        sums[g * stride + chunk / sum_chunk] = sum_of_lanes(lane_sums);
      }
    }
  });
}

} // namespace
} // namespace qatfast::cpu
