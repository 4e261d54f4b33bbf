// Convolutions by kernels of one element: matrix products.
#include "cpu/launch.h"

#include <ATen/ops/zeros.h>

#include <cstring>
#include <limits>
#include <memory>

namespace qatfast::cpu {
namespace {

// Outputs of this size are written past the caches, which would read their memory first: the layer and a ReLU after it
// take 7 % less time for 6 MB, and 15 % less for 26 MB.
constexpr size_t uncached_bytes = size_t{4} << 20;

int64_t padded_outputs(int64_t outputs) {
  return (outputs + 15) / 16 * 16;
}

// How the outputs are divided. The integers of a tile of rows stay in L1, or there are enough rows for the weight to
// be read from L2. If there are few rows, threads divide the outputs.
struct Division {
  int64_t rows;
  int64_t outputs;

  Division(int64_t all_rows, int64_t features, int64_t all_outputs) : outputs(all_outputs) {
    constexpr int64_t bytes = 12 << 10, fewest = 24, most = 384, step = pointwise_tile_rows;
    const int64_t threads = at::get_num_threads();
    rows = std::min(all_rows, std::clamp(bytes / std::max<int64_t>(1, features) / step * step, fewest, most));
    if (all_rows < 4 * threads * rows) {
      const auto strips = (all_outputs + pointwise_strip - 1) / pointwise_strip;
      outputs = (strips + threads - 1) / threads * pointwise_strip;
    }
  }
};

// Fills the outputs of rows with a NaN with NaN.
template <class T>
void spread_nan(const T* x, int64_t rows, int64_t features, float* y, int64_t outputs, int64_t step) {
  for (int64_t row = 0; row < rows; ++row, x += features, y += step) {
    if (std::any_of(x, x + features, [](T value) {
          return value != value;
        })) {
      std::fill_n(y, outputs, std::numeric_limits<float>::quiet_NaN());
    }
  }
}

template <class T>
void multiply_rows(const PointwiseTask& task, const PointwiseDotProducts& products) {
  const int64_t features = products.features, outputs = products.outputs, rows = task.y.numel() / outputs;
  const Division tile(rows, features, outputs);
  const auto of_row = (outputs + tile.outputs - 1) / tile.outputs, tiles = (rows + tile.rows - 1) / tile.rows * of_row;
  const auto work = std::max<int64_t>(1, tile.rows * features * tile.outputs);
  const auto* const x = task.input.const_data_ptr<T>();
  auto* const y = task.y.mutable_data_ptr<float>();
  parallel_for(0, tiles, std::max<int64_t>(1, products_per_thread / work), [&](int64_t index, int64_t end) {
    const auto multiply = chosen().dot_products.pointwise;
    std::unique_ptr<uint8_t[]> integers;
    for (; index < end; ++index) {
      const auto row = index / of_row * tile.rows, count = std::min(tile.rows, rows - row);
      const auto first = index % of_row * tile.outputs, past = std::min(outputs, first + tile.outputs);
      const auto* const from = x + row * features;
      auto* const to = y + row * outputs;
      if constexpr (std::is_same_v<T, uint8_t>) {
        multiply(products, {from, count, first, past, to, nullptr, 0});
      } else {
        if (!integers) {
          integers.reset(new uint8_t[tile.rows * features]);
        }
        using C = opmath_type<T>;
        C lo = 0, hi = 0;
        const auto grid = grids_of<C>(task.qparams);
        const bool is_finite = chosen().loops<T>().quantize_range(
            from, integers.get(), /*mask=*/nullptr, count * features, grid, &lo, &hi);
        const auto* const next = index + 1 < end ? reinterpret_cast<const char*>(from + count * features) : nullptr;
        multiply(products, {integers.get(), count, first, past, to, next, sizeof(T)});
        if (!is_finite) {
          spread_nan(from, count, features, to + first, past - first, outputs);
        }
      }
    }
  });
}

} // namespace

bool has_dot_products() {
  return chosen().dot_products.pointwise;
}

int64_t packed_pointwise_size(int64_t outputs, int64_t features) {
  return padded_outputs(outputs) * (1 + (features + 3) / 4);
}

at::Tensor packed_pointwise_weight(const at::Tensor& weight) {
  const auto outputs = weight.size(0), features = weight.size(1), padded = padded_outputs(outputs);
  const auto quads = (features + 3) / 4;
  const auto packed = at::zeros({packed_pointwise_size(outputs, features)}, weight.options().dtype(at::kInt));
  const auto* const values = weight.const_data_ptr<int8_t>();
  auto* const sums = packed.mutable_data_ptr<int32_t>();
  const auto strips = (outputs + pointwise_strip - 1) / pointwise_strip;
  parallel_for(0, strips, std::max<int64_t>(1, grain / (pointwise_strip * std::max<int64_t>(1, features))),
      [&](int64_t begin, int64_t end) {
        for (auto first = begin * pointwise_strip; first < std::min(end * pointwise_strip, outputs);
            first += pointwise_strip) {
          const auto width = std::min(pointwise_strip, padded - first), count = std::min(width, outputs - first);
          auto* to = sums + padded + first * quads;
          for (int64_t k = 0; k < features; k += 4, to += width) {
            for (int64_t j = 0; j < count; ++j) {
              const auto* const quad = values + (first + j) * features + k;
              std::memcpy(to + j, quad, std::min<int64_t>(4, features - k));
            }
          }
          for (auto j = first; j < first + count; ++j) {
            sums[j] = std::accumulate(values + j * features, values + (j + 1) * features, int32_t{0});
          }
        }
      });
  return packed;
}

void pointwise(const PointwiseTask& task) {
  const auto features = task.input.size(1), outputs = task.y.size(1), padded = padded_outputs(outputs);
  const auto& [factors, biases, requantizes, low, high, y_scale] = task.epilogue;
  std::vector<int32_t> offset(padded, 0);
  std::vector<float> scale(padded, 0), bias(padded, -0.0F); // adding -0.0 changes nothing
  const auto* const sums = task.weight.const_data_ptr<int32_t>();
  const int64_t zero_point = *task.qparams.zero_point.const_data_ptr<int32_t>();
  {
    const StandardArithmetic arithmetic;
    const float factor = requantizes ? 1 : *task.qparams.scale.const_data_ptr<float>();
    for (int64_t j = 0; j < outputs; ++j) {
      const int64_t added = requantizes ? biases.const_data_ptr<int32_t>()[j] : 0;
      offset[j] = static_cast<int32_t>(added - zero_point * sums[j]); // modulo 2^32, as the sums
      scale[j] = factor * factors.const_data_ptr<float>()[j];
    }
  }
  if (!requantizes && biases.defined()) {
    std::copy_n(biases.const_data_ptr<float>(), outputs, bias.data());
  }
  const bool is_aligned = outputs % 16 == 0 && reinterpret_cast<uintptr_t>(task.y.const_data_ptr()) % 64 == 0;
  const PointwiseDotProducts products = {features, outputs, reinterpret_cast<const int8_t*>(sums + padded),
      offset.data(), scale.data(), requantizes ? nullptr : bias.data(), low, high, y_scale,
      is_aligned && task.y.nbytes() >= uncached_bytes};
  if (task.input.scalar_type() == at::kByte) {
    return multiply_rows<uint8_t>(task, products);
  }
  AT_DISPATCH_V2(task.input.scalar_type(), "pointwise", AT_WRAP([&] {
    multiply_rows<scalar_t>(task, products);
  }),
      at::kFloat, at::kHalf, at::kBFloat16);
}

} // namespace qatfast::cpu
