"""NaN, infinities, zeros, denormals, the largest finite numbers, constants and empty tensors."""

import math

import pytest
import torch

import cases
import oracle
from qatfast import PerChannel, PerGroup, PerTensor, PerToken

DTYPES = pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
GRANULARITIES = pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(2), PerToken()], ids=str
)


def eps(dtype):
    return torch.finfo(cases.compute_dtype(dtype)).tiny


def check_against_the_oracle(ops, x, device, num_bits=4, symmetric=False, granularity=PerTensor()):
    options = {"symmetric": symmetric, "granularity": granularity}
    cases.assert_same(
        ops.fake_quantize(x.to(device), num_bits, **options), oracle.fake_quantize(x, num_bits, **options)
    )
    cases.assert_all_same(
        ops.choose_qparams(x.to(device), num_bits, **options), oracle.choose_qparams(x, num_bits, **options)
    )


@DTYPES
@SYMMETRIC
@pytest.mark.parametrize("num_bits", [2, 8, 16])
def test_every_pair_of_special_values(ops, dtype, symmetric, num_bits, device):
    """Each pair is a block, once alone and once with an additional 1."""
    special = torch.tensor(cases.special_values(dtype)).to(dtype)
    pairs = torch.cartesian_prod(special, special)
    check_against_the_oracle(ops, pairs, device, num_bits, symmetric, PerToken())
    with_one = torch.cat([pairs, torch.ones_like(pairs[:, :1])], 1)
    check_against_the_oracle(ops, with_one, device, num_bits, symmetric, PerChannel(0))


@DTYPES
@SYMMETRIC
@GRANULARITIES
def test_nan_and_infinities_stay_out_of_the_range(ops, dtype, symmetric, granularity, device):
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5], [-1.0, 2.5, 0.25, -3.0]], dtype=dtype, device=device)
    dirty = x.clone()
    dirty[0, 3], dirty[1, 0], dirty[1, 2] = math.nan, math.inf, -math.inf
    clean = torch.where(dirty.isfinite(), dirty, 0)
    options = {"symmetric": symmetric, "granularity": granularity}
    cases.assert_all_same(ops.choose_qparams(dirty, **options), ops.choose_qparams(clean, **options))
    y, expected = ops.fake_quantize(dirty, **options), ops.fake_quantize(clean, **options)
    assert y.isnan().tolist() == dirty.isnan().tolist()
    cases.assert_same(y[dirty.isfinite()], expected[dirty.isfinite()])
    assert y[dirty.isinf()].isfinite().all()


@DTYPES
@SYMMETRIC
@GRANULARITIES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -0.0])
def test_a_block_without_a_finite_range_has_the_smallest_scale(
    ops, dtype, symmetric, granularity, value, device
):
    x = torch.full((2, 4), value, dtype=dtype, device=device)
    scale, zero_point = ops.choose_qparams(x, 4, symmetric=symmetric, granularity=granularity)
    assert (scale == eps(dtype)).all()
    assert (zero_point == 0).all()
    y = ops.fake_quantize(x, 4, symmetric=symmetric, granularity=granularity)
    cases.assert_same(y, oracle.fake_quantize(x.cpu(), 4, symmetric=symmetric, granularity=granularity))


@DTYPES
@pytest.mark.parametrize(
    "shape, granularity", [block for block in cases.BLOCKS if 0 in block[0]], ids=cases.name
)
def test_empty_tensors(ops, dtype, shape, granularity, device):
    x = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    y = ops.fake_quantize(x, granularity=granularity)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    scale, zero_point = ops.choose_qparams(x, granularity=granularity)
    assert (scale == eps(dtype)).all()
    assert (zero_point == 0).all()
    q = ops.quantize(x, scale, zero_point, 0, 255, granularity=granularity)
    assert ops.dequantize(q, scale, zero_point, granularity=granularity, dtype=dtype).shape == shape
    affine = ops.fake_quantize_affine(x, scale, zero_point, 0, 255, granularity=granularity)
    (gradient,) = torch.autograd.grad(affine, x, torch.empty_like(affine))
    assert gradient.shape == shape


@DTYPES
@SYMMETRIC
def test_the_largest_finite_numbers_give_no_nan(ops, dtype, symmetric, device):
    largest = torch.finfo(dtype).max
    for num_bits in (2, 8, 16):
        for values in ([largest, -largest], [largest, -largest / 2], [largest], [-largest], [largest, 1.0]):
            x = torch.tensor([*values, 0.0], dtype=dtype)
            check_against_the_oracle(ops, x, device, num_bits, symmetric)
            scale, _ = ops.choose_qparams(x.to(device), num_bits, symmetric=symmetric)
            assert scale.isfinite()
            y = ops.fake_quantize(x.to(device), num_bits, symmetric=symmetric)
            assert not y.isnan().any()
            assert y[-1] == 0


def test_a_result_past_the_largest_half_is_infinite(ops, device):
    scale = torch.tensor(30000.0, device=device)
    zero_point = torch.tensor(0, dtype=torch.int32, device=device)
    x = torch.tensor([60000.0, 65504.0, -65504.0, 30000.0], dtype=torch.float16, device=device)
    y = ops.fake_quantize_affine(x, torch.tensor(25600.0, device=device), zero_point, -8, 7)
    assert y.tolist() == [51200.0, math.inf, -math.inf, 25600.0]
    q = torch.tensor([-3, 2, 3], dtype=torch.int8, device=device)
    assert ops.dequantize(q, scale, zero_point, dtype=torch.float16).tolist() == [
        -math.inf,
        60000.0,
        math.inf,
    ]


def test_a_result_past_the_largest_float_is_infinite(ops, device):
    scale = torch.tensor(2.0**127, device=device)
    zero_point = torch.tensor(0, dtype=torch.int32, device=device)
    x = torch.tensor(
        [torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, 2.0**127], device=device
    )
    assert ops.fake_quantize_affine(x, scale, zero_point, -8, 7).tolist() == [math.inf, -math.inf, 2.0**127]


@DTYPES
@SYMMETRIC
@pytest.mark.parametrize("value", [1.0, -1.0, 0.1, -3e-5, 6e4])
@pytest.mark.parametrize("size", [1, 2, 16, 33])
def test_constants(ops, dtype, symmetric, value, size, device):
    x = torch.full((size,), value, dtype=dtype)
    check_against_the_oracle(ops, x, device, 8, symmetric)
    y = ops.fake_quantize(x.to(device), symmetric=symmetric)
    assert y.unique().numel() == 1
    torch.testing.assert_close(y.cpu(), x, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_a_tensor_far_from_zero_is_not_destroyed(ops, device):
    x = torch.tensor([5.0, 5.5, 6.0], device=device)
    assert (ops.fake_quantize(x) - x).abs().max() <= 6 / 255 / 2 + 1e-6
    assert (ops.fake_quantize(-x) + x).abs().max() <= 6 / 255 / 2 + 1e-6


@DTYPES
@SYMMETRIC
def test_denormals_keep_a_grid_of_normal_steps(ops, dtype, symmetric, device):
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    x = torch.tensor([smallest * step for step in (-9, -5, -1, 0, 1, 2, 3, 7, 11)], dtype=torch.float64).to(
        dtype
    )
    for num_bits in (2, 4, 16):
        check_against_the_oracle(ops, x, device, num_bits, symmetric)
    tiny = torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.0, 2.5, 3.0], dtype=torch.float64) * info.tiny
    check_against_the_oracle(ops, tiny.to(dtype), device, 4, symmetric)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.name)
def test_given_scales_may_be_denormal_or_large(ops, dtype, device):
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    special = torch.tensor(cases.special_values(dtype), dtype=dtype)
    zero_point = torch.tensor(1, dtype=torch.int32, device=device)
    for scale in (smallest, 3 * smallest, info.tiny * 0.75, info.tiny, 1.0, info.max / 2, info.max):
        scale = torch.tensor(scale, dtype=dtype)
        x = torch.cat([special, torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], dtype=dtype) * scale])
        y = ops.fake_quantize_affine(x.to(device), scale.to(device), zero_point, -4, 5)
        cases.assert_same(y, oracle.fake_quantize_affine(x, scale, zero_point, -4, 5))
        q = ops.quantize(x.to(device), scale.to(device), zero_point, -4, 5)
        cases.assert_same(q, oracle.quantize(x, scale, zero_point, -4, 5))


@DTYPES
@SYMMETRIC
def test_there_is_no_minus_zero(ops, dtype, symmetric, device):
    x = cases.normal((4096,), dtype, device=device) * torch.logspace(0, -6, 4096, device=device).to(dtype)
    y = ops.fake_quantize(x, 3, symmetric=symmetric)
    assert (y == 0).any()
    assert not y[y == 0].signbit().any()
    zeros = torch.tensor([0.0, -0.0], dtype=dtype, device=device)
    assert not ops.fake_quantize(zeros, symmetric=symmetric).signbit().any()
    scale = torch.tensor(1.0, dtype=cases.compute_dtype(dtype), device=device)
    for low, high in ((-8, 7), (0, 15)):
        y = ops.fake_quantize_affine(
            x, scale, torch.tensor(max(low, 0), dtype=torch.int32, device=device), low, high
        )
        assert not y[y == 0].signbit().any()


@pytest.mark.parametrize("position", [0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 100])
def test_one_nan_or_infinity_anywhere(ops, position, device):
    for value in (math.nan, math.inf, -math.inf):
        x = cases.normal((101,))
        x[position] = value
        check_against_the_oracle(ops, x, device, 8)
        check_against_the_oracle(ops, x.repeat(3, 1), device, 8, granularity=PerChannel(0))


def test_flushing_denormals_is_off_while_the_tests_run():
    assert (torch.tensor(2.0**-149) * 1.0).item() == 2.0**-149


@DTYPES
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(40)], ids=str)
@pytest.mark.parametrize(
    "lo, hi, clamped", [(-1.5, 253.5, True), (-1.5, 253.0, False), (-0.5, 254.5, False)], ids=str
)
def test_a_blocks_own_end_may_lie_beyond_its_grid(ops, dtype, granularity, lo, hi, clamped, device):
    """Ties round to even: if both ends round outwards, 255 intervals are too few for the range."""
    x = torch.linspace(lo, hi, 40, dtype=torch.float64).to(dtype).repeat(3, 1)
    if granularity == PerChannel(1):
        x = x.T.contiguous()
    check_against_the_oracle(ops, x, device, 8, False, granularity)
    if dtype == torch.float32:
        scale, zero_point = ops.choose_qparams(x.to(device), granularity=granularity)
        assert ((x.max() / scale.cpu()).round() > 255 - zero_point.cpu()).all() == clamped
