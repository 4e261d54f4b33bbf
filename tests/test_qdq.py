"""convert(form="quantized_decomposed"): PyTorch's operators that quantize and dequantize."""

from importlib.util import find_spec

import pytest
import torch
import torch._inductor
from torch._dynamo.utils import counters

import qatfast
from qatfast import MinMax, PerChannel, PerGroup, PerTensor, QATConfig, QuantSpec
from qatfast.qdq import with_float_weights, with_uint8_activations
from test_onnx import convolutions, encoder, mlp, randn, residual

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


def calls(network, config=None):
    """Returns the calls of PyTorch's q/dq operators in the exported program, by name, and the program."""
    model, x = network(config)
    program = torch.export.export(qatfast.convert(model, form="quantized_decomposed"), (x,))
    found = {}
    for node in program.graph.nodes:
        if str(node.target).startswith("quantized_decomposed"):
            found.setdefault(str(node.target).split(".")[1], []).append(node)
    return found, program


def test_integers_and_zero_points_have_the_dtypes_of_executorchs_kernels():
    found, program = calls(residual)
    for name in ("quantize_per_tensor", "dequantize_per_tensor"):
        assert {node.args[3:] for node in found[name]} == {(-128, 127, torch.int8)}
        assert all(-128 <= node.args[2] <= 127 for node in found[name])
    names = program.graph_signature.inputs_to_buffers
    buffers = dict(program.named_buffers())
    zero_points = [buffers[names[node.args[2].name]] for node in found["dequantize_per_channel"]]
    assert {zero_point.dtype for zero_point in zero_points} == {torch.int64}


@pytest.mark.parametrize("config", [QATConfig.static(4), QATConfig.static(4, activations="symmetric")])
@torch.no_grad()
def test_the_bounds_of_the_dtype_suffice(config):
    """XNNPACK's kernels know no others."""
    found, program = calls(mlp, config)
    assert {node.args[3:5] for node in found["quantize_per_tensor"]} != {(-128, 127)}
    x = 3 * randn(64, 32)
    expected = program.module()(x)
    for node in found["quantize_per_tensor"] + found["dequantize_per_tensor"]:
        node.args = (*node.args[:3], -128, 127, *node.args[5:])
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=0)


def test_the_zero_point_of_a_weight_is_plain_arithmetic():
    """XNNPACK ignores that of the operators."""
    for granularity in (PerTensor(), PerChannel(0), PerGroup(8)):
        weight = QuantSpec(8, granularity=granularity)
        found, _ = calls(mlp, QATConfig(QuantSpec(8, range=MinMax()), weight, None, None))
        inputs = {node.args[0].op for node in found["dequantize_per_tensor"]}
        assert inputs == {"call_function"}
        assert found.keys() == {"quantize_per_tensor", "dequantize_per_tensor"}


def test_dynamic_ranges_per_token_are_operators():
    found, _ = calls(mlp, QATConfig.dynamic())
    assert [len(found[name]) for name in ("choose_qparams_per_token_asymmetric", "quantize_per_token")] == [
        3,
        3,
    ]


@pytest.mark.parametrize("network", [mlp, residual, encoder])
@torch.no_grad()
def test_a_program_that_quantizes_its_weights(network):
    model, x = network()
    program = torch.export.export(qatfast.convert(model, form="quantized_decomposed"), (x,)).module()
    result = with_float_weights(program)
    assert torch.equal(result(x), program(x))
    weights = [n for n in result.graph.nodes if str(n.target).startswith("quantized_decomposed.dequantize")]
    assert all(str(n.args[0].target).startswith("quantized_decomposed.quantize") for n in weights)


@pytest.mark.parametrize("network", [mlp, residual, encoder])
@torch.no_grad()
def test_a_program_with_uint8_activations(network):
    model, x = network()
    program = torch.export.export(qatfast.convert(model, form="quantized_decomposed"), (x,)).module()
    result = with_uint8_activations(program)
    assert torch.equal(result(x), program(x))
    operators = torch.ops.quantized_decomposed
    for name in ("quantize_per_tensor", "dequantize_per_tensor"):
        nodes = result.graph.find_nodes(op="call_function", target=getattr(operators, name).default)
        assert {node.args[3:] for node in nodes} == {(0, 255, torch.uint8)}


EXECUTORCH = find_spec("executorch") is not None


@pytest.mark.skipif(not EXECUTORCH, reason="the package executorch is not installed")
@pytest.mark.parametrize("config", ["static", "4 bits", "symmetric", "dynamic", "affine weight"])
@torch.no_grad()
def test_executorch_gives_the_results_of_the_model(config):
    import executorch.kernels.quantized  # noqa: F401  operators outside of the partitions
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    model, x = mlp(CONFIGS[config])
    program = torch.export.export(qatfast.convert(model, form="quantized_decomposed"), (x,))
    lowered = to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    file = lowered.to_executorch().buffer
    loaded = Runtime.get().load_program(file)  # both must outlive the method
    result = loaded.load_method("forward").execute((x,))[0]
    torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "kind", "count"), [(mlp, "qlinear", 3), (residual, "qconv", 5)])
@torch.no_grad()
def test_inductor_replaces_the_patterns_by_kernels_on_integers(network, kind, count):
    model, x = network()
    converted = qatfast.convert(model, form="quantized_decomposed")
    counters.clear()
    with torch._inductor.config.patch(freezing=True):
        program = with_uint8_activations(torch.export.export(converted, (x,)).module())
        y = torch.compile(program)(x)
    torch.testing.assert_close(y, converted(x), rtol=1e-5, atol=1e-6)
    has_patterns = torch.__version__ < (2, 14)  # torchao has them since
    if has_patterns and torch.cpu._is_avx512_supported():
        assert counters["inductor"][f"{kind}_weight_prepack_matcher_count"] == count


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
