"""cached_weights, a context manager inside which each layer quantizes its weight once."""

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

from . import arguments, kernels
from .config import QATConfig
from .functional import fake_quantize, qat_linear


@contextmanager
def cached_weights(module: nn.Module) -> Iterator[nn.Module]:
    """Quantizes each weight inside ``module`` once within the block.

    Quantized at each call are the rows that an embedding reads, the projections of attention if query, key and value
    are different tensors, and, in a float product, a weight whose learned or stored scale may need a gradient.

    Use it for evaluation, for gradient accumulation and for several forwards between two optimizer
    steps; results and gradients stay the same. A block applies to the thread or asyncio task that
    opened it; other threads quantize at each call or open their own blocks. Blocks may nest,
    overlap and end in any order. A block frees its copies of quantized weights when it ends;
    nothing is cached outside of blocks.

    A weight is quantized again after it is replaced, or written by an optimizer step (of any
    ``torch.optim.Optimizer``, including fused ones), ``load_state_dict``, ``vector_to_parameters``,
    ``.to()``, an assignment to ``.data``, or any in-place operation that increments its version.

    The cache cannot detect the following writes:

    - in-place operations on ``weight.data`` or on a NumPy view of it
      (``weight.data.copy_(average)`` or ``weight.data += delta``, as in moving averages and adapter
      merges);
    - ``torch.distributed`` collectives that write to the weight;
    - optimizers that write in these ways and do not run the hooks of ``torch.optim.Optimizer``;
    - writes of another process that shares the memory.

    Leave the block and all enclosing blocks before such a write, and open a new one afterwards: a
    new block starts empty.

    Inside a block, a weight is still quantized at each call if it is not a plain ``nn.Parameter``
    (for example parametrized or a DTensor), is an inference tensor, or is gathered by FSDP. The
    same holds in ``torch.compile``, ``torch.export``, ``torch.jit.trace``, ``torch.func``
    transforms, activation checkpointing and other saved-tensor hooks, CUDA graphs, and optimizer
    steps (closures).

    Args:
        module: a quantized layer, or a module that contains quantized layers.

    Yields:
        ``module``.

    Raises:
        TypeError: ``module`` is not an nn.Module.

    Example:
        >>> from qatfast import QATLinear, cached_weights
        >>> layer = QATLinear(3, 2)
        >>> with torch.no_grad(), cached_weights(layer):
        ...     layer(torch.ones(1, 3)).shape
        torch.Size([1, 2])
    """
    arguments.module("cached_weights", "module", module)
    layers = [layer for layer in module.modules() if getattr(type(layer), "_caches_weight", False)]
    # If an enclosing scope has a slot for the layer, both use it.
    scope: _Scope = {layer: _find_slot(layer) or Slot(layer) for layer in layers}
    _count_scopes(1)
    try:
        _scopes.set((*_scopes.get(), scope))
        yield module
    finally:
        scope.clear()  # contexts copied inside the block may still refer to it
        _scopes.set(tuple(other for other in _scopes.get() if other))
        _count_scopes(-1)


class Slot:
    """The cache entry of a layer in the open scopes."""

    __slots__ = ("_of_chain", "entry", "layer", "not_gathered")

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        # The weight, its state, the generation and the config; the quantized weight and the config
        # for the remaining tensors; the storage, kept alive so that its address is not reused. It
        # is a single tuple so that other threads read a consistent entry.
        self.entry: tuple[Tensor, Any, object, QATConfig, Any, QATConfig | None, Any] | None = None
        self.not_gathered: Tensor | None = None  # the last weight known not to be gathered by FSDP2
        self._of_chain: Slot | None = None

    @property
    def of_chain(self) -> Slot:
        """The slot of the layer as the head of a chain, which keeps something else."""
        if self._of_chain is None:
            self._of_chain = Slot(self.layer)
        return self._of_chain


_Scope = dict[nn.Module, Slot]
# The open scopes, one per `cached_weights` block, of the current thread or task.
_scopes: ContextVar[tuple[_Scope, ...]] = ContextVar("qatfast.cached_weights", default=())
# Whether any thread has an open scope; a bool, so that Dynamo's guard on it has only two values.
_is_open = False


def slot_of(layer: nn.Module) -> Slot | None:
    """Returns the slot of ``layer`` in the open scopes of this thread.

    Returns None if no scope has one, and in compiled code.
    """
    return _find_slot(layer) if _is_open and not is_dynamo_compiling() else None


def _find_slot(layer: nn.Module) -> Slot | None:
    for scope in _scopes.get():
        slot = scope.get(layer)
        if slot is not None:
            return slot
    return None


def linear(slot: Slot, input: Tensor, weight: Tensor, bias: Tensor | None, config: QATConfig) -> Tensor:
    """Computes ``qat_linear`` with the cached weight of ``slot``; renews it if it is stale."""
    w, remaining_config = quantized(slot, weight, config)
    if w is None:
        return qat_linear(input, weight, bias, config=config)
    if remaining_config is not None:
        return qat_linear(input, w, bias, config=remaining_config)
    ops = kernels.route(input, weight) if bias is None else kernels.route(input, weight, bias)
    if ops is None:
        return qat_linear(input, weight, bias, config=config)
    return ops.qat_linear_int8(input, weight, bias, w, config.codes)


def int8_weight(slot: Slot, weight: Tensor, config: QATConfig) -> tuple[Tensor, ...]:
    """Returns the cached int8 weight of ``slot``, renewed if it is stale, or () if there is none.

    Its range in ``config`` is Dynamic.
    """
    if not config.uses_int8_gemm(weight.shape[-1]):
        return ()
    w, _ = quantized(slot, weight, config)
    return () if w is None else w


def quantized(slot: Slot, weight: Tensor, config: QATConfig) -> tuple[Any, QATConfig | None]:
    """Returns what :func:`_quantize` does, from the slot unless it is stale."""
    state = _current_state(weight)
    entry = slot.entry
    if entry is not None and _is_valid(entry, weight, state, config):
        return entry[4], entry[5]
    return (None, None) if state is None else _quantize(slot, weight, state, config)


def kept(slot: Slot, weight: Tensor, config: QATConfig, quantize: Callable[[], Any]) -> Any:
    """Returns what ``quantize`` returned for this weight; calls it if that is not known or stale.

    What it returns may serve with and without gradients, and must depend on the weight and the
    config only.
    """
    state = _current_state(weight)
    entry = slot.entry
    if entry is not None and _is_valid(entry, weight, state, config):
        return entry[4]
    if state is None or _is_gathered(slot, weight):
        return quantize()
    generation = _generation
    with torch.inference_mode(False), torch.enable_grad():
        quantized = quantize()
    if not _running_steps:
        slot.entry = (weight, state, generation, config, quantized, None, weight.untyped_storage())
    return quantized


def kept_for(
    slot: Slot, weight: Tensor, config: QATConfig, others: list[Tensor | None], make: Callable[[], Any]
) -> Any:
    """Returns what ``make`` returned for this weight and equal ``others``; calls it if that is not known."""
    holder = kept(slot, weight, config, dict)
    known = holder.get("known")
    if known is not None and all(map(_equal, known[0], others)):
        return known[1]
    with torch.inference_mode(False), torch.no_grad():
        made = make()
        holder["known"] = ([None if tensor is None else tensor.detach().clone() for tensor in others], made)
    return made


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def _current_state(weight: Tensor) -> Any:
    if _has_cuda and weight.is_cuda and torch.cuda.is_current_stream_capturing():
        # The graph would use the cached tensor forever, and a tensor computed during the capture
        # has no values before the graph runs.
        return None
    return _ordinary_state(weight) or _state(weight)


def _is_valid(entry: tuple[Any, ...], weight: Tensor, state: Any, config: QATConfig) -> bool:
    return (
        entry[0] is weight
        and entry[1] == state
        and entry[2] is _generation
        and (entry[3] is config or entry[3] == config)
    )


def _quantize(slot: Slot, weight: Tensor, state: Any, config: QATConfig) -> tuple[Any, QATConfig | None]:
    """Quantizes ``weight`` and stores the result in ``slot``.

    Returns the tensors of an int8 weight and None, or the fake-quantized weight and the config for
    the remaining tensors, or (None, None) if the weight must not be cached. ``state`` and the
    generation are read before the weight, so that a concurrent write makes the entry stale.
    """
    spec = config.weight
    if spec is None or ((slot.not_gathered is not weight or weight.__dict__) and _is_gathered(slot, weight)):
        return None, None
    # uses_int8_gemm(0) holds for any in_features and comes first because reading the shape is slow.
    uses_int8_gemm = config.uses_int8_gemm(0) or config.uses_int8_gemm(weight.shape[-1])
    if torch.is_inference_mode_enabled() or not (uses_int8_gemm or torch.is_grad_enabled()):
        # The cached tensor is used in every mode: it must be an ordinary tensor, with a gradient if
        # the weight has one.
        with torch.inference_mode(False), torch.enable_grad():
            return _quantize(slot, weight, state, config)
    generation = _generation
    quantized: Any
    remaining_config: QATConfig | None = None
    if uses_int8_gemm:
        ops = kernels.extension if type(state) is bytes else kernels.route(weight)
        if ops is None:
            return None, None
        quantized = ops.qat_linear_int8_weight(weight, spec.code)
    else:
        quantized, remaining_config = fake_quantize(weight, **spec.arguments), without_weight(config)
    if not _running_steps:
        storage = weight.untyped_storage()
        slot.entry = (weight, state, generation, config, quantized, remaining_config, storage)
    return quantized, remaining_config


@functools.lru_cache
def without_weight(config: QATConfig) -> QATConfig:
    return dataclasses.replace(config, weight=None)


_has_cuda = torch.version.cuda is not None or torch.version.hip is not None
_ordinary_state: Callable[[Tensor], bytes | None] = (
    kernels.extension.weight_state if kernels.extension is not None else lambda weight: None
)


def _state(weight: Tensor) -> tuple[Any, ...] | None:
    """Returns a value that changes if ``weight`` is written or moved; None if it must not be cached.

    It must not be cached if there is no such value, or in a trace, a functorch transform or
    saved-tensor hooks: these keep the cached tensor, or expect the operators of a layer without a
    cache. The second forward of activation checkpointing may run after the block.
    """
    if (
        type(weight) is not nn.Parameter
        or weight.layout is not torch.strided
        or weight.is_inference()  # inference tensors have no version
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    ):
        return None
    if any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()):
        return None
    modes = _get_current_dispatch_mode_stack()
    if any(getattr(mode, "_mode_key", None) is not None for mode in modes):
        return None  # the mode of fake, functional or traced tensors
    storage = weight.untyped_storage()
    place = (storage._cdata, storage.data_ptr(), weight.storage_offset(), weight.shape, weight.stride())
    # Kernels on another stream may run before the cached tensor is computed.
    stream = torch.cuda.current_stream(weight.device) if weight.is_cuda else None
    return *modes, *place, weight._version, weight.dtype, weight.requires_grad, stream


def _is_gathered(slot: Slot, weight: Tensor) -> bool:
    """Returns whether FSDP or ZeRO-3 rewrites ``weight`` in each forward without a new version."""
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


# Fused optimizers write parameters without a new version, so each step begins a new generation of
# cache entries. Nothing is cached during a step: its closure and its hooks may run forwards before
# and after the writes.
_generation = object()
_running_steps: list[int] = []  # ids of optimizers; if a step raises, its id stays until all scopes end
_hooks: list[tuple[Any, int, Callable[..., None]]] = []  # (hook dict of torch, key, hook)
_is_hooked = False
_open_scopes = 0
# Protects the three variables above. It is reentrant because the garbage collector may end a scope
# anywhere.
_lock = threading.RLock()


def _count_scopes(change: int) -> None:
    """Adds ``change`` to the number of open scopes; registers or removes the optimizer hooks."""
    global _is_hooked, _is_open, _open_scopes
    with _lock:
        _open_scopes += change
        _is_open = _open_scopes > 0
        if _is_open and not _is_hooked:
            _hook_optimizers()
            _is_hooked = True
        # If there are hooks of others, these stay registered: another thread's step may be
        # iterating over the dict, and a removal would break the iteration.
        elif not _is_open:
            _running_steps.clear()
            if all(len(hooks) == 1 for hooks, _, _ in _hooks):
                for hooks, key, _ in _hooks:
                    del hooks[key]
                _is_hooked = False


def _hook_optimizers() -> None:
    global _generation
    _generation = object()
    for hooks, key, hook in _hooks:  # the same keys as before: Dynamo has guards on them
        hooks[key] = hook
    if not _hooks:
        for register, hook in (
            (register_optimizer_step_pre_hook, _begin_step),
            (register_optimizer_step_post_hook, _end_step),
        ):
            handle = register(hook)
            _hooks.append((handle.hooks_dict_ref(), handle.id, hook))


# Other threads read the two variables; the order of the two writes in each hook matters.


def _begin_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    global _generation
    _running_steps.append(id(optimizer))
    _generation = object()


def _end_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    global _generation
    _generation = object()
    if id(optimizer) in _running_steps:  # False if the step began when no scope was open
        _running_steps.remove(id(optimizer))


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()  # a thread that does not exist in the child may hold the old lock


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
