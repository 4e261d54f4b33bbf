#pragma once

#include <cstdint>

namespace qatfast {

// Sums of so many products of levels up to 255 and int8 stay below 2^24: float32 holds them.
constexpr int64_t most_depthwise_taps = 512;

// What turns a range into a grid.
template <class T>
struct QuantRange {
  T quant_min;
  T quant_max;
  bool symmetric;
};

} // namespace qatfast
