from functools import cache

import pytest
import torch

import cases
import oracle
from qatfast import PerTensor, PerToken, fake_quantize

GRIDS = pytest.mark.parametrize("grid", cases.GRIDS)


@cache
def example(shape, granularity, dtype, num_bits, grid):
    x = cases.mixed(shape, dtype)
    return x, oracle.fake_quantize(x, num_bits, **cases.GRIDS[grid], granularity=granularity)


@GRIDS
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("shape, granularity", cases.BLOCKS, ids=cases.name)
def test_values_are_the_oracles(ops, shape, granularity, dtype, grid, device):
    x, expected = example(shape, granularity, dtype, 4, grid)
    cases.assert_same(
        ops.fake_quantize(x.to(device), 4, **cases.GRIDS[grid], granularity=granularity), expected
    )


@GRIDS
@pytest.mark.parametrize("num_bits", range(2, 17))
def test_every_bit_width(ops, num_bits, grid, device):
    x, expected = example((131,), PerTensor(), torch.float32, num_bits, grid)
    cases.assert_same(ops.fake_quantize(x.to(device), num_bits, **cases.GRIDS[grid]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=cases.name)
@pytest.mark.parametrize("size", [64, 4096, 100_000])
def test_ends_that_both_round_outwards_are_clamped(ops, size, dtype, device):
    """The range -101.5 to 153.5 has 255 intervals of 1.

    As both ends round to even, it would need 256.
    """
    x = torch.tensor([-101.5, 153.5], dtype=dtype).repeat(size // 2)
    y = ops.fake_quantize(x.to(device))
    cases.assert_same(y, torch.tensor([-102.0, 153.0], dtype=dtype).repeat(size // 2))


def test_the_defaults_are_8_bits_affine_per_tensor(ops, device):
    x, expected = example((131,), PerTensor(), torch.float32, 8, "affine")
    cases.assert_same(ops.fake_quantize(x.to(device)), expected)


@GRIDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.name)
@pytest.mark.parametrize("shape, granularity", cases.FEW_BLOCKS, ids=cases.name)
def test_it_is_the_other_functions_one_after_another(ops, shape, granularity, dtype, grid, device):
    x = cases.normal(shape, dtype, device=device)
    scale, zero_point = ops.choose_qparams(x, 6, **cases.GRIDS[grid], granularity=granularity)
    ends = oracle.quant_range(6, **{"symmetric": False, **cases.GRIDS[grid]})
    y = ops.fake_quantize(x, 6, **cases.GRIDS[grid], granularity=granularity)
    cases.assert_same(y, ops.fake_quantize_affine(x, scale, zero_point, *ends, granularity=granularity))
    q = ops.quantize(x, scale, zero_point, *ends, granularity=granularity)
    cases.assert_same(y, ops.dequantize(q, scale, zero_point, granularity=granularity, dtype=dtype))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_strides_change_no_value_and_come_out_as_empty_like_gives_them(ops, layout, dtype, device):
    place, shape = cases.LAYOUTS[layout]
    x = cases.mixed(shape, dtype, device=device)
    placed = place(x)
    for granularity in [
        PerTensor(),
        *([cases.PerChannel(1), PerToken(), cases.PerGroup(5)] if shape else []),
    ]:
        y = ops.fake_quantize(placed, 5, granularity=granularity)
        cases.assert_same(y, ops.fake_quantize(x, 5, granularity=granularity))
        assert y.stride() == torch.empty_like(placed).stride()


def test_expanded_and_overlapping_inputs(ops, device):
    row = cases.normal((1, 9), device=device)
    cases.assert_same(ops.fake_quantize(row.expand(4, 9)), ops.fake_quantize(row).expand(4, 9))
    windows = cases.normal((20,), device=device).unfold(0, 6, 2)
    cases.assert_same(
        ops.fake_quantize(windows, granularity=PerToken()),
        ops.fake_quantize(windows.clone(), granularity=PerToken()),
    )


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5)], ids=cases.name)
def test_the_result_is_new_memory_and_the_input_is_left_alone(ops, shape, device):
    x = cases.normal(shape, device=device)
    before = x.clone()
    ops.fake_quantize(x).fill_(7)
    cases.assert_same(x, before)


def test_negative_and_zero_bits_of_a_view_are_seen(ops):
    values = cases.normal((9,))
    negative = torch.complex(values, values).conj().imag
    assert negative.is_neg()
    cases.assert_same(ops.fake_quantize(negative), ops.fake_quantize(-values))
    cases.assert_same(ops.fake_quantize(torch._efficientzerotensor(3)), torch.zeros(3))


@pytest.mark.parametrize("shape, granularity", cases.BLOCKS, ids=cases.name)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_the_gradient_passes_unchanged(ops, shape, granularity, dtype, device):
    x = cases.mixed(shape, dtype, device=device).requires_grad_()
    gradient = cases.mixed(shape, dtype, seed=5, device=device)
    (result,) = torch.autograd.grad(ops.fake_quantize(x, 3, granularity=granularity), x, gradient)
    cases.assert_same(result, gradient)


def test_the_backward_returns_the_gradient_itself(ops, device):
    x = cases.normal((4, 8), device=device, requires_grad=True)
    gradient = cases.normal((4, 8), seed=1, device=device)
    (result,) = torch.autograd.grad(ops.fake_quantize(x), x, gradient)
    assert result.data_ptr() == gradient.data_ptr()


def test_an_input_written_in_place_after_the_forward_is_no_error(ops, device):
    x = cases.normal((8,), device=device, requires_grad=True)
    y = ops.fake_quantize(x)
    with torch.no_grad():
        x.zero_()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_the_result_can_be_written_in_place(ops, device):
    x = cases.normal((8,), device=device, requires_grad=True)
    y = ops.fake_quantize(x)
    expected = (y.detach() > 0).float()
    torch.relu_(y).sum().backward()
    assert torch.equal(x.grad, expected)


def test_second_derivatives_are_those_of_the_surrogate(ops, device):
    x = cases.normal((3, 6), torch.float64, device=device, requires_grad=True)

    def derivatives(quantizer):
        (first,) = torch.autograd.grad(quantizer(x).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.mul(first).sum(), x)
        return first, second

    first, second = derivatives(lambda x: ops.fake_quantize(x, 4))
    surrogate_first, surrogate_second = derivatives(lambda x: x + (ops.fake_quantize(x, 4) - x).detach())
    torch.testing.assert_close(first, surrogate_first, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second, surrogate_second, rtol=1e-12, atol=1e-12)


def test_a_gradient_is_asked_for_only_where_the_input_does(ops, device):
    x = cases.normal((8,), device=device)
    assert not ops.fake_quantize(x).requires_grad
    with torch.no_grad():
        assert not ops.fake_quantize(x.clone().requires_grad_()).requires_grad
    with torch.inference_mode():
        cases.assert_same(ops.fake_quantize(x).clone(), fake_quantize(x))
