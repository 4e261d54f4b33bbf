#include "cpu/launch.h"

namespace qatfast::cpu {

float scale_sums(
    const at::Tensor& sums, const at::Tensor& input_scale, const at::Tensor& weight_scale, const at::Tensor& bias) {
  const auto channels = sums.size(1), samples = input_scale.numel(), columns = sums.numel() / samples;
  const auto joined = rows_to_join(channels, columns / channels), width = joined * channels;
  std::vector<float> scales(width), biases(width, -0.0F); // adding -0.0 changes nothing
  float most = 0;
  for (int64_t sample = 0; sample < samples; ++sample) {
    const StandardArithmetic arithmetic;
    const float scale = input_scale.const_data_ptr<float>()[sample];
    for (int64_t j = 0; j < width; ++j) {
      scales[j] = scale * weight_scale.const_data_ptr<float>()[j % channels];
      if (bias.defined()) {
        biases[j] = bias.const_data_ptr<float>()[j % channels];
      }
    }
    auto* const values = sums.mutable_data_ptr<float>() + sample * columns;
    std::atomic<float> most_of_sample{0};
    parallel_for(0, (columns + width - 1) / width, std::max<int64_t>(1, grain / width), [&](int64_t row, int64_t end) {
      const auto loop = chosen().scale_sums;
      const auto begin = row * width, n = std::min(end * width, columns) - begin, whole = n / width;
      float of_task = loop(values + begin, whole, width, scales.data(), biases.data());
      if (n % width > 0) {
        of_task = std::max(of_task, loop(values + begin + whole * width, 1, n % width, scales.data(), biases.data()));
      }
      auto before = most_of_sample.load();
      while (before < of_task && !most_of_sample.compare_exchange_weak(before, of_task)) {
      }
    });
    most = std::max(most, most_of_sample.load());
  }
  return most;
}

void requantize(
    const at::Tensor& sums, const at::Tensor& offset, const at::Tensor& factor, float low, float high, float scale) {
  const auto rows = sums.size(0), outputs = sums.size(1);
  const auto joined = rows_to_join(outputs, rows), width = joined * outputs;
  std::vector<int32_t> offsets(width);
  std::vector<float> factors(width);
  for (int64_t j = 0; j < width; ++j) {
    offsets[j] = offset.const_data_ptr<int32_t>()[j % outputs];
    factors[j] = factor.const_data_ptr<float>()[j % outputs];
  }
  const Requantization by = {offsets.data(), factors.data(), low, high, scale};
  auto* const data = static_cast<char*>(sums.mutable_data_ptr());
  const bool are_floats = sums.scalar_type() == at::kFloat;
  const int64_t size = sums.numel();
  parallel_for(0, (size + width - 1) / width, std::max<int64_t>(1, grain / width), [&](int64_t row, int64_t end) {
    const StandardArithmetic arithmetic;
    const auto loop = are_floats ? chosen().requantize_float32 : chosen().requantize_int32;
    const auto begin = row * width, n = std::min(end * width, size) - begin, whole = n / width;
    char* const at = data + begin * sizeof(float);
    loop(at, whole, width, by);
    if (n % width > 0) {
      loop(at + whole * width * sizeof(float), 1, n % width, by);
    }
  });
}

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

} // namespace

void depthwise(const DepthwiseTask& task) {
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

} // namespace qatfast::cpu
