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

} // namespace
} // namespace qatfast::cpu
