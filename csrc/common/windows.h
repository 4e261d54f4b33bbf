// The windows of a convolution: which elements of the input an output reads.
#pragma once

#include "common/qparams.h"

#include <ATen/core/Tensor.h>

namespace qatfast {

// Coordinates and positions take 32 bits: with divisions of 64 bits, the CUDA kernels were 40 % larger.
using Coordinates = int32_t[3];

// A convolution that is not transposed, with three spatial dimensions, the first of which may have size 1. Between the
// neighbours of a dimension of the input lie `spread` - 1 zeros, as a transposed convolution reads it.
struct WindowGeometry {
  static constexpr int dims = 3;
  Coordinates size; // of the input
  Coordinates kernel;
  Coordinates stride;
  Coordinates padding; // before the first element
  Coordinates dilation;
  Coordinates spread;
  Coordinates output_size;

  static C10_HOST_DEVICE int64_t product(const Coordinates& sizes) {
    return int64_t{sizes[0]} * sizes[1] * sizes[2];
  }

  // The coordinates of element `index` of a box.
  static C10_HOST_DEVICE void unravel(uint32_t index, const Coordinates& sizes, Coordinates& to) {
    for (int d = dims - 1; d > 0; --d) {
      const auto size = static_cast<uint32_t>(sizes[d]), rest = index / size;
      to[d] = static_cast<int32_t>(index - rest * size);
      index = rest;
    }
    to[0] = static_cast<int32_t>(index);
  }

  // The coordinates of the pixel of the input that a tap of the kernel reads for an output. Returns false if it reads
  // zero there.
  C10_HOST_DEVICE bool find_pixel(const Coordinates& output, const Coordinates& tap, Coordinates& pixel) const {
    for (int d = 0; d < dims; ++d) {
      auto place = output[d] * stride[d] + tap[d] * dilation[d] - padding[d];
      if (place < 0) {
        return false;
      }
      if (spread[d] > 1) {
        const auto rest = static_cast<uint32_t>(place) / static_cast<uint32_t>(spread[d]);
        if (static_cast<int32_t>(rest) * spread[d] != place) {
          return false;
        }
        place = static_cast<int32_t>(rest);
      }
      if (place >= size[d]) {
        return false;
      }
      pixel[d] = place;
    }
    return true;
  }

  C10_HOST_DEVICE int64_t index_of(const Coordinates& pixel) const {
    return (int64_t{pixel[0]} * size[1] + pixel[1]) * size[2] + pixel[2];
  }
};

// The floats that were quantized, as bits, to find a NaN. `poison` is NaN if there is one; else they are not read.
struct FloatBits {
  const void* data;
  const float* poison;
  int64_t element_size; // 2 or 4
  uint32_t infinity;    // the bits of infinity: those of a NaN are larger
  int64_t sample_stride;
  int64_t channel_stride;
  int64_t strides[WindowGeometry::dims];

  C10_HOST_DEVICE bool has_nan() const {
    return data != nullptr && *poison != *poison;
  }

  C10_HOST_DEVICE bool is_nan(int64_t sample, int64_t channel, const Coordinates& pixel) const {
    auto index = sample * sample_stride + channel * channel_stride;
    for (int d = 0; d < WindowGeometry::dims; ++d) {
      index += pixel[d] * strides[d];
    }
    return element_size == 4 ? (static_cast<const uint32_t*>(data)[index] & 0x7FFFFFFF) > infinity
                             : (static_cast<const uint16_t*>(data)[index] & 0x7FFFU) > infinity;
  }
};

// The integers of an input (samples, pixels, channels), contiguous, and their grids: one, or one per sample.
struct WindowInput {
  WindowGeometry geometry;
  int64_t channels;
  const uint8_t* values;
  const int32_t* zero_point;
  bool grid_per_sample;
  FloatBits floats;

  C10_HOST_DEVICE int64_t grid_of(int64_t sample) const {
    return grid_per_sample ? sample : 0;
  }

  C10_HOST_DEVICE const uint8_t* values_of(int64_t sample, const Coordinates& pixel) const {
    return values + (sample * WindowGeometry::product(geometry.size) + geometry.index_of(pixel)) * channels;
  }

  // Calls f(tap, pixel) for the taps of an output that read the input, until it returns true. Returns whether it did.
  template <class F>
  C10_HOST_DEVICE bool any_tap(uint32_t output, F f) const {
    Coordinates at, tap, pixel;
    WindowGeometry::unravel(output, geometry.output_size, at);
    int64_t index = 0;
    for (tap[0] = 0; tap[0] < geometry.kernel[0]; ++tap[0]) {
      for (tap[1] = 0; tap[1] < geometry.kernel[1]; ++tap[1]) {
        for (tap[2] = 0; tap[2] < geometry.kernel[2]; ++tap[2], ++index) {
          if (geometry.find_pixel(at, tap, pixel) && f(index, pixel)) {
            return true;
          }
        }
      }
    }
    return false;
  }
};

// The weight of a convolution with groups, and the scales that its sums take.
template <class C>
struct GroupedWeight {
  const int8_t* values; // (taps, channels of a group, outputs)
  const C* input_scale; // one per grid of the input
  const C* scale;       // one per output, as the others
  const int32_t* zero_point;
  const C* bias;    // or null
  int64_t channels; // of a group
  int64_t outputs;
  int64_t outputs_per_group;
};

// Output `output` of channels [channel, channel + N) of a sample, each of which is a group of its own if N > 1. Sum is
// an integer type that holds the sums.
template <class Sum, int N, class C>
C10_HOST_DEVICE void grouped_outputs(const WindowInput& input, const GroupedWeight<C>& weight, int64_t sample,
    uint32_t output, int64_t channel, C (&y)[N]) {
  const auto first = N > 1 ? channel : channel / weight.outputs_per_group * weight.channels;
  const auto grid = input.grid_of(sample);
  const Sum zero = input.zero_point[grid];
  Sum sums[N] = {}, weight_zero[N];
  for (int k = 0; k < N; ++k) {
    weight_zero[k] = weight.zero_point[channel + k];
  }
  struct alignas(N) Bytes {
    uint8_t at[N];
  };
  input.any_tap(output, [&](int64_t tap, const Coordinates& pixel) {
    const auto* const x = input.values_of(sample, pixel) + first;
    const auto* const w = weight.values + tap * weight.channels * weight.outputs + channel;
    for (int64_t c = 0; c < weight.channels; ++c) {
      const auto integers = *reinterpret_cast<const Bytes*>(x + c);
      const auto factors = *reinterpret_cast<const Bytes*>(w + c * weight.outputs);
      for (int k = 0; k < N; ++k) {
        sums[k] += (integers.at[k] - zero) * (static_cast<int8_t>(factors.at[k]) - weight_zero[k]);
      }
    }
    return false;
  });
  unsigned has_nan = 0; // a bit per channel
  if (input.floats.has_nan()) {
    input.any_tap(output, [&](int64_t, const Coordinates& pixel) {
      for (int64_t c = 0; c < weight.channels; ++c) {
        for (int k = 0; k < N; ++k) {
          has_nan |= static_cast<unsigned>(input.floats.is_nan(sample, first + c + k, pixel)) << k;
        }
      }
      return false;
    });
  }
  for (int k = 0; k < N; ++k) {
    const auto value = int8_output(static_cast<C>(sums[k]), weight.input_scale[grid] * weight.scale[channel + k],
        weight.bias ? weight.bias[channel + k] : -C(0));
    y[k] = has_nan >> k & 1 ? std::numeric_limits<C>::quiet_NaN() : value;
  }
}

// The input as operators have it: `values` (samples, ..., channels) contiguous uint8. `input` has the floats that were
// quantized to them, in the order of dimensions (samples, channels, ...), and `poison` is NaN if one of them is; or
// both are undefined.
struct WindowTask {
  WindowGeometry geometry;
  at::Tensor values;
  at::Tensor scale;
  at::Tensor zero_point;
  at::Tensor input;
  at::Tensor poison;

  FloatBits floats() const {
    FloatBits bits = {};
    if (input.defined()) {
      const auto dtype = input.scalar_type();
      bits = {input.const_data_ptr(), poison.const_data_ptr<float>(), input.element_size(),
          dtype == at::kFloat      ? 0x7F800000U
              : dtype == at::kHalf ? 0x7C00U
                                   : 0x7F80U,
          input.stride(0), input.stride(1), {}};
      const auto own = input.dim() - 2;
      for (int64_t d = 0; d < own; ++d) {
        bits.strides[WindowGeometry::dims - own + d] = input.stride(d + 2);
      }
    }
    return bits;
  }

  WindowInput pointers() const {
    return {geometry, values.size(-1), values.const_data_ptr<uint8_t>(), zero_point.const_data_ptr<int32_t>(),
        scale.numel() > 1, floats()};
  }
};

// The weight (outputs, taps * channels of a group) int8, and the result (samples, ..., outputs).
struct GroupedTask {
  WindowTask input;
  at::Tensor weight;
  at::Tensor weight_scale;
  at::Tensor weight_zero_point;
  at::Tensor bias; // or undefined
  int64_t groups;
  at::Tensor y;

  // `by_columns` is the weight transposed, in memory too.
  template <class C>
  GroupedWeight<C> pointers(const at::Tensor& by_columns) const {
    const auto outputs = weight.size(0), channels = input.values.size(-1);
    return {by_columns.const_data_ptr<int8_t>(), input.scale.const_data_ptr<C>(), weight_scale.const_data_ptr<C>(),
        weight_zero_point.const_data_ptr<int32_t>(), bias.defined() ? bias.const_data_ptr<C>() : nullptr,
        channels / groups, outputs, outputs / groups};
  }

  // Whether 32 bits hold the sums.
  bool fits_int32() const {
    return weight.size(1) <= int32_features;
  }
};

// Whether N = 4 applies to a convolution with groups.
template <class C>
bool takes_four_channels(const WindowInput& input, const GroupedWeight<C>& weight) {
  const auto are_aligned = (reinterpret_cast<uintptr_t>(input.values) | reinterpret_cast<uintptr_t>(weight.values)) % 4;
  return weight.channels == 1 && weight.outputs_per_group == 1 && weight.outputs % 4 == 0 && are_aligned == 0;
}

} // namespace qatfast
