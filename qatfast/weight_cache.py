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

# The layers inside a block, which holds them, each with the weight, its state, and what was made from them.
_cached: dict[nn.Module, tuple[Tensor, Any, Any] | None] = {}


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
        codes = config.codes
        integers = _once(layer, weight, False, lambda: ops.qat_linear_weight(weight, codes[1]))
        return ops.qat_linear_integers(input, weight, bias, integers, *codes)
    wants_gradient = torch.is_grad_enabled() and weight.requires_grad
    weight_hat = _once(
        layer,
        weight,
        wants_gradient,
        lambda: fake_quantize(weight, spec.num_bits, symmetric=spec.symmetric, granularity=spec.granularity),
    )
    return qat_linear(input, weight_hat, bias, config=dataclasses.replace(config, weight=None))


def _once(layer: nn.Module, weight: Tensor, wants_gradient: bool, make: Callable[[], Any]) -> Any:
    """What ``make`` gave for the weight as it is, made now where the layer has none."""
    entry = _cached[layer]
    state = (weight._version, wants_gradient)
    if entry is None or entry[0] is not weight or entry[1] != state:
        entry = _cached[layer] = (weight, state, make())
    return entry[2]
