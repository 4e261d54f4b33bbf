"""The two networks of the study: the same three layers in float, and on the integer grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qatfast import FakeQuantize, QATConfig, QATLinear, QuantSpec


class ThreeLayerNet(nn.Module):
    """Three linear layers with ReLU between them, in float.

    Args:
        in_features: of one sample.
        hidden_features: outputs of the first and the second layer.
        num_classes: outputs of the third layer, one score a class.

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
    """ThreeLayerNet with its input and every weight, bias and layer output fake-quantized, each per tensor.

    Its ``state_dict`` fits ThreeLayerNet and the other way round, and the same seed gives both the same first weights.

    Args:
        in_features: of one sample.
        hidden_features: outputs of the first and the second layer.
        num_classes: outputs of the third layer, one score a class.
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


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns.

    Example:
        >>> count_parameters(ThreeLayerNet())
        4994
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
