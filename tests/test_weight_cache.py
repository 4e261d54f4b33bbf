"""cached_weights: the same results and gradients, one quantization of each weight, nothing stale."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cases
import qatfast
from qatfast import (
    PerGroup,
    PerToken,
    QATConfig,
    QATLinear,
    QuantSpec,
    cached_weights,
    weight_cache,
)

INTEGERS = QATConfig(QuantSpec(8, granularity=PerToken()), QuantSpec(5))
CONFIGS = [
    QATConfig(),
    QATConfig.int8(),
    INTEGERS,
    QATConfig.weight_only(group_size=4),
    QATConfig(weight=None),
    QATConfig(weight=QuantSpec(3, granularity=PerGroup(2))),
]


def numbers(*shape):
    return torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))


def model(config):
    torch.manual_seed(0)
    return nn.Sequential(QATLinear(8, 4, config=config), nn.ReLU(), QATLinear(4, 4, config=config))


@pytest.fixture
def quantizations(monkeypatch):
    """How many weights the cache has quantized."""
    calls = []

    def counted(weight, *args, **kwargs):
        calls.append(weight)
        return qatfast.fake_quantize(weight, *args, **kwargs)

    monkeypatch.setattr(weight_cache, "fake_quantize", counted)
    return calls


EITHER = pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8()], ids=["tutorial", "int8"])


class Operators(TorchDispatchMode):
    """The names of the operators of qatfast that run inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "qatfast":
            self.seen.append(function.__name__.removesuffix(".default"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_results_and_accumulated_gradients_are_the_same(config):
    plain = model(config)
    cached = copy.deepcopy(plain)
    x = numbers(5, 8)
    expected = [plain(x * scale) for scale in (1, 2)]
    for y in expected:
        y.square().sum().backward()
    with cached_weights(cached) as inside:
        assert inside is cached
        for scale, y in zip((1, 2), expected, strict=True):
            found = cached(x * scale)
            assert torch.equal(found, y)
            found.square().sum().backward()
    for ours, theirs in zip(cached.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_each_weight_is_quantized_once(quantizations):
    net = model(QATConfig())
    with cached_weights(net), cached_weights(net[0]):
        for _ in range(3):
            net(numbers(5, 8))
    assert len(quantizations) == 2


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_the_integers_of_each_weight_are_made_once(kernels, bias):
    torch.manual_seed(0)
    net = nn.Sequential(*(QATLinear(8, 8, bias, config=INTEGERS) for _ in range(2)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    x = numbers(5, 8)
    with cached_weights(net), Operators() as operators:
        for _ in range(3):
            net(x)
        with torch.no_grad():
            net(x)
    assert operators.seen.count("qat_linear_weight") == 2
    assert not {"qat_linear", "fake_quantize"} & {*operators.seen}  # the bias is quantized inside
    plain = copy.deepcopy(net)
    with cached_weights(net), Operators() as operators:
        for step in range(3):
            optimizer.zero_grad()
            y = net(x)
            torch.testing.assert_close(y, plain(x), rtol=0, atol=0)
            y.square().sum().backward()
            optimizer.step()
            plain.load_state_dict(net.state_dict())
            assert operators.seen.count("qat_linear_weight") == 2 * (step + 1)


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=cases.name)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2), ()], ids=str)
def test_cached_integers_give_the_gradients_of_any_of_the_tensors(leading, wanted):
    layer = QATLinear(8, 4, config=INTEGERS)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((*leading, 8)).astype(np.float32))
    tensors = (x, layer.weight, layer.bias)
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index in wanted)
    inputs = [tensors[index] for index in wanted]

    def run():
        y = layer(x)
        assert y.requires_grad == bool(wanted)
        return [y, *(torch.autograd.grad(y.square().sum(), inputs) if wanted else ())]

    expected = run()
    with cached_weights(layer):
        for _ in range(2):
            cases.assert_all_same(run(), expected)


@EITHER
def test_autocast_inside_is_autocast(config):
    layer, x = QATLinear(8, 4, config=config), numbers(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with cached_weights(layer):
            found = [layer(x), layer(x)]
    assert expected.dtype == torch.bfloat16
    for y in found:
        cases.assert_same(y, expected)


def test_a_weight_written_before_backward_is_an_error(kernels):
    layer, x = QATLinear(8, 4, config=QATConfig.int8()), numbers(5, 8).requires_grad_()
    with cached_weights(layer):
        y = layer(x)
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_inference_mode_leaves_integers_that_training_may_use():
    layer, x = QATLinear(8, 4, config=QATConfig.int8()), numbers(5, 8).requires_grad_()
    layer(x).sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    with cached_weights(layer):
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
    cases.assert_same(layer.weight.grad, expected)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_feature_is_no_obstacle():
    layer = QATLinear(0, 3, config=QATConfig(QuantSpec(8), QuantSpec(8, granularity=PerGroup(1)), None, None))
    with cached_weights(layer):
        cases.assert_same(layer(torch.ones(2, 0)), layer.bias.expand(2, 3))


@EITHER
def test_a_forward_without_gradients_does_not_serve_one_with(config):
    net = model(config)
    with cached_weights(net):
        with torch.no_grad():
            net(numbers(5, 8))
        net(numbers(5, 8)).sum().backward()
    assert net[0].weight.grad is not None


@EITHER
def test_a_written_weight_is_quantized_again(config):
    net = model(config)
    x = numbers(5, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    with cached_weights(net):
        net(x).sum().backward()
        optimizer.step()
        inside = net(x)
        net[0].weight = nn.Parameter(numbers(4, 8))
        replaced = net(x)
    assert torch.equal(replaced, net(x))
    assert not torch.equal(inside, replaced)


@EITHER
def test_nothing_is_cached_outside(config):
    net = model(config)
    x = numbers(5, 8)
    with pytest.raises(KeyError), cached_weights(net):
        before = net(x)
        raise KeyError
    net[0].weight.data.mul_(3)
    with torch.no_grad():
        expected = copy.deepcopy(net)(x)
    assert not torch.equal(expected, before)
    cases.assert_same(net(x), expected)
    assert len(weight_cache._cached) == 0


@EITHER
def test_compiled_and_transformed_calls_do_not_touch_the_cache(config):
    net = model(config)
    x = numbers(5, 8)
    with cached_weights(net):
        torch.func.vmap(net)(x.unsqueeze(1))
        compiled = torch.compile(net, backend="aot_eager")(x)
        assert [*weight_cache._cached.values()] == [None, None]
    assert torch.equal(compiled, net(x))


def test_only_a_module_has_weights():
    message = r"cached_weights: expected module to be an nn\.Module, got Tensor"
    with pytest.raises(TypeError, match=message), cached_weights(torch.ones(2)):
        pass
