"""How far quantization moves each layer: of its weights, and of what it gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .ptq import linear_outputs, quantize_model


@dataclass(frozen=True)
class LayerError:
    """The relative error of one layer, ``||quantized - float|| / ||float||`` with the Euclidean norm.

    Args:
        model: which model, by its key in the study.
        bits: of weights and activations.
        layer: name of the layer.
        weight_error: of the weight matrix alone.
        output_error: of the layer's quantized output on the test samples, with the errors of all layers before it.
    """

    model: str
    bits: int
    layer: str
    weight_error: float
    output_error: float


@torch.no_grad()
def layer_errors(
    name: str, model: nn.Module, num_bits: int, calibration_inputs: Tensor, inputs: Tensor
) -> list[LayerError]:
    """Compares each linear layer of ``model`` with the same layer of its quantized form (:func:`quantize_model`).

    Args:
        name: of the model, for the result.
        model: in float.
        num_bits: 2 to 16.
        calibration_inputs: (samples, features), from which the fixed ranges are taken.
        inputs: (samples, features), on which the outputs are compared.

    Returns:
        One error a linear layer, in the order of the model.
    """
    quantized = quantize_model(model, num_bits, calibration_inputs)
    sums = linear_outputs(quantized, inputs)
    errors = []
    for layer, exact in linear_outputs(model, inputs).items():
        rounded = quantized.get_submodule(f"model.{layer}.output")(sums[f"model.{layer}.linear"])
        weight = quantized.get_parameter(f"model.{layer}.linear.weight")
        weight_error = relative_error(weight, model.get_parameter(f"{layer}.weight"))
        errors.append(LayerError(name, num_bits, layer, weight_error, relative_error(rounded, exact)))
    return errors


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
