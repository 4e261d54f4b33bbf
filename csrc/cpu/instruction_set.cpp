#include "../kernels.h"
#include "loops.h"

#include <ATen/Version.h>

namespace qatfast::cpu {

const InstructionSet& chosen() {
  static const InstructionSet& best = []() -> const InstructionSet& {
#ifdef __x86_64__
    const auto capability = at::get_cpu_capability();
    if (capability == "AVX512") {
      return avx512;
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
