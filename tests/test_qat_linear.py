import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import cases
import oracle
from qatfast import PerGroup, QATConfig, QuantSpec, fake_quantize, qat_linear

torch_ops = cases.IMPLEMENTATIONS["torch.ops"]

CONFIGS = pytest.mark.parametrize("config", cases.CONFIGS.values(), ids=cases.CONFIGS)
SHAPES = pytest.mark.parametrize(
    "shape, bias",
    [
        *((shape, True) for shape in cases.LINEAR_SHAPES),
        *((shape, False) for shape in cases.LINEAR_SHAPES[:4]),
    ],
    ids=lambda value: cases.name(value) if isinstance(value, tuple) else "bias" if value else "no_bias",
)


def quantized(x, spec):
    if x is None or spec is None:
        return x
    return fake_quantize(x, spec.num_bits, symmetric=spec.symmetric, granularity=spec.granularity)


def formula(input, weight, bias, config):
    """The contract written out on the public quantizer, and torch's own product."""
    hats = [quantized(input, config.input), quantized(weight, config.weight), quantized(bias, config.bias)]
    return quantized(F.linear(*hats), config.output)


def straight_through(x, spec):
    """The quantized values of ``x``, exactly, with the derivatives of ``x``."""
    return x if x is None or spec is None else quantized(x, spec).detach() + (x - x.detach())


def surrogate(input, weight, bias, config):
    hats = [straight_through(x, spec) for x, spec in zip((input, weight, bias), specs(config), strict=True)]
    return straight_through(F.linear(*hats), config.output)


def specs(config):
    return config.input, config.weight, config.bias


@CONFIGS
@SHAPES
def test_values_are_those_of_the_formula(ops, config, shape, bias, device):
    operands = cases.linear(shape, bias=bias, device=device)
    y = ops.qat_linear(*operands, config=config)
    cases.assert_same(y, formula(*operands, config))
    assert y.is_contiguous()


@CONFIGS
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_every_dtype(ops, config, dtype, device):
    operands = cases.linear(((5,), 16, 6), dtype, device=device)
    cases.assert_same(ops.qat_linear(*operands, config=config), formula(*operands, config))


def test_the_default_is_the_tutorial_config(ops, device):
    operands = cases.linear(((5,), 16, 6), device=device)
    cases.assert_same(ops.qat_linear(*operands), formula(*operands, QATConfig.tutorial(8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.name)
@pytest.mark.parametrize("output", [None, QuantSpec(4), QuantSpec(5, symmetric=True)], ids=str)
def test_an_exact_product_gives_the_oracles_numbers(ops, dtype, output, device):
    """Integers that are their own grid points: no product and no sum rounds, in any order."""
    rng = np.random.default_rng(0)
    x, weight = rng.integers(-100, 100, (7, 40)), rng.integers(0, 255, (9, 40), endpoint=True) - 128
    weight[0, :2] = -128, 127
    bias = rng.integers(-30, 30, 9)
    bias[:2] = -127, 127
    operands = [torch.tensor(value, dtype=dtype, device=device) for value in (x, weight, bias)]
    spec = QuantSpec(8, symmetric=True)
    config = QATConfig(weight=QuantSpec(8), bias=spec, output=output)
    product = torch.tensor(x @ weight.T + bias, dtype=dtype)
    expected = (
        product
        if output is None
        else oracle.fake_quantize(product, output.num_bits, symmetric=output.symmetric)
    )
    cases.assert_same(ops.qat_linear(*operands, config=config), expected)


@CONFIGS
@SHAPES
def test_gradients_are_those_of_the_surrogate(ops, config, shape, bias, device):
    operands = cases.linear(shape, torch.float64, bias=bias, device=device, requires_grad=True)
    inputs = [operand for operand in operands if operand is not None]
    y = ops.qat_linear(*operands, config=config)
    upstream = cases.normal(tuple(y.shape), torch.float64, seed=7, device=device)
    ours = torch.autograd.grad(y, inputs, upstream)
    theirs = torch.autograd.grad(surrogate(*operands, config), inputs, upstream)
    for gradient, expected, tensor in zip(ours, theirs, inputs, strict=True):
        assert gradient.shape == tensor.shape
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@CONFIGS
@pytest.mark.parametrize(
    "shape", [((5,), 16, 6), ((2, 3), 16, 6), ((), 16, 6), ((0,), 16, 6)], ids=cases.name
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_second_derivatives_are_those_of_the_surrogate(ops, config, shape, bias, device):
    operands = cases.linear(shape, torch.float64, bias=bias, device=device, requires_grad=True)
    inputs = [operand for operand in operands if operand is not None]
    upstream = cases.normal((*shape[0], shape[2]), torch.float64, seed=7, device=device, requires_grad=True)

    def derivatives(function):
        first = torch.autograd.grad(function(*operands), inputs, upstream, create_graph=True)
        loss = sum(
            gradient.mul(cases.normal(tuple(gradient.shape), torch.float64, seed=8, device=device)).sum()
            for gradient in first
        )
        loss = loss + sum(gradient.pow(2).sum() for gradient in first)
        return torch.autograd.grad(loss, [*inputs, upstream], allow_unused=True, materialize_grads=True)

    ours = derivatives(lambda *operands: ops.qat_linear(*operands, config=config))
    theirs = derivatives(lambda *operands: surrogate(*operands, config))
    for derivative, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(derivative, expected, rtol=1e-11, atol=1e-11)


@CONFIGS
def test_tangents_pass_through_backward(ops, config, device):
    operands = cases.linear(((5,), 16, 6), torch.float64, device=device, requires_grad=True)
    upstream, tangent = (cases.normal((5, 6), torch.float64, seed=seed, device=device) for seed in (7, 8))
    with forward_ad.dual_level():
        y = ops.qat_linear(*operands, config=config)
        gradients = torch.autograd.grad(y, operands, forward_ad.make_dual(upstream, tangent))
        tangents = [forward_ad.unpack_dual(gradient).tangent for gradient in gradients]
    expected = torch.autograd.grad(ops.qat_linear(*operands, config=config), operands, tangent)
    for ours, theirs in zip(tangents, expected, strict=True):  # backward is linear
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@CONFIGS
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_of_some_of_the_tensors(ops, config, wanted, device):
    operands = cases.linear(((5,), 16, 6), torch.float64, device=device)
    for index in wanted:
        operands[index].requires_grad_()
    ops.qat_linear(*operands, config=config).sum().backward()
    expected = torch.autograd.grad(surrogate(*operands, config).sum(), [operands[index] for index in wanted])
    for index, gradient in zip(wanted, expected, strict=True):
        torch.testing.assert_close(operands[index].grad, gradient, rtol=1e-12, atol=1e-12)
    assert all(operands[index].grad is None for index in range(3) if index not in wanted)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_gradients_keep_dtype(ops, dtype, device):
    operands = cases.linear(((5,), 16, 6), dtype, device=device, requires_grad=True)
    ops.qat_linear(*operands).sum().backward()
    assert [operand.grad.dtype for operand in operands] == [dtype] * 3


def test_no_gradient_is_asked_for_where_no_tensor_does(ops, device):
    operands = cases.linear(((5,), 16, 6), device=device)
    assert not ops.qat_linear(*operands).requires_grad
    with torch.no_grad():
        assert not ops.qat_linear(
            *cases.linear(((5,), 16, 6), device=device, requires_grad=True)
        ).requires_grad


@CONFIGS
@pytest.mark.parametrize(
    "layout", ["offset_1", "transposed", "strided", "rows_of_a_wider_tensor", "every_other_row"]
)
def test_strides_change_neither_values_nor_gradients(ops, config, layout, device):
    place, _ = cases.LAYOUTS[layout]
    operands = cases.linear(((5,), 16, 6), torch.float64, device=device)

    def run(input, weight, bias):
        leaves = [operand.detach().requires_grad_() for operand in (input, weight, bias)]
        y = ops.qat_linear(*leaves, config=config)
        upstream = cases.normal((5, 6), torch.float64, seed=7, device=device)
        return y, *torch.autograd.grad(y, leaves, place(upstream))

    expected = run(*operands)
    moved_bias = cases.LAYOUTS["offset_3"][0](operands.bias)
    for one, other in zip(
        run(place(operands.input), place(operands.weight), moved_bias), expected, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_expanded_input_and_weight(ops, device):
    input = cases.normal((1, 16), device=device).expand(5, 16)
    weight = cases.normal((1, 16), seed=1, device=device).expand(6, 16)
    cases.assert_same(ops.qat_linear(input, weight), ops.qat_linear(input.clone(), weight.clone()))


@CONFIGS
def test_the_result_can_be_written_in_place(ops, config, device):
    operands = cases.linear(((5,), 16, 6), torch.float64, device=device, requires_grad=True)
    inputs = list(operands)
    ours = torch.autograd.grad(torch.relu_(ops.qat_linear(*operands, config=config)).sum(), inputs)
    theirs = torch.autograd.grad(torch.relu(surrogate(*operands, config)).sum(), inputs)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@CONFIGS
def test_arguments_are_left_alone(ops, config, device):
    operands = cases.linear(((5,), 16, 6), device=device)
    before = [operand.clone() for operand in operands]
    ops.qat_linear(*operands, config=config).fill_(7)
    for operand, copy in zip(operands, before, strict=True):
        cases.assert_same(operand, copy)


@pytest.mark.parametrize("written", ["weight", "input"])
def test_a_tensor_written_between_forward_and_backward_is_the_error_of_nn_linear(kernels, written, device):
    for function in (F.linear, qat_linear, torch_ops.qat_linear):
        operands = cases.linear(((5,), 16, 6), device=device, requires_grad=True)
        y = function(*operands)
        with torch.no_grad():
            getattr(operands, written).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_second_backward_is_the_error_of_nn_linear(ops, device):
    for function in (F.linear, ops.qat_linear):
        y = function(*cases.linear(((5,), 16, 6), device=device, requires_grad=True)).sum()
        y.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward()


def test_retained_graphs_give_the_same_twice(ops, device):
    operands = cases.linear(((5,), 16, 6), device=device, requires_grad=True)
    y = ops.qat_linear(*operands).sum()
    once = torch.autograd.grad(y, list(operands), retain_graph=True)
    twice = torch.autograd.grad(y, list(operands))
    for first, second in zip(once, twice, strict=True):
        cases.assert_same(first, second)


def test_groups_that_divide_the_weight_only(ops, device):
    operands = cases.linear(((5,), 32, 7), device=device)
    config = QATConfig(weight=QuantSpec(4, granularity=PerGroup(32)), bias=None, output=None)
    cases.assert_same(ops.qat_linear(*operands, config=config), formula(*operands, config))


def test_a_diverged_run_looks_diverged(ops, device):
    operands = cases.linear(((5,), 16, 6), device=device)
    operands.input[2, 3] = torch.nan
    for config in cases.CONFIGS.values():
        y = ops.qat_linear(*operands, config=config)
        assert y[2].isnan().all()
        assert y[[0, 1, 3, 4]].isfinite().all()
    operands = cases.linear(((5,), 16, 6), device=device)
    operands.weight[4, 3] = torch.nan
    for config in cases.CONFIGS.values():
        y = ops.qat_linear(*operands, config=config)
        assert y[:, 4].isnan().all()
        assert y[:, [0, 1, 2, 3, 5]].isfinite().all()


@CONFIGS
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
def test_opcheck(kernels, config, requires_grad):
    operands = cases.linear(((5,), 16, 6), requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.qatfast.qat_linear.default, (*operands, *config.codes))
    if not requires_grad:
        torch.library.opcheck(torch.ops.qatfast.qat_linear_forward.default, (*operands, *config.codes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("shape", [((), 16, 6), ((2, 3), 16, 6), ((0,), 16, 6)], ids=cases.name)
def test_opcheck_of_dtypes_and_shapes(kernels, dtype, shape):
    operands = cases.linear(shape, dtype, requires_grad=True, bias=shape != ((2, 3), 16, 6))
    torch.library.opcheck(torch.ops.qatfast.qat_linear.default, (*operands, *QATConfig().codes))
