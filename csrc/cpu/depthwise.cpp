// Depthwise convolutions and their gradients.
#include "cpu/launch.h"

#include <memory>

namespace qatfast::cpu {
namespace {

template <class Task>
DepthwiseGeometry geometry_of(const Task& task, const at::Tensor& input, const at::Tensor& outputs) {
  const auto& [kernel_size, stride, padding, dilation] =
      std::tie(task.kernel_size, task.stride, task.padding, task.dilation);
  return {input.size(1), {input.size(2), input.size(3)}, {outputs.size(2), outputs.size(3)},
      {kernel_size[0], kernel_size[1]}, {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}};
}

// `pointer` moved up to a multiple of 64 bytes.
template <class E>
E* aligned(E* pointer) {
  constexpr uintptr_t line = 64;
  return reinterpret_cast<E*>((reinterpret_cast<uintptr_t>(pointer) + line - 1) / line * line);
}

// Rows of an input as a loop takes them: columns of `column_size` elements, which prepare(values, to) makes, and
// columns of `padding` at both ends.
template <class E, class F>
struct RowFormat {
  int64_t column_size;
  E padding;
  F prepare;
};
template <class E, class F>
RowFormat(int64_t, E, F) -> RowFormat<E, F>;

// The rows of a sample that a row of outputs reads.
template <class E, class F>
class PreparedRows {
 public:
  PreparedRows(
      const DepthwiseTask& task, const DepthwiseGeometry& geometry, const RowFormat<E, F>& format, QuantizeRun quantize)
      : geometry_(geometry),
        format_(format),
        quantize_(quantize),
        row_size_(geometry.size[1] * geometry.channels),
        width_((geometry.size[1] + 2 * geometry.padding[1]) * format.column_size),
        takes_all_(task.takes_all),
        given_(quantize ? nullptr : task.input.const_data_ptr<uint8_t>()),
        kept_(task.values.defined() ? task.values.mutable_data_ptr<uint8_t>() : nullptr),
        buffer_(given_ || kept_ ? 0 : row_size_),
        memory_((geometry.span() + 1) * width_ + 64 / sizeof(E), format.padding),
        rows_(aligned(memory_.data())) {}

  void begin(int64_t sample) {
    first_ = sample * geometry_.size[0];
    next_ = 0;
  }

  // The first column, which may be padding, of a row of the sample or beyond it. Rows are asked for in ascending order.
  const E* operator()(int64_t row) {
    const auto span = geometry_.span();
    if (row < 0 || row >= geometry_.size[0]) {
      return rows_ + span * width_; // padding
    }
    for (next_ = takes_all_ ? next_ : std::max(next_, row - span + 1); next_ <= row; ++next_) {
      format_.prepare(values_of(next_), rows_ + next_ % span * width_ + geometry_.padding[1] * format_.column_size);
    }
    return rows_ + row % span * width_;
  }

  // Makes the values of rows that no output reads, if all are taken.
  void end() {
    for (; takes_all_ && next_ < geometry_.size[0]; ++next_) {
      values_of(next_);
    }
  }

 private:
  const uint8_t* values_of(int64_t row) {
    const auto begin = (first_ + row) * row_size_;
    if (given_) {
      return given_ + begin;
    }
    auto* const to = kept_ ? kept_ + begin : buffer_.data();
    quantize_(begin, begin + row_size_, to);
    return to;
  }

  const DepthwiseGeometry& geometry_;
  const RowFormat<E, F>& format_;
  const QuantizeRun quantize_;
  const int64_t row_size_, width_;
  const bool takes_all_;
  const uint8_t* const given_;
  uint8_t* const kept_;
  std::vector<uint8_t> buffer_;
  std::vector<E> memory_;
  E* const rows_;
  int64_t first_ = 0, next_ = 0; // of the sample; not yet prepared
};

// Calls loop(rows, the first of them, outputs) for each row of outputs. make_loop() returns one for each thread.
template <class E, class F, class M>
void for_each_row(const DepthwiseTask& task, const DepthwiseGeometry& geometry, const RowFormat<E, F>& format,
    QuantizeRun quantize, M make_loop) {
  const auto height = geometry.output_size[0], row_size = geometry.output_size[1] * geometry.channels;
  const auto unit = task.takes_all ? height : 1; // each row of the input is then quantized once
  auto* const y = task.y.mutable_data_ptr<float>();
  parallel_for(0, task.y.size(0) * height / unit, std::max<int64_t>(1, grain / std::max<int64_t>(1, unit * row_size)),
      [&](int64_t first, int64_t last) {
        PreparedRows<E, F> rows(task, geometry, format, quantize);
        auto loop = make_loop();
        for (auto row = first * unit; row < last * unit; ++row) {
          if (row == first * unit || row % height == 0) {
            rows.begin(row / height);
          }
          loop(rows, row % height * geometry.stride[0] - geometry.padding[0], y + row * row_size);
          if (row % height == height - 1) {
            rows.end();
          }
        }
      });
}

// What follows from a sum, one element per channel and zeros after them.
struct DepthwiseEpilogue {
  std::vector<float> scale, bias;

  DepthwiseEpilogue(const DepthwiseTask& task, int64_t size) : scale(size, 0), bias(size, -0.0F) { // adds nothing
    const StandardArithmetic arithmetic;
    const auto channels = task.weight.size(0);
    for (int64_t c = 0; c < channels; ++c) {
      scale[c] = task.input_scale * task.weight_scale.const_data_ptr<float>()[c];
    }
    if (task.bias.defined()) {
      std::copy_n(task.bias.const_data_ptr<float>(), channels, bias.data());
    }
  }
};

void depthwise_by_floats(const DepthwiseTask& task, QuantizeRun quantize) {
  const auto geometry = geometry_of(task, task.input, task.y);
  const auto channels = geometry.channels, taps = geometry.taps();
  const DepthwiseEpilogue epilogue(task, channels);
  std::vector<float> weight(taps * channels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t t = 0; t < taps; ++t) {
      weight[t * channels + c] = static_cast<float>(task.weight.const_data_ptr<int8_t>()[c * taps + t]);
    }
  }
  const auto levels_of = [&](const uint8_t* values, float* to) {
    const float one = 1;
    const auto dequantize = chosen().loops<float>().integer<uint8_t>().dequantize;
    dequantize(values, to, 1, geometry.size[1] * channels, {&one, &task.zero_point, 0, 255});
  };
  const RowFormat format{channels, 0.0F, levels_of};
  for_each_row(task, geometry, format, quantize, [&] {
    return [&, tap = std::vector<const float*>(taps)](auto& rows, int64_t top, float* y) mutable {
      for (int64_t t = 0; t < taps; ++t) {
        const auto i = t / geometry.kernel[1], j = t % geometry.kernel[1];
        tap[t] = rows(top + i * geometry.dilation[0]) + j * geometry.dilation[1] * channels;
      }
      chosen().depthwise({tap.data(), taps, geometry.output_size[1], channels, geometry.stride[1] * channels,
          weight.data(), epilogue.scale.data(), epilogue.bias.data(), y});
    };
  });
}

void depthwise_by_dot_products(const DepthwiseTask& task, QuantizeRun quantize) {
  const auto geometry = geometry_of(task, task.input, task.y);
  const auto& loops = chosen().dot_products;
  const auto channels = geometry.channels, height = geometry.kernel[0], width = geometry.kernel[1];
  const auto padded = (channels + depthwise_vector - 1) / depthwise_vector * depthwise_vector;
  const auto column_size = (channels + depthwise_group_size - 1) / depthwise_group_size * depthwise_group_size;
  const DepthwiseEpilogue epilogue(task, padded);
  std::vector<int8_t> weight((height + 3) / 4 * width * padded * 4, 0);
  std::vector<int32_t> offset(padded, 0);
  const auto* integers = task.weight.const_data_ptr<int8_t>();
  for (int64_t c = 0; c < channels; ++c) {
    int32_t sum = 0;
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const auto value = *integers++;
        weight[((i / 4 * width + j) * padded + c) * 4 + i % 4] = value;
        sum += value;
      }
    }
    offset[c] = -task.zero_point * sum;
  }
  const DepthwiseDotProducts products = {
      geometry, weight.data(), offset.data(), epilogue.scale.data(), epilogue.bias.data()};
  const auto pack = [&](const uint8_t* values, uint8_t* to) {
    loops.pack_row(values, geometry.size[1], channels, to);
  };
  const RowFormat format{column_size, static_cast<uint8_t>(task.zero_point), pack};
  for_each_row(task, geometry, format, quantize, [&] {
    return [&, rows_of_kernel = std::vector<const uint8_t*>(height),
               scratch = std::vector<int32_t>(products.scratch_size() + depthwise_vector)](
               auto& rows, int64_t top, float* y) mutable {
      for (int64_t i = 0; i < height; ++i) {
        rows_of_kernel[i] = rows(top + i * geometry.dilation[0]);
      }
      loops.depthwise(products, rows_of_kernel.data(), y, aligned(scratch.data()));
    };
  });
}

void convolve(const DepthwiseTask& task, QuantizeRun quantize) {
  chosen().dot_products.depthwise ? depthwise_by_dot_products(task, quantize) : depthwise_by_floats(task, quantize);
}

// The channels that are processed together, so that the rows that an output reads stay in L1.
int64_t channels_per_strip(const DepthwiseGeometry& geometry) {
  constexpr int64_t most = 64, l1_bytes = 24 << 10;
  const auto columns = geometry.size[1] + 2 * geometry.padding[1];
  const auto fitting = l1_bytes / (static_cast<int64_t>(sizeof(float)) * geometry.span() * columns);
  return std::clamp(fitting / depthwise_vector * depthwise_vector, depthwise_vector, most);
}

// Calls f(channels of a sample, group, scratch) for the samples of each of `groups` groups, in parallel. Those of a
// group come one after the other.
template <class F>
void for_each_channel_strip(const DepthwiseGeometry& geometry, int64_t samples, int64_t groups, F f) {
  const auto size = channels_per_strip(geometry);
  const auto strips = (geometry.channels + size - 1) / size;
  const auto scratch_size = geometry.span() * geometry.size[1] * size;
  const auto work = std::max<int64_t>(1, samples / groups) * geometry.output_size[0] * geometry.output_size[1] * size;
  parallel_for(0, groups * strips, std::max<int64_t>(1, grain / work), [&](int64_t task, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[scratch_size]);
    for (; task < end; ++task) {
      const auto group = task / strips, first = task % strips * size;
      for (auto sample = samples * group / groups; sample < samples * (group + 1) / groups; ++sample) {
        f(ChannelStrip{sample, first, std::min(size, geometry.channels - first)}, group, scratch.get());
      }
    }
  });
}

} // namespace

void depthwise(const DepthwiseTask& task) {
  convolve(task, nullptr);
}

bool quantize_and_convolve(const DepthwiseTask& task, const at::Tensor& mask, const QuantSpec& spec,
    const std::optional<ObservedRange>& range, const QParams& qparams, const at::Tensor& shifted_zero_point) {
  const auto& x = task.input;
  const auto quantize_by = [&](QuantizePass pass) {
    return quantize_to_uint8(x, task.values, mask, spec, range, qparams, shifted_zero_point, pass);
  };
  // To keep the values, each thread takes whole samples, and a row has whole bytes of the mask.
  const bool is_divisible = x.size(0) >= at::get_num_threads() && x.size(1) * x.size(3) % 8 == 0;
  if (task.values.defined() && !is_divisible) {
    const bool has_nan = quantize_by(nullptr);
    auto of_values = task.with_grid(qparams.scale, shifted_zero_point);
    of_values.input = std::exchange(of_values.values, {});
    depthwise(of_values);
    return has_nan;
  }
  return quantize_by([&](QuantizeRun quantize) {
    auto of_floats = task.with_grid(qparams.scale, shifted_zero_point);
    of_floats.takes_all = task.values.defined() || range;
    convolve(of_floats, quantize);
  });
}

void depthwise_backward(const DepthwiseBackwardTask& task) {
  const auto geometry = geometry_of(task, task.values, task.grad);
  const auto channels = geometry.channels, taps = geometry.taps(), samples = task.values.size(0);
  // The samples of a group are added in order, then the groups: the number of threads changes no sum.
  const auto groups = std::clamp<int64_t>(samples, 1, 16), weights = taps * channels;
  std::vector<float> weight(weights), grad_weight(task.grad_weight.defined() ? groups * weights : 0),
      grad_bias(task.grad_bias.defined() ? groups * channels : 0);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t t = 0; t < taps; ++t) {
      weight[t * channels + c] = task.weight.const_data_ptr<float>()[c * taps + t];
    }
  }
  const DepthwiseGradients gradients = {geometry, task.grad.const_data_ptr<float>(),
      task.values.const_data_ptr<uint8_t>(), task.scale, static_cast<float>(task.zero_point), weight.data(),
      task.grad_input.defined() ? task.grad_input.mutable_data_ptr<float>() : nullptr};
  for_each_channel_strip(geometry, samples, groups, [&](const ChannelStrip& strip, int64_t group, float* scratch) {
    chosen().depthwise_gradients(gradients, strip, grad_weight.empty() ? nullptr : &grad_weight[group * weights],
        grad_bias.empty() ? nullptr : &grad_bias[group * channels], scratch);
  });
  const StandardArithmetic arithmetic;
  const auto sum = [&](const std::vector<float>& parts, int64_t size, int64_t i) {
    float total = 0;
    for (int64_t group = 0; group < groups; ++group) {
      total += parts[group * size + i];
    }
    return total;
  };
  for (int64_t c = 0; c < channels && !grad_weight.empty(); ++c) {
    for (int64_t t = 0; t < taps; ++t) {
      task.grad_weight.mutable_data_ptr<float>()[c * taps + t] = sum(grad_weight, weights, t * channels + c);
    }
  }
  for (int64_t c = 0; c < channels && !grad_bias.empty(); ++c) {
    task.grad_bias.mutable_data_ptr<float>()[c] = sum(grad_bias, channels, c);
  }
}

} // namespace qatfast::cpu
