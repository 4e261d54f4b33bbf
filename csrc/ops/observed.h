// The range that a module keeps, as operators take it.
#pragma once

#include "launchers.h"

namespace qatfast {

// The stored range of `input`, checked.
ObservedRange checked_range(const char* op, const at::Tensor& input, const QuantSpec& spec,
    const at::Tensor& running_min, const at::Tensor& running_max, const at::Tensor& num_batches,
    double averaging_constant);

// Tells autograd that the tensor has new values, so that a backward that saved the old ones raises.
void bump_version(const at::Tensor& written);
void bump_versions(const ObservedRange& range);

} // namespace qatfast
