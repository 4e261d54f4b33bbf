"""QATEmbedding."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cases
from qatfast import (
    Fixed,
    Learned,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    QATConfig,
    QATEmbedding,
    QATLinear,
    QuantSpec,
    calibrate,
    fake_quantize,
    fake_quantize_affine,
    fake_quantize_learned,
)

INDEX = torch.tensor([[1, 2, 2, 9], [0, 7, 1, 1]])
PER_ROW = QuantSpec(8, symmetric=True, granularity=PerChannel(0))


def config_of(weight, output=None):
    return QATConfig(None, weight, None, output)


def layer_of(config=None, **arguments):
    torch.manual_seed(0)
    return QATEmbedding(10, 8, **arguments, config=config)


@pytest.mark.parametrize(
    "spec",
    [
        PER_ROW,
        QuantSpec(4),
        QuantSpec(4, granularity=PerChannel(1)),
        QuantSpec(4, granularity=PerGroup(2)),
        QuantSpec(4, range=Fixed(-2, 1)),
        QuantSpec(4, granularity=PerChannel(0), range=Fixed(-2, 1)),
        QuantSpec(8, granularity=PerChannel(0), range=MinMax()),
        QuantSpec(4, granularity=PerChannel(0), range=Learned()),
        QuantSpec(4, granularity=PerGroup(4), range=Learned()),
    ],
    ids=str,
)
def test_rows_are_those_of_the_quantized_weight(spec):
    layer = layer_of(config_of(spec))
    layer(INDEX)
    other = copy.deepcopy(layer)
    quantizer = getattr(other, "weight_quantizer", None)
    w_hat = fake_quantize(other.weight, **spec.arguments) if quantizer is None else quantizer(other.weight)
    expected = F.embedding(INDEX, w_hat)
    y = layer(INDEX)
    cases.assert_same(y.detach(), expected.detach())
    dy = cases.normal(y.shape)
    ours = torch.autograd.grad(y, list(layer.parameters()), dy)
    theirs = torch.autograd.grad(expected, list(other.parameters()), dy)
    for actual, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(
    "arguments",
    [{"padding_idx": 1}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_the_arguments_of_an_embedding(arguments):
    layer = layer_of(config_of(PER_ROW), **arguments)
    plain = layer_of(config_of(PER_ROW), **arguments).to_float()
    assert type(plain) is nn.Embedding
    y, rows = layer(INDEX), plain(INDEX)
    cases.assert_same(layer.weight.detach(), plain.weight.detach())
    cases.assert_same(y.detach(), fake_quantize(plain.weight.detach(), **PER_ROW.arguments)[INDEX])
    dy = cases.normal(y.shape)
    y.backward(dy)
    rows.backward(dy)
    assert layer.weight.grad.is_sparse == plain.weight.grad.is_sparse
    cases.assert_same(layer.weight.grad.to_dense(), plain.weight.grad.to_dense())


def test_only_the_rows_used_are_computed():
    layer = layer_of(config_of(PER_ROW))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(INDEX)
    assert all(not t.is_floating_point() for t in kept)
    with torch.no_grad():
        layer.weight[5] = float("nan")
    assert layer(INDEX).isfinite().all()


def test_a_tied_head():
    embedding = layer_of(config_of(PER_ROW))
    head = QATLinear(8, 10, bias=False, config=config_of(PER_ROW))
    head.weight = embedding.weight
    w_hat = fake_quantize(embedding.weight, **PER_ROW.arguments)
    expected = F.linear(w_hat[INDEX], w_hat)
    y = head(embedding(INDEX))
    torch.testing.assert_close(y, expected)
    ours = torch.autograd.grad(y.square().sum(), embedding.weight)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.square().sum(), embedding.weight))


def test_ranges_and_copies():
    layer = layer_of(config_of(PER_ROW, QuantSpec(8, range=MinMax())))
    with pytest.raises(RuntimeError, match=r"QATEmbedding.output_quantizer: expected a range"):
        layer.eval()(INDEX)
    with torch.no_grad(), calibrate(layer):
        cases.assert_same(layer(INDEX), layer.weight[INDEX])
    expected = layer(INDEX)
    rows = fake_quantize(layer.weight, **PER_ROW.arguments)[INDEX].detach()
    ends = torch.stack([layer.weight[INDEX].min(), layer.weight[INDEX].max()]).detach()
    scale = (ends[1] - ends[0]) / 255
    zero_point = (-torch.round(ends[0] / scale)).int()
    cases.assert_same(expected.detach(), fake_quantize_affine(rows, scale, zero_point, 0, 255))
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), QATEmbedding.from_float(layer)):
        cases.assert_same(same(INDEX), expected)
    assert QATEmbedding(3, 2).config == QATConfig.static()
    layer.load_state_dict(nn.Embedding(10, 8).state_dict())


def test_compiled(fresh_compiler):
    layer = layer_of()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(INDEX)
    cases.assert_same(y.detach(), layer(INDEX).detach())


def test_errors():
    with pytest.raises(
        ValueError, match="QATEmbedding: expected embedding_dim to be divisible by group_size=3"
    ):
        QATEmbedding(10, 8, config=QATConfig.weight_only(4, 3))
    with pytest.raises(ValueError, match=r"expected the axis of config.output to be -1, got 0"):
        layer_of(config_of(PER_ROW, QuantSpec(8, granularity=PerChannel(0))))
    with pytest.raises(ValueError, match=r"expected the axis of config.weight to be from -2 to 1, got 2"):
        layer_of(config_of(QuantSpec(8, granularity=PerChannel(2))))
    with pytest.raises(TypeError, match="QATEmbedding: expected config to be a QATConfig"):
        QATEmbedding(10, 8, config=4)
    with pytest.raises(TypeError, match=r"QATEmbedding.from_float: expected module to be an nn.Embedding"):
        QATEmbedding.from_float(nn.Linear(2, 2))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(2)], ids=str)
def test_the_gradient_of_a_learned_scale_is_that_of_the_whole_weight(granularity):
    layer = layer_of(config_of(QuantSpec(4, granularity=granularity, range=Learned())))
    layer(INDEX).square().sum().backward()
    quantizer = layer.weight_quantizer
    scale = quantizer.scale.detach().requires_grad_()
    weight = layer.weight.detach()
    y = fake_quantize_learned(weight, scale, quantizer.zero_point, 0, 15, granularity=granularity)
    y[INDEX].square().sum().backward()
    torch.testing.assert_close(quantizer.scale.grad, scale.grad)
