// Depthwise convolutions: outputs in floats, and the gradients.

namespace qatfast::cpu {
namespace {

// a * b + c, rounded once if the instruction set has such an operation.
QATFAST_INLINE V<float> multiply_add(V<float> a, V<float> b, V<float> c) {
#if QATFAST_VECTOR_BYTES >= 32
  return fused_multiply_add(a, b, c);
#else
  return a * b + c;
#endif
}

// Outputs i to i + count - 1 of m channels: a weight is loaded once for all of them.
template <int count>
QATFAST_INLINE void depthwise_outputs(const DepthwiseRow& row, int64_t i, int64_t c, int64_t m) {
  V<float> sums[count] = {}; // of integers below 2^24, so that no operation rounds
  for (int64_t t = 0; t < row.taps; ++t) {
    const auto weight = load_first<float, float>(row.weight + t * row.channels + c, m);
    const float* levels = row.tap[t] + i * row.step + c;
    for (int k = 0; k < count; ++k, levels += row.step) {
      sums[k] = multiply_add(load_first<float, float>(levels, m), weight, sums[k]);
    }
  }
  const auto scale = load_first<float, float>(row.scale + c, m), bias = load_first<float, float>(row.bias + c, m);
  for (int k = 0; k < count; ++k) {
    store_first<float, float, Result::any>(row.y + (i + k) * row.channels + c, int8_output(sums[k], scale, bias), m);
  }
}

inline void depthwise_loop(const DepthwiseRow& row) {
  constexpr int64_t count = 4;
  const auto channels_of = [&](auto outputs, int64_t i) __attribute__((always_inline)) {
    constexpr int together = outputs;
    for_each_vector<float>(row.channels, [&](int64_t c, int64_t m) __attribute__((always_inline)) {
      depthwise_outputs<together>(row, i, c, m);
    });
  };
  int64_t i = 0;
  for (; i + count <= row.outputs; i += count) {
    channels_of(std::integral_constant<int, count>{}, i);
  }
  for (; i < row.outputs; ++i) {
    channels_of(std::integral_constant<int, 1>{}, i);
  }
}

// x_hat of a row of a strip, [width][count].
inline void depthwise_input_row(const DepthwiseGradients& task, const ChannelStrip& strip, int64_t row, float* to) {
  const auto& [channels, size, output_size, kernel, stride, padding, dilation] = task.geometry;
  const uint8_t* from = task.values + (strip.sample * size[0] + row) * size[1] * channels + strip.first;
  const auto zero_point = all_lanes(task.zero_point), scale = all_lanes(task.scale);
  for (int64_t column = 0; column < size[1]; ++column, from += channels, to += strip.count) {
    for_each_vector<float>(strip.count, [&](int64_t c, int64_t m) __attribute__((always_inline)) {
      const auto x_hat = dequantize(load_first<uint8_t, float>(from + c, m), zero_point, scale);
      store_first<float, float, Result::any>(to + c, x_hat, m);
    });
  }
}

// Adds grad[o] * x[o * step + tap * tap_step] over outputs [begin, end) to to[tap * channels], for `count` taps.
template <int count>
QATFAST_INLINE void add_products(const float* grad, const float* x, int64_t begin, int64_t end, int64_t channels,
    int64_t step, int64_t tap_step, float* to, int64_t m) {
  V<float> sums[count];
  for (int tap = 0; tap < count; ++tap) {
    sums[tap] = load_first<float, float>(to + tap * channels, m);
  }
  for (auto o = begin; o < end; ++o) {
    const auto dy = load_first<float, float>(grad + o * channels, m);
    for (int tap = 0; tap < count; ++tap) {
      sums[tap] = multiply_add(dy, load_first<float, float>(x + o * step + tap * tap_step, m), sums[tap]);
    }
  }
  for (int tap = 0; tap < count; ++tap) {
    store_first<float, float, Result::any>(to + tap * channels, sums[tap], m);
  }
}

// Rounds the quotient up, also that of a negative value, which at::ceil_div does not.
inline int64_t quotient_rounded_up(int64_t value, int64_t divisor) {
  return value > 0 ? (value + divisor - 1) / divisor : -(-value / divisor);
}

// Adds the products of a row of gradients with the row of x_hat that kernel row `i` reads, to the weight's gradient.
template <int count>
inline void depthwise_weight_gradients(const DepthwiseGradients& task, const ChannelStrip& strip, const float* grad,
    const float* x, int64_t i, int64_t j, float* grad_weight) {
  const auto& [channels, size, output_size, kernel, stride, padding, dilation] = task.geometry;
  const auto step = stride[1] * strip.count, tap_step = dilation[1] * strip.count;
  int64_t begin[count], end[count]; // of the outputs for which a tap lies within the row
  for (int tap = 0; tap < count; ++tap) {
    const auto first = (j + tap) * dilation[1] - padding[1];
    begin[tap] = smaller(larger(quotient_rounded_up(-first, stride[1]), 0), output_size[1]);
    end[tap] = smaller(larger(quotient_rounded_up(size[1] - first, stride[1]), begin[tap]), output_size[1]);
  }
  const auto inner_begin = begin[0], inner_end = larger(begin[0], end[count - 1]); // later taps begin and end earlier
  x += (j * dilation[1] - padding[1]) * strip.count;
  for_each_vector<float>(strip.count, [&](int64_t c, int64_t m) __attribute__((always_inline)) {
    float* to = grad_weight + (i * kernel[1] + j) * channels + strip.first + c;
    const auto edges = [&](auto ends) __attribute__((always_inline)) {
      for (int tap = 0; tap < count; ++tap) {
        const auto [from, until] = ends(tap);
        add_products<1>(grad + c, x + c + tap * tap_step, from, until, channels, step, 0, to + tap * channels, m);
      }
    };
    edges([&](int tap) {
      return std::pair(begin[tap], smaller(inner_begin, end[tap]));
    });
    add_products<count>(grad + c, x + c, inner_begin, inner_end, channels, step, tap_step, to, m);
    edges([&](int tap) {
      return std::pair(larger(inner_end, begin[tap]), end[tap]);
    });
  });
}

// Products of the gradients grad[k * channels] with one weight per channel, k in [begin, end).
struct GradientTap {
  const float* grad;
  const float* weight;
  int64_t begin;
  int64_t end;
};

// to[k * to_step] = the sum of the taps' products, for `count` values of k from `first` on.
template <int count>
QATFAST_INLINE void gather_products(
    const GradientTap* taps, int64_t n, int64_t first, int64_t channels, int64_t width, float* to, int64_t to_step) {
  for_each_vector<float>(width, [&](int64_t c, int64_t m) __attribute__((always_inline)) {
    V<float> sums[count] = {};
    for (int64_t t = 0; t < n; ++t) {
      const auto weight = load_first<float, float>(taps[t].weight + c, m);
      const float* grad = taps[t].grad + first * channels + c;
      for (int k = 0; k < count; ++k) {
        sums[k] = multiply_add(load_first<float, float>(grad + k * channels, m), weight, sums[k]);
      }
    }
    for (int k = 0; k < count; ++k) {
      store_first<float, float, Result::any>(to + (first + k) * to_step + c, sums[k], m);
    }
  });
}

// The gradient of a row of the input.
inline void depthwise_input_gradients(const DepthwiseGradients& task, const ChannelStrip& strip, int64_t row) {
  const auto& [channels, size, output_size, kernel, stride, padding, dilation] = task.geometry;
  GradientTap taps[most_depthwise_taps], within[most_depthwise_taps];
  float* const to = task.grad_input + (strip.sample * size[0] + row) * size[1] * channels + strip.first;
  for (int64_t column = 0; column < smaller(stride[1], size[1]); ++column) { // and those that are strides away
    const auto columns = (size[1] - column + stride[1] - 1) / stride[1];
    int64_t n = 0, begin = 0, end = columns;
    for (int64_t i = 0; i < kernel[0]; ++i) {
      const auto top = row + padding[0] - i * dilation[0];
      if (top < 0 || top % stride[0] != 0 || top / stride[0] >= output_size[0]) {
        continue;
      }
      const float* grad =
          task.grad + (strip.sample * output_size[0] + top / stride[0]) * output_size[1] * channels + strip.first;
      for (int64_t j = 0; j < kernel[1]; ++j) {
        const auto left = column + padding[1] - j * dilation[1];
        if (left % stride[1] != 0) {
          continue;
        }
        const auto output = left / stride[1];
        taps[n] = {grad + output * channels, task.weight + (i * kernel[1] + j) * channels + strip.first, -output,
            output_size[1] - output};
        begin = larger(begin, taps[n].begin);
        end = smaller(end, taps[n].end);
        ++n;
      }
    }
    float* const to_column = to + column * channels;
    const auto to_step = stride[1] * channels;
    begin = smaller(begin, columns);
    end = larger(begin, end);
    const auto at_edge = [&](int64_t k) {
      int64_t m = 0;
      for (int64_t t = 0; t < n; ++t) {
        if (taps[t].begin <= k && k < taps[t].end) {
          within[m++] = taps[t];
        }
      }
      gather_products<1>(within, m, k, channels, strip.count, to_column, to_step);
    };
    int64_t k = 0;
    for (; k < begin; ++k) {
      at_edge(k);
    }
    for (; k + 4 <= end; k += 4) {
      gather_products<4>(taps, n, k, channels, strip.count, to_column, to_step);
    }
    for (; k < end; ++k) {
      gather_products<1>(taps, n, k, channels, strip.count, to_column, to_step);
    }
    for (; k < columns; ++k) {
      at_edge(k);
    }
  }
}

// Adds the gradients of the outputs of a row, in their order, to those of the bias.
inline void add_outputs(const float* grad, int64_t outputs, int64_t channels, int64_t count, float* grad_bias) {
  const auto add = [&](auto vectors, int64_t c, int64_t m) __attribute__((always_inline)) {
    V<float> sums[vectors]; // of several vectors of channels, as an addition waits for the one before
    for (int v = 0; v < vectors; ++v) {
      sums[v] = load_first<float, float>(grad_bias + c + v * lanes<float>, m);
    }
    for (int64_t o = 0; o < outputs; ++o) {
      for (int v = 0; v < vectors; ++v) {
        sums[v] += load_first<float, float>(grad + o * channels + c + v * lanes<float>, m);
      }
    }
    for (int v = 0; v < vectors; ++v) {
      store_first<float, float, Result::any>(grad_bias + c + v * lanes<float>, sums[v], m);
    }
  };
  constexpr int vectors = 4;
  int64_t c = 0;
  for (; c + vectors * lanes<float> <= count; c += vectors * lanes<float>) {
    add(std::integral_constant<int, vectors>{}, c, lanes<float>);
  }
  for (; c < count; c += lanes<float>) {
    add(std::integral_constant<int, 1>{}, c, smaller(count - c, lanes<float>));
  }
}

inline void depthwise_gradients_loop(
    const DepthwiseGradients& task, const ChannelStrip& strip, float* grad_weight, float* grad_bias, float* scratch) {
  const auto& [channels, size, output_size, kernel, stride, padding, dilation] = task.geometry;
  const auto span = task.geometry.span(), row_size = size[1] * strip.count;
  int64_t rows = 0; // of x_hat that are computed
  for (int64_t row = 0; row < output_size[0] && (grad_weight || grad_bias); ++row) {
    const float* grad = task.grad + (strip.sample * output_size[0] + row) * output_size[1] * channels + strip.first;
    if (grad_bias) {
      add_outputs(grad, output_size[1], channels, strip.count, grad_bias + strip.first);
    }
    for (int64_t i = 0; i < kernel[0] && grad_weight; ++i) {
      const auto input_row = row * stride[0] + i * dilation[0] - padding[0];
      if (input_row < 0 || input_row >= size[0]) {
        continue;
      }
      for (rows = larger(rows, input_row - span + 1); rows <= input_row; ++rows) {
        depthwise_input_row(task, strip, rows, scratch + rows % span * row_size);
      }
      const float* x = scratch + input_row % span * row_size;
      int64_t j = 0;
      for (; j + 3 <= kernel[1]; j += 3) {
        depthwise_weight_gradients<3>(task, strip, grad, x, i, j, grad_weight);
      }
      for (; j < kernel[1]; ++j) {
        depthwise_weight_gradients<1>(task, strip, grad, x, i, j, grad_weight);
      }
    }
  }
  for (int64_t row = 0; row < size[0] && task.grad_input; ++row) {
    depthwise_input_gradients(task, strip, row);
  }
}

} // namespace
} // namespace qatfast::cpu
