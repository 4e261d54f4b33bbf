"""Providers of the linear layer (nn.Linear, qatfast, the reference, tutorials, other packages) and of whole networks.

All use the same parameters. A package without a layer whose weight, bias and output are affine per tensor is set up as
similar to it as possible; each function says how.
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
from ..modules.linear import QATLinear
from ..weight_cache import cached_weights
from . import tutorial
from .providers import Function, ao_fake_quantize
from .timer import Run
from .workloads import (
    CACHED,
    COMPILED,
    CONFIGS,
    INT8_GEMM,
    OURS,
    REFERENCE,
    TUTORIAL,
    TUTORIAL_LAYER,
    Workload,
    normal,
)


@dataclass(frozen=True)
class LayerInputs:
    """Input, parameters and gradient of the output, which are the same for each provider."""

    workload: Workload
    x: Tensor
    grad: Tensor
    weight: nn.Parameter
    bias: nn.Parameter


Provider = Callable[[LayerInputs], Function]


def inputs(workload: Workload) -> LayerInputs:
    """Returns the tensors of a layer, with weights as large as those of nn.Linear."""
    batch, in_features, out_features = workload.shape
    x = normal(workload, batch, in_features)
    if workload.backward:
        x.requires_grad_()
    bound = in_features**-0.5
    weight = nn.Parameter(normal(workload, out_features, in_features, seed=1).clamp(-3, 3) * (bound / 3))
    bias = nn.Parameter(normal(workload, out_features, seed=2).clamp(-3, 3) * (bound / 3))
    grad = normal(workload, batch, out_features, seed=3)
    return LayerInputs(workload, x, grad.bfloat16() if workload.autocast else grad, weight, bias)


def names(workload: Workload) -> list[str]:
    """Returns the names of the providers of a workload, the baseline first."""
    found = dict.fromkeys([*ALWAYS, *OF_CONFIG[workload.config]])
    if not CONFIGS[workload.config].is_dynamic:
        del found[COMPILED]
    if not workload.backward:
        found[CACHED] = None
        if CONFIGS[workload.config].uses_int8_gemm(workload.shape[1]):
            found[INT8_GEMM] = None
    return list(found)


def runs(workload: Workload, resources: ExitStack) -> Callable[[str], Run]:
    """Sets up a workload and returns a function that gives the call of a provider by its name.

    Args:
        workload: The workload of a linear layer.
        resources: Receives the context managers that have to be open while the calls run.
    """
    given = inputs(workload)
    leaves = (given.x, given.weight, given.bias)

    def run_of(name: str) -> Run:
        function = {**ALWAYS, **OF_CONFIG[workload.config], **INFERENCE}[name](given)
        if name == CACHED:
            resources.enter_context(cached_weights(cast(nn.Module, function)))
        forward = partial(function, given.x)
        if workload.autocast:
            forward = partial(_under_autocast, forward, torch.device(workload.device).type)
        if not workload.backward:
            return forward
        if workload.forward:
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
    """Makes a layer that uses the parameters of the inputs."""
    _, in_features, out_features = inputs.workload.shape
    layer = module(in_features, out_features, bias=True, **options).to(
        inputs.workload.device, inputs.workload.dtype
    )
    layer.weight, layer.bias = inputs.weight, inputs.bias
    return layer


def _qatfast(inputs: LayerInputs) -> QATLinear:
    layer: QATLinear = _module(QATLinear, inputs, config=CONFIGS[inputs.workload.config])
    if not layer.config.is_dynamic:
        layer(inputs.x.detach())  # sets the ranges
    return layer.train(inputs.workload.backward)


def _reference(inputs: LayerInputs, *, compiled: bool = False) -> Function:
    if not CONFIGS[inputs.workload.config].is_dynamic:
        return _reference_of_ranges(inputs)
    function = reference.qat_linear
    if compiled:
        function = torch.compile(function, dynamic=False)
    return lambda x: function(x, inputs.weight, inputs.bias, config=CONFIGS[inputs.workload.config])


def _reference_of_ranges(inputs: LayerInputs) -> Function:
    """The arithmetic of a layer in plain PyTorch, on ranges that a layer of qatfast keeps."""
    layer = _qatfast(inputs)

    def call(x: Tensor) -> Tensor:
        grids = layer._grids(x, lambda: inputs.weight)
        return reference.qat_linear_static(x, inputs.weight, inputs.bias, layer.config, grids)

    return call


def _tutorial(inputs: LayerInputs, module: Callable[..., Any], *, compiled: bool = False) -> Function:
    layer = _module(module, inputs)
    return torch.compile(layer, dynamic=False) if compiled else layer


def _torch_ao(inputs: LayerInputs) -> Function:
    """nn.qat.Linear with a fake quantizer at its input or output, as prepare_qat makes it, of 8 bits.

    The bias stays in float.
    """
    from torch.ao import quantization as ao
    from torch.ao.nn import qat

    def fused(factory_kwargs: Any = None) -> Any:
        return ao_fake_quantize(fused=True, device=inputs.workload.device)

    int8 = inputs.workload.config != "tutorial config"
    weight = ao.default_per_channel_weight_fake_quant if int8 else fused
    layer = _module(qat.Linear, inputs, qconfig=ao.QConfig(activation=fused, weight=weight))
    return nn.Sequential(fused(), layer) if int8 else nn.Sequential(layer, fused())


def _brevitas(inputs: LayerInputs) -> Function:
    """QuantLinear of 8 bits. The range of the input or output is a parameter.

    Weight and output are affine and the bias symmetric, or the input affine and the weight per output channel. The
    first value of the range is collected in one step, which is slower.
    """
    with _quiet():
        from brevitas import nn as brevitas
        from brevitas import quant

        activation = quant.ShiftedUint8ActPerTensorFloat.let(collect_stats_steps=1)
        if inputs.workload.config != "tutorial config":
            options = {"weight_quant": quant.Int8WeightPerChannelFloat, "input_quant": activation}
        else:
            options = {
                "weight_quant": quant.ShiftedUint8WeightPerTensorFloat,
                "bias_quant": quant.Int8BiasPerTensorFloatInternalScaling,
                "output_quant": activation,
            }
        return _module(brevitas.QuantLinear, inputs, **options)


def _torchao(inputs: LayerInputs) -> Function:
    """FakeQuantizedLinear as in its 8-bit recipe: input per token, weight symmetric per channel, output float."""
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
    """A model of one linear layer, for packages that convert models."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, input: Tensor) -> Tensor:
        return self.linear(input)


def _nncf(inputs: LayerInputs) -> Function:
    """nncf.quantize: input affine per tensor, weight symmetric per output channel. The ranges are parameters."""
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
        model.linear.weight, model.linear.bias = inputs.weight, inputs.bias  # nncf has copied them
        return model


def _modelopt(inputs: LayerInputs) -> Function:
    """INT8_DEFAULT_CFG of ModelOpt: input symmetric per tensor, weight symmetric per channel, fixed ranges."""
    with _quiet():
        import modelopt.torch.quantization as mtq

        model = _Model(_module(nn.Linear, inputs))
        return mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda model: model(inputs.x.detach()))


def _int8_gemm(inputs: LayerInputs) -> Function:
    """Product of 8-bit integers in torch, which is the least that the layer has to compute."""
    batch, in_features, out_features = inputs.workload.shape
    ones = partial(torch.ones, dtype=torch.int8, device=inputs.workload.device)
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
    "static config": {},
    "learned config": {},
}
INFERENCE: dict[str, Provider] = {CACHED: _qatfast, INT8_GEMM: _int8_gemm}


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses what other packages print and log while they are imported."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def network_names(workload: Workload) -> list[str]:
    """Returns the names of the networks whose training step is timed, the baseline first."""
    return [workload.baseline, OURS, REFERENCE, TUTORIAL]


def network_runs(workload: Workload, resources: ExitStack) -> Callable[[str], Run]:
    """Returns a function that gives the training step of a network of the study by its name."""
    from ..study import networks, timing

    makers: dict[str, Callable[[], nn.Module]] = {
        workload.baseline: networks.ThreeLayerNet,
        OURS: networks.ThreeLayerNetQAT,
        REFERENCE: partial(networks.FunctionalQATNet, reference.fake_quantize),
        TUTORIAL: partial(networks.FunctionalQATNet, tutorial.FakeQuantize.apply),
    }
    x = normal(workload, *workload.shape, 10)
    labels = torch.arange(len(x), device=workload.device) % 2

    def run_of(name: str) -> Run:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = makers[name]().to(workload.device, workload.dtype)
        return timing.training_step(network, x, labels)

    return run_of
