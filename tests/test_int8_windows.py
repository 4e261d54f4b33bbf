"""int8_conv_windows and int8_conv_grouped: convolutions without a library that computes them."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F

import cases
from test_fake import assert_as_faked

pytestmark = pytest.mark.arithmetic
OPS = torch.ops.qatfast
# size, kernel_size, stride, padding, dilation, spread, output_size
GEOMETRIES = {
    "1d": ((9,), (3,), (1,), (1,), (1,), (1,), (9,)),
    "strides": ((7, 8), (3, 2), (2, 3), (1, 0), (1, 1), (1, 1), (4, 3)),
    "dilation": ((7, 8), (3, 3), (1, 1), (2, 2), (2, 2), (1, 1), (7, 8)),
    "more_after_than_before": ((5, 4), (2, 3), (1, 1), (0, 1), (1, 1), (1, 1), (6, 7)),
    "cropped": ((5, 4), (2, 2), (1, 1), (-1, -2), (1, 1), (1, 1), (3, 1)),
    "spread": ((4, 3), (3, 3), (1, 1), (1, 2), (1, 1), (2, 3), (7, 9)),
    "spread_and_dilation": ((4, 3), (3, 2), (1, 1), (1, 0), (2, 4), (4, 2), (10, 1)),
    "spread_and_stride": ((4, 3), (3, 2), (2, 1), (1, 1), (1, 1), (2, 3), (4, 8)),
    "spread_beyond_the_kernel": ((3, 2), (2, 1), (1, 1), (1, 0), (1, 1), (4, 3), (10, 4)),
    "3d": ((3, 4, 2), (2, 1, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), (1, 1, 1), (4, 2, 2)),
    "padding_beyond_the_kernel": ((2, 2), (2, 2), (1, 1), (5, 5), (1, 1), (1, 1), (6, 12)),
}


def padded_input(x, kernel_size, stride, padding, dilation, spread, output_size):
    """Returns ``x`` with all zeros that the windows read, and none beyond them."""
    size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], spread, strict=True)]
    result = x.new_zeros((*x.shape[:2], *size))
    result[(slice(None), slice(None), *(slice(None, None, s) for s in spread))] = x
    amounts = [
        (before, (o - 1) * s + d * (k - 1) + 1 - n - before)
        for n, k, s, before, d, o in zip(
            size, kernel_size, stride, padding, dilation, output_size, strict=True
        )
    ]
    return F.pad(result, [n for pair in reversed(amounts) for n in pair])


def expected_outputs(levels, weight_levels, scale, weight_scale, bias, groups, sizes):
    """The formula in float64, exact before the scales; a NaN of ``levels`` makes its windows NaN."""
    convolution = (F.conv1d, F.conv2d, F.conv3d)[levels.dim() - 3]
    _, stride, _, dilation, *_ = sizes
    sums = convolution(padded_input(levels, *sizes), weight_levels, None, stride, 0, dilation, groups)
    ones = (1,) * (levels.dim() - 2)
    y = (sums + 0.0).to(scale.dtype) * (scale.reshape(-1, 1, *ones) * weight_scale.reshape(1, -1, *ones))
    return y if bias is None else y + bias.reshape(1, -1, *ones)


def operands_of(
    geometry, channels, outputs, groups, *, dtype, per_sample=False, poisoned=False, device="cpu"
):
    size, *sizes = geometry
    x = cases.normal((3, channels, *size), torch.float16)
    q = cases.integers(tuple(x.shape), torch.uint8)
    scale = torch.rand(3 if per_sample else 1, dtype=dtype) + 0.1
    zero_point = cases.integers((len(scale),), torch.uint8).int()
    ones = (1,) * len(size)
    levels = q.double() - zero_point.reshape(-1, 1, *ones)
    if poisoned:
        x[1].view(-1)[0], x[2].view(-1)[-1] = float("nan"), float("-nan")
        levels = levels.masked_fill(x.isnan(), torch.nan)
    poison = torch.tensor(torch.nan if poisoned else 0.0)
    kernel_size = sizes[0]
    weight = cases.integers((outputs, *kernel_size, channels // groups), torch.int8)
    weight_zero_point = torch.arange(outputs, dtype=torch.int32) - 2
    weight_scale = torch.rand(outputs, dtype=dtype) + 0.1
    bias = torch.randn(outputs, dtype=dtype)
    weight_levels = (weight.double() - weight_zero_point.reshape(-1, *ones, 1)).movedim(-1, 1)
    y = expected_outputs(levels, weight_levels, scale, weight_scale, bias, groups, sizes)
    rows = weight.flatten(1)
    level_sums = rows.sum(1, dtype=torch.int64) - rows.shape[1] * weight_zero_point
    tensors = (q, scale, zero_point, x, poison)
    on_device = [x.to(device) for x in (*tensors, rows, weight_scale, weight_zero_point, level_sums, bias)]
    return on_device[:5], on_device[5:9], on_device[9], sizes, y


@pytest.mark.parametrize("poisoned", [False, True], ids=["", "nan"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["", "per_sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.name)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_the_product_of_windows(kernels, geometry, dtype, per_sample, poisoned, device):
    for channels in (1, 3, 4, 16):
        options = {"dtype": dtype, "per_sample": per_sample, "poisoned": poisoned, "device": device}
        tensors, weight, bias, sizes, expected = operands_of(geometry, channels, 5, 1, **options)
        rows = OPS.int8_conv_windows(*tensors, *sizes)
        y = OPS.int8_product(rows, weight, bias).cpu()
        cases.assert_same(y.view(3, *sizes[-1], 5).movedim(-1, 1), expected)
        assert expected.isnan().any() == poisoned


@pytest.mark.parametrize("poisoned", [False, True], ids=["", "nan"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["", "per_sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.name)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_groups(kernels, geometry, dtype, per_sample, poisoned, device):
    for channels, outputs, groups in ((8, 8, 8), (3, 3, 3), (4, 8, 4), (6, 4, 2), (5, 3, 1)):
        options = {"dtype": dtype, "per_sample": per_sample, "poisoned": poisoned, "device": device}
        tensors, weight, bias, sizes, expected = operands_of(geometry, channels, outputs, groups, **options)
        q = tensors[0]
        for x in (q, q.movedim(1, -1).contiguous().movedim(-1, 1)):
            y = OPS.int8_conv_grouped(x, *tensors[1:], weight, bias, groups, *sizes)
            cases.assert_same(y.cpu().contiguous(), expected.contiguous())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("geometry", ["strides", "dilation", "cropped", "spread", "3d"])
def test_windows_of_many_elements(kernels, geometry, groups, device):
    """More outputs than a vector holds, and windows that end within a row of the kernel."""
    for channels, outputs in ((358, 38), (1030, 2), (34, 70)):
        tensors, weight, bias, sizes, expected = operands_of(
            GEOMETRIES[geometry], channels, outputs, groups, dtype=torch.float32, device=device
        )
        y = OPS.int8_conv_grouped(*tensors, weight, bias, groups, *sizes)
        cases.assert_same(y.cpu().contiguous(), expected.contiguous())


@pytest.mark.parametrize("groups", [1, 2, 24])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_sums_alone(kernels, geometry, groups):
    if not kernels.has_pair_products:
        pytest.skip("the processor does not multiply pairs of int16")
    for channels, outputs in ((groups, 3 * groups), (48, 24), (384, 48)):
        options = {"dtype": torch.float32, "per_sample": True}
        tensors, weight, _, sizes, _ = operands_of(geometry, channels, outputs, groups, **options)
        one = [torch.ones_like(scale) for scale in (tensors[1], weight[1])]
        rows = weight[0].double() - weight[2].reshape(-1, 1)
        weight_levels = rows.view(outputs, *sizes[0], channels // groups).movedim(-1, 1)
        ones = (1,) * len(sizes[0])
        levels = tensors[0].double() - tensors[2].reshape(-1, 1, *ones)
        expected = expected_outputs(levels, weight_levels, *(x.double() for x in one), None, groups, sizes)
        sums = kernels.int8_conv_sums(*tensors[:3], tuple(weight), groups, *sizes)
        assert sums.dtype == torch.int32
        assert torch.equal(sums.double(), expected)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    "points, message",
    [
        ((-1, 3), "expected zero_point to be from 0 to 255, got -1"),
        ((256, 3), "expected zero_point to be from 0 to 255, got 256"),
        ((3, -129), "expected the weight's zero_point to be from -128 to 127, got -129"),
        ((3, 40000), "expected the weight's zero_point to be from -128 to 127, got 40000"),
    ],
)
def test_zero_points_beyond_the_integers(kernels, points, message, groups):
    tensors, weight, bias, sizes, _ = operands_of(
        GEOMETRIES["strides"], 4, 4, groups, dtype=torch.float32, per_sample=True
    )
    for zero_points, point in zip((tensors[2], weight[2]), points, strict=True):
        zero_points[-1] = point
    with pytest.raises(ValueError, match=f"int8_conv_grouped: {message}"):
        OPS.int8_conv_grouped(*tensors, weight, bias, groups, *sizes)
    with pytest.raises(ValueError, match=f"int8_conv_sums: {message}"):
        kernels.int8_conv_sums(*tensors[:3], tuple(weight), groups, *sizes)
    if points[1] == 3:
        with pytest.raises(ValueError, match=f"int8_conv_windows: {message}"):
            OPS.int8_conv_windows(*tensors, *sizes)


def test_sums_beyond_32_bits(kernels, device):
    channels = 2 * 33026  # two groups
    sizes = [(1,)] * 2 + [(0,)] + [(1,)] * 3
    q = torch.full((1, channels, 1), 255, dtype=torch.uint8, device=device)
    one, zero = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    weight = torch.full((2, channels // 2), 127, dtype=torch.int8, device=device)
    points = torch.full((2,), -128, dtype=torch.int32, device=device)
    int8_weight = [weight, torch.ones(2, device=device), points]
    y = OPS.int8_conv_grouped(q, one, zero, None, None, int8_weight, None, 2, *sizes)
    assert y.flatten().tolist() == [float(torch.tensor(33026 * 255 * 255, dtype=torch.float32))] * 2


def test_fake_tensors_have_the_same_metadata(kernels):
    for geometry, groups in itertools.product(GEOMETRIES.values(), (1, 2)):
        tensors, weight, bias, sizes, _ = operands_of(geometry, 4, 6, groups, dtype=torch.float64)
        assert_as_faked(OPS.int8_conv_windows, *tensors, *sizes)
        assert_as_faked(OPS.int8_conv_grouped, *tensors, weight, bias, groups, *sizes)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)], ids=cases.name)
def test_nothing_to_read(kernels, shape, device):
    q = torch.empty(shape, dtype=torch.uint8, device=device)
    one, point = torch.ones(1, device=device), torch.full((1,), 7, dtype=torch.int32, device=device)
    sizes = [(2, 2), (1, 1), (2, 2), (1, 1), (1, 1), (2, 2)]
    values, scale, zero_point, level_sums = OPS.int8_conv_windows(q, one, point, None, None, *sizes)
    assert values.shape == (4 * shape[0], 16) and (values == 7 - 128).all()
    assert (scale == 1).all() and (zero_point == 7 - 128).all() and (level_sums == 0).all()
    weight = [torch.ones(4, 4, dtype=torch.int8, device=device), one.repeat(4), point.repeat(4)]
    y = OPS.int8_conv_grouped(q, one, point, None, None, weight, None, 4, *sizes)
    assert y.shape == (shape[0], 4, 2, 2) and (y == 0).all()


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"values": torch.zeros(2, 4, 3, 3)},
            "expected uint8 values of 3 to 5 dimensions, got float32",
        ),
        ({"values": torch.zeros(2, 4, dtype=torch.uint8)}, "expected uint8 values of 3 to 5 dimensions"),
        ({"scale": torch.ones(3)}, "expected one scale .* or one per sample, got (3,)"),
        ({"zero_point": torch.ones(1, dtype=torch.int64)}, "expected one scale .* and zero point (int32)"),
        ({"input": torch.zeros(2, 4, 3, 3)}, "expected both input and poison, or neither"),
        ({"input": torch.zeros(2, 4, 3, 4), "poison": torch.zeros(1)}, "expected the input of the values"),
        ({"kernel_size": (2,)}, "expected kernel_size to have 2 elements (values.dim() - 2), got (2,)"),
        ({"stride": (1, 0)}, "expected stride from 1 to 2147483647, got (1, 0)"),
        (
            {"values": torch.zeros(1, dtype=torch.uint8).expand(1, 1, 2, 2**31)},
            "expected the size from 0 to 2147483647, got (2, 2147483648)",
        ),
        ({"padding": (2**31 - 1, 0)}, "expected windows within 2^31 elements of a dimension"),
        (
            {"output_size": (2**20, 2**20)},
            "expected less than 2^31 windows per sample, got output_size (1048576, 1048576)",
        ),
        ({"output_size": (-1, 2)}, "expected output_size from 0 to 2147483647, got (-1, 2)"),
    ],
)
def test_errors(kernels, changes, words):
    legal = {
        "values": torch.zeros(2, 4, 3, 3, dtype=torch.uint8),
        "scale": torch.ones(1),
        "zero_point": torch.zeros(1, dtype=torch.int32),
        "input": None,
        "poison": None,
    }
    sizes = {"kernel_size": (2, 2), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    sizes |= {"spread": (1, 1), "output_size": (2, 2)}
    weight = [torch.ones(4, 4, dtype=torch.int8), torch.ones(4), torch.zeros(4, dtype=torch.int32)]
    words = re.escape(words).replace(r"\.\*", ".*")
    arguments = {**legal, **sizes, **changes}
    first = [arguments[name] for name in legal]
    rest = [arguments[name] for name in sizes]
    with pytest.raises(ValueError, match=f"int8_conv_windows: {words}"):
        OPS.int8_conv_windows(*first, *rest)
    with pytest.raises(ValueError, match=f"int8_conv_grouped: {words}"):
        OPS.int8_conv_grouped(*first, weight, None, 4, *rest)


@pytest.mark.parametrize(
    "groups, weight, words",
    [
        (3, {}, "expected channels and outputs that are divisible by groups=3, got 4 and 4"),
        (0, {}, "divisible by groups=0"),
        (2, {}, "expected an int8 weight with a row of 8 elements"),
        (4, {0: torch.ones(4, 4)}, "expected an int8 weight with a row of 4 elements, .* got float32"),
        (4, {1: torch.ones(4, dtype=torch.float64)}, "expected an int8 weight"),
        (4, {2: torch.zeros(4)}, "expected an int8 weight"),
    ],
)
def test_errors_of_groups(kernels, groups, weight, words):
    tensors = [torch.ones(4, 4, dtype=torch.int8), torch.ones(4), torch.zeros(4, dtype=torch.int32)]
    for index, tensor in weight.items():
        tensors[index] = tensor
    q, zero = torch.zeros(2, 4, 3, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    sizes = [(2, 2), (1, 1), (0, 0), (1, 1), (1, 1), (2, 2)]
    words = re.escape(words).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=f"int8_conv_grouped: .*{words}"):
        OPS.int8_conv_grouped(q, torch.ones(1), zero, None, None, tensors, None, groups, *sizes)
    with pytest.raises(ValueError, match="expected the values, scales and zero points of a weight, got 1"):
        OPS.int8_conv_grouped(q, torch.ones(1), zero, None, None, tensors[:1], None, 4, *sizes)


def test_windows_of_too_many_elements(kernels):
    q = torch.zeros(1, dtype=torch.uint8).expand(1, 2**20, 1)
    sizes = [(2**11,), (1,), (2**10,), (1,), (1,), (1,)]
    one, point = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expected windows of less than 2\^31 elements, got 2147483648"):
        OPS.int8_conv_windows(q, one, point, None, None, *sizes)


@pytest.mark.parametrize("name", ["kernel_size", "output_size"])
@pytest.mark.parametrize("size", [(2**22, 2**21, 2**21), (2**16, 2**16, 2**16)], ids=str)
def test_products_of_sizes_beyond_64_bits(kernels, name, size):
    """2^64 is 0 modulo 2^64."""
    q, one, point = torch.zeros(1, 1, 1, 1, 1, dtype=torch.uint8), torch.ones(1), torch.zeros(1).int()
    sizes = {"kernel_size": (1,) * 3, "stride": (1,) * 3, "padding": (0,) * 3, "dilation": (1,) * 3}
    sizes = sizes | {"spread": (1,) * 3, "output_size": (1,) * 3} | {name: size}
    words = "windows per sample" if name == "output_size" else "elements"
    words = rf"expected .*less than 2\^31 {words}, got {name} {re.escape(str(size))}"
    with pytest.raises(ValueError, match=words):
        OPS.int8_conv_windows(q, one, point, None, None, *sizes.values())
    weight = [torch.ones(1, 1, dtype=torch.int8), one, point]
    with pytest.raises(ValueError, match=words):
        OPS.int8_conv_grouped(q, one, point, None, None, weight, None, 1, *sizes.values())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.int16], ids=cases.name)
def test_inputs_whose_nans_are_not_known(kernels, dtype):
    q, one, point = torch.zeros(1, 1, 4, dtype=torch.uint8), torch.ones(1), torch.zeros(1).int()
    sizes = [(2,), (1,), (0,), (1,), (1,), (3,)]
    kind = ValueError if dtype == torch.float64 else TypeError
    with pytest.raises(kind, match=rf"int8_conv_windows: expected .*input .*got {cases.name(dtype)}"):
        OPS.int8_conv_windows(q, one, point, torch.zeros(1, 1, 4).to(dtype), torch.zeros(1), *sizes)
