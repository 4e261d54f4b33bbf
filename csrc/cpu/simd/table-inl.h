// The table of all loops of one instruction set.

namespace qatfast::cpu {
namespace {

template <class T, class Q>
constexpr IntegerLoops<T, Q> integer_loops() {
  return {quantize_loop<T, Q>, dequantize_loop<T, Q>};
}

template <class T>
constexpr Loops<T> all_loops() {
  return {{widen_loop<T>, range_of_rows_loop<T>, range_of_columns<T>, choose_loop<T>, factor_loop<T>,
              choose_qparams_loop<T>, fake_quantize_loop<T>, fake_quantize_mask_loop<T>, fake_quantize_range_loop<T>,
              inside_loop<T>},
      {learned_gradients_loop<T>, squared_errors_loop<T>, approximate_errors_loop<T>},
      {quantize_rows_loop<T>, epilogue_loop<T>}, integer_loops<T, int8_t>(), integer_loops<T, uint8_t>(),
      integer_loops<T, int16_t>(), integer_loops<T, uint16_t>()};
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
