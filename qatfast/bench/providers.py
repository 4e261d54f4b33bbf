"""Providers of the elementwise operators: qatfast, its reference, and what else PyTorch has for the same purpose.

A provider is a function that takes the inputs of a workload and returns a function of one tensor. It raises an error
that says why if it cannot run the workload.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import functional, ranges, reference
from ..config import Granularity, MovingAverage, PerChannel, PerGroup, PerTensor, QuantSpec
from . import tutorial
from .timer import Run
from .workloads import (
    COMPILED,
    KI,
    OBSERVED,
    OURS,
    QUANT_MAX,
    QUANT_MIN,
    REFERENCE,
    TRIAD,
    TUTORIAL,
    Inputs,
    Workload,
    inputs,
)

Function = Callable[[Tensor], Any]
Provider = Callable[[Inputs], Function]


def names(workload: Workload) -> list[str]:
    """Returns the names of the providers of a workload, the baseline first."""
    found = providers(workload.op)
    if workload.backward or math.prod(workload.shape) < 16 * KI:
        del found[TRIAD]
    return list(found)


def runs(workload: Workload, resources: ExitStack) -> Callable[[str], Run]:
    """Sets up a workload and returns a function that gives the call of a provider by its name."""
    given = inputs(workload)
    available = providers(workload.op)

    def run_of(name: str) -> Run:
        function = available[name](given)
        if not workload.backward:
            return partial(function, given.x)
        if workload.forward:
            return lambda: _with_gradient(function(given.x))
        if name == workload.baseline:  # autograd's backward of clone copies nothing
            return given.grad.clone
        y = function(given.x)
        return lambda: _with_gradient(y, retain_graph=True)[1:]

    def _with_gradient(y: Tensor, **options: bool) -> tuple[Tensor, ...]:
        return y, *torch.autograd.grad(y, given.x, given.grad, **options)

    return run_of


def providers(op: str) -> dict[str, Provider]:
    """Returns the providers of an operator by name, the baseline first."""
    own = _OBSERVED if op == OBSERVED else _of_operator(op)
    return {"clone": _clone, **own, **OTHERS.get(op, {}), TRIAD: _triad}


def _of_operator(op: str) -> dict[str, Provider]:
    found: dict[str, Provider] = {
        OURS: lambda inputs: partial(getattr(functional, op), **inputs.arguments),
        REFERENCE: lambda inputs: partial(getattr(reference, op), **inputs.arguments),
    }
    if op != "search_qparams":  # whose 80 passes take minutes to compile
        found[COMPILED] = lambda inputs: partial(
            torch.compile(getattr(reference, op), dynamic=False), **inputs.arguments
        )
    return found


def _clone(inputs: Inputs) -> Function:
    """Copies the float tensor, whatever type the operator itself works on: one read and one write of memory."""
    if inputs.x.is_floating_point():
        return Tensor.clone
    return lambda _: inputs.real.clone()


def _triad(inputs: Inputs) -> Function:
    """Computes ``a = b + 2 c`` in place on float32 tensors that move as many bytes as the operator has to."""
    a, b, c = torch.ones(3, inputs.moved // 12, device=inputs.workload.device)
    return lambda _: torch.add(b, c, alpha=2, out=a)


def _rows(x: Tensor, granularity: Granularity) -> tuple[Tensor, int]:
    """Returns a two-dimensional view and its axis of blocks, because torch has blocks along one axis only."""
    if isinstance(granularity, PerChannel):
        return x, granularity.axis
    size = granularity.group_size if isinstance(granularity, PerGroup) else x.shape[-1]
    return x.reshape(-1, size), 0


def _tutorial_qparams(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns the given grid in shapes that broadcast with the input."""
    x, dims = tutorial.blocks(inputs.x, inputs.workload.granularity)
    shape = [
        1 if dims is None or dim - x.dim() in dims or dim in dims else x.shape[dim] for dim in range(x.dim())
    ]
    return inputs.scale.reshape(shape), inputs.zero_point.reshape(shape)


# fake_quantize


def _tutorial_fake_quantize(inputs: Inputs) -> Function:
    if isinstance(inputs.workload.granularity, PerTensor):
        return tutorial.FakeQuantize.apply
    return lambda x: tutorial.FakeQuantize.apply(x, inputs.workload.granularity)


def _aten_qparams(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Chooses scale and zero point as the observers of torch do."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (QUANT_MAX - QUANT_MIN)
    return scale, (QUANT_MIN - torch.round(low / scale)).clamp(QUANT_MIN, QUANT_MAX).to(torch.int32)


def _aten_choose_qparams(inputs: Inputs) -> Function:
    granularity = inputs.workload.granularity
    if isinstance(granularity, PerTensor):
        return lambda x: _aten_qparams(*torch.aminmax(x))
    if inputs.x.dim() > 2:
        dims = tutorial.blocks(inputs.x, granularity)[1] or ()
        return lambda x: _aten_qparams(x.amin(dims), x.amax(dims))

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        rows, axis = _rows(x, granularity)
        return _aten_qparams(*torch.aminmax(rows, dim=1 - axis))

    return call


def _aten_fake_quantize_on(granularity: Granularity) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if isinstance(granularity, PerTensor):
        return lambda x, scale, zero_point: torch.fake_quantize_per_tensor_affine(
            x, scale, zero_point, QUANT_MIN, QUANT_MAX
        )

    def call(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        rows, axis = _rows(x, granularity)
        y = torch.fake_quantize_per_channel_affine(
            rows, scale.flatten(), zero_point.flatten(), axis, QUANT_MIN, QUANT_MAX
        )
        return y.reshape(x.shape)

    return call


def _aten_fake_quantize(inputs: Inputs) -> Function:
    choose = _aten_choose_qparams(inputs)
    fake_quantize = _aten_fake_quantize_on(inputs.workload.granularity)

    def call(x: Tensor) -> Tensor:
        return fake_quantize(x, *choose(x.detach()))

    return call


def ao_fake_quantize(
    granularity: Granularity = PerTensor(), axis: int = 0, *, fused: bool = False, device: str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """Returns the 8-bit affine module of torch.ao, which keeps a moving average of the range."""
    from torch.ao import quantization as ao

    per_tensor = isinstance(granularity, PerTensor)
    scheme = torch.per_tensor_affine if per_tensor else torch.per_channel_affine
    observer = ao.MovingAverageMinMaxObserver if per_tensor else ao.MovingAveragePerChannelMinMaxObserver
    module = ao.FusedMovingAvgObsFakeQuantize if fused else ao.FakeQuantize
    options = {} if per_tensor else {"ch_axis": axis}
    return module(
        observer, quant_min=QUANT_MIN, quant_max=QUANT_MAX, dtype=torch.quint8, qscheme=scheme, **options
    ).to(device)


def _ao_fake_quantize(inputs: Inputs) -> Function:
    granularity = inputs.workload.granularity
    if isinstance(granularity, PerTensor):
        return ao_fake_quantize(device=inputs.workload.device)
    axis = _rows(inputs.x, granularity)[1]
    module = ao_fake_quantize(granularity, axis, device=inputs.workload.device)
    return lambda x: module(_rows(x, granularity)[0]).reshape(x.shape)


def _ao_fused_op(inputs: Inputs) -> Function:
    granularity = inputs.workload.granularity
    per_tensor = isinstance(granularity, PerTensor)
    rows, axis = (inputs.x, 0) if per_tensor else _rows(inputs.x, granularity)
    count = 1 if per_tensor else rows.shape[axis]
    device = inputs.workload.device
    on = torch.ones(1, dtype=torch.int64, device=device)
    low, high = (torch.full((count,), value, device=device) for value in (float("inf"), float("-inf")))
    scale = torch.ones(count, device=device)
    zero_point = torch.zeros(count, dtype=torch.int32, device=device)
    state = (on, on, low, high, scale, zero_point, 0.01, QUANT_MIN, QUANT_MAX, axis, not per_tensor, False)
    op = torch.fused_moving_avg_obs_fake_quant
    if per_tensor:
        return lambda x: op(x, *state)
    return lambda x: op(_rows(x, granularity)[0], *state).reshape(x.shape)


# fake_quantize_observed


def _reference_observed(
    x: Tensor, running_min: Tensor, running_max: Tensor, num_batches: Tensor, spec: QuantSpec
) -> tuple[Tensor]:
    constant = spec.averaging_constant
    grid = reference.observe_range(x, running_min, running_max, num_batches, constant, **spec.arguments)
    return (reference.fake_quantize_affine(x, *grid, QUANT_MIN, QUANT_MAX),)


def _observed(inputs: Inputs, function: Callable[..., tuple[Tensor, ...]]) -> Function:
    """Keeps the range, which the first call sets."""
    device = inputs.workload.device
    running = (torch.zeros((), device=device), torch.zeros((), device=device))
    state = (*running, torch.zeros((), dtype=torch.int64, device=device))
    spec = QuantSpec(range=MovingAverage())
    return lambda x: function(x, *state, spec=spec)[0]


_OBSERVED: dict[str, Provider] = {
    OURS: partial(_observed, function=ranges.fake_quantize_observed),
    REFERENCE: partial(_observed, function=_reference_observed),
    COMPILED: lambda inputs: _observed(inputs, torch.compile(_reference_observed, dynamic=False)),
}


# fake_quantize_affine


def _tutorial_fake_quantize_affine(inputs: Inputs) -> Function:
    qparams = _tutorial_qparams(inputs)
    return lambda x: tutorial.FakeQuantize.apply(x, inputs.workload.granularity, qparams)


def _aten_fake_quantize_affine(inputs: Inputs) -> Function:
    fake_quantize = _aten_fake_quantize_on(inputs.workload.granularity)
    return lambda x: fake_quantize(x, inputs.scale, inputs.zero_point)


def _ao_fake_quantize_affine(inputs: Inputs) -> Function:
    granularity = inputs.workload.granularity
    axis = 0 if isinstance(granularity, PerTensor) else _rows(inputs.x, granularity)[1]
    module: Any = ao_fake_quantize(granularity, axis, device=inputs.workload.device)
    module.disable_observer()
    module.scale, module.zero_point = inputs.scale.reshape(-1), inputs.zero_point.reshape(-1)
    if isinstance(granularity, PerTensor):
        return module
    return lambda x: module(_rows(x, granularity)[0]).reshape(x.shape)


# fake_quantize_learned


def _aten_learnable(inputs: Inputs) -> Function:
    """The learnable op of torch.ao, which also computes the gradient of the zero point."""
    granularity = inputs.workload.granularity
    scale = inputs.arguments["scale"].reshape(-1)
    zero_point = inputs.zero_point.to(scale.dtype).reshape(-1)
    if isinstance(granularity, PerTensor):
        op = torch._fake_quantize_learnable_per_tensor_affine
        return lambda x: op(x, scale, zero_point, QUANT_MIN, QUANT_MAX, 1.0)

    def call(x: Tensor) -> Tensor:
        rows, axis = _rows(x, granularity)
        op = torch._fake_quantize_learnable_per_channel_affine
        return op(rows, scale, zero_point, axis, QUANT_MIN, QUANT_MAX, 1.0).reshape(x.shape)

    return call


# choose_qparams


def _tutorial_choose_qparams(inputs: Inputs) -> Function:
    return lambda x: tutorial.choose_qparams(*tutorial.blocks(x, inputs.workload.granularity))


def _ao_observer(inputs: Inputs) -> Function:
    from torch.ao import quantization as ao

    granularity = inputs.workload.granularity
    range_ = {"quant_min": QUANT_MIN, "quant_max": QUANT_MAX, "dtype": torch.quint8}
    if isinstance(granularity, PerTensor):
        observer = ao.MinMaxObserver(qscheme=torch.per_tensor_affine, **range_)
    else:
        axis = _rows(inputs.x, granularity)[1]
        observer = ao.PerChannelMinMaxObserver(ch_axis=axis, qscheme=torch.per_channel_affine, **range_)
    observer.to(inputs.workload.device)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        observer(x if isinstance(granularity, PerTensor) else _rows(x, granularity)[0])
        return observer.calculate_qparams()

    return call


# quantize, dequantize


def _tutorial_quantize(inputs: Inputs) -> Function:
    qparams = _tutorial_qparams(inputs)
    granularity = inputs.workload.granularity
    return lambda x: tutorial.quantize(tutorial.blocks(x, granularity)[0], *qparams).to(torch.uint8)


def _aten_quantize(inputs: Inputs) -> Function:
    granularity = inputs.workload.granularity
    scale, zero_point = inputs.scale.flatten(), inputs.zero_point.flatten()
    if isinstance(granularity, PerTensor):
        return lambda x: torch.quantize_per_tensor(x, inputs.scale, inputs.zero_point, torch.quint8)

    def call(x: Tensor) -> Tensor:
        rows, axis = _rows(x, granularity)
        return torch.quantize_per_channel(rows, scale, zero_point, axis, torch.quint8)

    return call


def _tutorial_dequantize(inputs: Inputs) -> Function:
    qparams = _tutorial_qparams(inputs)
    granularity, dtype = inputs.workload.granularity, inputs.workload.dtype
    return lambda x: tutorial.dequantize(tutorial.blocks(x, granularity)[0].to(dtype), *qparams)


def _aten_dequantize(inputs: Inputs) -> Function:
    packed = _aten_quantize(inputs)(inputs.real)
    return lambda _: packed.dequantize()


OTHERS: dict[str, dict[str, Provider]] = {
    "fake_quantize": {
        TUTORIAL: _tutorial_fake_quantize,
        "aten ops": _aten_fake_quantize,
        "torch.ao FakeQuantize": _ao_fake_quantize,
        "torch.ao fused op": _ao_fused_op,
    },
    "fake_quantize_affine": {
        TUTORIAL: _tutorial_fake_quantize_affine,
        "aten op": _aten_fake_quantize_affine,
        "torch.ao FakeQuantize": _ao_fake_quantize_affine,
    },
    OBSERVED: {"torch.ao FakeQuantize": _ao_fake_quantize, "torch.ao fused op": _ao_fused_op},
    "fake_quantize_learned": {"aten learnable op": _aten_learnable},
    "choose_qparams": {
        TUTORIAL: _tutorial_choose_qparams,
        "aten ops": _aten_choose_qparams,
        "torch.ao observer": _ao_observer,
    },
    "quantize": {TUTORIAL: _tutorial_quantize, "aten op": _aten_quantize},
    "dequantize": {TUTORIAL: _tutorial_dequantize, "aten op": _aten_dequantize},
}
