"""cached_weights: inside the block each layer quantizes its weight once; outside of it nothing is ever cached."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import kernels
from .config import QATConfig
from .functional import fake_quantize, qat_linear


@contextmanager
def cached_weights(module: nn.Module) -> Iterator[nn.Module]:
    """Quantizes the weight of each QATLinear inside ``module`` once within the block.

    For evaluation, gradient accumulation and any number of forwards between two optimizer steps; results and gradients
    are the same. The block serves the thread or asyncio task that opened it; other threads quantize at each call or
    open blocks of their own. Blocks may nest, overlap and end in any order; what a block keeps, a copy of each
    quantized weight, ends with it.

    A weight is quantized again after it was replaced or written by an optimizer step (of any ``torch.optim.Optimizer``,
    fused ones too), ``load_state_dict``, ``vector_to_parameters``, ``.to()``, another tensor in ``.data``, or any
    in-place operation that autograd counts.

    Some writes into a weight's memory cannot be seen: an in-place operation on ``weight.data`` or on a NumPy view of it
    (``weight.data.copy_(average)``, ``weight.data += delta``, as in moving averages and adapter merges), a collective
    of ``torch.distributed`` into it, an optimizer that writes so and does not run the hooks of
    ``torch.optim.Optimizer``, and another process that shares the memory. Leave the block before such a write, and the
    blocks around it, and enter it again afterwards: a new block starts with nothing.

    The weight is quantized at each call, as without the block, if it is not a plain ``nn.Parameter`` (a parametrized
    one, a DTensor), is an inference tensor or is gathered by FSDP; and so it is under ``torch.compile``,
    ``torch.export``, ``torch.jit.trace``, ``torch.func`` transforms, activation checkpointing and other saved-tensor
    hooks, in CUDA graphs, and inside an optimizer step (closures).

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
    if not isinstance(module, nn.Module):
        raise TypeError(f"cached_weights: expected module to be an nn.Module, got {type(module).__name__}")
    # a layer that an outer block has already stays with that block
    layers = [layer for layer in module.modules() if getattr(type(layer), "_caches_weight", False)]
    block: _Block = {layer: _held(layer) or _Slot(layer) for layer in layers}
    _count_blocks(1)
    try:
        _blocks.set((*_blocks.get(), block))
        yield module
    finally:
        block.clear()  # for each context that has the block
        _blocks.set(tuple(other for other in _blocks.get() if other))
        _count_blocks(-1)


class _Slot:
    """What open blocks keep for a layer."""

    __slots__ = ("entry", "layer", "not_gathered")

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        # the weight, its state, the generation, the config; what was made and the rest of the config; the storage, kept
        # so that no other takes its address. One tuple, so that each thread reads what belongs together.
        self.entry: tuple[Tensor, Any, object, QATConfig, Any, QATConfig | None, Any] | None = None
        self.not_gathered: Tensor | None = None  # the last weight that FSDP2 was found not to gather


_Block = dict[nn.Module, _Slot]
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar(
    "qatfast.cached_weights", default=()
)  # of this thread or task
_is_open = False  # whether any thread has a block; a bool, so that Dynamo's guard on it has two values


def slot_of(layer: nn.Module) -> _Slot | None:
    """What the open blocks of this thread keep for ``layer``; None if there are none, and in compiled code."""
    return _held(layer) if _is_open and not is_dynamo_compiling() else None


def _held(layer: nn.Module) -> _Slot | None:
    for block in _blocks.get():
        slot = block.get(layer)
        if slot is not None:
            return slot
    return None


def linear(slot: _Slot, input: Tensor, weight: Tensor, bias: Tensor | None, config: QATConfig) -> Tensor:
    """``qat_linear`` with the quantized weight of ``slot``, made now if there is none of this weight as it is."""
    state = _ordinary_state(weight) or _state(weight)
    if _has_cuda and weight.is_cuda and torch.cuda.is_current_stream_capturing():
        state = None  # a graph would keep what is cached, and what is made in it is not there before it runs
    entry = slot.entry
    if (
        entry is not None
        and entry[0] is weight
        and entry[1] == state
        and entry[2] is _generation
        and (entry[3] is config or entry[3] == config)
    ):
        made, rest = entry[4], entry[5]
    else:
        made, rest = (None, None) if state is None else _make(slot, weight, state, config)
    if made is None:
        return qat_linear(input, weight, bias, config=config)
    if rest is not None:
        return qat_linear(input, made, bias, config=rest)
    ops = kernels.route(input, weight) if bias is None else kernels.route(input, weight, bias)
    if ops is None:
        return qat_linear(input, weight, bias, config=config)
    return ops.qat_linear_int8(input, weight, bias, made, config.codes)


def _make(slot: _Slot, weight: Tensor, state: Any, config: QATConfig) -> tuple[Any, QATConfig | None]:
    """The weight's integers and None, or the fake-quantized weight and the config of a layer that has it, for ``slot``
    too; (None, None) if this weight must not be cached. ``state`` and generation are read before the weight is, so that
    a write meanwhile leaves an entry that is out of date.
    """
    spec = config.weight
    if spec is None or ((slot.not_gathered is not weight or weight.__dict__) and _is_gathered(slot, weight)):
        return None, None
    # 0: whatever the number of features; asked first, as the shape costs more than all else here
    has_integers = config.uses_int8_gemm(0) or config.uses_int8_gemm(weight.shape[-1])
    if torch.is_inference_mode_enabled() or not (has_integers or torch.is_grad_enabled()):
        # what is made serves all calls: an ordinary tensor, with a gradient if the weight has one
        with torch.inference_mode(False), torch.enable_grad():
            return _make(slot, weight, state, config)
    generation = _generation
    made: Any
    rest: QATConfig | None = None
    if has_integers:
        ops = kernels.extension if type(state) is bytes else kernels.route(weight)
        if ops is None:
            return None, None
        made = ops.qat_linear_int8_weight(weight, spec.code)
    else:
        made, rest = fake_quantize(weight, **spec.arguments), _without_weight(config)
    if not _running_steps:
        slot.entry = (weight, state, generation, config, made, rest, weight.untyped_storage())
    return made, rest


@functools.lru_cache
def _without_weight(config: QATConfig) -> QATConfig:
    return dataclasses.replace(config, weight=None)


_has_cuda = torch.version.cuda is not None or torch.version.hip is not None
_ordinary_state: Callable[[Tensor], bytes | None] = (
    kernels.extension.weight_state if kernels.extension is not None else lambda weight: None
)


def _state(weight: Tensor) -> tuple[Any, ...] | None:
    """What tells whether ``weight`` is as it was; None if nothing tells, or if the call is part of something that would
    keep the cached tensor or expects the operators of a layer without one: a trace, a functorch transform, saved-tensor
    hooks (those of checkpointing, whose second forward may come after the block).
    """
    if (
        type(weight) is not nn.Parameter
        or weight.layout is not torch.strided
        or weight.is_inference()  # has no version
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    ):
        return None
    if any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()):
        return None
    modes = _get_current_dispatch_mode_stack()
    if any(getattr(mode, "_mode_key", None) is not None for mode in modes):
        return None  # of fake, functional or traced tensors
    storage = weight.untyped_storage()
    place = (storage._cdata, storage.data_ptr(), weight.storage_offset(), weight.shape, weight.stride())
    # the work of another stream may come before that which makes the result
    stream = torch.cuda.current_stream(weight.device) if weight.is_cuda else None
    return *modes, *place, weight._version, weight.dtype, weight.requires_grad, stream


def _is_gathered(slot: _Slot, weight: Tensor) -> bool:
    """Whether FSDP or ZeRO-3 write ``weight`` anew in each forward, under the same version."""
    if "_fsdp_flattened" in weight.__dict__ or "ds_id" in weight.__dict__:
        return True
    if slot.not_gathered is weight:
        return False
    composables = sys.modules.get("torch.distributed._composable_state")
    if composables is not None:
        from torch.distributed.fsdp import FSDPModule

        states = list(composables._module_state_mapping)
        roots: list[Any] = [root for root in states if isinstance(root, FSDPModule)]
        if any(module is slot.layer for root in roots for module in root.modules()):
            return True
    slot.not_gathered = weight
    return False


# Fused optimizers write parameters and leave their versions: what was made before a step is of another generation.
# Inside a step, whose closure and hooks may run forwards before and after the writes, nothing is kept.
_generation = object()
_running_steps: list[int] = []  # ids of optimizers; a step that raises stays until all blocks have ended
_hooks: list[tuple[Any, int, Callable[..., None]]] = []  # torch's dict of hooks, the key in it, the hook
_is_hooked = False
_open_blocks = 0
_lock = threading.RLock()  # of the three above; reentrant, as a block that is garbage ends anywhere


def _count_blocks(change: int) -> None:
    """Has optimizers tell of their steps while any block is open."""
    global _is_hooked, _is_open, _open_blocks
    with _lock:
        _open_blocks += change
        _is_open = _open_blocks > 0
        if _is_open and not _is_hooked:
            _hook_optimizers()
            _is_hooked = True
        # another thread's step may be iterating over other hooks, which a removal would break: ours stay with them
        elif not _is_open:
            _running_steps.clear()
            if all(len(hooks) == 1 for hooks, _, _ in _hooks):
                for hooks, key, _ in _hooks:
                    del hooks[key]
                _is_hooked = False


def _hook_optimizers() -> None:
    global _generation
    _generation = object()
    for hooks, key, hook in _hooks:  # with the same keys, on which Dynamo has guards
        hooks[key] = hook
    if not _hooks:
        for register, hook in (
            (register_optimizer_step_pre_hook, _begin_step),
            (register_optimizer_step_post_hook, _end_step),
        ):
            handle = register(hook)
            _hooks.append((handle.hooks_dict_ref(), handle.id, hook))


# The order of the two writes of each hook counts for the threads that read them.


def _begin_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    global _generation
    _running_steps.append(id(optimizer))
    _generation = object()


def _end_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    global _generation
    _generation = object()
    if id(optimizer) in _running_steps:  # else it began when no block was open
        _running_steps.remove(id(optimizer))


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()  # a thread that the child does not have may hold the old one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
