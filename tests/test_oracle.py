"""The oracle itself, against numbers worked out by hand and against IEEE arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import cases
import oracle


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_rounding_keeps_every_number_of_the_format(dtype):
    info = torch.finfo(dtype)
    for value in (info.max, info.tiny, info.smallest_normal * info.eps, 1 + info.eps, -1.5):
        assert oracle.rounded(Fraction(value), dtype) == value


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_rounding_is_half_to_even(dtype):
    eps = Fraction(torch.finfo(dtype).eps)
    assert oracle.rounded(1 + eps / 2, dtype) == 1
    assert oracle.rounded(1 + 3 * eps / 2, dtype) == 1 + 2 * eps
    assert oracle.rounded(-1 - eps * Fraction(501, 1000), dtype) == -1 - eps
    smallest = Fraction(torch.finfo(dtype).smallest_normal) * eps
    assert oracle.rounded(smallest / 2, dtype) == 0
    assert oracle.rounded(smallest * 3 / 2, dtype) == 2 * smallest


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_rounding_overflows_to_infinity(dtype):
    largest = Fraction(torch.finfo(dtype).max)
    half_a_unit = largest * Fraction(torch.finfo(dtype).eps) / 4
    assert oracle.rounded(2 * largest, dtype) == math.inf
    assert oracle.rounded(-2 * largest, dtype) == -math.inf
    assert oracle.rounded(largest + half_a_unit / 2, dtype) == largest


def test_rounding_to_float32_is_numpys():
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**64, size=2000, dtype=np.uint64, endpoint=False)
    values = patterns.view(np.float64)
    values = values[np.abs(values) < 1e50]
    exponents = rng.uniform(-50, 39, size=2000)
    values = np.concatenate([values, rng.standard_normal(2000) * 10.0**exponents])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float32)
    assert [
        float(oracle.rounded(Fraction(value), torch.float32)) for value in values.tolist()
    ] == expected.tolist()


def test_rounding_to_bfloat16_is_the_fractions():
    x = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    x[:1000] = (x[:1000].view(np.uint32) & np.uint32(0xFFFF8000)).view(np.float32)
    expected = [float(oracle.rounded(Fraction(value), torch.bfloat16)) for value in x.tolist()]
    assert oracle.round_array(x, torch.bfloat16).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.name)
@pytest.mark.parametrize("quant_range", cases.RANGES, ids=str)
def test_arrays_and_fractions_agree(dtype, quant_range):
    grid = cases.grid((), cases.PerTensor(), dtype, quant_range)
    x = torch.cat([cases.mixed((300,), dtype), cases.ties((300,), grid.scale, dtype)])
    values, integers = oracle.fake_quantize_affine_array(
        x.numpy(), grid.scale.numpy(), int(grid.zero_point), *quant_range
    )
    cases.assert_same(torch.from_numpy(values), oracle.fake_quantize_affine(x, *grid))
    assert integers.tolist() == oracle.quantize(x, *grid).tolist()


def test_values_worked_out_by_hand():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.5, 2.0, math.nan, math.inf, -math.inf])
    assert [value.item() for value in oracle.choose_qparams(x, 2)] == [1.0, 1]
    assert oracle.quantize(x, torch.tensor(1.0), torch.tensor(1), 0, 3).tolist() == [0, 1, 1, 3, 3, 1, 3, 0]
    y = oracle.fake_quantize(x, 2)
    assert y[:5].tolist() == [-1.0, 0.0, 0.0, 2.0, 2.0]
    assert y[5].isnan()
    assert y[6:].tolist() == [2.0, -1.0]
    assert oracle.inside(x, torch.tensor(1.0), torch.tensor(1), 0, 3).tolist() == [True] * 5 + [False] * 3
