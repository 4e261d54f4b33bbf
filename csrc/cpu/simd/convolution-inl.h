// What a convolution of integers needs besides the product.

namespace qatfast::cpu {
namespace {

inline float scale_sums_loop(float* sums, int64_t rows, int64_t n, const float* scale, const float* bias) {
  V<float> most = {};
  for (int64_t row = 0; row < rows; ++row, sums += n) {
    for_each_vector<float>(n, [&](int64_t j, int64_t m) __attribute__((always_inline)) {
      const auto sum = load_first<float, float>(sums + j, m);
      const auto magnitude = sum < 0 ? -sum : sum;
      most = widen_hi(most, magnitude);
      const auto y = int8_output(sum, load_first<float, float>(scale + j, m), load_first<float, float>(bias + j, m));
      store_first<float, float, Result::any>(sums + j, y, m);
    });
  }
  return reduce<float, lanes<float>>(most, [](auto p, auto q) {
    return widen_hi(p, q);
  });
}

template <class E>
void requantize_loop(void* sums, int64_t rows, int64_t n, const Requantization& by) {
  constexpr int64_t N = lanes<float>;
  using Unsigned = Vec<uint32_t, N>; // sums wrap around on their way
  const V<float> low = V<float>{} + by.low, high = V<float>{} + by.high, scale = V<float>{} + by.scale;
  auto* at = static_cast<float*>(sums);
  for (int64_t row = 0; row < rows; ++row, at += n) {
    for_each_vector<float>(n, [&](int64_t j, int64_t m) __attribute__((always_inline)) {
      const auto loaded = first_of<E, N>(at + j, m);
      const auto sum = __builtin_convertvector(loaded, Vec<int32_t, N>);
      const auto offset = first_of<int32_t, N>(by.offset + j, m);
      const auto total = bits_as<Unsigned>(&sum) + bits_as<Unsigned>(&offset);
      const auto value = __builtin_convertvector(bits_as<Vec<int32_t, N>>(&total), V<float>);
      const auto y = requantized(value, load_first<float, float>(by.factor + j, m), low, high, scale);
      store_first<float, float, Result::any>(at + j, y, m);
    });
  }
}

} // namespace
} // namespace qatfast::cpu
