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
    const auto put = [&](int64_t column, int64_t v, __m512i values) {
      __m512i* const place = to + column * vectors_ + v;
      const auto next = column + dilation[1] < columns_ ? place[step] : _mm512_setzero_si512();
      *place = _mm512_or_si512(values, _mm512_slli_epi32(next, 8));
    };
    const auto pad = [&](int64_t begin, int64_t end) {
      for (auto column = end; column-- > begin;) {
        for (int64_t v = 0; v < vectors_; ++v) {
          put(column, v, _mm512_set1_epi32(task_.zero_point));
        }
      }
    };
    const auto last = static_cast<__mmask16>(0xFFFF >> (vectors_ * depthwise_vector - block_.count));
    const uint8_t* const from = task_.values + (block_.sample * size[0] + row) * size[1] * channels + block_.first;
    pad(padding[1] + size[1], columns_);
    for (auto column = size[1]; column-- > 0;) {
      const uint8_t* values = from + column * channels;
      for (int64_t v = 0; v < vectors_; ++v, values += depthwise_vector) {
        const __mmask16 used = v + 1 < vectors_ ? 0xFFFF : last;
        put(padding[1] + column, v, _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(used, values)));
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

// `count` outputs from `first` on, of a vector of channels. quads[t][i * step] are the values of output i.
template <int count>
QATFAST_INLINE void depthwise_dot_products(const DepthwiseDotProducts& task, const __m512i* const* quads, int64_t n,
    int64_t first, int64_t step, int64_t channel, float* y, __mmask16 used) {
  const auto& geometry = task.geometry;
  const auto stride = (geometry.channels + depthwise_vector - 1) / depthwise_vector * depthwise_vector * 4;
  const int8_t* weight = task.weight + channel * 4;
  __m512i sums[count];
  for (int k = 0; k < count; ++k) {
    sums[k] = _mm512_loadu_si512(task.offset + channel);
  }
  for (int64_t t = 0; t < n; ++t, weight += stride) {
    const auto of_quad = _mm512_loadu_si512(weight);
    for (int k = 0; k < count; ++k) {
      sums[k] = _mm512_dpbusd_epi32(sums[k], quads[t][(first + k) * step], of_quad);
    }
  }
  const auto scale = load<float, float>(task.scale + channel), bias = load<float, float>(task.bias + channel);
  for (int k = 0; k < count; ++k) {
    const auto sum = _mm512_cvtepi32_ps(sums[k]);
    const auto output = int8_output(bits_as<V<float>>(&sum), scale, bias);
    _mm512_mask_storeu_ps(y + (first + k) * geometry.channels, used, bits_as<__m512>(&output));
  }
}

void depthwise_dot_product_loop(const DepthwiseDotProducts& task, const ChannelBlock& block, int32_t* scratch) {
  const auto& [channels, size, output_size, kernel, stride, padding, dilation] = task.geometry;
  QuadRows rows(task, block, scratch);
  const auto vectors = rows.vectors(), of_row = (kernel[1] + 3) / 4, n = kernel[0] * of_row;
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
      int64_t i = 0;
      for (; i + 4 <= output_size[1]; i += 4) {
        depthwise_dot_products<4>(task, quads, n, i, stride[1] * vectors, block.first + channel, y + channel, used);
      }
      for (; i < output_size[1]; ++i) {
        depthwise_dot_products<1>(task, quads, n, i, stride[1] * vectors, block.first + channel, y + channel, used);
      }
      for (int64_t t = 0; t < n; ++t) {
        ++quads[t];
      }
    }
  }
}

} // namespace
} // namespace qatfast::cpu
