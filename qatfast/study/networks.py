"""The networks of the study: three layers in float, on the recommended grids, and on the grids of tutorials."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from qatfast import FakeQuantize, QATConfig, QATLinear, QuantSpec, prepare

FLOAT_BITS = 32
"""Bits of a model without quantization."""

TITLES = {
    "fp32": "FP32 start",
    "fp32_longer": "FP32",
    "ptq": "PTQ",
    "qat_finetuned": "QAT",
    "ptq_every_layer": "PTQ every layer",
    "ptq_tutorial": "Tutorial PTQ",
    "qat_tutorial": "Tutorial QAT",
}
"""Title of each model by its key in results.json, in the order of all tables."""

EXPLANATIONS = {
    "fp32": "FP32 after the first half of the training: where QAT starts.",
    "fp32_longer": "The network in 32-bit floats; all others are compared with it.",
    "ptq": "Post-training quantization: FP32 with each layer's weights (per output channel) and inputs (per sample) "
    "rounded; biases and outputs stay float.",
    "qat_finetuned": "Quantization-aware training: the second half of the training has the rounding of PTQ.",
    "ptq_every_layer": "As PTQ, but the first and the last layer have the few bits too.",
    "ptq_tutorial": "FP32 on the grids of Tutorial QAT, and no further training.",
    "qat_tutorial": "As QAT, but as tutorials teach it (QATConfig.tutorial): one grid per tensor for weights, "
    "biases, the input and each layer's output, the class scores too.",
}
"""Explanation of each model."""

EDGE_BITS = 8
"""Bits of the first and the last layer if the others have less: they have few weights, and the most sensitive."""

Model = TypeVar("Model", bound=nn.Module)


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

    def forward(self, input: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(input))
        hidden = torch.relu(self.fc2(hidden))
        return self.fc3(hidden)


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
        weight, bias = self.fake_quantize(layer.weight), self.fake_quantize(layer.bias)
        return self.fake_quantize(nn.functional.linear(input, weight, bias))


def quantize_layers(model: Model, num_bits: int, *, edge_bits: int = EDGE_BITS) -> Model:
    """Copies a float model and quantizes the linear layers of the copy by ``QATConfig.dynamic(num_bits)``.

    Without further training the copy is the model after PTQ. With further training it is the model after QAT.

    Args:
        model: A float model, which does not change. Its linear layers may be in submodules.
        num_bits: Bits of the weight and the input of each layer, 2 to 16.
        edge_bits: Minimum number of bits of the first and the last layer.

    Returns:
        The quantized copy.

    Raises:
        ValueError: ``num_bits`` is not from 2 to 16.

    Source:
        Jacob et al. 2018 (arXiv 1712.05877), section 3; STE: Bengio et al. 2013 (arXiv 1308.3432).

    Example:
        >>> quantize_layers(ThreeLayerNet(), 4).fc2
        QATLinear(in_features=64, out_features=64, bias=True, num_bits=4, input=affine per token, \
weight=symmetric per channel 0, bias=float, output=float)
    """
    return cast(Model, prepare(copy.deepcopy(model), QATConfig.dynamic(num_bits), edges=edge_bits))


def config_code(num_bits: int, *, train: bool) -> str:
    """Returns Python code that quantizes any model named ``model`` as :func:`quantize_layers` does.

    Args:
        num_bits: Bits of the weight and the input of each layer, 2 to 16.
        train: Whether the quantized model is trained further (QAT) or used as it is (PTQ).
    """
    then = "# QAT: train it on, as before" if train else "# PTQ: use it as it is"
    edges = "" if num_bits >= EDGE_BITS else f"  # the first and the last layer keep {EDGE_BITS} bits"
    return f"""import qatfast

config = qatfast.QATConfig.dynamic({num_bits})
model = qatfast.prepare(model, config){edges}
{then}
"""


def count_parameters(model: nn.Module) -> int:
    """Returns the number of parameters that the model learns.

    Example:
        >>> count_parameters(ThreeLayerNet())
        4994
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
