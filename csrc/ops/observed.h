// The range that a module keeps, as operators take it.
#pragma once

#include "launchers.h"

namespace qatfast {

// The stored range of `input`, checked.
ObservedRange checked_range(const char* op, const at::Tensor& input, const QuantSpec& spec,
    const at::Tensor& running_min, const at::Tensor& running_max, const at::Tensor& num_batches,
    double averaging_constant);

// After a write: one that autograd would not see makes a gradient from the old values silently wrong.
void bump_version(const at::Tensor& written);
void bump_versions(const ObservedRange& range);

} // namespace qatfast
