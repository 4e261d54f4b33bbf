#include "launchers.h"
#include "cpu/simd/loops.h"

#include <ATen/Version.h>

#include <cstdlib>

namespace qatfast::cpu {

const InstructionSet& chosen() {
  static const InstructionSet best = [] {
#ifdef __x86_64__
    const auto capability = at::get_cpu_capability();
    if (capability == "AVX512") {
      InstructionSet set = avx512;
      if (std::getenv("ATEN_CPU_CAPABILITY")) {
        return set;
      }
      if (__builtin_cpu_supports("avx512bf16")) {
        set.name = "AVX512, BF16";
        set.bf16 = avx512_bf16;
      }
      if (__builtin_cpu_supports("avx512vnni")) {
        set.dot_products = avx512_vnni;
      }
      return set;
    }
    if (capability == "AVX2") {
      return avx2;
    }
#endif
    return baseline;
  }();
  return best;
}

const char* instruction_set() {
  return chosen().name;
}

} // namespace qatfast::cpu
