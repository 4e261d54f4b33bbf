"""Post-training quantization (PTQ): a trained float model put on the integer grid without further training."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qatfast import choose_qparams, fake_quantize, fake_quantize_affine

Model = TypeVar("Model", bound=nn.Module)


class FixedFakeQuantize(nn.Module):
    """Fake-quantizes its input to one fixed affine grid, as a device does whose ranges were chosen beforehand.

    Args:
        scale: real units a step, float32, shape ``()``.
        zero_point: int32, shape ``()``, from 0 to ``2^num_bits - 1``.
        num_bits: 2 to 16.
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
        """The grid from the smallest to the largest of ``values``."""
        return cls(*choose_qparams(values, num_bits), num_bits)

    def forward(self, input: Tensor) -> Tensor:
        return fake_quantize_affine(input, self.scale, self.zero_point, 0, 2**self.num_bits - 1)


@torch.no_grad()
def quantize_model_weights(model: Model, num_bits: int = 8, *, inplace: bool = False) -> Model:
    """Puts every weight and bias on the affine grid of its own range; activations stay in float.

    Args:
        model: a trained model.
        num_bits: 2 to 16.
        inplace: False: ``model`` stays as it is and a copy is quantized.

    Returns:
        The quantized model; its parameters are still float32, with at most ``2^num_bits`` different values each.

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
    """Quantizes weights, biases, the input and the output of every linear layer: the whole model as a device runs it.

    The range of each activation is the smallest and largest value it takes on the calibration inputs, with the
    quantized weights; it is fixed from then on.

    Args:
        model: a trained float model of nn.Linear layers; it stays as it is.
        num_bits: 2 to 16, of everything.
        calibration_inputs: (samples, features), of the training data.
        float_scores: True: the output of the last linear layer stays in float.

    Returns:
        ``nn.Sequential(input=FixedFakeQuantize, model=copy)``, in evaluation mode, each linear layer of the copy
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
    """The output of each linear layer for ``inputs``, in the order in which the layers run."""
    outputs: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name] = output

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
