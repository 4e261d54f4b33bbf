"""Functions for whole models: prepare, summary and unused_layers."""

from __future__ import annotations

import difflib
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from . import arguments, checks
from . import flow as flows
from .config import Dynamic, Fixed, Learned, MinMax, MovingAverage, PerTensor, QATConfig, QuantSpec
from .integer.base import is_converted
from .modules import QUANTIZED_LAYERS, FakeQuantize
from .modules.base import CONTAINERS, QuantizedLayer, open_recordings, share_hooks, why_not_from_float
from .packing import values_per_byte

# Modules of PyTorch that read the weight of a child nn.Linear and do not call it.
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
    example_inputs: Any = None,
    layers: Mapping[str, QATConfig | None] | None = None,
    edges: int | None = 8,
    outputs: bool | None = None,
) -> nn.Module:
    """Replaces the layers of a model by quantized ones with the same parameters.

    Exactly nn.Linear, nn.Conv1d to 3d, nn.ConvTranspose1d to 3d, nn.Embedding and nn.MultiheadAttention are replaced.
    The model is changed in place. Parameters, their ``state_dict`` keys, hooks, training mode, tied weights and all
    names of a shared layer stay the same, so existing optimizers stay valid. The scales of ``Learned()`` ranges are new
    parameters: create the optimizer afterwards, or pass them to ``optimizer.add_param_group``. If ``prepare`` raises,
    the model is unchanged.

    Subclasses of these layers are not replaced, and an existing quantized layer is left unchanged.
    ``summary(model)`` shows which layers stay in float, and why. Layers with the same Parameter and
    equal specs of their weights share one ``weight_quantizer``.

    With ``example_inputs``, the model runs once in evaluation, and ``prepare`` records which layer
    reads which result. Layers that read the same tensor share one ``input_quantizer`` if the specs
    of their inputs are equal. A layer whose weight is read without a call (as some attention
    modules do) stays in float; without ``example_inputs`` it is replaced and stays in float
    without a warning, see :func:`unused_layers`. ``model.training``, the random number generators
    and the buffers are as before afterwards.

    Args:
        model: a float model. Prepare it before torch.compile wraps a single layer and before
            DTensor or FSDP shards it; DDP may wrap it already unless a range is ``Learned()``.
        config: the config of each layer; None means ``QATConfig.static()``.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments of the model.
        layers: ``{pattern: config}`` for layers with another config; a config of None leaves them
            in float. Patterns match dotted names as in ``fnmatch`` (``"decoder.*"``); if several
            match, the last one applies.
        edges: minimum number of bits, 2 to 16, of the first and the last quantized layer in the
            order of the recorded calls, without ``example_inputs`` in that of ``named_modules``;
            None for no minimum. Embeddings do not count. It does not apply to layers that
            ``layers`` matches.
        outputs: whether the result of a layer that add, cat or pooling reads, and that a quantized
            layer depends on, gets an ``output_quantizer`` with the spec of the layer's input, after its
            BatchNorm and ReLU. None means the results of convolutions. True needs ``example_inputs``.

    Returns:
        ``model``, or the new layer if ``model`` itself is a layer to replace.

    Raises:
        TypeError: an argument has the wrong type, or ``model`` contains layers that ``prepare``
            created.
        ValueError: a pattern matches no layer, or its config does not fit the layer; ``edges`` is
            not from 2 to 16; FSDP shards the model, torch.compile wraps a layer, or DDP wraps a
            layer with a ``Learned()`` range;
            ``example_inputs`` with a layer that has not been initialized yet; ``outputs=True``
            without ``example_inputs``.

    Example:
        >>> model = prepare(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), layers={"2": None})
        >>> [type(layer).__name__ for layer in model]
        ['QATLinear', 'ReLU', 'Linear']
    """
    _check_arguments(model, config, layers, edges, example_inputs, outputs)
    candidates = _candidates(model)
    _check_state(model, candidates)
    layers = dict(layers or {})
    for pattern, pattern_config in layers.items():
        _check_pattern(pattern, pattern_config, candidates)
    flow = None if example_inputs is None else _recorded(model, candidates, example_inputs)
    replacements, notes = _plan(candidates, config or QATConfig.static(), layers, edges, flow)
    _check_data_parallel(model, replacements.values())
    for module, layer in replacements.items():
        share_hooks(module, layer)
        vars(layer)["_qatfast_note"] = _PREPARED
    for module in list(model.modules()):
        _replace_in(module, replacements)
    for module, reason in notes.items():
        vars(module)["_qatfast_note"] = reason
    root = replacements.get(model, model)
    _share_weight_quantizers(replacements.values())
    for encoder in flows.transformer_encoders(root):
        # In evaluation it would pass nested tensors of other shapes than in training.
        if any(layer in replacements.values() for layer in encoder.modules()):
            encoder.use_nested_tensor = False
    if flow is not None:
        flows.connect(flow, replacements, outputs)
    _name_quantizers(root)
    if not replacements and None not in layers.values() and not any(map(_is_quantized, candidates)):
        _warn(f"no layer of {type(model).__name__} is quantized; print(qatfast.summary(model)) shows why")
    if flow is not None:
        names = [c.names[0] for c in candidates if c.module in replacements and c.module not in flow.called]
        if names:
            _warn(f"these layers did not run with example_inputs: {', '.join(names)}")
    return root


def _warn(text: str) -> None:
    warnings.warn(f"prepare: {text}", UserWarning, stacklevel=3)


class SummaryRow(NamedTuple):
    """A layer in :func:`summary`.

    Attributes:
        name: dotted name of the layer; the first one if it has several.
        kind: class name of the layer.
        weight: how the weight is quantized, or "float".
        input: how the input is quantized, or "float".
        chain: the way of the result to the layer that reads its integers in evaluation, or None.
        range: how the scales are determined; None for a float layer.
        clipped: share of the input's elements in the latest :func:`calibrate` that its range clipped;
            None before, and for inputs without a range of their own.
        bytes: size of the parameters, as integers with their scales if quantized.
        reason: why the layer is in float; None if it is quantized.
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


_NUMBERS = ("clipped", "bytes")


@dataclass(frozen=True)
class Summary:
    """The result of :func:`summary`: ``rows``, and a table of them as ``str`` or for ``rich.print``."""

    rows: tuple[SummaryRow, ...]

    def __str__(self) -> str:
        titles, *rows = self._cells()
        widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
        lines = [
            "  ".join(
                text.rjust(width) if title in _NUMBERS else text.ljust(width)
                for title, text, width in zip(titles, line, widths, strict=True)
            ).rstrip()
            for line in (titles, *rows)
        ]
        return "\n".join([*lines, self._conclusion()])

    __repr__ = __str__

    def __rich__(self) -> Any:
        """Returns the table that rich prints in a terminal."""
        from rich.console import Group
        from rich.table import Table

        titles, *rows = self._cells()
        table = Table(box=None, header_style="bold")
        for title in titles:
            table.add_column(title, justify="right" if title in _NUMBERS else "left")
        for row, cells in zip(self.rows, rows, strict=True):
            table.add_row(*cells, style=None if row.reason is None else "yellow")
        return Group(table, self._conclusion())

    def _cells(self) -> list[tuple[str, ...]]:
        """Returns the titles and the texts of the rows, without columns that are empty."""
        rows = [
            (
                row.name or "(root)",
                row.kind,
                row.input,
                row.weight,
                row.range or "",
                row.chain or "",
                "" if row.clipped is None else f"{row.clipped:.2%}",
                f"{row.bytes:,}",
                row.reason or "",
            )
            for row in self.rows
        ]
        titles = (
            "layer",
            "kind",
            "input",
            "weight",
            "range",
            "chain",
            "clipped",
            "bytes",
            "in float because",
        )
        shown = [
            column
            for column, title in enumerate(titles)
            if title not in ("chain", "clipped") or any(row[column] for row in rows)
        ]
        return [tuple(line[column] for column in shown) for line in (titles, *rows)]

    def _conclusion(self) -> str:
        quantized = sum(row.reason is None for row in self.rows)
        text = f"{quantized} of {len(self.rows)} layers are quantized."
        if quantized:
            text += " To check that each of them runs, run the model once inside qatfast.unused_layers."
        return text


def summary(model: nn.Module) -> Summary:
    """Lists how the layers of a model are quantized, and why others stay in float.

    The list has a row per quantized layer and per module that has its own weight matrix. It leaves
    out normalization layers and modules without weights. The model need not be prepared.

    Args:
        model: any module.

    Returns:
        A :class:`Summary`: ``print`` it, or read its ``rows``.

    Raises:
        TypeError: ``model`` is not an nn.Module.

    Example:
        >>> print(summary(prepare(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), QATConfig.dynamic())))
        layer  kind       input                   weight                         range    bytes  in float because
        0      QATLinear  8-bit affine per token  8-bit symmetric per channel 0  dynamic    256
        2      QATLinear  8-bit affine per token  8-bit symmetric per channel 0  dynamic     48
        2 of 2 layers are quantized. To check that each of them runs, run the model once inside
        qatfast.unused_layers.
    """
    arguments.module("summary", "model", model)
    if is_converted(model):
        raise TypeError(
            "summary: expected a float or a prepared model, got a converted one; print the model to see its layers"
        )
    names = {module: name for name, module in model.named_modules()}
    return Summary(tuple(_row(candidate, names) for candidate in _candidates(model)))


_lock = threading.Lock()


@contextmanager
def unused_layers(model: nn.Module) -> Iterator[list[str]]:
    """Lists the quantized layers of a model that do not run in the block.

    Such a layer stays in float, without a warning: its parent reads the weight without calling the
    layer, or does not use it at all. Run the model in the block once as in training and once as in
    evaluation. A compiled model is recompiled for the block.

    Args:
        model: a model with quantized layers.

    Yields:
        A list that is filled when the block ends, even if it raises: the dotted names of the layers
        whose ``forward`` was not called in any thread while the block was open. If a layer has
        several names, the list has the first one.

    Raises:
        TypeError: ``model`` is not an nn.Module.

    Example:
        >>> model = prepare(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2)))
        >>> with unused_layers(model) as unused:
        ...     y = model[0](torch.ones(1, 8))
        >>> unused
        ['1']
    """
    arguments.module("unused_layers", "model", model)
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
    ran: set[nn.Module] = set()
    unused: list[str] = []
    with _lock:
        open_recordings.append(ran)
    try:
        yield unused
    finally:
        with _lock:  # list.remove would compare the sets, and two blocks may have equal sets
            open_recordings[:] = [layers for layers in open_recordings if layers is not ran]
        unused.extend(name for layer, name in names.items() if layer not in ran)


def _check_arguments(
    model: Any, config: Any, layers: Any, edges: Any, example_inputs: Any, outputs: Any
) -> None:
    arguments.module("prepare", "model", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "prepare: expected model to be an nn.Module in Python, got a ScriptModule; prepare it before "
            "torch.jit.script or torch.jit.trace"
        )
    if config is not None and not isinstance(config, QATConfig):
        raise TypeError(
            f"prepare: expected config to be a QATConfig or None, got {config!r}; for a number of bits write "
            "QATConfig.static(num_bits)"
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
    if edges is not None and not 2 <= arguments.integer("prepare", "edges", edges) <= 16:
        raise ValueError(f"prepare: expected edges to be from 2 to 16 bits or None, got {edges}")
    if example_inputs is not None:
        arguments.example_inputs("prepare", example_inputs)
    if outputs is not None and not isinstance(outputs, bool):
        raise TypeError(f"prepare: expected outputs to be a bool or None, got {outputs!r}")
    if outputs and example_inputs is None:
        raise ValueError(
            "prepare: expected example_inputs with outputs=True, which says who reads a result, got None"
        )


class _Candidate(NamedTuple):
    """A module with a weight matrix, its dotted names, and why it cannot be quantized."""

    module: nn.Module
    names: list[str]
    obstacle: str | None


def _candidates(model: nn.Module) -> list[_Candidate]:
    """Returns the modules with a weight matrix in the order of ``named_modules``."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" not in name.split("."):  # these belong to the module that they parametrize
            names.setdefault(module, []).append(name)
    read = {
        child
        for module in names
        if isinstance(module, _READERS) and not isinstance(module, QuantizedLayer)
        for child in module.children()
    }
    return [
        _Candidate(module, module_names, _why_float(module, module in read))
        for module, module_names in names.items()
        if isinstance(module, (nn.Linear, QuantizedLayer)) or _weights(module)
    ]


def _weights(module: nn.Module) -> list[str]:
    """Returns the names of a module's own parameters that are matrices, tensors or lazy."""
    if isinstance(module, _NORMS):
        return []
    if is_parametrized(module):
        return list(module.parametrizations)  # type: ignore[arg-type]
    parameters = module.named_parameters(recurse=False)
    return [name for name, parameter in parameters if is_lazy(parameter) or parameter.dim() >= 2]


def _why_float(module: nn.Module, is_read: bool) -> str | None:
    """Returns why the module stays in float with any config; None if it is or can be quantized."""
    kind = type(module)
    if is_read or kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return _READ
    if isinstance(module, QuantizedLayer):
        return None
    base = next((base for base in QUANTIZED_LAYERS if isinstance(module, base)), None)
    if base is not None:
        obstacle = why_not_from_float(module, QUANTIZED_LAYERS[base])
        if obstacle:
            return obstacle.reason
        return None if kind is base else f"{kind.__name__} is a subclass of nn.{base.__name__}"
    if kind.__module__.startswith("torch.nn."):
        return f"no quantized layer for {kind.__name__} yet"
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):  # the layers of GPT-2
        return "its weight is transposed; replace it by an nn.Linear first"
    return f"has weights of its own: {', '.join(_weights(module))}"


def _check_state(model: nn.Module, candidates: list[_Candidate]) -> None:
    """Raises if the model is prepared, or if FSDP or torch.compile would not run a new layer."""
    for candidate in candidates:
        if vars(candidate.module).get("_qatfast_note") == _PREPARED:
            raise TypeError(
                "prepare: expected a model that is not prepared, got one whose layer "
                f"{candidate.names[0]!r} prepare made; start from the float model, or set the .config of "
                "its layers"
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
            if type(inner) in QUANTIZED_LAYERS:
                raise ValueError(
                    f"prepare: expected layers that torch.compile does not wrap, got {name or 'the root'!r}, which it "
                    "does; prepare the model first, then compile it"
                )


def _check_data_parallel(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Raises if DDP would not reduce the gradient of a learned scale: it knows the parameters it was made with."""
    is_wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    if is_wrapped and any(
        name.endswith("_quantizer.scale") for layer in layers for name, _ in layer.named_parameters()
    ):
        raise ValueError(
            "prepare: expected a model that DistributedDataParallel does not wrap for Learned() ranges, "
            "got one that it wraps; prepare the model first, then wrap it"
        )


def _recorded(model: nn.Module, candidates: list[_Candidate], example_inputs: Any) -> flows.Flow:
    for module in model.modules():
        if any(map(is_lazy, module.parameters(recurse=False))):
            name = next(name for name, other in model.named_modules() if other is module)
            raise ValueError(
                f"prepare: expected initialized layers with example_inputs, got the lazy {name!r}; run the model once "
                "first"
            )
    layers = {candidate.module for candidate in candidates if type(candidate.module) in QUANTIZED_LAYERS}
    layers |= {module for module in model.modules() if isinstance(module, QuantizedLayer)}
    return flows.record(model, *arguments.example_inputs("prepare", example_inputs), layers)


def _plan(
    candidates: list[_Candidate],
    config: QATConfig,
    layers: dict[str, QATConfig | None],
    edges: int | None,
    flow: flows.Flow | None,
) -> tuple[dict[nn.Module, QuantizedLayer], dict[nn.Module, str]]:
    """Returns the new layers, and why others that could be replaced stay in float."""
    replacements: dict[nn.Module, QuantizedLayer] = {}
    notes: dict[nn.Module, str] = {}
    named: set[nn.Module] = set()  # by a pattern of `layers`
    parts: set[nn.Module] = set()  # of a layer that is replaced as a whole
    for candidate in candidates:
        module = candidate.module
        if not _is_replaceable(candidate) or module in parts:
            continue
        if flow is not None and module in flow.read and module not in flow.called:
            notes[module] = _READ
            continue
        patterns = [pattern for pattern in layers if _matches(pattern, candidate)]
        layer_config = layers[patterns[-1]] if patterns else config
        if layer_config is None:
            notes[module] = f"layers[{patterns[-1]!r}] is None"
            continue
        try:
            replacements[module] = _quantized(module, layer_config)
        except ValueError as error:
            text = str(error).partition(": ")[2]
            if patterns:
                raise ValueError(
                    f"prepare: layers[{patterns[-1]!r}] does not fit {candidate.names[0]!r}: {text}"
                ) from None
            notes[module] = text.partition(";")[0]
            continue
        parts.update(module.children())
        if patterns:
            named.add(module)
    quantized = [
        candidate.module
        for candidate in candidates
        if (candidate.module in replacements or _is_quantized(candidate))
        and not isinstance(candidate.module, nn.Embedding)
    ]
    if flow is not None:
        called = [module for module in flow.called if module in quantized]
        quantized = called or quantized
    if edges is not None and quantized:
        for module in {quantized[0], quantized[-1]}:
            if module in replacements and module not in named:
                try:
                    edge_config = _with_at_least(replacements[module].config, edges)
                    replacements[module] = _quantized(module, edge_config)
                except ValueError as error:
                    raise ValueError(f"prepare: edges={edges} does not fit the config: {error}") from None
    return replacements, notes


def _quantized(module: nn.Module, config: QATConfig) -> QuantizedLayer:
    return QUANTIZED_LAYERS[type(module)].from_float(module, config=config)


def _share_weight_quantizers(layers: Iterable[QuantizedLayer]) -> None:
    """Makes layers share a weight quantizer if they have one Parameter, and equal specs and blocks of it."""
    quantizers: dict[Any, nn.Module] = {}
    for layer in layers:
        own = layer._parameters
        quantizer = layer._modules.get("weight_quantizer")
        if isinstance(quantizer, FakeQuantize):
            parameter = own.get("weight", own.get("in_proj_weight"))
            # The rows of a transposed convolution are along the second dimension of its weight.
            is_transposed = getattr(layer, "transposed", False) and quantizer.spec.granularity != PerTensor()
            key = (id(parameter), quantizer.spec, is_transposed and layer.groups)
            layer._modules["weight_quantizer"] = quantizers.setdefault(key, quantizer)


def _name_quantizers(model: nn.Module) -> None:
    """Gives the quantizers of layers their dotted names, for messages."""
    parts = {
        id(child)
        for layer in model.modules()
        if isinstance(layer, QuantizedLayer)
        for child in layer.children()
    }
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize) and "." in name and id(module) in parts:
            module._name = name


def _is_quantized(candidate: _Candidate) -> bool:
    return isinstance(candidate.module, QuantizedLayer) and candidate.obstacle is None


def _is_replaceable(candidate: _Candidate) -> bool:
    return candidate.obstacle is None and type(candidate.module) in QUANTIZED_LAYERS


def _matches(pattern: str, candidate: _Candidate) -> bool:
    return any(fnmatchcase(name, pattern) for name in candidate.names)


def _check_pattern(pattern: str, config: QATConfig | None, candidates: list[_Candidate]) -> None:
    """Raises ValueError unless the pattern matches a layer that can have this config."""
    matches = [candidate for candidate in candidates if _matches(pattern, candidate)]
    if any(map(_is_replaceable, matches)):
        return
    if matches:
        first = matches[0]
        if config is None and not isinstance(first.module, QuantizedLayer):
            return
        kind = type(first.module).__name__
        reason = first.obstacle or f"a {kind} already, which prepare leaves unchanged; set its .config"
        raise ValueError(
            f"prepare: expected layers[{pattern!r}] to match a layer that can be quantized, got "
            f"{first.names[0]!r}, {reason}"
        )
    names = [name for candidate in candidates for name in candidate.names]
    if any(name.startswith(f"{pattern}.") for name in names):
        raise ValueError(
            f"prepare: expected the patterns of layers to match layers, got {pattern!r}, which contains layers; "
            f"write {pattern + '.*'!r}"
        )
    nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0)
    hint = f"the nearest name is {nearest[0]!r}" if nearest else "the model has no layers"
    raise ValueError(f"prepare: expected each pattern of layers to match a layer, got {pattern!r}; {hint}")


def _with_at_least(config: QATConfig, num_bits: int) -> QATConfig:
    """Returns the config with at least ``num_bits`` bits in each spec."""
    changes: dict[str, Any] = {
        name: replace(spec, num_bits=num_bits)
        for name, spec in config.specs.items()
        if spec is not None and spec.num_bits < num_bits
    }
    return replace(config, **changes)


def _replace_in(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces layers among the children of ``module`` and in its attributes.

    Attributes may be layers, or lists, tuples or dicts of layers.
    """

    def is_replaced(value: Any) -> bool:
        return isinstance(value, nn.Module) and value in replacements

    def replaced(value: Any) -> Any:
        return replacements[value] if is_replaced(value) else value

    attributes = {name: value for name, value in vars(module).items() if name not in CONTAINERS}
    for name, child in module._modules.items():
        module._modules[name] = replaced(child)
    for name, value in attributes.items():
        if is_replaced(value):
            vars(module)[name] = replacements[value]
        elif type(value) is list and any(map(is_replaced, value)):
            value[:] = map(replaced, value)
        elif type(value) is tuple and any(map(is_replaced, value)):
            vars(module)[name] = tuple(map(replaced, value))
        elif type(value) is dict and any(map(is_replaced, value.values())):
            value.update({key: replaced(item) for key, item in value.items()})


def _row(candidate: _Candidate, names: dict[nn.Module, str]) -> SummaryRow:
    module, name = candidate.module, candidate.names[0]
    kind = type(module).__name__
    if isinstance(module, QuantizedLayer) and candidate.obstacle is None:
        config, specs = module.config, module.config.specs
        specs |= {f"{name}_proj_weight": config.weight for name in ("in", "q", "k", "v")}
        specs["in_proj_bias"] = specs["bias"]
        size = sum(
            0 if is_lazy(parameter) else _bytes(module, parameter, specs.get(key))
            for key, parameter in module.named_parameters(recurse=False)
        )
        return SummaryRow(
            name,
            kind,
            _describe(config.weight),
            _describe(config.input),
            flows.describe_chain(module, names),
            _range(module),
            getattr(module._modules.get("input_quantizer"), "clipped", None),
            size,
            None,
        )
    reason = candidate.obstacle or vars(module).get("_qatfast_note", "not prepared")
    parameters = [*module.named_parameters(recurse=False)]
    if is_parametrized(module):
        parameters += module.parametrizations.named_parameters()  # type: ignore[union-attr]
    size = sum(_bytes(module, parameter, None) for _, parameter in parameters if not is_lazy(parameter))
    return SummaryRow(name, kind, "float", "float", None, None, None, size, reason)


def _describe(spec: QuantSpec | None) -> str:
    return "float" if spec is None else str(replace(spec, range=Dynamic()))


def _range(layer: QuantizedLayer) -> str:
    """Returns how the scales of input and weight are determined, and what a range is now."""
    texts = {
        name: _describe_range(spec, layer._modules.get(f"{name}_quantizer"))
        for name in ("input", "weight")
        if (spec := getattr(layer.config, name)) is not None
    }
    if set(texts.values()) <= {"dynamic"}:
        return "dynamic"
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def _describe_range(spec: QuantSpec, quantizer: Any) -> str:
    if isinstance(spec.range, Fixed):
        return f"fixed [{spec.range.lo:.4g}, {spec.range.hi:.4g}]"
    if not spec.has_state or quantizer is None:
        return "dynamic"
    kind = {MovingAverage: "moving average", MinMax: "min-max", Learned: "learned"}[type(spec.range)]
    if quantizer.num_batches.is_meta or not quantizer._has_observed():
        return f"{kind}, not observed"
    if isinstance(spec.range, Learned):
        scale = quantizer.scale.detach()
        low, high = scale.min().item(), scale.max().item()
        return f"{kind}, scale {low:.4g}" + (f" to {high:.4g}" if low != high else "")
    return f"{kind} [{quantizer.running_min.min().item():.4g}, {quantizer.running_max.max().item():.4g}]"


def _bytes(layer: nn.Module, parameter: torch.Tensor, spec: QuantSpec | None) -> int:
    """Returns the size of a parameter in float, or of its integers, scales and zero points.

    Rows of integers of up to 4 bits are packed.
    """
    if spec is None:
        return parameter.numel() * parameter.element_size()
    shape = parameter.shape
    if len(shape) > 2:  # the weight of a convolution is a matrix with a row per output channel
        rows: Any = layer.out_channels
        shape = torch.Size([rows, parameter.numel() // max(rows, 1)])
    if spec.num_bits > 8:
        integers = 2 * parameter.numel()
    else:
        integers = prod(shape[:-1]) * -(-shape[-1] // values_per_byte(spec.num_bits))
    blocks = prod(checks.shape_of_qparams(shape, spec.granularity))
    return integers + blocks * (4 if spec.symmetric else 8)
