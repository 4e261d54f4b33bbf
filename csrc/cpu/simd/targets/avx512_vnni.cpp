#ifdef __x86_64__
#include "cpu/simd/loops.h"

#include <immintrin.h>

#include <cstring>
#include <limits>
#include <utility>

#define QATFAST_VECTOR_BYTES 64
#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // GCC's own intrinsics start from an undefined register
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
#include "cpu/simd/vec-inl.h"
//
#include "cpu/simd/depthwise_dot_product-inl.h"
#include "cpu/simd/pointwise-inl.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace qatfast::cpu {
extern const DotProductLoops avx512_vnni = {pack_row_loop, depthwise_dot_product_loop, pointwise_dot_product_loop};
} // namespace qatfast::cpu
#endif
