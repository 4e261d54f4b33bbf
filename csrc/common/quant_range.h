#pragma once

namespace qatfast {

// What turns a range into a grid.
template <class T>
struct QuantRange {
  T quant_min;
  T quant_max;
  bool symmetric;
};

} // namespace qatfast
