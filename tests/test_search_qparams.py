"""search_qparams: the least squared error among the shrunk ranges, to the bit."""

import pytest
import torch

import cases
import qatfast
from qatfast import (
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    choose_qparams,
    fake_quantize_affine,
    reference,
    search_qparams,
)

LONG = (530, 1000), PerTensor()  # the reference takes 10 seconds
BLOCKS = (
    ((7,), PerTensor()),
    ((1025,), PerTensor()),
    LONG,
    ((40, 300), PerChannel(0)),
    ((40, 30), PerChannel(1)),
    ((6, 64), PerGroup(16)),
    ((5, 33), PerToken()),
    ((0, 4), PerTensor()),
    ((), PerTensor()),
)


def error(x, scale, zero_point, ends):
    y = fake_quantize_affine(x, scale, zero_point, *ends)
    return (y.double() - x.double()).square().sum()


@pytest.mark.parametrize(
    "dtype, case, symmetric",
    [
        (dtype, case, symmetric)
        for dtype in cases.FLOATS
        for case in BLOCKS
        for symmetric in ((False, True) if case is not LONG else (dtype.itemsize > 2,))
    ],
    ids=cases.name,
)
def test_kernels_give_the_bits_of_the_reference(kernels, device, case, dtype, symmetric):
    shape, granularity = case
    x = cases.normal(shape, dtype)
    if x.numel() > 8:
        x.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for bits in (2, 4, 8) if x.numel() < 100_000 else (3,):
        ours, expected = (
            implementation.search_qparams(x.to(at), bits, symmetric=symmetric, granularity=granularity)
            for implementation, at in ((qatfast, device), (reference, "cpu"))
        )
        for result, value in zip(ours, expected, strict=True):
            cases.assert_same(result, value)


# What a search that excludes grids by bounds may get wrong: many equal or nearly equal sums, no reciprocal of a scale,
# a best range that is far from all guesses.
HARD = {
    "normal": lambda x: x,
    "two values": lambda x: x.sign(),
    "levels of the largest grid": lambda x: (x * 40).round().clamp(-100, 155) * 0.25,
    "one sign": lambda x: x.abs() + 3,
    "sparse": lambda x: torch.where(x > 2, x, 0.0),
    "an outlier": lambda x: torch.where(torch.arange(len(x)) == 7, 1e4, x),
    "heavy tails": lambda x: x**9,
    "without a reciprocal": lambda x: x * 1e-37,
    "close to overflow": lambda x: x / x.abs().max() * 3e38,
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("values", HARD)
def test_hard_values(device, values, dtype):
    for size in (257, 5000):
        x = HARD[values](cases.normal((size,))).to(dtype)
        for bits, symmetric in ((2, True), (4, False), (8, False), (8, True), (16, False)):
            ours = qatfast.search_qparams(x.to(device), bits, symmetric=symmetric)
            expected = reference.search_qparams(x, bits, symmetric=symmetric)
            for result, value in zip(ours, expected, strict=True):
                cases.assert_same(result, value)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_no_shrunk_range_has_a_smaller_error(bits):
    x = cases.normal((2000,))
    ends = (0, 2**bits - 1)
    least = error(x, *search_qparams(x, bits), ends)
    assert least <= error(x, *choose_qparams(x, bits), ends)
    for i in range(1, 81):
        shrunk = torch.stack([x.min(), x.max()]) * (torch.tensor(i) / 80)
        assert least <= error(x, *choose_qparams(shrunk, bits), ends)


def test_few_bits_clip_what_is_far_out():
    x = torch.cat([cases.normal((2000,)), torch.tensor([20.0])])
    assert search_qparams(x, 3)[0] < choose_qparams(x, 3)[0] / 2


def test_equal_errors_take_the_largest_range():
    scale, zero_point = search_qparams(torch.zeros(5))
    assert (scale, zero_point) == choose_qparams(torch.zeros(5))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_the_strides_do_not_matter(layout):
    change, shape = cases.LAYOUTS[layout]
    x = cases.normal(shape)
    assert torch.equal(torch.stack(search_qparams(change(x), 3)), torch.stack(search_qparams(x, 3)))
