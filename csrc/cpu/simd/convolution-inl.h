// What a convolution of integers needs beside the product.

namespace qatfast::cpu {
namespace {

inline float scale_sums_loop(float* sums, int64_t rows, int64_t n, const float* scale, const float* bias) {
  constexpr int64_t N = lanes<float>;
  V<float> most = {};
  const auto scale_vector = [&](float* at, int64_t j, int64_t m) {
    const auto sum = load_first<float, float>(at + j, m);
    const auto magnitude = sum < 0 ? -sum : sum;
    most = widen_hi(most, magnitude);
    const auto y = int8_output(sum, load_first<float, float>(scale + j, m), load_first<float, float>(bias + j, m));
    store_first<float, float, Result::any>(at + j, y, m);
  };
  for (int64_t row = 0; row < rows; ++row, sums += n) {
    int64_t j = 0;
    for (; j + N <= n; j += N) {
      scale_vector(sums, j, N);
    }
    if (j < n) {
      scale_vector(sums, j, n - j);
    }
  }
  return reduce<float, N>(most, [](auto p, auto q) {
    return widen_hi(p, q);
  });
}

// Taps as a template argument stay in registers, if there are so many of them.
template <int taps>
QATFAST_INLINE void depthwise_lanes(const DepthwiseRow& row, int64_t c, int64_t m) {
  const auto lanes_of = [m](const float* from) {
    return load_first<float, float>(from, m);
  };
  const auto count = taps > 0 ? taps : row.taps;
  V<float> weight[taps > 0 ? taps : 1];
  for (int t = 0; t < taps; ++t) {
    weight[t] = lanes_of(row.weight + t * row.channels + c);
  }
  const auto scale = lanes_of(row.scale + c), bias = lanes_of(row.bias + c);
  for (int64_t i = 0; i < row.outputs; ++i) {
    V<float> sum = {}; // of integers below 2^24, so that no operation rounds
    for (int64_t t = 0; t < count; ++t) {
      const auto level = lanes_of(row.tap[t] + i * row.step + c);
      const auto w = taps > 0 ? weight[t] : lanes_of(row.weight + t * row.channels + c);
#if QATFAST_VECTOR_BYTES >= 32
      sum = fused_multiply_add(level, w, sum);
#else
      sum += level * w;
#endif
    }
    store_first<float, float, Result::any>(row.y + i * row.channels + c, int8_output(sum, scale, bias), m);
  }
}

inline void depthwise_loop(const DepthwiseRow& row) {
  constexpr int64_t N = lanes<float>;
  for (int64_t c = 0; c < row.channels; c += N) {
    const auto m = row.channels - c < N ? row.channels - c : N;
    if (row.taps == 9 && m == N) {
      depthwise_lanes<9>(row, c, N);
    } else if (row.taps == 25 && m == N && QATFAST_VECTOR_BYTES == 64) {
      depthwise_lanes<25>(row, c, N);
    } else {
      depthwise_lanes<0>(row, c, m);
    }
  }
}

} // namespace
} // namespace qatfast::cpu
