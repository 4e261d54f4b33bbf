"""The recorded forward: who reads whose output, shared quantizers and chains."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cases
from qatfast import (
    MovingAverage,
    PerChannel,
    QATConfig,
    QATConv2d,
    QATLinear,
    QuantSpec,
    fake_quantize,
    fake_quantize_affine,
    freeze,
    prepare,
    summary,
)
from qatfast.flow import record


def network(norm=True, activation=nn.ReLU, bias=True):
    torch.manual_seed(0)
    first = [
        nn.Linear(6, 8, bias=bias),
        *([nn.BatchNorm1d(8)] if norm else []),
        *([activation()] if activation else []),
    ]
    model = nn.Sequential(*first, nn.Dropout(), nn.Flatten(), nn.Linear(8, 3))
    if norm:
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].bias)
    return model


def trained(model, x, config=None, steps=3, **kwargs):
    model = prepare(model, config, example_inputs=x, **kwargs)
    for step in range(steps):
        model.train()(x + 0.1 * step)
    return model.eval()


def first_chain(model):
    return next(row.chain for row in summary(model).rows if row.kind.startswith("QAT"))


# An independent implementation of the formula, in NumPy: float32 where it is rounded, int64 sums.


def f32(value):
    return np.asarray(value, dtype=np.float32)


def integers(x, scale, zero_point, low, high):
    return (np.clip(np.rint(f32(x / scale)).astype(np.int64) + zero_point, low, high)).astype(np.int64)


def weight_grid(weight):
    low, high = np.minimum(weight.min(1), 0), np.maximum(weight.max(1), 0)
    scale = np.maximum(f32(np.maximum(-low, high) / np.float32(127)), np.finfo(np.float32).tiny)
    return scale, integers(weight, scale[:, None], 0, -127, 127)


def input_grid(quantizer):
    low, high = f32(quantizer.running_min), f32(quantizer.running_max)
    scale = np.maximum(f32(f32(high - low) / np.float32(255)), np.finfo(np.float32).tiny)
    zero_point = np.clip(0 - np.rint(f32(low / scale)).astype(np.int64), 0, 255)
    return scale, zero_point


def oracle(layer, norm, activation, reader, x):
    tiny = np.finfo(np.float32).tiny
    sx, zx = input_grid(layer.input_quantizer)
    sy, zy = input_grid(reader.input_quantizer)
    weight = f32(layer.weight.detach())
    sw, q_w = weight_grid(weight)
    bias = f32(layer.bias.detach()) if layer.bias is not None else np.zeros(len(sw), np.float32)
    g, b = np.ones(len(sw), np.float32), bias
    if norm is not None:
        mean, var, gamma, beta = (
            f32(v.detach()) for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        root = f32(np.sqrt(f32(var + np.float32(norm.eps)).astype(np.float64)))
        g = f32(gamma / root)
        b = f32(f32(f32(bias - mean) * g) + beta)
    narrow = f32(sw * np.abs(g))
    wide = np.maximum(np.maximum(narrow, f32(np.abs(b) / f32(sx * np.float32(2**30)))), tiny)
    for channel in range(len(sw)):
        if wide[channel] > narrow[channel]:
            factor = f32(narrow[channel] / wide[channel])
            q_w[channel] = np.rint(f32(q_w[channel].astype(np.float32) * factor)).astype(np.int64)
        if g[channel] < 0:
            q_w[channel] = -q_w[channel]
    step = np.maximum(f32(sx * wide), tiny)
    b32 = np.rint(b.astype(np.float64) / step.astype(np.float64)).astype(np.int64)
    assert np.abs(b32).max() <= 2**30
    acc = (integers(f32(x), sx, zx, 0, 255) - zx) @ q_w.T
    factor = np.minimum(f32(step / sy), np.finfo(np.float32).max)
    low, high = 0 if activation is None else max(0, zy), 255
    if activation == "relu6":
        high = min(high, zy + int(np.rint(f32(np.float32(6) / sy))))
    q = np.clip(np.rint(f32(f32(acc + b32) * factor)).astype(np.int64) + zy, low, high)
    return torch.from_numpy(f32((q - zy).astype(np.float32) * sy))


@pytest.mark.parametrize("gammas", ["any", "zero", "tiny"])
@pytest.mark.parametrize("activation", [None, nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_a_chain_gives_the_integers_of_its_reader(gammas, activation, norm, bias):
    model = network(norm, activation, bias)
    if norm and gammas != "any":
        with torch.no_grad():
            model[1].weight[::2] = {"zero": 0.0, "tiny": 1e-12}[gammas]
    x = cases.normal((64, 6)) * 4
    model = trained(model, x)
    head, reader = model[0], model[-1]
    taken = []
    forward = reader._of_ranges
    reader._of_ranges = lambda input, *rest: taken.append(input) or forward(input, *rest)
    with torch.no_grad():
        y = model(x)
    expected = oracle(
        head, model[1] if norm else None, {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(activation), reader, x
    )
    assert type(taken[0]) is torch.Tensor
    cases.assert_same(taken[0], expected)
    cases.assert_same(model(x.clone().requires_grad_()).detach(), y)
    with torch.inference_mode():
        cases.assert_same(model(x), y)


OWN_OUTPUT = QATConfig(
    input=QuantSpec(range=MovingAverage()),
    weight=QuantSpec(symmetric=True, granularity=PerChannel(0)),
    bias=None,
    output=QuantSpec(range=MovingAverage()),
)


def test_the_layers_own_output_quantizer_is_a_reader(fresh_compiler):
    x = cases.normal((64, 6)) * 4
    layer = QATLinear(6, 8, config=OWN_OUTPUT)
    twin = QATConv2d(6, 8, 1, config=OWN_OUTPUT)
    layer(x)
    layer.eval()
    expected = oracle(layer, None, None, SimpleNamespace(input_quantizer=layer.output_quantizer), x)
    cases.assert_same(layer(x).detach(), expected)
    cases.assert_same(copy.deepcopy(layer)(x).detach(), expected)
    cases.assert_same(pickle.loads(pickle.dumps(layer))(x).detach(), expected)
    cases.assert_same(torch.compile(layer, fullgraph=True)(x).detach(), expected)
    shapes = {name: value.shape for name, value in twin.state_dict().items()}
    twin.load_state_dict({name: value.reshape(shapes[name]) for name, value in layer.state_dict().items()})
    cases.assert_same(twin.eval()(x[:, :, None, None]).flatten(1).detach(), expected)


def test_gradients_of_a_requantized_result_are_those_of_the_float_formula():
    x = cases.normal((64, 6)).requires_grad_()
    layer = QATLinear(6, 8, config=OWN_OUTPUT)
    layer(x)
    layer.eval()
    dy = cases.normal((64, 8), seed=1)
    found = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], dy)
    scales = [layer.input_quantizer.grid(x), layer.output_quantizer.grid(x)]
    x_hat = fake_quantize_affine(x, *scales[0], 0, 255)
    w_hat = fake_quantize(layer.weight, symmetric=True, granularity=PerChannel(0))
    y = fake_quantize_affine(nn.functional.linear(x_hat, w_hat, layer.bias), *scales[1], 0, 255)
    for ours, theirs in zip(found, torch.autograd.grad(y, [x, layer.weight, layer.bias], dy), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_another_config_of_a_reader_ends_the_chain():
    x = cases.normal((64, 6))
    model = trained(network(), x)
    model[-1].config = QATConfig.dynamic()
    assert torch.isfinite(model(x)).all()
    assert type(model[0](x)) is torch.Tensor


def test_a_convolution_is_a_head_too():
    model = network()
    twin = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(1), nn.Flatten())
    twin.append(nn.Linear(8, 3))
    with torch.no_grad():
        for index in (0, 1, 5):
            for name, parameter in twin[index].named_parameters():
                parameter.copy_(getattr(model[index], name).reshape(parameter.shape))
    x = cases.normal((64, 6)) * 4
    model, twin = trained(model, x), prepare(twin, example_inputs=x[:, :, None, None])
    for step in range(3):
        twin.train()(x[:, :, None, None] + 0.1 * step)
    shapes = {name: value.shape for name, value in twin.state_dict().items()}
    twin.load_state_dict({name: value.reshape(shapes[name]) for name, value in model.state_dict().items()})
    twin.eval()
    assert first_chain(twin) == "batch_norm -> relu -> max_pool2d -> flatten -> 5"
    expected = oracle(model[0], model[1], "relu", model[-1], x)
    taken = []
    forward = twin[5]._of_ranges
    twin[5]._of_ranges = lambda input, *rest: taken.append(input) or forward(input, *rest)
    with torch.no_grad():
        twin(x[:, :, None, None])
    cases.assert_same(taken[0], expected)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.adds = self.skips = False

    def forward(self, x):
        y = self.first(x)
        y = y if self.skips else self.norm(y)
        y = torch.relu(y)
        return self.second(y + 1 if self.adds else y)


@pytest.mark.parametrize("change", ["adds", "skips"])
def test_a_flow_that_no_longer_holds_is_an_error(change):
    x = cases.normal((64, 6))
    model = trained(Branches(), x)
    model(x)
    setattr(model, change, True)
    with pytest.raises(
        RuntimeError, match=r"second.input_quantizer: expected the flow that prepare recorded"
    ):
        model(x)
    model.train()(x)


def test_layers_that_read_one_tensor_share_a_quantizer():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 2), nn.Linear(6, 3), nn.Linear(6, 4)

        def forward(self, x):
            return self.c(x * 1), self.b(x), self.a(x)

    x = cases.normal((5, 6))
    model = prepare(Heads(), QATConfig.static(4), example_inputs={"x": x})
    assert model.a.input_quantizer is not model.b.input_quantizer  # the last one has more bits
    model = prepare(Heads(), example_inputs=(x,))
    assert model.a.input_quantizer is model.b.input_quantizer is not model.c.input_quantizer


def test_layers_that_share_a_quantizer_are_recomputed_with_their_own_grids():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.up = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            return self.gate(x).sigmoid() * self.up(x)

    x = cases.normal((5, 6))
    model = prepare(Gated(), example_inputs=x)
    model(x)  # from now on, the first reader moves the range of the second
    found = []
    for function in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        twin = copy.deepcopy(model)
        function(twin, 2 * x).square().sum().backward()
        found.append([parameter.grad for parameter in twin.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        cases.assert_same(recomputed, plain)


@pytest.mark.parametrize("config", [QATConfig.static(), QATConfig.static(4)], ids=["observed", "learned"])
def test_the_state_of_a_shared_quantizer_is_saved_without_shared_memory(config):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x)], -1)

    x = cases.normal((5, 6))
    model, other = (prepare(Heads(), config, example_inputs=x) for _ in range(2))
    model(x)
    expected = model.eval()(x)
    for state in (model.state_dict(), model.state_dict()):
        memory = [value.data_ptr() for value in state.values()]
        assert len(set(memory)) == len(memory)
        assert (
            state["a.input_quantizer.num_batches"].data_ptr()
            == model.a.input_quantizer.num_batches.data_ptr()
        )
    other.load_state_dict(state)
    cases.assert_same(other.eval()(x), expected)
    for name in "ab":  # one of the names, as safetensors.torch.save_model saves
        part = {key: value for key, value in state.items() if not key.startswith(f"{name}.input")}
        other = prepare(Heads(), config, example_inputs=x)
        other.load_state_dict(part)
        cases.assert_same(other.eval()(x), expected)
        floats = {key: value for key, value in state.items() if "quantizer" not in key}
        other.load_state_dict(floats)
        assert not other.a.input_quantizer.num_batches


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.other = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

    def forward(self, x, memory):
        x = self.own(x, x, x)[0]
        return self.other(x, memory, memory)[0]


def test_an_attention_has_a_quantizer_per_tensor():
    x, memory = cases.normal((2, 5, 8)), cases.normal((2, 3, 8), seed=1)
    model = prepare(Attention(), example_inputs=(x, memory))
    kept = {name: value for name, value in model.named_modules() if name.endswith("y_quantizer")}
    assert [*kept, *(name for name, _ in model.named_modules() if "value_q" in name)] == [
        "other.key_quantizer"
    ]
    model(x, memory).sum().backward()
    assert torch.isfinite(model.eval()(x, memory)).all()


def test_an_encoder_with_padding_is_the_same_in_training_and_evaluation():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    x = cases.normal((2, 5, 8))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = prepare(encoder, example_inputs={"src": x, "src_key_padding_mask": padding})
    assert "relu -> layers.0.linear2" in str(summary(model))
    model(x, src_key_padding_mask=padding)
    y = freeze(model)(x, src_key_padding_mask=padding)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x, src_key_padding_mask=padding), y, atol=0.1)


def test_layers_that_are_read_stay_in_float_and_others_are_named():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read, self.idle = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return nn.functional.linear(self.called(x), self.read.weight)

    with pytest.warns(UserWarning, match="these layers did not run with example_inputs: idle"):
        model = prepare(Reads(), example_inputs=cases.normal((5, 6)))
    assert {row.name: row.reason for row in summary(model).rows if row.reason} == {
        "read": "its parent reads .weight"
    }


def test_a_forward_may_create_tensors():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(x + self.embed(torch.arange(x.shape[1])) + torch.zeros(6))

    x = cases.normal((2, 5, 6))
    model = prepare(Positions(), example_inputs=x)
    assert [row.reason for row in summary(model).rows] == [None, None]


def test_recording_leaves_the_model_as_it_was():
    model = network().train()
    model[3].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = {
        module: (module.training, set(vars(module)), len(module._forward_pre_hooks))
        for module in model.modules()
    }
    generator = torch.get_rng_state()
    record(model, (cases.normal((5, 6)),), {}, {model[0]})
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    after = {
        module: (module.training, set(vars(module)), len(module._forward_pre_hooks))
        for module in model.modules()
    }
    assert after == before
    assert torch.is_grad_enabled()


def test_recording_a_model_with_a_scripted_part():
    part = torch.jit.script(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8)))
    model, x = nn.Sequential(nn.Linear(8, 8), part).train(), cases.normal((4, 8))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    prepare(model, example_inputs=x)
    assert type(model[0]) is QATLinear
    assert all(module.training for module in model.modules())
    for name, buffer in before.items():
        cases.assert_same(model.get_buffer(name), buffer)


class Crossed(nn.Module):
    """Calls attention with keyword arguments in an order of its own."""

    def __init__(self):
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(16, 4), nn.Linear(16, 16)

    def forward(self, a, b):
        return self.attention(value=a, query=b, key=b)[0] + self.linear(a)


def test_keyword_arguments_are_recorded_by_their_names():
    a, b = (cases.normal((5, 2, 16), seed=seed) for seed in (0, 1))
    model = prepare(Crossed(), example_inputs=(a, b))
    own = model.attention._modules
    assert own["input_quantizer"] is not model.linear.input_quantizer
    assert "key_quantizer" not in own and "value_quantizer" in own
