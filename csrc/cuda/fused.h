// The launch of the fused kernel (blocks.cuh), which serves fake_quantize, choose_qparams and qat_linear.
#pragma once

#include "../kernels.h"

namespace qatfast::cuda {

struct FusedTask {
  at::Tensor from;
  at::Tensor to; // undefined: only the ranges are wanted
  QuantSpec spec;
  at::Tensor scale; // with zero_point; undefined: not wanted
  at::Tensor zero_point;
};

// One or two tensors of one dtype, none empty but where only ranges are wanted; of two, the first is the larger.
void launch_fused(c10::ArrayRef<FusedTask> tasks);

} // namespace qatfast::cuda
