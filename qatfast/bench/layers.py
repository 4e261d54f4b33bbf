"""Who computes the linear layer: nn.Linear in float, qatfast, the reference, tutorials, and other packages.

All work on the same parameters. Packages that have no layer with weight, bias and output affine per tensor are set up
as close to it as they come; each function says how.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..linear import QATLinear
from . import tutorial
from .providers import COMPILED, OURS, REFERENCE, Function, ao_fake_quantize
from .works import Work, normal


@dataclass(frozen=True)
class LayerInputs:
    """The input, the parameters and the gradient of the output, the same for each provider."""

    work: Work
    x: Tensor
    grad: Tensor
    weight: nn.Parameter
    bias: nn.Parameter


Provider = Callable[[LayerInputs], Function]


def inputs(work: Work) -> LayerInputs:
    """The tensors of a layer; its weights are as large as nn.Linear makes them."""
    batch, in_features, out_features = work.shape
    x = normal(work, batch, in_features)
    if work.backward:
        x.requires_grad_()
    bound = in_features**-0.5
    weight = nn.Parameter(normal(work, out_features, in_features, seed=1).clamp(-3, 3) * (bound / 3))
    bias = nn.Parameter(normal(work, out_features, seed=2).clamp(-3, 3) * (bound / 3))
    return LayerInputs(work, x, normal(work, batch, out_features, seed=3), weight, bias)


def providers() -> dict[str, Provider]:
    """The providers of ``qat_linear`` by name, the baseline first."""
    return {
        "nn.Linear": lambda inputs: _module(nn.Linear, inputs),
        OURS: lambda inputs: _module(QATLinear, inputs),
        REFERENCE: lambda inputs: _reference(inputs, reference.qat_linear),
        COMPILED: lambda inputs: _reference(inputs, torch.compile(reference.qat_linear, dynamic=False)),
        "tutorial layer": lambda inputs: _module(tutorial.Linear, inputs),
        "tutorial layer, compiled": lambda inputs: torch.compile(
            _module(tutorial.Linear, inputs), dynamic=False
        ),
        "torch.ao qat.Linear": _torch_ao,
        "Brevitas": _brevitas,
        "torchao": _torchao,
    }


def _module(module: Callable[..., Any], inputs: LayerInputs, **options: Any) -> Any:
    """The module, on the parameters of the inputs."""
    _, in_features, out_features = inputs.work.shape
    layer = module(in_features, out_features, bias=True, **options).to(inputs.work.device, inputs.work.dtype)
    layer.weight, layer.bias = inputs.weight, inputs.bias
    return layer


def _reference(inputs: LayerInputs, function: Callable[..., Tensor]) -> Function:
    return lambda x: function(x, inputs.weight, inputs.bias)


def _torch_ao(inputs: LayerInputs) -> Function:
    """nn.qat.Linear with the output's fake quantizer behind it, as prepare_qat makes it; the bias stays in float."""
    from torch.ao import quantization as ao
    from torch.ao.nn import qat

    def fused(factory_kwargs: Any = None) -> Any:
        return ao_fake_quantize(fused=True, device=inputs.work.device)

    qconfig = ao.QConfig(activation=fused, weight=fused)
    return nn.Sequential(_module(qat.Linear, inputs, qconfig=qconfig), fused())


def _brevitas(inputs: LayerInputs) -> Function:
    """QuantLinear with weight and output affine, bias symmetric, per tensor.

    The output's range is a parameter; the steps in which its first value is collected, slower ones, are over after one.
    """
    with _quiet():
        from brevitas import nn as brevitas
        from brevitas import quant

        return _module(
            brevitas.QuantLinear,
            inputs,
            weight_quant=quant.ShiftedUint8WeightPerTensorFloat,
            bias_quant=quant.Int8BiasPerTensorFloatInternalScaling,
            output_quant=quant.ShiftedUint8ActPerTensorFloat.let(collect_stats_steps=1),
        )


def _torchao(inputs: LayerInputs) -> Function:
    """FakeQuantizedLinear as its recipe for 8 bits: input per token, weight symmetric per output channel; no output."""
    with _quiet():
        from torchao.quantization import qat

        config = qat.IntxFakeQuantizeConfig
        return _module(
            qat.FakeQuantizedLinear,
            inputs,
            activation_config=config(torch.int8, "per_token", is_symmetric=False),
            weight_config=config(torch.int8, "per_channel", is_symmetric=True),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what other packages say while they are imported."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
