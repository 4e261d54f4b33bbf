// The loops that each instruction set offers, as tables of serial functions. The table is chosen once, at run time.
#pragma once

#include "common/quant_range.h"

#include <ATen/OpMathType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>
#include <utility>

namespace qatfast::cpu {

using at::opmath_type;

// The grids of a matrix: row i has grid i, or column j has grid (first_column + j) / repeat % columns.
template <class C>
struct Grids {
  const C* scale;
  const int32_t* zero_point;
  C quant_min;
  C quant_max;
  bool unclamped = false; // the grids are dynamic, and choose() found that each holds all values of its block
  C factor = 0;           // of the ProductGrid, if there is one grid, which is unclamped and has one; else 0
  int64_t columns = 0;    // the number of grids of the columns; 0 if the rows have grids
  int64_t repeat = 1;
  int64_t first_column = 0;
  int64_t stride = 0; // from one row to the next, if columns have grids

  Grids from(int64_t first) const {
    Grids rest = *this;
    rest.scale += first;
    rest.zero_point += first;
    return rest;
  }
};

// One row of an int8 GEMM. The sum of (q_x - zero_point) (q_w - zero_point) over in_features is, modulo 2^32,
// products[j] - input_zero_point * weight_sum[j] - input_level_sum * weight_zero_point[j].
template <class C>
struct EpilogueRow {
  C input_scale;
  int32_t input_zero_point;
  int32_t input_level_sum;
  const C* weight_scale;            // one per column, as those below
  const int32_t* weight_zero_point; // null if all are 0
  const int32_t* weight_sum;        // of q_w
  const C* bias;                    // null if there is none
};

// Whether a loop up through memory that stores to `to` what it has loaded from `from` waits for its own stores: the
// low 12 bits of a store's address are those of one of the next loads, and more are compared later.
template <class From, class To>
static inline bool stores_delay_loads(const From* from, const To* to) {
  const auto distance = reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from);
  return sizeof(From) == sizeof(To) && distance % 4096 - 1 < 1023;
}

// What an approximate error takes of a grid: 1 / scale and the ends in real units.
template <class C>
struct ApproximateGrid {
  C reciprocal;
  C least;
  C most;
};
constexpr int64_t approximate_roundings = 2048;

#define QATFAST_INTEGER_LOOP(name, ...) std::add_pointer_t<__VA_ARGS__> name;
template <class T, class Q>
struct IntegerLoops {
  using C = opmath_type<T>;
#include "loop_list.h"
};

#define QATFAST_LOOP(name, ...) std::add_pointer_t<__VA_ARGS__> name;
template <class T>
struct Loops : IntegerLoops<T, int8_t>, IntegerLoops<T, uint8_t>, IntegerLoops<T, int16_t>, IntegerLoops<T, uint16_t> {
  using C = opmath_type<T>;
#include "loop_list.h"

  template <class Q>
  const IntegerLoops<T, Q>& integer() const {
    return *this;
  }
};

// grad if the mask's bit is set, else zero, for elements of that size. The first element has a whole byte of the mask.
template <class U>
using MaskLoop = void (*)(const U* grad, const uint8_t* mask, U* to, int64_t n);

// fake_quantize of float32 with results that are rounded once more.
template <class To>
using RoundedLoop = void (*)(const float* x, To* y, int64_t rows, int64_t n, const Grids<float>& grids);

// sums = sums * scale + bias in place, over `rows` runs of n columns. Returns the largest magnitude of a sum.
using ScaleSumsLoop = float (*)(float* sums, int64_t rows, int64_t n, const float* scale, const float* bias);

// What turns the sums of n outputs into the values of integers; see requantized in quant_math.h.
struct Requantization {
  const int32_t* offset; // added to each sum, n of them
  const float* factor;   // n
  float low;
  float high;
  float scale;
};

// Overwrites `rows` runs of n sums, int32 or integers in float32, with float32 values.
using RequantizeLoop = void (*)(void* sums, int64_t rows, int64_t n, const Requantization& requantization);

// A row of outputs of a depthwise convolution: output i of channel c is the sum of tap[t][i * step + c] * weight[t][c],
// times scale[c], plus bias[c]. Levels and weights are integers whose sums stay below 2^24.
struct DepthwiseRow {
  const float* const* tap;
  int64_t taps;
  int64_t outputs;
  int64_t channels;
  int64_t step;
  const float* weight;
  const float* scale;
  const float* bias;
  float* y;
};
using DepthwiseLoop = void (*)(const DepthwiseRow& row);

// A depthwise convolution of channels-last images. Each array has the sizes of height and width.
struct DepthwiseGeometry {
  int64_t channels;
  int64_t size[2];
  int64_t output_size[2];
  int64_t kernel[2];
  int64_t stride[2];
  int64_t padding[2];
  int64_t dilation[2];

  int64_t taps() const {
    return kernel[0] * kernel[1];
  }
  // The rows of the input from the first to the last that an output reads.
  int64_t span() const {
    return (kernel[0] - 1) * dilation[0] + 1;
  }
};

// Consecutive channels of a sample.
struct ChannelStrip {
  int64_t sample;
  int64_t first;
  int64_t count;
};

constexpr int64_t depthwise_vector = 16;     // channels
constexpr int64_t depthwise_group_size = 64; // channels
constexpr int64_t depthwise_tile = 16;       // outputs

// Sums of so many products of levels up to 255 and int8 stay below 2^24: float32 holds them.
constexpr int64_t most_depthwise_taps = 512;

// Output = (sum of values * weight + offset) * scale + bias, for integers with instructions for dot products. The
// arrays of the channels are filled up with zeros to a multiple of depthwise_vector.
struct DepthwiseDotProducts {
  DepthwiseGeometry geometry;
  const int8_t* weight;  // [quads of the kernel's height][its width][channels][4]
  const int32_t* offset; // one per channel, as those below
  const float* scale;
  const float* bias;

  int64_t quads() const {
    return (geometry.kernel[0] + 3) / 4;
  }
  // The columns that `outputs` neighbouring outputs read.
  int64_t columns(int64_t outputs) const {
    return (outputs - 1) * geometry.stride[1] + (geometry.kernel[1] - 1) * geometry.dilation[1] + 1;
  }
  int64_t scratch_size() const {
    return quads() * columns(geometry.output_size[1] < depthwise_tile ? geometry.output_size[1] : depthwise_tile) *
        depthwise_group_size;
  }
};

// Output j of a row = (sum of values * weight + offset[j]) * scale[j] + bias[j] or, without a bias, what is requantized
// with the factor scale[j]. The arrays of the outputs are filled up with zeros to a multiple of 16.
struct PointwiseDotProducts {
  int64_t features;
  int64_t outputs;
  const int8_t* weight; // [strips of outputs][quads of features][outputs of the strip][4]
  const int32_t* offset;
  const float* scale;
  const float* bias;
  float low; // see requantized in quant_math.h
  float high;
  float y_scale;
  bool bypasses_cache; // for y of whole, aligned vectors
};
constexpr int64_t pointwise_strip = 64, pointwise_tile_rows = 6;

// What is multiplied at a time: rows that follow each other in memory, and the outputs from `first` to `end`. `first`
// is a multiple of pointwise_strip.
struct PointwiseTile {
  const uint8_t* values;
  int64_t rows;
  int64_t first;
  int64_t end;
  float* y;         // output 0 of the first row
  const char* next; // what is read next, or null; `next_size` bytes per value of this tile
  int64_t next_size;
};

// Loops for processors with instructions for dot products of uint8 and int8, or null.
struct DotProductLoops {
  // Copies a row of columns of `channels` values in the order of the loop below, in which each column is filled up to a
  // multiple of depthwise_group_size.
  void (*pack_row)(const uint8_t* values, int64_t columns, int64_t channels, uint8_t* to) = nullptr;
  // A row of outputs from the rows that it reads, with their padding. `scratch` has scratch_size() integers and the
  // alignment of a vector.
  void (*depthwise)(const DepthwiseDotProducts& task, const uint8_t* const* rows, float* y, int32_t* scratch) = nullptr;
  void (*pointwise)(const PointwiseDotProducts& task, const PointwiseTile& tile) = nullptr;
};

// Rows of an int8 weight, `step` elements apart, and the zero point of each.
struct PairWeight {
  const int8_t* values;
  int64_t step;
  int64_t outputs; // at most pair_outputs
  const int32_t* zero_point;
};
constexpr int64_t pair_outputs = 16, pair_rows = 6, pair_features = 16; // features that are packed together

// What is multiplied at a time: rows of levels, `step` elements apart, and a packed weight.
struct PairProducts {
  const int16_t* levels;
  int64_t step;
  int64_t rows;
  const int16_t* weight; // [pairs][pair_outputs][2]
  int64_t pairs;
};

// Loops for processors that multiply pairs of int16, or null. Levels are q - zero_point.
struct PairProductLoops {
  // Writes the levels of `features` columns in pairs, filled up to a multiple of pair_features with any levels.
  void (*pack)(const PairWeight& weight, int64_t features, int16_t* to) = nullptr;
  void (*levels_of_int8)(const int8_t* values, int64_t n, int32_t zero_point, int16_t* to) = nullptr;
  void (*levels_of_uint8)(const uint8_t* values, int64_t n, int32_t zero_point, int16_t* to) = nullptr;
  // Adds the products to rows of pair_outputs sums, `sums_step` apart, modulo 2^32.
  void (*multiply)(const PairProducts& task, int32_t* sums, int64_t sums_step) = nullptr;
};

// The gradients of a depthwise convolution of x_hat = (values - zero_point) * scale. Those that are null are not
// needed.
struct DepthwiseGradients {
  DepthwiseGeometry geometry;
  const float* grad;
  const uint8_t* values;
  float scale;
  float zero_point;
  const float* weight; // [taps][channels]
  float* grad_input;   // like values
};

// Adds the gradients of the strip's weight [taps][channels] and bias [channels], each with its products in the order of
// memory; `scratch` has span * width * count floats.
using DepthwiseGradientsLoop = void (*)(
    const DepthwiseGradients& task, const ChannelStrip& strip, float* grad_weight, float* grad_bias, float* scratch);

struct InstructionSet {
  const char* name;
  Loops<float> f32;
  Loops<double> f64;
  Loops<c10::Half> f16;
  Loops<c10::BFloat16> bf16;
  MaskLoop<uint16_t> mask16;
  MaskLoop<uint32_t> mask32;
  MaskLoop<uint64_t> mask64;
  RoundedLoop<c10::Half> f32_to_f16;
  RoundedLoop<c10::BFloat16> f32_to_bf16;
  ScaleSumsLoop scale_sums;
  RequantizeLoop requantize_int32;
  RequantizeLoop requantize_float32;
  DepthwiseLoop depthwise;
  DepthwiseGradientsLoop depthwise_gradients;
  DotProductLoops dot_products = {};
  PairProductLoops pair_products = {};
  bool prefers_pair_products = false; // to a library's products of int8, as there are no dot products

  template <class T>
  const Loops<T>& loops() const {
    if constexpr (std::is_same_v<T, float>) {
      return f32;
    } else if constexpr (std::is_same_v<T, double>) {
      return f64;
    } else if constexpr (std::is_same_v<T, c10::Half>) {
      return f16;
    } else {
      return bf16;
    }
  }
};

extern const InstructionSet baseline;
#ifdef __x86_64__
extern const InstructionSet avx2;
extern const InstructionSet avx512;
extern const Loops<c10::BFloat16> avx512_bf16;
extern const DotProductLoops avx512_vnni;
extern const PairProductLoops avx2_pair_products;
#endif

// The best one that torch's own CPU capability allows. ATEN_CPU_CAPABILITY=default|avx2|avx512 forces one, without
// extensions of it.
const InstructionSet& chosen();

} // namespace qatfast::cpu
