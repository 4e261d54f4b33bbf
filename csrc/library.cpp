// Every schema and every registration, from operator_list.h.
#include "operators.h"

#include <ATen/core/enum_tag.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <vector>

namespace qatfast {

TORCH_LIBRARY(qatfast, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};
#define QATFAST_OPERATOR(name, devices, gradient, schema, ...) m.def(#name schema, tags);
#include "operator_list.h"
}

TORCH_LIBRARY_IMPL(qatfast, CPU, m) {
#define QATFAST_OPERATOR(name, ...) m.impl(#name, kernel::name);
#include "operator_list.h"
}

#ifdef QATFAST_CUDA
TORCH_LIBRARY_IMPL(qatfast, CUDA, m) {
#define QATFAST_ON_all(name) m.impl(#name, kernel::name);
#define QATFAST_ON_cpu(name)
#define QATFAST_OPERATOR(name, devices, ...) QATFAST_ON_##devices(name)
#include "operator_list.h"
}
#endif

TORCH_LIBRARY_IMPL(qatfast, Autograd, m) {
#define QATFAST_GRADIENT_node(name) m.impl(#name, autograd::name);
#define QATFAST_GRADIENT_none(name) m.impl(#name, op::name.below_autograd);
#define QATFAST_GRADIENT_undefined(name) m.impl(#name, torch::autograd::autogradNotImplementedFallback());
#define QATFAST_OPERATOR(name, devices, gradient, ...) QATFAST_GRADIENT_##gradient(name)
#include "operator_list.h"
}

namespace {

void register_autocast(torch::Library& m) {
  m.impl("qat_linear", autocast::qat_linear);
  m.impl("qat_linear_int8", autocast::qat_linear_int8);
}

} // namespace

TORCH_LIBRARY_IMPL(qatfast, AutocastCPU, m) {
  register_autocast(m);
}

#ifdef QATFAST_CUDA
TORCH_LIBRARY_IMPL(qatfast, AutocastCUDA, m) {
  register_autocast(m);
}
#endif

} // namespace qatfast
