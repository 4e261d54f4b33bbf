"""What computes convolutions of integers on the CPU: oneDNN, and the depthwise and pointwise kernels."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import cases
import qatfast
from qatfast import (
    Dynamic,
    Fixed,
    MovingAverage,
    PerChannel,
    PerTensor,
    QATConfig,
    QATConv2d,
    QuantSpec,
    cached_weights,
    int8_convolution,
    kernels,
    requantization,
)
from qatfast.geometry import Geometry
from test_conv import SYMMETRIC


def sums_in_float64(q, zero_point, kernel, convolution):
    function = (torch.conv1d, torch.conv2d, torch.conv3d)[q.dim() - 3]
    stride, padding, dilation, groups = convolution
    padded = nn.functional.pad(q.double() - zero_point, [n for pair in reversed(padding) for n in pair])
    return function(padded, kernel.double(), None, stride, 0, dilation, groups) + 0.0


@pytest.mark.parametrize("kernel_size", [1, 3], ids=["1x1", "3x3"])
@pytest.mark.parametrize("channels", [40, 700])
def test_the_library_and_the_windows_add_exactly(channels, kernel_size):
    if not int8_convolution._library_is_exact(2):
        pytest.skip("the library is not exact on this processor")
    rng = np.random.default_rng(0)
    kernel = torch.tensor(rng.integers(-128, 128, (8, channels, kernel_size, kernel_size)), dtype=torch.int8)
    kernel[0], kernel[1] = 127, -128
    q = torch.tensor(rng.integers(0, 256, (2, channels, 5, 4)), dtype=torch.uint8)
    q[0] = 255
    geometry = Geometry((1, 2), (1, 2), (1, 1), False, (0, 0), 1)
    convolution = int8_convolution._Conv((1, 2), ((1, 1), (2, 2)), (1, 1), 1)
    weight = int8_convolution.Int8Weight(kernel, torch.ones(8), torch.zeros(8, dtype=torch.int32))
    for zero_point in (0, 3, 255):
        expected = sums_in_float64(q, zero_point, kernel, convolution).float()
        by_library = int8_convolution._by_library(q, zero_point, kernel, None, convolution)
        cases.assert_same(by_library.contiguous(), expected)
        point = torch.tensor(zero_point, dtype=torch.int32)
        integers = int8_convolution.Int8Input(q, torch.ones(()), point)
        by_windows = int8_convolution.by_windows(integers, weight, kernel.shape[2:], None, geometry)
        cases.assert_same(by_windows.contiguous(), expected)
        y = int8_convolution.product(integers, weight, kernel.shape[2:], None, geometry, False)
        cases.assert_same(y, expected)


@pytest.mark.parametrize(
    "size, kernel, stride, padding, dilation, groups",
    [
        ((3, 31, 11, 6), (62, 1, 5, 6), (1, 4), (4, 0), (1, 1), 31),
        ((3, 2, 12, 2), (32, 2, 4, 2), (4, 4), (5, 1), (2, 3), 1),
        ((2, 4, 7, 1), (8, 4, 1, 1), (2, 2), (1, 5), (2, 2), 1),
        ((1, 8, 1, 7, 3), (64, 1, 2, 3, 3), (2, 2, 2), (3, 0, 0), (3, 3, 1), 8),
    ],
    ids=["one_column", "one_padded_column", "more_padding_than_kernel", "holes_in_padding"],
)
def test_geometries_that_the_library_adds_wrongly(size, kernel, stride, padding, dilation, groups):
    if not int8_convolution._library_is_exact(len(size) - 2):
        pytest.skip("the library is not exact on this processor")
    rng = np.random.default_rng(0)
    q = torch.tensor(rng.integers(0, 256, size), dtype=torch.uint8)
    kernel = torch.tensor(rng.integers(-128, 128, kernel), dtype=torch.int8)
    convolution = int8_convolution._Conv(stride, tuple((p, p) for p in padding), dilation, groups)
    actual = int8_convolution._by_library(q, 5, kernel, None, convolution)
    cases.assert_same(actual.contiguous(), sums_in_float64(q, 5, kernel, convolution).float())


@pytest.mark.arithmetic
@pytest.mark.parametrize("channels", [1, 5, 16, 40])
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 5, "stride": 2, "padding": 3},
        {"kernel_size": (2, 3), "stride": (1, 3), "padding": (0, 2), "dilation": (3, 1)},
        {"kernel_size": (8, 1), "padding": (4, 0)},
        {"kernel_size": (4, 2), "stride": (2, 1), "padding": (4, 1), "dilation": (2, 3)},
        {"kernel_size": (9, 4), "padding": 4},
        {"kernel_size": 3, "padding": 5},
    ],
    ids=str,
)
def test_depthwise(arguments, channels, monkeypatch):
    """The sums of levels in float64, for zero points at both ends and rows beyond the input."""
    torch.manual_seed(0)
    for symmetric, shift in itertools.product((False, True), (-9, 0, 9)):
        config = QATConfig(QuantSpec(8, symmetric), SYMMETRIC, None, None)
        layer = QATConv2d(channels, channels, groups=channels, **arguments, config=config)
        x = cases.normal((2, channels, 9, 11)) + shift
        y = layer(x)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "route", lambda *tensors: None)
            expected = layer(x)
        cases.assert_same(y.detach(), expected.detach())
        channels_last = layer(x.to(memory_format=torch.channels_last))
        assert channels_last.is_contiguous(memory_format=torch.channels_last)
        cases.assert_same(channels_last.detach(), expected.detach())


@pytest.mark.arithmetic
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(
    "spec", [QuantSpec(8, range=MovingAverage(0.3)), QuantSpec(7, True, range=Fixed(-1, 1))], ids=str
)
@pytest.mark.parametrize("channels", [8, 33, 200])
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": (0, 1)},
        {"kernel_size": (2, 3), "padding": 2, "dilation": (1, 3)},
        {"kernel_size": 5, "padding": 2},
        {"kernel_size": (3, 1), "stride": (5, 2), "padding": (3, 0), "dilation": (3, 1)},
        {"kernel_size": 1, "stride": 3},
    ],
    ids=str,
)
def test_a_depthwise_convolution_in_one_pass(arguments, channels, spec, needs_grad, monkeypatch, threads):
    """Results, stored ranges and masks, for rows that no output reads and for values that are not finite."""
    torch.manual_seed(0)
    config = QATConfig(spec, SYMMETRIC, None, None)
    ours = QATConv2d(channels, channels, groups=channels, **arguments, config=config)
    theirs = copy.deepcopy(ours)
    for step, count in enumerate((1, 2, 3, 2)):
        threads(count)
        x = cases.normal((3, channels, 13, 21), seed=step).to(memory_format=torch.channels_last)
        if step > 1:
            x[1, 4, 3, 4], x[2, 2, 12, 20] = torch.inf, torch.nan if step == 3 else -torch.inf
        results = []
        for layer in (ours, theirs):
            with monkeypatch.context() as patch, torch.set_grad_enabled(needs_grad):
                if layer is theirs:
                    patch.setattr(kernels, "route", lambda *tensors: None)
                y = layer(x.requires_grad_(needs_grad))
                passes = (
                    torch.autograd.grad(y, x, cases.normal(y.shape))[0] == 0
                    if needs_grad and step < 3
                    else None
                )
                results.append((y.detach(), passes, layer.state_dict()))
        (y, passes, state), (y_expected, passes_expected, state_expected) = results
        cases.assert_same(y, y_expected)
        assert passes is None or torch.equal(passes, passes_expected)
        for key, value in state.items():
            cases.assert_same(value, state_expected[key])


@pytest.mark.parametrize("channels", [1, 5, 16, 70])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 5, "stride": 2, "padding": 3},
        {"kernel_size": (2, 7), "stride": (1, 3), "padding": (0, 2), "dilation": (3, 1)},
        {"kernel_size": 3, "padding": 5},
        {"kernel_size": 2, "stride": (3, 4)},
    ],
    ids=str,
)
def test_gradients_of_a_depthwise_convolution(arguments, memory_format, channels):
    """Those of the float convolution in float64, masked where the range clips; each gradient also alone."""
    torch.manual_seed(0)
    config = QATConfig(QuantSpec(8, range=Fixed(-1, 1)), SYMMETRIC, None, None)
    layer = QATConv2d(channels, channels, groups=channels, **arguments, config=config)
    x = cases.normal((19, channels, 9, 21)).to(memory_format=memory_format).requires_grad_()
    leaves = [x, layer.weight, layer.bias]
    y = layer(x)
    dy = cases.normal(y.shape, seed=1).to(memory_format=memory_format)
    actual = torch.autograd.grad(y, leaves, dy)
    x_hat = qatfast.fake_quantize_affine(x, *layer.input_quantizer.grid(x), 0, 255).double()
    w_hat = (
        qatfast.fake_quantize(layer.weight.flatten(1), **SYMMETRIC.arguments).view_as(layer.weight).double()
    )
    options = (layer.stride, layer.padding, layer.dilation, channels)
    expected = torch.autograd.grad(
        nn.functional.conv2d(x_hat, w_hat, layer.bias.double(), *options), leaves, dy.double()
    )
    for position, leaf in enumerate(leaves):
        torch.testing.assert_close(actual[position], expected[position], rtol=1e-4, atol=5e-4)
        (alone,) = torch.autograd.grad(layer(x), [leaf], dy)
        cases.assert_same(alone, actual[position])


@pytest.mark.skipif(kernels.extension is None, reason="there are no kernels")
@pytest.mark.parametrize("size", [(0, 5, 4, 4), (2, 5, 0, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_a_depthwise_convolution_of_nothing(size, memory_format):
    values = torch.empty(size, dtype=torch.uint8).contiguous(memory_format=memory_format)
    grad = torch.ones(size[0], 5, size[2] + 2, size[3] + 2)
    grid = torch.tensor(0.1), torch.tensor(3, dtype=torch.int32)
    options = ((3, 3), (1, 1), (2, 2), (1, 1), (True,) * 3)
    op = kernels.extension.int8_conv_depthwise_backward
    dx, dw, db = op(grad, values, *grid, torch.ones(5, 9), None, *options)
    assert dx.shape == values.shape
    cases.assert_same(dw, torch.zeros(5, 9))
    cases.assert_same(db, grad.sum((0, 2, 3)))


def test_gradients_of_a_depthwise_convolution_do_not_depend_on_threads(threads):
    config = QATConfig(QuantSpec(8, range=Fixed(-1, 1)), SYMMETRIC, None, None)
    layer = QATConv2d(40, 40, 3, padding=1, groups=40, config=config)
    x = cases.normal((5, 40, 30, 30)).to(memory_format=torch.channels_last).requires_grad_()
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], cases.normal(x.shape)))
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            cases.assert_same(one, other)


NEEDS_DOT_PRODUCTS = pytest.mark.skipif(
    not getattr(kernels.extension, "has_dot_products", False), reason="the processor has no AVX512-VNNI"
)


def pixels_of(x):
    """(batch, channels, ...) as a matrix with a row per pixel."""
    return x.movedim(1, -1).flatten(0, -2)


@pytest.mark.arithmetic
@NEEDS_DOT_PRODUCTS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zero_point", [0, 255, 100])
@pytest.mark.parametrize(
    "shape, outputs",
    [
        *(
            ((2, 1, 3, 5), 1),
            ((1, 5, 1, 1), 17),
            ((3, 4, 7, 5), 16),
            ((2, 3, 40, 41), 10),
            ((2, 64, 5, 5), 64),
        ),
        *(((1, 131, 3, 3), 100), ((5, 70, 1, 1), 200), ((2, 9, 2, 3, 4), 70), ((1, 6, 90, 90), 80)),
        ((1, 5, 120, 121), 80),  # too large for caches
    ],
    ids=str,
)
def test_pointwise_kernels(shape, outputs, zero_point, dtype):
    """Sums of int64, rounded once; of requantized ones, the operator of the other ways."""
    ops = kernels.extension
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
    scale, point = torch.tensor(0.02), torch.tensor(zero_point, dtype=torch.int32)
    ends = (3, 250) if zero_point == 100 else (0, 255)
    if dtype == torch.uint8:
        x = q = cases.integers(shape, torch.uint8).contiguous(memory_format=last)
        is_nan = torch.zeros(len(pixels_of(x)), dtype=torch.bool)
    else:
        x = cases.normal(shape, dtype).contiguous(memory_format=last)
        x[-1, 0] = torch.inf
        if outputs > 1:
            x[0, -1, 0, 0] = torch.nan
        q = qatfast.reference.quantize(x, scale, point, *ends)
        is_nan = pixels_of(x).isnan().any(1)
    weight = cases.integers((outputs, shape[1]), torch.int8, seed=1)
    weight[0] = -128
    packed = ops.int8_conv_pointwise_weight(weight)
    sums = (pixels_of(q).long() - zero_point) @ weight.long().t()

    def check(y, expected):
        assert y.shape == (shape[0], outputs, *shape[2:])
        assert y.movedim(1, -1).is_contiguous()
        cases.assert_same(pixels_of(y), torch.where(is_nan[:, None], torch.nan, expected))

    weight_scale, bias = torch.rand(outputs) + 0.1, cases.normal((outputs,))
    weight_scale[-1] = torch.nan  # the weight holds a NaN
    products = sums.float() * (scale * weight_scale)
    check(ops.int8_conv_pointwise(x, scale, point, *ends, packed, weight_scale, bias), products + bias)
    check(ops.int8_conv_pointwise(x, scale, point, *ends, packed, weight_scale, None), products)
    offset = cases.integers((outputs,), torch.int8, seed=2).int() * 1000
    bounds = (-100.0, 155.0, 0.5)
    factor = torch.rand(outputs) / 1000
    y = ops.int8_conv_pointwise_requantized(x, scale, point, *ends, packed, offset, factor, *bounds)
    expected = ops.int8_requantize_(sums.int(), offset, factor, *bounds).view(torch.float32)
    check(y, expected)


@pytest.mark.arithmetic
@NEEDS_DOT_PRODUCTS
@pytest.mark.parametrize("channels", [1, 514, 65793])
def test_pointwise_sums_of_the_largest_products(channels):
    """They fit in 32 bits for the most channels that are allowed, and float32 rounds them once."""
    ops, one = kernels.extension, torch.ones(1)
    for value, level, zero_point in itertools.product((0, 255), (-128, 127), (0, 255)):
        q = torch.full((1, channels, 1, 1), value, dtype=torch.uint8)
        weight = torch.full((1, channels), level, dtype=torch.int8)
        point = torch.tensor(zero_point, dtype=torch.int32)
        packed = ops.int8_conv_pointwise_weight(weight)
        y = ops.int8_conv_pointwise(q, one[0], point, 0, 255, packed, one, None)
        assert y.item() == torch.tensor((value - zero_point) * level * channels).float().item()
    with pytest.raises(
        ValueError, match="expected at most 65793 channels, whose sums fit in 32 bits, got 65794"
    ):
        ops.int8_conv_pointwise(q.new_zeros(1, 65794, 1, 1), one[0], point, 0, 255, packed, one, None)


@NEEDS_DOT_PRODUCTS
@pytest.mark.parametrize("config", [QATConfig.static(), QATConfig.static(4), QATConfig.int8()], ids=str)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "one pixel"])
def test_a_pointwise_layer(config, granularity, layout, monkeypatch):
    """The kernel computes it, with the bits of the reference, in training, in evaluation and deployed."""
    torch.manual_seed(0)
    spec = dataclasses.replace(config.weight, granularity=granularity)
    config = dataclasses.replace(config, weight=spec, output=None)
    layer = QATConv2d(21, 37, 1, bias=layout != "contiguous", config=config)
    x = cases.normal((300, 21, 1, 1) if layout == "one pixel" else (3, 21, 14, 13))
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    twin, calls, pointwise = copy.deepcopy(layer), [], int8_convolution.pointwise
    monkeypatch.setattr(
        int8_convolution, "pointwise", lambda *arguments: calls.append(1) or pointwise(*arguments)
    )

    def expected():
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "route", lambda *tensors: None)
            return twin(x).detach()

    def check(y):
        cases.assert_same(y.detach(), expected_now)
        assert y.is_contiguous(memory_format=torch.channels_last) or layout == "contiguous"
        assert y.is_contiguous() or layout == "channels_last"
        assert len(calls) == 1
        calls.clear()

    expected_now = expected()
    check(layer(x))
    layer.eval(), twin.eval()
    deployed = qatfast.convert(nn.Sequential(layer))
    with torch.no_grad(), cached_weights(layer):
        for module in (layer, layer, deployed):
            expected_now = expected()
            check(module(x))
    x[0, :, 0, 0] = torch.nan
    expected_now = expected()
    for module in (layer, deployed):
        cases.assert_same(module(x).detach(), expected_now)


@NEEDS_DOT_PRODUCTS
def test_a_pointwise_layer_that_requantizes(monkeypatch):
    """The kernel has the bits of the other way, which operands for a single call take."""
    weight, b32 = cases.integers((37, 21), torch.int8), cases.integers((37,), torch.int8).int() * 999
    bounds = (torch.tensor(-100.0), torch.tensor(155.0), torch.tensor(0.5))
    operands = requantization.Operands(weight, b32, torch.rand(37) / 1000, *bounds)
    grid = torch.tensor(0.02), torch.tensor(-3, dtype=torch.int32)
    x = cases.normal((3, 21, 14, 13)).contiguous(memory_format=torch.channels_last)
    x[1, 2, 3, 4] = torch.nan
    rest = ((1, 1), Geometry((1, 1), (0, 0), (1, 1), False, (0, 0), 1), True)
    expected = requantization.conv(x, *grid, (-128, 127), operands, *rest)
    monkeypatch.setattr(int8_convolution, "exact_sums", None)  # the other way
    kept = operands.with_sums(grid[1], (-128, 127))
    for _ in range(2):
        y = requantization.conv(x, *grid, (-128, 127), kept, *rest)
        cases.assert_same(y, expected)
        assert y.stride() == expected.stride()


@NEEDS_DOT_PRODUCTS
def test_pointwise_results_do_not_depend_on_threads(threads):
    """Many rows are divided, and the outputs of a few."""
    ops, scale, point = kernels.extension, torch.tensor(0.02), torch.tensor(100, dtype=torch.int32)
    for shape, outputs in (((2, 40, 50, 41), 70), ((1, 300, 7, 7), 200)):
        x = cases.normal(shape).contiguous(memory_format=torch.channels_last)
        packed = ops.int8_conv_pointwise_weight(cases.integers((outputs, shape[1]), torch.int8))
        found = []
        for count in (1, 2, 3):
            threads(count)
            arguments = (x, scale, point, 0, 255, packed, torch.ones(outputs), None)
            found.append(ops.int8_conv_pointwise(*arguments))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@NEEDS_DOT_PRODUCTS
def test_pointwise_errors():
    ops = kernels.extension
    with pytest.raises(
        ValueError, match=r"expected a contiguous matrix of int8, got uint8 of shape \(2, 3\)"
    ):
        ops.int8_conv_pointwise_weight(torch.ones(2, 3, dtype=torch.uint8))
    packed = ops.int8_conv_pointwise_weight(torch.ones(2, 3, dtype=torch.int8))
    legal = {
        "input": torch.zeros(1, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "scale": torch.tensor(0.1),
        "zero_point": torch.tensor(7),
        "quant_min": 0,
        "quant_max": 255,
        "weight": packed,
        "weight_scale": torch.ones(2),
        "bias": torch.ones(2),
    }
    assert ops.int8_conv_pointwise(*legal.values()).shape == (1, 2, 2, 2)
    for error, message, changes in (
        (TypeError, "expected input not to be float64", {"input": legal["input"].double()}),
        (ValueError, "with the channels innermost in memory", {"input": torch.zeros(1, 3, 2, 2)}),
        (ValueError, "with the channels innermost in memory", {"input": torch.zeros(3, 3)}),
        (ValueError, "from 0 to 255, got -1 and 255", {"quant_min": -1}),
        (ValueError, "from 0 to 255, got 0 and 256", {"quant_max": 256}),
        (ValueError, "zero_point to be from 0 to 255, got 300", {"zero_point": torch.tensor(300)}),
        (ValueError, "expected the packed weight of 2 outputs and 3 channels", {"weight": packed[1:]}),
        (ValueError, "expected the packed weight of 30 outputs", {"weight_scale": torch.ones(30)}),
        (ValueError, "expected a float32 scale and a bias per output", {"bias": torch.ones(3)}),
        (ValueError, "expected a float32 scale and a bias per output", {"weight_scale": torch.ones(2).int()}),
    ):
        with pytest.raises(error, match=message):
            ops.int8_conv_pointwise(*{**legal, **changes}.values())


@pytest.mark.parametrize("range", [Fixed(-1, 1), Dynamic()], ids=str)
@pytest.mark.parametrize("channels", [3, 16])
def test_gradients_of_a_pointwise_convolution(channels, range):
    """Those of the general way, which an input in another layout takes."""
    torch.manual_seed(0)
    layer = QATConv2d(channels, 6, 1, config=QATConfig(QuantSpec(8, range=range), SYMMETRIC, None, None))
    x = cases.normal((3, channels, 7, 9), requires_grad=True)
    grad = cases.normal((3, 6, 7, 9), seed=1)
    leaves = [x, layer.weight, layer.bias]
    expected = torch.autograd.grad(layer(x), leaves, grad)
    channels_last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    leaves[0] = channels_last
    actual = torch.autograd.grad(layer(channels_last), leaves, grad)
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, check_stride=False)
    assert torch.equal(actual[0] == 0, expected[0] == 0)
    for position, leaf in enumerate(leaves):  # one gradient alone
        (alone,) = torch.autograd.grad(layer(channels_last), [leaf], grad)
        torch.testing.assert_close(alone, actual[position], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "message, changes",
    [
        ("expected shifted_zero_point to be from 0 to 255, got 300", {"shifted_zero_point": 300}),
        ("expected shifted_zero_point to be from 0 to 255, got -1", {"shifted_zero_point": -1}),
        (
            r"padding at least 0, got \(0, 1\), \(1, 1\) and \(0, 0\)",
            {"stride": (0, 1)},
        ),
        ("expected stride and dilation to be at least 1, and padding at least 0", {"padding": (0, -1)}),
        ("expected stride and dilation to be at least 1, and padding at least 0", {"dilation": (0, 1)}),
        ("expected an input that is at least as large as the kernel", {"dilation": (4, 1)}),
    ],
)
def test_errors_of_a_depthwise_convolution(kernels, message, changes):
    legal = {
        "values": torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        "scale": torch.tensor(0.1),
        "shifted_zero_point": 7,
        "weight": torch.ones(3, 4, dtype=torch.int8),
        "weight_scale": torch.ones(3),
        "bias": None,
        "kernel_size": (2, 2),
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
    }
    arguments = {**legal, **changes}
    arguments["shifted_zero_point"] = torch.tensor(arguments["shifted_zero_point"], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"int8_conv_depthwise: .*{message}"):
        kernels.int8_conv_depthwise(*arguments.values())


def test_the_integers_of_an_empty_input(kernels, device):
    x = torch.empty(0, 3, 4, 4, device=device)
    grid = torch.tensor(0.1, device=device), torch.tensor(7, dtype=torch.int32, device=device)
    arguments = (x, *grid, None, None, None, 0.0, QuantSpec().code, True)
    values, mask, *_, shifted, poison = torch.ops.qatfast.int8_conv_input(*arguments)
    assert values.shape == x.shape and mask.numel() == 0
    assert shifted.item() == 7 and poison.item() == 0


def test_a_product_of_floats_says_so(kernels):
    words = r"int8_mm: expected int8 matrices .*, got float32 of shape \(2, 3\) and int8 of shape \(4, 3\)"
    with pytest.raises(ValueError, match=words):
        kernels.int8_mm(torch.ones(2, 3), torch.ones(4, 3, dtype=torch.int8))
