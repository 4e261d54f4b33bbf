// Any processor: 16-byte vectors (SSE2, NEON).
#include "cpu/simd/loops.h"

#define QATFAST_VECTOR_BYTES 16
#include "cpu/simd/all-inl.h"

namespace qatfast::cpu {
extern const InstructionSet baseline = instruction_set_named("baseline");
} // namespace qatfast::cpu
