"""Derivatives of all orders, modes and gradient types are those of ``x + (q(x) - x).detach()``."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import cases
import qatfast
from qatfast import (
    FakeQuantize,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConfig,
    QATLinear,
    QuantSpec,
    cached_weights,
    fake_quantize,
    functional,
    prepare,
    reference,
)

CONFIGS = {
    "tutorial": QATConfig(),
    "int8": QATConfig.int8(),
    "int8_affine": QATConfig(QuantSpec(8), QuantSpec(8), QuantSpec(8), QuantSpec(6)),
    "weight_only": QATConfig.weight_only(4, 4),
    "float": QATConfig(None, None, None, None),
    "input_only": QATConfig(QuantSpec(6), None, None, None),
    "mixed": QATConfig(
        QuantSpec(9, granularity=PerToken()), QuantSpec(4, symmetric=True), None, QuantSpec(5)
    ),
}
ALL_CONFIGS = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
LAYOUTS_OF_GRID = pytest.mark.parametrize(
    "shape, granularity",
    [((5, 8), PerTensor()), ((5, 8), PerChannel(1)), ((5, 8), PerGroup(4)), ((8,), PerToken())],
    ids=cases.name,
)


def subsets(things):
    """Returns all nonempty subsets."""
    things = list(things)
    return [chosen for size in range(1, len(things) + 1) for chosen in itertools.combinations(things, size)]


def by_spec(x, spec):
    """Returns the values of the quantizer with the derivatives of x."""
    if x is None or spec is None:
        return x
    hat = fake_quantize(x.detach(), spec.num_bits, symmetric=spec.symmetric, granularity=spec.granularity)
    return hat + (x - x.detach())


def surrogate(input, weight, bias, config):
    product = F.linear(
        by_spec(input, config.input), by_spec(weight, config.weight), by_spec(bias, config.bias)
    )
    return by_spec(product, config.output)


def affine_surrogate(x, grid, granularity):
    """Returns the values of the quantizer with derivative zero outside of the static range."""
    steps = functional.quantize(x.detach(), *grid[:2], -32768, 32767, granularity=granularity)
    inside = (steps >= grid.quant_min) & (steps <= grid.quant_max)
    y = functional.fake_quantize_affine(x.detach(), *grid, granularity=granularity)
    return y + torch.where(inside, x - x.detach(), 0)


def operands_of(bias, device, leading=(5,)):
    return cases.linear((leading, 8, 6), torch.float64, bias=bias, device=device)


def layers(config, weight):
    """Returns the implementations of a layer: {name: function of input, weight and bias}."""
    found = {
        "public": lambda *operands: functional.qat_linear(*operands, config=config),
        "reference": lambda *operands: reference.qat_linear(*operands, config=config),
    }
    if not cases.why_no_kernels(str(weight.device)) and config.uses_int8_gemm(8):
        given = list(torch.ops.qatfast.qat_linear_int8_weight(weight.detach(), config.codes[4:8]))
        found["given_integers"] = lambda *operands: torch.ops.qatfast.qat_linear_int8(
            *operands, given, config.codes
        )
    return found


def close(actual, expected, where=""):
    message = (lambda text: f"{where}: {text}") if where else None
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=message)


def derivatives(y, first, upstream, seconds):
    """Returns gradients by ``first`` and second derivatives by each of ``seconds``, as a list."""
    gradients = torch.autograd.grad(y, first, upstream, create_graph=True)
    loss = sum(gradient.pow(2).sum() + gradient.sin().sum() for gradient in gradients)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return [*gradients, *itertools.chain(*(torch.autograd.grad(loss, by, **options) for by in seconds))]


@ALL_CONFIGS
@BIAS
@pytest.mark.parametrize("leading", [(5,), (2, 3)], ids=cases.name)
def test_derivatives_by_every_subset_of_the_tensors(config, bias, leading, device):
    """Tests all subsets of tensors that require grad, and derivatives by all subsets."""
    values = operands_of(bias, device, leading)
    present = [index for index, value in enumerate(values) if value is not None]

    def found(layer, required, first):
        leaves = [
            None if value is None else value.detach().clone().requires_grad_(index in required)
            for index, value in enumerate(values)
        ]
        upstream = cases.normal((*leading, 6), torch.float64, seed=7, device=device).requires_grad_()
        seconds = subsets([*(leaves[index] for index in required), upstream])
        return derivatives(layer(*leaves), [leaves[index] for index in first], upstream, seconds)

    for required in subsets(present):
        for first in subsets(required):
            expected = found(lambda *operands: surrogate(*operands, config), required, first)
            for name, layer in layers(config, values.weight).items():
                for one, other in zip(found(layer, required, first), expected, strict=True):
                    close(one, other, f"{name}, {required=}, {first=}")


@ALL_CONFIGS
def test_second_derivatives_of_tensors_that_are_no_leaves(ops, config, device):
    """Also tests a tensor that is both input and weight."""
    values = cases.normal((8, 8), torch.float64, device=device)

    def found(layer):
        results = []
        for chosen in range(4):
            leaf = values.clone().requires_grad_()
            square, copy = leaf * leaf, leaf * 1
            input, weight = ((square, leaf), (leaf, square), (copy, copy), (leaf, leaf))[chosen]
            upstream = cases.normal((8, 8), torch.float64, seed=7, device=device).requires_grad_()
            for first in (leaf, input, weight):
                y = layer(input, weight, values[0])
                results += derivatives(y, [first], upstream, subsets((leaf, input, upstream)))
        return results

    ours = found(lambda *operands: ops.qat_linear(*operands, config=config))
    for one, other in zip(ours, found(lambda *operands: surrogate(*operands, config)), strict=True):
        close(one, other)


@ALL_CONFIGS
def test_third_derivatives(config, device):
    values = operands_of(True, device)
    results = []
    for layer in (*layers(config, values.weight).values(), lambda *operands: surrogate(*operands, config)):
        tensors = [value.clone().requires_grad_() for value in values]
        derivative = layer(*tensors).pow(3).sum() / 100
        for order in range(3):
            gradients = torch.autograd.grad(derivative, tensors, create_graph=True)
            derivative = sum(gradient.pow(2).sum() for gradient in gradients) / 10 ** (order + 1)
        results.append(gradients)
    for found in results[:-1]:
        for one, other in zip(found, results[-1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@LAYOUTS_OF_GRID
def test_second_derivatives_of_the_quantizers(ops, shape, granularity, device):
    values = cases.normal(shape, torch.float64, device=device)
    grid = cases.grid(shape, granularity, torch.float64, (0, 7), device=device)
    for function, expected in (
        (
            lambda x: ops.fake_quantize(x, 3, granularity=granularity),
            lambda x: by_spec(x, QuantSpec(3, granularity=granularity)),
        ),
        (
            lambda x: ops.fake_quantize_affine(x, *grid, granularity=granularity),
            lambda x: affine_surrogate(x, grid, granularity),
        ),
    ):
        found = []
        for one in (function, expected):
            x = values.clone().requires_grad_()
            upstream = cases.normal(shape, torch.float64, seed=7, device=device).requires_grad_()
            inner = x.pow(2)
            found.append(derivatives(one(inner), [x], upstream, subsets((x, inner, upstream))))
        for ours, theirs in zip(*found, strict=True):
            close(ours, theirs)


def test_a_layer_with_cached_weights_has_the_same_second_derivatives(device):
    for config in (QATConfig(), QATConfig.int8()):
        layer = QATLinear(8, 6, dtype=torch.float64, device=device, config=config)
        x = cases.normal((5, 8), torch.float64, device=device, requires_grad=True)

        def by_all(layer=layer, x=x):
            first = torch.autograd.grad(layer(x).pow(3).sum(), layer.weight, create_graph=True)[0]
            return torch.autograd.grad(first.pow(2).sum(), (x, layer.weight, layer.bias))

        expected = by_all()
        with cached_weights(layer):
            for _ in range(2):
                for one, other in zip(by_all(), expected, strict=True):
                    close(one, other)


@pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8()], ids=["tutorial", "int8"])
def test_batched_gradients_are_the_loop(ops, config, device):
    operands = [x.requires_grad_() for x in operands_of(True, device)]
    x = operands[0]
    grid = cases.grid((5, 8), PerTensor(), torch.float64, (0, 7), device=device)
    for function in (
        lambda: ops.qat_linear(*operands, config=config),
        lambda: ops.fake_quantize(x).pow(2),
        lambda: ops.fake_quantize_affine(x, *grid).pow(2),
    ):
        y = function()
        upstream = cases.normal((4, *y.shape), torch.float64, seed=7, device=device)
        wanted = operands if y.shape[1] == 6 else [x]
        batched = torch.autograd.grad(y, wanted, upstream, is_grads_batched=True, retain_graph=True)
        loop = [torch.autograd.grad(y, wanted, one, retain_graph=True) for one in upstream]
        for index, gradient in enumerate(batched):
            close(gradient, torch.stack([one[index] for one in loop]))
        (first,) = torch.autograd.grad(y.pow(3).sum(), wanted[-1], create_graph=True)
        upstream = cases.normal((3, *first.shape), torch.float64, seed=8, device=device)
        (batched,) = torch.autograd.grad(first, x, upstream, is_grads_batched=True, retain_graph=True)
        loop = [torch.autograd.grad(first, x, one, retain_graph=True)[0] for one in upstream]
        close(batched, torch.stack(loop))


@ALL_CONFIGS
def test_products_with_the_hessian(ops, config, device):
    operands = tuple(operands_of(True, device))
    directions = tuple(cases.normal(tuple(x.shape), torch.float64, seed=9, device=device) for x in operands)

    def ours(*operands):
        return ops.qat_linear(*operands, config=config).pow(3).sum()

    def theirs(*operands):
        return surrogate(*operands, config).pow(3).sum()

    for product in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        for one, other in zip(
            product(ours, operands, directions)[1], product(theirs, operands, directions)[1], strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_gradcheck_of_a_layer_that_quantizes_nothing(ops, device):
    """A config without quantizers is the only one for which numerical derivatives are right."""
    operands = [x.requires_grad_() for x in operands_of(True, device)]

    def layer(*operands):
        return ops.qat_linear(*operands, config=CONFIGS["float"])

    modes = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(layer, operands, **modes, check_batched_forward_grad=False)
    assert torch.autograd.gradgradcheck(layer, operands, check_fwd_over_rev=True, check_rev_over_rev=True)


# Forward mode


def tangent(function, primals, tangents, requires_grad=()):
    """Returns the result and its tangent.

    A primal without a tangent is passed as a plain tensor.
    """
    with forward_ad.dual_level():
        duals = [
            primal
            if primal is None
            else forward_ad.make_dual(primal.detach().requires_grad_(index in requires_grad), one)
            if one is not None
            else primal.detach().requires_grad_(index in requires_grad)
            for index, (primal, one) in enumerate(zip(primals, tangents, strict=True))
        ]
        y, y_tangent = forward_ad.unpack_dual(function(*duals))
    return y, y_tangent


@ALL_CONFIGS
@BIAS
@pytest.mark.parametrize("leading", [(5,), (), (2, 3), (0,)], ids=cases.name)
def test_tangents_of_a_layer(config, bias, leading, device):
    """Tests all combinations of tensors with tangents and tensors that require grad."""
    values = operands_of(bias, device, leading)
    present = [index for index, value in enumerate(values) if value is not None]
    ones = [
        None if x is None else cases.normal(tuple(x.shape), x.dtype, seed=5, device=device) for x in values
    ]
    for name, layer in layers(config, values.weight).items():
        plain = layer(*values)
        for dual in subsets(present):
            tangents = [one if index in dual else None for index, one in enumerate(ones)]
            expected = tangent(lambda *x: surrogate(*x, config), values, tangents)[1]
            for required in [(), *subsets(present)]:
                y, found = tangent(layer, values, tangents, required)
                cases.assert_same(y, plain)
                assert found is not None, (name, dual, required)
                close(found, expected)
                assert y.requires_grad == bool(required)


@LAYOUTS_OF_GRID
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_tangents_of_the_quantizers(ops, shape, granularity, dtype, device):
    x, one = (cases.normal(shape, dtype, seed=seed, device=device) for seed in (0, 1))
    grid = cases.grid(shape, granularity, dtype, (0, 7), device=device)
    inside = torch.autograd.grad(
        ops.fake_quantize_affine(leaf := x.clone().requires_grad_(), *grid, granularity=granularity),
        leaf,
        torch.ones_like(x),
    )[0].bool()
    if x.numel() > 8:
        assert 0 < inside.sum() < x.numel()
    for required in ((), (0,)):
        y, found = tangent(lambda x: ops.fake_quantize(x, granularity=granularity), [x], [one], required)
        cases.assert_same(y, ops.fake_quantize(x, granularity=granularity))
        cases.assert_same(found, one)
        y, found = tangent(
            lambda x: ops.fake_quantize_affine(x, *grid, granularity=granularity), [x], [one], required
        )
        cases.assert_same(y, ops.fake_quantize_affine(x, *grid, granularity=granularity))
        cases.assert_same(found, torch.where(inside, one, 0))


def test_integers_and_grids_have_no_tangent(ops, device):
    x = cases.normal((9,), device=device)
    grid = cases.grid((9,), PerTensor(), device=device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        results = [*ops.choose_qparams(dual), ops.quantize(dual, *grid)]
        assert all(forward_ad.unpack_dual(result).tangent is None for result in results)


def test_a_scale_with_a_tangent_is_refused(ops, device):
    """A scale with a tangent is an error, like a scale that requires grad."""
    x = cases.normal((9,), device=device)
    scale, *rest = cases.grid((9,), PerTensor(), device=device)
    q = torch.ones(9, dtype=torch.int8, device=device)

    def calls(scale):
        return (
            lambda: ops.fake_quantize_affine(x, scale, *rest),
            lambda: ops.dequantize(q, scale, rest[0]),
            lambda: torch.func.jvp(lambda scale: ops.dequantize(q, scale, rest[0]), (scale,), (scale,)),
        )

    with forward_ad.dual_level():
        for call in calls(forward_ad.make_dual(scale, torch.ones_like(scale)))[:2]:
            with pytest.raises(ValueError, match=r"expected scale to have no tangent.*fake_quantize_learned"):
                call()
        ops.quantize(x, forward_ad.make_dual(scale, torch.ones_like(scale)), *rest)
    with pytest.raises(ValueError, match=r"expected scale to have no tangent.*fake_quantize_learned"):
        calls(scale)[2]()


@pytest.mark.parametrize("layout", ["transposed", "strided", "every_other_row"])
def test_tangents_of_strided_tensors(ops, layout, device):
    place, _ = cases.LAYOUTS[layout]
    x, one = (cases.normal((5, 8), torch.float64, seed=seed, device=device) for seed in (0, 1))
    grid = cases.grid((5, 8), PerGroup(4), torch.float64, (0, 7), device=device)

    def affine(x):
        return ops.fake_quantize_affine(x, *grid, granularity=PerGroup(4))

    expected = tangent(affine, [x], [one])[1]
    for primal, direction in ((place(x), one), (x, place(one)), (place(x), place(one))):
        close(tangent(affine, [primal], [direction])[1], expected)
        close(tangent(ops.fake_quantize, [primal], [direction])[1], one)


def test_the_tangent_is_there_without_grad_mode_and_under_autocast(ops, device):
    for config in (QATConfig(), QATConfig.int8()):
        operands = cases.linear(((5,), 8, 6), device=device)
        direction = cases.normal((5, 8), seed=4, device=device)

        def layer(*operands, config=config):
            return ops.qat_linear(*operands, config=config)

        expected = tangent(layer, operands, (direction, None, None))[1]
        with torch.no_grad():
            close(tangent(layer, operands, (direction, None, None))[1], expected)
        with torch.autocast(device, torch.bfloat16):
            y, found = tangent(layer, operands, (direction, None, None))
        assert y.dtype == found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)


def test_tangents_through_the_modules(device):
    x, direction = (cases.normal((5, 8), torch.float64, seed=seed, device=device) for seed in (0, 4))
    model = torch.nn.Sequential(
        FakeQuantize(), QATLinear(8, 6, dtype=torch.float64, config=QATConfig.int8()), torch.nn.Tanh()
    ).to(device)
    expected = torch.autograd.functional.jvp(model, x, direction)[1]  # computed by two backward passes
    close(tangent(model, [x], [direction])[1], expected)
    with cached_weights(model):
        for _ in range(2):
            close(tangent(model, [x], [direction])[1], expected)


def test_a_write_into_the_result_leaves_the_tangent_of_the_input(ops, device):
    x = cases.normal((5, 8), torch.float64, device=device)
    grid = cases.grid((5, 8), PerTensor(), torch.float64, (-300, 300), device=device, width=1e3)
    for function in (ops.fake_quantize, lambda x: ops.fake_quantize_affine(x, *grid)):
        one = torch.ones_like(x)
        with forward_ad.dual_level():
            y = function(forward_ad.make_dual(x, one)).mul_(3)
            close(forward_ad.unpack_dual(y).tangent, 3 * torch.ones_like(x))
        assert torch.equal(one, torch.ones_like(x))


@ALL_CONFIGS
def test_forward_over_reverse_is_reverse_over_reverse(ops, config, device):
    operands = tuple(operands_of(True, device, (3,)))

    def ours(*operands):
        return ops.qat_linear(*operands, config=config).pow(3).sum()

    expected = torch.autograd.functional.hessian(lambda *x: surrogate(*x, config).pow(3).sum(), operands)
    forward = torch.autograd.functional.hessian(
        ours, operands, outer_jacobian_strategy="forward-mode", vectorize=True
    )
    for rows, others in zip(forward, expected, strict=True):
        for one, other in zip(rows, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    # The tangents of gradients, without a functorch transform.
    directions = [cases.normal(tuple(x.shape), x.dtype, seed=6, device=device) for x in operands]
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(x.clone().requires_grad_(), one)
            for x, one in zip(operands, directions, strict=True)
        ]
        gradients = torch.autograd.grad(ours(*duals), duals)
        tangents = [forward_ad.unpack_dual(gradient).tangent for gradient in gradients]
    products = torch.autograd.functional.hvp(
        lambda *x: surrogate(*x, config).pow(3).sum(), operands, tuple(directions)
    )[1]
    for one, other in zip(tangents, products, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_forward_over_reverse_of_a_given_grid(ops, device):
    x = cases.normal((5, 8), torch.float64, device=device)
    grid = cases.grid((5, 8), PerChannel(1), torch.float64, (0, 7), device=device)

    def cubes(function):
        return lambda x: function(x.pow(2)).pow(3).sum()

    ours = cubes(lambda x: ops.fake_quantize_affine(x, *grid, granularity=PerChannel(1)))
    expected = torch.autograd.functional.hessian(cubes(lambda x: affine_surrogate(x, grid, PerChannel(1))), x)
    assert expected.abs().sum() > 0
    close(torch.autograd.functional.hessian(ours, x), expected)
    options = {"outer_jacobian_strategy": "forward-mode", "vectorize": True}
    close(torch.autograd.functional.hessian(ours, x, **options), expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x))
        (gradient,) = torch.autograd.grad(ours(dual), dual)
        found = forward_ad.unpack_dual(gradient).tangent
    close(found, expected.reshape(40, 40).sum(1).view(5, 8))


@ALL_CONFIGS
def test_reverse_over_forward(ops, config, device):
    """Tests the gradient of a tangent."""
    values = operands_of(True, device)
    direction = cases.normal((5, 8), torch.float64, seed=6, device=device)

    def gradients(layer):
        leaves = [x.clone().requires_grad_() for x in values]
        one = direction.clone().requires_grad_()
        with forward_ad.dual_level():
            y = layer(forward_ad.make_dual(leaves[0], one), *leaves[1:])
            loss = forward_ad.unpack_dual(y).tangent.pow(2).sum()
            return torch.autograd.grad(loss, [*leaves, one], allow_unused=True, materialize_grads=True)

    ours = gradients(lambda *x: ops.qat_linear(*x, config=config))
    for one, other in zip(ours, gradients(lambda *x: surrogate(*x, config)), strict=True):
        close(one, other)


def test_the_operators_inside_refuse_to_be_differentiated(kernels, device):
    """Internal operators are called below autograd.

    Direct calls must not silently drop a derivative.
    """
    ops, codes = torch.ops.qatfast, QATConfig.int8().codes
    x, weight, bias = operands_of(True, device)
    grid = cases.grid((5, 8), PerTensor(), torch.float64, device=device)
    values, scale, zero_point = ops.qat_linear_int8_forward(x, weight, bias, [], codes)[1:]
    dy = cases.normal((5, 6), torch.float64, device=device)
    calls = {
        "fake_quantize_affine_forward": lambda x: ops.fake_quantize_affine_forward(x, *grid)[0],
        "qat_linear_forward": lambda x: ops.qat_linear_forward(x, weight, bias, QATConfig().codes)[0],
        "qat_linear_int8_forward": lambda x: ops.qat_linear_int8_forward(x, weight, bias, [], codes)[0],
        "qat_linear_int8_backward": lambda x: ops.qat_linear_int8_backward(
            dy + x.sum(), values, scale, zero_point, weight, codes[4:8]
        )[0],
        "qat_linear_grad_weight": lambda x: ops.qat_linear_grad_weight(dy, x),
        "qat_linear_int8_input": lambda x: ops.qat_linear_int8_input(
            values, scale.expand(5) + 0 * x.sum(), zero_point, torch.float64
        ),
    }
    for name, call in calls.items():
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=name):
            call(forward_ad.make_dual(x, torch.ones_like(x)))
        y = call(x.clone().requires_grad_())
        with pytest.raises(RuntimeError, match=f"derivative for qatfast::{name} is not implemented"):
            y.sum().backward()


# Gradients that are not plain dense tensors


def quantizers(ops, device):
    """Returns {name: function of a (10, 4) tensor}."""
    found = {}
    for granularity in (PerTensor(), PerChannel(0), PerChannel(1), PerToken(), PerGroup(2)):
        grid = cases.grid((10, 4), granularity, quant_range=(0, 7), device=device)

        def affine(x, grid=grid, granularity=granularity):
            return ops.fake_quantize_affine(x, *grid, granularity=granularity)

        found[f"affine {granularity}"] = affine
    found["dynamic"] = lambda x: ops.fake_quantize(x, 4)
    return found


def test_sparse_gradients_are_sparse(ops, device):
    """Sparse gradients stay sparse, as in torch.fake_quantize_per_channel_affine.

    SparseAdam needs it.
    """
    table = cases.normal((10, 4), device=device)
    rows = torch.tensor([1, 3, 3, 7, 1, 1], device=device)
    weights = cases.normal((6, 4), seed=3, device=device)
    for function in quantizers(ops, device).values():
        gradients = []
        for sparse in (True, False):
            leaf = table.clone().requires_grad_()
            F.embedding(rows, function(leaf), sparse=sparse).backward(weights)
            gradients.append(leaf.grad)
        assert gradients[0].layout == torch.sparse_coo
        assert gradients[0].coalesce().indices().tolist() == [[1, 3, 7]]
        torch.testing.assert_close(gradients[0].to_dense(), gradients[1])


def test_a_sparse_gradient_that_is_infinite_is_zero_outside(ops, device):
    grid = cases.Grid(
        torch.tensor(1.0, device=device), torch.tensor(0, dtype=torch.int32, device=device), 0, 7
    )
    leaf = torch.tensor([[1.0], [100.0], [3.0]], device=device, requires_grad=True)
    indices = torch.tensor([[0, 1], [0, 0]], device=device)
    values = torch.full((2,), torch.inf, device=device)
    upstream = torch.sparse_coo_tensor(indices, values, (3, 1), check_invariants=True)
    (gradient,) = torch.autograd.grad(ops.fake_quantize_affine(leaf, *grid), leaf, upstream)
    assert gradient.to_dense().tolist() == [[torch.inf], [0.0], [0.0]]


def test_a_sparse_optimizer_trains_a_quantized_table(ops, device):
    grid = cases.grid((10, 4), PerTensor(), quant_range=(0, 7), device=device)
    table = cases.normal((10, 4), device=device, requires_grad=True)
    before = table.detach().clone()
    optimizer = torch.optim.SparseAdam([table], lr=0.1)
    rows = torch.tensor([2, 5], device=device)
    F.embedding(rows, ops.fake_quantize_affine(table, *grid), sparse=True).pow(2).sum().backward()
    optimizer.step()
    moved = (table.detach() != before).any(1)
    assert moved[rows].any()
    assert not moved[[0, 1, 3, 4, 6, 7, 8, 9]].any()


@pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8()], ids=["tutorial", "int8"])
def test_a_layer_takes_a_sparse_gradient(kernels, config, device):
    """A layer may receive a sparse gradient; nn.Linear does not support it."""
    operands = [x.requires_grad_() for x in operands_of(True, device)]
    rows = torch.tensor([1, 3, 3], device=device)
    gradients = []
    for sparse in (True, False):
        y = F.embedding(rows, functional.qat_linear(*operands, config=config), sparse=sparse)
        gradients.append(torch.autograd.grad(y.pow(2).sum(), operands))
    for one, other in zip(*gradients, strict=True):
        close(one, other)


def odd_gradients(dense):
    """Returns {name: a tensor of another type with these values}."""
    yield "negative view", torch._neg_view(-dense)
    yield "imaginary part of a conjugate", torch.complex(dense, -dense).conj().imag
    yield "transposed", dense.t().contiguous().t()
    yield "step", dense.repeat_interleave(2, 1)[:, ::2]
    yield "offset", torch.cat([dense.new_zeros(1), dense.flatten()])[1:].view_as(dense)
    yield "parameter", torch.nn.Parameter(dense.clone())


@pytest.mark.parametrize("name", ["dynamic", "affine PerTensor()", "affine PerGroup(group_size=2)"])
def test_gradients_of_every_kind_through_the_quantizers(ops, name, device):
    function = quantizers(ops, device)[name]
    x = cases.normal((10, 4), device=device, requires_grad=True)
    dense = cases.normal((10, 4), seed=2, device=device)
    (expected,) = torch.autograd.grad(function(x), x, dense)
    for kind, upstream in odd_gradients(dense):
        (found,) = torch.autograd.grad(function(x), x, upstream)
        assert torch.equal(found, expected), kind
    ones = torch.autograd.grad(function(x), x, torch.ones_like(dense))[0]
    assert torch.equal(torch.autograd.grad(function(x).sum(), x)[0], ones)
    assert torch.equal(
        torch.autograd.grad(function(x), x, torch.ones((), device=device).expand(10, 4))[0], ones
    )
    (zero,) = torch.autograd.grad(function(x), x, torch._efficientzerotensor((10, 4), device=device))
    assert torch.equal(zero + 0.0, torch.zeros_like(dense))


@ALL_CONFIGS
def test_gradients_of_every_kind_through_a_layer(ops, config, device):
    operands = [x.requires_grad_() for x in operands_of(True, device)]
    dense = cases.normal((5, 6), torch.float64, seed=2, device=device)
    expected = torch.autograd.grad(ops.qat_linear(*operands, config=config), operands, dense)
    for _, upstream in odd_gradients(dense):
        for one, other in zip(
            torch.autograd.grad(ops.qat_linear(*operands, config=config), operands, upstream),
            expected,
            strict=True,
        ):
            close(one, other)
    zero = torch._efficientzerotensor((5, 6), dtype=torch.float64, device=device)
    for gradient in torch.autograd.grad(ops.qat_linear(*operands, config=config), operands, zero):
        close(gradient + 0.0, torch.zeros_like(gradient + 0.0))


@ALL_CONFIGS
def test_undefined_gradients(ops, config, device):
    """A function that does not use the result passes an undefined gradient."""

    class Unused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    operands = [x.requires_grad_() for x in operands_of(True, device)]
    grid = cases.grid((5, 8), PerTensor(), torch.float64, device=device)
    for y in (
        ops.qat_linear(*operands, config=config),
        ops.fake_quantize(operands[0]),
        ops.fake_quantize_affine(operands[0], *grid),
    ):
        for gradient in torch.autograd.grad(Unused.apply(y).sum(), operands, allow_unused=True):
            assert gradient is None or not gradient.any()


def test_inputs_that_are_views_of_other_signs(ops, device):
    x = cases.normal((10, 4), device=device)
    for function in quantizers(ops, device).values():
        for kind, input in odd_gradients(x):
            assert torch.equal(function(input), function(x)), kind
    weight = cases.normal((3, 4), seed=1, device=device)
    for config in (QATConfig(), QATConfig.int8()):
        expected = ops.qat_linear(x, weight, config=config)
        for _, input in odd_gradients(x):
            torch.testing.assert_close(ops.qat_linear(input, weight, config=config), expected)


@pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8()], ids=["tutorial", "int8"])
def test_gradients_that_are_tensor_subclasses(config, device):
    from torch.testing._internal.two_tensor import TwoTensor

    def dense(x):
        assert isinstance(x, TwoTensor)
        assert torch.equal(x.a, x.b)
        return x.a

    operands = [x.requires_grad_() for x in operands_of(True, device)]
    grid = cases.grid((5, 8), PerTensor(), torch.float64, (0, 7), device=device)
    for function in (
        lambda *x: functional.qat_linear(*x, config=config),
        lambda x, *_: functional.fake_quantize(x),
        lambda x, *_: functional.fake_quantize_affine(x, *grid),
    ):
        y = function(*operands)
        wanted = operands if y.shape[1] == 6 else operands[:1]
        upstream = cases.normal(tuple(y.shape), torch.float64, seed=2, device=device)
        expected = torch.autograd.grad(y, wanted, upstream, retain_graph=True)
        found = torch.autograd.grad(y, wanted, TwoTensor(upstream, upstream.clone()))
        for one, other in zip(found, expected, strict=True):
            close(dense(one), other)


def test_a_hook_may_change_the_gradient_but_not_its_type(ops, device):
    """The autograd engine raises before it calls the node."""
    operands = [x.requires_grad_() for x in operands_of(True, device)]
    for config in (QATConfig(), QATConfig.int8()):
        y = ops.qat_linear(*operands, config=config)
        y.register_hook(lambda gradient: gradient.t().contiguous().t() * 2)
        upstream = cases.normal((5, 6), torch.float64, device=device)
        found = torch.autograd.grad(y, operands, upstream)
        expected = torch.autograd.grad(ops.qat_linear(*operands, config=config), operands, 2 * upstream)
        for one, other in zip(found, expected, strict=True):
            close(one, other)
        y = ops.qat_linear(*operands, config=config)
        y.register_hook(lambda gradient: gradient.float())
        with pytest.raises(RuntimeError, match="has changed the type"):
            y.sum().backward()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("config", [QATConfig.static(), QATConfig.int8(), "stored weight"], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv", "chain"])
def test_tangents_of_layers_with_static_ranges(kind, config, training):
    if config == "stored weight":
        rows = QuantSpec(8, symmetric=True, granularity=PerChannel(0), range=MinMax())
        config = QATConfig(QuantSpec(8, range=MinMax()), rows, None, None)
    torch.manual_seed(0)
    x, one = (cases.normal((4, 3, 6, 6), seed=seed) for seed in (0, 1))
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.ReLU(), torch.nn.Conv2d(3, 2, 3))
    if kind == "linear":
        model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    model = prepare(model, config, example_inputs=x if kind == "chain" else None)
    model(x)
    qatfast.freeze(model).train(training)
    expected = torch.func.jvp(lambda x: model(x), (x,), (one,))[1]
    y, found = tangent(model, [x], [one])
    cases.assert_same(y.detach(), model(x).detach())
    close(found, expected)
    with torch.no_grad():
        close(tangent(model, [x], [one])[1], expected)
