"""fake_quantize_learned: the gradient of the scale, to the bit, and what a scale may be."""

import pytest
import torch

import cases
import qatfast
from operators import IMPLEMENTATIONS
from qatfast import PerChannel, PerGroup, PerTensor, fake_quantize_affine, reference

BLOCKS = (
    ((7,), PerTensor()),
    ((513,), PerTensor()),
    ((600, 1100), PerTensor()),
    ((40, 300), PerChannel(0)),
    ((40, 30), PerChannel(1)),
    ((3, 4, 5, 6), PerChannel(-3)),
    ((6, 64), PerGroup(16)),
    ((0, 4), PerTensor()),
    ((0, 4), PerChannel(0)),
    ((), PerTensor()),
)
ENDS = ((-7, 7), (-2, 1), (0, 255))


def gradients(implementation, x, scale, zero_point, ends, granularity, dy):
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    y = implementation.fake_quantize_learned(x, scale, zero_point, *ends, granularity=granularity)
    y.backward(dy)
    return y.detach(), x.grad, scale.grad


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("case", BLOCKS, ids=cases.name)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_kernels_give_the_bits_of_the_reference(kernels, device, case, dtype, ends):
    shape, granularity = case
    grid = cases.grid(shape, granularity, dtype, ends)
    scale = torch.where(torch.arange(grid.scale.numel()).reshape(grid.scale.shape) % 3 == 1, -1, 1)
    scale = scale * grid.scale
    x, dy = cases.normal(shape, dtype), cases.normal(shape, dtype, seed=1)
    if x.numel() > 4:
        x.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    results = [
        gradients(
            implementation, *(t.to(at) for t in (x, scale, grid.zero_point)), ends, granularity, dy.to(at)
        )
        for implementation, at in ((qatfast, device), (reference, "cpu"))
    ]
    for ours, expected in zip(*results, strict=True):
        cases.assert_same(ours, expected)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_the_sum_does_not_depend_on_the_strides(kernels, device, layout):
    change, shape = cases.LAYOUTS[layout]
    x, dy = cases.normal(shape, device=device), cases.normal(shape, seed=1, device=device)
    zero_point = torch.tensor(3, dtype=torch.int32, device=device)
    given = torch.tensor(0.3, device=device), zero_point, (0, 15), PerTensor()
    expected = gradients(qatfast, x, *given, dy)
    ours = gradients(qatfast, change(x), *given, change(dy))
    for result, value in zip(ours, expected, strict=True):
        cases.assert_same(result, value)


@pytest.mark.parametrize("implementation", ("public", "reference"))
def test_the_forward_is_that_of_a_static_range(implementation):
    x = cases.normal((40, 30))
    grid = cases.grid((40, 30), PerChannel(0))
    ours = IMPLEMENTATIONS[implementation].fake_quantize_learned(
        x, -grid.scale, *grid[1:], granularity=PerChannel(0)
    )
    cases.assert_same(ours, fake_quantize_affine(x, *grid, granularity=PerChannel(0)))


@pytest.mark.parametrize("implementation", ("public", "reference"))
def test_a_scale_of_zero_is_legal(implementation):
    """eps takes its place, and the sign of its gradient is positive."""
    function = IMPLEMENTATIONS[implementation].fake_quantize_learned
    scale = torch.zeros((), requires_grad=True)
    y = function(torch.tensor([1.0, -1.0, 0.0]), scale, 0, -8, 7)
    (ds,) = torch.autograd.grad(y, scale, torch.tensor([1.0, 0.0, 0.0]))
    assert y.abs().max() < 1e-36
    assert ds == 7 / (3 * 7) ** 0.5


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("implementation", ("public", "reference"))
def test_a_scale_that_is_not_finite_is_an_error(implementation, value):
    with pytest.raises(ValueError, match="expected scale to be positive and finite"):
        IMPLEMENTATIONS[implementation].fake_quantize_learned(torch.ones(3), torch.tensor(value), 0, -8, 7)


def test_a_second_derivative_is_an_error():
    x, scale = cases.normal((5,)).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    for implementation in (qatfast, reference):
        y = implementation.fake_quantize_learned(x, scale, torch.tensor(0, dtype=torch.int32), -8, 7)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError):
            dx.sum().backward()


def test_only_the_input_is_kept():
    x, scale = cases.normal((64, 64)).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        qatfast.fake_quantize_learned(x, scale, torch.tensor(0, dtype=torch.int32), -8, 7)
    assert {t.data_ptr() for t in kept if t.numel() > 1} == {x.data_ptr()}


@pytest.mark.parametrize("n", (1, 2, 31, 32, 33, 511, 512, 513, 512 * 512 + 1))
def test_a_sum_in_fixed_order_is_the_sum(n):
    values = cases.normal((n,), torch.float64)
    total = reference._sum_of_blocks(values, PerTensor())
    torch.testing.assert_close(total, values.sum(), rtol=1e-12, atol=1e-12)
