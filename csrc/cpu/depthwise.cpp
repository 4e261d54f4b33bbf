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

// The integers of the rows of a sample's input, which are quantized when they are asked for.
class InputRows {
 public:
  InputRows(const DepthwiseTask& task, const DepthwiseGeometry& geometry, QuantizeRun quantize)
      : height_(geometry.size[0]),
        row_size_(geometry.size[1] * geometry.channels),
        span_(geometry.span()),
        takes_all_(task.takes_all),
        quantize_(quantize),
        given_(quantize ? nullptr : task.input.const_data_ptr<uint8_t>()),
        kept_(task.values.defined() ? task.values.mutable_data_ptr<uint8_t>() : nullptr),
        buffer_(given_ || kept_ ? 0 : row_size_) {}

  int64_t row_size() const {
    return row_size_;
  }
  void begin(int64_t sample) {
    first_ = sample * height_;
    next_ = 0;
  }
  bool has(int64_t row) const {
    return 0 <= row && row < height_;
  }
  const uint8_t* operator()(int64_t row, QuadRow quads = {}) {
    const auto begin = (first_ + row) * row_size_;
    if (given_) {
      if (quads.quads) {
        chosen().dot_products.put_quads(given_ + begin, row_size_, quads);
      }
      return given_ + begin;
    }
    auto* const to = kept_ ? kept_ + begin : buffer_.data();
    quantize_(begin, begin + row_size_, to, quads);
    return to;
  }

  // Calls prepare(row) for the rows of an output whose first one is `top`, from row 0 on, that it was not called for.
  // The outputs of a sample come in ascending order.
  template <class F>
  void advance(int64_t top, F prepare) {
    for (next_ = takes_all_ ? next_ : std::max(next_, top); next_ < top + span_; ++next_) {
      prepare(next_);
    }
  }
  // Makes the values of rows that no output reads, if all are taken.
  void end() {
    for (; takes_all_ && next_ < height_; ++next_) {
      (*this)(next_);
    }
  }

 private:
  const int64_t height_, row_size_, span_;
  const bool takes_all_;
  const QuantizeRun quantize_;
  const uint8_t* const given_;
  uint8_t* const kept_;
  std::vector<uint8_t> buffer_;
  int64_t first_ = 0, next_ = 0; // of the sample; not yet prepared
};

// Calls begin() of a worker and row(top, outputs) for each row of outputs of a sample. make_worker(input) returns one
// for each thread.
template <class F>
void for_each_row(const DepthwiseTask& task, const DepthwiseGeometry& geometry, QuantizeRun quantize, F make_worker) {
  const auto height = geometry.output_size[0], row_size = geometry.output_size[1] * geometry.channels;
  const auto unit = task.takes_all ? height : 1; // each row of the input is then quantized once
  auto* const y = task.y.mutable_data_ptr<float>();
  parallel_for(0, task.y.size(0) * height / unit, std::max<int64_t>(1, grain / std::max<int64_t>(1, unit * row_size)),
      [&](int64_t first, int64_t last) {
        InputRows input(task, geometry, quantize);
        auto worker = make_worker(input);
        for (auto row = first * unit; row < last * unit; ++row) {
          if (row == first * unit || row % height == 0) {
            input.begin(row / height);
            worker.begin();
          }
          worker.row(row % height * geometry.stride[0] - geometry.padding[0], y + row * row_size);
          if (row % height == height - 1) {
            input.end();
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

// Rows of outputs from rows of levels in floats, which stay in a ring with columns of padding at both ends.
class FloatRows {
 public:
  FloatRows(InputRows& input, const DepthwiseTask& task, const DepthwiseGeometry& geometry, const float* weight,
      const DepthwiseEpilogue& epilogue)
      : input_(input),
        geometry_(geometry),
        zero_point_(task.zero_point),
        weight_(weight),
        epilogue_(epilogue),
        width_((geometry.size[1] + 2 * geometry.padding[1]) * geometry.channels),
        levels_((geometry.span() + 1) * width_ + 64 / sizeof(float), 0.0F),
        taps_(geometry.taps()) {}

  void begin() {}

  void row(int64_t top, float* y) {
    const auto channels = geometry_.channels, width = geometry_.kernel[1], padding = geometry_.padding[1];
    input_.advance(top, [&](int64_t row) {
      if (input_.has(row)) {
        const float one = 1;
        chosen().loops<float>().integer<uint8_t>().dequantize(
            input_(row), at(row) + padding * channels, 1, input_.row_size(), {&one, &zero_point_, 0, 255});
      }
    });
    for (int64_t t = 0; t < geometry_.taps(); ++t) {
      taps_[t] = at(top + t / width * geometry_.dilation[0]) + t % width * geometry_.dilation[1] * channels;
    }
    chosen().depthwise({taps_.data(), geometry_.taps(), geometry_.output_size[1], channels,
        geometry_.stride[1] * channels, weight_, epilogue_.scale.data(), epilogue_.bias.data(), y});
  }

 private:
  float* at(int64_t row) { // the last one of the ring is padding
    const auto span = geometry_.span();
    return aligned(levels_.data()) + (input_.has(row) ? row % span : span) * width_;
  }

  InputRows& input_;
  const DepthwiseGeometry& geometry_;
  const int32_t zero_point_;
  const float* const weight_;
  const DepthwiseEpilogue& epilogue_;
  const int64_t width_;
  std::vector<float> levels_;
  std::vector<const float*> taps_;
};

void depthwise_by_floats(const DepthwiseTask& task, const DepthwiseGeometry& geometry, QuantizeRun quantize) {
  const auto channels = geometry.channels, taps = geometry.taps();
  const DepthwiseEpilogue epilogue(task, channels);
  std::vector<float> weight(taps * channels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t t = 0; t < taps; ++t) {
      weight[t * channels + c] = static_cast<float>(task.weight.const_data_ptr<int8_t>()[c * taps + t]);
    }
  }
  for_each_row(task, geometry, quantize, [&](InputRows& input) {
    return FloatRows(input, task, geometry, weight.data(), epilogue);
  });
}

// Rows of outputs from the planes of quads of DepthwiseDotProducts, with columns of padding at both ends.
class QuadRows {
 public:
  QuadRows(InputRows& input, const DepthwiseTask& task, const DepthwiseDotProducts& products)
      : input_(input),
        products_(products),
        zero_point_(static_cast<uint8_t>(task.zero_point)),
        plane_size_((products.geometry.size[1] + 2 * products.geometry.padding[1]) * products.geometry.channels),
        quads_(products.planes() * plane_size_ + 2 * depthwise_vector),
        weight_(products.weight_size()),
        padding_(input.row_size(), zero_point_) {}

  void begin() {
    std::fill(quads_.begin(), quads_.end(), zero_point_ * 0x01010101U);
  }

  void row(int64_t top, float* y) {
    input_.advance(top, [&](int64_t row) {
      const auto& geometry = products_.geometry;
      const auto place = place_of(row);
      const QuadRow to = {
          quads() + place / 4 * plane_size_ + geometry.padding[1] * geometry.channels, static_cast<int>(place % 4)};
      if (input_.has(row)) {
        input_(row, to);
      } else {
        chosen().dot_products.put_quads(padding_.data(), input_.row_size(), to);
      }
    });
    chosen().dot_products.depthwise(products_, quads(), plane_size_, place_of(top), weight_.data(), y);
  }

 private:
  int64_t place_of(int64_t row) const {
    const auto rows = products_.planes() * 4;
    return (row % rows + rows) % rows;
  }
  uint32_t* quads() {
    return aligned(quads_.data());
  }

  InputRows& input_;
  const DepthwiseDotProducts& products_;
  const uint8_t zero_point_;
  const int64_t plane_size_;
  std::vector<uint32_t> quads_, weight_;
  const std::vector<uint8_t> padding_;
};

void depthwise_by_dot_products(const DepthwiseTask& task, const DepthwiseGeometry& geometry, QuantizeRun quantize) {
  const auto channels = geometry.channels, height = geometry.kernel[0], width = geometry.kernel[1];
  DepthwiseDotProducts products = {geometry};
  const auto padded = products.padded_channels();
  const DepthwiseEpilogue epilogue(task, padded);
  std::vector<uint32_t> weight(products.weight_size(), 0);
  std::vector<int32_t> offset(padded, 0);
  const auto* integers = task.weight.const_data_ptr<int8_t>();
  for (int64_t c = 0; c < channels; ++c) {
    int32_t sum = 0;
    for (int64_t i = 0; i < height; ++i) {
      const auto row = i * geometry.dilation[0];
      for (int64_t j = 0; j < width; ++j) {
        const auto value = *integers++;
        weight[(row / 4 * width + j) * padded + c] |= static_cast<uint32_t>(static_cast<uint8_t>(value)) << row % 4 * 8;
        sum += value;
      }
    }
    offset[c] = -task.zero_point * sum;
  }
  products.weight = weight.data();
  products.offset = offset.data();
  products.scale = epilogue.scale.data();
  products.bias = epilogue.bias.data();
  for_each_row(task, geometry, quantize, [&](InputRows& input) {
    return QuadRows(input, task, products);
  });
}

void convolve(const DepthwiseTask& task, QuantizeRun quantize) {
  const auto geometry = geometry_of(task, task.input, task.y);
  const bool fits = DepthwiseDotProducts{geometry}.planes() <= most_depthwise_planes;
  const auto by = chosen().dot_products.depthwise && fits ? depthwise_by_dot_products : depthwise_by_floats;
  by(task, geometry, quantize);
}

// The channels that are processed together, so that the rows that an output reads stay in L1.
int64_t channels_per_block(const DepthwiseGeometry& geometry) {
  constexpr int64_t most = 64, level_1 = 24 << 10;
  const auto columns = geometry.size[1] + 2 * geometry.padding[1];
  const auto fitting = level_1 / (static_cast<int64_t>(sizeof(float)) * geometry.span() * columns);
  return std::clamp(fitting / depthwise_vector * depthwise_vector, depthwise_vector, most);
}

// Calls f(block of channels, scratch) for all samples [begin, end) of each of `groups` groups of them in parallel. A
// group's samples come one after the other.
template <class E, class F>
void for_each_block(const DepthwiseGeometry& geometry, int64_t samples, int64_t groups, F f) {
  const auto size = channels_per_block(geometry);
  const auto blocks = (geometry.channels + size - 1) / size;
  const auto columns = geometry.size[1] + 2 * geometry.padding[1];
  const auto scratch_size = (geometry.span() + 1) * columns * size + depthwise_vector;
  const auto work = std::max<int64_t>(1, samples / groups) * geometry.output_size[0] * geometry.output_size[1] * size;
  parallel_for(0, groups * blocks, std::max<int64_t>(1, grain / work), [&](int64_t task, int64_t end) {
    const std::unique_ptr<E[]> scratch(new E[scratch_size]);
    for (; task < end; ++task) {
      const auto group = task / blocks, first = task % blocks * size;
      for (auto sample = samples * group / groups; sample < samples * (group + 1) / groups; ++sample) {
        f(ChannelBlock{sample, first, std::min(size, geometry.channels - first)}, group, scratch.get());
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
  for_each_block<float>(geometry, samples, groups, [&](const ChannelBlock& block, int64_t group, float* scratch) {
    chosen().depthwise_gradients(gradients, block, grad_weight.empty() ? nullptr : &grad_weight[group * weights],
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
