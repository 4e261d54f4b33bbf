// Matrix products by instructions for dot products of four uint8 and int8, whose sums are exact in 32 bits.

namespace qatfast::cpu {
namespace {

// GCC 12 copies the sums for its intrinsic, and runs out of registers.
QATFAST_INLINE void add_dot_products(__m512i& sums, __m512i values, __m512i weight) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(values), "v"(weight));
}

// Outputs whose sums stay in registers: `rows` rows of `vectors` vectors from `output` on, with the weights of a quad
// of features `step` bytes after those of the one before. Meanwhile memory is fetched, from `next` on.
template <int rows, int vectors>
inline void pointwise_outputs(const PointwiseDotProducts& task, const uint8_t* values, int64_t output,
    const int8_t* weight, int64_t step, float* y, const char* next, int64_t next_step) {
  constexpr int N = lanes<float>;
  const auto whole = task.features / 4 * 4, rest = task.features % 4;
  __m512i sums[rows][vectors];
  QATFAST_UNROLL
  for (int v = 0; v < vectors; ++v) {
    const auto offset = _mm512_loadu_si512(task.offset + output + v * N);
    QATFAST_UNROLL
    for (int row = 0; row < rows; ++row) {
      sums[row][v] = offset;
    }
  }
  const auto add = [&](int64_t k, auto quad_at) __attribute__((always_inline)) {
    __m512i weights[vectors];
    QATFAST_UNROLL
    for (int v = 0; v < vectors; ++v) {
      weights[v] = _mm512_loadu_si512(weight + k / 4 * step + v * N * 4);
    }
    QATFAST_UNROLL
    for (int row = 0; row < rows; ++row) {
      const auto quad = quad_at(values + row * task.features + k);
      QATFAST_UNROLL
      for (int v = 0; v < vectors; ++v) {
        add_dot_products(sums[row][v], quad, weights[v]);
      }
    }
  };
  if (rest > 0) {
    add(whole, [rest](const uint8_t* from) __attribute__((always_inline)) {
      return _mm512_broadcastd_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1 << rest) - 1), from));
    });
  }
  for (int64_t k = 0; k < whole; k += 4, next += next_step) {
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + 64, 0, 2);
    add(k, [](const uint8_t* from) __attribute__((always_inline)) {
      return _mm512_set1_epi32(bits_as<int32_t>(from));
    });
  }
  QATFAST_UNROLL
  for (int v = 0; v < vectors; ++v) {
    const auto j = output + v * N, left = task.outputs - j;
    const auto used = static_cast<__mmask16>(left < N ? (1 << left) - 1 : 0xFFFF);
    const auto scale = load<float, float>(task.scale + j);
    QATFAST_UNROLL
    for (int row = 0; row < rows; ++row) {
      const auto sum = __builtin_convertvector((bits_as<Vec<int32_t, N>>(&sums[row][v])), V<float>);
      const auto result = task.bias
          ? int8_output(sum, scale, load<float, float>(task.bias + j))
          : requantized(sum, scale, V<float>{} + task.low, V<float>{} + task.high, V<float>{} + task.y_scale);
      if (task.bypasses_cache) {
        _mm512_stream_ps(y + row * task.outputs + j, bits_as<__m512>(&result));
      } else {
        _mm512_mask_storeu_ps(y + row * task.outputs + j, used, bits_as<__m512>(&result));
      }
    }
  }
}

template <int vectors>
inline void pointwise_columns(
    const PointwiseDotProducts& task, const PointwiseTile& tile, int64_t output, const int8_t* weight, int64_t step) {
  const bool fetches = tile.next && output == tile.first;
  const auto run = [&](auto rows, int64_t row) __attribute__((always_inline)) {
    const auto* const values = tile.values + row * task.features;
    const auto* const next =
        fetches ? tile.next + row * task.features * tile.next_size : reinterpret_cast<const char*>(values);
    pointwise_outputs<rows, vectors>(
        task, values, output, weight, step, tile.y + row * task.outputs, next, fetches ? 4 * rows * tile.next_size : 0);
  };
  constexpr std::integral_constant<int, pointwise_tile_rows> many;
  int64_t row = 0;
  for (; row + many <= tile.rows; row += many) {
    run(many, row);
  }
  for (; row < tile.rows; ++row) {
    run(std::integral_constant<int, 1>{}, row);
  }
}

void pointwise_dot_product_loop(const PointwiseDotProducts& task, const PointwiseTile& tile) {
  constexpr int N = lanes<float>, vectors = pointwise_strip / N;
  const auto quads = (task.features + 3) / 4;
  for (auto first = tile.first; first < tile.end; first += pointwise_strip) {
    const auto width = smaller(pointwise_strip, (task.outputs - first + N - 1) / N * N);
    const auto* const weight = task.weight + first * quads * 4;
    if (width == pointwise_strip) {
      pointwise_columns<vectors>(task, tile, first, weight, width * 4);
      continue;
    }
    for (int64_t j = 0; j < width; j += N) {
      pointwise_columns<1>(task, tile, first + j, weight + j * 4, width * 4);
    }
  }
  if (task.bypasses_cache) {
    _mm_sfence(); // other threads may read the outputs next
  }
}

} // namespace
} // namespace qatfast::cpu
