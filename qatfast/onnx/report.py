"""What onnxruntime makes of an exported file, compared with the model in PyTorch."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxscript import ir
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .. import functional, qdq
from ..qdq import Grid
from .graph import MOVERS, Quantization, role
from .nodes import LAYER

FLOAT = "float"
# Kernels of onnxruntime that multiply integers and whose results are those of the integer formulas.
_INTEGER_KERNELS = frozenset(
    [
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    ]
)
_INT4_KERNEL = "MatMulNBits"
_INT4_OPTION = ("session.qdq_matmulnbits_accuracy_level", "1")
_INT4_NOTE = (
    f"layers with MatMulNBits: set the session option {'='.join(_INT4_OPTION)}, without which onnxruntime quantizes "
    "their activations too"
)
# Operators with one rounding per element at most: the same in every runtime.
_EXACT = MOVERS | {
    *(
        "Abs",
        "Add",
        "And",
        "Cast",
        "Ceil",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "DequantizeLinear",
    ),
    *("Div", "DynamicQuantizeLinear", "Equal", "Expand", "Floor", "Gather", "GatherElements", "GatherND"),
    *("Greater", "GreaterOrEqual", "IsNaN", "Less", "LessOrEqual", "Max", "Min", "Mul", "Neg", "Not", "Or"),
    *("Pad", "QuantizeLinear", "Range", "ReduceMax", "ReduceMin", "Relu", "Round", "Shape", "Sign", "Size"),
    *("Slice", "Split", "Sub", "Sum", "Tile", "Where"),
}
_INTEGERS = 1_000_000  # to compare at least, if 20 runs have so many
_RUNS = 20


@dataclass(frozen=True)
class Report:
    """What :func:`qatfast.onnx.export` wrote, and how onnxruntime runs it with all optimizations.

    Attributes:
        nodes: the number of nodes in the file.
        bytes: the size of the file, with its external data.
        fused: by layer the kernel of onnxruntime that multiplies integers, or ``"float"`` if it multiplies floats.
        compared: how many numbers were compared: integers of quantizations and numbers of the results that follow by
            exact arithmetic from the integers before them.
        differing: how many of them are not those of the model in PyTorch.
        float_compared: how many integers of quantizations were compared whose input comes from operators with the
            library's own rounding, such as LayerNormalization.
        float_differing: how many of them are not those of the model in PyTorch.
        error: the largest difference of a result that such operators give, relative to the largest result.
        notes: what to know about the file.

    Each layer is compared on the integers that onnxruntime has before it. Nothing is compared, and ``fused`` is empty,
    where onnxruntime is not installed.
    """

    nodes: int
    bytes: int
    fused: Mapping[str, str] = field(default_factory=dict)
    compared: int = 0
    differing: int = 0
    float_compared: int = 0
    float_differing: int = 0
    error: float = 0.0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(map(len, self.fused), default=0)
        lines = [f"{self.nodes} nodes, {self.bytes:,} bytes"]
        lines += [f"{name.ljust(width)}  {kind}" for name, kind in self.fused.items()]
        if self.fused:
            lines.append(f"{self.compared:,} numbers compared, {self.differing:,} differ")
        if self.float_compared:
            lines.append(
                f"{self.float_compared:,} integers behind float operators compared, {self.float_differing:,} differ"
            )
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__


def verify(
    path: str | os.PathLike[str],
    model: ir.Model,
    integers: Mapping[Quantization, ir.Value],
    integer_model: nn.Module,
    layers: Mapping[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Runs the file in onnxruntime; returns the fields of the report.

    Args:
        path: of the file.
        model: which it holds.
        integers: the value that holds the integers of each quantization.
        integer_model: in PyTorch.
        layers: its layers by name.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    fused = _fused(path, model)
    with tempfile.TemporaryDirectory() as folder:
        session = _with_integers(model, integers, Path(folder) / "model.onnx")
    is_exact = _Exactness(model.graph, fused, integers)
    names = [value.name for value in session.get_inputs()]
    totals: Counter[str] = Counter()
    error = 0.0
    generator = torch.Generator().manual_seed(0)
    for run in range(_RUNS):
        if run > 0:
            args, kwargs = tree_map(lambda leaf: _similar(leaf, generator), (args, kwargs))
        feeds = dict(zip(names, _arrays(args, kwargs), strict=True))
        found = dict(
            zip((value.name for value in session.get_outputs()), session.run(None, feeds), strict=True)
        )
        comparison = _Comparison(layers, {key: found[value.name] for key, value in integers.items()})
        with comparison.forced(), torch.no_grad():
            results = _tensors(integer_model(*args, **kwargs))
        by_value = {integers[key]: counts for key, counts in comparison.counts.items()}
        for value, counts in by_value.items():
            prefix = "" if is_exact(_quantized(value)) else "float_"
            totals.update({f"{prefix}compared": counts[0], f"{prefix}differing": counts[1]})
        for value, result in zip(model.graph.outputs, results, strict=True):
            expected, actual = result.numpy(), found[value.name]
            if is_exact(value):
                totals.update(compared=expected.size, differing=int((expected != actual).sum()))
            elif result.is_floating_point() and result.numel() > 0:
                largest = max(float(np.abs(expected).max()), np.finfo(np.float32).tiny)
                error = max(error, float(np.abs(expected - actual).max()) / largest)
        if totals["compared"] + totals["float_compared"] >= _INTEGERS:
            break
    notes = (_INT4_NOTE,) if _INT4_KERNEL in fused.values() else ()
    return {"fused": fused, "error": error, "notes": notes, **totals}


def _quantized(integers: ir.Value) -> ir.Value | None:
    """Returns what a quantization takes."""
    node = integers.producer()
    while node.op_type != "QuantizeLinear":
        node = node.inputs[0].producer()
    return node.inputs[0]


def _fused(path: str | os.PathLike[str], model: ir.Model) -> dict[str, str]:
    """Returns by layer what onnxruntime computes its product with."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
        _session(path, options)
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    kinds = {re.sub(r"_token_\d+$", "", node.name): node.op_type for node in optimized.graph.node}
    fused: dict[str, str] = {}
    for node in model.graph:
        if role(node) in ("product", "levels"):
            kind = kinds.get(node.name or "", FLOAT)
            layer = node.metadata_props[LAYER]
            is_known = kind in _INTEGER_KERNELS or kind == _INT4_KERNEL
            fused[layer] = kind if is_known and fused.get(layer) != FLOAT else FLOAT
    return fused


def _with_integers(model: ir.Model, integers: Mapping[Quantization, ir.Value], path: Path) -> Any:
    """Returns a session that also gives the integers."""
    outputs = model.graph.outputs
    count = len(outputs)
    outputs.extend(value for value in dict.fromkeys(integers.values()) if value not in outputs)
    try:
        ir.save(model, path, external_data="model.data")
    finally:
        del outputs[count:]
    return _session(path)


def _session(path: str | os.PathLike[str], options: Any = None) -> Any:
    import onnxruntime

    options = options or onnxruntime.SessionOptions()
    options.add_session_config_entry(*_INT4_OPTION)
    options.log_severity_level = 3  # the optimized model is for this machine: that is what is asked for
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


class _Exactness:
    """Tells which values follow from integers before them by exact arithmetic."""

    def __init__(
        self, graph: ir.Graph, fused: Mapping[str, str], integers: Mapping[Quantization, ir.Value]
    ) -> None:
        self.known = {
            value: True for value in (*graph.inputs, *graph.initializers.values(), *integers.values())
        }
        for node in graph:
            is_exact = node.op_type in _EXACT or role(node) == "levels"
            if role(node) == "product":
                is_exact = (
                    node.op_type in _INTEGER_KERNELS or fused[node.metadata_props[LAYER]] in _INTEGER_KERNELS
                )
            is_exact = is_exact and all(self(value) for value in node.inputs)
            for value in node.outputs:
                self.known.setdefault(value, is_exact)

    def __call__(self, value: ir.Value | None) -> bool:
        return value is None or self.known[value]


def _similar(leaf: Any, generator: torch.Generator) -> Any:
    """Returns a tensor with the same values in another order; floats also have noise."""
    if not isinstance(leaf, Tensor) or leaf.dtype == torch.bool:
        return leaf
    order = torch.randperm(leaf.numel(), generator=generator)
    shuffled = leaf.flatten()[order].reshape(leaf.shape)
    if not leaf.is_floating_point() or leaf.numel() < 2:
        return shuffled
    return shuffled + torch.randn(leaf.shape, generator=generator).to(leaf.dtype) * leaf.std() / 8


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _arrays(*trees: Any) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in _tensors(trees)]


class _Comparison:
    """Runs integer layers in PyTorch on the integers that onnxruntime has, and counts where theirs differ."""

    def __init__(self, layers: Mapping[str, nn.Module], found: Mapping[Quantization, np.ndarray]) -> None:
        self.layers, self.found = layers, found
        self.calls: Counter[str] = Counter()
        self.counts: dict[Quantization, tuple[int, int]] = {}

    @contextmanager
    def forced(self) -> Iterator[None]:
        """Replaces the values of integers in the block by those of onnxruntime."""
        handles = []
        for name, layer in self.layers.items():
            input, output = qdq.input_grid(layer), qdq.output_grid(layer)
            if input is not None:
                handles.append(layer.register_forward_pre_hook(self._before(name, input)))
            if output is not None:
                handles.append(layer.register_forward_hook(self._after(name, output)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str, grid: Grid) -> Any:
        return lambda layer, args: (self._compared(name, args[0], grid), *args[1:])

    def _after(self, name: str, grid: Grid) -> Any:
        return lambda layer, args, result: self._compared(name, result, grid)

    def _compared(self, name: str, values: Tensor, grid: Grid) -> Tensor:
        key = Quantization(name, self.calls[name])
        self.calls[name] += 1
        scale, zero_point, *ends = grid.scale, grid.zero_point, grid.quant_min, grid.quant_max
        granularity = grid.granularity
        expected = functional.quantize(values, scale, zero_point, *ends, granularity=granularity)
        found = torch.from_numpy(self.found[key]).reshape(values.shape)
        differing = int((found.to(torch.int32) != expected.to(torch.int32)).sum())
        self.counts[key] = found.numel(), differing
        forced = functional.dequantize(found, scale, zero_point, granularity=granularity)
        return forced.to(values.dtype)
