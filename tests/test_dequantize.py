from functools import cache

import pytest
import torch

import cases
import oracle
from operators import IMPLEMENTATIONS
from qatfast import PerTensor


@cache
def example(shape, granularity, integer, dtype):
    q = cases.integers(shape, integer)
    ends = (torch.iinfo(integer).min, torch.iinfo(integer).max)
    scale, zero_point, _, _ = cases.grid(shape, granularity, dtype, ends)
    return q, scale, zero_point, oracle.dequantize(q, scale, zero_point, granularity=granularity, dtype=dtype)


@pytest.mark.parametrize("integer", cases.INTEGERS, ids=cases.name)
@pytest.mark.parametrize("shape, granularity", cases.BLOCKS, ids=cases.name)
def test_values_are_the_oracles(ops, shape, granularity, integer, device):
    for dtype in cases.FLOATS:
        q, scale, zero_point, expected = example(shape, granularity, integer, dtype)
        arguments = q.to(device), scale.to(device), zero_point.to(device)
        cases.assert_same(ops.dequantize(*arguments, granularity=granularity, dtype=dtype), expected)


def test_the_default_is_float32(ops, device):
    q, scale, zero_point, expected = example((131,), PerTensor(), torch.int8, torch.float32)
    cases.assert_same(ops.dequantize(q.to(device), scale.to(device), zero_point.to(device)), expected)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-126, 2.0**-24, 3e-8, 2e-3, 1.7, 1e30, 3.4e38])
def test_underflow_and_overflow_round_as_ieee_and_never_to_minus_zero(ops, scale, dtype, device):
    q = torch.tensor([-128, -127, -2, -1, 0, 1, 2, 3, 127], dtype=torch.int8)
    scale = torch.tensor(scale, dtype=cases.compute_dtype(dtype))
    for zero_point in (-32768, 0, 65535):
        zero_point = torch.tensor(zero_point, dtype=torch.int32)
        y = ops.dequantize(q.to(device), scale.to(device), zero_point.to(device), dtype=dtype)
        cases.assert_same(y, oracle.dequantize(q, scale, zero_point, dtype=dtype))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("integer", cases.INTEGERS, ids=cases.name)
def test_strides_change_no_value_and_come_out_as_empty_like_gives_them(ops, layout, integer, device):
    place, shape = cases.LAYOUTS[layout]
    q = cases.integers(shape, integer, device=device)
    for granularity in [
        PerTensor(),
        *([cases.PerChannel(1), cases.PerToken(), cases.PerGroup(5)] if shape else []),
    ]:
        scale, zero_point, _, _ = cases.grid(shape, granularity, device=device)
        y = ops.dequantize(place(q), scale, zero_point, granularity=granularity)
        cases.assert_same(y, ops.dequantize(q, scale, zero_point, granularity=granularity))
        assert y.stride() == torch.empty_like(place(q)).stride()


def test_numbers_per_tensor(device):
    q = cases.integers((20,), torch.int8, device=device)
    for implementation in ("public", "reference"):
        dequantize = IMPLEMENTATIONS[implementation].dequantize
        expected = dequantize(q, torch.tensor(0.5, device=device), torch.tensor([3], device=device))
        cases.assert_same(dequantize(q, 0.5, 3), expected)


def test_nothing_requires_grad(ops, device):
    q = cases.integers((9,), torch.int8, device=device)
    scale = torch.tensor(0.5, device=device, requires_grad=True)
    zero_point = torch.tensor(0, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="dequantize: expected scale not to require grad"):
        ops.dequantize(q, scale, zero_point)
    assert not ops.dequantize(q, scale.detach(), zero_point).requires_grad
    with torch.no_grad():
        assert not ops.dequantize(q, scale, zero_point).requires_grad
