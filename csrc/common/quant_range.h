// What turns a range into a grid, apart from quant_math.h: that is compiled once per instruction set, so that loops.h
// must not include it.
#pragma once

namespace qatfast {

template <class T>
struct QuantRange {
  T quant_min;
  T quant_max;
  bool symmetric;
};

} // namespace qatfast
