"""Memory: bytes saved for backward, and the peak of allocations."""

import contextlib
import functools
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import cases
import oracle
from qatfast import (
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConfig,
    QATLinear,
    QuantSpec,
    cached_weights,
    fake_quantize,
    fake_quantize_affine,
    functional,
)

PAGE = 4096
SHAPES = pytest.mark.parametrize(
    "shape", [((256,), 512, 384), ((32, 8), 384, 510), ((1000,), 64, 60)], ids=cases.name
)


def peak(function, before=lambda: None):
    """Returns the peak of allocated bytes in ``function()`` minus those left by ``before()``."""
    before()
    function()
    before()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def bytes_of(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("shape, granularity", cases.FEW_BLOCKS, ids=cases.name)
def test_fake_quantize_keeps_nothing(ops, shape, granularity, dtype, device):
    x = cases.normal(shape, dtype, device=device, requires_grad=True)
    storages, y = cases.kept(lambda: ops.fake_quantize(x, granularity=granularity))
    assert y.requires_grad
    assert storages == {}


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000, 4099])
def test_fake_quantize_affine_keeps_one_bit_an_element(kernels, size, dtype):
    x = cases.normal((size,), dtype, requires_grad=True)
    storages, _ = cases.kept(lambda: fake_quantize_affine(x, *cases.grid((size,), PerTensor(), dtype)))
    assert sum(storages.values()) == math.ceil(size / 8)


def test_nothing_is_kept_where_no_gradient_is_asked_for(kernels):
    x = cases.normal((64,))
    assert cases.kept(lambda: fake_quantize_affine(x, *cases.grid((64,), PerTensor())))[0] == {}
    assert cases.kept(lambda: functional.qat_linear(*cases.linear(((5,), 16, 6))))[0] == {}


@SHAPES
@pytest.mark.parametrize("config", cases.CONFIGS.values(), ids=cases.CONFIGS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_qat_linear_keeps_input_weight_and_quantized_weight_at_most(kernels, shape, config, bias):
    operands = cases.linear(shape, bias=bias, requires_grad=True)
    storages, _ = cases.kept(lambda: functional.qat_linear(*operands, config=config))
    own = {tensor.untyped_storage().data_ptr() for tensor in operands[:2]}
    extra = sum(size for address, size in storages.items() if address not in own)
    if oracle.uses_int8_gemm(config, shape[1]):
        assert extra == integers_of(operands.input)
        assert sum(storages.values()) == bytes_of(operands.weight) + extra
        return
    limit = bytes_of(operands.weight) if config.weight is not None else 0
    limit += bytes_of(operands.input) if config.input is not None else 0
    assert extra <= limit
    assert sum(storages.values()) <= bytes_of(operands.input, operands.weight) + limit


def integers_of(input):
    """Returns the size of int8 tensors: a byte per element, a scale and a zero point per row."""
    return input.numel() + 8 * input.shape[:-1].numel()


@pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8()], ids=["tutorial", "int8"])
def test_qat_linear_keeps_only_what_the_wanted_gradients_need(kernels, config):
    input, weight, bias = cases.linear(((256,), 512, 384))
    of_input, of_weight = bytes_of(input), 2 * bytes_of(weight)
    if config == QATConfig.int8():
        of_input, of_weight = integers_of(input), bytes_of(weight)
    for wanted, limit in ((bias, 0), (weight, of_input), (input, of_weight)):
        wanted.requires_grad_()
        storages, y = cases.kept(lambda: functional.qat_linear(input, weight, bias, config=config))
        assert y.requires_grad
        assert sum(storages.values()) <= limit
        wanted.requires_grad_(False)


@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
@pytest.mark.parametrize(
    "shape, share", [(((32,), 64, 64), 0.35), (((256,), 1024, 1024), 0.3)], ids=cases.name
)
def test_integers_are_less_than_the_input_of_nn_linear(kernels, shape, share, cached):
    """Besides the weight, an int8 GEMM saves a quarter of the bytes of nn.Linear, and the grids."""
    leading, inputs, outputs = shape
    x = cases.normal((*leading, inputs), requires_grad=True)
    linear = nn.Linear(inputs, outputs)
    layer = QATLinear.from_float(linear, config=QATConfig.int8())

    def beside_the_weight(module):
        storages, _ = cases.kept(lambda: module(x))
        address = linear.weight.untyped_storage().data_ptr()
        assert address in storages
        return sum(storages.values()) - storages[address]

    with cached_weights(layer) if cached else contextlib.nullcontext():
        assert 0 < beside_the_weight(layer) <= share * beside_the_weight(linear)


@pytest.mark.arithmetic
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerToken(), PerGroup(50)], ids=str
)
def test_fake_quantize_allocates_only_its_output(kernels, dtype, granularity):
    x = cases.normal((1000, 200), dtype, requires_grad=granularity == PerTensor())
    qparams = 16 * math.prod(functional.choose_qparams(x, granularity=granularity)[0].shape)
    assert peak(lambda: fake_quantize(x, granularity=granularity)) <= bytes_of(x) + qparams + PAGE


def test_a_backward_of_fake_quantize_allocates_nothing(kernels):
    x = cases.normal((1000, 200), requires_grad=True)
    y, gradient = fake_quantize(x), cases.normal((1000, 200), seed=1)

    def backward():
        return torch.autograd.grad(y, x, gradient, retain_graph=True)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        backward()
    allocated = [
        event.nbytes()
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.nbytes() > 0
    ]
    assert sum(allocated) <= 1024


@pytest.mark.arithmetic
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerToken(), PerGroup(50)], ids=str
)
def test_fake_quantize_affine_allocates_its_output_and_the_bits(kernels, granularity):
    x = cases.normal((1000, 200), requires_grad=True)
    grid = cases.grid((1000, 200), granularity)
    forward = functools.partial(fake_quantize_affine, x, *grid, granularity=granularity)
    assert peak(forward) <= bytes_of(x) + x.numel() // 8 + PAGE
    with torch.no_grad():
        assert peak(forward) <= bytes_of(x) + PAGE
    upstream = cases.normal((1000, 200), seed=1)
    y = forward()
    backward = functools.partial(torch.autograd.grad, y, x, upstream, retain_graph=True)
    assert peak(backward) <= bytes_of(x) + PAGE


@SHAPES
@pytest.mark.parametrize(
    "config",
    [QATConfig.tutorial(), QATConfig.weight_only(4, 32), QATConfig.int8()],
    ids=["tutorial", "weight_only", "int8"],
)
def test_the_peak_of_a_step_is_that_of_nn_linear_and_the_weight(kernels, shape, config):
    leading, inputs, outputs = shape
    x = cases.normal((*leading, inputs), requires_grad=True)
    gradient = cases.normal((*leading, outputs), seed=1)
    linear = nn.Linear(inputs, outputs, bias=len(leading) == 1)
    layer = QATLinear.from_float(linear, config=config)

    def forget_gradients():
        for tensor in (x, *linear.parameters()):
            tensor.grad = None

    def peak_of_a_step(module):
        return peak(lambda: module(x).backward(gradient), forget_gradients)

    more = bytes_of(linear.weight)
    if oracle.uses_int8_gemm(config, inputs):  # backward computes the quantized input again
        more += bytes_of(x)
    assert peak_of_a_step(layer) <= peak_of_a_step(linear) + more + 64 * 1024


def test_a_forward_without_gradients_allocates_the_output_and_the_quantized_tensors(kernels):
    operands = cases.linear(((256,), 512, 384))
    config = QATConfig(weight=QuantSpec(8), bias=QuantSpec(8), output=QuantSpec(8))
    limit = peak(lambda: F.linear(*operands)) + bytes_of(operands.weight) + 64 * 1024
    assert peak(lambda: functional.qat_linear(*operands, config=config)) <= limit


def test_nothing_is_leaked(kernels):
    x = cases.normal((50, 64), requires_grad=True)
    layer = nn.Sequential(QATLinear(64, 64), QATLinear(64, 64, config=QATConfig.int8()))

    def live():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    layer(x).sum().backward()
    before = live()
    for _ in range(5):
        y = layer(fake_quantize_affine(x, *cases.grid((50, 64), PerTensor()))).sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        gradient.sum().backward()
        del y, gradient
    assert live() <= before
