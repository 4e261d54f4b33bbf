"""The oracle, compared with results computed by hand and with IEEE arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import cases
import oracle
from qatfast import PerChannel, PerGroup, PerTensor, PerToken, QATConfig, QuantSpec


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


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("granularity", [PerTensor(), PerToken()], ids=str)
def test_the_integer_layer_is_that_of_fractions(dtype, granularity):
    input, weight, bias = cases.linear(((3,), 9, 4), dtype)
    input[0, 2] = math.inf
    specs = QuantSpec(8, granularity=granularity), QuantSpec(5, symmetric=True, granularity=granularity)
    y = oracle.int8_linear(input, weight, bias, QATConfig(*specs, bias=QuantSpec(3), output=None))
    grids = []
    for x, spec in zip((input, weight), specs, strict=True):
        ends = oracle.quant_range(spec.num_bits, spec.symmetric)
        scale, zero_point = oracle.choose_qparams(
            x, spec.num_bits, symmetric=spec.symmetric, granularity=granularity
        )
        q = oracle.quantize(x, scale, zero_point, *ends, granularity=granularity)
        rows = (len(x),)
        grids.append((q.tolist(), scale.expand(rows).tolist(), zero_point.expand(rows).tolist()))
    (x_q, x_scale, x_zero), (w_q, w_scale, w_zero) = grids
    biases = oracle.fake_quantize(bias, 3).tolist()
    compute = cases.compute_dtype(dtype)
    for i in range(3):
        for j in range(4):
            total = sum((a - x_zero[i]) * (b - w_zero[j]) for a, b in zip(x_q[i], w_q[j], strict=True))
            scale = oracle.rounded(Fraction(x_scale[i]) * Fraction(w_scale[j]), compute)
            product = oracle.rounded(oracle.rounded(Fraction(total), compute) * scale, compute)
            exact = oracle.rounded(oracle.rounded(product + Fraction(biases[j]), compute), dtype)
            assert y[i, j].item() == exact


def test_the_integer_layer_is_the_float_formula_of_exact_numbers():
    """With the scales 1 and 1/4, the result is 255 * 3 / 4 - 20 / 4 - 1."""
    x, weight = torch.tensor([[255.0, -0.0, 20.0]]), torch.tensor([[0.75, -31.0, -0.25], [0.0, 31.75, 0.0]])
    config = QATConfig(QuantSpec(8), QuantSpec(8, symmetric=True), None, None)
    y = oracle.int8_linear(x, weight, torch.tensor([-1.0, -0.0]), config)
    cases.assert_same(y, torch.tensor([[185.25, 0.0]]))
    x[0, 1], weight[1, 0] = math.nan, math.nan
    assert oracle.int8_linear(x, weight, None, config).isnan().all()


@pytest.mark.parametrize(
    "granularity, expected",
    [
        (PerTensor(), True),
        (PerToken(), True),
        (PerChannel(0), True),
        (PerChannel(-2), True),
        (PerChannel(1), False),
        (PerChannel(-1), False),
        (PerGroup(6), True),
        (PerGroup(3), False),
    ],
    ids=str,
)
def test_which_weights_have_a_grid_a_row(granularity, expected):
    weight = QuantSpec(8, granularity=granularity)
    assert oracle.uses_int8_gemm(QATConfig(QuantSpec(8), weight), 6) == expected
    assert not oracle.uses_int8_gemm(QATConfig(QuantSpec(9), weight), 6)
    assert not oracle.uses_int8_gemm(QATConfig(QuantSpec(8), QuantSpec(9)), 6)
    assert not oracle.uses_int8_gemm(QATConfig(None, weight), 6)
    assert not oracle.uses_int8_gemm(QATConfig(QuantSpec(8, granularity=PerGroup(6)), weight), 6)
