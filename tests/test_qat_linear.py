import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import cases
import oracle
from operators import IMPLEMENTATIONS
from qatfast import (
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConfig,
    QuantSpec,
    functional,
    qat_linear,
)

torch_ops = IMPLEMENTATIONS["torch.ops"]

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
    return functional.fake_quantize(x, **spec.arguments)


def formula(input, weight, bias, config):
    """Returns the result that the contract defines.

    It is that of the oracle for an int8 GEMM, otherwise that of the float formula.
    """
    if oracle.uses_int8_gemm(config, weight.shape[1]):
        return oracle.int8_linear(input, weight, bias, config)
    return float_formula(input, weight, bias, config)


def float_formula(input, weight, bias, config):
    hats = [quantized(input, config.input), quantized(weight, config.weight), quantized(bias, config.bias)]
    return quantized(F.linear(*hats), config.output)


# Configs with int8 GEMM: all granularities and numbers of bits, some with bias and output.
INTEGER_CONFIGS = [
    QATConfig(
        QuantSpec(2 + index % 7, symmetric=x_symmetric, granularity=x, narrow_range=index % 5 > 0),
        QuantSpec(8 - index % 6, symmetric=w_symmetric, granularity=weight, narrow_range=index % 3 > 0),
        (None, QuantSpec(8), QuantSpec(5, symmetric=True, granularity=PerChannel(0)))[index % 3],
        (None, QuantSpec(6), None, QuantSpec(4, symmetric=True, granularity=PerToken()))[index % 4],
    )
    for index, (x, weight, x_symmetric, w_symmetric) in enumerate(
        itertools.product(
            (PerTensor(), PerToken()),
            (PerTensor(), PerChannel(0), PerChannel(-2), PerToken(), PerGroup(19)),
            (False, True),
            (False, True),
        )
    )
]
# Similar configs with the float formula.
FLOAT_CONFIGS = [
    QATConfig(x, weight, None, None)
    for x, weight in (
        (QuantSpec(9), QuantSpec(8)),
        (QuantSpec(8), QuantSpec(9, symmetric=True)),
        (QuantSpec(8, granularity=PerGroup(8)), QuantSpec(8)),
        (QuantSpec(8, granularity=PerGroup(16)), QuantSpec(8, granularity=PerToken())),
        (QuantSpec(8, granularity=PerChannel(0)), QuantSpec(8)),
        (QuantSpec(8), QuantSpec(8, granularity=PerChannel(1))),
        (QuantSpec(8), QuantSpec(8, granularity=PerChannel(-1))),
        (QuantSpec(8), QuantSpec(8, granularity=PerGroup(8))),
        (QuantSpec(8), None),
        (None, QuantSpec(8)),
    )
]


def straight_through(x, spec):
    """Returns the quantized values of ``x``, exactly, with the derivatives of ``x``."""
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
    """The inputs are integers on the grid: products and sums are exact in any order."""
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


def assert_layers_are_the_oracles(ops, operands, configs, device, **options):
    for config, (input, weight, bias) in itertools.product(configs, operands):
        assert oracle.uses_int8_gemm(config, weight.shape[1])
        expected = oracle.int8_linear(input, weight, bias, config)
        on_device = [None if x is None else x.to(device) for x in (input, weight, bias)]
        try:
            cases.assert_same(ops.qat_linear(*on_device, config=config), expected)
        except AssertionError as error:
            raise AssertionError(f"{tuple(input.shape)}, {tuple(weight.shape)}, {config}: {error}") from None


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_integers_give_the_oracles_numbers(ops, dtype, device):
    operands = [cases.linear(((7,), 19, 5), dtype), cases.linear(((2, 3), 19, 1), dtype, bias=False)]
    assert_layers_are_the_oracles(ops, operands, INTEGER_CONFIGS, device)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_integers_of_special_values(ops, dtype, bias, device):
    """NaN spreads to its row or column, infinities saturate, denormals have a normal scale."""
    rows = [cases.mixed((size, 19), dtype, seed=size) for size in (12, 11)]
    rows[0][:3], rows[1][:3] = 0.0, torch.nan  # whole rows
    rows[0][4:7], rows[1][4:7] = cases.normal((3, 19), dtype), cases.normal((3, 19), dtype, seed=1)
    rows[0][5, 3], rows[1][5, 3] = -math.inf, math.inf
    operands = (*rows, cases.mixed((11,), dtype, seed=6) if bias else None)
    assert_layers_are_the_oracles(ops, [operands], INTEGER_CONFIGS[::3], device)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_scales_whose_product_is_beyond_the_floats(ops, dtype, device):
    """Products follow IEEE: 0.0, -0.0, infinite, and NaN if level 0 meets an infinite scale."""
    info = torch.finfo(cases.compute_dtype(dtype))
    info = info if dtype != torch.float16 else torch.finfo(dtype)
    x, weight, bias = cases.linear(((6,), 19, 5), dtype)
    x[2], weight[3] = 0, 0
    operands = [
        ((x / 16 * exponent).to(dtype), (weight / 16 * exponent).to(dtype), bias_)
        for exponent in (info.max, info.tiny * 4096, math.sqrt(info.tiny))
        for bias_ in (bias, None)
    ]
    assert_layers_are_the_oracles(ops, operands, INTEGER_CONFIGS[:20:3], device)
    if dtype in (torch.float32, torch.float64):
        config = QATConfig(QuantSpec(8), QuantSpec(8), None, None)
        y = ops.qat_linear(*(x.to(device) for x in operands[1][:2]), config=config)
        assert y[2].isnan().all()
        assert y.isinf().any()
        y = ops.qat_linear(*(x.to(device) for x in operands[3][:2]), config=config)
        assert (y == 0).all()
        assert y.signbit().any()
        assert not y[2].signbit().any()


def test_no_step_is_never_minus_zero(ops, device):
    weight = -cases.normal((6, 16), device=device).abs()
    for config in (QATConfig.int8(), QATConfig(QuantSpec(2), QuantSpec(8), None, None)):
        y = ops.qat_linear(torch.tensor(-0.0, device=device).expand(3, 16), weight, config=config)
        cases.assert_same(y, torch.zeros(3, 6))
        y = ops.qat_linear(
            torch.zeros(3, 16, device=device), weight, torch.full_like(weight[:, 0], -0.0), config=config
        )
        cases.assert_same(y, torch.zeros(3, 6))


@pytest.mark.parametrize(
    "shape",
    [
        ((1,), 1, 1),
        ((), 1, 1),
        ((9,), 1, 5),
        ((1,), 1, 70),
        ((1,), 67, 1),
        ((), 19, 3),
        ((40,), 2, 1),
        ((33,), 64, 48),
        ((3, 1, 2), 200, 33),
        ((0,), 19, 5),
        ((2, 0), 19, 5),
        ((4,), 0, 5),
        ((4,), 19, 0),
        ((0,), 0, 0),
    ],
    ids=cases.name,
)
def test_integers_of_every_shape(ops, shape, device):
    configs = [
        QATConfig(
            QuantSpec(8, granularity=x), QuantSpec(8, symmetric=symmetric, granularity=weight), None, output
        )
        for x, weight, symmetric, output in (
            (PerTensor(), PerChannel(0), True, None),
            (PerToken(), PerTensor(), False, None),
            (PerToken(), PerGroup(max(shape[1], 1)), False, QuantSpec(8)),
        )
    ]
    operands = [cases.linear(shape), cases.linear(shape, torch.bfloat16, bias=False)]
    assert_layers_are_the_oracles(ops, operands, configs, device)


@pytest.mark.arithmetic
@pytest.mark.parametrize("in_features", [33025, 33026, 100_000])
@pytest.mark.parametrize("granularity", [PerTensor(), PerToken()], ids=str)
def test_sums_at_and_beyond_32_bits(ops, in_features, granularity, device):
    """All elements are at the ends of their grids, so that the sums are as large as possible."""
    x = torch.ones(5, in_features)
    x[1], x[2, 1::2], x[3, ::3] = -1, -1, 0
    x[4, -1] = -128 / 127
    weight = torch.cat([x[:3], x[4:]])
    operands = [(x, -weight, cases.normal((4,)))]
    # if all have the same sign, 0 is an end of the range, and 1 is level 255
    operands += [(x.abs() * a, weight.abs() * b, None) for a, b in ((1, 1), (1, -1), (-1, -1))]
    operands += [tuple(tensor.double() for tensor in operands[0])]
    affine, symmetric = QuantSpec(8, False, granularity), QuantSpec(8, True, granularity)
    configs = [QATConfig(*specs, None, None) for specs in ((affine, affine), (affine, symmetric))]
    assert_layers_are_the_oracles(ops, operands, configs, device)
    x, weight, _ = operands[1]
    y = ops.qat_linear(x[1:2].to(device), weight[:1].to(device), config=configs[0])
    assert y.item() == pytest.approx(in_features, rel=1e-6)


@pytest.mark.parametrize(
    "shape, granularity",
    [(((33001,), 5, 64), PerTensor()), (((3, 200), 17, 4099), PerToken())],
    ids=cases.name,
)
@pytest.mark.parametrize("count", [1, 2])
def test_more_outputs_than_one_block_of_products(kernels, threads, shape, granularity, count):
    threads(count)
    operands = cases.linear(shape, torch.bfloat16 if count == 1 else torch.float32)
    config = QATConfig(QuantSpec(8, granularity=granularity), QuantSpec(7), None, None)
    assert_layers_are_the_oracles(functional, [operands], [config], "cpu")


def test_a_small_layer_leaves_the_number_of_threads(kernels, threads):
    threads(3)
    functional.qat_linear(*cases.linear(((32,), 64, 64)), config=QATConfig.int8())
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.name)
def test_integers_that_operators_return_share_no_memory(kernels, dtype, device):
    operands, config = cases.linear(((5,), 16, 6), dtype, device=device), QATConfig.int8()
    integers = torch.ops.qatfast.qat_linear_int8_weight(operands.weight, config.weight.code)
    for tensors in (
        integers,
        torch.ops.qatfast.qat_linear_int8_forward(*operands, [], config.codes),
        torch.ops.qatfast.qat_linear_int8_forward(*operands, list(integers), config.codes),
    ):
        memories = {x.untyped_storage().data_ptr() for x in (*operands, *tensors)}
        assert len(memories) == 3 + len(tensors)


@pytest.mark.parametrize("config", FLOAT_CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
def test_just_outside_it_is_the_float_formula(ops, config, dtype, device):
    operands = cases.linear(((5,), 16, 6), dtype, device=device)
    cases.assert_same(ops.qat_linear(*operands, config=config), float_formula(*operands, config))


def test_the_two_formulas_differ(ops, device):
    """If they were equal, tests could not detect which formula a config uses."""
    operands = cases.linear(((5,), 16, 6), device=device)
    for config in (QATConfig.int8(), cases.CONFIGS["per_token"]):
        y, other = ops.qat_linear(*operands, config=config), float_formula(*operands, config)
        assert not torch.equal(y, other)
        torch.testing.assert_close(y, other, rtol=1e-5, atol=1e-5)


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
@pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8()], ids=["tutorial", "int8"])
def test_gradients_keep_dtype(ops, config, dtype, device):
    operands = cases.linear(((5,), 16, 6), dtype, device=device, requires_grad=True)
    y = ops.qat_linear(*operands, config=config)
    upstream = cases.normal((5, 6), dtype, seed=7, device=device)
    gradients = torch.autograd.grad(y, list(operands), upstream)
    expected = torch.autograd.grad(surrogate(*operands, config), list(operands), upstream)
    for gradient, other in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(
            gradient, other, rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8()], ids=["tutorial", "int8"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["", "autocast"])
@pytest.mark.parametrize("wanted", [(0, 1), (1,)], ids=["all", "weight"])
def test_gradients_of_a_large_weight(kernels, config, autocast, wanted):
    """A gradient of 8 MB, in both dtypes, is allocated separately."""
    operands = cases.linear(((3,), 1024, 4096))
    upstream = cases.normal((3, 4096), autocast or torch.float32, seed=7)
    gradients = []
    for ops in (functional, IMPLEMENTATIONS["reference"]):
        leaves = [operand.clone() for operand in operands]
        for index in wanted:
            leaves[index].requires_grad_()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            y = ops.qat_linear(*leaves, config=config)
        gradients.append(torch.autograd.grad(y, [leaves[index] for index in wanted], upstream))
    for ours, theirs in zip(*gradients, strict=True):
        cases.assert_same(ours, theirs)


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
    moved = run(place(operands.input), place(operands.weight), moved_bias)
    if oracle.uses_int8_gemm(config, 16):
        cases.assert_same(moved[0], expected[0])
    for one, other in zip(moved, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8()], ids=["tutorial", "int8"])
def test_expanded_input_and_weight(ops, config, device):
    input = cases.normal((1, 16), device=device).expand(5, 16)
    weight = cases.normal((1, 16), seed=1, device=device).expand(6, 16)
    cases.assert_same(
        ops.qat_linear(input, weight, config=config),
        ops.qat_linear(input.clone(), weight.clone(), config=config),
    )


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


@pytest.mark.parametrize(
    "written, config",
    [("weight", QATConfig()), ("input", QATConfig()), ("weight", QATConfig.int8())],
    ids=["weight", "input", "weight-int8"],
)
def test_a_tensor_written_between_forward_and_backward_is_the_error_of_nn_linear(
    kernels, written, config, device
):
    for function in (
        F.linear,
        functools.partial(qat_linear, config=config),
        functools.partial(torch_ops.qat_linear, config=config),
    ):
        operands = cases.linear(((5,), 16, 6), device=device, requires_grad=True)
        y = function(*operands)
        with torch.no_grad():
            getattr(operands, written).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_the_input_of_integers_may_be_written_before_backward(kernels, device):
    """An int8 GEMM saves the quantized input, not the input."""
    gradients = []
    for written in (False, True):
        operands = cases.linear(((5,), 16, 6), device=device, requires_grad=True)
        y = qat_linear(*operands, config=QATConfig.int8())
        with torch.no_grad():
            operands.input.add_(3 * written)
        gradients.append(torch.autograd.grad(y.sum(), list(operands)))
    for one, other in zip(*gradients, strict=True):
        cases.assert_same(one, other)


def test_a_second_backward_is_the_error_of_nn_linear(ops, device):
    for function in (F.linear, ops.qat_linear):
        y = function(*cases.linear(((5,), 16, 6), device=device, requires_grad=True)).sum()
        y.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward()


@pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8()], ids=["tutorial", "int8"])
def test_retained_graphs_give_the_same_twice(ops, config, device):
    operands = cases.linear(((5,), 16, 6), device=device, requires_grad=True)
    y = ops.qat_linear(*operands, config=config).sum()
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
def test_opcheck_of_the_forward(kernels, config):
    operands = cases.linear(((5,), 16, 6))
    torch.library.opcheck(torch.ops.qatfast.qat_linear_forward.default, (*operands, config.codes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("shape", [((), 16, 6), ((2, 3), 16, 6), ((0,), 16, 6)], ids=cases.name)
@pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8()], ids=["tutorial", "int8"])
def test_opcheck_of_dtypes_and_shapes(kernels, config, dtype, shape):
    operands = cases.linear(shape, dtype, requires_grad=True, bias=shape != ((2, 3), 16, 6))
    torch.library.opcheck(torch.ops.qatfast.qat_linear.default, (*operands, config.codes))


@pytest.mark.parametrize(
    "dtype, shape",
    [
        *((torch.float32, (leading, 16, 6)) for leading in ((5,), (), (2, 3), (0,))),
        (torch.float64, ((5,), 16, 6)),
        (torch.bfloat16, ((2, 3), 16, 6)),
    ],
    ids=cases.name,
)
def test_opcheck_of_the_operators_of_the_int8_gemm(kernels, dtype, shape):
    config = cases.CONFIGS["per_token"]
    operators = torch.ops.qatfast
    operands = cases.linear(shape, dtype, bias=shape != ((2, 3), 16, 6))
    weight_spec = config.weight.code
    torch.library.opcheck(operators.qat_linear_int8_weight.default, (operands.weight, weight_spec))
    integers = list(operators.qat_linear_int8_weight(operands.weight, weight_spec))
    for given in ([], integers):
        arguments = (*operands, given, config.codes)
        torch.library.opcheck(operators.qat_linear_int8_forward.default, arguments)
        torch.library.opcheck(operators.qat_linear_int8.default, arguments)
        leaves = [x if x is None else x.detach().requires_grad_() for x in operands]
        torch.library.opcheck(operators.qat_linear_int8.default, (*leaves, given, config.codes))
    _, *input_integers = operators.qat_linear_int8_forward(*operands, integers, config.codes)
    torch.library.opcheck(operators.qat_linear_int8_input.default, (*input_integers, dtype))
    grad = cases.normal((input_integers[0].shape[0], 6), dtype)
    arguments = (grad, *input_integers, operands.weight, weight_spec)
    torch.library.opcheck(operators.qat_linear_int8_backward.default, arguments)
    torch.library.opcheck(
        operators.qat_linear_grad_weight.default, (grad, cases.normal((len(grad), 16), dtype))
    )


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("config", INTEGER_CONFIGS[::7], ids=str)
def test_what_is_kept_of_the_input_is_its_fake_quantization(kernels, config, dtype, device):
    input, weight, bias = cases.linear(((2, 3), 19, 6), dtype, device=device)
    input[1, 0, 3] = torch.inf
    _, *integers = torch.ops.qatfast.qat_linear_int8_forward(input, weight, bias, [], config.codes)
    assert integers[0].dtype == torch.int8
    x_hat = torch.ops.qatfast.qat_linear_int8_input(*integers, dtype)
    cases.assert_same(x_hat.view_as(input), quantized(input, config.input))


ROWS = (torch.full((3,), 0.1), torch.arange(3, dtype=torch.int32))


def test_gradients_of_a_static_input_per_token_are_an_error(kernels):
    """Its mask would be that of the first row's grid."""
    codes = QATConfig(QuantSpec(granularity=PerToken()), QuantSpec(), None, None).codes
    operators, x, weight = torch.ops.qatfast, torch.randn(3, 4), torch.randn(2, 4)
    assert operators.qat_linear_int8_static(x, weight, None, [], *ROWS, None, None, codes).shape == (3, 2)
    words = r"qat_linear: expected an input spec per tensor where a gradient is required, got PerToken\(\)"
    with pytest.raises(ValueError, match=words):
        operators.qat_linear_int8_static_forward(x, weight, None, [], *ROWS, codes)
    with pytest.raises(ValueError, match=words):
        operators.qat_linear_int8_static(x.requires_grad_(), weight, None, [], *ROWS, None, None, codes)


@pytest.mark.parametrize("trained", ["input", "weight"])
def test_a_static_scale_is_not_trained(kernels, trained):
    """Also if nothing else requires grad."""
    grids = {name: [torch.tensor(0.1), torch.tensor(0)] for name in ("input", "weight")}
    grids[trained][0].requires_grad_()
    arguments = (torch.randn(3, 4), torch.randn(2, 4), None, [], *grids["input"], *grids["weight"])
    codes = QATConfig(QuantSpec(), QuantSpec(), None, None).codes
    with pytest.raises(ValueError, match="qat_linear_int8_static: expected scale not to require grad"):
        torch.ops.qatfast.qat_linear_int8_static(*arguments, codes)
    with torch.no_grad():
        assert torch.ops.qatfast.qat_linear_int8_static(*arguments, codes).shape == (3, 2)
