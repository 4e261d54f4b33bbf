"""Who computes the linear layer: nn.Linear in float, qatfast, the reference, tutorials, and other packages.

All work on the same parameters. Packages that have no layer with weight, bias and output affine per tensor are set up
as close to it as they come; each function says how.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import reference
from ..linear import QATLinear
from ..weight_cache import cached_weights
from . import tutorial
from .names import CACHED, COMPILED, INTEGER_PRODUCT, OURS, REFERENCE, TUTORIAL_LAYER
from .providers import Function, Run, ao_fake_quantize
from .works import CONFIGS, Work, normal


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
    grad = normal(work, batch, out_features, seed=3)
    return LayerInputs(work, x, grad.bfloat16() if work.autocast else grad, weight, bias)


def names(work: Work) -> list[str]:
    """Who does a work, the baseline first."""
    found = dict.fromkeys([*ALWAYS, *OF_CONFIG[work.config]])
    if not work.backward:
        found[CACHED] = None
        if work.config == "int8 config":
            found[INTEGER_PRODUCT] = None
    return list(found)


def runs(work: Work, inside: ExitStack) -> Callable[[str], Run]:
    """Sets up the work: gives a provider's call by its name.

    Args:
        work: what is to be done.
        inside: holds what is open while the calls are made.
    """
    given = inputs(work)
    leaves = (given.x, given.weight, given.bias)

    def run_of(name: str) -> Run:
        function = {**ALWAYS, **OF_CONFIG[work.config], **INFERENCE}[name](given)
        if name == CACHED:
            inside.enter_context(cached_weights(cast(nn.Module, function)))
        forward = partial(function, given.x)
        if work.autocast:
            forward = partial(_under_autocast, forward, torch.device(work.device).type)
        if not work.backward:
            return forward
        if work.forward:
            return lambda: _gradients(forward())
        y = forward()
        return lambda: _gradients(y, retain_graph=True)[1:]

    def _gradients(y: Tensor, **options: bool) -> tuple[Tensor | None, ...]:
        for leaf in leaves:
            leaf.grad = None
        y.backward(given.grad, **options)
        return y, *(leaf.grad for leaf in leaves)

    return run_of


def _under_autocast(forward: Run, device: str) -> Tensor:
    with torch.autocast(device, torch.bfloat16):
        return forward()


def _module(module: Callable[..., Any], inputs: LayerInputs, **options: Any) -> Any:
    """The module, on the parameters of the inputs."""
    _, in_features, out_features = inputs.work.shape
    layer = module(in_features, out_features, bias=True, **options).to(inputs.work.device, inputs.work.dtype)
    layer.weight, layer.bias = inputs.weight, inputs.bias
    return layer


def _qatfast(inputs: LayerInputs) -> Function:
    return _module(QATLinear, inputs, config=CONFIGS[inputs.work.config])


def _reference(inputs: LayerInputs, *, compiled: bool = False) -> Function:
    function = reference.qat_linear
    if compiled:
        function = torch.compile(function, dynamic=False)
    return lambda x: function(x, inputs.weight, inputs.bias, config=CONFIGS[inputs.work.config])


def _tutorial(inputs: LayerInputs, module: Callable[..., Any], *, compiled: bool = False) -> Function:
    layer = _module(module, inputs)
    return torch.compile(layer, dynamic=False) if compiled else layer


def _torch_ao(inputs: LayerInputs) -> Function:
    """nn.qat.Linear with a fake quantizer at its input or output, as prepare_qat makes it; the bias stays in float."""
    from torch.ao import quantization as ao
    from torch.ao.nn import qat

    def fused(factory_kwargs: Any = None) -> Any:
        return ao_fake_quantize(fused=True, device=inputs.work.device)

    int8 = inputs.work.config == "int8 config"
    weight = ao.default_per_channel_weight_fake_quant if int8 else fused
    layer = _module(qat.Linear, inputs, qconfig=ao.QConfig(activation=fused, weight=weight))
    return nn.Sequential(fused(), layer) if int8 else nn.Sequential(layer, fused())


def _brevitas(inputs: LayerInputs) -> Function:
    """QuantLinear: weight and output affine, bias symmetric, per tensor; or input affine, weight per output channel.

    The range of input or output is a parameter; the steps in which its first value is collected, slower ones, are over
    after one.
    """
    with _quiet():
        from brevitas import nn as brevitas
        from brevitas import quant

        activation = quant.ShiftedUint8ActPerTensorFloat.let(collect_stats_steps=1)
        if inputs.work.config == "int8 config":
            options = {"weight_quant": quant.Int8WeightPerChannelFloat, "input_quant": activation}
        else:
            options = {
                "weight_quant": quant.ShiftedUint8WeightPerTensorFloat,
                "bias_quant": quant.Int8BiasPerTensorFloatInternalScaling,
                "output_quant": activation,
            }
        return _module(brevitas.QuantLinear, inputs, **options)


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


class _Model(nn.Module):
    """A model that is one linear layer: for packages that convert models."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, input: Tensor) -> Tensor:
        return self.linear(input)


def _nncf(inputs: LayerInputs) -> Function:
    """nncf.quantize: input affine per tensor, weight symmetric per output channel; the ranges are parameters."""
    os.environ.setdefault("NNCF_CI", "1")  # no telemetry
    with _quiet(), torch.enable_grad():
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters

        model = nncf.quantize(
            _Model(_module(nn.Linear, inputs)),
            nncf.Dataset([inputs.x.detach()]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=1,
            advanced_parameters=AdvancedQuantizationParameters(disable_bias_correction=True),
        )
        model.linear.weight, model.linear.bias = inputs.weight, inputs.bias  # it works on a copy
        return model


def _modelopt(inputs: LayerInputs) -> Function:
    """ModelOpt's INT8_DEFAULT_CFG: input symmetric per tensor, weight symmetric per output channel, fixed ranges."""
    with _quiet():
        import modelopt.torch.quantization as mtq

        model = _Model(_module(nn.Linear, inputs))
        return mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda model: model(inputs.x.detach()))


def _integer_product(inputs: LayerInputs) -> Function:
    """torch's product of 8-bit integers: what is left of the layer if nothing else takes time."""
    batch, in_features, out_features = inputs.work.shape
    ones = partial(torch.ones, dtype=torch.int8, device=inputs.work.device)
    x, weight = (ones(size, in_features) for size in (batch, out_features))
    return lambda _: torch._int_mm(x, weight.t())


ALWAYS: dict[str, Provider] = {
    "nn.Linear": lambda inputs: _module(nn.Linear, inputs),
    OURS: _qatfast,
    REFERENCE: _reference,
    COMPILED: partial(_reference, compiled=True),
    "torch.ao qat.Linear": _torch_ao,
    "Brevitas": _brevitas,
}
OF_CONFIG: dict[str, dict[str, Provider]] = {
    "tutorial config": {
        TUTORIAL_LAYER: partial(_tutorial, module=tutorial.Linear),
        "tutorial layer, compiled": partial(_tutorial, module=tutorial.Linear, compiled=True),
    },
    "int8 config": {
        TUTORIAL_LAYER: partial(_tutorial, module=tutorial.Int8Linear),
        "tutorial layer, compiled": partial(_tutorial, module=tutorial.Int8Linear, compiled=True),
        "torchao": _torchao,
        "NNCF": _nncf,
        "ModelOpt": _modelopt,
    },
}
INFERENCE: dict[str, Provider] = {CACHED: _qatfast, INTEGER_PRODUCT: _integer_product}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what other packages say while they are imported."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
