// Copies of tensors in another order of memory.
#pragma once

#include "common/memory.h"

namespace qatfast {
namespace cpu {

// to = from, of the same shape and dtype; `to` is dense. at::copy_ takes twice as long for every other element, and
// three times as long for most orders of dimensions.
void copy(const at::Tensor& from, const at::Tensor& to);

} // namespace cpu

// Returns `to` after to = from.
inline const at::Tensor& copied(const at::Tensor& from, const at::Tensor& to) {
  if (from.is_cpu()) {
    cpu::copy(from, to);
  } else {
    to.copy_(from);
  }
  return to;
}

// x.contiguous()
inline at::Tensor contiguous(const at::Tensor& x) {
  return x.is_contiguous() ? x : copied(x, fresh(x.sizes(), x.scalar_type(), x));
}

} // namespace qatfast
