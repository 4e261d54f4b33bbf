"""cached_weights: inside the block each layer quantizes its weight once; outside of it nothing is ever cached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import kernels
from .config import QATConfig
from .functional import fake_quantize, qat_linear

# The layers inside a block, which holds them, each with a weight, its version, what else counts, and what was made.
_cached: dict[nn.Module, tuple[Tensor, int, Any, Any] | None] = {}


@contextmanager
def cached_weights(module: nn.Module) -> Iterator[nn.Module]:
    """Quantizes the weight of each QATLinear inside ``module`` once within the block.

    For evaluation, gradient accumulation and any number of forwards between two optimizer steps; results and gradients
    are the same. A weight that is written inside the block in a way that autograd sees (an optimizer step,
    ``load_state_dict``, any in-place operation) is quantized again; a write through ``.data`` is not seen: keep it
    outside.

    Args:
        module: a QATLinear, or a module that holds some.

    Yields:
        ``module``.

    Raises:
        TypeError: ``module`` is no nn.Module.

    Example:
        >>> from qatfast import QATLinear, cached_weights
        >>> layer = QATLinear(3, 2)
        >>> with torch.no_grad(), cached_weights(layer):
        ...     layer(torch.ones(1, 3)).shape
        torch.Size([1, 2])
    """
    from .linear import QATLinear

    if not isinstance(module, nn.Module):
        raise TypeError(f"cached_weights: expected module to be an nn.Module, got {type(module).__name__}")
    # a layer that an outer block has already stays with that block
    layers = [layer for layer in module.modules() if isinstance(layer, QATLinear) and layer not in _cached]
    for layer in layers:
        _cached[layer] = None
    try:
        yield module
    finally:
        for layer in layers:
            _cached.pop(layer, None)


def serves(layer: nn.Module) -> bool:
    """Whether ``layer`` is in a block; tracers and functorch transforms must not leave their tensors in a cache."""
    return (
        bool(_cached)
        and layer in _cached
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def linear(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None, config: QATConfig) -> Tensor:
    """``qat_linear`` with the cached quantized weight, made now where there is none of this weight as it is."""
    spec = config.weight
    if spec is None or weight.is_inference():  # no version counter
        return qat_linear(input, weight, bias, config=config)
    if config.multiplies_integers(weight.shape[-1]):
        ops = kernels.route(input, weight) if bias is None else kernels.route(input, weight, bias)
        if ops is None:
            return qat_linear(input, weight, bias, config=config)
        integers = _once(layer, weight, config, ops.qat_linear_weight, weight, spec.code)
        return ops.qat_linear_integers(input, weight, bias, integers, config.codes)
    wants_gradient = torch.is_grad_enabled() and weight.requires_grad
    weight_hat, rest = _once(layer, weight, (config, wants_gradient), _quantized, weight, config)
    return qat_linear(input, weight_hat, bias, config=rest)


def _quantized(weight: Tensor, config: QATConfig) -> tuple[Tensor, QATConfig]:
    """The fake-quantized weight, and the config of a layer that has it."""
    spec = config.weight
    assert spec is not None
    weight_hat = fake_quantize(weight, **spec.arguments)
    return weight_hat, dataclasses.replace(config, weight=None)


def _once(layer: nn.Module, weight: Tensor, state: Any, make: Callable[..., Any], *arguments: Any) -> Any:
    """What ``make(*arguments)`` gave in this state for the weight as it is, made now where the layer has none."""
    entry = _cached[layer]
    version = weight._version
    same_state = entry is not None and (entry[2] is state or entry[2] == state)
    if entry is None or entry[0] is not weight or entry[1] != version or not same_state:
        entry = _cached[layer] = (weight, version, state, make(*arguments))
    return entry[3]
