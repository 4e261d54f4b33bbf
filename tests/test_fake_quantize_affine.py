import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import cases
import oracle
from onnx_model import quantize_dequantize
from qatfast import PerChannel, PerGroup, PerTensor, PerToken, checks, fake_quantize_affine, quantize


@cache
def example(shape, granularity, dtype, quant_range):
    grid = cases.grid(shape, granularity, dtype, quant_range)
    x = cases.mixed(shape, dtype)
    use_ties = torch.tensor(np.random.default_rng(9).random(shape) < 0.4)
    x = torch.where(use_ties, cases.ties(shape, grid.scale, dtype), x)
    return x, grid


def to(device, x, grid):
    return x.to(device), grid.scale.to(device), grid.zero_point.to(device), grid.quant_min, grid.quant_max


@cache
def expected_value(*key):
    x, grid = example(*key)
    return oracle.fake_quantize_affine(x, *grid, granularity=key[1])


@cache
def expected_mask(*key):
    x, grid = example(*key)
    return oracle.inside(x, *grid, granularity=key[1])


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("shape, granularity", cases.BLOCKS, ids=cases.name)
def test_values_and_gradients_are_the_oracles(ops, shape, granularity, dtype, device):
    key = (shape, granularity, dtype, (0, 15))
    x, *grid = to(device, *example(*key))
    x.requires_grad_()
    y = ops.fake_quantize_affine(x, *grid, granularity=granularity)
    cases.assert_same(y, expected_value(*key))
    upstream = cases.mixed(shape, dtype, seed=3, device=device)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    cases.assert_same(
        gradient, torch.where(expected_mask(*key), upstream.cpu(), torch.zeros((), dtype=dtype))
    )


@pytest.mark.parametrize("quant_range", [*cases.RANGES, (0, 1), (65534, 65535), (-32768, -32767)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.name)
def test_every_range(ops, dtype, quant_range, device):
    key = ((131,), PerTensor(), dtype, quant_range)
    y = ops.fake_quantize_affine(*to(device, *example(*key)))
    cases.assert_same(y, expected_value(*key))


def test_the_gradient_stops_where_the_rounded_step_leaves_the_range(ops, device):
    edge = [-0.5, -0.75, -0.5 - 2**-24, 2.5, 3.5, 3.5 + 2**-22, 3.5 - 2**-22, 3.0, 3.25, -0.25, -0.0]
    outside = [-math.inf, math.inf, math.nan, -torch.finfo(torch.float32).max, torch.finfo(torch.float32).max]
    passes = [True, False, False, True, False, False, True, True, True, True, True]
    x = torch.tensor(edge + outside, device=device, requires_grad=True)
    y = ops.fake_quantize_affine(
        x, torch.tensor(1.0, device=device), torch.tensor(0, dtype=torch.int32, device=device), 0, 3
    )
    y.sum().backward()
    assert x.grad.tolist() == [float(value) for value in passes] + [0.0] * 5


def test_a_gradient_that_is_not_finite_is_stopped_and_not_multiplied(ops, device):
    x = torch.tensor([9.0, 9.0, -9.0, 1.0, 1.0], device=device, requires_grad=True)
    upstream = torch.tensor([math.inf, math.nan, -math.inf, math.inf, math.nan], device=device)
    grid = cases.Grid(
        torch.tensor(1.0, device=device), torch.tensor(0, dtype=torch.int32, device=device), -4, 3
    )
    (gradient,) = torch.autograd.grad(ops.fake_quantize_affine(x, *grid), x, upstream)
    cases.assert_same(gradient.cpu(), torch.tensor([0.0, 0.0, 0.0, math.inf, math.nan]))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_strides_change_no_value_and_no_gradient(ops, layout, dtype, device):
    place, shape = cases.LAYOUTS[layout]
    x, upstream = cases.mixed(shape, dtype, device=device), cases.mixed(shape, dtype, seed=3, device=device)
    for granularity in [
        PerTensor(),
        *([PerChannel(1), cases.PerToken(), cases.PerGroup(5)] if shape else []),
    ]:
        grid = cases.grid(shape, granularity, dtype, (0, 15), device=device)

        def run(x, upstream, granularity=granularity, grid=grid):
            x = x.detach().requires_grad_()
            y = ops.fake_quantize_affine(x, *grid, granularity=granularity)
            return y, *torch.autograd.grad(y, x, upstream)

        value, gradient = run(x, upstream)
        placed_value, placed_gradient = run(place(x), upstream)
        cases.assert_same(placed_value, value)
        cases.assert_same(placed_gradient, gradient)
        cases.assert_same(run(x, place(upstream))[1], gradient)
        cases.assert_same(run(place(x), place(upstream))[1], gradient)
        assert placed_value.stride() == torch.empty_like(place(x)).stride()


def test_an_expanded_gradient(ops, device):
    x = cases.normal((3, 21), device=device, requires_grad=True)
    grid = cases.grid((3, 21), PerTensor(), quant_range=(0, 15), device=device)
    y = ops.fake_quantize_affine(x, *grid)
    (one_by_one,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    (expanded,) = torch.autograd.grad(y.sum(), x)
    cases.assert_same(expanded, one_by_one)
    assert set(expanded.flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    "scale, zero_point",
    [
        (0.5, 3),
        (torch.tensor([0.5]), torch.tensor([3])),
        (torch.tensor(0.5), torch.tensor(3, dtype=torch.int32)),
        (torch.tensor([9.0, 0.5])[1], torch.tensor([9, 3])[1]),
        (torch.tensor([[0.5]]), torch.tensor([[3]])),
        (torch.tensor([[0.5]]), 3),
        (np.float32(0.5), np.int64(3)),
        (np.float64(0.5), np.uint8(3)),
        (Fraction(1, 2), 3),
    ],
    ids=[
        "numbers",
        "one_element_int64",
        "scalars",
        "views",
        "keepdim",
        "mixed",
        "numpy",
        "numpy64",
        "fraction",
    ],
)
def test_spellings_of_per_tensor_qparams(scale, zero_point, device):
    scale, zero_point = (
        value.to(device) if isinstance(value, torch.Tensor) else value for value in (scale, zero_point)
    )
    x = cases.normal((4, 5), device=device)
    expected = fake_quantize_affine(
        x, torch.tensor(0.5, device=device), torch.tensor(3, dtype=torch.int32, device=device), 0, 15
    )
    cases.assert_same(fake_quantize_affine(x, scale, zero_point, 0, 15), expected)


@pytest.mark.parametrize("dtype", checks.ZERO_POINT_DTYPES, ids=cases.name)
def test_zero_points_of_any_integer_dtype(ops, dtype, device):
    x = cases.normal((3, 8), device=device)
    scale = torch.tensor([0.5, 0.25, 1.0], device=device)
    zero_point = torch.tensor([3, 0, 15], device=device)
    expected = ops.fake_quantize_affine(x, scale, zero_point.int(), 0, 15, granularity=PerChannel(0))
    actual = ops.fake_quantize_affine(x, scale, zero_point.to(dtype), 0, 15, granularity=PerChannel(0))
    cases.assert_same(actual, expected)


@pytest.mark.parametrize(
    "granularity, shape, keepdim",
    [
        (PerTensor(), (), (1, 1, 1)),
        (PerChannel(0), (2,), (2, 1, 1)),
        (PerChannel(1), (3,), (1, 3, 1)),
        (PerChannel(-1), (8,), (1, 1, 8)),
        (PerGroup(4), (2, 3, 2), (2, 3, 2, 1)),
        (PerToken(), (2, 3), (2, 3, 1)),
    ],
    ids=str,
)
def test_qparams_that_keep_reduced_dimensions(ops, granularity, shape, keepdim, device):
    x = cases.normal((2, 3, 8), device=device, requires_grad=True)
    scale, zero_point = ops.choose_qparams(x, 4, granularity=granularity)
    assert tuple(scale.shape) == shape
    q = ops.quantize(x, scale, zero_point, 0, 15, granularity=granularity)
    y = ops.fake_quantize_affine(x, scale, zero_point, 0, 15, granularity=granularity)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    for kept_scale, kept_zero_point in (  # each of the two alone
        (scale.view(keepdim), zero_point.view(keepdim)),
        (scale, zero_point.view(keepdim)),
        (scale.view(keepdim), zero_point),
    ):
        kept = (kept_scale, kept_zero_point)
        cases.assert_same(ops.quantize(x, *kept, 0, 15, granularity=granularity), q)
        cases.assert_same(ops.dequantize(q, *kept, granularity=granularity), y.detach())
        again = ops.fake_quantize_affine(x, *kept, 0, 15, granularity=granularity)
        cases.assert_same(again, y)
        cases.assert_same(torch.autograd.grad(again.sum(), x)[0], gradient)


def test_a_scale_that_requires_grad(ops, device):
    x = cases.normal((4, 6), device=device)
    scale = torch.tensor(0.5, device=device, requires_grad=True)
    zero_point = torch.tensor(0, dtype=torch.int32, device=device)
    q = ops.quantize(x, scale, zero_point, -8, 7)  # integer results have no gradient
    for call in (
        lambda scale: ops.fake_quantize_affine(x, scale, zero_point, -8, 7),
        lambda scale: ops.dequantize(q, scale, zero_point),
    ):
        with pytest.raises(ValueError, match="fake_quantize_learned"):
            call(scale)
        with torch.no_grad():
            expected = call(scale)
        cases.assert_same(call(scale.detach()), expected)


def test_strided_and_expanded_qparams(ops, device):
    x = cases.normal((4, 6), device=device)
    scale = torch.tensor([0.5, 9.0, 0.25, 9.0, 0.125, 9.0, 1.0, 9.0], device=device)[::2]
    zero_point = torch.tensor(2, dtype=torch.int32, device=device).expand(4)
    expected = ops.fake_quantize_affine(
        x, scale.clone(), zero_point.clone(), 0, 15, granularity=PerChannel(0)
    )
    cases.assert_same(
        ops.fake_quantize_affine(x, scale, zero_point, 0, 15, granularity=PerChannel(0)), expected
    )


def test_inputs_written_in_place_after_the_forward_are_no_error(ops, device):
    x = cases.normal((9,), device=device, requires_grad=True)
    grid = cases.grid((9,), PerTensor(), quant_range=(0, 15), device=device)
    (expected,) = torch.autograd.grad(ops.fake_quantize_affine(x, *grid).sum(), x)
    y = ops.fake_quantize_affine(x, *grid)
    with torch.no_grad():
        x.zero_()
        grid.scale.fill_(100)
        grid.zero_point.fill_(1)
    y.sum().backward()
    cases.assert_same(x.grad, expected)


def test_the_result_can_be_written_in_place(ops, device):
    x = torch.tensor([-1.0, 1.0, 9.0], device=device, requires_grad=True)
    zero_point = torch.tensor(0, dtype=torch.int32, device=device)
    torch.relu_(
        ops.fake_quantize_affine(x, torch.tensor(1.0, device=device), zero_point, -4, 3)
    ).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 0.0]


def test_second_derivatives_are_those_of_the_surrogate(ops, device):
    x = cases.normal((4, 21), torch.float64, device=device, requires_grad=True)
    grid = cases.grid((4, 21), PerChannel(0), torch.float64, (0, 15), device=device)
    on_cpu = cases.grid((4, 21), PerChannel(0), torch.float64, (0, 15))
    mask = oracle.inside(x.cpu(), *on_cpu, granularity=PerChannel(0)).to(device)

    def quantizer(x):
        return ops.fake_quantize_affine(x, *grid, granularity=PerChannel(0))

    def surrogate(x):
        passed = torch.where(mask, x, 0.0)
        return passed + (quantizer(x) - passed).detach()

    def derivatives(function):
        upstream = cases.normal((4, 21), torch.float64, seed=4, device=device, requires_grad=True)
        (first,) = torch.autograd.grad(function(x).pow(3), x, upstream, create_graph=True)
        return first, *torch.autograd.grad(first.mul(first).sum(), (x, upstream))

    for ours, theirs in zip(derivatives(quantizer), derivatives(surrogate), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("quant_range", [(0, 255), (-128, 127), (0, 15), (-7, 7)], ids=str)
def test_torch_gives_the_same_away_from_documented_differences(dtype, quant_range, device):
    """``torch.fake_quantize_per_tensor_affine`` and ``per_channel_affine`` differ from the contract.

    - They multiply by the rounded reciprocal of the scale: next to ties, the result differs by one
      level.
    - They convert to int64 before the clamp: NaN, infinities and quotients from 2^63 on become an
      end of the range.
    - In float16 and bfloat16 they round at other points: only the integers are compared.
    - They reject a ``quant_min`` below -2^31 and need other dtypes for the zero point (here int32
      for both).
    """
    for seed in range(4):
        grid = cases.grid((), PerTensor(), dtype, quant_range, seed=seed, device=device)
        x = cases.normal((4000,), dtype, seed=seed, device=device)
        check_against_torch(x, grid, PerTensor(), torch.fake_quantize_per_tensor_affine(x, *grid))
        if dtype == torch.float32:
            shape, granularity = (6, 500, 3), PerChannel(1)
            grid = cases.grid(shape, granularity, dtype, quant_range, seed=seed, device=device)
            x = cases.normal(shape, dtype, seed=seed, device=device)
            peer = torch.fake_quantize_per_channel_affine(x, *grid[:2], 1, *grid[2:])
            check_against_torch(x, grid, granularity, peer)


def check_against_torch(x, grid, granularity, peer):
    shape = (-1, 1) if granularity == PerChannel(1) else ()
    scale = grid.scale.double().reshape(shape) if shape else grid.scale.double()
    quotient = x.double() / scale
    no_tie = (quotient - quotient.floor() - 0.5).abs() > 1e-4
    assert no_tie.double().mean() > 0.99
    ours = fake_quantize_affine(x, *grid, granularity=granularity)
    if x.dtype == torch.float32:
        cases.assert_same(ours[no_tie], peer[no_tie])
    ours_steps, peer_steps = (ours.double() / scale).round(), (peer.double() / scale).round()
    assert torch.equal(ours_steps[no_tie], peer_steps[no_tie])


@pytest.mark.parametrize("quant_range", [(0, 255), (-128, 127), (0, 65535), (-32768, 32767)], ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_onnxruntime_gives_the_same_bits(quant_range, axis, device):
    """Compares with QuantizeLinear and DequantizeLinear, including ties, infinities and saturation.

    QuantizeLinear does not define the result for NaN, so these inputs contain no NaN.
    """
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    shape = (40, 33)
    granularity = PerTensor() if axis is None else PerChannel(axis)
    for seed in range(3):
        grid = cases.grid(shape, granularity, quant_range=quant_range, seed=seed)
        x = cases.mixed(shape, seed=seed).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
        use_ties = torch.tensor(np.random.default_rng(seed).random(shape) < 0.5)
        x = torch.where(use_ties, cases.ties(shape, grid.scale, torch.float32, seed=seed), x)
        integers = quantize(x, *grid, granularity=granularity)
        zero_point = grid.zero_point.to(integers.dtype)
        peer_integers, peer = quantize_dequantize(x.numpy(), grid.scale.numpy(), zero_point.numpy(), axis)
        ours = fake_quantize_affine(*to(device, x, grid), granularity=granularity)
        cases.assert_same(integers, torch.from_numpy(peer_integers))
        cases.assert_same(ours, torch.from_numpy(peer) + 0.0)


@pytest.mark.parametrize("shape", [(67,), (3, 5), (0,), ()], ids=cases.name)
def test_opcheck_of_the_two_halves(kernels, shape):
    x = cases.normal(shape)
    args = (x, *cases.grid(shape, PerTensor()), PerTensor().code)
    torch.library.opcheck(torch.ops.qatfast.fake_quantize_affine_forward.default, args)
    value, mask = torch.ops.qatfast.fake_quantize_affine_forward(*args)
    assert mask.shape == ((x.numel() + 7) // 8,)
    backward = torch.ops.qatfast.fake_quantize_affine_backward
    torch.library.opcheck(backward.default, (cases.normal(shape, seed=1), mask, list(value.stride())))


@pytest.mark.parametrize("clipped", [None, 0, 8, 15])
def test_a_gradient_that_passes_everywhere_is_the_one_that_arrived(kernels, clipped):
    x, dy = torch.linspace(-1, 1, 16), cases.normal((16,), seed=1)
    if clipped is not None:
        x[clipped] = 9.0
    y = fake_quantize_affine(x.requires_grad_(), 0.1, 0, -10, 10)
    traced = make_fx(lambda grad: torch.autograd.grad(y, x, grad, retain_graph=True)[0])(dy)
    assert "fake_quantize_affine_backward" in traced.code  # a graph holds for other values too
    (dx,) = torch.autograd.grad(y, x, dy)
    cases.assert_same(dx, torch.where(x.detach() <= 1, dy, 0))
    assert (dx.data_ptr() == dy.data_ptr()) == (clipped is None)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, dy)
