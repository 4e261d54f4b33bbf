// The loops: included once by each of targets/*.cpp, except avx512_vnni.cpp, which has those of dot products only. A
// target sets the vector size QATFAST_VECTOR_BYTES and the compiler's target first (QATFAST_BF16: bfloat16 only, with
// its own instructions). Internal linkage throughout: code for one instruction set must never be linked into another's.
// Ends of runs are vectors too, masked or padded, so that there is no scalar twin. The files have no include guards and
// include nothing of each other: this is their order.
#include "vec-inl.h"
//
#include "grids-inl.h"
#include "range-inl.h"
//
#include "qparams-inl.h"
//
#include "fake_quantize-inl.h"
#include "relu-inl.h"
#include "mask-inl.h"
//
#include "sum-inl.h"
#include "integer-inl.h"
#include "convolution-inl.h"
#include "depthwise-inl.h"
//
#include "table-inl.h"
