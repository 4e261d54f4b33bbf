// Depthwise convolutions by instructions for dot products of four uint8 and int8, whose sums are exact in 32 bits.

namespace qatfast::cpu {
namespace {

// Copies a row of columns of `channels` values in the order that QuadRows takes, each column with zeros after it up
// to a multiple of depthwise_group_size.
void pack_row_loop(const uint8_t* values, int64_t columns, int64_t channels, uint8_t* to) {
  const auto order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto whole = channels / depthwise_group_size, rest = channels % depthwise_group_size;
  const auto last = ~uint64_t{0} >> (depthwise_group_size - rest) % 64;
  const auto put = [&](__m512i loaded) {
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, loaded));
    to += depthwise_group_size;
  };
  for (int64_t column = 0; column < columns; ++column, values += channels) {
    for (int64_t group = 0; group < whole; ++group) {
      put(_mm512_loadu_si512(values + group * depthwise_group_size));
    }
    if (rest > 0) {
      put(_mm512_maskz_loadu_epi8(last, values + whole * depthwise_group_size));
    }
  }
}

// What follows uses copies of pointers, which stay in registers: for the compiler, a store of a vector may change all
// memory.

// Four rows of values, of the group that begins at `offset` of a column: those of the kernel from `first` on. One
// beyond them, whose weights are 0, is any row.
class QuadRows {
 public:
  QATFAST_MEMBER QuadRows(const uint8_t* const* rows, int64_t first, int64_t height, int64_t offset)
      : a_(rows[first] + offset),
        b_(rows[smaller(first + 1, height - 1)] + offset),
        c_(rows[smaller(first + 2, height - 1)] + offset),
        d_(rows[smaller(first + 3, height - 1)] + offset) {}

  // Stores the four values of each channel of the column that begins at element `at` of a row.
  template <int vectors, int rows = 4>
  QATFAST_MEMBER void quads(int64_t at, __m512i* to) const {
    const auto a = _mm512_loadu_si512(a_ + at), b = _mm512_loadu_si512(b_ + at);
    const auto c = _mm512_loadu_si512(c_ + at), d = rows == 3 ? c : _mm512_loadu_si512(d_ + at);
    const auto low = _mm512_unpacklo_epi8(a, b), next_low = _mm512_unpacklo_epi8(c, d);
    const auto high = _mm512_unpackhi_epi8(a, b), next_high = _mm512_unpackhi_epi8(c, d);
    const __m512i all[4] = {_mm512_unpacklo_epi16(low, next_low), _mm512_unpackhi_epi16(low, next_low),
        _mm512_unpacklo_epi16(high, next_high), _mm512_unpackhi_epi16(high, next_high)};
    for (int v = 0; v < vectors; ++v) {
      to[v] = all[v];
    }
  }

 private:
  const uint8_t *const a_, *const b_, *const c_, *const d_;
};

// The outputs of `vectors` vectors of channels from their sums.
template <int vectors>
class DepthwiseOutputs {
 public:
  QATFAST_MEMBER DepthwiseOutputs(const DepthwiseDotProducts& task, int64_t channel, float* y)
      : offset_(task.offset + channel), scale_(task.scale + channel), bias_(task.bias + channel), y_(y + channel) {
    const auto left = task.geometry.channels - channel - (vectors - 1) * depthwise_vector;
    last_ = static_cast<__mmask16>(left < depthwise_vector ? (1 << left) - 1 : 0xFFFF);
  }

  QATFAST_MEMBER __m512i offset(int v) const {
    return _mm512_loadu_si512(offset_ + v * depthwise_vector);
  }
  // `output`: the element at which the output begins.
  QATFAST_MEMBER void store(int64_t output, int v, __m512i sum) const {
    const auto at = v * depthwise_vector;
    const auto rounded = _mm512_cvtepi32_ps(sum);
    const auto y =
        int8_output(bits_as<V<float>>(&rounded), load<float, float>(scale_ + at), load<float, float>(bias_ + at));
    if (v < vectors - 1) {
      _mm512_storeu_ps(y_ + output + at, bits_as<__m512>(&y));
    } else {
      _mm512_mask_storeu_ps(y_ + output + at, last_, bits_as<__m512>(&y));
    }
  }

 private:
  const int32_t* const offset_;
  const float *const scale_, *const bias_;
  float* const y_;
  __mmask16 last_;
};

// The weights of a vector of channels.
class QuadWeights {
 public:
  QATFAST_MEMBER QuadWeights(const DepthwiseDotProducts& task, int64_t channel)
      : weight_(task.weight + channel * 4),
        step_((task.geometry.channels + depthwise_vector - 1) / depthwise_vector * depthwise_vector * 4) {}

  QATFAST_MEMBER __m512i operator()(int64_t tap, int64_t v = 0) const {
    return _mm512_loadu_si512(weight_ + tap * step_ + v * depthwise_vector * 4);
  }

 private:
  const int8_t* const weight_;
  const int64_t step_;
};

// Outputs that share columns, in a row and a group of channels, of a kernel of up to 3 x 3. Columns that two of them
// read stay in registers. `tap` and `step` lead to the next tap and output.
template <int vectors, int stride>
__attribute__((noinline)) void three_columns(const QuadRows rows, const QuadWeights weights,
    const DepthwiseOutputs<vectors> outputs, int64_t tap, int64_t step, int64_t count) {
  constexpr int width = 3;
  __m512i weight[width][vectors], quads[width][vectors];
  for (int j = 0; j < width; ++j) {
    for (int v = 0; v < vectors; ++v) {
      weight[j][v] = weights(j, v);
    }
  }
  for (int j = 0; j < width - stride; ++j) {
    rows.quads<vectors, 3>(j * tap, quads[j]);
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int j = width - stride; j < width; ++j) {
      rows.quads<vectors, 3>((i * stride + j) * tap, quads[j]);
    }
    for (int v = 0; v < vectors; ++v) {
      auto sum = outputs.offset(v);
      for (int j = 0; j < width; ++j) {
        sum = _mm512_dpbusd_epi32(sum, quads[j][v], weight[j][v]);
      }
      outputs.store(i * step, v, sum);
    }
    for (int j = 0; j < width - stride; ++j) {
      for (int v = 0; v < vectors; ++v) {
        quads[j][v] = quads[j + stride][v];
      }
    }
  }
}

template <int vectors, int stride>
QATFAST_INLINE void row_of_three_columns(
    const DepthwiseDotProducts& task, const uint8_t* const* rows, int64_t column_size, int64_t first, float* y) {
  const auto channels = task.geometry.channels, count = task.geometry.output_size[1],
             dilation = task.geometry.dilation[1];
  for (int64_t begin = 0; begin < smaller(dilation, count); ++begin) { // outputs a dilation apart share columns
    three_columns<vectors, stride>(QuadRows(rows, 0, task.geometry.kernel[0], begin * column_size + first),
        QuadWeights(task, first), DepthwiseOutputs<vectors>(task, first, y + begin * channels), dilation * column_size,
        dilation * channels, (count - begin + dilation - 1) / dilation);
  }
}

// Adjacent outputs of a vector of channels: quads + t * step are the values of the first for tap t.
template <int count>
QATFAST_INLINE void outputs_of_quads(const DepthwiseDotProducts& task, const __m512i* quads, int64_t step,
    int64_t columns, int64_t channel, int64_t i, float* y) {
  const DepthwiseOutputs<1> outputs(task, channel, y);
  const QuadWeights weights(task, channel);
  const auto height = task.quads(), width = task.geometry.kernel[1];
  const auto tap_step = task.geometry.dilation[1] * step, output_step = task.geometry.stride[1] * step;
  __m512i sums[count];
  for (int k = 0; k < count; ++k) {
    sums[k] = outputs.offset(0);
  }
  for (int64_t quad = 0; quad < height; ++quad) {
    for (int64_t j = 0; j < width; ++j) {
      const auto weight = weights(quad * width + j);
      const auto* at = quads + quad * columns * step + j * tap_step;
      for (int k = 0; k < count; ++k) {
        sums[k] = _mm512_dpbusd_epi32(sums[k], at[k * output_step], weight);
      }
    }
  }
  for (int k = 0; k < count; ++k) {
    outputs.store((i + k) * task.geometry.channels, 0, sums[k]);
  }
}

// The same for any kernel: what depthwise_tile outputs read is made first.
template <int vectors>
QATFAST_INLINE void any_columns(const DepthwiseDotProducts& task, const uint8_t* const* rows, int64_t column_size,
    int64_t first, float* y, __m512i* scratch) {
  const auto& [channels, size, output_size, kernel, stride, padding, dilation] = task.geometry;
  for (int64_t begin = 0; begin < output_size[1]; begin += depthwise_tile) {
    const auto count = smaller(depthwise_tile, output_size[1] - begin), columns = task.columns(count);
    for (int64_t quad = 0; quad < task.quads(); ++quad) {
      const QuadRows quad_rows(rows, quad * 4, kernel[0], begin * stride[1] * column_size + first);
      auto* const to = scratch + quad * columns * vectors;
      for (int64_t column = 0; column < columns; ++column) {
        quad_rows.quads<vectors>(column * column_size, to + column * vectors);
      }
    }
    for (int v = 0; v < vectors; ++v) {
      const auto channel = first + v * depthwise_vector;
      const auto* const quads = scratch + v;
      int64_t i = 0;
      for (; i + 4 <= count; i += 4) {
        outputs_of_quads<4>(task, quads + i * stride[1] * vectors, vectors, columns, channel, begin + i, y);
      }
      for (; i < count; ++i) {
        outputs_of_quads<1>(task, quads + i * stride[1] * vectors, vectors, columns, channel, begin + i, y);
      }
    }
  }
}

template <int vectors>
void depthwise_group(const DepthwiseDotProducts& task, const uint8_t* const* rows, int64_t column_size, int64_t first,
    float* y, __m512i* scratch) {
  const auto& [channels, size, output_size, kernel, stride, padding, dilation] = task.geometry;
  const bool is_small = kernel[0] <= 3 && kernel[1] == 3;
  if (is_small && stride[1] == 1) {
    row_of_three_columns<vectors, 1>(task, rows, column_size, first, y);
  } else if (is_small && stride[1] == 2 && dilation[1] == 1) {
    row_of_three_columns<vectors, 2>(task, rows, column_size, first, y);
  } else {
    any_columns<vectors>(task, rows, column_size, first, y, scratch);
  }
}

void depthwise_dot_product_loop(
    const DepthwiseDotProducts& task, const uint8_t* const* rows, float* y, int32_t* scratch) {
  const auto channels = task.geometry.channels;
  const auto column_size = (channels + depthwise_group_size - 1) / depthwise_group_size * depthwise_group_size;
  for (int64_t first = 0; first < channels; first += depthwise_group_size) {
    const auto vectors = (smaller(channels - first, depthwise_group_size) + depthwise_vector - 1) / depthwise_vector;
    const auto loop = vectors == 1 ? depthwise_group<1>
        : vectors == 2             ? depthwise_group<2>
        : vectors == 3             ? depthwise_group<3>
                                   : depthwise_group<4>;
    loop(task, rows, column_size, first, y, reinterpret_cast<__m512i*>(scratch));
  }
}

} // namespace
} // namespace qatfast::cpu
