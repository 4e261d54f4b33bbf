#include "launchers.h"
#include "cpu/simd/loops.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <cstdlib>

namespace qatfast::cpu {
namespace {

#if defined(__x86_64__) && !defined(QATFAST_WITHOUT_AVX2)
// Dot products of int8 without AVX-512. Older compilers do not know the name of this extension.
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

} // namespace

// A build with sanitizers is WITHOUT the files of targets/ that setup.py leaves out.
const InstructionSet& chosen() {
  static const InstructionSet best = [] {
    [[maybe_unused]] const auto capability = at::get_cpu_capability();
#if defined(__x86_64__) && !defined(QATFAST_WITHOUT_AVX512)
    if (capability == "AVX512") {
      InstructionSet set = avx512;
#ifndef QATFAST_WITHOUT_AVX2
      set.pair_products = avx2_pair_products;
      set.prefers_pair_products = !__builtin_cpu_supports("avx512vnni");
#endif
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
      InstructionSet set = avx2;
      set.pair_products = avx2_pair_products;
      set.prefers_pair_products = std::getenv("ATEN_CPU_CAPABILITY") || !has_avx_vnni();
      return set;
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
