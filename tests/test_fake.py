"""Fake kernels return the shapes, dtypes and strides of the operators; FLOP formulas are right."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import cases
from operators import operators
from qatfast import (
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConfig,
    QATLinear,
    QuantSpec,
    cached_weights,
    functional,
)

OPS = torch.ops.qatfast


def described(results):
    """Returns shape, dtype, and the strides of dimensions with more than one element.

    For other dimensions, fake tensors of torch have other strides.
    """
    results = results if isinstance(results, (tuple, list)) else (results,)
    return [
        (tuple(x.shape), x.dtype, [x.stride(d) for d in range(x.dim()) if x.shape[d] > 1 and x.numel() > 0])
        for x in results
    ]


FAKE = FakeTensorMode()


def fake(value):
    if isinstance(value, list):
        return [fake(one) for one in value]
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def assert_as_faked(op, *args, **kwargs):
    """Returns the results of ``op``; asserts that those of fake tensors have the same metadata."""
    results = op(*args, **kwargs)
    with FAKE:
        faked = op(*map(fake, args), **kwargs)
    where = [(tuple(x.shape), x.stride()) for x in args if isinstance(x, torch.Tensor)]
    assert described(faked) == described(results), (op, where, args)
    return results


def layouts(shape, dtype, device):
    """Returns tensors of this shape with many strides."""
    dims = range(len(shape))

    def filled(x):
        return x.copy_(cases.normal(tuple(x.shape), dtype, device=device))

    def empty(sizes):
        return torch.empty(sizes, dtype=dtype, device=device)

    yield filled(empty(shape))
    for order in itertools.permutations(dims):
        if order != tuple(dims):
            yield filled(empty([shape[d] for d in order]).permute([order.index(d) for d in dims]))
    for d in dims:
        larger = [2 * size + 1 if one == d else size for one, size in enumerate(shape)]
        yield filled(empty(larger).narrow(d, 1, shape[d]))
        yield filled(empty(larger)[(slice(None),) * d + (slice(0, 2 * shape[d], 2),)])
        yield filled(empty(larger[::-1]).permute(*reversed(dims)).narrow(d, 1, shape[d]))
        ones = [1 if one == d else size for one, size in enumerate(shape)]
        yield filled(empty(ones)).expand(shape)
    if len(shape) == 4:
        yield filled(empty(shape).to(memory_format=torch.channels_last))


def granularities(shape):
    yield PerTensor()
    yield from (PerChannel(axis) for axis in range(len(shape)))
    if shape:
        yield from (PerToken(), PerGroup(1))
        if shape[-1] % 2 == 0:
            yield PerGroup(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize(
    "shape",
    [(5,), (0,), (), (4, 6), (1, 6), (4, 1), (0, 6), (2, 3, 4), (1, 3, 4), (2, 3, 4, 5)],
    ids=cases.name,
)
def test_the_quantizers(kernels, shape, dtype, device):
    for x in layouts(shape, dtype, device):
        for granularity in granularities(shape):
            code = granularity.code
            assert_as_faked(OPS.fake_quantize, x, 8, False, code)
            grid = (*assert_as_faked(OPS.choose_qparams, x, 8, False, code), 0, 255)
            assert_as_faked(OPS.fake_quantize_affine, x, *grid, code)
            y, mask = assert_as_faked(OPS.fake_quantize_affine_forward, x, *grid, code)
            for dy in (y, x):
                assert_as_faked(OPS.fake_quantize_affine_backward, dy, mask, list(y.stride()))
            q = assert_as_faked(OPS.quantize, x, *grid, code)
            for to in (torch.float32, torch.float16):
                assert_as_faked(OPS.dequantize, q, *grid[:2], code, to)


SPECS = (
    None,
    QuantSpec(8),
    QuantSpec(4, symmetric=True, granularity=PerChannel(0)),
    QuantSpec(4, granularity=PerChannel(1)),
    QuantSpec(9, granularity=PerToken()),
    QuantSpec(4, granularity=PerGroup(2)),
)
LAYERS = [QATConfig(None, spec, QuantSpec(8), None) for spec in SPECS] + [
    QATConfig(QuantSpec(9, granularity=PerChannel(-1)), SPECS[3], None, QuantSpec(8, granularity=PerToken())),
    QATConfig.int8(),
    QATConfig(
        QuantSpec(8, granularity=PerToken()), QuantSpec(8), QuantSpec(8), QuantSpec(8, granularity=PerToken())
    ),
    QATConfig(QuantSpec(8), QuantSpec(8, granularity=PerToken()), None, QuantSpec(5)),
]


@pytest.mark.parametrize(
    "leading, inputs, outputs",
    [((5,), 6, 4), ((), 6, 4), ((2, 3), 6, 4), ((1,), 6, 1), ((5,), 2, 4), ((0,), 6, 4), ((5,), 6, 0)],
    ids=str,
)
@pytest.mark.parametrize(
    "dtype, product", [(torch.float32, None), (torch.bfloat16, torch.float16)], ids=["", "autocast"]
)
def test_the_layer(kernels, leading, inputs, outputs, dtype, product, device):
    x, weight, bias = cases.linear((leading, inputs, outputs), dtype, device=device)
    pairs = [(x, one) for one in layouts(weight.shape, dtype, device)]
    pairs += [(one, weight) for one in layouts(x.shape, dtype, device)]
    for (x, weight), config in itertools.product(pairs, LAYERS):
        for b in (bias, None) if weight is pairs[0][1] else (bias,):
            arguments = (x, weight, b, config.codes)
            assert_as_faked(OPS.qat_linear, *arguments, dtype=product)
            assert_as_faked(OPS.qat_linear_forward, *arguments, dtype=product)


@pytest.mark.parametrize(
    "leading, inputs, outputs",
    [((5,), 6, 4), ((), 6, 4), ((2, 3), 6, 4), ((1,), 6, 1), ((0,), 6, 4)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
def test_the_operators_of_the_int8_layer(kernels, leading, inputs, outputs, dtype, device):
    x, weight, bias = cases.linear((leading, inputs, outputs), dtype, device=device)
    pairs = [(x, one) for one in layouts(weight.shape, dtype, device)]
    pairs += [(one, weight) for one in layouts(x.shape, dtype, device)]
    for (x, weight), config in itertools.product(pairs, LAYERS[-3:]):
        weight_spec = config.codes[4:8]
        integers = list(assert_as_faked(OPS.qat_linear_int8_weight, weight, weight_spec))
        for given in ([], integers):
            arguments = (x, weight, bias, given, config.codes)
            assert_as_faked(OPS.qat_linear_int8, *arguments)
            results = assert_as_faked(OPS.qat_linear_int8_forward, *arguments, dtype=torch.bfloat16)
        x_hat = assert_as_faked(OPS.qat_linear_int8_input, *results[1:], dtype)
        grads = [cases.normal((len(x_hat), outputs), dtype, device=device)]
        for dy in layouts(grads[0].shape, dtype, device) if weight is pairs[0][1] else grads:
            assert_as_faked(OPS.qat_linear_int8_backward, dy, *results[1:], weight, weight_spec)
            assert_as_faked(OPS.qat_linear_grad_weight, dy, x_hat)


# FLOPs

CONFIGS = pytest.mark.parametrize("config", cases.CONFIGS.values(), ids=cases.CONFIGS)


def flops(module, x, *, backward=True):
    for tensor in (x, *module.parameters()):
        tensor.grad = None
    with FlopCounterMode(display=False) as forward:
        y = module(x)
    if not backward:
        return forward.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    return forward.get_total_flops(), counter.get_total_flops()


@CONFIGS
@pytest.mark.parametrize("leading", [(7,), (2, 3), ()], ids=cases.name)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_a_layer_counts_as_nn_linear(kernels, config, leading, wanted, device):
    linear = nn.Linear(16, 6, device=device)
    layer = QATLinear.from_float(linear, config=config)
    x = cases.normal((*leading, 16), device=device, requires_grad=wanted[0])
    linear.weight.requires_grad_(wanted[1])
    product = 2 * 16 * 6 * torch.Size(leading).numel()
    found = flops(layer, x)
    assert found == (product, product * sum(wanted))
    if leading:  # torch does not count the product of a vector
        assert found == flops(linear, x)
    with torch.no_grad():
        assert flops(layer, x, backward=False) == product
    with cached_weights(layer):
        assert flops(layer, x) == found
    with torch.autocast(device, torch.bfloat16):
        assert flops(layer, x) == found


@CONFIGS
def test_a_large_weight_and_second_derivatives_count_once(kernels, config, device):
    """A separately allocated gradient of the weight is computed by another operator."""
    layer = QATLinear(1024, 2052, config=config, device=device)
    linear = nn.Linear(1024, 2052, device=device)
    x = cases.normal((4, 1024), device=device, requires_grad=True)
    assert flops(layer, x) == flops(linear, x)
    counts = []
    for module in (layer, linear):
        y = module(x)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y.sum(), (x, module.weight), create_graph=True)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@CONFIGS
def test_fake_and_meta_tensors_count_the_same(kernels, config):
    expected = flops(nn.Linear(16, 6), cases.normal((7, 16), requires_grad=True))
    layer = QATLinear(16, 6, config=config)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = QATLinear(16, 6, config=config)
        x = mode.from_tensor(cases.normal((7, 16))).requires_grad_()
        assert flops(fake, x) == expected
    meta = layer.to("meta")
    assert flops(meta, cases.normal((7, 16)).to("meta").requires_grad_()) == expected


@pytest.mark.parametrize("op", operators(takes_granularity=True), ids=str)
def test_the_quantizers_count_as_other_elementwise_work(kernels, op, device):
    for call in op.calls(device=device):
        with FlopCounterMode(display=False) as counter:
            F.relu(cases.normal((7, 16), device=device))
            call.through(functional)
        assert counter.get_total_flops() == 0
