"""convert(form="quantized_decomposed"): PyTorch's operators that quantize and dequantize."""

import pytest
import torch
import torch._inductor
from torch._dynamo.utils import counters

import qatfast
from qatfast import MinMax, PerChannel, QATConfig, QuantSpec
from test_onnx import convolutions, encoder, mlp, residual

ROWS = QuantSpec(8, symmetric=True, granularity=PerChannel(0))
CONFIGS = {
    "static": None,
    "4 bits": QATConfig.static(4),
    "symmetric": QATConfig.static(activations="symmetric"),
    "dynamic": QATConfig.dynamic(),
    "int8": QATConfig.int8(),
    "groups": QATConfig.weight_only(4, 8),
    "affine weight": QATConfig(QuantSpec(8, range=MinMax()), QuantSpec(8), None, None),
}


def as_tuple(inputs):
    return inputs if isinstance(inputs, tuple) else (inputs,)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_a_step_apart_at_most(config):
    model, x = mlp(config)
    converted = qatfast.convert(model, form="quantized_decomposed")
    y = model(x)
    steps = (converted(x) - y).abs() / (y.amax() - y.amin()) * 255
    assert steps.max() < 2
    assert steps.mean() < 0.01


@pytest.mark.parametrize("network", [mlp, residual, encoder, convolutions])
@torch.no_grad()
def test_the_exported_program_has_pytorchs_operators_only(network):
    model, inputs = network()
    converted = qatfast.convert(model, form="quantized_decomposed")
    program = torch.export.export(converted, as_tuple(inputs))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    names = {str(target) for target in targets}
    assert not any("qatfast" in name for name in names)
    assert {
        "quantized_decomposed.quantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_channel.default",
    } <= names
    assert "aten.to.dtype" not in names  # it would hide the patterns
    result, expected = (f(*as_tuple(inputs)) for f in (program.module(), model))
    if isinstance(result, dict):
        result, expected = result["result"], expected["result"]
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.slow
@torch.no_grad()
def test_inductor_replaces_the_patterns_by_kernels_on_integers():
    model, x = mlp()
    converted = qatfast.convert(model, form="quantized_decomposed")
    counters.clear()
    with torch._inductor.config.patch(freezing=True):
        y = torch.compile(torch.export.export(converted, (x,)).module())(x)
    torch.testing.assert_close(y, converted(x), rtol=1e-5, atol=1e-6)
    has_patterns = torch.__version__ < (2, 14)  # torchao has them since
    if has_patterns and torch.cpu._is_avx512_supported():
        assert counters["inductor"]["qlinear_weight_prepack_matcher_count"] == 3


@pytest.mark.slow
@torch.no_grad()
def test_aotinductor_packages_the_model(tmp_path):
    model, x = mlp()
    converted = qatfast.convert(model, form="quantized_decomposed")
    program = torch.export.export(converted, (x,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.testing.assert_close(
        torch._inductor.aoti_load_package(package)(x), converted(x), rtol=1e-5, atol=1e-6
    )
