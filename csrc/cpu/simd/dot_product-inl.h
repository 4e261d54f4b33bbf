// Convolutions by instructions for dot products of four uint8 and int8, whose sums are exact in 32 bits.

namespace qatfast::cpu {
namespace {

// Rows of a block of channels, of which each column has, per channel, the value and the three that a kernel reads after
// it.
class QuadRows {
 public:
  QuadRows(const DepthwiseDotProducts& task, const ChannelBlock& block, int32_t* scratch)
      : task_(task),
        block_(block),
        vectors_((block.count + depthwise_vector - 1) / depthwise_vector),
        columns_(task.geometry.size[1] + 2 * task.geometry.padding[1]),
        span_(task.geometry.span()),
        rows_(reinterpret_cast<__m512i*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64)) {
    const auto of_padding = _mm512_set1_epi8(static_cast<char>(task.zero_point));
    for (int64_t i = 0; i < columns_ * vectors_; ++i) {
      rows_[span_ * columns_ * vectors_ + i] = of_padding;
    }
  }

  int64_t vectors() const {
    return vectors_;
  }

  // The first column, which may be padding, of a row of the image or beyond it. Rows are asked for in ascending order.
  const __m512i* row(int64_t row) {
    const auto& size = task_.geometry.size;
    if (row < 0 || row >= size[0]) {
      return at(span_);
    }
    for (ready_ = larger(ready_, row - span_ + 1); ready_ <= row; ++ready_) {
      fill(ready_, at(ready_ % span_));
    }
    return at(row % span_);
  }

 private:
  __m512i* at(int64_t slot) const {
    return rows_ + slot * columns_ * vectors_;
  }

  void fill(int64_t row, __m512i* to) const {
    const auto& [channels, size, output_size, kernel, stride, padding, dilation] = task_.geometry;
    const auto step = dilation[1] * vectors_;
    const auto* const end =
        to + larger(columns_ - dilation[1], 0) * vectors_; // columns from here on have none after them
    const auto put = [&](__m512i* place, __m512i values) __attribute__((always_inline)) {
      const auto next = place < end ? place[step] : _mm512_setzero_si512();
      *place = _mm512_or_si512(values, _mm512_slli_epi32(next, 8));
    };
    const auto pad = [&](int64_t begin, int64_t until) {
      for (auto i = until * vectors_; i-- > begin * vectors_;) {
        put(to + i, _mm512_set1_epi32(task_.zero_point));
      }
    };
    const auto whole = block_.count / depthwise_vector, rest = block_.count % depthwise_vector;
    const auto last = static_cast<__mmask16>((1 << rest) - 1);
    const uint8_t* values =
        task_.values + ((block_.sample * size[0] + row) * size[1] + size[1] - 1) * channels + block_.first;
    pad(padding[1] + size[1], columns_);
    auto* place = to + (padding[1] + size[1] - 1) * vectors_;
    for (auto column = size[1]; column-- > 0; values -= channels, place -= vectors_) {
      for (int64_t v = 0; v < whole; ++v) {
        put(place + v, _mm512_cvtepu8_epi32(bits_as<__m128i>(values + v * depthwise_vector)));
      }
      if (rest > 0) {
        put(place + whole, _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(last, values + whole * depthwise_vector)));
      }
    }
    pad(0, padding[1]);
  }

  const DepthwiseDotProducts& task_;
  const ChannelBlock& block_;
  const int64_t vectors_, columns_, span_;
  __m512i* const rows_;
  int64_t ready_ = 0;
};

// A vector of channels of a row: its n weights of four taps each and what follows from a sum. `fixed` is n if it is
// known at compile time, so that the weights stay in registers, else 0.
template <int fixed>
class DotProductColumn {
 public:
  DotProductColumn(const DepthwiseDotProducts& task, int64_t n, int64_t channel, __mmask16 used)
      : n_(n),
        channels_(task.geometry.channels),
        stride_((channels_ + depthwise_vector - 1) / depthwise_vector * depthwise_vector * 4),
        weight_(task.weight + channel * 4),
        offset_(_mm512_loadu_si512(task.offset + channel)),
        scale_(load<float, float>(task.scale + channel)),
        bias_(load<float, float>(task.bias + channel)),
        used_(used) {
    for (int64_t t = 0; t < fixed; ++t) {
      held_[t] = _mm512_loadu_si512(weight_ + t * stride_);
    }
  }

  // Stores `count` outputs. quads[t] + at + k * step are the values of output k.
  template <int count>
  QATFAST_MEMBER void store_outputs(const __m512i* const* quads, int64_t at, int64_t step, float* y) const {
    __m512i sums[count];
    for (int k = 0; k < count; ++k) {
      sums[k] = offset_;
    }
    const auto add = [&](int64_t t, __m512i weight) __attribute__((always_inline)) {
      const __m512i* const values = quads[t] + at;
      for (int k = 0; k < count; ++k) {
        sums[k] = _mm512_dpbusd_epi32(sums[k], values[k * step], weight);
      }
    };
    if constexpr (fixed > 0) {
      for (int t = 0; t < fixed; ++t) {
        add(t, held_[t]);
      }
    } else {
      for (int64_t t = 0; t < n_; ++t) {
        add(t, _mm512_loadu_si512(weight_ + t * stride_));
      }
    }
    for (int k = 0; k < count; ++k) {
      const auto sum = _mm512_cvtepi32_ps(sums[k]);
      const auto output = int8_output(bits_as<V<float>>(&sum), scale_, bias_);
      _mm512_mask_storeu_ps(y + k * channels_, used_, bits_as<__m512>(&output));
    }
  }

 private:
  const int64_t n_, channels_, stride_;
  const int8_t* const weight_;
  const __m512i offset_;
  const V<float> scale_, bias_;
  const __mmask16 used_;
  __m512i held_[fixed > 0 ? fixed : 1];
};

// A row of outputs of a vector of channels.
template <int fixed>
inline void depthwise_dot_product_row(const DepthwiseDotProducts& task, const __m512i* const* given, int64_t n,
    int64_t step, int64_t channel, float* y, __mmask16 used) {
  const DotProductColumn<fixed> column(task, n, channel, used);
  const __m512i* held[fixed > 0 ? fixed : 1];
  for (int t = 0; t < fixed; ++t) {
    held[t] = given[t];
  }
  const __m512i* const* const quads = fixed > 0 ? held : given;
  const auto channels = task.geometry.channels, outputs = task.geometry.output_size[1];
  int64_t i = 0;
  for (; i + 4 <= outputs; i += 4) {
    column.template store_outputs<4>(quads, i * step, step, y + i * channels);
  }
  for (; i < outputs; ++i) {
    column.template store_outputs<1>(quads, i * step, step, y + i * channels);
  }
}

void depthwise_dot_product_loop(const DepthwiseDotProducts& task, const ChannelBlock& block, int32_t* scratch) {
  const auto& [channels, size, output_size, kernel, stride, padding, dilation] = task.geometry;
  QuadRows rows(task, block, scratch);
  const auto vectors = rows.vectors(), of_row = (kernel[1] + 3) / 4, n = kernel[0] * of_row;
  const auto row_of_outputs = n == 3 ? depthwise_dot_product_row<3> : depthwise_dot_product_row<0>;
  const __m512i* quads[most_depthwise_taps];
  for (int64_t row = 0; row < output_size[0]; ++row) {
    for (int64_t i = 0; i < kernel[0]; ++i) {
      const auto* const values = rows.row(row * stride[0] + i * dilation[0] - padding[0]);
      for (int64_t quad = 0; quad < of_row; ++quad) {
        quads[i * of_row + quad] = values + quad * 4 * dilation[1] * vectors;
      }
    }
    float* const y = task.y + (block.sample * output_size[0] + row) * output_size[1] * channels + block.first;
    for (int64_t v = 0; v < vectors; ++v) {
      const auto channel = v * depthwise_vector, left = block.count - channel;
      const auto used = static_cast<__mmask16>(left < depthwise_vector ? (1 << left) - 1 : 0xFFFF);
      row_of_outputs(task, quads, n, stride[1] * vectors, block.first + channel, y + channel, used);
      for (int64_t t = 0; t < n; ++t) {
        ++quads[t];
      }
    }
  }
}

} // namespace
} // namespace qatfast::cpu
