"""A whole model: prepare, summary, unused_layers."""

from __future__ import annotations

import difflib
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from . import checks
from .arguments import integer
from .config import QATConfig, QuantSpec
from .modules.linear import (
    CONTAINERS,
    QATLinear,
    check_parameters,
    open_blocks,
    share_hooks,
    why_not_from_float,
)

# Modules of PyTorch that read the weight of an nn.Linear that they hold, and do not call it.
_READERS: tuple[type[nn.Module], ...] = tuple(
    getattr(nn, name) for name in ("MultiheadAttention", "LinearCrossEntropyLoss") if hasattr(nn, name)
)
_READ = "its parent reads .weight"
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_PREPARED = "prepared"


def prepare(
    model: nn.Module,
    config: QATConfig | None = None,
    *,
    layers: Mapping[str, QATConfig | None] | None = None,
    edges: int | None = 8,
) -> nn.Module:
    """Puts a QATLinear in the place of each nn.Linear of a model, on the same parameters.

    The model changes in place; parameters, ``state_dict`` keys, hooks, training mode, tied weights and all names of a
    layer that is used twice stay, so an optimizer made before goes on. Nothing changes where it raises.

    Only what is exactly an nn.Linear is replaced; a QATLinear that is there already stays as it is. ``summary(model)``
    says what stays in float and why. A layer whose weight its parent reads without calling the layer (as some attention
    modules do) stays in float although it was replaced: run the model once inside :func:`unused_layers`, which names
    such layers.

    Args:
        model: in float. Prepare it before torch.compile of a single layer, before DTensor or FSDP shard it; DDP may be
            around it already.
        config: of each layer; None means ``QATConfig.dynamic()``.
        layers: ``{pattern: config}`` for layers that get another config, or None to leave them in float. Patterns are
            those of ``fnmatch`` on dotted names (``"decoder.*"``); the last one that matches a layer wins.
        edges: the first and the last quantized layer, in the order of ``named_modules``, get this number of bits
            wherever ``config`` has fewer, 2 to 16; None: no exception. A layer that ``layers`` names keeps its config.

    Returns:
        ``model``, or the new layer if ``model`` itself is an nn.Linear.

    Raises:
        TypeError: an argument has the wrong type, or ``model`` holds layers that ``prepare`` made.
        ValueError: a pattern matches no layer, or gives one a config that does not fit it; ``edges`` is not from 2 to
            16; the model is sharded by FSDP, or a layer is wrapped by torch.compile.

    Example:
        >>> model = prepare(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), layers={"2": None})
        >>> [type(layer).__name__ for layer in model]
        ['QATLinear', 'ReLU', 'Linear']
    """
    _check_arguments(model, config, layers, edges)
    found = _find(model)
    _check_state(model, found)
    chosen = dict(layers or {})
    plan, notes = _plan(found, QATConfig.dynamic() if config is None else config, chosen, edges)
    new: dict[nn.Module, nn.Module] = {
        linear: QATLinear.from_float(linear, config=its_config) for linear, its_config in plan.items()
    }
    for linear, layer in new.items():
        share_hooks(linear, layer)
        vars(layer)["_qatfast_note"] = _PREPARED
    for module in list(model.modules()):
        _replace_in(module, new)
    for linear, reason in notes.items():
        vars(linear)["_qatfast_note"] = reason
    if not plan and None not in chosen.values() and not any(map(_is_quantized, found)):
        warnings.warn(
            f"prepare: no layer of {type(model).__name__} is quantized; print(qatfast.summary(model)) says why",
            UserWarning,
            stacklevel=2,
        )
    return new.get(model, model)


class SummaryRow(NamedTuple):
    """A layer in :func:`summary`.

    ``name`` is the dotted one (its first, if it has several), ``kind`` its class; ``weight`` and ``input`` say how each
    is quantized, or "float"; ``range`` where the scales come from; ``bytes`` is what its parameters take as integers
    with their scales, or in float; ``reason`` is why the layer is in float. ``chain`` and ``clipped`` are None.
    """

    name: str
    kind: str
    weight: str
    input: str
    chain: str | None
    range: str | None
    clipped: float | None
    bytes: int
    reason: str | None


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` returns: ``rows``, and a table of them as ``str``."""

    rows: tuple[SummaryRow, ...]

    def __str__(self) -> str:
        header = ("layer", "kind", "input", "weight", "range", "bytes", "in float because")
        cells = [
            (
                row.name or "(root)",
                row.kind,
                row.input,
                row.weight,
                row.range or "",
                f"{row.bytes:,}",
                row.reason or "",
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        lines = [
            "  ".join(
                text.rjust(width) if title == "bytes" else text.ljust(width)
                for title, text, width in zip(header, line, widths, strict=True)
            ).rstrip()
            for line in (header, *cells)
        ]
        quantized = sum(row.reason is None for row in self.rows)
        lines.append(f"{quantized} of {len(self.rows)} layers are quantized.")
        if quantized:
            lines[-1] += " Whether each of them runs: run the model once inside qatfast.unused_layers."
        return "\n".join(lines)

    __repr__ = __str__


def summary(model: nn.Module) -> Summary:
    """Which layers of a model are quantized and how, and which stay in float and why.

    A row for each quantized layer and for each module that has a weight of its own to multiply by; normalization layers
    and modules without weights have none. The model may be prepared or not.

    Args:
        model: any module.

    Returns:
        A :class:`Summary`: ``print`` it, or read its ``rows``.

    Raises:
        TypeError: ``model`` is no nn.Module.

    Example:
        >>> print(summary(prepare(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)))))
        layer  kind       input                   weight                         range    bytes  in float because
        0      QATLinear  8-bit affine per token  8-bit symmetric per channel 0  dynamic    256
        2      QATLinear  8-bit affine per token  8-bit symmetric per channel 0  dynamic     48
        2 of 2 layers are quantized. Whether each of them runs: run the model once inside qatfast.unused_layers.
    """
    _check_module("summary", model)
    return Summary(tuple(_row(each) for each in _find(model)))


_lock = threading.Lock()


@contextmanager
def unused_layers(model: nn.Module) -> Iterator[list[str]]:
    """Names the quantized layers of a model that did not run within the block.

    Such a layer stays in float, and nothing else says so: its parent reads the weight without calling the layer, or
    does not use it at all. Run the model once inside the block, as it will be trained and once more as it will be
    evaluated. A compiled model is compiled once more for the block.

    Args:
        model: holds quantized layers.

    Yields:
        A list that is filled when the block ends, also by an exception: the dotted names (the first one of a layer that
        has several) of the layers whose ``forward`` did not run inside the block, in any thread.

    Raises:
        TypeError: ``model`` is no nn.Module.

    Example:
        >>> model = prepare(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2)))
        >>> with unused_layers(model) as unused:
        ...     y = model[0](torch.ones(1, 8))
        >>> unused
        ['1']
    """
    _check_module("unused_layers", model)
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, QATLinear)}
    ran: set[nn.Module] = set()
    unused: list[str] = []
    with _lock:
        open_blocks.append(ran)
    try:
        yield unused
    finally:
        with _lock:  # not remove(): two sets may be equal
            open_blocks[:] = [each for each in open_blocks if each is not ran]
        unused.extend(name for layer, name in names.items() if layer not in ran)


def _check_module(op: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected model to be an nn.Module, got {model!r}")


def _check_arguments(model: Any, config: Any, layers: Any, edges: Any) -> None:
    _check_module("prepare", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "prepare: expected model to be an nn.Module in Python, got a ScriptModule; prepare it before "
            "torch.jit.script or torch.jit.trace"
        )
    if config is not None and not isinstance(config, QATConfig):
        raise TypeError(
            f"prepare: expected config to be a QATConfig or None, got {config!r}; for a number of bits write "
            "QATConfig.dynamic(num_bits)"
        )
    if layers is not None and not isinstance(layers, Mapping):
        raise TypeError(
            f"prepare: expected layers to be a dict from patterns to a QATConfig or None, got {layers!r}"
        )
    for pattern, value in (layers or {}).items():
        if not isinstance(pattern, str):
            raise TypeError(f"prepare: expected the patterns of layers to be strings, got {pattern!r}")
        if value is not None and not isinstance(value, QATConfig):
            raise TypeError(f"prepare: expected layers[{pattern!r}] to be a QATConfig or None, got {value!r}")
    if edges is not None and not 2 <= integer("prepare", "edges", edges) <= 16:
        raise ValueError(f"prepare: expected edges to be from 2 to 16 bits or None, got {edges}")


class _Found(NamedTuple):
    """A module that multiplies by a weight: its names, and why it is not an nn.Linear that could be quantized."""

    module: nn.Module
    names: list[str]
    obstacle: str | None


def _find(model: nn.Module) -> list[_Found]:
    """The modules of a model that multiply, in the order of ``named_modules``."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" not in name.split("."):  # these belong to the module that they parametrize
            names.setdefault(module, []).append(name)
    read = {child for module in names if isinstance(module, _READERS) for child in module.children()}
    return [
        _Found(module, its_names, _why_float(module, module in read))
        for module, its_names in names.items()
        if isinstance(module, nn.Linear) or _weights(module)
    ]


def _weights(module: nn.Module) -> list[str]:
    """The names of a module's own parameters of two dimensions and more, or not yet initialized."""
    if isinstance(module, _NORMS):
        return []
    if is_parametrized(module):
        return list(module.parametrizations)  # type: ignore[arg-type]
    own = module.named_parameters(recurse=False)
    return [name for name, parameter in own if is_lazy(parameter) or parameter.dim() >= 2]


def _why_float(module: nn.Module, is_read: bool) -> str | None:
    """Why the module stays in float whatever the config is; None for what prepare quantizes, and what is quantized."""
    kind = type(module)
    if is_read or kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return _READ
    if isinstance(module, QATLinear):
        return None
    if isinstance(module, nn.Linear):
        obstacle = why_not_from_float(module)
        if obstacle:
            return obstacle.reason
        return None if kind is nn.Linear else f"{kind.__name__} is a subclass of nn.Linear"
    if kind.__module__.startswith("torch.nn."):
        return f"no quantized layer for {kind.__name__} yet"
    return f"has weights of its own: {', '.join(_weights(module))}"


def _check_state(model: nn.Module, found: list[_Found]) -> None:
    """The model is not prepared, sharded or compiled so that a replaced layer would not run."""
    for each in found:
        if vars(each.module).get("_qatfast_note") == _PREPARED:
            raise TypeError(
                f"prepare: expected a model that is not prepared, got one whose layer {each.names[0]!r} prepare made; "
                "start from the float model, or set the .config of its layers"
            )
    fsdp, dynamo = sys.modules.get("torch.distributed.fsdp"), sys.modules.get("torch._dynamo.eval_frame")
    for name, module in model.named_modules():
        if fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
            raise ValueError(
                f"prepare: expected a model that FSDP does not manage, got {name or 'the root'!r}, which it does; "
                "prepare the model first, then shard it"
            )
        if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
            inner = next(iter(module.children()), None)
            if type(inner) is nn.Linear:
                raise ValueError(
                    f"prepare: expected layers that torch.compile does not wrap, got {name or 'the root'!r}, which it "
                    "does; prepare the model first, then compile it"
                )


def _plan(
    found: list[_Found], config: QATConfig, layers: dict[str, QATConfig | None], edges: int | None
) -> tuple[dict[nn.Linear, QATConfig], dict[nn.Module, str]]:
    """The config of each layer to replace, and why others that could be replaced are not."""
    for pattern, value in layers.items():
        _check_pattern(pattern, value, found)
    plan: dict[nn.Linear, QATConfig] = {}
    notes: dict[nn.Module, str] = {}
    named: set[nn.Module] = set()
    for each in found:
        linear = each.module
        if each.obstacle is not None or not isinstance(linear, nn.Linear) or isinstance(linear, QATLinear):
            continue
        patterns = [pattern for pattern in layers if _matches(pattern, each)]
        its_config = layers[patterns[-1]] if patterns else config
        if its_config is None:
            notes[linear] = f"layers[{patterns[-1]!r}] is None"
            continue
        out_features, in_features = linear.weight.shape
        try:
            check_parameters(its_config, in_features, out_features, linear.bias is not None)
        except ValueError as error:
            text = str(error).removeprefix("QATLinear: ")
            if patterns:
                raise ValueError(
                    f"prepare: layers[{patterns[-1]!r}] does not fit {each.names[0]!r}: {text}"
                ) from None
            notes[linear] = text.partition(";")[0]
            continue
        plan[linear] = its_config
        if patterns:
            named.add(linear)
    quantized = [each.module for each in found if each.module in plan or _is_quantized(each)]
    if edges is not None and quantized:
        for layer in {quantized[0], quantized[-1]}:
            if layer in plan and layer not in named:
                assert isinstance(layer, nn.Linear)
                plan[layer] = _with_at_least(plan[layer], edges)
    return plan, notes


def _is_quantized(each: _Found) -> bool:
    return isinstance(each.module, QATLinear) and each.obstacle is None


def _matches(pattern: str, each: _Found) -> bool:
    return any(fnmatchcase(name, pattern) for name in each.names)


def _check_pattern(pattern: str, value: QATConfig | None, found: list[_Found]) -> None:
    """The pattern names a layer that can have this config."""
    hits = [each for each in found if _matches(pattern, each)]
    free = [each for each in hits if each.obstacle is None and not isinstance(each.module, QATLinear)]
    if free or (hits and value is None and not isinstance(hits[0].module, QATLinear)):
        return
    if hits:
        each = hits[0]
        reason = each.obstacle or "a QATLinear already, which prepare leaves as it is; set its .config"
        raise ValueError(
            f"prepare: expected layers[{pattern!r}] to match a layer that can be quantized, got "
            f"{each.names[0]!r}, {reason}"
        )
    names = [name for each in found for name in each.names]
    if any(name.startswith(f"{pattern}.") for name in names):
        raise ValueError(
            f"prepare: expected the patterns of layers to match layers, got {pattern!r}, which holds some; write "
            f"{pattern + '.*'!r}"
        )
    nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0)
    cure = f"the nearest name is {nearest[0]!r}" if nearest else "the model has no layers"
    raise ValueError(f"prepare: expected each pattern of layers to match a layer, got {pattern!r}; {cure}")


def _with_at_least(config: QATConfig, num_bits: int) -> QATConfig:
    """The config with ``num_bits`` in each spec that has fewer."""
    specs = {name: getattr(config, name) for name in ("input", "weight", "bias", "output")}
    return replace(
        config,
        **{
            name: replace(spec, num_bits=num_bits)
            for name, spec in specs.items()
            if spec is not None and spec.num_bits < num_bits
        },
    )


def _replace_in(module: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """The new layers in the place of the old ones: among the submodules, and in plain attributes and lists."""

    def is_old(value: Any) -> bool:
        return isinstance(value, nn.Module) and value in new

    def replaced(value: Any) -> Any:
        return new[value] if is_old(value) else value

    attributes = {name: value for name, value in vars(module).items() if name not in CONTAINERS}
    for name, child in module._modules.items():
        module._modules[name] = replaced(child)
    for name, value in attributes.items():
        if is_old(value):
            vars(module)[name] = new[value]
        elif type(value) is list and any(map(is_old, value)):
            value[:] = map(replaced, value)
        elif type(value) is tuple and any(map(is_old, value)):
            vars(module)[name] = tuple(map(replaced, value))
        elif type(value) is dict and any(map(is_old, value.values())):
            value.update({key: replaced(each) for key, each in value.items()})


def _row(each: _Found) -> SummaryRow:
    module, name = each.module, each.names[0]
    kind = type(module).__name__
    if isinstance(module, QATLinear) and each.obstacle is None:
        config = module.config
        size = sum(
            0 if parameter is None or is_lazy(parameter) else _bytes(parameter, spec)
            for parameter, spec in ((module.weight, config.weight), (module.bias, config.bias))
        )
        return SummaryRow(
            name, kind, _words(config.weight), _words(config.input), None, "dynamic", None, size, None
        )
    reason = each.obstacle or vars(module).get("_qatfast_note", "not prepared")
    own = [*module.named_parameters(recurse=False)]
    if is_parametrized(module):
        own += module.parametrizations.named_parameters()  # type: ignore[union-attr]
    size = sum(_bytes(parameter, None) for _, parameter in own if not is_lazy(parameter))
    return SummaryRow(name, kind, "float", "float", None, None, None, size, reason)


def _words(spec: QuantSpec | None) -> str:
    return "float" if spec is None else str(spec)


def _bytes(parameter: torch.Tensor, spec: QuantSpec | None) -> int:
    """Of the parameter in float, or of its integers (rows packed up to 4 bits), scales and zero points."""
    shape = parameter.shape
    if spec is None:
        return parameter.numel() * parameter.element_size()
    if spec.num_bits > 8:
        integers = 2 * parameter.numel()
    else:
        per_byte = 4 if spec.num_bits == 2 else 2 if spec.num_bits <= 4 else 1
        integers = prod(shape[:-1]) * -(-shape[-1] // per_byte)
    blocks = prod(checks.shape_of_qparams(shape, spec.granularity))
    return integers + blocks * (4 if spec.symmetric else 8)
