"""cached_weights: the same results and gradients, one quantization of each weight, nothing stale."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import qatfast
from qatfast import PerGroup, QATConfig, QATLinear, QuantSpec, cached_weights, weight_cache

CONFIGS = [
    QATConfig(),
    QATConfig.int8(),
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


def test_a_forward_without_gradients_does_not_serve_one_with(quantizations):
    net = model(QATConfig())
    with cached_weights(net):
        with torch.no_grad():
            net(numbers(5, 8))
        net(numbers(5, 8)).sum().backward()
    assert net[0].weight.grad is not None


def test_a_written_weight_is_quantized_again():
    net = model(QATConfig())
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


def test_nothing_is_cached_outside(quantizations):
    net = model(QATConfig())
    x = numbers(5, 8)
    with pytest.raises(KeyError), cached_weights(net):
        before = net(x)
        raise KeyError
    net[0].weight.data.mul_(3)
    assert not torch.equal(net(x), before)
    assert len(weight_cache._cached) == 0


def test_compiled_and_transformed_calls_do_not_touch_the_cache(quantizations):
    net = model(QATConfig())
    x = numbers(5, 8)
    with cached_weights(net):
        torch.func.vmap(net)(x.unsqueeze(1))
        compiled = torch.compile(net, backend="aot_eager")(x)
    assert quantizations == []
    assert torch.equal(compiled, net(x))


def test_only_a_module_has_weights():
    message = r"cached_weights: expected module to be an nn\.Module, got Tensor"
    with pytest.raises(TypeError, match=message), cached_weights(torch.ones(2)):
        pass
