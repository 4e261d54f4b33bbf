// What the two ways of a linear layer, on floats and on int8, share.
#pragma once

#include "common/qparams.h"
#include "ops/autograd.h"
#include "ops/blocks.h"

#include <optional>

namespace qatfast {
namespace autograd {

// A gradient may be sparse, as that of a table of embeddings is.
Tensor as_dense(const Tensor& grad);

// (..., features) as (rows, features).
Tensor as_rows(const Tensor& x);

// dy.T @ x_hat. A large result that is not differentiated lies in large pages.
Tensor weight_gradient(const Tensor& dy, const Tensor& x_hat, bool is_differentiated);

// fake_quantize with the spec of `code`; `x` itself if it stays in float.
Tensor fake_quantized(const Tensor& x, at::IntArrayRef code);

bool is_any_dual(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias);

// The result `value` of a layer with the derivatives of its product on floats: of every order, in both modes.
Tensor with_derivatives_of_product(const Tensor& value, const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias, at::IntArrayRef specs);

inline Variable kept_if(bool is_needed, const Variable& x) {
  return is_needed ? x : Variable();
}

} // namespace autograd

namespace autocast {

// The dtype of the product under autocast. Returns nothing if a tensor is float64, which autocast leaves alone.
std::optional<at::ScalarType> product_dtype(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias);

} // namespace autocast
} // namespace qatfast
