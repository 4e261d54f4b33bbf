#include "launchers.h"
#include "cpu/simd/loops.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <cstdlib>

namespace qatfast::cpu {

// A build with sanitizers is WITHOUT the files of targets/ that setup.py leaves out.
const InstructionSet& chosen() {
  static const InstructionSet best = [] {
    [[maybe_unused]] const auto capability = at::get_cpu_capability();
#if defined(__x86_64__) && !defined(QATFAST_WITHOUT_AVX512)
    if (capability == "AVX512") {
      InstructionSet set = avx512;
      if (std::getenv("ATEN_CPU_CAPABILITY")) {
        return set;
      }
#ifndef QATFAST_WITHOUT_AVX512_BF16
      if (__builtin_cpu_supports("avx512bf16")) {
        set.name = "AVX512, BF16";
        set.bf16 = avx512_bf16;
      }
#endif
      if (__builtin_cpu_supports("avx512vnni")) {
        set.dot_products = avx512_vnni;
      }
      return set;
    }
#endif
#if defined(__x86_64__) && !defined(QATFAST_WITHOUT_AVX2)
    if (capability == "AVX2") {
      return avx2;
    }
#endif
#ifndef QATFAST_WITHOUT_BASELINE
    return baseline;
#else
    TORCH_CHECK(false, "qatfast was built with sanitizers for another CPU capability than ", capability);
#endif
  }();
  return best;
}

const char* instruction_set() {
  return chosen().name;
}

} // namespace qatfast::cpu
