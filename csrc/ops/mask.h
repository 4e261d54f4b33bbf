// The mask of a gradient that passes for some elements only: what autograd nodes of static ranges share.
#pragma once

#include "common/layout.h"
#include "ops/autograd.h"

#include <vector>

namespace qatfast {

// One bit per element of `x`.
int64_t mask_bytes(const Tensor& x);
Tensor fresh_mask(const Tensor& x);

namespace autograd {

// The strides of a tensor whose memory has the order of the mask's bits.
std::vector<c10::SymInt> strides_of_mask(const Tensor& output, at::IntArrayRef granularity);

// Saves what masked() needs.
void save_mask(AutogradContext* ctx, const Tensor& mask, c10::SymIntArrayRef stride);

// Returns the gradient where the mask is set, else zero; undefined for an undefined gradient. Returns `grad` itself if
// the mask is known to have no zeros.
Variable masked(AutogradContext* ctx, const Variable& grad);

} // namespace autograd
} // namespace qatfast
