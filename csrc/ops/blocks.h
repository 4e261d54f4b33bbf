// Tensors as launchers take them: dense, and with their blocks where layout_of() finds them.
#pragma once

#include "common/memory.h"
#include "common/qparams.h"

#include <c10/util/DimVector.h>

namespace qatfast {

using at::Tensor;

// A new tensor of this dtype in the strides of `x`.
Tensor fresh_like(const Tensor& x, at::ScalarType dtype);

// `x` if its memory is laid out as a Layout says, or a copy that is.
Tensor as_blocks(const Tensor& x, Granularity granularity);

// `values`, which are laid out as_blocks, in the strides of empty_like(x).
Tensor laid_out_like(const Tensor& x, const Tensor& values, Granularity granularity);

// The dimensions of scale and zero point in the order in which the blocks of `x`, as_blocks, lie in memory. Returns an
// empty vector if that is the order that they have.
at::DimVector block_order(const Tensor& x, Granularity granularity);

// Returns scale and zero point in the order in which the blocks of `x`, as_blocks, lie in memory.
QParams in_memory_order(const QParams& qparams, const Tensor& x, Granularity granularity);

// Memory for the result of `from`, which is as_blocks(x): `from` itself if it is a copy, which nobody else sees.
Tensor result_for(const Tensor& x, const Tensor& from);

// fake_quantize of checked arguments.
Tensor fake_quantized(const Tensor& x, const QuantSpec& spec);

// Whether the launcher of fake_quantize may write the result for `x` in this other dtype.
bool rounds_to(const Tensor& x, at::ScalarType dtype);

// Returns `x` in this dtype. It skips a conversion that does nothing, which costs a small layer a percent.
inline Tensor as_dtype(const Tensor& x, at::ScalarType dtype) {
  return x.scalar_type() == dtype ? x : x.to(dtype);
}

} // namespace qatfast
