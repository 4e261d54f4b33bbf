"""Post-training quantization (PTQ): quantizes a trained float model without further training."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qatfast import QuantSpec, choose_qparams, fake_quantize, fake_quantize_affine
from qatfast.checks import positive_scale
from qatfast.modules.base import QuantizedLayer

from .networks import LAYERS

Model = TypeVar("Model", bound=nn.Module)


class FixedFakeQuantize(nn.Module):
    """Fake-quantizes its input to a fixed affine grid, as a device does whose ranges were chosen beforehand.

    Args:
        scale: Interval between adjacent levels, float32, shape ``()``.
        zero_point: Integer that stands for 0.0, int32, shape ``()``, from 0 to ``2^num_bits - 1``.
        num_bits: Bits of the grid, 2 to 16.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, num_bits: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.num_bits = num_bits

    @classmethod
    def observe(cls, values: Tensor, num_bits: int) -> FixedFakeQuantize:
        """Returns the module whose grid reaches from the smallest to the largest of ``values``."""
        return cls(*choose_qparams(values, num_bits), num_bits)

    def forward(self, input: Tensor) -> Tensor:
        return fake_quantize_affine(input, self.scale, self.zero_point, 0, 2**self.num_bits - 1)


@torch.no_grad()
def quantize_model_weights(model: Model, num_bits: int = 8, *, inplace: bool = False) -> Model:
    """Fake-quantizes each weight and bias to the affine grid of its own range. Activations stay in float.

    Args:
        model: A trained model.
        num_bits: Bits of the grids, 2 to 16.
        inplace: Whether to quantize ``model`` itself and not a copy.

    Returns:
        The quantized model. Its parameters are still float32, with at most ``2^num_bits`` different values each.

    Raises:
        ValueError: ``num_bits`` is not from 2 to 16.

    Source:
        Gholami et al. 2021 (arXiv 2103.13630), section III.
    """
    quantized = model if inplace else copy.deepcopy(model)
    for parameter in quantized.parameters():
        parameter.copy_(fake_quantize(parameter, num_bits))
    return quantized


@torch.no_grad()
def quantize_model(
    model: nn.Module, num_bits: int, calibration_inputs: Tensor, *, float_scores: bool = False
) -> nn.Sequential:
    """Quantizes the input, the parameters and the outputs of all linear layers, as a device with fixed ranges does.

    The range of an activation is fixed to the smallest and largest value that it has for the calibration inputs, with
    quantized weights.

    Args:
        model: A trained float model of nn.Linear layers, which does not change.
        num_bits: Bits of everything that is quantized, 2 to 16.
        calibration_inputs: (samples, features), from the training data.
        float_scores: Whether the output of the last linear layer stays in float.

    Returns:
        ``nn.Sequential(input=FixedFakeQuantize, model=copy)`` in evaluation mode, with each linear layer of the copy
        replaced by ``nn.Sequential(linear=..., output=FixedFakeQuantize)``.

    Raises:
        ValueError: ``num_bits`` is not from 2 to 16.

    Source:
        Jacob et al. 2018 (arXiv 1712.05877), section 3; Gholami et al. 2021 (arXiv 2103.13630), section III.
    """
    quantize_input = FixedFakeQuantize.observe(calibration_inputs, num_bits)
    inner = quantize_model_weights(model, num_bits)
    quantized = nn.Sequential(OrderedDict(input=quantize_input, model=inner)).eval()
    outputs = list(linear_outputs(quantized, calibration_inputs).items())
    for name, output in outputs[:-1] if float_scores else outputs:
        grid = FixedFakeQuantize.observe(output, num_bits)
        linear = quantized.get_submodule(name)
        quantized.set_submodule(name, nn.Sequential(OrderedDict(linear=linear, output=grid)))
    return quantized


@torch.no_grad()
def linear_outputs(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Returns the output of each linear layer and convolution for ``inputs``, in the order in which the layers run."""
    outputs: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name] = output

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


@dataclass(frozen=True)
class LayerError:
    """The relative error of one layer, ``||quantized - float|| / ||float||`` with the Euclidean norm.

    Args:
        model: A key of TITLES.
        bits: Bits of weights and inputs.
        layer: Name of the layer.
        weight_error: Error of the weight matrix alone.
        output_error: Error of the layer's output on the test samples, with the errors of all layers before it.
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
    """Compares each layer of ``model`` with the same layer of its quantized form.

    Args:
        name: Key of the model, for the result.
        num_bits: Bits, for the result.
        model: A float model.
        quantized: The model that :func:`quantize_layers` returns for it.
        inputs: (samples, features), for which the outputs are compared.

    Returns:
        One error per layer, in the order of the model.
    """
    outputs = linear_outputs(quantized, inputs)
    errors = []
    for layer, exact in linear_outputs(model, inputs).items():
        weight = model.get_parameter(f"{layer}.weight")
        weight_error = relative_error(quantized_weight(quantized.get_submodule(layer)), weight)
        errors.append(LayerError(name, num_bits, layer, weight_error, relative_error(outputs[layer], exact)))
    return errors


@torch.no_grad()
def weight_qparams(layer: Any) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point of the weight of a layer, whose config quantizes the weight."""
    spec: QuantSpec | None = layer.config.weight
    assert spec is not None
    if spec.is_dynamic:
        return choose_qparams(layer.weight, **spec.arguments)
    scale, zero_point = layer.get_submodule("weight_quantizer").grid(layer.weight)
    # A learned scale may be negative or 0.
    return positive_scale(scale), zero_point


@torch.no_grad()
def quantized_weight(layer: nn.Module) -> Tensor:
    """Returns the weight that a layer multiplies with, which is on the grid of its config if it has one."""
    weight: Any = layer.weight
    spec: QuantSpec | None = layer.config.weight if isinstance(layer, QuantizedLayer) else None
    if spec is None:
        return weight.detach()
    return fake_quantize_affine(
        weight, *weight_qparams(layer), spec.quant_min, spec.quant_max, granularity=spec.granularity
    )


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """Returns ``||approximate - exact|| / ||exact||`` with the Euclidean norm, or 0 if both are zero.

    Example:
        >>> relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))
        0.2
    """
    approximate, exact = approximate.detach().double(), exact.detach().double()
    distance = float(torch.linalg.vector_norm(approximate - exact))
    size = float(torch.linalg.vector_norm(exact))
    return distance / size if size else distance
