"""convert: integer models equal the prepared ones in evaluation, to the bit."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from qatfast import (
    FakeQuantize,
    Fixed,
    IntegerConv2d,
    IntegerLinear,
    Learned,
    MinMax,
    PerChannel,
    PerGroup,
    PerToken,
    QATConfig,
    QATConv2d,
    QATConvTranspose2d,
    QATEmbedding,
    QATLinear,
    QuantSpec,
    calibrate,
    choose_qparams,
    convert,
    dequantize,
    fake_quantize,
    prepare,
    quantize,
)
from test_worked_examples import EXAMPLES

ROWS = PerChannel(0)
CONFIGS = {
    "static": QATConfig.static(),
    "symmetric": QATConfig.static(activations="symmetric"),
    "static4": QATConfig.static(4),
    "static2": QATConfig.static(2),
    "static12": QATConfig.static(12),
    "tutorial": QATConfig.tutorial(),
    "tutorial16": QATConfig.tutorial(16),
    "int8": QATConfig.int8(),
    "dynamic3": QATConfig.dynamic(3),
    "weight only": QATConfig(QuantSpec(16), QuantSpec(4, granularity=PerGroup(2)), None, None),
    "int32 bias": QATConfig(QuantSpec(8, range=MinMax()), QuantSpec(8, True, ROWS), "int32", None),
    "int32 bias, dynamic": QATConfig(QuantSpec(), QuantSpec(7), "int32", None),
    "output": QATConfig(QuantSpec(8, range=MinMax()), QuantSpec(8), None, QuantSpec(8, range=Learned())),
    "output per token": QATConfig(
        QuantSpec(8, True), QuantSpec(5, granularity=ROWS), QuantSpec(6), QuantSpec(8, granularity=PerToken())
    ),
}


def mlp():
    return nn.Sequential(
        *(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU()),
        *(nn.Linear(16, 16), nn.ReLU6(), nn.Dropout(), nn.Linear(16, 4)),
    ), torch.randn(9, 12)


def cnn():
    return nn.Sequential(
        *(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, groups=4, padding="same", padding_mode="circular"), nn.ReLU6()),
        *(nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(6 * 81, 4)),
    ), torch.randn(3, 4, 8, 8)


def signals():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, bias=False), nn.ReLU(), nn.ConvTranspose1d(4, 6, 2), nn.Conv1d(6, 2, 3, padding=2)
    ), torch.randn(2, 2, 12)


def volumes():
    return nn.Sequential(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2)), torch.randn(
        2, 2, 4, 4, 4
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.last((x + self.second(x)).mean((2, 3)))


def residual():
    return Residual(), torch.randn(2, 2, 6, 6)


def encoder():
    return nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), torch.randn(2, 5, 16)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.gru, self.last = (
            nn.Embedding(11, 8),
            nn.GRU(8, 8, batch_first=True),
            nn.Linear(8, 11),
        )
        self.last.weight = self.embedding.weight

    def forward(self, x):
        return self.last(self.gru(self.embedding(x))[0])


def recurrent():
    return Recurrent(), torch.randint(0, 11, (3, 7))


MODELS = {f.__name__: f for f in (mlp, cnn, signals, volumes, residual, encoder, recurrent)}


def trained(model, x, config=None, steps=3, **kwargs):
    model = prepare(model, config, **kwargs)
    for step in range(steps):
        model.train()(x if not x.is_floating_point() else x * (1 + step / 8))
    return model


@pytest.mark.parametrize("with_flow", [True, False], ids=["flow", "no flow"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.filterwarnings("ignore:prepare")
def test_the_integer_model_gives_the_same_bits(build, config, with_flow, device):
    torch.manual_seed(0)
    model, x = build()
    model, x = model.to(device), x.to(device)
    model = trained(model, x, config, example_inputs=x if with_flow else None)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    converted = convert(model)
    assert model.training and not converted.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        expected = model.eval()(x)
        actual = converted(x)
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    kinds = {type(module).__name__ for module in converted.modules()}
    assert not [kind for kind in kinds if kind.startswith("QAT")]


def test_the_buffers_have_the_names_and_dtypes_of_the_documentation():
    torch.manual_seed(0)
    model, x = cnn()
    converted = convert(trained(model, x, example_inputs=x))
    assert isinstance(converted[0], IntegerConv2d) and isinstance(converted[8], IntegerLinear)
    assert isinstance(converted[1], nn.Identity)
    kinds = {name: (value.dtype, tuple(value.shape)) for name, value in converted[0].state_dict().items()}
    scalar = ((torch.float32, ()), (torch.int32, ()))
    assert kinds == {
        "weight": (torch.int8, (8, 4, 3, 3)),
        "weight_scale": (torch.float32, (8,)),
        "bias": (torch.int32, (8,)),
        **dict(zip(("input_scale", "input_zero_point"), scalar, strict=True)),
        **dict(zip(("output_scale", "output_zero_point"), scalar, strict=True)),
    }
    assert converted[8].bias.dtype == torch.float32 and converted[8].output_scale is None


# Numbers


def same(actual, expected):
    """Whether two results have the same bits, NaN where the other has one."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    return torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0)) and torch.equal(
        actual.isnan(), expected.isnan()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", ["static", "static2", "int32 bias", "tutorial", "weight only", "output"])
@pytest.mark.parametrize("build", [mlp, cnn, encoder, recurrent])
def test_other_dtypes(build, config, dtype):
    torch.manual_seed(0)
    model, x = build()
    model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    model = trained(model, x, CONFIGS[config], example_inputs=x)
    converted = convert(model)
    with torch.no_grad():
        assert same(converted(x), model.eval()(x))


@pytest.mark.parametrize("config", ["static", "tutorial", "int8", "weight only", "output per token"])
@pytest.mark.parametrize("build", [mlp, cnn, residual, encoder])
def test_autocast_and_what_is_not_finite(build, config):
    torch.manual_seed(0)
    model, x = build()
    model = trained(model, x, CONFIGS[config], example_inputs=x).eval()
    converted = convert(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert same(converted(x), model(x))
    odd = x.clone()
    odd.view(-1)[[1, 5, 8]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    with torch.no_grad():
        expected = model(odd)
        assert expected.isnan().any() and same(converted(odd), expected)
        for layer in model.modules():
            weight = getattr(layer, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.dim() > 1:
                weight.view(-1)[3] = torch.nan
        expected = model(x)
        assert expected.isnan().any() and same(convert(model)(x), expected)


class Joined(nn.Module):
    """Results that add reads: they have quantizers of their own behind BatchNorm and activation."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.activation, self.last = activation, nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.activation(self.norms[0](self.first(x)))
        return self.last(y + self.activation(self.norms[1](self.second(y))))


@pytest.mark.parametrize("outputs", [None, False])
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU6(), nn.functional.relu6, lambda y: nn.functional.relu6(y, inplace=True), torch.relu],
)
def test_results_that_are_added(activation, outputs):
    torch.manual_seed(1)
    x = torch.randn(2, 4, 6, 6) * 8  # so that the activation is at 6
    model = trained(Joined(activation), x, example_inputs=x, outputs=outputs)
    converted = convert(model, example_inputs=x)
    assert (converted.first.requantization is None) == (outputs is False)
    with torch.no_grad():
        assert torch.equal(converted(x), model.eval()(x))


def test_weights_that_are_computed():
    layer = QATLinear(8, 4, bias=False, config=QATConfig.static())
    nn.utils.parametrizations.weight_norm(layer)
    x = torch.randn(3, 8)
    layer(x)
    assert torch.equal(convert(layer)(x), layer.eval()(x))
    embedding = QATEmbedding(6, 4, max_norm=0.5)
    index = torch.tensor([1, 3])
    assert torch.equal(convert(embedding)(index), embedding.eval()(index))


@pytest.mark.parametrize("config", ["static", "int8", "output"])
def test_a_call_under_vmap_equals_the_loop(config):
    torch.manual_seed(0)
    model, x = cnn()
    converted = convert(trained(model, x, CONFIGS[config], example_inputs=x))
    batches = torch.stack([x, -x])
    expected = torch.stack([converted(batch) for batch in batches])
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(converted)(batches), expected)


def test_rows_of_an_embedding_that_hold_a_nan():
    for config in (
        QATConfig.static(),
        QATConfig.tutorial(3),
        QATConfig(None, QuantSpec(4, False, PerGroup(2))),
    ):
        layer = QATEmbedding(6, 4, config=config)
        layer.weight.data[2, 1] = torch.nan
        index = torch.tensor([[0, 2], [5, 2]])
        y = convert(layer)(index)
        assert y.isnan().sum() == 2 and same(y, layer.eval()(index).detach())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_values_of_integers_are_quantized_to_the_same_integers(bits, symmetric):
    """A reader takes the float value of an integer: ``round(fl((q - z) * s) / s) + z`` is ``q`` for any ``s``."""
    spec = QuantSpec(bits, symmetric)
    integers = torch.arange(spec.quant_min, spec.quant_max + 1)
    integers = integers.to(torch.int8 if symmetric else torch.uint8).expand(4000, -1)
    generator = torch.Generator().manual_seed(bits)
    scale = torch.randn(4000, generator=generator).abs() * 2.0 ** torch.randint(
        -126, 110, (4000,), generator=generator
    )
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    zero_point = torch.zeros(4000, dtype=torch.int32)
    if not symmetric:
        zero_point = torch.randint(spec.quant_min, spec.quant_max + 1, (4000,), generator=generator)
    arguments = (scale, zero_point.to(torch.int32))
    values = dequantize(integers, *arguments, granularity=ROWS)
    again = quantize(values, *arguments, spec.quant_min, spec.quant_max, granularity=ROWS)
    assert torch.equal(again, integers)


def requantizing(layer, config=None):
    """Returns a layer whose own output quantizer has a stored grid."""
    spec = QuantSpec(8, range=MinMax())
    weight = QuantSpec(8, True, ROWS)
    return type(layer).from_float(layer, config=config or QATConfig(spec, weight, None, spec))


@pytest.mark.parametrize("layer, shape", [
    (QATLinear(4000, 5), (3, 4000)),
    (QATLinear(1, 5), (3, 1)),
    (QATLinear(6, 5), (0, 6)),
    (QATConv2d(520, 6, 3), (1, 520, 4, 4)),
    (QATConv2d(256, 300, 3), (2, 256, 3, 5)),
    (QATConvTranspose2d(260, 6, 2, stride=2, groups=2), (1, 260, 3, 3)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("level", [0.2, 3.0])
def test_sums_beyond_float32(layer, shape, level):
    """Weights and inputs at the ends of their grids, so that sums reach 2^24 and more."""
    torch.manual_seed(0)
    layer = requantizing(layer)
    layer.weight.data.copy_(torch.where(torch.rand_like(layer.weight) < 0.8, 1.0, -level))
    layer.bias.data.normal_(std=1e3)
    x = torch.where(torch.rand(shape) < 0.9, 1.0, -level)
    layer(x if x.numel() else torch.ones(2, *shape[1:]))
    with torch.no_grad():
        expected = layer.eval()(x)
        assert same(convert(layer)(x), expected)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
            assert same(convert(layer)(x), expected)


def test_the_integer_layer_of_the_worked_examples():
    case = EXAMPLES["T8"]["cases"][0]
    chained = case["in_a_chain"]
    config = QATConfig(QuantSpec(8, range=Learned()), QuantSpec(8, True), None, QuantSpec(8, range=Learned()))
    layer = QATLinear(2, 1, config=config)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([case["weight"]]))
        layer.bias.fill_(case["bias"])
        for quantizer, scale, zero_point in (
            (layer.input_quantizer, case["input_scale"], case["input_zero_point"]),
            (layer.output_quantizer, chained["output_scale"], chained["output_zero_point"]),
        ):
            quantizer.scale.fill_(scale)
            quantizer.zero_point.fill_(zero_point)
            quantizer.num_batches.fill_(1)
    converted = convert(layer)
    assert converted.weight.tolist() == [case["weight_codes"]]
    assert converted.bias.tolist() == [chained["b32"]]
    assert converted.weight_scale.tolist() == pytest.approx([case["weight_scale"]], rel=1e-7)
    y = converted(torch.tensor([case["x"]]))
    assert y.item() == pytest.approx(chained["value"], rel=1e-6)
    assert round(y.item() / chained["output_scale"]) + chained["output_zero_point"] == chained["code"]


@pytest.mark.parametrize("index", [0, 1])
def test_a_folded_batch_norm_of_the_worked_examples(index):
    case = EXAMPLES["T6"]["cases"][index]
    weight = torch.tensor(case["weight"])
    if index == 0:
        head, norm, x = nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3, eps=0.0), torch.rand(2, 1, 4, 4)
        last = [nn.Flatten(), nn.Linear(48, 2)]
    else:
        head, norm, x = nn.Linear(2, 2), nn.BatchNorm1d(2, eps=0.0), torch.rand(5, 2)
        last = [nn.Linear(2, 2)]
    with torch.no_grad():
        head.weight.copy_(weight.view_as(head.weight))
        head.bias.copy_(torch.tensor(case["bias"]))
        for name, key in (("weight", "gamma"), ("bias", "beta"), ("running_mean", "mean")):
            getattr(norm, name).copy_(torch.tensor(case[key]))
        norm.running_var.copy_(torch.tensor(case["var_plus_eps"]))
    model = prepare(nn.Sequential(head, norm, *last), example_inputs=x)
    with torch.no_grad(), calibrate(model):
        model(x)
    first = convert(model)[0]
    error = first.to_rows(first.dequantize()) - torch.tensor(case["folded_weight"]).view(first.rows)
    assert (error.abs() <= 0.5001 * first.weight_scale.unsqueeze(1)).all()
    bias = first.bias * (first.input_scale * first.weight_scale)
    torch.testing.assert_close(bias, torch.tensor(case["folded_bias"]), rtol=0.005, atol=1e-6)


# What the buffers hold


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 17))
def test_integers_are_stored_dense_and_mean_the_fake_quantized_weight(bits, symmetric):
    torch.manual_seed(bits)
    spec = QuantSpec(bits, symmetric, ROWS)
    layer = QATLinear(7, 5, config=QATConfig(None, spec, None, None))
    converted = convert(layer)
    scale, zero_point = choose_qparams(layer.weight, **spec.arguments)
    q = quantize(layer.weight, scale, zero_point, spec.quant_min, spec.quant_max, granularity=ROWS)
    q = q.to(torch.int32).numpy()
    shift = 2 ** (bits - 1) if bits in (8, 16) and not symmetric else 0
    assert np.array_equal(converted.integers().to(torch.int32).numpy(), q - shift)
    if bits > 4:
        assert converted.weight.dtype == (torch.int8 if bits <= 8 else torch.int16)
        assert converted.weight.shape == (5, 7)
    else:
        width = 2 if bits == 2 else 4
        padded = np.pad(q, ((0, 0), (0, 1))) & (2**width - 1)
        columns = [padded[:, i :: 8 // width] << (i * width) for i in range(8 // width)]
        assert np.array_equal(converted.weight.numpy(), sum(columns).astype(np.uint8))
    assert torch.equal(converted.weight_scale, scale)
    if symmetric:
        assert converted.weight_zero_point is None
    else:
        assert torch.equal(
            converted.weight_zero_point, (zero_point - shift).to(converted.weight_zero_point.dtype)
        )
    assert torch.equal(converted.dequantize(), fake_quantize(layer.weight, **spec.arguments))


@pytest.mark.parametrize("bits", [2, 4])
def test_rows_of_a_single_packed_integer(bits):
    """A convolution of one channel has as many packed bytes as weights."""
    config = QATConfig(QuantSpec(8, range=Fixed(-1, 1)), QuantSpec(bits, symmetric=True), None, None)
    layer = QATConv2d(1, 8, 1, config=config).eval()
    integer = convert(layer)
    integer.check_buffers("layer")
    assert integer.integers().shape == (8, 1)
    assert torch.equal(integer.dequantize(), fake_quantize(layer.weight, bits, symmetric=True))


@pytest.mark.parametrize("config", [QATConfig.dynamic(), QATConfig.static(4)], ids=["dynamic", "learned"])
def test_tied_weights_share_their_integers(config):
    model = Recurrent()
    x = torch.randint(0, 11, (3, 7))
    converted = convert(trained(model, x, config, example_inputs=x, edges=None))
    for name in ("weight", "weight_scale"):
        assert getattr(converted.last, name) is getattr(converted.embedding, name)
    shared = nn.Linear(4, 4)
    twice = convert(prepare(nn.Sequential(shared, nn.Tanh(), shared), QATConfig.dynamic()))
    assert twice[0] is twice[2]


def test_no_float_weight_is_left():
    model, x = encoder()
    converted = convert(trained(model, x))
    names = [
        name
        for name, value in converted.state_dict().items()
        if value.is_floating_point() and value.dim() > 1
    ]
    assert names == [] and {name for name, _ in converted.named_parameters()} == {
        f"norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }


# The model as an nn.Module


@pytest.fixture(scope="module")
def deployed():
    torch.manual_seed(0)
    model, x = cnn()
    model = trained(model, x, example_inputs=x).eval()
    return convert(model), x, model(x).detach()


def test_copies_and_checkpoints(deployed, tmp_path):
    model, x, expected = deployed
    model(x)  # keeps operands, which copies leave out
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    torch.save(model.state_dict(), tmp_path / "state")
    torch.save(model, tmp_path / "model")
    fresh = copy.deepcopy(model)
    for buffer in fresh.buffers():
        buffer.fill_(1)
    fresh(x)
    fresh.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(fresh(x), expected)
    fresh[0].weight.neg_()
    assert not torch.equal(fresh(x), expected)
    torch.manual_seed(0)
    layer = convert(QATLinear(6, 4, config=QATConfig.dynamic()))
    torch.save(layer, tmp_path / "layer")
    loaded = torch.load(tmp_path / "layer", weights_only=True)
    assert torch.equal(loaded(torch.ones(1, 6)), layer(torch.ones(1, 6)))


def test_the_dtype_of_the_model_leaves_the_scales(deployed):
    model = copy.deepcopy(deployed[0])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    half = model.half()
    assert all(torch.equal(value, state[name]) and value.dtype == state[name].dtype for name, value in
               half.state_dict().items())  # fmt: skip
    assert half(deployed[1].half()).dtype == torch.float16
    back = half.float()
    assert torch.equal(back(deployed[1]), deployed[2])


@pytest.mark.parametrize("config", ["static", "dynamic3", "weight only"])
@pytest.mark.parametrize("build", [cnn, encoder])
def test_export(build, config):
    torch.manual_seed(0)
    model, x = build()
    model = trained(model, x, CONFIGS[config], example_inputs=x).eval()
    exported = torch.export.export(convert(model), (x,)).module()
    with torch.no_grad():
        assert torch.equal(exported(x), model(x))


def test_compile(deployed):
    model, x, expected = deployed
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


def test_hooks_stay():
    layer = QATLinear(3, 2, config=QATConfig.dynamic())
    layer.register_forward_hook(lambda module, args, y: y + 1)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    x = torch.randn(4, 3)
    assert torch.equal(convert(nn.Sequential(layer))(x), layer(x))


def test_inputs_get_no_gradient(deployed):
    model, x, expected = deployed
    y = model(x.clone().requires_grad_())
    assert not y.requires_grad and torch.equal(y, expected)


# Errors


class Other(QATLinear):
    def forward(self, x):
        return super().forward(x) + 1


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x)
        return self.last(y.relu() if x.shape[0] > 1 else y)


def test_what_convert_does_not_take():
    with pytest.raises(TypeError, match=r"convert: expected model to be an nn\.Module, got 3"):
        convert(3)
    with pytest.raises(TypeError, match=r"got Sequential, none; call qatfast\.prepare first"):
        convert(mlp()[0])
    layer = QATLinear(3, 2, config=QATConfig.dynamic())
    with pytest.raises(TypeError, match="got IntegerLinear, a converted one"):
        convert(convert(layer))
    with pytest.raises(
        ValueError, match="expected form to be 'integer' or 'quantized_decomposed', got 'int8'"
    ):
        convert(layer, form="int8")
    with pytest.raises(TypeError, match="expected the forward of QATLinear, got '0', a Other"):
        convert(nn.Sequential(Other(3, 2)))


def test_ranges_that_observed_nothing_are_named():
    model, x = mlp()
    model = prepare(model, QATConfig.static(4), example_inputs=x)
    with pytest.raises(
        RuntimeError, match=r"got none for 0\.input_quantizer, 3\.input_quantizer, 6\.input_quantizer;"
    ):
        convert(model)
    assert all(
        q.num_batches == 0 for q in model.modules() if isinstance(q, FakeQuantize) and q.spec.has_state
    )


def test_another_flow_is_named():
    x = torch.randn(3, 4)
    model = trained(Branch(), x, example_inputs=x)
    convert(model, example_inputs=x)
    with pytest.raises(ValueError, match="in which 'first' goes relu -> last, got last with example_inputs"):
        convert(model, example_inputs=x[:1])


def test_wrong_inputs(deployed):
    model, x, _ = deployed
    with pytest.raises(TypeError, match="expected input to be float32, the dtype of the layer, got float64"):
        model(x.double())
    with pytest.raises(ValueError, match=r"IntegerConv2d: expected input to have shape \(N, 4, H, W\)"):
        model(x[:, :3])
    with pytest.raises(
        ValueError, match=r"IntegerLinear: expected input to have shape \(\.\.\., 486\), got \(2, 4\)"
    ):
        model[-1](torch.ones(2, 4))


def test_example_inputs_of_another_type_are_an_error():
    model = prepare(nn.Sequential(nn.Linear(8, 4)), QATConfig.int8())
    with pytest.raises(
        TypeError, match="convert: expected example_inputs to be a tensor, a tuple of positional"
    ):
        convert(model, example_inputs=[torch.ones(2, 8)])
