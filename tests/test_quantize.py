from functools import cache

import numpy as np
import pytest
import torch

import cases
import oracle
from operators import IMPLEMENTATIONS
from qatfast import PerTensor


@cache
def example(shape, granularity, dtype, quant_range):
    grid = cases.grid(shape, granularity, dtype, quant_range)
    use_ties = torch.tensor(np.random.default_rng(9).random(shape) < 0.4)
    x = torch.where(use_ties, cases.ties(shape, grid.scale, dtype), cases.mixed(shape, dtype))
    return x, grid, oracle.quantize(x, *grid, granularity=granularity)


def run(ops, device, x, grid, granularity):
    qparams = grid.scale.to(device), grid.zero_point.to(device)
    return ops.quantize(x.to(device), *qparams, grid.quant_min, grid.quant_max, granularity=granularity)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("shape, granularity", cases.BLOCKS, ids=cases.name)
def test_values_are_the_oracles(ops, shape, granularity, dtype, device):
    x, grid, expected = example(shape, granularity, dtype, (-8, 7))
    cases.assert_same(run(ops, device, x, grid, granularity), expected)


@pytest.mark.parametrize("quant_range", [*cases.RANGES, (0, 1), (65534, 65535), (-32768, -32767)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=cases.name)
def test_every_range(ops, dtype, quant_range, device):
    x, grid, expected = example((131,), PerTensor(), dtype, quant_range)
    cases.assert_same(run(ops, device, x, grid, PerTensor()), expected)


@pytest.mark.parametrize(
    "quant_min, quant_max, dtype",
    [
        (0, 255, torch.uint8),
        (0, 1, torch.uint8),
        (255, 256, torch.uint16),
        (0, 256, torch.uint16),
        (0, 65535, torch.uint16),
        (-1, 0, torch.int8),
        (-128, 127, torch.int8),
        (-129, 127, torch.int16),
        (-128, 128, torch.int16),
        (-1, 255, torch.int16),
        (-32768, 32767, torch.int16),
    ],
)
def test_the_narrower_type_that_holds_both_ends(ops, quant_min, quant_max, dtype, device):
    x = torch.tensor([-1e9, 1e9, 0.0], device=device)
    zero_point = torch.tensor(quant_min, dtype=torch.int32, device=device)
    q = ops.quantize(x, torch.tensor(1.0, device=device), zero_point, quant_min, quant_max)
    assert q.dtype == dtype
    assert q.tolist() == [quant_min, quant_max, quant_min]


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("quant_range", [(0, 255), (-128, 127), (0, 65535), (-32768, 32767)], ids=str)
def test_infinities_and_the_largest_numbers_saturate_and_nan_is_the_zero_point(
    ops, dtype, quant_range, device
):
    largest = torch.finfo(dtype).max
    x = torch.tensor([np.inf, largest, -np.inf, -largest, np.nan, 0.0, -0.0], dtype=dtype, device=device)
    scale = torch.tensor(2.0**-40, dtype=cases.compute_dtype(dtype), device=device)
    low, high = quant_range
    q = ops.quantize(x, scale, torch.tensor(low + 3, dtype=torch.int32, device=device), low, high)
    assert q.tolist() == [high, high, low, low, low + 3, low + 3, low + 3]


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("quant_range", [(-8, 7), (0, 65535)], ids=str)
def test_strides_change_no_value_and_come_out_as_empty_like_gives_them(ops, layout, quant_range, device):
    place, shape = cases.LAYOUTS[layout]
    x = cases.mixed(shape, device=device)
    for granularity in [
        PerTensor(),
        *([cases.PerChannel(1), cases.PerToken(), cases.PerGroup(5)] if shape else []),
    ]:
        grid = cases.grid(shape, granularity, quant_range=quant_range, device=device)
        q = ops.quantize(place(x), *grid, granularity=granularity)
        cases.assert_same(q, ops.quantize(x, *grid, granularity=granularity))
        assert q.stride() == torch.empty_like(place(x)).stride()


def test_numbers_per_tensor(device):
    x = cases.normal((20,), device=device)
    for implementation in ("public", "reference"):
        quantize = IMPLEMENTATIONS[implementation].quantize
        expected = quantize(x, torch.tensor(0.5, device=device), torch.tensor([3], device=device), 0, 15)
        cases.assert_same(quantize(x, 0.5, 3, 0, 15), expected)


def test_nothing_requires_grad(ops, device):
    x = cases.normal((8,), device=device, requires_grad=True)
    scale = torch.tensor(0.5, device=device, requires_grad=True)
    assert not ops.quantize(x, scale, torch.tensor(0, dtype=torch.int32, device=device), -8, 7).requires_grad
