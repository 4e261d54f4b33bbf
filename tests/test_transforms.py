"""torch.func transforms, autocast and other contexts do not change the results."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, vjp, vmap

import cases
import oracle
from operators import operators
from qatfast import (
    FakeQuantize,
    PerChannel,
    PerTensor,
    PerToken,
    QATConfig,
    QATLinear,
    QuantSpec,
    fake_quantize,
    functional,
    prepare,
)

CONFIGS = pytest.mark.parametrize("config", cases.CONFIGS.values(), ids=cases.CONFIGS)
EITHER = pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8()], ids=["tutorial", "int8"])


def is_integer(config):
    return oracle.uses_int8_gemm(config, 16)


@pytest.mark.parametrize("op", operators(takes_granularity=True), ids=str)
@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap_is_the_loop_over_samples(op, in_dim, device):
    for calls in zip(*(op.calls(device=device, seed=seed) for seed in range(3)), strict=True):
        samples = torch.stack([call.arguments["input"] for call in calls])

        def one(x, call=calls[0]):
            return call.replaced(input=x).through(functional)

        batched = vmap(one, in_dims=in_dim)(samples.movedim(0, in_dim))
        loop = [one(sample) for sample in samples]
        if isinstance(batched, tuple):
            cases.assert_all_same(batched, [torch.stack(results) for results in zip(*loop, strict=True)])
        else:
            cases.assert_same(batched, torch.stack(loop))


def test_vmap_over_the_grid(device):
    x = cases.normal((9,), device=device)
    scales = torch.tensor([0.5, 0.25, 1.0], device=device)
    zero_points = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)

    def one(scale, zero_point):
        return functional.fake_quantize_affine(x, scale, zero_point, 0, 15)

    loop = torch.stack([one(*pair) for pair in zip(scales, zero_points, strict=True)])
    cases.assert_same(vmap(one)(scales, zero_points), loop)


def test_vmap_of_vmap(device):
    x = cases.normal((2, 3, 7), device=device)
    loop = torch.stack([torch.stack([fake_quantize(row) for row in sample]) for sample in x])
    cases.assert_same(vmap(vmap(fake_quantize))(x), loop)


@CONFIGS
def test_vmap_of_a_layer_over_inputs_and_over_weights(config, device):
    input, weight, bias = cases.linear(((5,), 16, 6), torch.float64, device=device)
    inputs = torch.stack([input, 2 * input, input.flip(0)])
    weights = torch.stack([weight, weight.flip(0), weight.flip(1)])

    def layer(input, weight):
        return functional.qat_linear(input, weight, bias, config=config)

    same = cases.assert_same if is_integer(config) else torch.testing.assert_close
    loop = torch.stack([layer(one, weight) for one in inputs])
    same(vmap(layer, in_dims=(0, None))(inputs, weight), loop)
    loop = torch.stack([layer(input, one) for one in weights])
    same(vmap(layer, in_dims=(None, 0))(input, weights), loop)
    loop = torch.stack([layer(*pair) for pair in zip(inputs, weights, strict=True)])
    same(vmap(layer)(inputs, weights), loop)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("leading", [(), (2, 3)], ids=cases.name)
@pytest.mark.parametrize("config", [QATConfig.int8(), cases.CONFIGS["per_token"]], ids=["int8", "per_token"])
def test_vmap_of_integers_gives_the_oracles_numbers(config, leading, dtype, device):
    samples = [cases.linear((leading, 16, 6), dtype, seed=seed) for seed in range(3)]
    stacked = [torch.stack(tensors).to(device) for tensors in zip(*samples, strict=True)]
    expected = [oracle.int8_linear(*sample, config) for sample in samples]
    y = vmap(lambda *operands: functional.qat_linear(*operands, config=config))(*stacked)
    cases.assert_same(y, torch.stack(expected))


@pytest.mark.parametrize("op", [op for op in operators(elementwise=True) if op.differentiable], ids=str)
def test_grad_is_autograds(op, device):
    for call in op.calls(torch.float64, device=device):

        def loss(x, call=call):
            return call.replaced(input=x).through(functional).pow(2).sum()

        x = call.arguments["input"].clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(x), x)
        torch.testing.assert_close(grad(loss)(x.detach()), expected)
        samples = torch.stack([x.detach(), -x.detach(), 2 * x.detach()])
        loop = torch.stack([grad(loss)(sample) for sample in samples])
        torch.testing.assert_close(vmap(grad(loss))(samples), loop)


def test_jacobians_and_hessians(device):
    x = cases.normal((6,), torch.float64, device=device)
    assert torch.equal(jacrev(fake_quantize)(x), torch.eye(6, dtype=torch.float64, device=device))
    scale, zero_point = torch.tensor(0.25, dtype=torch.float64), torch.tensor(3, dtype=torch.int32)

    def affine(x):
        return functional.fake_quantize_affine(x, scale.to(device), zero_point.to(device), 0, 7)

    steps = (x / 0.25).round() + 3
    expected = torch.diag(((steps >= 0) & (steps <= 7)).double())
    assert 0 < expected.sum() < 6
    assert torch.equal(jacrev(affine)(x), expected)
    cubes = jacrev(jacrev(lambda x: fake_quantize(x).pow(3).sum()))(x)
    torch.testing.assert_close(cubes, torch.diag(6 * fake_quantize(x)))
    _, pull = vjp(fake_quantize, x)
    assert torch.equal(pull(torch.ones_like(x))[0], torch.ones_like(x))


@CONFIGS
def test_gradients_of_a_layer_a_sample(config, device):
    torch.manual_seed(0)
    layer = QATLinear(16, 6, dtype=torch.float64, device=device, config=config)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    x = cases.normal((4, 3, 16), torch.float64, device=device)

    def loss(parameters, sample):
        return functional_call(layer, parameters, (sample,)).square().sum()

    a_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index in range(4):
        layer.zero_grad()
        layer(x[index]).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(a_sample[name][index], parameter.grad)


@CONFIGS
def test_the_hessian_of_a_layer_is_that_of_the_surrogate(config, device):
    input, weight, bias = cases.linear(((3,), 8, 6), torch.float64, device=device)

    def straight_through(x, spec):
        return x + (by_spec(x, spec) - x).detach()

    def ours(input, weight):
        return functional.qat_linear(input, weight, bias, config=config).pow(3).sum()

    def surrogate(input, weight):
        hats = map(straight_through, (input, weight, bias), (config.input, config.weight, config.bias))
        return straight_through(F.linear(*hats), config.output).pow(3).sum()

    def hessians(function):
        return jacrev(jacrev(function, (0, 1)), (0, 1))(input, weight)

    torch.testing.assert_close(hessians(ours), hessians(surrogate))


def test_torch_autograd_functional_agrees(device):
    x = cases.normal((5,), torch.float64, device=device)
    jacobian = torch.autograd.functional.jacobian(fake_quantize, x)
    assert torch.equal(jacobian, torch.eye(5, dtype=torch.float64, device=device))
    torch.autograd.functional.jacobian(fake_quantize, x, vectorize=True)


def by_spec(x, spec):
    if spec is None:
        return x
    return fake_quantize(x, spec.num_bits, symmetric=spec.symmetric, granularity=spec.granularity)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.name)
@CONFIGS
def test_autocast_casts_what_the_quantizers_give(ops, config, dtype, device):
    """The quantizers take float32 tensors; the product and the output have the autocast dtype.

    With an int8 GEMM, only the result has the autocast dtype.
    """
    operands = cases.linear(((5,), 16, 6), device=device, requires_grad=True)
    specs = (config.input, config.weight, config.bias)
    hats = [by_spec(operand, spec).to(dtype) for operand, spec in zip(operands, specs, strict=True)]
    expected = by_spec(F.linear(*hats), config.output)
    with torch.autocast(device, dtype):
        y = ops.qat_linear(*operands, config=config)
    numbers = oracle.int8_linear(*operands, config, dtype) if is_integer(config) else expected
    cases.assert_same(y, numbers)
    upstream = cases.normal((5, 6), dtype, seed=4, device=device)
    theirs = torch.autograd.grad(expected, list(operands), upstream)
    ours = torch.autograd.grad(y, list(operands), upstream)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("op", operators(takes_granularity=True), ids=str)
def test_autocast_leaves_the_quantizers_alone(op, device):
    for call in op.calls(device=device):
        expected = call.through(functional)
        with torch.autocast(device, torch.bfloat16):
            cases.assert_all_same(call.through(functional), expected)


def test_autocast_takes_mixed_operands(device):
    input, weight, bias = cases.linear(((5,), 16, 6), device=device)
    with torch.autocast(device, torch.bfloat16):
        y = functional.qat_linear(input.bfloat16(), weight, bias)
        expected = fake_quantize(F.linear(input.bfloat16(), fake_quantize(weight), fake_quantize(bias)))
    assert y.dtype == torch.bfloat16
    cases.assert_same(y, expected)


def test_autocast_takes_mixed_operands_for_integers(ops, device):
    """Each operand is quantized in its own dtype, computed in float32."""
    input, weight, bias = cases.linear(((5,), 16, 6), device=device)
    config = QATConfig(QuantSpec(8), QuantSpec(8), QuantSpec(8), QuantSpec(6))
    for operands in (
        (input.bfloat16(), weight, bias),
        (input, weight.half(), bias),
        (input, weight, bias.half()),
    ):
        with torch.autocast(device, torch.bfloat16):
            y = ops.qat_linear(*operands, config=config)
        expected = oracle.int8_linear(*operands, config, torch.bfloat16)
        cases.assert_same(y, expected)


@EITHER
def test_autocast_leaves_float64_alone(config, device):
    operands = cases.linear(((5,), 16, 6), torch.float64, device=device)
    expected = functional.qat_linear(*operands, config=config)
    with torch.autocast(device, torch.bfloat16):
        cases.assert_same(functional.qat_linear(*operands, config=config), expected)
    with torch.autocast(device, torch.bfloat16, enabled=False):
        assert functional.qat_linear(*cases.linear(((5,), 16, 6), device=device)).dtype == torch.float32


def test_a_network_trains_under_autocast(device):
    torch.manual_seed(0)
    layers = [
        FakeQuantize(),
        QATLinear(16, 12),
        nn.ReLU(inplace=True),
        QATLinear(12, 4, config=QATConfig.int8()),
    ]
    model = nn.Sequential(*layers).to(device)
    with torch.autocast(device, torch.bfloat16):
        y = model(cases.normal((7, 16), device=device))
        assert y.dtype == torch.bfloat16
        loss = y.float().square().mean()
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().sum() > 0


def test_checkpointing_gives_the_same_gradients(device):
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    layers = QATLinear(16, 12), nn.ReLU(), QATLinear(12, 4, config=QATConfig.int8())
    model = nn.Sequential(*layers).to(device)
    x = cases.normal((7, 16), device=device)

    def gradients(forward):
        model.zero_grad()
        forward(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for one, other in zip(
        gradients(lambda x: checkpoint(model, x, use_reentrant=False)), gradients(model), strict=True
    ):
        cases.assert_same(one, other)


def test_hooks_and_anomaly_mode(device):
    x = cases.normal((9,), device=device, requires_grad=True)
    seen = []
    with torch.autograd.set_detect_anomaly(True):
        y = fake_quantize(x)
        y.register_hook(lambda gradient: seen.append(gradient.shape))
        functional.fake_quantize_affine(y, *cases.grid((9,), PerTensor(), device=device)).sum().backward()
    assert seen == [(9,)]


def test_the_default_dtype_changes_nothing(device):
    x = cases.normal((5, 9), device=device)
    expected = [
        fake_quantize(x, granularity=granularity) for granularity in (PerTensor(), PerToken(), PerChannel(0))
    ]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for granularity, other in zip((PerTensor(), PerToken(), PerChannel(0)), expected, strict=True):
            cases.assert_same(fake_quantize(x, granularity=granularity), other)
        y = functional.fake_quantize_affine(x, 0.5, 3, 0, 15)
    finally:
        torch.set_default_dtype(before)
    cases.assert_same(y, functional.fake_quantize_affine(x, 0.5, 3, 0, 15))


@pytest.mark.parametrize("shape", [(8,), (8, 2, 2)], ids=["linear", "convolution"])
def test_transforms_of_a_prepared_model(shape):
    """In evaluation, with a chain."""
    torch.manual_seed(0)
    x = cases.normal((4, *shape))
    layer = nn.Linear if len(shape) == 1 else (lambda *sizes: nn.Conv2d(*sizes, 1))
    model = prepare(nn.Sequential(layer(8, 6), nn.ReLU(), layer(6, 4), nn.Flatten()), example_inputs=x)
    model(x)
    model.eval()
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    loss(dict(model.named_parameters()), x).backward()
    expected = {name: value.grad for name, value in model.named_parameters()}
    found = grad(loss)(parameters, x)
    of_samples = vmap(grad(loss), (None, 0))(parameters, x.unsqueeze(1))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        torch.testing.assert_close(of_samples[name].sum(0), value)
    samples = vmap(lambda sample: functional_call(model, parameters, (sample[None],))[0])(x)
    cases.assert_same(samples, model(x).detach())
