#ifdef __x86_64__
#include "cpu/simd/loops.h"

#include <immintrin.h>

#include <cstring>
#include <limits>
#include <utility>

#define QATFAST_VECTOR_BYTES 32
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "cpu/simd/all-inl.h"
//
#include "cpu/simd/pair_product-inl.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace qatfast::cpu {
extern const InstructionSet avx2 = instruction_set_named("AVX2");
extern const PairProductLoops avx2_pair_products = {
    pack_pairs_loop, levels_loop<int8_t>, levels_loop<uint8_t>, pair_product_loop};
} // namespace qatfast::cpu
#endif
