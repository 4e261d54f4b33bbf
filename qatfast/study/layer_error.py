"""How far quantization moves each layer: of its weights, and of what it gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qatfast import QATLinear, QuantSpec, fake_quantize

from .ptq import linear_outputs


@dataclass(frozen=True)
class LayerError:
    """The relative error of one layer, ``||quantized - float|| / ||float||`` with the Euclidean norm.

    Args:
        model: which model, by its key in the study.
        bits: of weights and inputs.
        layer: name of the layer.
        weight_error: of the weight matrix alone.
        output_error: of the layer's output on the test samples, with the errors of all layers before it.
    """

    model: str
    bits: int
    layer: str
    weight_error: float
    output_error: float


@torch.no_grad()
def layer_errors(
    name: str, num_bits: int, model: nn.Module, quantized: nn.Module, inputs: Tensor
) -> list[LayerError]:
    """Compares each linear layer of ``model`` with the same layer of its quantized form.

    Args:
        name: of the model, for the result.
        num_bits: for the result.
        model: in float.
        quantized: from :func:`quantize_layers`.
        inputs: (samples, features), on which the outputs are compared.

    Returns:
        One error per linear layer, in the order of the model.
    """
    outputs = linear_outputs(quantized, inputs)
    errors = []
    for layer, exact in linear_outputs(model, inputs).items():
        weight = model.get_parameter(f"{layer}.weight")
        weight_error = relative_error(quantized_weight(quantized.get_submodule(layer)), weight)
        errors.append(LayerError(name, num_bits, layer, weight_error, relative_error(outputs[layer], exact)))
    return errors


@torch.no_grad()
def quantized_weight(layer: nn.Module) -> Tensor:
    """The weight that a layer multiplies with: on the grid of its config, or as it is."""
    assert isinstance(layer, nn.Linear)
    spec: QuantSpec | None = layer.config.weight if isinstance(layer, QATLinear) else None
    if spec is None:
        return layer.weight.detach()
    return fake_quantize(layer.weight, spec.num_bits, symmetric=spec.symmetric, granularity=spec.granularity)


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """``||approximate - exact|| / ||exact||`` with the Euclidean norm; 0 where both are zero.

    Example:
        >>> relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))
        0.2
    """
    approximate, exact = approximate.detach().double(), exact.detach().double()
    distance = float(torch.linalg.vector_norm(approximate - exact))
    size = float(torch.linalg.vector_norm(exact))
    return distance / size if size else distance
