// The launch of the kernel for dynamic ranges (dynamic_quantize.cuh), which fake_quantize, choose_qparams and
// qat_linear share.
#pragma once

#include "launchers.h"

namespace qatfast::cuda {

struct DynamicTask {
  at::Tensor from;
  at::Tensor to; // undefined if only the ranges are needed
  QuantSpec spec;
  at::Tensor scale; // undefined, as zero_point, if it is not needed
  at::Tensor zero_point;
};

// Runs one or two tensors of one dtype; of two, the first is the larger. No tensor is empty unless only ranges are
// needed.
void launch_dynamic_quantize(c10::ArrayRef<DynamicTask> tasks);

} // namespace qatfast::cuda
