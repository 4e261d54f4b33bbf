"""Providers of the convolution: nn.Conv2d, qatfast and torch.ao, with the same parameters, channels-last.

All but nn.Conv2d quantize the input with a moving average of its range and the weight per output channel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QATConfig
from ..modules.conv import QATConv2d
from ..weight_cache import cached_weights
from .providers import Function, ao_fake_quantize
from .timer import Run
from .workloads import CACHED, OURS, ConvolutionShape, Workload, normal

TORCH_AO = "torch.ao qat.Conv2d"


def names(workload: Workload) -> list[str]:
    """Returns the names of the providers of a workload, the baseline first."""
    return [workload.baseline, OURS, *([] if workload.backward else [CACHED]), TORCH_AO]


def runs(workload: Workload, resources: ExitStack) -> Callable[[str], Run]:
    """Sets up a workload and returns a function that gives the call of a provider by its name.

    Args:
        workload: The workload of a convolution.
        resources: Receives the context managers that have to be open while the calls run.
    """
    shape = ConvolutionShape(*workload.shape)
    x = normal(workload, shape.batch, shape.in_channels, shape.size, shape.size)
    if workload.backward:
        x.requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Conv2d(*shape.arguments, groups=shape.groups, padding=shape.kernel_size // 2)
        layer = layer.to(workload.device, workload.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        grad = torch.randn_like(layer(x.detach()))
    leaves = (x, *layer.parameters())

    def run_of(name: str) -> Run:
        function = {workload.baseline: _float, OURS: _qatfast, CACHED: _qatfast, TORCH_AO: _torch_ao}[name](
            layer
        )
        if workload.backward:
            return lambda: _gradients(function(x))
        function.train()(x)  # observes the range
        if name == CACHED:
            resources.enter_context(cached_weights(function))
        return partial(function.eval(), x)

    def _gradients(y: Tensor) -> tuple[Tensor | None, ...]:
        for leaf in leaves:
            leaf.grad = None
        y.backward(grad)
        return y, *(leaf.grad for leaf in leaves)

    return run_of


def _float(layer: nn.Conv2d) -> Any:
    return layer


def _qatfast(layer: nn.Conv2d) -> Any:
    return QATConv2d.from_float(layer, config=QATConfig.static())


def _torch_ao(layer: nn.Conv2d) -> Any:
    """nn.qat.Conv2d behind a fake quantizer of its input, as prepare_qat makes it."""
    from torch.ao import quantization as ao
    from torch.ao.nn import qat

    fused: Function = partial(ao_fake_quantize, fused=True, device=str(layer.weight.device))
    config = ao.QConfig(activation=fused, weight=ao.default_per_channel_weight_fake_quant)
    layer.qconfig = config  # type: ignore[assignment]
    convolution = qat.Conv2d.from_float(layer)
    del layer.qconfig
    convolution.weight, convolution.bias = layer.weight, layer.bias
    return nn.Sequential(fused(), convolution)  # type: ignore[call-arg]
