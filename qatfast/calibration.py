"""The ranges of a whole model: observe, stop, go on, share between processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import arguments, kernels
from .config import FLOAT, OBSERVE, Learned
from .modules.base import QuantizedLayer
from .modules.fake_quantize import FakeQuantize

Model = TypeVar("Model", bound=nn.Module)

_FROZEN = "qatfast: the statistics are frozen"


@contextmanager
def calibrate(model: Model) -> Iterator[Model]:
    """Observes the ranges of a model without training it (post-training quantization).

    In the block the model is in evaluation mode and computes in float, and every range that a
    module keeps observes: MovingAverage becomes the mean of the batches' ranges, MinMax holds them
    all, Learned takes the first batch. A range that has observed before, as in training, counts as the
    mean of those batches. The modes of all modules are restored afterwards.
    ``summary(model)`` then shows the share of elements that each input's range clipped.

    Args:
        model: a model with quantized layers or FakeQuantize modules.

    Yields:
        ``model``.

    Raises:
        TypeError: ``model`` is not an nn.Module.

    Example:
        >>> from qatfast import QATConfig, QATLinear
        >>> layer = QATLinear(8, 4, config=QATConfig.static())
        >>> with torch.no_grad(), calibrate(layer):
        ...     y = layer(torch.randn(16, 8))
        >>> layer.eval()(torch.randn(16, 8)).shape
        torch.Size([16, 4])
    """
    arguments.module("calibrate", "model", model)
    for quantizer in _quantizers(model):
        quantizer._counts = (0, 0)
    with evaluation(model), _mode(model, OBSERVE):
        yield model


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Sets all modules to evaluation mode in the block."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def quantization_disabled(model: Model) -> Iterator[Model]:
    """Computes a model in float in the block, to compare with.

    Nothing is quantized, and no range observes.

    Args:
        model: a model with quantized layers or FakeQuantize modules.

    Yields:
        ``model``.

    Raises:
        TypeError: ``model`` is not an nn.Module.

    Example:
        >>> from qatfast import QATLinear
        >>> layer = QATLinear(8, 4)
        >>> x = torch.randn(16, 8)
        >>> with quantization_disabled(layer):
        ...     torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
        True
    """
    arguments.module("quantization_disabled", "model", model)
    with _mode(model, FLOAT):
        yield model


def freeze(model: Model, *, batch_norm: bool = False) -> Model:
    """Stops the ranges of a model, in training too: they no longer observe, and scales get no gradient.

    Args:
        model: a model with quantized layers or FakeQuantize modules.
        batch_norm: if True, BatchNorm layers also normalize with their stored statistics, which no
            longer change, in training too.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an nn.Module.

    Example:
        >>> from qatfast import QATLinear
        >>> model = freeze(nn.Sequential(QATLinear(8, 4), nn.BatchNorm1d(4)), batch_norm=True)
    """
    arguments.module("freeze", "model", model)
    for quantizer in _quantizers(model):
        quantizer.frozen = True
    if batch_norm:
        for module in _batch_norms(model):
            module._forward_pre_hooks[_FROZEN] = _evaluate  # type: ignore[index]
            module.training = False
    return model


def unfreeze(model: Model) -> Model:
    """Undoes :func:`freeze`: ranges and the statistics of BatchNorm change in training again.

    Args:
        model: a model with quantized layers or FakeQuantize modules.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an nn.Module.

    Example:
        >>> from qatfast import QATLinear
        >>> model = unfreeze(freeze(QATLinear(8, 4)))
    """
    arguments.module("unfreeze", "model", model)
    for quantizer in _quantizers(model):
        quantizer.frozen = False
    for module in _batch_norms(model):
        if module._forward_pre_hooks.pop(_FROZEN, None) is not None:  # type: ignore[call-overload]
            module.training = model.training
    return model


@torch.no_grad()
def sync_ranges(model: nn.Module, group: Any = None) -> None:
    """Makes the ranges of all processes of a group equal.

    Observed ranges become the union of those of all processes, by one all_reduce. A process that
    observed nothing takes the ranges of the others. Learned scales become those of rank 0. Nothing
    happens without a process group.

    Args:
        model: a model with quantized layers or FakeQuantize modules.
        group: a process group of torch.distributed; None for the default one.

    Raises:
        TypeError: ``model`` is not an nn.Module.
    """
    arguments.module("sync_ranges", "model", model)
    if not dist.is_available() or not dist.is_initialized():
        return
    observed: list[FakeQuantize] = []
    learned: list[FakeQuantize] = []
    for quantizer in _quantizers(model):
        (learned if isinstance(quantizer.spec.range, Learned) else observed).append(quantizer)
    # The sign turns each maximum into a minimum.
    signed = [
        (state, sign)
        for quantizer in observed
        for state, sign in (
            (quantizer.running_min, 1),
            (quantizer.running_max, -1),
            (quantizer.num_batches, -1),
        )
    ]
    if signed:
        packed = torch.cat([state.double().flatten() * sign for state, sign in signed])
        dist.all_reduce(packed, dist.ReduceOp.MIN, group=group)
        for (state, sign), values in zip(signed, packed.split([s.numel() for s, _ in signed]), strict=True):
            state.copy_((values * sign + 0.0).reshape(state.shape))
    states = [
        state
        for quantizer in learned
        for state in (quantizer.scale, quantizer.zero_point, quantizer.num_batches)
        if not kernels.is_dtensor(state)  # FSDP: the processes have parts of one scale
    ]
    if states:
        packed = torch.cat([state.double().flatten() for state in states])
        dist.broadcast(packed, dist.get_global_rank(group, 0) if group is not None else 0, group=group)
        for state, values in zip(states, packed.split([s.numel() for s in states]), strict=True):
            state.copy_(values.reshape(state.shape))


def _quantizers(model: nn.Module) -> list[FakeQuantize]:
    """Returns the modules that keep a range."""
    modules = model.modules()
    return [module for module in modules if isinstance(module, FakeQuantize) and module.spec.has_state]


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _evaluate(module: nn.Module, args: Any) -> None:
    """A forward pre-hook: ``train()`` has no lasting effect on the module."""
    module.training = False


@contextmanager
def _mode(model: nn.Module, mode: str) -> Iterator[None]:
    before: dict[Any, str] = {
        module: module._mode
        for module in model.modules()
        if isinstance(module, (FakeQuantize, QuantizedLayer))
    }
    try:
        for module in before:
            module._set_mode(mode)
        yield
    finally:
        for module, previous in before.items():
            module._set_mode(previous)
