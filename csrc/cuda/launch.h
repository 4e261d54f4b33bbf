// What the CUDA launchers share: device attributes, numbers of CTAs.
#pragma once

#include "launchers.h"
#include "cuda/plan.h"

#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

namespace qatfast::cuda {

inline int64_t attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// The number of CTAs that are resident together.
inline int64_t resident_ctas(int64_t threads, int device) {
  return attribute(cudaDevAttrMultiProcessorCount, device) * attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device) /
      threads;
}

// The number of CTAs for one unit per thread, but no more than are resident together: the kernels loop. At least one,
// as a launch of none is an error.
inline unsigned ctas_for(int64_t units, int64_t threads, int device) {
  return static_cast<unsigned>(std::clamp<int64_t>((units + threads - 1) / threads, 1, resident_ctas(threads, device)));
}

} // namespace qatfast::cuda
