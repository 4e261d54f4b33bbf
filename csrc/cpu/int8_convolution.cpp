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
    const auto loop = are_floats ? chosen().requantize_float32 : chosen().requantize_int32;
    const auto begin = row * width, n = std::min(end * width, size) - begin, whole = n / width;
    char* const at = data + begin * sizeof(float);
    loop(at, whole, width, by);
    if (n % width > 0) {
      loop(at + whole * width * sizeof(float), 1, n % width, by);
    }
  });
}

} // namespace qatfast::cpu
