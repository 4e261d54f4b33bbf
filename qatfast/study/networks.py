"""The networks of the study: in float, on the recommended grids, and on the grids of tutorials."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from qatfast import (
    Dynamic,
    FakeQuantize,
    Learned,
    MinMax,
    MovingAverage,
    PerChannel,
    QATConfig,
    QATLinear,
    QuantSpec,
    calibrate,
    prepare,
)
from qatfast.config import Range

FLOAT_BITS = 32
"""Bits of a model without quantization."""

TITLES = {
    "fp32": "FP32 start",
    "fp32_longer": "FP32",
    "ptq_minmax": "PTQ min-max",
    "ptq_mse": "PTQ MSE",
    "qat_tutorial": "QAT tutorial",
    "qat_moving_average": "QAT moving average",
    "qat_learned": "QAT learned",
}
"""Title of each model by its key in results.json, in the order of all tables."""

EXPLANATIONS = {
    "fp32": "FP32 after the first half of the training: where QAT starts.",
    "fp32_longer": "The network in 32-bit floats, trained as long as QAT. All others are compared with it.",
    "ptq_minmax": "Post-training quantization of FP32: inputs per tensor in the range of training samples, weights "
    "per output channel in their own range; biases and outputs stay float.",
    "ptq_mse": "Post-training quantization of FP32: inputs per tensor and weights per output channel, each in the "
    "range with the least squared error (search_qparams); biases and outputs stay float.",
    "qat_tutorial": "Quantization-aware training with the formula of tutorials (QATConfig.tutorial): weights, biases "
    "and outputs per tensor, each in the range of the tensor at hand.",
    "qat_moving_average": "Quantization-aware training on the grids of PTQ min-max. The range of an input is a moving "
    "average over the batches.",
    "qat_learned": "Quantization-aware training that starts from the ranges of PTQ MSE. The scales of inputs and "
    "weights are trained with the network (LSQ).",
}
"""Explanation of each model."""

COMPARED = ("ptq_mse", "qat_learned")
"""The PTQ and the QAT that a verdict compares with FP32."""

EDGE_BITS = 8
"""Bits of the first and the last layer if the others have less: they have few weights, and the most sensitive."""

Model = TypeVar("Model", bound=nn.Module)


LAYERS = (nn.Linear, _ConvNd)
"""The layers with weights that the study quantizes."""


class ThreeLayerNet(nn.Module):
    """Three linear layers with ReLU between them, in float.

    Args:
        in_features: Features of one sample.
        hidden_features: Outputs of the first and the second layer.
        num_classes: Outputs of the third layer, one score per class.

    Example:
        >>> ThreeLayerNet()(torch.zeros(5, 10)).shape
        torch.Size([5, 2])
    """

    def __init__(self, in_features: int = 10, hidden_features: int = 64, num_classes: int = 2) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, hidden_features)
        self.fc3 = nn.Linear(hidden_features, num_classes)

    description = "three linear layers with ReLU between them"

    @property
    def sizes(self) -> list[int]:
        """Features of a sample, then the outputs of each layer."""
        return [self.fc1.in_features, *(layer.out_features for layer in (self.fc1, self.fc2, self.fc3))]

    def forward(self, input: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(input))
        hidden = torch.relu(self.fc2(hidden))
        return self.fc3(hidden)


class SmallConvNet(nn.Module):
    """Two convolutions of stride 2 with BatchNorm and ReLU, and a linear layer, in float.

    Args:
        shape: Height and width of the images, or the length of the signals, which have one channel.
        channels: Outputs of the first and the second layer.
        num_classes: Outputs of the third layer, one score per class.

    Example:
        >>> SmallConvNet((8, 8))(torch.zeros(5, 64)).shape
        torch.Size([5, 2])
    """

    description = "two convolutions of stride 2 with BatchNorm and ReLU, and a linear layer"

    def __init__(self, shape: Sequence[int], channels: int = 32, num_classes: int = 2) -> None:
        super().__init__()
        convolution: Any = nn.Conv1d if len(shape) == 1 else nn.Conv2d
        norm: Any = nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d
        arguments = {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}
        self.shape = tuple(shape)
        self.conv1, self.norm1 = convolution(1, channels, **arguments), norm(channels)
        self.conv2, self.norm2 = convolution(channels, channels, **arguments), norm(channels)
        self.fc = nn.Linear(channels * prod(-(-size // 4) for size in shape), num_classes)

    @property
    def sizes(self) -> list[int]:
        """Features of a sample, then the outputs of each layer."""
        return [
            prod(self.shape),
            self.conv1.out_channels,
            self.conv2.out_channels,
            self.fc.out_features,
        ]

    def forward(self, input: Tensor) -> Tensor:
        hidden = input.unflatten(1, (1, *self.shape))
        hidden = torch.relu(self.norm1(self._layer(self.conv1, hidden)))
        hidden = torch.relu(self.norm2(self._layer(self.conv2, hidden)))
        return self._layer(self.fc, hidden.flatten(1))

    def _layer(self, layer: nn.Module, input: Tensor) -> Tensor:
        return layer(input)


def float_network(
    kind: str, shape: Sequence[int], hidden: int, num_classes: int
) -> ThreeLayerNet | SmallConvNet:
    """Returns the network that ``--network`` names, for samples of this shape."""
    if kind == "mlp":
        return ThreeLayerNet(prod(shape), hidden, num_classes)
    return SmallConvNet(shape, hidden, num_classes)


class ThreeLayerNetQAT(nn.Module):
    """ThreeLayerNet as tutorials quantize it: its input and all weights, biases and layer outputs, each per tensor.

    At few bits this is the worst of the usual recipes. The study shows it for comparison;
    :func:`quantize_layers` is the recommended recipe.

    ThreeLayerNet and this network can load each other's ``state_dict``, and have the same first weights for the same
    seed.

    Args:
        in_features: Features of one sample.
        hidden_features: Outputs of the first and the second layer.
        num_classes: Outputs of the third layer, one score per class.
        num_bits: Bits of everything that is quantized, 2 to 16.
        float_scores: Whether the outputs of the third layer stay in float.

    Source:
        Jacob et al. 2018 (arXiv 1712.05877), section 3; STE: Bengio et al. 2013 (arXiv 1308.3432).

    Example:
        >>> ThreeLayerNetQAT(num_bits=4)(torch.zeros(5, 10)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_features: int = 10,
        hidden_features: int = 64,
        num_classes: int = 2,
        *,
        num_bits: int = 8,
        float_scores: bool = False,
    ) -> None:
        super().__init__()
        everything = QATConfig.tutorial(num_bits)
        parameters_only = QATConfig(weight=QuantSpec(num_bits), bias=QuantSpec(num_bits), output=None)
        self.quantize_input = FakeQuantize(num_bits)
        self.fc1 = QATLinear(in_features, hidden_features, config=everything)
        self.fc2 = QATLinear(hidden_features, hidden_features, config=everything)
        self.fc3 = QATLinear(
            hidden_features, num_classes, config=parameters_only if float_scores else everything
        )

    def forward(self, input: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(self.quantize_input(input)))
        hidden = torch.relu(self.fc2(hidden))
        return self.fc3(hidden)


class FunctionalQATNet(ThreeLayerNet):
    """Computes what ThreeLayerNetQAT computes, with any function that fake-quantizes a tensor.

    Args:
        fake_quantize: Maps a tensor to its fake-quantized form.
        in_features: Features of one sample.
        hidden_features: Outputs of the first and the second layer.
        num_classes: Outputs of the third layer, one score per class.
    """

    def __init__(
        self,
        fake_quantize: Callable[[Tensor], Tensor],
        in_features: int = 10,
        hidden_features: int = 64,
        num_classes: int = 2,
    ) -> None:
        super().__init__(in_features, hidden_features, num_classes)
        self.fake_quantize = fake_quantize

    def forward(self, input: Tensor) -> Tensor:
        hidden = torch.relu(self._layer(self.fc1, self.fake_quantize(input)))
        hidden = torch.relu(self._layer(self.fc2, hidden))
        return self._layer(self.fc3, hidden)

    def _layer(self, layer: nn.Linear, input: Tensor) -> Tensor:
        return _quantized_layer(self.fake_quantize, layer, input)


class FunctionalQATConvNet(SmallConvNet):
    """Quantizes SmallConvNet as tutorials do, with any function that fake-quantizes a tensor.

    Args:
        fake_quantize: Maps a tensor to its fake-quantized form.
        arguments: Those of SmallConvNet.
    """

    def __init__(self, fake_quantize: Callable[[Tensor], Tensor], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.fake_quantize = fake_quantize

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.fake_quantize(input))

    def _layer(self, layer: nn.Module, input: Tensor) -> Tensor:
        return _quantized_layer(self.fake_quantize, layer, input)


def _quantized_layer(fake_quantize: Callable[[Tensor], Tensor], layer: Any, input: Tensor) -> Tensor:
    weight, bias = fake_quantize(layer.weight), None if layer.bias is None else fake_quantize(layer.bias)
    function = nn.functional.linear if isinstance(layer, nn.Linear) else layer._conv_forward
    return fake_quantize(function(input, weight, bias))


def model_config(name: str, num_bits: int) -> QATConfig:
    """Returns the config of the hidden layers of a quantized model.

    Args:
        name: A key of TITLES other than those of FP32.
        num_bits: Bits of all that is quantized, 2 to 16.

    Raises:
        ValueError: ``num_bits`` is not from 2 to 16.
    """
    if name == "qat_tutorial":
        return QATConfig.tutorial(num_bits)
    ranges: dict[str, tuple[Range, Range]] = {
        "ptq_minmax": (MinMax(), Dynamic()),
        "ptq_mse": (Learned(), Learned()),
        "qat_moving_average": (MovingAverage(), Dynamic()),
        "qat_learned": (Learned(), Learned()),
    }
    input_range, weight_range = ranges[name]
    return QATConfig(
        input=QuantSpec(num_bits, range=input_range),
        weight=QuantSpec(num_bits, symmetric=True, granularity=PerChannel(0), range=weight_range),
        bias=None,
        output=None,
    )


@torch.no_grad()
def quantize_layers(
    model: Model,
    num_bits: int,
    inputs: Tensor | None = None,
    *,
    name: str = "qat_learned",
    edge_bits: int = EDGE_BITS,
) -> Model:
    """Copies a float model, quantizes the layers of the copy, and observes their ranges on ``inputs``.

    Without further training the copy is a model after PTQ. With further training it is a model after QAT.

    Args:
        model: A float model, which does not change. Its layers may be in submodules.
        num_bits: Bits of the layers, 2 to 16.
        inputs: (samples, features), training samples that set the ranges. If None, the first batch in training does.
        name: Key of the quantized model, which decides the config: see :func:`model_config`.
        edge_bits: Minimum number of bits of the first and the last layer.

    Returns:
        The quantized copy.

    Raises:
        ValueError: ``num_bits`` is not from 2 to 16.

    Source:
        Esser et al. 2020 (arXiv 1902.08153); Jacob et al. 2018 (arXiv 1712.05877), section 3.

    Example:
        >>> quantize_layers(ThreeLayerNet(), 4, name="qat_moving_average").fc2.config.input
        QuantSpec(num_bits=4, symmetric=False, granularity=PerTensor(), \
range=MovingAverage(averaging_constant=0.01), narrow_range=True)
    """
    example_inputs = None if inputs is None else inputs[:2]
    quantized = prepare(
        copy.deepcopy(model), model_config(name, num_bits), example_inputs=example_inputs, edges=edge_bits
    )
    if inputs is not None:
        with calibrate(quantized):
            quantized(inputs)
    return cast(Model, quantized)


def config_code(num_bits: int, name: str) -> str:
    """Returns Python code that makes a PTQ MSE or QAT learned model of any ``model`` and some training ``inputs``.

    The code does what :func:`quantize_layers` does.

    Args:
        num_bits: Bits of the layers, 2 to 16.
        name: ``ptq_mse`` or ``qat_learned``.
    """
    config = f"config = qatfast.QATConfig.static({num_bits})  # learned scales, below 8 bits"
    if num_bits >= EDGE_BITS:  # static() has a moving average there
        config = f"""learned = qatfast.Learned()
config = qatfast.QATConfig(
    input=qatfast.QuantSpec({num_bits}, range=learned),
    weight=qatfast.QuantSpec({num_bits}, symmetric=True, granularity=qatfast.PerChannel(0), range=learned),
    bias=None,
    output=None,
)"""
    edges = "" if num_bits >= EDGE_BITS else f", edges={EDGE_BITS}"
    then = "train the model on, as before; then " if name == "qat_learned" else ""
    return f"""import torch
import qatfast

{config}
model = qatfast.prepare(model, config, example_inputs=inputs[:2]{edges})
with torch.no_grad(), qatfast.calibrate(model):
    model(inputs)  # one batch of about a thousand training samples sets the ranges
# {then}qatfast.convert(model) for predictions with integers
"""


def count_parameters(model: nn.Module) -> int:
    """Returns the number of parameters that the model learns.

    Example:
        >>> count_parameters(ThreeLayerNet())
        4994
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
