"""Small inputs with expected results, computed by hand and by another implementation."""

import json
from pathlib import Path

import pytest
import torch

from qatfast import Fixed, PerChannel, QATConfig, QATLinear, QuantSpec, quantize

EXAMPLES = json.loads(Path(__file__).with_name("worked_examples.json").read_text())


def parametrize(key, name="case"):
    cases = EXAMPLES[key]["cases"]
    return pytest.mark.parametrize(name, cases, ids=[case["title"].replace(" ", "_") for case in cases])


def close(actual, expected):
    torch.testing.assert_close(actual.cpu(), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def grid_of(case, device):
    """Returns (scale, zero_point, quant_min, quant_max)."""
    scale = torch.tensor(case["scale"], device=device)
    zero_point = torch.tensor(case["zero_point"], dtype=torch.int32, device=device)
    return scale, zero_point, case["quant_min"], case["quant_max"]


@parametrize("T1")
def test_fixed_ranges(ops, case, device):
    x = torch.tensor(case["x"], device=device, requires_grad=True)
    grid = grid_of(case, device)
    q = ops.quantize(x, *grid)
    assert q.tolist() == case["codes"]
    y = ops.fake_quantize_affine(x, *grid)
    close(y.detach(), case["values"])
    close(ops.dequantize(q, *grid[:2]), case["values"])
    y.sum().backward()
    assert x.grad.tolist() == case["gradient"]


@pytest.mark.parametrize(
    "case", [case for case in EXAMPLES["T1"]["cases"] if "lo" in case], ids=lambda case: case["title"]
)
def test_the_grid_of_a_known_range(ops, case, device):
    ends = torch.tensor([case["lo"], case["hi"]], device=device)
    scale, zero_point = ops.choose_qparams(ends, case["num_bits"])
    close(scale, case["scale"])
    assert zero_point.item() == case["zero_point"]


def test_an_integer_layer(ops, device):
    case = EXAMPLES["T8"]["cases"][0]
    x, weight = (torch.tensor([case[name]], device=device) for name in ("x", "weight"))
    weight_scale, zero = ops.choose_qparams(weight, 8, symmetric=True)
    close(weight_scale, case["weight_scale"])
    w = ops.quantize(weight, weight_scale, zero, -127, 127)
    assert w.tolist() == [case["weight_codes"]]  # the second is a tie, -63.5
    scale = torch.tensor(case["input_scale"], device=device)
    zero_point = torch.tensor(case["input_zero_point"], device=device)
    q = ops.quantize(x, scale, zero_point, 0, 255)
    assert q.tolist() == [case["input_codes"]]
    acc = ((q.int() - zero_point) * w.int()).sum()
    assert acc.item() == case["acc"]
    y = acc.float() * (scale * weight_scale)
    close(y, case["y_without_bias"])
    close(y + case["bias"], case["y"])


def test_a_layer_is_that_arithmetic_on_the_range_of_its_input(ops, device):
    case = EXAMPLES["T8"]["cases"][0]
    config = QATConfig(QuantSpec(8), QuantSpec(8, symmetric=True), None, None)
    weight, bias = torch.tensor([case["weight"]], device=device), torch.tensor([case["bias"]], device=device)
    x = torch.tensor([[-1.0, 255 * case["input_scale"] - 1.0]], device=device)  # the range of the example
    scale, zero_point = ops.choose_qparams(x)
    assert (scale.item(), zero_point.item()) == (case["input_scale"], case["input_zero_point"])
    x = torch.cat([x, torch.tensor([case["x"]], device=device)])
    y = ops.qat_linear(x, weight, bias, config=config)
    close(y[1], [case["y"]])


@parametrize("T9")
def test_onnx_quantize_and_dequantize(ops, case, device):
    x = torch.tensor(case["x"], device=device)
    scale = torch.tensor(case["scale"], device=device) if "scale" in case else ops.choose_qparams(x)[0]
    zero_point = torch.tensor(0, dtype=torch.int32, device=device)
    ends = case.get("quant_min", 0), case.get("quant_max", 255)
    q = ops.quantize(x, scale, zero_point, *ends)
    assert q.tolist() == (case["codes"] if "codes" in case else case["y"])
    close(ops.dequantize(q, scale, zero_point), [float(value) for value in case.get("y", case["x"])])


def test_a_layer_whose_output_is_requantized():
    case = EXAMPLES["T8"]["cases"][0]
    chain = case["in_a_chain"]
    config = QATConfig(
        input=QuantSpec(range=Fixed(-1.0, 191 / 64)),
        weight=QuantSpec(symmetric=True, granularity=PerChannel(0)),
        bias=None,
        output=QuantSpec(range=Fixed(-1.28, 1.27)),
    )
    layer = QATLinear(2, 1, config=config).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([case["weight"]]))
        layer.bias.fill_(case["bias"])
    assert [float(value) for value in layer.input_quantizer.grid(layer.weight)] == [
        case["input_scale"],
        case["input_zero_point"],
    ]
    y = layer(torch.tensor([case["x"]])).detach()
    scale, zero_point = layer.output_quantizer.grid(y)
    assert (round(float(scale), 6), int(zero_point)) == (chain["output_scale"], chain["output_zero_point"])
    assert int(quantize(y, scale, zero_point, 0, 255)) == chain["code"]
    assert abs(float(y) - chain["value"]) < 1e-6
