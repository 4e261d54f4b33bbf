"""The quantized convolutions."""

import copy
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cases
import qatfast
from qatfast import (
    Fixed,
    Learned,
    MinMax,
    MovingAverage,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConfig,
    QATConv2d,
    QATConvTranspose2d,
    QuantSpec,
    cached_weights,
    calibrate,
    fake_quantize,
    int8_convolution,
    kernels,
    quantization_disabled,
)
from qatfast.convolution import of_batch
from qatfast.geometry import Geometry

EXAMPLES = json.loads(Path(__file__).with_name("worked_examples.json").read_text())
SYMMETRIC = QuantSpec(8, symmetric=True, granularity=PerChannel(0))
INT8 = {
    "int8": QATConfig.int8(),
    "per_sample": QATConfig.dynamic(),
    "affine_weight": QATConfig(QuantSpec(8), QuantSpec(8, granularity=PerChannel(0)), None, None),
    "symmetric_input": QATConfig(QuantSpec(7, symmetric=True), QuantSpec(4), None, None),
    "rows_as_groups": QATConfig(QuantSpec(8), QuantSpec(8, granularity=PerGroup(18)), None, None),
}
GEOMETRIES = {
    "plain": {},
    "padded": {"stride": 2, "padding": 1},
    "groups": {"groups": 2, "dilation": 2, "padding": 2},
    "wide": {"kernel_size": 1, "stride": 2},
}


def layer_of(dims, transposed, config, *, dtype=torch.float32, device="cpu", **arguments):
    torch.manual_seed(0)
    cls = getattr(qatfast, f"QATConv{'Transpose' if transposed else ''}{dims}d")
    return cls(4, 6, **{"kernel_size": 3, **arguments}, dtype=dtype, device=device, config=config)


def geometry_of(layer):
    return Geometry(
        layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups
    )


def float_formula(layer, x):
    """The layer on fake-quantized tensors, for configs without state."""
    config, geometry = layer.config, geometry_of(layer)
    x_hat = fake_quantize(x, **of_batch(config.input).arguments) if config.input else x
    rows = fake_quantize(geometry.to_rows(layer.weight), **config.weight.arguments)
    return geometry.convolve(x_hat, geometry.from_rows(rows, layer.weight.shape), layer.bias)


def exact_sums(x, weight, layer):
    """The convolution of int64 arrays, written out."""
    n, dims = x.shape[0], x.ndim - 2
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    size = geometry_of(layer).output_size(x.shape[2:], layer.kernel_size)
    result = np.zeros((n, layer.out_channels, *size), dtype=np.int64)
    steps = itertools.product(*map(range, x.shape[2:] if layer.transposed else size))
    for position, offset in itertools.product(list(steps), itertools.product(*map(range, layer.kernel_size))):
        other = tuple(
            position[i] * layer.stride[i] - layer.padding[i] + offset[i] * layer.dilation[i]
            for i in range(dims)
        )
        if not all(0 <= o < s for o, s in zip(other, size if layer.transposed else x.shape[2:], strict=True)):
            continue
        at_input, at_output = (position, other) if layer.transposed else (other, position)
        for g in range(layer.groups):
            rows, columns = slice(g * inputs, (g + 1) * inputs), slice(g * outputs, (g + 1) * outputs)
            values = x[(slice(None), rows, *at_input)]
            kernel = (
                weight[(rows, slice(None), *offset)].T
                if layer.transposed
                else weight[(columns, slice(None), *offset)]
            )
            result[(slice(None), columns, *at_output)] += values @ kernel.T
    return result


@pytest.fixture(params=["kernels", "windows", "windows_in_one_pass", "reference"])
def implementation(request, monkeypatch):
    """Selects what computes a convolution; "windows" are the ways of other devices, on the CPU."""
    if request.param == "reference":
        monkeypatch.setattr(kernels, "route", lambda *tensors: None)
    elif request.param == "windows":
        monkeypatch.setattr("qatfast.modules.conv.takes_one_pass", lambda *arguments: False)
    if request.param.startswith("windows"):
        monkeypatch.setattr(int8_convolution, "uses_windows", lambda input: True)
        monkeypatch.setattr(int8_convolution, "_CPU_WINDOW_BYTES", 1)  # each sample by itself
    return request.param


def test_padding_is_the_zero_point(implementation):
    case = EXAMPLES["T4"]
    weight = torch.tensor(case["weight"]["values"]).unsqueeze(1)
    layer = QATConv2d(1, 2, 3, padding=case["padding"], bias=False, config=QATConfig.int8())
    layer.load_state_dict({"weight": weight})
    y = layer(torch.tensor(case["input"]["x"])[None])
    torch.testing.assert_close(y.detach(), torch.tensor(case["y"]), rtol=1e-6, atol=1e-6)


def test_a_transposed_convolution_has_a_scale_per_output_channel():
    case = EXAMPLES["T5"]
    weight = QuantSpec(8, symmetric=True, granularity=PerChannel(0), range=MinMax())
    layer = QATConvTranspose2d(4, 4, 1, groups=2, config=QATConfig(None, weight, None, None))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(case["weight"]).reshape(case["weight_shape"]))
    layer(torch.ones(1, 4, 2, 2))
    quantizer = layer.weight_quantizer
    largest = torch.maximum(-quantizer.running_min, quantizer.running_max)
    torch.testing.assert_close(largest, torch.tensor(case["largest_of_each_output_channel"]))


@pytest.mark.parametrize("arguments", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_sums_are_exact(dims, transposed, arguments, implementation):
    layer = layer_of(dims, transposed, QATConfig.int8(), **arguments)
    x = cases.normal((2, 4, *(5,) * dims))
    y = layer(x)
    geometry = geometry_of(layer)
    scale, zero_point = qatfast.choose_qparams(x)
    q = qatfast.quantize(x, scale, zero_point, 0, 255).long() - zero_point
    rows = geometry.to_rows(layer.weight.detach())
    w_scale, _ = qatfast.choose_qparams(rows, 8, symmetric=True, granularity=PerChannel(0))
    w = qatfast.quantize(
        rows, w_scale, torch.zeros(6, dtype=torch.int32), -127, 127, granularity=PerChannel(0)
    )
    w = geometry.from_rows(w, layer.weight.shape).long()
    sums = torch.tensor(exact_sums(q.numpy(), w.numpy(), layer)).float()
    ones = (1,) * dims
    expected = sums * (scale * w_scale).reshape(1, -1, *ones) + layer.bias.detach().reshape(1, -1, *ones)
    cases.assert_same(y.detach(), expected)
    torch.testing.assert_close(y, float_formula(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("config", INT8.values(), ids=INT8)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_kernels_and_reference_agree(dtype, config, transposed, monkeypatch):
    layer = layer_of(2, transposed, config, dtype=dtype, groups=2, padding=1)
    x = cases.normal((3, 4, 6, 5), dtype)
    y = layer(x)
    assert y.dtype == dtype
    monkeypatch.setattr(kernels, "route", lambda *tensors: None)
    cases.assert_same(y.detach(), layer(x).detach())


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize(
    "config", [QATConfig.int8(), QATConfig.static(4), QATConfig.weight_only(4, 4)], ids=str
)
def test_padding(padding, padding_mode, config):
    if padding_mode != "zeros" and padding == "valid":
        pytest.skip("nothing is padded")
    torch.manual_seed(0)
    layer = QATConv2d(4, 6, (2, 3), padding=padding, padding_mode=padding_mode, config=config)
    x = cases.normal((2, 4, 5, 6), requires_grad=True)
    y = layer(x)
    geometry = Geometry((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    hats = [None, None]
    for i, (name, spec, tensor) in enumerate(
        (("input", config.input, x), ("weight", config.weight, geometry.to_rows(layer.weight)))
    ):
        quantizer = getattr(layer, f"{name}_quantizer", None)
        if spec is None:
            hats[i] = tensor
        elif quantizer is None:
            hats[i] = fake_quantize(tensor, **spec.arguments)
        else:
            hats[i] = quantizer(tensor)
    plain = nn.Conv2d(4, 6, (2, 3), padding=padding, padding_mode=padding_mode)
    expected = plain._conv_forward(hats[0], hats[1].view_as(layer.weight), layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    parameters = [x, *layer.parameters()]
    dy = torch.randn_like(y)
    for actual, wanted in zip(
        torch.autograd.grad(y, parameters, dy), torch.autograd.grad(expected, parameters, dy), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_a_nan_reaches_its_windows_only(implementation):
    layer = layer_of(2, False, QATConfig.int8())
    x = cases.normal((2, 4, 7, 7))
    x[1, 2, 3, 3] = float("nan")
    y = layer(x)
    expected = float_formula(layer, x).isnan()
    assert torch.equal(y.isnan(), expected) and expected.any() and not expected.all()
    with torch.no_grad():
        layer.weight[3, 0, 0, 0] = float("nan")
    nan = layer(x.nan_to_num()).isnan()
    assert nan[:, 3].all() and not nan[:, :3].any()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("range", [Fixed(-2, 2), MovingAverage(), Learned()], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_gradients_are_those_of_the_float_formula(transposed, range, memory_format):
    config = QATConfig(
        QuantSpec(8, range=range), QuantSpec(8, True, PerChannel(0), range=range), None, QuantSpec(8)
    )
    layer = layer_of(2, transposed, config, padding=1)
    x = cases.normal((2, 4, 6, 6)).contiguous(memory_format=memory_format).requires_grad_()
    for batch in (x.detach() / 4, x.detach() / 2):
        layer(batch)
    other = copy.deepcopy(layer)
    y = layer(x)
    geometry = geometry_of(other)
    x_hat, rows = other.input_quantizer(x), other.weight_quantizer(geometry.to_rows(other.weight))
    product = geometry.convolve(x_hat, geometry.from_rows(rows, other.weight.shape), other.bias)
    expected = fake_quantize(product)
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, expected, rtol=0, atol=float(y.detach().abs().max()) / 100)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    theirs = torch.autograd.grad(expected, [x, *other.parameters()], dy)
    for actual, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [None, QATConfig.weight_only(8, 9)], ids=["int8", "float"])
def test_a_result_may_be_written_in_place(config):
    layer, x = layer_of(2, False, config), cases.normal((2, 4, 6, 6))
    layer(x)
    qatfast.freeze(layer)
    found = []
    for inplace in (False, True):
        y = nn.ReLU(inplace)(layer(x))
        found.append(torch.autograd.grad(y, layer.weight, y.detach()))
    cases.assert_same(*(grads[0] for grads in found))


def test_second_derivatives():
    layer = layer_of(2, False, QATConfig.int8())
    x = cases.normal((2, 4, 5, 5), requires_grad=True)

    def second(y):
        parameters = [x, layer.weight]
        first = torch.autograd.grad((y * y).sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), parameters)

    for actual, wanted in zip(second(layer(x)), second(float_formula(layer, x)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-1)


def test_what_is_kept_for_backward():
    layer = layer_of(2, False, QATConfig.int8(), padding=1)
    x = cases.normal((8, 4, 16, 16), requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        layer(x)
    large = [t for t in kept.values() if t.untyped_storage().nbytes() > 200]
    assert sorted(t.untyped_storage().nbytes() for t in large) == sorted(
        [x.numel(), layer.weight.numel() * 4]
    )
    with torch.no_grad():
        y = layer(x)
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(4, 6, 6), (0, 4, 6, 6), (1, 4, 3, 3)], ids=cases.name)
@pytest.mark.parametrize(
    "config", [QATConfig.static(), QATConfig.dynamic(), QATConfig.weight_only(4, 4)], ids=str
)
def test_shapes(shape, config):
    layer = layer_of(2, False, config)
    y = layer(cases.normal(shape, requires_grad=True))
    assert y.shape == nn.Conv2d(4, 6, 3)(torch.zeros(shape)).shape
    y.sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape


def test_modes_of_a_range():
    layer = layer_of(2, False, None)
    x = cases.normal((2, 4, 6, 6))
    assert layer.config == QATConfig.static()
    with pytest.raises(RuntimeError, match=r"QATConv2d.input_quantizer: expected a range"):
        layer.eval()(x)
    with torch.no_grad(), calibrate(layer):
        cases.assert_same(layer(x), layer.to_float()(x))
    cases.assert_same(layer(x), layer.train()(x))
    with quantization_disabled(layer):
        cases.assert_same(layer(x), layer.to_float()(x))


CONVOLUTIONS = [cls for cls in qatfast.modules.QUANTIZED_LAYERS if issubclass(cls, nn.modules.conv._ConvNd)]


@pytest.mark.parametrize("cls", CONVOLUTIONS, ids=lambda cls: cls.__name__)
def test_from_float_and_to_float(cls):
    dims = int(cls.__name__[-2])
    arguments = {"stride": 2, "padding": 1, "groups": 2, "bias": False}
    if "Transpose" in cls.__name__:
        arguments["output_padding"] = 1
    module = cls(4, 6, 3, **arguments).eval()
    layer = qatfast.modules.QUANTIZED_LAYERS[cls].from_float(module, config=QATConfig.dynamic())
    x = cases.normal((2, 4, *(6,) * dims))
    assert layer.weight is module.weight and not layer.training
    torch.testing.assert_close(layer(x), module(x), rtol=0.1, atol=0.1)
    back = layer.to_float()
    assert type(back) is cls and back.weight is module.weight
    cases.assert_same(back(x), module(x))
    layer.config = QATConfig.static()
    layer.load_state_dict(module.state_dict())
    layer.train()(x)
    expected = layer.eval()(x)
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.from_float(layer)):
        cases.assert_same(same(x), expected)
    assert "config" in repr(layer) or "moving" in repr(layer).lower()


def test_what_cannot_be_quantized():
    class Own(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return input

    with pytest.raises(
        TypeError, match=r"QATConv2d.from_float: expected module to be an nn.Conv2d, got ReLU"
    ):
        QATConv2d.from_float(nn.ReLU())
    with pytest.raises(TypeError, match=r"expected the _conv_forward of nn.Conv2d, got Own"):
        QATConv2d.from_float(Own(1, 1, 1))


@pytest.mark.parametrize(
    "config, message",
    [
        (QATConfig(QuantSpec(8, granularity=PerChannel(-1))), "axis of config.input to be 1, got -1"),
        (QATConfig(None, QuantSpec(8, granularity=PerChannel(1))), "axis of config.weight to be 0, got 1"),
        (QATConfig.weight_only(4, 32), "divisible by group_size=32 of config.weight, got 36"),
        (
            QATConfig(QuantSpec(8, granularity=PerGroup(2))),
            "config.input per tensor, per channel or per token",
        ),
    ],
    ids=["input", "weight", "groups", "groups_of_input"],
)
def test_configs_that_do_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        QATConv2d(4, 6, 3, config=config)


def test_errors_change_nothing():
    layer = layer_of(2, False, None)
    before = copy.deepcopy(layer.state_dict())
    for x, kind, message in (
        (torch.zeros(2, 3, 6, 6), ValueError, r"QATConv2d: expected input to have shape \(N, 4, H, W\)"),
        (torch.zeros(2, 4, 6, 2), ValueError, "expected an input that is at least as large as the kernel"),
        (torch.zeros(2, 4, 6, 6).double(), TypeError, "QATConv2d: expected weight to be float64"),
    ):
        with pytest.raises(kind, match=message):
            layer(x)
    for name, value in layer.state_dict().items():
        cases.assert_same(value, before[name])
    with pytest.raises(TypeError, match="QATConv2d: expected config to be a QATConfig, got 8"):
        QATConv2d(4, 6, 3, config=8)
    with pytest.raises(TypeError, match="QATConv2d: expected bias to be a bool, got 8"):
        QATConv2d(4, 6, 3, bias=8)


@pytest.mark.parametrize(
    "config", [QATConfig.int8(), QATConfig.static(), QATConfig.weight_only(4, 4)], ids=str
)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_compiled(transposed, config, fresh_compiler):
    layer = layer_of(2, transposed, config, padding=1)
    x = cases.normal((2, 4, 6, 6), requires_grad=True)
    layer(x)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), layer(x)
    if config.input is not None:
        cases.assert_same(y.detach(), expected.detach())
    torch.testing.assert_close(y, expected)
    ours = torch.autograd.grad(y.square().sum(), [x, other.weight, other.bias])
    theirs = torch.autograd.grad(expected.square().sum(), [x, layer.weight, layer.bias])
    for actual, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_autocast_and_checkpoint():
    layer = layer_of(2, False, QATConfig.int8())
    x = cases.normal((2, 4, 6, 6), requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    cases.assert_same(y.detach(), layer(x).detach().bfloat16())
    static = layer_of(2, False, None)
    expected = copy.deepcopy(static)(x)
    y = checkpoint(static, x, use_reentrant=False)
    cases.assert_same(y.detach(), expected.detach())
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.sum(), x)[0])
    assert static.input_quantizer.num_batches == 1


@pytest.mark.parametrize("config", [QATConfig.int8(), QATConfig.weight_only(4, 4)], ids=str)
def test_cached_weights(config, monkeypatch):
    layer = layer_of(2, False, config)
    x = cases.normal((2, 4, 6, 6))
    expected = layer(x)
    expected.sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    with cached_weights(layer):
        with torch.no_grad():
            cases.assert_same(layer(x), expected.detach())
        y = layer(x)
        cases.assert_same(y.detach(), expected.detach())
        y.sum().backward()
        torch.testing.assert_close(layer.weight.grad, gradient)
        with torch.no_grad():
            layer.weight.mul_(0.5)
            cases.assert_same(layer(x), float_formula(layer, x) if config.input is None else layer(x))
            assert not torch.equal(layer(x), expected)


def test_granularities_of_the_float_formula():
    spec = QuantSpec(8, granularity=PerChannel(1))
    config = QATConfig(
        spec, QuantSpec(4, granularity=PerTensor()), QuantSpec(8), QuantSpec(8, granularity=PerToken())
    )
    layer = layer_of(2, False, config)
    x = cases.normal((2, 4, 6, 6))
    x_hat, w_hat, b_hat = (
        fake_quantize(x, granularity=PerChannel(1)),
        fake_quantize(layer.weight, 4),
        layer.bias,
    )
    y = nn.functional.conv2d(x_hat, w_hat, fake_quantize(b_hat))
    cases.assert_same(layer(x).detach(), fake_quantize(y, granularity=PerChannel(0)).detach())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(8, range=MovingAverage(0.3)),
        QuantSpec(8, symmetric=True, range=MinMax(), narrow_range=False),
        QuantSpec(6, range=Fixed(-1, 0.5)),
    ],
    ids=str,
)
def test_one_pass_over_the_input_equals_the_reference(spec, dtype, memory_format, monkeypatch):
    """Results, stored ranges and gradients, with values that the grid clips and lengths that end within a vector."""
    torch.manual_seed(0)
    ours = QATConv2d(5, 6, 3, padding=1, dtype=dtype, config=QATConfig(spec, SYMMETRIC, None, None))
    theirs = copy.deepcopy(ours)
    for step, factor in enumerate((1.0, 0.5, 2.0, 1.5)):
        x = cases.normal((2, 5, 31, 37), dtype, seed=step).mul(factor).to(memory_format=memory_format)
        if step == 2:
            x[0, 1, 3, 4], x[1, 2, 0, 0] = torch.inf, -torch.inf
        if step == 3:
            x[0, 2, 5, 6], x[1, 4, 30, 36] = torch.nan, torch.inf
        results = []
        for layer in (ours, theirs):
            with monkeypatch.context() as patch:
                if layer is theirs:
                    patch.setattr(kernels, "route", lambda *tensors: None)
                leaf = x.clone().requires_grad_()
                y = layer(leaf)
                dx, dw = torch.autograd.grad(y.square().float().sum().nan_to_num(), [leaf, layer.weight])
                results.append((y.detach(), dx.where(leaf.detach().isfinite(), 1), layer.state_dict()))
                if step == 3:
                    assert dw[:, 2].isnan().all() and dx.isnan().any()
        (y, dx, state), (y_expected, dx_expected, state_expected) = results
        cases.assert_same(y, y_expected)
        # Gradients are up to 14. Sums of bfloat16 are 0 by chance too, and in another order just about 0.
        chance = 0.1 if dtype == torch.bfloat16 else 0.0
        is_blocked, nearly = dx == 0, torch.maximum(dx.abs(), dx_expected.abs()) < chance
        assert torch.equal(is_blocked | nearly, (dx_expected == 0) | nearly)
        assert is_blocked.any() or step != 2
        for key, value in state.items():
            cases.assert_same(value, state_expected[key])


def test_a_nan_reaches_the_gradient_of_its_channel_only():
    """As with a float convolution."""
    layer = layer_of(2, False, QATConfig.static(), padding=1)
    x = cases.normal((2, 4, 6, 6))
    layer(x)
    x[1, 2, 3, 3] = torch.nan
    y = layer(x)
    (dw,) = torch.autograd.grad(y, layer.weight, torch.ones_like(y))
    assert dw[:, 2].isnan().all()
    assert dw[:, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(
    "config", [QATConfig.static(), QATConfig.static(4), QATConfig.int8()], ids=["static", "static4", "int8"]
)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [3, 24], ids=["library", "matrix"])
def test_a_weight_in_channels_last_format_gives_the_same(config, dims, channels):
    torch.manual_seed(0)
    plain = getattr(qatfast, f"QATConv{dims}d")(channels, 2 * channels, 3, padding=1, config=config)
    twin = copy.deepcopy(plain).to(memory_format={2: torch.channels_last, 3: torch.channels_last_3d}[dims])
    assert not twin.weight.is_contiguous()
    x = cases.normal((2, channels, *(4,) * dims))
    found = []
    for module in (plain, twin):
        given = x.clone().requires_grad_()
        y = module(given)
        y.square().sum().backward()
        found.append((y.detach(), given.grad, module.weight.grad, module.bias.grad))
    cases.assert_same(found[1][0], found[0][0])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    plain.eval()
    twin.eval()
    with torch.no_grad(), qatfast.cached_weights(twin):
        cases.assert_same(twin(x), plain(x))
        cases.assert_same(twin(x), plain(x))
