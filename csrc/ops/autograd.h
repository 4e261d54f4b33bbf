// What the autograd nodes of operators share. Nodes call operators, never kernels, so that fake tensors, torch.compile
// and the profiler see every step, and so that gradients have gradients.
#pragma once

#include "operators.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <optional>

namespace qatfast::autograd {

using torch::autograd::AutogradContext;
using torch::autograd::compute_requires_grad;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Whether `x` has a tangent (forward-mode AD, which grad mode does not switch off).
bool is_dual(const Tensor& x);

// `x` without its tangent: torch::autograd::Function takes no dual tensors.
Tensor primal_of(const Tensor& x);

// Gives `y` a tangent, which must not share memory with another tensor: a later write into `y` writes into it.
const Tensor& with_tangent(const Tensor& y, const Tensor& tangent);

// Raises ValueError if `scale` requires grad or has a tangent: a static scale gets no gradient, and the call would drop
// it silently.
void check_fixed(const char* op, const Tensor& scale);

// `value` with the gradient and the tangent of `x`.
Tensor straight_through(const Tensor& x, const Tensor& value);

// A backward that nobody differentiates skips the autograd keys of its operators, which saves 4 % of a small layer's
// step.
std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd_unless_needed(const Tensor& grad);

} // namespace qatfast::autograd
