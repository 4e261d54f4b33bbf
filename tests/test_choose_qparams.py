from functools import cache

import pytest
import torch

import cases
import oracle
from qatfast import PerChannel, PerGroup, PerTensor, PerToken

GRIDS = pytest.mark.parametrize("grid", cases.GRIDS)


@cache
def example(shape, granularity, dtype, num_bits, grid):
    x = cases.mixed(shape, dtype)
    return x, oracle.choose_qparams(x, num_bits, **cases.GRIDS[grid], granularity=granularity)


@GRIDS
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("shape, granularity", cases.BLOCKS, ids=cases.name)
def test_values_are_the_oracles(ops, shape, granularity, dtype, grid, device):
    x, expected = example(shape, granularity, dtype, 5, grid)
    qparams = ops.choose_qparams(x.to(device), 5, **cases.GRIDS[grid], granularity=granularity)
    cases.assert_all_same(qparams, expected)


@GRIDS
@pytest.mark.parametrize("num_bits", range(2, 17))
def test_every_bit_width(ops, num_bits, grid, device):
    x, expected = example((131,), PerTensor(), torch.float32, num_bits, grid)
    cases.assert_all_same(ops.choose_qparams(x.to(device), num_bits, **cases.GRIDS[grid]), expected)


@pytest.mark.parametrize(
    "granularity, shape",
    [
        (PerTensor(), ()),
        (PerChannel(0), (2,)),
        (PerChannel(1), (3,)),
        (PerChannel(-1), (8,)),
        (PerGroup(4), (2, 3, 2)),
        (PerToken(), (2, 3)),
    ],
    ids=str,
)
def test_one_element_a_block(ops, granularity, shape, device):
    for qparam in ops.choose_qparams(cases.normal((2, 3, 8), device=device), granularity=granularity):
        assert qparam.shape == shape
        assert qparam.is_contiguous()
        assert qparam.device.type == device


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_strides_change_no_value(ops, layout, dtype, device):
    place, shape = cases.LAYOUTS[layout]
    x = cases.mixed(shape, dtype, device=device)
    for granularity in [
        PerTensor(),
        *([PerChannel(0), PerChannel(1), PerToken(), PerGroup(5)] if shape else []),
    ]:
        expected = ops.choose_qparams(x, granularity=granularity)
        cases.assert_all_same(ops.choose_qparams(place(x), granularity=granularity), expected)


@pytest.mark.parametrize("size", [*range(1, 70), 127, 255, 257, 1023, 4097])
def test_an_extreme_is_found_wherever_it_stands(ops, size, device):
    positions = range(size) if size < 70 else (0, 1, size // 2, size - 2, size - 1)
    x = torch.zeros((len(positions), size))
    for row, position in enumerate(positions):
        x[row, position] = 2.0 if row % 2 else -2.0
    scale, zero_point = ops.choose_qparams(x.to(device), 2, granularity=PerToken())
    assert torch.equal(scale.cpu(), torch.full((len(positions),), 2 / 3))
    assert zero_point.tolist() == [0 if row % 2 else 3 for row in range(len(positions))]
    for row in x.to(device):
        assert ops.choose_qparams(row, 2)[0].item() == scale[0].item()


def test_nothing_requires_grad(ops, device):
    scale, zero_point = ops.choose_qparams(cases.normal((8,), device=device, requires_grad=True))
    assert not scale.requires_grad
    assert not zero_point.requires_grad
