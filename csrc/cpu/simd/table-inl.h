// The table of all loops of one instruction set.

namespace qatfast::cpu {
namespace {

#define QATFAST_INTEGER_LOOP(name, ...) name##_loop<T, Q>,
template <class T, class Q>
constexpr IntegerLoops<T, Q> integer_loops() {
  return {
#include "loop_list.h"
  };
}

#define QATFAST_LOOP(name, ...) name##_loop<T>,
template <class T>
constexpr Loops<T> all_loops() {
  return {
      integer_loops<T, int8_t>(),
      integer_loops<T, uint8_t>(),
      integer_loops<T, int16_t>(),
      integer_loops<T, uint16_t>(),
#include "loop_list.h"
  };
}

#ifndef QATFAST_BF16
constexpr InstructionSet instruction_set_named(const char* name) {
  return {name, all_loops<float>(), all_loops<double>(), all_loops<c10::Half>(), all_loops<c10::BFloat16>(),
      mask_loop<uint16_t>, mask_loop<uint32_t>, mask_loop<uint64_t>, fake_quantize_loop<float, c10::Half>,
      fake_quantize_loop<float, c10::BFloat16>, scale_sums_loop, requantize_loop<int32_t>, requantize_loop<float>,
      depthwise_loop, depthwise_gradients_loop};
}
#endif

} // namespace
} // namespace qatfast::cpu
