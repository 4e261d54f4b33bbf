"""cached_weights: equal results and gradients, a single quantization per weight, no stale entry."""

import asyncio
import contextlib
import contextvars
import copy
import gc
import io
import os
import signal
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize, prune, vector_to_parameters
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import cases
import qatfast
from qatfast import (
    Learned,
    MinMax,
    PerChannel,
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
    """Returns a counter of the weights that the cache quantizes."""
    calls = []

    def counted(weight, *args, **kwargs):
        calls.append(weight)
        return qatfast.fake_quantize(weight, *args, **kwargs)

    monkeypatch.setattr(weight_cache, "fake_quantize", counted)
    return calls


EITHER = pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8()], ids=["tutorial", "int8"])


READERS = pytest.mark.parametrize(
    "reads", [weight_cache._ordinary_state, weight_cache._state], ids=["fast", "in Python"]
)


class Operators(TorchDispatchMode):
    """Records the names of the operators of qatfast that run in the mode."""

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
    assert operators.seen.count("qat_linear_int8_weight") == 2
    assert not {"qat_linear", "fake_quantize"} & {*operators.seen}  # the layer's operator quantizes the bias
    plain = copy.deepcopy(net)
    with cached_weights(net), Operators() as operators:
        for step in range(3):
            optimizer.zero_grad()
            y = net(x)
            torch.testing.assert_close(y, plain(x), rtol=0, atol=0)
            y.square().sum().backward()
            optimizer.step()
            plain.load_state_dict(net.state_dict())
            assert operators.seen.count("qat_linear_int8_weight") == 2 * (step + 1)


ROWS = PerChannel(0)
STATIC = {
    "dynamic weight": QATConfig.static(),
    "learned": QATConfig.static(4),
    "stored weight": QATConfig(QuantSpec(8, range=MinMax()), QuantSpec(8, True, ROWS, MinMax()), None, None),
    "affine": QATConfig(QuantSpec(8, range=MinMax()), QuantSpec(4, range=Learned()), None, None),
    "learned input": QATConfig(QuantSpec(8, range=Learned()), QuantSpec(8, True, ROWS), None, None),
    "output": QATConfig(
        QuantSpec(8, range=MinMax()), QuantSpec(8, True, ROWS, Learned()), QuantSpec(8), QuantSpec(8)
    ),
    "groups": QATConfig(QuantSpec(8, range=MinMax()), QuantSpec(4, granularity=PerGroup(4)), None, None),
    "weight only": QATConfig(None, QuantSpec(4, granularity=PerGroup(4), range=Learned()), None, None),
}


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("config", STATIC.values(), ids=STATIC)
def test_weights_of_layers_with_ranges_are_quantized_once(kernels, config, kind):
    torch.manual_seed(0)
    if kind == "linear":
        layer, x = QATLinear(8, 4, config=config), numbers(3, 8)
    else:
        layer, x = qatfast.QATConv2d(4, 6, 2, config=config), numbers(2, 4, 5, 5)
    layer(x)
    layer.eval()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = layer(x)
            with cached_weights(layer):
                for _ in range(3):
                    cases.assert_same(layer(x), expected)
                with torch.no_grad():
                    layer.weight.mul_(0.5)
                    found = layer(x)
            cases.assert_same(found, layer(x).detach())
            assert not torch.equal(found, expected)
    with torch.no_grad(), cached_weights(layer), Operators() as operators:
        layer(x)
        first = len(operators.seen)
        layer(x)
        assert len(operators.seen) - first < first


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_another_scale_is_another_weight(kind):
    if kind == "linear":
        layer, x = QATLinear(8, 4, config=QATConfig.static(4)), numbers(3, 8)
    else:
        layer, x = qatfast.QATConv2d(4, 6, 2, config=QATConfig.static(4)), numbers(2, 4, 5, 5)
    layer(x)
    layer.eval()
    with torch.no_grad(), cached_weights(layer):
        before = layer(x)
        layer.weight_quantizer.scale.mul_(0.5)
        found = layer(x)
    cases.assert_same(found, layer(x).detach())
    assert not torch.equal(found, before)


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


def held(net):
    """Returns the quantized weight per layer in the open blocks of this thread."""
    slots = [weight_cache.slot_of(layer) for layer in net.modules() if isinstance(layer, QATLinear)]
    return [slot and slot.entry for slot in slots]


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
    assert held(net) == [None, None]
    assert not weight_cache._is_open


@pytest.mark.usefixtures("fresh_compiler")
@EITHER
def test_compiled_and_transformed_calls_do_not_touch_the_cache(config):
    net = model(config)
    x = numbers(5, 8)
    with cached_weights(net):
        torch.func.vmap(net)(x.unsqueeze(1))
        compiled = torch.compile(net, backend="aot_eager")(x)
        assert held(net) == [None, None]
    assert torch.equal(compiled, net(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_compile_a_layer_and_a_step_at_most_twice():
    layer, x = QATLinear(8, 8), numbers(5, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, fused=True)
    forward, step = torch.compile(layer, backend="eager"), torch.compile(optimizer.step, backend="eager")
    frames = torch._dynamo.utils.counters["frames"]
    compiled = []
    for blocks in (0, 1, 0, 1, 2, 3, 0, 1):
        with contextlib.ExitStack() as stack:
            for _ in range(blocks):
                stack.enter_context(cached_weights(layer))
            for _ in range(2):
                forward(x).sum().backward()
                step()
                cases.assert_same(layer(x), copy.deepcopy(layer)(x))
                assert blocks == 0 or None not in held(layer)  # a compiled step also ends
        compiled.append(frames["total"])
    assert compiled[2:] == [compiled[2]] * 6


def test_only_a_module_has_weights():
    message = r"cached_weights: expected module to be an nn\.Module, got a Tensor"
    with pytest.raises(TypeError, match=message), cached_weights(torch.ones(2)):
        pass


# Writes


def trained(config, make_optimizer, block, step=None, steps=4):
    """Returns the losses of a training, the outputs after each step and the final weights."""
    net, x = model(config), numbers(5, 8)
    optimizer = make_optimizer(net)
    seen = []

    def loss():
        optimizer.zero_grad()
        value = net(x).square().mean()
        value.backward()
        seen.append(value.detach())
        return value

    with block(net):
        for _ in range(steps):
            if step is None:
                loss()
                optimizer.step()
            else:
                step(optimizer, loss)
            with torch.no_grad():
                seen.append(net(x))
    return [*seen, *(parameter.detach() for parameter in net.parameters())]


def assert_trains_the_same(config, make_optimizer, step=None):
    expected = trained(config, make_optimizer, contextlib.nullcontext, step)
    assert not torch.equal(expected[0], expected[-6])  # it trains
    cases.assert_all_same(trained(config, make_optimizer, cached_weights, step), expected)


class WritesData(torch.optim.Optimizer):
    """An optimizer whose writes do not change the version."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(parameter.grad.data)
        return loss


class Twice(WritesData):
    """An optimizer that runs another step, then a forward, and then writes."""

    def step(self, closure=None):
        loss = super().step(closure)
        if closure is not None:
            closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(0.5)
        return loss


OPTIMIZERS = {
    f"{name}, {how}": (
        lambda net, name=name, kwargs=kwargs: getattr(torch.optim, name)(net.parameters(), lr=0.3, **kwargs)
    )
    for name in ("SGD", "Adam", "AdamW", "Adagrad")
    for how, kwargs in {
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "loop": {"foreach": False},
    }.items()
}
OPTIMIZERS["writes .data"] = lambda net: WritesData(net.parameters())
OPTIMIZERS["step in step"] = lambda net: Twice(net.parameters())
FUSED = OPTIMIZERS["SGD, fused"]


@EITHER
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_inside_a_block_is_the_same(config, name):
    assert_trains_the_same(config, OPTIMIZERS[name])


@EITHER
def test_closures_run_forwards_inside_a_step(config):
    def step(optimizer, loss):
        optimizer.step(loss)

    for make in (
        lambda net: torch.optim.LBFGS(net.parameters(), max_iter=4),
        FUSED,
        OPTIMIZERS["writes .data"],
    ):
        assert_trains_the_same(config, make, step)


@EITHER
def test_a_gradient_scaler_steps(config):
    def train(block):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

        def step(optimizer, loss):
            optimizer.zero_grad()
            net = optimizer.net
            scaler.scale(net(numbers(5, 8)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()

        def make(net):
            optimizer = FUSED(net)
            optimizer.net = net
            return optimizer

        return trained(config, make, block, step)

    cases.assert_all_same(train(cached_weights), train(contextlib.nullcontext))


@EITHER
@pytest.mark.parametrize("name", ["SGD, fused", "step in step"])
@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("place", ["optimizer", "everywhere"])
@pytest.mark.parametrize("time", ["pre", "post"])
def test_hooks_of_a_step_may_run_forwards(config, name, with_closure, place, time):
    net, x = model(config), numbers(5, 8)
    optimizer = OPTIMIZERS[name](net)
    pairs = []

    def forward(*_):
        pairs.append((net(x), copy.deepcopy(net)(x)))

    def loss():
        optimizer.zero_grad()
        value = net(x).square().mean()
        value.backward()
        return value

    if place == "optimizer":
        handle = getattr(optimizer, f"register_step_{time}_hook")(forward)
    else:
        handle = getattr(optimizers, f"register_optimizer_step_{time}_hook")(forward)
    try:
        with cached_weights(net):
            for _ in range(3):
                loss()
                optimizer.step(*([loss] if with_closure else []))
                forward()
    finally:
        handle.remove()
    with cached_weights(net):
        pass
    assert len(pairs) >= 6
    for found, expected in pairs:
        cases.assert_same(found, expected)
    assert not optimizers._global_optimizer_pre_hooks
    assert not optimizers._global_optimizer_post_hooks


def test_optimizers_are_hooked_while_a_block_is_open():
    layer = QATLinear(8, 4)
    other = optimizers.register_optimizer_step_post_hook(lambda *_: None)
    hooks = optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks
    try:
        for _ in range(3):
            with cached_weights(layer), cached_weights(layer):
                assert [len(some) for some in hooks] == [1, 2]
    finally:
        other.remove()
    with cached_weights(layer):
        assert [len(some) for some in hooks] == [1, 1]
    assert [len(some) for some in hooks] == [0, 0]


@EITHER
def test_a_block_may_open_inside_a_step(config):
    net, x = model(config), numbers(5, 8)
    optimizer = FUSED(net)
    net(x).sum().backward()
    with contextlib.ExitStack() as stack:

        def closure():
            stack.enter_context(cached_weights(net))
            net(x)

        optimizer.step(closure)
        cases.assert_same(net(x), copy.deepcopy(net)(x))


def test_a_block_may_end_while_hooks_run():
    """torch iterates over the hooks, so none may be removed."""
    net, x = model(QATConfig.int8()), numbers(5, 8)
    net(x).sum().backward()
    ran = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(cached_weights(net))
        handles = [
            optimizers.register_optimizer_step_post_hook(lambda *_: stack.close()),
            optimizers.register_optimizer_step_post_hook(lambda *_: ran.append(1)),
        ]
        try:
            FUSED(net).step()
        finally:
            for handle in handles:
                handle.remove()
    assert ran
    with cached_weights(net):
        pass
    assert not optimizers._global_optimizer_post_hooks


def test_a_step_that_raises_makes_nothing_stale():
    net, x = model(QATConfig()), numbers(5, 8)
    optimizer = FUSED(net)

    def fail():
        raise KeyError

    for _ in range(2):
        with cached_weights(net):
            net(x).sum().backward()
            with pytest.raises(KeyError):
                optimizer.step(fail)
            for _ in range(2):
                cases.assert_same(net(x), copy.deepcopy(net)(x))
                optimizer.step()
            cases.assert_same(net(x), copy.deepcopy(net)(x))
    with cached_weights(net):  # the next block caches again
        net(x)
        assert None not in held(net)


def rows(layer):
    layer.weight.data = layer.weight.data[:4]
    layer.bias.data = layer.bias.data[:4]


def swapped(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(2 * layer.weight.detach()))


@torch.no_grad()
def set_storage(layer):
    layer.weight.set_(2 * layer.weight.detach())


@torch.no_grad()
def averaged(layer):
    torch._foreach_lerp_([layer.weight], [torch.ones_like(layer.weight)], 0.5)


WRITES = {
    "in place": lambda layer: nn.init.ones_(layer.weight),
    "of a detached one": lambda layer: layer.weight.detach().mul_(2),
    "foreach": averaged,
    "set_": set_storage,
    "data": lambda layer: setattr(layer.weight, "data", 2 * layer.weight.data),
    "data, the same memory transposed": lambda layer: setattr(layer.weight, "data", layer.weight.data.t()),
    "data, fewer rows of the same memory": rows,
    "swap_tensors": swapped,
    "vector_to_parameters": lambda layer: vector_to_parameters(torch.linspace(-1, 2, 72), layer.parameters()),
    "load_state_dict": lambda layer: layer.load_state_dict(QATLinear(8, 8).state_dict()),
    "load_state_dict, assigned": lambda layer: layer.load_state_dict(
        QATLinear(8, 8).state_dict(), assign=True
    ),
    "rounded to half and back": lambda layer: layer.half().float(),
    "another Parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(8, 8))),
    "config": lambda layer: setattr(layer, "config", QATConfig(QuantSpec(3), QuantSpec(3))),
}


@EITHER
@pytest.mark.parametrize("swap", [False, True], ids=["", "swapping"])
@READERS
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_are_seen(config, write, reads, swap, monkeypatch):
    monkeypatch.setattr(weight_cache, "_ordinary_state", reads)
    layer, x = QATLinear(8, 8, config=config), numbers(5, 8)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        with cached_weights(layer):
            first = layer(x).detach()
            write(layer)
            found = [layer(x), layer(x)]
        expected = layer(x)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    for y in found:
        cases.assert_same(y, expected)
    assert first.shape != expected.shape or not torch.equal(first, expected)


@READERS
@EITHER
def test_another_place_or_dtype_of_the_same_memory_is_seen(config, reads, monkeypatch):
    monkeypatch.setattr(weight_cache, "_ordinary_state", reads)
    layer, x = QATLinear(8, 8, bias=False, config=config).half(), numbers(5, 8).half()
    memory = numbers(16, 8).half()
    with cached_weights(layer):
        for part in (
            memory[:8],
            memory[8:],
            memory[8:].view(torch.bfloat16),
            memory[:8].view(torch.bfloat16),
        ):
            layer.weight.data = part
            y = x.to(part.dtype)
            cases.assert_same(layer(y), copy.deepcopy(layer)(y))


@READERS
@EITHER
def test_another_parameter_of_the_same_memory_gets_its_gradient(config, reads, monkeypatch):
    monkeypatch.setattr(weight_cache, "_ordinary_state", reads)
    layer, x = QATLinear(8, 4, config=config), numbers(5, 8)
    with cached_weights(layer):
        old = layer.weight
        for _ in range(2):
            layer(x)
        layer.weight = nn.Parameter(old.detach())
        layer(x).sum().backward()
    assert old.grad is None
    assert layer.weight.grad is not None


def test_no_new_weight_lies_where_the_old_one_lay():
    """A new weight at the old address could look unchanged.

    The block keeps the old memory alive.
    """
    layer, x = QATLinear(8, 8), numbers(5, 8)
    with torch.no_grad(), cached_weights(layer):
        layer(x)
        old = StorageWeakRef(layer.weight.untyped_storage())
        layer.weight.data = torch.empty(0)
        assert not old.expired()
        layer.weight.data = torch.ones(8, 8)
        cases.assert_same(layer(x), copy.deepcopy(layer)(x))
    assert old.expired()


@EITHER
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=cases.name)
def test_a_move_to_another_dtype_is_seen(config, dtype):
    layer, x = QATLinear(8, 8, config=config), numbers(5, 8)
    with cached_weights(layer):
        layer(x)
        layer.to(dtype)
        found = layer(x.to(dtype))
    cases.assert_same(found, layer(x.to(dtype)))


@EITHER
def test_a_new_block_starts_with_nothing(config):
    """A new block is the remedy for undetected writes, even if another thread has an open block."""
    net, x = model(config), numbers(5, 8)
    with ThreadPoolExecutor(1) as other, other_block(other, net):
        other.submit(net, x).result()
        for _ in range(2):
            with cached_weights(net):
                net(x)
            net[0].weight.data.mul_(2)
            with cached_weights(net):
                cases.assert_same(net(x), copy.deepcopy(net)(x))


@contextlib.contextmanager
def other_block(executor, net):
    """Opens a block in the only thread of ``executor``."""
    block = cached_weights(net)
    executor.submit(block.__enter__).result()
    try:
        yield
    finally:
        executor.submit(block.__exit__, None, None, None).result()


# Blocks and threads


@EITHER
def test_blocks_end_in_any_order(config, quantizations):
    net, x = model(config), numbers(5, 8)
    expected = net(x)
    blocks = [cached_weights(net), cached_weights(net[0]), cached_weights(net)]
    for block in blocks:
        block.__enter__()
        net(x)
    made = held(net)
    for block in (blocks[0], blocks[2], blocks[1]):
        cases.assert_same(net(x), expected)
        assert held(net)[0] is made[0]
        block.__exit__(None, None, None)
    assert held(net) == [None, None]
    assert weight_cache._scopes.get() == ()


def test_nothing_is_kept_alive():
    net, x = model(QATConfig()), numbers(5, 8)
    with torch.no_grad(), cached_weights(net):
        net(x)
        kept = [weakref.ref(net[0].weight), weakref.ref(net[0]), weakref.ref(held(net)[0][4])]
    assert kept[2]() is None
    del net
    assert [ref() for ref in kept] == [None] * 3


def test_a_block_that_another_thread_ends_or_that_is_garbage_is_over():
    net, x = model(QATConfig.int8()), numbers(5, 8)
    block = cached_weights(net)
    block.__enter__()
    net(x)
    with ThreadPoolExecutor(1) as other:
        other.submit(block.__exit__, None, None, None).result()
    assert held(net) == [None, None]
    block = cached_weights(net)
    block.__enter__()
    net(x)
    del block
    gc.collect()
    assert held(net) == [None, None]
    assert not weight_cache._is_open


def test_a_thread_without_a_block_is_not_served():
    net, x = model(QATConfig()), numbers(5, 8)
    with ThreadPoolExecutor(1) as other, other_block(other, net):
        other.submit(net, x).result()
        assert held(net) == [None, None]
        net[0].weight.data.mul_(2)
        cases.assert_same(net(x), copy.deepcopy(net)(x))
    with ThreadPoolExecutor(1) as other, cached_weights(net):
        context = contextvars.copy_context()
        assert other.submit(held, net).result() == [None, None]
        net(x)
        assert other.submit(context.run, held, net).result() == held(net) != [None, None]
    assert context.run(held, net) == [None, None]


def test_tasks_have_blocks_of_their_own(quantizations):
    layer, x = QATLinear(8, 8), numbers(5, 8)

    async def request():
        with cached_weights(layer):
            for _ in range(3):
                layer(x)
                await asyncio.sleep(0)
        assert held(layer) == [None]

    async def requests():
        await asyncio.gather(*(request() for _ in range(4)))

    asyncio.run(requests())
    assert len(quantizations) == 4


def in_threads(functions):
    """Runs each function in its own thread; raises the first error."""
    with ThreadPoolExecutor(len(functions)) as executor:
        for future in [executor.submit(function) for function in functions]:
            future.result()


def test_a_block_for_each_request_on_one_model(threads):
    threads(1)
    net, x = model(QATConfig.int8()), numbers(5, 8)
    layers = [layer for layer in net if isinstance(layer, QATLinear)]
    expected = [net(x), *(layer(x[:, : layer.in_features]) for layer in layers)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def serve():
        for request in range(500):
            with contextlib.suppress(KeyError), torch.no_grad(), cached_weights(net):
                with cached_weights(layers[request % 2]):
                    assert torch.equal(net(x), expected[0])
                index = request % 2
                assert torch.equal(layers[index](x[:, : layers[index].in_features]), expected[1 + index])
                if request % 3 == 0:
                    raise KeyError

    try:
        in_threads([serve] * 8)
    finally:
        sys.setswitchinterval(before)
    assert not weight_cache._is_open
    assert not optimizers._global_optimizer_post_hooks


@EITHER
def test_one_thread_trains_while_others_serve(config, threads):
    threads(1)
    expected = trained(config, FUSED, contextlib.nullcontext, steps=100)
    net, x = model(config), numbers(5, 8)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    is_over = threading.Event()
    found = []

    def train():
        try:
            optimizer = FUSED(net)
            with cached_weights(net):
                for _ in range(100):
                    optimizer.zero_grad()
                    loss = net(x).square().mean()
                    loss.backward()
                    optimizer.step()
                    with torch.no_grad():
                        found.extend([loss.detach(), net(x)])
        finally:
            is_over.set()

    def serve():
        with torch.inference_mode(), cached_weights(net):
            while not is_over.is_set():
                with cached_weights(net):
                    net(x)
            is_over.wait()
            assert torch.equal(net(x), copy.deepcopy(net)(x))  # the last step is seen here too

    try:
        in_threads([train, *[serve] * 4])
    finally:
        sys.setswitchinterval(before)
    cases.assert_all_same([*found, *(parameter.detach() for parameter in net.parameters())], expected)


@EITHER
def test_copies_carry_nothing(config):
    net, x = model(config), numbers(5, 8)
    with cached_weights(net):
        net(x)
        copies = [copy.deepcopy(net), copy.copy(net[0])]
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
        for other in copies:
            assert not any(held(other))
        copies[0][0].weight.data.mul_(2)
        cases.assert_same(copies[0](x), copy.deepcopy(copies[0])(x))
    assert vars(net[0]).keys() == vars(QATLinear(8, 4, config=config)).keys()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_what_its_thread_had(threads):
    threads(1)
    net, x = model(QATConfig.int8()), numbers(5, 8)
    with torch.no_grad(), cached_weights(net):
        expected = net(x)
        with weight_cache._lock:  # in the child, no thread would release it
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                try:
                    fine = torch.equal(net(x), expected)
                    net[0].weight.mul_(2)
                    fine &= torch.equal(net(x), copy.deepcopy(net)(x))
                    with ThreadPoolExecutor(1) as other, other_block(other, net):
                        fine &= torch.equal(net(x), other.submit(copy.deepcopy(net), x).result())
                    os._exit(0 if fine else 1)
                finally:
                    os._exit(2)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# Modes


def runs(config, block, order):
    """Returns the outputs and gradients in these modes, in this order."""
    net, x = model(config), numbers(5, 8)
    found = []
    with block(net):
        for kind in order:
            if kind == "grad":
                y = net(x)
                found += [y.detach(), *torch.autograd.grad(y.square().sum(), list(net.parameters()))]
            elif kind == "frozen":  # an inference tensor must not be saved for backward
                net.requires_grad_(False)
                leaf = x.clone().requires_grad_()
                found += torch.autograd.grad(net(leaf).square().sum(), leaf)
                net.requires_grad_(True)
            else:
                with {"no_grad": torch.no_grad, "inference": torch.inference_mode}[kind]():
                    found.append(net(x).clone())
    return found


@EITHER
@pytest.mark.parametrize(
    "order",
    [
        ("inference", "grad", "inference"),
        ("grad", "inference", "grad"),
        ("no_grad", "grad", "no_grad", "grad"),
        ("inference", "frozen", "grad"),
        ("frozen", "grad", "no_grad", "frozen", "inference"),
    ],
    ids=str,
)
def test_gradient_modes_in_any_order(config, order):
    cases.assert_all_same(runs(config, cached_weights, order), runs(config, contextlib.nullcontext, order))


def test_one_quantization_serves_all_gradient_modes(quantizations):
    layer, x = QATLinear(8, 4), numbers(5, 8)
    with cached_weights(layer):
        with torch.inference_mode():
            layer(x)
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
    assert len(quantizations) == 1
    assert layer.weight.grad is not None


@EITHER
@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
def test_no_inference_tensor_is_kept(config, grad, kernels):
    layer, x = QATLinear(8, 4, config=config), numbers(5, 8)
    with torch.inference_mode(), grad(), cached_weights(layer):
        layer(x)
        made = held(layer)[0][4]
    assert not any(tensor.is_inference() for tensor in (made if isinstance(made, tuple) else [made]))


def test_a_group_that_is_a_row_multiplies_integers(kernels):
    config = QATConfig(QuantSpec(8), QuantSpec(8, granularity=PerGroup(8)), None, None)
    layer, x = QATLinear(8, 4, config=config), numbers(5, 8)
    with cached_weights(layer), Operators() as operators:
        found = layer(x)
    assert "qat_linear_int8_weight" in operators.seen
    cases.assert_same(found, layer(x))


@EITHER
def test_a_layer_of_inference_tensors(config):
    with torch.inference_mode():
        net, x = model(config), numbers(5, 8)
        with cached_weights(net):
            net(x)
            net[0].weight.mul_(2)
            cases.assert_same(net(x), copy.deepcopy(net)(x))


@EITHER
def test_second_derivatives_and_graphs_that_stay(config):
    def run(block):
        net = model(config).double()
        x = numbers(5, 8).double().requires_grad_()
        with block(net):
            net(x)
            y = net(x)
        loss = y.pow(3).sum()
        first = torch.autograd.grad(loss, [x, net[0].weight], create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), [x, *net.parameters()], retain_graph=True)
        again = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        return [y.detach(), *(t.detach() for t in first), *second, *again]

    cases.assert_all_same(run(cached_weights), run(contextlib.nullcontext))


@EITHER
@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing_without_reentrance(config, selective):
    def policy(context, function, *args, **kwargs):
        is_saved = function.namespace == "qatfast" or function is torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    kwargs = {"use_reentrant": False}
    if selective:
        kwargs["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)

    def run(block, later, warm):
        net, x = model(config), numbers(5, 8).requires_grad_()
        with block(net):
            if warm:
                net(x)
            y = checkpoint(net, x, **kwargs)
            if not later:
                y.square().sum().backward()
        if later:
            y.square().sum().backward()
        return [y.detach(), x.grad, *(parameter.grad for parameter in net.parameters())]

    expected = run(contextlib.nullcontext, False, False)
    for later in (False, True):
        for warm in (False, True):
            cases.assert_all_same(run(cached_weights, later, warm), expected)


@EITHER
def test_checkpointing_with_reentrance_and_a_backward_inside_another_block(config):
    def run(forward, backward, reentrant):
        net, x = model(config), numbers(5, 8).requires_grad_()
        with forward(net):
            y = checkpoint(net, x, use_reentrant=reentrant)
        with backward(net):
            net(x)
            y.square().sum().backward()
        return [y.detach(), x.grad, *(parameter.grad for parameter in net.parameters())]

    for reentrant in (False, True):
        expected = run(contextlib.nullcontext, contextlib.nullcontext, reentrant)
        for forward, backward in ((contextlib.nullcontext, cached_weights), (cached_weights, cached_weights)):
            cases.assert_all_same(run(forward, backward, reentrant), expected)


@EITHER
def test_activations_outlive_a_step(config):
    """A backward after a step returns the old gradients, or raises torch's version error."""
    net, x = model(config), numbers(5, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    with cached_weights(net):
        y = net(x)
        first = torch.autograd.grad(y.square().sum(), list(net.parameters()), retain_graph=True)
        net(x).sum().backward()
        optimizer.step()
        try:
            again = torch.autograd.grad(y.square().sum(), list(net.parameters()))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            cases.assert_all_same(again, first)
        cases.assert_same(net(x), copy.deepcopy(net)(x))


@EITHER
def test_a_trace_has_no_constants(config):
    net, x = model(config), numbers(5, 8)
    with torch.no_grad(), cached_weights(net):
        net(x)
        traced = torch.jit.trace(net, x)
        net[0].weight.mul_(2)
        cases.assert_same(traced(x), net(x))
        cases.assert_same(net(x), copy.deepcopy(net)(x))


@EITHER
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_a_graph_of_fx_has_no_constants(config, tracing_mode, pre_dispatch):
    from torch.fx.experimental.proxy_tensor import make_fx

    net, x = model(config), numbers(5, 8)
    trace = make_fx(net, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)
    with torch.no_grad(), cached_weights(net):
        for warm in (False, True):
            if warm:
                net(x)
            graph = trace(x)
            net[0].weight.mul_(2)
            cases.assert_same(graph(x), net(x))
            cases.assert_same(net(x), copy.deepcopy(net)(x))


@EITHER
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_no_constants(config, strict):
    net, x = model(config), numbers(5, 8)
    with cached_weights(net):
        net(x)
        program = torch.export.export(net, (x,), strict=strict)
    assert not program.constants
    cases.assert_same(program.module()(x), net(x))


@EITHER
def test_fake_tensors_stay_in_their_mode(config):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    net, x = model(config), numbers(5, 8)
    with cached_weights(net):
        for _ in range(2):
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                assert isinstance(net(mode.from_tensor(x)), FakeTensor)
            states = [entry[1] for entry in held(net) if entry]
            assert not any(isinstance(state, tuple) and mode in state for state in states)
            cases.assert_same(net(x), copy.deepcopy(net)(x))


class Scales(TorchDispatchMode):
    """Multiplies the results of the weight quantizer."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * self.factor if function is torch.ops.qatfast.fake_quantize.default else result


class ScalesFunctions(torch.overrides.TorchFunctionMode):
    """Multiplies the results of each quantizer and each layer."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * self.factor if str(function).startswith("qatfast.") else result


@pytest.mark.parametrize("mode", [Scales, ScalesFunctions])
def test_what_a_mode_made_stays_in_it(kernels, mode):
    layer, x = QATLinear(8, 4, config=QATConfig(bias=None, output=None)), numbers(5, 8)
    expected = {None: layer(x)}
    for factor in (2, 3):
        with cached_weights(layer), mode(factor):
            expected[factor] = layer(x)
        assert not torch.equal(expected[factor], expected[None])
    with cached_weights(layer):
        for factor in (2, 3, None, 2, None):
            with contextlib.nullcontext() if factor is None else mode(factor):
                cases.assert_same(layer(x), expected[factor])


def test_a_default_device_is_no_obstacle(quantizations):
    layer, x = QATLinear(8, 4), numbers(5, 8)
    with torch.device("cpu"), cached_weights(layer):
        for _ in range(3):
            layer(x)
    assert len(quantizations) == 1


class Wrapped(torch.Tensor):
    """A tensor subclass without changes."""


@EITHER
def test_subclasses_of_tensors(config):
    net, x = model(config), numbers(5, 8)
    expected = net(x)
    with cached_weights(net):
        for input in (x, x.as_subclass(Wrapped), x):
            cases.assert_same(net(input).as_subclass(torch.Tensor), expected)
        net[0].weight = nn.Parameter(net[0].weight.detach().as_subclass(Wrapped))
        for _ in range(2):
            cases.assert_same(net(x).as_subclass(torch.Tensor), expected)
            assert type(net[0].weight) is not nn.Parameter or held(net)[0] is None


@EITHER
def test_autocast_may_change_within_a_block(config):
    net, x = model(config), numbers(5, 8)

    def run():
        found = []
        for enabled in (False, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = net(x)
            found += [y.detach(), *torch.autograd.grad(y.float().square().sum(), list(net.parameters()))]
        return found

    expected = run()
    with cached_weights(net):
        cases.assert_all_same(run(), expected)


@EITHER
def test_transforms_and_functional_calls(config):
    net, x = model(config), numbers(5, 8)
    other = {name: 2 * value.detach() for name, value in net.named_parameters()}
    fast = {name: (2 * value) for name, value in net.named_parameters()}

    def run():
        gradient = torch.func.grad(
            lambda values: torch.func.functional_call(net, values, (x,)).square().sum()
        )
        y = torch.func.functional_call(net, fast, (x,))
        return [
            net(x).detach(),
            torch.func.functional_call(net, other, (x,)),
            *gradient(other).values(),
            y.detach(),
            *torch.autograd.grad(y.square().sum(), list(net.parameters()), retain_graph=True),
            torch.func.vmap(net)(x.unsqueeze(1)).detach(),
            torch.func.jacrev(lambda input: net(input).sum())(x),
            net(x).detach(),
        ]

    expected = run()
    with cached_weights(net):
        for _ in range(2):
            cases.assert_all_same(run(), expected)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@EITHER
@pytest.mark.parametrize("cached", [contextlib.nullcontext, parametrize.cached])
def test_a_parametrized_weight(config, cached):
    layer, x = QATLinear(8, 4, config=config), numbers(5, 8)
    parametrize.register_parametrization(layer, "weight", Doubled())
    weight = layer.parametrizations.weight.original
    with cached_weights(layer):
        for _ in range(2):
            with cached():
                y = layer(x)
            y.sum().backward()
            with torch.no_grad():
                weight.mul_(2)
            cases.assert_same(layer(x), copy.deepcopy(layer)(x))
    assert weight.grad is not None


def test_a_pruned_weight():
    layer, x = QATLinear(8, 4), numbers(5, 8)
    prune.l1_unstructured(layer, "weight", 0.5)
    with cached_weights(layer):
        layer(x)
        layer.weight_mask.data.zero_()
        found = layer(x)
    cases.assert_same(found, layer(x))


# Parameters that FSDP manages


@pytest.fixture
def group(tmp_path):
    """Creates a process group of this process only."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    cases.end_process_group()


class Alternating(nn.Module):
    """A model that runs its layers twice."""

    def __init__(self, config):
        super().__init__()
        self.layers = model(config)
        self.last = QATLinear(4, 8, config=config)

    def forward(self, x):
        return self.last(self.layers(self.last(self.layers(x))))


def shards(net, how):
    if how == "FSDP1":
        return FullyShardedDataParallel(net, device_id=torch.device("cpu"))
    if how == "FSDP1, original parameters":
        return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    for module in (*net.layers, net.last) if how.endswith("each layer") else ():
        if isinstance(module, QATLinear):
            fully_shard(module)
    return fully_shard(net, reshard_after_forward=how != "FSDP2, kept")


@EITHER
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("inside", [False, True], ids=["", "the inner layers"])
@pytest.mark.parametrize(
    "how", ["FSDP2", "FSDP2, kept", "FSDP2, each layer", "FSDP1", "FSDP1, original parameters"]
)
def test_gathered_weights(config, how, inside, group):
    x = numbers(5, 8)

    def train(block):
        torch.manual_seed(0)
        plain = Alternating(config)
        net = shards(plain, how)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        losses = []
        with block(plain.layers if inside else net):
            for _ in range(4):
                optimizer.zero_grad()
                loss = net(x).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                with torch.no_grad():
                    losses.append(net(x))
                for parameter in net.parameters():  # writes the shards, which triggers no hook
                    parameter.data.mul_(0.9)
                with torch.no_grad():
                    losses.append(net(x))
        return losses

    expected = train(contextlib.nullcontext)
    assert not torch.equal(expected[0], expected[-3])
    cases.assert_all_same(train(cached_weights), expected)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_summoned_parameters(group):
    """FSDP1 replaces the data of the parameters."""
    x, layer = numbers(5, 8), QATLinear(8, 8)
    net = FullyShardedDataParallel(layer, device_id=torch.device("cpu"), use_orig_params=True)
    with torch.no_grad(), cached_weights(layer):
        for _ in range(3):
            with FullyShardedDataParallel.summon_full_params(net):
                cases.assert_same(layer(x), copy.deepcopy(layer)(x))
            for parameter in net.parameters():
                parameter.data.mul_(2)


def test_a_layer_beside_a_sharded_one_is_cached(group):
    sharded, layer, x = fully_shard(QATLinear(8, 8)), QATLinear(8, 8), numbers(5, 8)
    with cached_weights(nn.ModuleList([sharded, layer])):
        sharded(x)
        layer(x)
        assert held(layer)[0] is not None
        assert held(sharded) == [None]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_distributed_weight_is_not_cached(group):
    layer = QATLinear(8, 8)
    mesh = init_device_mesh("cpu", (1,))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate()]))
    assert weight_cache._state(layer.weight) is None


def test_partitioned_parameters_of_deepspeed():
    """ZeRO-3 marks the parameters that it gathers with ``ds_id``."""
    layer, x = QATLinear(8, 8), numbers(5, 8)
    layer.weight.ds_id = 3
    with cached_weights(layer):
        layer(x)
        layer.weight.data.mul_(2)
        found = layer(x)
    cases.assert_same(found, layer(x))
