// The Python module: direct entry points, which go through the dispatcher but save eager callers the overhead of
// torch.ops (and, as METH_FASTCALL, that of pybind11), and what the kernels run on.
#include "checks.h"
#include "cpu/simd/loops.h"
#include "cuda/plan.h"
#include "launchers.h"
#include "operators.h"
#include "ops/int8_gemm.h"
#include "ops/int8_windows.h"
#include "ops/qat_linear_int8.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/SmallVector.h>
#include <c10/util/irange.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/python_numbers.h>

#include <array>
#include <tuple>
#include <utility>

namespace {

// An argument as Python gives it, and its place for messages.
struct Given {
  PyObject* object;
  const char* function;
  size_t index;

  void check(bool is_legal, const char* expected) const {
    check(is_legal, expected, object);
  }
  void check(bool is_legal, const char* expected, PyObject* found) const {
    TORCH_CHECK_TYPE(
        is_legal, function, ": expected argument ", index + 1, " to be ", expected, ", got ", Py_TYPE(found)->tp_name);
  }
};

// What a type is called in messages.
template <class T>
constexpr const char* type_name = nullptr;
template <>
constexpr const char* type_name<bool> = "a bool";
template <>
constexpr const char* type_name<int64_t> = "an int";
template <>
constexpr const char* type_name<double> = "a number";
template <>
constexpr const char* type_name<at::ScalarType> = "a dtype";
template <>
constexpr const char* type_name<std::optional<at::Tensor>> = "a tensor or None";
template <>
constexpr const char* type_name<std::optional<double>> = "a number or None";
template <>
constexpr const char* type_name<std::optional<at::ScalarType>> = "a dtype or None";
template <>
constexpr const char* type_name<c10::SymIntArrayRef> = "a tuple of integers";
template <>
constexpr const char* type_name<std::array<bool, 3>> = "three bools";

// An argument as C++ takes it.
template <class Arg>
struct Argument {
  pybind11::detail::make_caster<Arg> caster;

  explicit Argument(const Given& given) {
    constexpr auto type = type_name<std::decay_t<Arg>>;
    static_assert(type != nullptr);
    given.check(caster.load(given.object, true), type);
  }
  operator Arg() {
    return pybind11::detail::cast_op<Arg>(caster);
  }
};

// torch's own caster takes a reference, which costs as much as an allocation.
template <>
struct Argument<const at::Tensor&> {
  const at::Tensor* tensor;

  explicit Argument(const Given& given) {
    given.check(THPVariable_Check(given.object), "a tensor");
    tensor = &THPVariable_Unpack(given.object);
  }
  operator const at::Tensor&() const {
    return *tensor;
  }
};

// torch's own caster asks of each integer whether it is a tensor: 10,000 instructions for the four specs of a layer.
template <>
struct Argument<at::IntArrayRef> {
  c10::SmallVector<int64_t, 16> integers;

  explicit Argument(const Given& given) {
    given.check(PyTuple_Check(given.object), "a tuple of integers");
    for (const auto i : c10::irange(PyTuple_GET_SIZE(given.object))) {
      integers.push_back(THPUtils_unpackLong(PyTuple_GET_ITEM(given.object, i)));
    }
  }
  operator at::IntArrayRef() const {
    return integers;
  }
};

template <>
struct Argument<at::TensorList> {
  c10::SmallVector<at::Tensor, 4> tensors;

  explicit Argument(const Given& given) {
    given.check(PyTuple_Check(given.object), "a tuple of tensors");
    for (const auto i : c10::irange(PyTuple_GET_SIZE(given.object))) {
      PyObject* const tensor = PyTuple_GET_ITEM(given.object, i);
      given.check(THPVariable_Check(tensor), "a tuple of tensors", tensor);
      tensors.push_back(THPVariable_Unpack(tensor));
    }
  }
  operator at::TensorList() const {
    return tensors;
  }
};

template <class... Args, class Function, size_t... I>
PyObject* call_with(
    const char* name, Function function, PyObject* const* args, Py_ssize_t count, std::index_sequence<I...>) {
  TORCH_CHECK_TYPE(count <= static_cast<Py_ssize_t>(sizeof...(Args)), name, ": expected at most ", sizeof...(Args),
      " arguments, got ", count);
  const auto given = [&](size_t i) { // one that is missing at the end is None
    return Given{static_cast<Py_ssize_t>(i) < count ? args[i] : Py_None, name, i};
  };
  std::tuple<Argument<Args>...> arguments{given(I)...};
  auto result = [&] {
    pybind11::gil_scoped_release no_gil;
    return function(static_cast<Args>(std::get<I>(arguments))...);
  }();
  return pybind11::cast(std::move(result)).release().ptr();
}

template <class Name, class Result, class... Args>
PyObject* call(qatfast::Operator<Name, Result(Args...)> op, PyObject* const* args, Py_ssize_t count) {
  constexpr auto name = Name::value + sizeof("qatfast::") - 1;
  return call_with<Args...>(name, op, args, count, std::index_sequence_for<Args...>{});
}

// A function that is no operator.
template <class Signature>
struct Function {
  const char* name;
  Signature* run;
};
template <class Signature>
Function(const char*, Signature*) -> Function<Signature>;

template <class Result, class... Args>
PyObject* call(const Function<Result(Args...)>& function, PyObject* const* args, Py_ssize_t count) {
  return call_with<Args...>(function.name, function.run, args, count, std::index_sequence_for<Args...>{});
}

// The GIL is released while the operator runs; C++ errors arrive as their Python types.
template <const auto& op>
PyObject* direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return call(op, args, count);
  END_HANDLE_TH_ERRORS
}

#ifdef QATFAST_CUDA
constexpr bool has_cuda = true;
#else
constexpr bool has_cuda = false;
#endif

// Whether all arguments are plain dense tensors on a device with kernels, and no mode or functorch transform must see
// the call.
bool takes_all(PyObject* const* args, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!THPVariable_CheckExact(args[i])) {
      return false;
    }
    const auto& tensor = THPVariable_Unpack(args[i]);
    if (!(tensor.is_cpu() || (has_cuda && tensor.is_cuda())) || tensor.layout() != at::kStrided || tensor.is_nested() ||
        tensor.is_quantized()) {
      return false;
    }
  }
  return !at::impl::torch_function_mode_enabled() &&
      !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

PyObject* takes(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return PyBool_FromLong(takes_all(args, count));
}

// fake_quantize_observed with its spec as a code, for FakeQuantize.forward: a small tensor spends most of its time in
// Python. Returns None if the arguments need torch.ops or the reference, and in a backward, where a range does not
// move.
PyObject* forward_observed(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr Py_ssize_t tensors = 4;
  TORCH_CHECK_TYPE(count == tensors + 2, "forward_observed: expected 6 arguments, got ", count);
  if (!takes_all(args, tensors) || torch::autograd::get_current_graph_task_id() != -1) {
    Py_RETURN_NONE;
  }
  const auto tensor = [&](Py_ssize_t i) -> const at::Tensor& {
    return THPVariable_Unpack(args[i]);
  };
  const auto averaging_constant = THPUtils_unpackDouble(args[tensors]);
  const Argument<at::IntArrayRef> code({args[tensors + 1], "forward_observed", tensors + 1});
  const auto spec = qatfast::checked_spec("fake_quantize_observed", code);
  TORCH_CHECK_VALUE(spec, "fake_quantize_observed: expected a spec, got none");
  auto result = [&] {
    pybind11::gil_scoped_release no_gil;
    return qatfast::op::fake_quantize_observed(tensor(0), tensor(1), tensor(2), tensor(3), averaging_constant,
        spec->num_bits, spec->symmetric, at::IntArrayRef(code).slice(2), spec->narrow_range);
  }();
  return pybind11::cast(std::move(result)).release().ptr();
  END_HANDLE_TH_ERRORS
}

// Functions that are no operators.
constexpr Function observed_layer{"qat_linear_int8_observed", &qatfast::qat_linear_int8_observed};
constexpr Function matrix_product{"int8_mm", &qatfast::int8_mm};
constexpr Function sums_of_convolution{"int8_conv_sums", &qatfast::int8_conv_sums};
constexpr Function requantizing_layer{"int8_linear_requantized", &qatfast::int8_linear_requantized};

// Returns the state that weight_cache._state compares, as bytes. Returns None if the weight is no plain parameter on a
// device with kernels, or if a mode, a hook or a transform sees the call: then Python computes it.
PyObject* weight_state(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 1, "weight_state: expected 1 argument, got ", count);
  if (Py_TYPE(args[0]) != reinterpret_cast<PyTypeObject*>(ParameterClass)) {
    Py_RETURN_NONE;
  }
  const auto& weight = THPVariable_Unpack(args[0]);
  if (!(weight.is_cpu() || (has_cuda && weight.is_cuda())) || weight.layout() != at::kStrided ||
      weight.is_inference() || weight.is_nested() ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer) ||
      c10::impl::TorchDispatchModeTLS::stack_len() != 0 || at::impl::PythonTorchFunctionTLS::stack_len() != 0 ||
      at::SavedTensorDefaultHooks::get_hooks()) {
    Py_RETURN_NONE;
  }
  const auto device = weight.device();
  const auto stream = device.is_cpu() ? 0 : c10::impl::VirtualGuardImpl(device.type()).getStream(device).id();
  const auto& storage = weight.storage();
  c10::SmallVector<int64_t, 12> state = {reinterpret_cast<intptr_t>(storage.unsafeGetStorageImpl()),
      reinterpret_cast<intptr_t>(storage.data()), weight.storage_offset(), weight._version(),
      static_cast<int64_t>(weight.scalar_type()), weight.requires_grad(), stream};
  state.append(weight.sizes().begin(), weight.sizes().end());
  state.append(weight.strides().begin(), weight.strides().end());
  return PyBytes_FromStringAndSize(
      reinterpret_cast<const char*>(state.data()), static_cast<Py_ssize_t>(state.size() * sizeof(int64_t)));
  END_HANDLE_TH_ERRORS
}

// How the CUDA kernels divide a tensor, for tests without a device.
pybind11::dict cuda_plan(int64_t outer, int64_t blocks, int64_t inner, int64_t item_size, int64_t skipped,
    bool quantizes, int64_t multiprocessors, int64_t shared_memory, bool cooperative) {
  using namespace pybind11::literals;
  const qatfast::cuda::DeviceLimits device{multiprocessors, shared_memory, multiprocessors, cooperative};
  const auto plan = qatfast::cuda::plan_of({{outer, blocks, inner}, item_size, skipped}, quantizes, device);
  return pybind11::dict("columns"_a = plan.columns, "threads"_a = plan.threads, "width"_a = plan.width,
      "tiles"_a = plan.tiles, "team"_a = plan.team, "tile_blocks"_a = plan.tile_blocks,
      "units_per_run"_a = plan.units_per_run, "grid"_a = plan.grid, "cached"_a = plan.cached,
      "shared_bytes"_a = plan.shared_bytes, "all_held"_a = plan.all_held, "barrier"_a = plan.barrier,
      "launches"_a = plan.launches(), "partials"_a = plan.partials());
}

using Method = PyObject*(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef method(const char* name, Method* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

namespace op = qatfast::op;

PyMethodDef methods[] = {
    method("takes", takes),
    method("weight_state", weight_state),
    method("forward_observed", forward_observed),
    method(observed_layer.name, direct<observed_layer>),
    method(matrix_product.name, direct<matrix_product>),
    method(sums_of_convolution.name, direct<sums_of_convolution>),
    method(requantizing_layer.name, direct<requantizing_layer>),
#define QATFAST_OPERATOR(name, ...) method(#name, direct<op::name>),
#include "operator_list.h"
    {nullptr, nullptr, 0, nullptr},
};

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  PyModule_AddFunctions(m.ptr(), methods);
  m.attr("has_cuda") = has_cuda;
  m.attr("most_depthwise_taps") = qatfast::cpu::most_depthwise_taps;
  using pybind11::arg;
  m.def("cuda_plan", &cuda_plan, arg("outer"), arg("blocks"), arg("inner"), arg("item_size"), arg("skipped"),
      arg("quantizes"), arg("multiprocessors"), arg("shared_memory"), arg("cooperative"));
  m.def("instruction_set", &qatfast::cpu::instruction_set);
  m.attr("has_dot_products") = qatfast::cpu::has_dot_products();
  m.attr("has_pair_products") = qatfast::cpu::has_pair_products();
  m.attr("prefers_pair_products") = qatfast::cpu::prefers_pair_products();
}
