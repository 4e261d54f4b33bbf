"""convert: integer models equal the prepared ones in evaluation, to the bit."""

import pytest
import torch
from torch import nn

from qatfast import (
    IntegerConv2d,
    IntegerLinear,
    Learned,
    MinMax,
    PerChannel,
    PerGroup,
    PerToken,
    QATConfig,
    QuantSpec,
    convert,
    prepare,
)

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
def test_the_integer_model_gives_the_same_bits(build, config, with_flow):
    torch.manual_seed(0)
    model, x = build()
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
