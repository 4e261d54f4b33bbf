"""All 16-bit floats, a sample of 32-bit floats and all integers, compared with the numpy oracle."""

import math

import numpy as np
import pytest
import torch

import cases
import oracle
from qatfast import PerChannel

# (scale, zero_point, quant_min, quant_max): powers of two, other numbers, the smallest and the
# largest scale, and every width.
GRIDS = (
    (1.0, 0, -128, 127),
    (2.0**-7, 128, 0, 255),
    (0.1, 3, 0, 15),
    (1 / 3, -5, -7, 7),
    (math.pi, 30000, 0, 65535),
    (1e-3, -32768, -32768, 32767),
    (6.1e-5, 1, 0, 3),
    (2.0**-126, 77, 0, 255),
    (2.0**-149, 0, -32768, 32767),
    (1e-40, 1, 0, 255),
    (3e38, 0, -8, 7),
    (700.7, 255, 0, 255),
)
CHUNK = 2**22


def every_16_bit_pattern(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def check(ops, x, grid, device):
    scale, zero_point, low, high = grid
    wide = x.double().numpy() if x.dtype == torch.float64 else x.float().numpy()
    values, integers = oracle.fake_quantize_affine_array(wide, scale, zero_point, low, high)
    arguments = (
        x.to(device),
        torch.tensor(scale, dtype=cases.compute_dtype(x.dtype), device=device),
        torch.tensor(zero_point, dtype=torch.int32, device=device),
        low,
        high,
    )
    expected = oracle.round_array(values, x.dtype) + torch.zeros((), dtype=x.dtype)
    cases.assert_same(ops.fake_quantize_affine(*arguments), expected)
    q = ops.quantize(*arguments)
    assert np.array_equal(cases.bits(q).numpy(), integers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_16_bit_float(ops, dtype, grid, device):
    check(ops, every_16_bit_pattern(dtype), grid, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("num_bits", [2, 8])
def test_every_16_bit_float_as_a_range_of_its_own(ops, dtype, symmetric, num_bits, device):
    """Tests a block [x, x / 3] for each finite x."""
    x = every_16_bit_pattern(dtype)
    x = x[x.isfinite()]
    x = torch.stack([x, x / 3], 1)
    wide = x.float().numpy()
    low_end, high_end = oracle.quant_range(num_bits, symmetric)
    low, high = np.minimum(wide.min(1), 0), np.maximum(wide.max(1), 0)
    with np.errstate(over="ignore"):
        if symmetric:
            scale = np.maximum(-low, high) / np.float32(high_end)
        else:
            steps = np.float32(high_end - low_end)
            scale = np.where(np.isinf(high - low), high / steps - low / steps, (high - low) / steps)
    scale = np.maximum(scale, np.float32(2.0**-126))
    zero_point = (
        np.zeros_like(scale) if symmetric else np.clip(low_end - np.rint(low / scale), low_end, high_end)
    )
    found = ops.choose_qparams(x.to(device), num_bits, symmetric=symmetric, granularity=PerChannel(0))
    cases.assert_same(found[0], torch.from_numpy(scale))
    cases.assert_same(found[1], torch.from_numpy(zero_point).to(torch.int32))
    q = np.clip(np.rint(wide / scale[:, None]) + zero_point[:, None], low_end, high_end)
    with np.errstate(over="ignore"):
        y = (q - zero_point[:, None]) * scale[:, None]
    expected = oracle.round_array(y, dtype) + torch.zeros((), dtype=dtype)
    y = ops.fake_quantize(x.to(device), num_bits, symmetric=symmetric, granularity=PerChannel(0))
    cases.assert_same(y, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("num_bits", [2, 5, 8, 9])
def test_every_16_bit_float_of_one_tensor(ops, dtype, symmetric, num_bits, device):
    """Tests all numbers between two ends, which are simple (so that ties occur) or arbitrary."""
    every = every_16_bit_pattern(dtype)
    ends = [
        (-1, 1),
        (-1, 2),
        (-1.5, 3.5),
        (0, 255),
        (-127, 63.5),
        (-5, 0),
        (-85, 42.5),
        (-51, 204),
        (2**-14, 1),
    ]
    ends += np.random.default_rng(num_bits).normal(0, 4, (20, 2)).tolist()
    for end, other in ends:
        low, high = torch.tensor(sorted((end, other))).to(dtype)
        x = every[(every >= low) & (every <= high)]
        x = torch.cat([x, x[:1].expand(4096)])
        quant_range = oracle.quant_range(num_bits, symmetric)
        scale, zero_point = ops.choose_qparams(x.to(device), num_bits, symmetric=symmetric)
        values, _ = oracle.fake_quantize_affine_array(
            x.float().numpy(), scale.item(), zero_point.item(), *quant_range
        )
        expected = oracle.round_array(values, dtype) + torch.zeros((), dtype=dtype)
        cases.assert_same(ops.fake_quantize(x.to(device), num_bits, symmetric=symmetric), expected)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_walk_through_every_32_bit_float(ops, grid, device):
    """A prime stride reaches all exponents, low bits, NaN payloads and both signs."""
    patterns = np.arange(GRIDS.index(grid), 2**32, 3001, dtype=np.uint32)
    check(ops, torch.from_numpy(patterns.view(np.float32)), grid, device)


@pytest.mark.parametrize("grid", GRIDS[:6], ids=str)
def test_random_64_bit_floats(ops, grid, device):
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**64, 200_000, dtype=np.uint64, endpoint=False).view(np.float64)
    near = rng.standard_normal(200_000) * grid[0] * 300
    check(ops, torch.from_numpy(np.concatenate([patterns, near])), grid, device)


def test_many_scales_next_to_ties(ops, device):
    """Tests a scale per row on multiples of half an interval and on the adjacent numbers."""
    rng = np.random.default_rng(0)
    rows = 1500
    scale = (rng.uniform(1, 2, rows) * np.exp2(rng.integers(-126, 119, rows))).astype(np.float32)
    halves = (np.arange(-128, 128) + 0.5) * scale.astype(np.float64)[:, None]
    center = halves.astype(np.float32)
    up, down = np.nextafter(center, np.float32(np.inf)), np.nextafter(center, np.float32(-np.inf))
    x = np.concatenate([center, up, down, np.nextafter(up, np.float32(np.inf))], 1)
    values, integers = oracle.fake_quantize_affine_array(x, scale[:, None], 0, -128, 127)
    arguments = (
        torch.from_numpy(x).to(device),
        torch.from_numpy(scale).to(device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        -128,
        127,
    )
    cases.assert_same(
        ops.fake_quantize_affine(*arguments, granularity=PerChannel(0)), torch.from_numpy(values)
    )
    q = ops.quantize(*arguments, granularity=PerChannel(0))
    assert np.array_equal(q.cpu().numpy(), integers)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("integer", cases.INTEGERS, ids=cases.name)
def test_every_integer(ops, integer, dtype, device):
    info = torch.iinfo(integer)
    q = torch.arange(info.min, info.max + 1, dtype=torch.int32)
    compute = np.float64 if dtype == torch.float64 else np.float32
    for scale, zero_point, _, _ in GRIDS:
        with np.errstate(over="ignore"):
            y = (q.numpy() - zero_point).astype(compute) * compute(scale)
        found = ops.dequantize(
            q.to(integer).to(device),
            torch.tensor(scale, dtype=cases.compute_dtype(dtype), device=device),
            torch.tensor(zero_point, dtype=torch.int32, device=device),
            dtype=dtype,
        )
        cases.assert_same(found, oracle.round_array(y, dtype) + torch.zeros((), dtype=dtype))


@pytest.mark.exhaustive
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_32_bit_float(ops, grid, device):
    for start in range(0, 2**32, CHUNK):
        patterns = np.arange(start, start + CHUNK, dtype=np.uint64).astype(np.uint32)
        check(ops, torch.from_numpy(patterns.view(np.float32)), grid, device)
