"""qatfast.onnx: the file is compared with the model in onnxruntime, with all optimizations."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatfast

INTEGER_KERNELS = {"QGemm", "QLinearConv", "MatMulIntegerToFloat"}


def trained(model, *inputs, **arguments):
    """Returns the prepared model after three batches of training."""
    torch.manual_seed(0)
    qatfast.prepare(model, example_inputs=inputs, **arguments).train()
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
