// Depthwise convolutions by instructions for dot products of four uint8 and int8, whose sums are exact in 32 bits.

#ifdef __clang__
#define QATFAST_UNROLL _Pragma("unroll")
#else
#define QATFAST_UNROLL _Pragma("GCC unroll 8")
#endif

namespace qatfast::cpu {
namespace {

// GCC 12 copies the sums for its intrinsic, and runs out of registers.
QATFAST_INLINE void add_dot_products(__m512i& sums, __m512i values, __m512i weight) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(values), "v"(weight));
}

// Stores the low byte of each of n integers as a byte of the quads from `i` on.
QATFAST_INLINE void put_bytes(QuadRow row, int64_t i, __m512i integers, int64_t n) {
  const auto others = _mm512_set1_epi32(static_cast<int>(~(0xFFU << (8 * row.byte))));
  const auto bytes = _mm512_sll_epi32(integers, _mm_cvtsi32_si128(8 * row.byte));
  const auto used = static_cast<__mmask16>(0xFFFFU >> (depthwise_vector - n));
  constexpr int select = 0xCA; // others ? quads : bytes
  const auto quads = _mm512_maskz_loadu_epi32(used, row.quads + i);
  _mm512_mask_storeu_epi32(row.quads + i, used, _mm512_ternarylogic_epi32(others, quads, bytes, select));
}

// Returns whether there is no NaN.
bool quantize_quads_loop(const float* x, int64_t n, const Grids<float>& grid, QuadRow quads) {
  constexpr int64_t N = depthwise_vector;
  Vec<int32_t, N> signs = {}; // of integers, which NaN alone makes negative
  with_tile<GridKinds::static_range>(grid, 0, 1, [&](auto tile) {
    const auto row = tile.row(0);
    const auto zero_point = __builtin_convertvector(row.zero_point, Vec<int32_t, N>);
    for (int64_t i = 0; i < n; i += N) {
      const auto m = smaller(n - i, N);
      const auto integers = quantize(load_first<float, float>(x + i, m), zero_point, row.grid);
      signs |= integers;
      put_bytes(quads, i, bits_as<__m512i>(&integers), m);
    }
  });
  return _mm512_movepi32_mask(bits_as<__m512i>(&signs)) == 0;
}

bool quantize_quads_range_loop(const float* x, uint8_t* to, uint8_t* mask, int64_t n, const Grids<float>& grid,
    float* lo, float* hi, QuadRow quads) {
  return map_and_range(x, to, mask, n, grid, lo, hi,
      [&](V<float> v, const auto& row, int64_t i, int64_t m) __attribute__((always_inline)) {
        const auto integers = quantize(v, __builtin_convertvector(row.zero_point, Vec<int32_t, 16>), row.grid);
        put_bytes(quads, i, bits_as<__m512i>(&integers), m);
        return integers;
      });
}

void put_quads_loop(const uint8_t* values, int64_t n, QuadRow quads) {
  for (int64_t i = 0; i < n; i += depthwise_vector) {
    const auto m = smaller(n - i, depthwise_vector);
    const auto bytes = first_of<uint8_t, 16>(values + i, m);
    put_bytes(quads, i, _mm512_cvtepu8_epi32(bits_as<__m128i>(&bytes)), m);
  }
}

// The weight for a first row that is number `first` of the ring.
inline void rotate_weight(const DepthwiseDotProducts& task, int64_t first, uint32_t* to) {
  const auto planes = task.planes(), size = task.weight_size() / planes;
  const auto moved = first / 4 % planes;
  const auto up = _mm_cvtsi64_si128(first % 4 * 8), down = _mm_cvtsi64_si128(32 - first % 4 * 8);
  for (int64_t plane = 0; plane < planes; ++plane, to += size) {
    const auto* const high = task.weight + (plane - moved + planes) % planes * size;
    const auto* const low = task.weight + (plane - moved + 2 * planes - 1) % planes * size;
    for (int64_t i = 0; i < size; i += depthwise_vector) {
      const auto shifted = _mm512_sll_epi32(_mm512_loadu_si512(high + i), up);
      _mm512_storeu_si512(to + i, _mm512_or_si512(shifted, _mm512_srl_epi32(_mm512_loadu_si512(low + i), down)));
    }
  }
}

// Where a row of outputs finds its quads and weights. Copies of numbers and pointers stay in registers: for the
// compiler, a store of a vector may change all memory.
struct DepthwiseTaps {
  int64_t planes;
  int64_t plane_size;
  int64_t width;
  int64_t tap_step;
  int64_t output_step;
  int64_t weight_step;
};

// Neighbouring outputs of a vector of channels, from the quads of the first tap of the first output.
template <int count>
QATFAST_INLINE void depthwise_outputs(DepthwiseTaps taps, const uint32_t* quads, const uint32_t* weight, __m512i offset,
    __m512 scale, __m512 bias, float* y, int64_t channels, __mmask16 used) {
  __m512i sums[count];
  QATFAST_UNROLL
  for (int k = 0; k < count; ++k) {
    sums[k] = offset;
  }
  for (int64_t plane = 0; plane < taps.planes; ++plane) {
    const auto* tap = quads + plane * taps.plane_size;
    QATFAST_UNROLL
    for (int64_t j = 0; j < taps.width; ++j, tap += taps.tap_step, weight += taps.weight_step) {
      const auto weights = _mm512_loadu_si512(weight);
      QATFAST_UNROLL
      for (int k = 0; k < count; ++k) {
        add_dot_products(sums[k], _mm512_loadu_si512(tap + k * taps.output_step), weights);
      }
    }
  }
  QATFAST_UNROLL
  for (int k = 0; k < count; ++k) {
    const auto rounded = _mm512_cvtepi32_ps(sums[k]);
    const auto outputs = int8_output(bits_as<V<float>>(&rounded), bits_as<V<float>>(&scale), bits_as<V<float>>(&bias));
    _mm512_mask_storeu_ps(y + k * channels, used, bits_as<__m512>(&outputs));
  }
}

void depthwise_dot_product_loop(const DepthwiseDotProducts& task, const uint32_t* quads, int64_t plane_size,
    int64_t first, uint32_t* weight, float* y) {
  rotate_weight(task, first, weight);
  const auto channels = task.geometry.channels, count = task.geometry.output_size[1];
  const DepthwiseTaps taps = {task.planes(), plane_size, task.geometry.kernel[1], task.geometry.dilation[1] * channels,
      task.geometry.stride[1] * channels, task.padded_channels()};
  const auto* const offset = task.offset;
  const auto *const scale = task.scale, *const bias = task.bias;
  constexpr int tile = 4;
  const auto outputs_from = [&](auto n, DepthwiseTaps of, int64_t i) __attribute__((always_inline)) {
    for (int64_t c = 0; c < channels; c += depthwise_vector) {
      const auto used = static_cast<__mmask16>(0xFFFFU >> (depthwise_vector - smaller(channels - c, depthwise_vector)));
      depthwise_outputs<n>(of, quads + i * of.output_step + c, weight + c, _mm512_loadu_si512(offset + c),
          _mm512_loadu_ps(scale + c), _mm512_loadu_ps(bias + c), y + i * channels + c, channels, used);
    }
  };
  const auto row_of = [&](DepthwiseTaps of) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + tile <= count; i += tile) {
      outputs_from(std::integral_constant<int, tile>{}, of, i);
    }
    for (; i < count; ++i) {
      outputs_from(std::integral_constant<int, 1>{}, of, i);
    }
  };
  auto common = taps; // with its numbers known, the loops over taps are unrolled
  common.planes = 1;
  common.width = 3;
  taps.planes == 1 && taps.width == 3 ? row_of(common) : row_of(taps);
}

} // namespace
} // namespace qatfast::cpu
