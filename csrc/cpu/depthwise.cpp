// Depthwise convolutions and their gradients.
#include "cpu/launch.h"

#include <memory>

namespace qatfast::cpu {
namespace {

// The levels of the rows of an input that a row of outputs reads, with zeros beyond its ends.
class LevelRows {
 public:
  explicit LevelRows(const DepthwiseTask& task)
      : task_(task),
        columns_(task.values.size(3) * task.values.size(1)),
        padding_(task.padding[1] * task.values.size(1)),
        width_(columns_ + 2 * padding_),
        span_((task.kernel_size[0] - 1) * task.dilation[0] + 1),
        levels_((span_ + 1) * width_, 0.0F), // the last row stays 0
        held_(span_, -1) {}

  // The first element, beyond the padding, of row `row` of a sample.
  const float* row(int64_t sample, int64_t row) {
    const auto rows = task_.values.size(2);
    if (row < 0 || row >= rows) {
      return levels_.data() + span_ * width_;
    }
    const auto slot = row % span_, index = sample * rows + row;
    auto* const to = levels_.data() + slot * width_;
    if (held_[slot] != index) {
      held_[slot] = index;
      const float one = 1;
      chosen().loops<float>().integer<uint8_t>().dequantize(task_.values.const_data_ptr<uint8_t>() + index * columns_,
          to + padding_, 1, columns_, {&one, &task_.zero_point, 0, 255});
    }
    return to;
  }

 private:
  const DepthwiseTask& task_;
  const int64_t columns_, padding_, width_, span_;
  std::vector<float> levels_;
  std::vector<int64_t> held_;
};

void depthwise_by_floats(const DepthwiseTask& task) {
  const auto channels = task.y.size(1), height = task.y.size(2), width = task.y.size(3);
  const auto taps = task.weight.size(1);
  std::vector<float> weight(taps * channels), scale(channels), bias(channels, -0.0F); // adding -0.0 changes nothing
  {
    const StandardArithmetic arithmetic;
    const auto* integers = task.weight.const_data_ptr<int8_t>();
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t t = 0; t < taps; ++t) {
        weight[t * channels + c] = static_cast<float>(integers[c * taps + t]);
      }
      scale[c] = task.input_scale * task.weight_scale.const_data_ptr<float>()[c];
    }
  }
  if (task.bias.defined()) {
    std::copy_n(task.bias.const_data_ptr<float>(), channels, bias.data());
  }
  auto* const y = task.y.mutable_data_ptr<float>();
  const auto row_size = width * channels;
  const auto rows = task.y.size(0) * height;
  parallel_for(0, rows, std::max<int64_t>(1, grain / std::max<int64_t>(1, row_size)), [&](int64_t begin, int64_t end) {
    LevelRows levels(task);
    std::vector<const float*> tap(taps);
    for (auto row = begin; row < end; ++row) {
      const auto sample = row / height, top = row % height * task.stride[0] - task.padding[0];
      for (int64_t t = 0; t < taps; ++t) {
        const auto i = t / task.kernel_size[1], j = t % task.kernel_size[1];
        tap[t] = levels.row(sample, top + i * task.dilation[0]) + j * task.dilation[1] * channels;
      }
      chosen().depthwise({tap.data(), taps, width, channels, task.stride[1] * channels, weight.data(), scale.data(),
          bias.data(), y + row * row_size});
    }
  });
}

DepthwiseGeometry geometry_of(const at::Tensor& values, const at::Tensor& outputs, at::IntArrayRef kernel_size,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  return {values.size(1), {values.size(2), values.size(3)}, {outputs.size(2), outputs.size(3)},
      {kernel_size[0], kernel_size[1]}, {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}};
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

void depthwise_by_dot_products(const DepthwiseTask& task) {
  const auto geometry = geometry_of(task.values, task.y, task.kernel_size, task.stride, task.padding, task.dilation);
  const auto channels = geometry.channels, height = geometry.kernel[0], width = geometry.kernel[1];
  const auto quads = (width + 3) / 4;
  const auto padded = (channels + depthwise_vector - 1) / depthwise_vector * depthwise_vector;
  std::vector<int8_t> weight(height * quads * padded * 4, 0);
  std::vector<int32_t> offset(padded, 0);
  std::vector<float> scale(padded, 0), bias(padded, -0.0F); // adding -0.0 changes nothing
  const auto* integers = task.weight.const_data_ptr<int8_t>();
  const StandardArithmetic arithmetic;
  for (int64_t c = 0; c < channels; ++c) {
    int32_t sum = 0;
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const auto value = integers[(c * height + i) * width + j];
        weight[((i * quads + j / 4) * padded + c) * 4 + j % 4] = value;
        sum += value;
      }
    }
    offset[c] = -task.zero_point * sum;
    scale[c] = task.input_scale * task.weight_scale.const_data_ptr<float>()[c];
  }
  if (task.bias.defined()) {
    std::copy_n(task.bias.const_data_ptr<float>(), channels, bias.data());
  }
  const DepthwiseDotProducts products = {geometry, task.values.const_data_ptr<uint8_t>(), task.zero_point,
      weight.data(), offset.data(), scale.data(), bias.data(), task.y.mutable_data_ptr<float>()};
  const auto samples = task.values.size(0);
  for_each_block<int32_t>(geometry, samples, samples, [&](const ChannelBlock& block, int64_t, int32_t* scratch) {
    chosen().dot_products.depthwise(products, block, scratch);
  });
}

} // namespace

void depthwise(const DepthwiseTask& task) {
  chosen().dot_products.depthwise ? depthwise_by_dot_products(task) : depthwise_by_floats(task);
}

void depthwise_backward(const DepthwiseBackwardTask& task) {
  const auto geometry = geometry_of(task.values, task.grad, task.kernel_size, task.stride, task.padding, task.dilation);
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
