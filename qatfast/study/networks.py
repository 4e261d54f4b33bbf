"""The networks of the study: the same three layers in float, on the recommended grids, and on the tutorials'."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from qatfast import FakeQuantize, QATConfig, QATLinear, QuantSpec, prepare

FLOAT_BITS = 32
"""The bits of a model without quantization."""

TITLES = {
    "fp32": "FP32 start",
    "fp32_longer": "FP32",
    "ptq": "PTQ",
    "qat_finetuned": "QAT",
    "ptq_every_layer": "PTQ every layer",
    "ptq_tutorial": "Tutorial PTQ",
    "qat_tutorial": "Tutorial QAT",
}
"""Label of each model, in the order of every table."""

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
"""What each model is."""

EDGE_BITS = 8
"""Below 8 bits the first and the last layer keep so many: few weights, and the most sensitive ones."""

Model = TypeVar("Model", bound=nn.Module)


class ThreeLayerNet(nn.Module):
    """Three linear layers with ReLU between them, in float.

    Args:
        in_features: of one sample.
        hidden_features: outputs of the first and the second layer.
        num_classes: outputs of the third layer, one score per class.

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
    """ThreeLayerNet as tutorials quantize it: its input and every weight, bias and layer output, each per tensor.

    At few bits this is the worst of the usual recipes, and the study shows it for comparison;
    :func:`quantize_layers` is the recommended one.

    Its ``state_dict`` fits ThreeLayerNet and the other way round, and the same seed gives both the same first weights.

    Args:
        in_features: of one sample.
        hidden_features: outputs of the first and the second layer.
        num_classes: outputs of the third layer, one score per class.
        num_bits: of everything quantized, 2 to 16.
        float_scores: True: the outputs of the third layer stay in float.

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
    """A copy of a float model whose linear layers are quantized by ``QATConfig.dynamic(num_bits)``.

    As it is, the copy is the model after PTQ; trained further, it is QAT.

    Args:
        model: linear layers are found anywhere in it; it stays as it is.
        num_bits: 2 to 16, of the weight and the input of each layer.
        edge_bits: the least bits of the first and the last layer.

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
    """Python code that quantizes any model named ``model`` as :func:`quantize_layers` does.

    Args:
        num_bits: 2 to 16.
        train: whether the model is trained on with it (QAT) or used as it is (PTQ).
    """
    then = "# QAT: train it on, as before" if train else "# PTQ: use it as it is"
    edges = "" if num_bits >= EDGE_BITS else f"  # the first and the last layer keep {EDGE_BITS} bits"
    return f"""import qatfast

config = qatfast.QATConfig.dynamic({num_bits})
model = qatfast.prepare(model, config){edges}
{then}
"""


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns.

    Example:
        >>> count_parameters(ThreeLayerNet())
        4994
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
