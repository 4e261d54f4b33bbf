// What the CUDA launchers share: the device's limits, grids of thread blocks.
#pragma once

#include "../kernels.h"
#include "plan.h"

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

// Thread blocks for one unit a thread, as many as are resident together at the most; the kernels loop.
inline unsigned blocks_for(int64_t units, int64_t threads, int device) {
  const int64_t resident = attribute(cudaDevAttrMultiProcessorCount, device) *
      attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device) / threads;
  return static_cast<unsigned>(std::min((units + threads - 1) / threads, resident));
}

} // namespace qatfast::cuda
