"""Properties that hold for all tensors, tested with hypothesis."""

from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as numpy_strategies

import cases
from operators import IMPLEMENTATIONS
from qatfast import PerChannel, PerGroup, PerTensor, PerToken, reference
from qatfast.config import quant_range

EITHER = pytest.mark.parametrize("name", ["public", "reference"])
NUM_BITS = st.integers(2, 16)
WIDTHS = {torch.float32: 32, torch.float64: 64, torch.float16: 16}


def floats(dtype, *, finite=True, largest=None):
    limits = {} if largest is None else {"min_value": -largest, "max_value": largest}
    return st.floats(width=WIDTHS[dtype], allow_nan=not finite, allow_infinity=not finite, **limits)


@st.composite
def tensors(draw, dtype=torch.float32, *, finite=True, largest=None, min_dims=0):
    shape = draw(numpy_strategies.array_shapes(min_dims=min_dims, max_dims=3, min_side=1, max_side=9))
    elements = floats(dtype, finite=finite, largest=largest)
    return torch.from_numpy(
        draw(numpy_strategies.arrays(f"float{WIDTHS[dtype]}", shape, elements=elements)).copy()
    )


class Grid(NamedTuple):
    scale: torch.Tensor
    zero_point: torch.Tensor
    quant_min: int
    quant_max: int


@st.composite
def grids(draw, dtype=torch.float32, *, smallest=2.0**-100, largest=2.0**100):
    quant_min = draw(st.sampled_from([0, -128, -7, 0, -32768, 3]))
    quant_max = quant_min + draw(st.sampled_from([1, 2, 14, 255, 65535 if quant_min <= 0 else 300]))
    scale = draw(st.floats(smallest, largest, width=WIDTHS[dtype]))
    zero_point = draw(st.integers(quant_min, quant_max))
    return Grid(
        torch.tensor(scale, dtype=dtype), torch.tensor(zero_point, dtype=torch.int32), quant_min, quant_max
    )


@st.composite
def granularities(draw, shape):
    if not shape:
        return PerTensor()
    groups = [size for size in range(1, shape[-1] + 1) if shape[-1] % size == 0]
    axes = st.integers(-len(shape), len(shape) - 1)
    return draw(
        st.one_of(
            st.just(PerTensor()),
            st.just(PerToken()),
            axes.map(PerChannel),
            st.sampled_from(groups).map(PerGroup),
        )
    )


def implementation(name):
    return IMPLEMENTATIONS[name]


@EITHER
@given(data=st.data(), x=tensors(finite=False), num_bits=NUM_BITS, symmetric=st.booleans())
def test_zero_maps_to_zero(name, data, x, num_bits, symmetric):
    x.view(-1)[data.draw(st.integers(0, x.numel() - 1))] = data.draw(st.sampled_from([0.0, -0.0]))
    granularity = data.draw(granularities(tuple(x.shape)))
    y = implementation(name).fake_quantize(x, num_bits, symmetric=symmetric, granularity=granularity)
    cases.assert_same(y[x == 0], torch.zeros_like(y[x == 0]))


@EITHER
@given(x=tensors(finite=False), grid=grids())
def test_zero_maps_to_zero_on_a_given_grid(name, x, grid):
    x.view(-1)[0] = 0
    y = implementation(name).fake_quantize_affine(x, *grid)
    cases.assert_same(y[x == 0], torch.zeros_like(y[x == 0]))


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.name)
@given(data=st.data())
def test_a_given_grid_is_idempotent(name, dtype, data):
    x = data.draw(tensors(dtype, finite=False))
    grid = data.draw(grids(dtype, smallest=torch.finfo(dtype).tiny, largest=torch.finfo(dtype).max))
    once = implementation(name).fake_quantize_affine(x, *grid)
    cases.assert_same(implementation(name).fake_quantize_affine(once, *grid), once)


def assert_within_half_a_step(y, x, scale):
    error, step = (y.double() - x.double()).abs(), scale.double()
    rounding = x.double().abs() * 2.0**-22 + 2.0**-149
    assert (error <= step / 2 * (1 + 2.0**-20) + rounding).all()


@EITHER
@given(x=tensors(largest=2.0**120), num_bits=NUM_BITS, symmetric=st.booleans())
def test_the_error_is_at_most_half_a_step(name, x, num_bits, symmetric):
    scale, _ = implementation(name).choose_qparams(x, num_bits, symmetric=symmetric)
    assert_within_half_a_step(implementation(name).fake_quantize(x, num_bits, symmetric=symmetric), x, scale)


@EITHER
@given(x=tensors(), grid=grids())
def test_the_error_on_a_given_grid_is_at_most_half_a_step_inside_its_range(name, x, grid):
    y = implementation(name).fake_quantize_affine(x, *grid)
    steps = x.double() / grid.scale.double() + grid.zero_point
    inside = (steps >= grid.quant_min) & (steps <= grid.quant_max)
    assert_within_half_a_step(y[inside], x[inside], grid.scale)
    low, high = ((end - grid.zero_point) * grid.scale for end in (grid.quant_min, grid.quant_max))
    assert (y[steps >= grid.quant_max] == high).all()
    assert (y[steps <= grid.quant_min] == low).all()


@EITHER
@pytest.mark.parametrize("dtype", WIDTHS, ids=cases.name)
@given(data=st.data(), num_bits=NUM_BITS, symmetric=st.booleans())
def test_it_is_monotone(name, dtype, data, num_bits, symmetric):
    x = data.draw(tensors(dtype, min_dims=1)).flatten().sort().values
    y = implementation(name).fake_quantize(x, num_bits, symmetric=symmetric)
    assert (y[1:] >= y[:-1]).all()


@EITHER
@given(x=tensors(min_dims=1), grid=grids())
def test_a_given_grid_is_monotone(name, x, grid):
    y = implementation(name).fake_quantize_affine(x.flatten().sort().values, *grid)
    assert (y[1:] >= y[:-1]).all()


@EITHER
@given(x=tensors(finite=False, min_dims=1), num_bits=NUM_BITS, seed=st.integers(0, 2**32 - 1))
def test_a_permutation_of_the_elements_permutes_the_result(name, x, num_bits, seed):
    x = x.flatten()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(x.numel()))
    fake_quantize = implementation(name).fake_quantize
    cases.assert_same(fake_quantize(x[order], num_bits), fake_quantize(x, num_bits)[order])


@EITHER
@given(data=st.data(), x=tensors(finite=False, min_dims=2), num_bits=NUM_BITS, symmetric=st.booleans())
def test_a_transposition_transposes_the_result(name, data, x, num_bits, symmetric):
    one, other = data.draw(st.permutations(range(x.dim())))[:2]
    fake_quantize = implementation(name).fake_quantize
    options = {"symmetric": symmetric}
    moved = fake_quantize(x.transpose(one, other), num_bits, **options)
    cases.assert_same(moved, fake_quantize(x, num_bits, **options).transpose(one, other))
    moved = fake_quantize(x.transpose(one, other), num_bits, granularity=PerChannel(one), **options)
    straight = fake_quantize(x, num_bits, granularity=PerChannel(other), **options)
    cases.assert_same(moved, straight.transpose(one, other))


@EITHER
@given(data=st.data(), x=tensors(finite=False, min_dims=1), num_bits=NUM_BITS, symmetric=st.booleans())
def test_a_granularity_is_a_loop_over_its_blocks(name, data, x, num_bits, symmetric):
    fake_quantize = implementation(name).fake_quantize
    options = {"symmetric": symmetric}
    axis = data.draw(st.integers(-x.dim(), x.dim() - 1))
    channels = [fake_quantize(channel, num_bits, **options) for channel in x.unbind(axis)]
    y = fake_quantize(x, num_bits, granularity=PerChannel(axis), **options)
    cases.assert_same(y, torch.stack(channels, axis))
    rows = torch.stack([fake_quantize(row, num_bits, **options) for row in x.reshape(-1, x.shape[-1])])
    cases.assert_same(fake_quantize(x, num_bits, granularity=PerToken(), **options), rows.reshape(x.shape))
    size = data.draw(st.sampled_from([size for size in range(1, 10) if x.shape[-1] % size == 0]))
    groups = fake_quantize(x.unflatten(-1, (-1, size)), num_bits, granularity=PerToken(), **options)
    y = fake_quantize(x, num_bits, granularity=PerGroup(size), **options)
    cases.assert_same(y, groups.flatten(-2))


@EITHER
@given(data=st.data(), num_bits=NUM_BITS, symmetric=st.booleans(), exponent=st.integers(-40, 40))
def test_a_power_of_two_scales_the_result(name, data, num_bits, symmetric, exponent):
    x = data.draw(tensors(largest=2.0**60))
    x = torch.where(x.abs() < 2.0**-40, 0, x)
    fake_quantize = implementation(name).fake_quantize
    scaled = fake_quantize(x * 2.0**exponent, num_bits, symmetric=symmetric)
    cases.assert_same(scaled, fake_quantize(x, num_bits, symmetric=symmetric) * 2.0**exponent)


@EITHER
@given(x=tensors(finite=False), num_bits=NUM_BITS)
def test_a_symmetric_grid_treats_both_signs_alike(name, x, num_bits):
    fake_quantize = implementation(name).fake_quantize
    negative = fake_quantize(-x, num_bits, symmetric=True)
    cases.assert_same(negative, 0 - fake_quantize(x, num_bits, symmetric=True))


@EITHER
@given(data=st.data(), x=tensors(finite=False), num_bits=st.integers(2, 5), symmetric=st.booleans())
def test_a_block_has_no_more_values_than_the_grid_has_points(name, data, x, num_bits, symmetric):
    low, high = quant_range(num_bits, symmetric, True)
    y = implementation(name).fake_quantize(x, num_bits, symmetric=symmetric)
    assert y[~y.isnan()].unique().numel() <= high - low + 1
    scale, zero_point = implementation(name).choose_qparams(x, num_bits, symmetric=symmetric)
    q = implementation(name).quantize(x, scale, zero_point, low, high).to(torch.int32)
    assert (q >= low).all()
    assert (q <= high).all()
    assert (zero_point >= low).all()
    assert (zero_point <= high).all()


@pytest.mark.parametrize("dtype", WIDTHS, ids=cases.name)
@given(data=st.data(), num_bits=NUM_BITS, symmetric=st.booleans())
def test_the_public_functions_and_the_reference_agree(kernels, dtype, data, num_bits, symmetric):
    x = data.draw(tensors(dtype, finite=False))
    granularity = data.draw(granularities(tuple(x.shape)))
    public, options = implementation("public"), {"symmetric": symmetric, "granularity": granularity}
    expected = reference.fake_quantize(x, num_bits, **options)
    cases.assert_same(public.fake_quantize(x, num_bits, **options), expected)
    qparams = reference.choose_qparams(x, num_bits, **options)
    cases.assert_all_same(public.choose_qparams(x, num_bits, **options), qparams)
    arguments = (*qparams, *quant_range(num_bits, symmetric, True))
    cases.assert_same(
        public.quantize(x, *arguments, granularity=granularity),
        reference.quantize(x, *arguments, granularity=granularity),
    )
