// The gradient of fake_quantize_affine.

namespace qatfast::cpu {
namespace {

template <class U>
QATFAST_INLINE Vec<U, 8> masked(Vec<U, 8> grad, uint8_t mask) {
  const Vec<U, 8> bit = {1, 2, 4, 8, 16, 32, 64, 128};
  return grad & static_cast<Vec<U, 8>>(((Vec<U, 8>{} + mask) & bit) != 0);
}

// In place, memory of which all gradients pass is not touched.
template <class U>
void mask_loop(const U* grad, const uint8_t* mask, U* to, int64_t n) {
  const bool in_place = grad == to;
  int64_t i = 0;
#if QATFAST_VECTOR_BYTES == 64
  constexpr int64_t N = 64 / sizeof(U);
  const auto end = n / N * N, step = stores_delay_loads(grad, to) ? -N : N;
  i = step < 0 ? end - N : 0;
  for (auto left = n / N; left > 0; --left, i += step) {
    using Bits = std::conditional_t<N == 8, uint8_t, std::conditional_t<N == 16, uint16_t, uint32_t>>;
    const auto bits = bits_as<Bits>(mask + i / 8);
    if (in_place && bits == static_cast<Bits>(-1)) {
      continue;
    }
    __m512i kept;
    if constexpr (N == 8) {
      kept = _mm512_maskz_loadu_epi64(bits, grad + i);
    } else if constexpr (N == 16) {
      kept = _mm512_maskz_loadu_epi32(bits, grad + i);
    } else {
      kept = _mm512_maskz_loadu_epi16(bits, grad + i);
    }
    _mm512_storeu_si512(to + i, kept);
  }
  i = end;
#endif
  for (; i + 8 <= n; i += 8) {
    if (in_place && mask[i / 8] == 0xFF) {
      continue;
    }
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

} // namespace
} // namespace qatfast::cpu
