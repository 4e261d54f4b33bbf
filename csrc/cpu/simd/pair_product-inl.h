// Matrix products by the instruction that multiplies pairs of int16 and adds both products (pmaddwd), for processors
// without dot products of int8. The sums are those of 32-bit integers.

namespace qatfast::cpu {
namespace {

// The columns of an 8 x 8 matrix of 32-bit elements.
QATFAST_INLINE void transpose(__m256i (&rows)[8]) {
  __m256i pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      quads[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31);
  }
}

void pack_pairs_loop(const PairWeight& weight, int64_t features, int16_t* to) {
  static_assert(pair_features == sizeof(__m128i));
  int8_t padded[pair_outputs][pair_features];
  for (int64_t k = 0; k < features; k += pair_features) {
    const int8_t* from = weight.values + k;
    auto step = weight.step;
    const auto width = smaller(pair_features, features - k);
    if (weight.outputs < pair_outputs || width < pair_features) {
      std::memset(padded, 0, sizeof(padded));
      for (int64_t j = 0; j < weight.outputs; ++j) {
        std::memcpy(padded[j], from + j * step, width);
      }
      from = padded[0];
      step = pair_features;
    }
    for (int half = 0; half < pair_outputs / 8; ++half) {
      __m256i pairs[8]; // of an output each
      for (int i = 0; i < 8; ++i) {
        const auto j = half * 8 + i;
        const auto zero_point = j < weight.outputs ? static_cast<int16_t>(weight.zero_point[j]) : int16_t{0};
        pairs[i] =
            _mm256_sub_epi16(_mm256_cvtepi8_epi16(bits_as<__m128i>(from + j * step)), _mm256_set1_epi16(zero_point));
      }
      transpose(pairs);
      for (int i = 0; i < 8; ++i) {
        auto* const place = to + ((k / 2 + i) * pair_outputs + half * 8) * 2;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), pairs[i]);
      }
    }
  }
}

template <class T>
void levels_loop(const T* values, int64_t n, int32_t zero_point, int16_t* to) {
  constexpr int64_t N = 16;
  const auto zero = _mm256_set1_epi16(static_cast<int16_t>(zero_point));
  int64_t i = 0;
  for (; i + N <= n; i += N) {
    const auto narrow = bits_as<__m128i>(values + i);
    const auto wide = std::is_signed_v<T> ? _mm256_cvtepi8_epi16(narrow) : _mm256_cvtepu8_epi16(narrow);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_sub_epi16(wide, zero));
  }
  for (; i < n; ++i) {
    to[i] = static_cast<int16_t>(values[i] - zero_point);
  }
}

// The sums of `rows` rows, which stay in registers.
template <int rows>
inline void add_pair_products(
    const int16_t* levels, int64_t step, const int16_t* weight, int64_t pairs, int32_t* sums, int64_t sums_step) {
  constexpr int vectors = pair_outputs / 8;
  const auto at = [&](int row, int v) __attribute__((always_inline)) {
    return reinterpret_cast<__m256i*>(sums + row * sums_step + v * 8);
  };
  __m256i total[rows][vectors];
  QATFAST_UNROLL
  for (int row = 0; row < rows; ++row) {
    QATFAST_UNROLL
    for (int v = 0; v < vectors; ++v) {
      total[row][v] = _mm256_loadu_si256(at(row, v));
    }
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m256i weights[vectors];
    QATFAST_UNROLL
    for (int v = 0; v < vectors; ++v) {
      weights[v] = bits_as<__m256i>(weight + (pair * pair_outputs + v * 8) * 2);
    }
    QATFAST_UNROLL
    for (int row = 0; row < rows; ++row) {
      const auto level = _mm256_set1_epi32(bits_as<int32_t>(levels + row * step + pair * 2));
      QATFAST_UNROLL
      for (int v = 0; v < vectors; ++v) {
        total[row][v] = _mm256_add_epi32(total[row][v], _mm256_madd_epi16(level, weights[v]));
      }
    }
  }
  QATFAST_UNROLL
  for (int row = 0; row < rows; ++row) {
    QATFAST_UNROLL
    for (int v = 0; v < vectors; ++v) {
      _mm256_storeu_si256(at(row, v), total[row][v]);
    }
  }
}

void pair_product_loop(const PairProducts& task, int32_t* sums, int64_t sums_step) {
  int64_t row = 0;
  for (; row + pair_rows <= task.rows; row += pair_rows) {
    add_pair_products<pair_rows>(
        task.levels + row * task.step, task.step, task.weight, task.pairs, sums + row * sums_step, sums_step);
  }
  for (; row < task.rows; ++row) {
    add_pair_products<1>(
        task.levels + row * task.step, task.step, task.weight, task.pairs, sums + row * sums_step, sums_step);
  }
}

} // namespace
} // namespace qatfast::cpu
