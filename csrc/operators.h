// Every operator of operator_list.h as a C++ callable: `op::` calls it through the dispatcher, `kernel::` is what runs
// on a device, and `autograd::` is what runs on the Autograd key if results of the operator can require grad.
// Definitions: ops/*.cpp.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymIntArrayRef.h>

#include <array>
#include <optional>
#include <tuple>

namespace qatfast {

using at::Tensor;

template <class Name, class Signature>
struct Operator;

template <class Name, class Result, class... Args>
struct Operator<Name, Result(Args...)> {
  Result operator()(Args... args) const {
    static const auto handle =
        c10::Dispatcher::singleton().findSchemaOrThrow(Name::value, "").template typed<Result(Args...)>();
    return handle.call(args...);
  }

  // The kernel on the Autograd key of an operator whose results never require grad.
  static Result below_autograd(Args... args) {
    at::AutoDispatchBelowADInplaceOrView below;
    return Operator{}(args...);
  }
};

#define QATFAST_OPERATOR(name, devices, gradient, schema, ...)     \
  namespace op {                                                   \
  struct name##_name {                                             \
    static constexpr const char* value = "qatfast::" #name;        \
  };                                                               \
  using name##_signature = __VA_ARGS__;                            \
  inline constexpr Operator<name##_name, name##_signature> name{}; \
  }                                                                \
  namespace kernel {                                               \
  op::name##_signature name;                                       \
  }                                                                \
  namespace autograd {                                             \
  op::name##_signature name;                                       \
  }
#include "operator_list.h"

// What runs on the autocast keys.
namespace autocast {
op::qat_linear_signature qat_linear;
op::qat_linear_int8_signature qat_linear_int8;
} // namespace autocast

} // namespace qatfast
