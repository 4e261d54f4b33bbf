// The Python module: direct entry points, which go through the dispatcher but save eager callers the overhead of
// torch.ops, and what the kernels run on.
#include "cuda/plan.h"
#include "kernels.h"
#include "ops.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

namespace {

// The GIL is released while the operator runs; C++ errors arrive as their Python types.
template <class Name, class Result, class... Args>
auto direct(qatfast::op::Operator<Name, Result(Args...)> op) {
  return [op](Args... args) -> Result {
    HANDLE_TH_ERRORS
    pybind11::gil_scoped_release no_gil;
    return op(args...);
    END_HANDLE_TH_ERRORS_PYBIND
  };
}

#ifdef QATFAST_CUDA
constexpr bool has_cuda = true;
#else
constexpr bool has_cuda = false;
#endif

// Whether all arguments are plain dense tensors on a device with kernels, and no mode or functorch transform must see
// the call.
PyObject* takes(PyObject*, PyObject* const* args, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!THPVariable_CheckExact(args[i])) {
      Py_RETURN_FALSE;
    }
    const auto& tensor = THPVariable_Unpack(args[i]);
    if (!(tensor.is_cpu() || (has_cuda && tensor.is_cuda())) || tensor.layout() != at::kStrided || tensor.is_nested()) {
      Py_RETURN_FALSE;
    }
  }
  const bool watched = at::impl::torch_function_mode_enabled() ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
  return PyBool_FromLong(!watched);
}

// How the CUDA kernels divide a tensor, for tests without a device.
pybind11::dict cuda_plan(int64_t outer, int64_t blocks, int64_t inner, int64_t item_size, bool quantizes,
    int64_t multiprocessors, int64_t shared_memory, bool cooperative) {
  using namespace pybind11::literals;
  const qatfast::cuda::DeviceLimits device{multiprocessors, shared_memory, multiprocessors, cooperative};
  const auto plan = qatfast::cuda::plan_of({outer, blocks, inner}, item_size, quantizes, device);
  return pybind11::dict("columns"_a = plan.columns, "threads"_a = plan.threads, "width"_a = plan.width,
      "tiles"_a = plan.tiles, "team"_a = plan.team, "tile_blocks"_a = plan.tile_blocks,
      "units_per_run"_a = plan.units_per_run, "grid"_a = plan.grid, "cached"_a = plan.cached,
      "shared_bytes"_a = plan.shared_bytes, "barrier"_a = plan.barrier, "launches"_a = plan.launches(),
      "partials"_a = plan.partials());
}

PyMethodDef methods[] = {
    {"takes", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(takes)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace op = qatfast::op;
  m.def("fake_quantize", direct(op::fake_quantize));
  m.def("fake_quantize_affine", direct(op::fake_quantize_affine));
  m.def("choose_qparams", direct(op::choose_qparams));
  m.def("quantize", direct(op::quantize));
  m.def("dequantize", direct(op::dequantize));
  m.def("qat_linear",
      [](const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
          at::IntArrayRef input_spec, at::IntArrayRef weight_spec, at::IntArrayRef bias_spec,
          at::IntArrayRef output_spec) {
        return direct(op::qat_linear)(
            input, weight, bias, input_spec, weight_spec, bias_spec, output_spec, std::nullopt);
      });
  PyModule_AddFunctions(m.ptr(), methods);
  m.attr("has_cuda") = has_cuda;
  using pybind11::arg;
  m.def("cuda_plan", &cuda_plan, arg("outer"), arg("blocks"), arg("inner"), arg("item_size"), arg("quantizes"),
      arg("multiprocessors"), arg("shared_memory"), arg("cooperative"));
  m.def("instruction_set", &qatfast::cpu::instruction_set);
}
