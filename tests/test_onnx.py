"""qatfast.onnx: the file is compared with the model in onnxruntime, with all optimizations."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatfast
from qatfast import (
    Fixed,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConfig,
    QATLinear,
    QuantSpec,
    fake_quantize,
    fake_quantize_affine,
    quantize,
)
from qatfast.onnx.verify import saturates

EXAMPLES = json.loads(Path(__file__).with_name("worked_examples.json").read_text())["T9"]["cases"]
INTEGER_KERNELS = {"QGemm", "QLinearConv", "MatMulIntegerToFloat"}


def exact_here(config):
    """Returns the config with weights of 7 bits if products with those of 8 saturate on this processor."""
    if not saturates() or config.weight.num_bits != 8:
        return config
    return replace(config, weight=replace(config.weight, num_bits=7))


def trained(model, *inputs, config=None):
    """Returns the prepared model after three batches of training."""
    torch.manual_seed(0)
    config = exact_here(config or QATConfig.static())
    arguments = {"edges": None} if saturates() else {}
    qatfast.prepare(model, config, example_inputs=inputs, **arguments).train()
    for _ in range(3):
        model(*inputs)
    return model.eval()


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def mlp(config=None):
    x = randn(64, 32)
    net = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 48), nn.ReLU6(), nn.Linear(48, 10)
    )
    return trained(net, x, config=config), x


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, groups=2, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def residual(config=None):
    x = randn(8, 3, 32, 32)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU6(), Block(16, 32, 2), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(32, 10)),
    )
    return trained(net, x, config=config), x


def encoder(config=None):
    x = randn(8, 12, 32)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return trained(nn.TransformerEncoder(layer, 2), x, config=config), x


def export(model, inputs, tmp_path, **arguments):
    path = tmp_path / "model.onnx"
    report = qatfast.onnx.export(model, inputs, path, **arguments)
    onnx.checker.check_model(path, full_check=True)
    return report, onnx.load(path)


def run(path, *inputs, options=None):
    session = onnxruntime.InferenceSession(str(path), options)
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))


def nodes(file, op_type):
    return [node for node in file.graph.node if node.op_type == op_type]


def initializers(file):
    return {tensor.name: tensor for tensor in file.graph.initializer}


@pytest.mark.parametrize("network", [mlp, residual, encoder])
def test_no_integer_differs(network, tmp_path):
    model, x = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report, _ = export(model, x, tmp_path)
    assert report.compared > 190_000
    assert report.differing == 0
    assert report.float_differing <= 1e-4 * report.float_compared
    assert report.error < 1e-5
    assert set(report.fused.values()) <= INTEGER_KERNELS | {"float"}
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_report_says_that_onnxruntime_saturates(tmp_path):
    layer = QATLinear(64, 16, config=QATConfig(QuantSpec(8, range=Fixed(0, 1)), ROWS, None, None))
    with torch.no_grad():
        layer.weight.fill_(1.0)
    report, _ = export(layer.eval(), torch.ones(4, 64), tmp_path)
    assert (report.differing > 0) == saturates() == ("saturates" in str(report))


def test_every_layer_of_a_chain_multiplies_integers(tmp_path):
    model, x = mlp()
    report, file = export(model, x, tmp_path)
    assert report.fused == {"0": "QGemm", "3": "QGemm", "5": "MatMulIntegerToFloat"}
    assert [node.op_type for node in file.graph.node if node.op_type != "DequantizeLinear"] == [
        *("QuantizeLinear", "Gemm", "QuantizeLinear", "Gemm", "QuantizeLinear", "MatMul", "Sum"),
    ]
    assert all(
        len(node.input) == 3 for node in nodes(file, "QuantizeLinear") + nodes(file, "DequantizeLinear")
    )
    assert report.nodes == len(file.graph.node)
    assert report.bytes == (tmp_path / "model.onnx").stat().st_size
    x = randn(1000, 32) * 2
    np.testing.assert_array_equal(run(tmp_path / "model.onnx", x)[0], model(x).detach().numpy())


def test_the_integers_of_a_residual_network(tmp_path):
    model, x = residual()
    report, file = export(model, x, tmp_path)
    assert "float" not in report.fused.values()
    assert not nodes(file, "Add")  # onnxruntime would replace it between DequantizeLinear and QuantizeLinear
    assert len(nodes(file, "Sum")) == 2
    dequantized = {node.output[0] for node in nodes(file, "DequantizeLinear")}
    assert not any(node.input[0] in dequantized for node in nodes(file, "QuantizeLinear"))  # the shortcut's
    assert not nodes(file, "Clip")  # ReLU6 is that of the integers: its grid ends below 6
    np.testing.assert_allclose(run(tmp_path / "model.onnx", x)[0], model(x).detach(), rtol=1e-5, atol=1e-6)


ROWS = QuantSpec(8, symmetric=True, granularity=PerChannel(0))
STATIC = {
    "4 bits": (QATConfig.static(4), INTEGER_KERNELS),
    "symmetric": (QATConfig.static(activations="symmetric"), INTEGER_KERNELS),
    "affine weight": (QATConfig(QuantSpec(8, range=MinMax()), QuantSpec(8), None, None), INTEGER_KERNELS),
    "int32": (QATConfig(QuantSpec(8, range=Fixed(-3, 4)), ROWS, "int32", None), INTEGER_KERNELS),
    "groups": (
        QATConfig(QuantSpec(8, range=MinMax()), QuantSpec(4, granularity=PerGroup(8)), None, None),
        {"float", "MatMulNBits"},
    ),
    "12 bits": (QATConfig.static(12), {"float"}),
    "output": (
        QATConfig(QuantSpec(8, range=MinMax()), ROWS, None, QuantSpec(6, range=MinMax())),
        INTEGER_KERNELS,
    ),
}


@pytest.mark.parametrize("name", STATIC)
def test_static_configs(name, tmp_path):
    config, kernels = STATIC[name]
    model, x = mlp(config)
    report, _ = export(model, x, tmp_path)
    assert report.compared > 10_000
    assert report.differing == 0
    assert report.float_differing <= 1e-4 * report.float_compared
    assert report.error < 1e-5
    assert set(report.fused.values()) <= kernels


@pytest.mark.parametrize(
    "config",
    [
        None,
        QATConfig.dynamic(),
        QATConfig.int8(),
        QATConfig.static(4),
        QATConfig(QuantSpec(8), QuantSpec(6), "int32"),
    ],
    ids=["static", "dynamic", "int8", "4 bits", "int32"],
)
def test_the_form_integer_has_the_bits_of_the_model(config, tmp_path):
    model, x = mlp(config)
    report, file = export(model, x, tmp_path, form="integer")
    assert (report.compared > 0, report.differing, report.float_compared, report.error) == (True, 0, 0, 0.0)
    assert {node.op_type for node in file.graph.node} >= {"MatMulInteger"}
    x = randn(500, 32) * 3
    np.testing.assert_array_equal(run(tmp_path / "model.onnx", x)[0], model(x).detach().numpy())


def test_dynamic_ranges_per_tensor_are_dynamicquantizelinear(tmp_path):
    model, x = mlp(QATConfig.int8())
    _, file = export(model, x, tmp_path, form="integer")
    assert len(nodes(file, "DynamicQuantizeLinear")) == 3


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.joined = nn.Conv2d(16, 8, 3, groups=2, dilation=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2, output_padding=1)
        self.padded = nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect")
        self.line = nn.Conv1d(4, 3, 3)
        self.rows = nn.Embedding(10, 3)

    def forward(self, x, index):
        y = torch.cat([F.relu(self.left(x)), F.relu6(self.right(x))], 1)
        y = self.padded(F.relu(self.up(F.relu(self.joined(y)))))
        return {"result": self.line(y.mean(2)).mean(-1) + self.rows(index)}


def convolutions(config=None):
    inputs = randn(4, 3, 16, 16), torch.tensor([0, 9, 3, 3])
    return trained(Convolutions(), *inputs, config=config), inputs


@pytest.mark.parametrize("form", ["qdq", "integer"])
@pytest.mark.parametrize(
    "config",
    [None, QATConfig(QuantSpec(8, range=MinMax()), QuantSpec(6, granularity=PerChannel(0)), None, None)],
    ids=["static", "affine weight"],
)
def test_convolutions_of_all_kinds(form, config, tmp_path):
    model, inputs = convolutions(config)
    report, _ = export(model, inputs, tmp_path, form=form)
    assert report.compared > 100_000
    assert report.differing == 0
    assert report.float_differing <= 1e-3 * report.float_compared
    assert report.error < 1e-5
    assert report.fused["joined"] == ("QLinearConv" if form == "qdq" else "ConvInteger")


def test_a_transposed_convolution_of_large_sums_is_an_error_in_the_form_integer(tmp_path):
    model = nn.Sequential(nn.ConvTranspose1d(2800, 1, 1))
    nn.init.constant_(model[0].weight, 1.0)
    x = randn(2, 2800, 3)
    with pytest.raises(ValueError, match=r"sums below 2\^24 .* in '0'; write form='qdq'"):
        export(trained(model, x), x, tmp_path, form="integer")


def test_relu_that_its_grid_does_not_hold(tmp_path):
    """The zero point of the reader is not quant_min: integers are clipped there."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU6(), nn.Linear(16, 4))
    config = QATConfig(QuantSpec(8, range=Fixed(-4, 12)), ROWS, None, None)
    x = randn(32, 16) * 8
    model = trained(model, x, config=config)
    report, file = export(model, x, tmp_path)
    (clip,) = nodes(file, "Clip")
    low, high = (onnx.numpy_helper.to_array(initializers(file)[name]) for name in clip.input[1:])
    scale = np.float32(16) / np.float32(255)
    assert (int(low), int(high)) == (round(4 / scale), round(4 / scale) + round(6 / scale))
    assert set(report.fused.values()) <= INTEGER_KERNELS
    assert report.differing == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_of_four_bits(symmetric, tmp_path):
    weight = QuantSpec(4, symmetric, PerGroup(32), narrow_range=not symmetric)
    model = qatfast.prepare(nn.Linear(256, 64), QATConfig(weight=weight, bias=None, output=None), edges=None)
    report, file = export(model, randn(8, 256), tmp_path)
    (tensor,) = (tensor for tensor in initializers(file).values() if list(tensor.dims) == [256, 64])
    assert tensor.data_type == (onnx.TensorProto.INT4 if symmetric else onnx.TensorProto.UINT4)
    assert report.fused == {"": "MatMulNBits"}
    assert "session.qdq_matmulnbits_accuracy_level=1" in str(report)
    assert report.error < 1e-5
    assert report.bytes < 0.25 * 256 * 64 * 4


def test_quantizers_of_the_models_own(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = qatfast.FakeQuantize(range=Fixed(-1, 2), granularity=PerChannel(1))
            self.linear = QATLinear(6, 5, config=exact_here(QATConfig.static()))

        def forward(self, x, scale=2.0):
            return {"y": self.linear(self.first(x)) * scale}

    model, x = Net(), randn(7, 6)
    model(x)
    report, _ = export(model.eval(), {"x": x}, tmp_path)
    assert (report.differing, report.compared > 0) == (0, True)
    np.testing.assert_array_equal(run(tmp_path / "model.onnx", x)[0], model(x)["y"].detach().numpy())


@pytest.mark.parametrize("opset", [21, 22, 23])
def test_opsets_and_the_size_of_a_batch(opset, tmp_path):
    model, x = mlp()
    _, file = export(model, x[:1], tmp_path, opset=opset, dynamic_batch=opset != 23)
    assert [entry.version for entry in file.opset_import if entry.domain == ""] == [opset]
    (size,) = (value.type.tensor_type.shape.dim[0] for value in file.graph.input)
    assert (size.dim_value, bool(size.dim_param)) == ((1, False) if opset == 23 else (0, True))
    x = randn(1 if opset == 23 else 5, 32)
    np.testing.assert_array_equal(run(tmp_path / "model.onnx", x)[0], model(x).detach().numpy())


def test_the_file_says_what_it_was_made_of(tmp_path):
    model, x = mlp()
    _, file = export(qatfast.convert(model), x, tmp_path)
    metadata = {entry.key: entry.value for entry in file.metadata_props}
    assert metadata["qatfast.version"] == qatfast.__version__
    assert metadata["qatfast.form"] == "qdq"
    assert json.loads(metadata["qatfast.config"]).keys() == {"0", "3", "5"}
    assert str(Path(__file__).parent).encode() not in (tmp_path / "model.onnx").read_bytes()


def test_half_precision(tmp_path):
    model, x = mlp()
    report, _ = export(model.half(), x.half(), tmp_path)
    assert (report.differing, report.compared > 0) == (0, True)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"form": "onnx"}, ValueError, "expected form to be 'qdq' or 'integer', got 'onnx'"),
        ({"opset": 20}, ValueError, "expected opset to be from 21 to 23, got 20"),
        ({"opset": 24}, ValueError, "expected opset to be from 21 to 23, got 24"),
        ({"opset": True}, TypeError, "expected opset to be an int, got True"),
        ({"dynamic_batch": 1}, TypeError, "expected dynamic_batch to be a bool, got 1"),
        ({"model": nn.Linear(2, 2)}, TypeError, "expected a model with quantized layers"),
        ({"model": 3}, TypeError, "expected model to be an nn.Module, got 3"),
        ({"example_inputs": [1]}, TypeError, "expected example_inputs to be a tensor, a tuple"),
    ],
)
def test_errors(change, error, text, tmp_path):
    arguments = {"model": mlp()[0], "example_inputs": randn(2, 32), "path": tmp_path / "model.onnx"} | change
    with pytest.raises(error, match=text):
        qatfast.onnx.export(**arguments)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    "config, text",
    [
        (QATConfig.dynamic(), r"got config.input=8-bit affine per token of '0'.*form='integer'"),
        (
            QATConfig(QuantSpec(8, range=MinMax()), ROWS, None, QuantSpec(8)),
            "got config.output=8-bit .* of '0'",
        ),
    ],
)
def test_dynamic_ranges_are_an_error_in_the_form_qdq(config, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        export(*mlp(config), tmp_path)


def test_float64_is_an_error(tmp_path):
    model, x = mlp()
    with pytest.raises(
        ValueError, match="expected a model in float32, float16 or bfloat16, got float64 in '0'"
    ):
        export(model.double(), x.double(), tmp_path)


@pytest.mark.parametrize("function", ["export(model, x, 'model.onnx')", "translations()"])
def test_without_the_extra(function):
    code = (
        "import sys; sys.modules['onnxscript'] = None\n"
        "import qatfast, torch\n"
        "model, x = qatfast.prepare(torch.nn.Linear(2, 2)), torch.ones(2, 2)\n"
        f"try: qatfast.onnx.{function}\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    name = function.partition("(")[0]
    assert result.stdout.strip() == (
        f"qatfast.onnx.{name}: expected the package onnxscript, which is not installed; run pip install 'qatfast[onnx]'"
    )


# translations


class Function(nn.Module):
    def __init__(self, function, *arguments, **keywords):
        super().__init__()
        self.function, self.arguments, self.keywords = function, arguments, keywords

    def forward(self, x):
        y = self.function(x, *self.arguments, **self.keywords)
        return y.float() if y.dtype != x.dtype else y


def translated(model, *inputs, path):
    with torch.no_grad():
        program = torch.onnx.export(
            model.eval(),
            inputs,
            dynamo=True,
            custom_translation_table=qatfast.onnx.translations(),
            verbose=False,
        )
    program.save(path)
    return run(path, *inputs)[0]


@pytest.mark.parametrize(
    "case", [case for case in EXAMPLES if "scale" in case], ids=lambda case: case["title"]
)
def test_worked_examples(case, tmp_path):
    x, scale = torch.tensor(case["x"]), torch.tensor(case["scale"])
    grid = (scale, torch.tensor(0, dtype=torch.int32), case.get("quant_min", 0), case.get("quant_max", 255))
    codes = case.get("codes", case["y"])
    assert translated(Function(quantize, *grid), x, path=tmp_path / "q.onnx").tolist() == codes
    values = translated(Function(fake_quantize_affine, *grid), x, path=tmp_path / "y.onnx")
    np.testing.assert_allclose(values, case["y"], rtol=1e-6)


def test_a_tensor_of_zeros(tmp_path):
    (case,) = (case for case in EXAMPLES if "rules" in case)
    x = torch.tensor(case["x"])
    np.testing.assert_array_equal(translated(Function(fake_quantize), x, path=tmp_path / "y.onnx"), x.numpy())


@pytest.mark.parametrize(
    "num_bits, granularity",
    [(5, PerTensor()), (8, PerChannel(1)), (12, PerChannel(0)), (5, PerToken()), (5, PerGroup(8))],
    ids=str,
)
def test_functions(num_bits, granularity, tmp_path):
    model = Function(fake_quantize, num_bits, granularity=granularity)
    x = randn(6, 32)
    np.testing.assert_array_equal(translated(model, x, path=tmp_path / "y.onnx"), model(x).numpy())


@pytest.mark.parametrize(
    "config",
    [QATConfig.static(), QATConfig.dynamic(), QATConfig.tutorial(), QATConfig.weight_only(4, 8)],
    ids=["static", "dynamic", "tutorial", "weight only"],
)
def test_plain_export_of_linear_layers(config, tmp_path):
    model, x = mlp(config)
    np.testing.assert_allclose(
        translated(model, x, path=tmp_path / "y.onnx"), model(x).detach(), rtol=1e-5, atol=1e-6
    )


def test_plain_export_of_converted_convolutions(tmp_path):
    model, inputs = convolutions()
    y = translated(qatfast.convert(model), *inputs, path=tmp_path / "y.onnx")
    np.testing.assert_allclose(y, model(*inputs)["result"].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_a_model_in_bfloat16_is_exported_and_not_compared(form, tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16(), randn(4, 8).bfloat16()
    model = qatfast.prepare(model, example_inputs=x)
    model(x)
    report = qatfast.onnx.export(model, x, tmp_path / "model.onnx", form=form)
    assert (tmp_path / "model.onnx").exists() and report.nodes > 5 and report.compared == 0
    assert report.notes == ("Nothing was compared: onnxruntime has no kernels for bfloat16 on the CPU.",)
