// The Python module: direct entry points, which go through the dispatcher but save eager callers the overhead of
// torch.ops, and what the kernels run on.
#include "kernels.h"
#include "ops.h"

#include <torch/csrc/Exceptions.h>
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

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace op = qatfast::op;
  m.def("fake_quantize", direct(op::fake_quantize));
  m.def("fake_quantize_affine", direct(op::fake_quantize_affine));
  m.def("choose_qparams", direct(op::choose_qparams));
  m.def("quantize", direct(op::quantize));
  m.def("dequantize", direct(op::dequantize));
  m.def(
      "qat_linear",
      [](const at::Tensor& input,
         const at::Tensor& weight,
         const std::optional<at::Tensor>& bias,
         at::IntArrayRef input_spec,
         at::IntArrayRef weight_spec,
         at::IntArrayRef bias_spec,
         at::IntArrayRef output_spec) {
        return direct(op::qat_linear)(
            input, weight, bias, input_spec, weight_spec, bias_spec, output_spec, std::nullopt);
      });
  m.def("instruction_set", &qatfast::cpu::instruction_set);
}
