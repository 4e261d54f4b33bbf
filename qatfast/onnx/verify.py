"""What onnxruntime makes of an exported file, compared with the model in PyTorch."""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxscript import ir
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .. import functional, qdq
from ..chain import ChainValue
from ..integer import IntegerLayer, IntegerMultiheadAttention
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
_INT8_OPTION = ("session.qdqisint8allowed", "1")
_SATURATION = (
    "This processor has no dot products of int8 (VNNI): onnxruntime adds products with int8 weights in 16 bits, which "
    "saturates, so integers differ. They do not on processors with dot products, nor with weights of 7 bits."
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


def verify(
    path: str | os.PathLike[str],
    model: ir.Model,
    integers: Mapping[Quantization, ir.Value],
    integer_model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Runs the file in onnxruntime; returns the fields of the report.

    Args:
        path: of the file.
        model: which it holds.
        integers: the value that holds the integers of each quantization.
        integer_model: in PyTorch.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    options = [_INT4_OPTION]
    if any(value.dtype == ir.DataType.INT8 for value in integers.values()):
        options.append(_INT8_OPTION)
    file = _Session(path, options)
    with tempfile.TemporaryDirectory() as folder, _with_outputs(model, integers.values()):
        ir.save(model, Path(folder) / "model.onnx", external_data="model.data")
        observed = _Session(Path(folder) / "model.onnx", options)
    fused = file.products(model)
    layers = {name: layer for name, layer in integer_model.named_modules() if isinstance(layer, IntegerLayer)}
    is_exact = _Exactness(model.graph, observed.products(model), integers)
    has_exact_result = _Exactness(model.graph, fused, integers)
    totals: Counter[str] = Counter()
    error = 0.0
    generator = torch.Generator().manual_seed(0)
    for run in range(_RUNS):
        if run > 0:
            args, kwargs = tree_map(lambda leaf: _similar(leaf, generator), (args, kwargs))
        arrays = _arrays(args, kwargs)
        found = observed.run(arrays) | file.run(arrays)
        comparison = _Comparison(layers, {key: found[value.name] for key, value in integers.items()})
        with comparison.forced(integer_model), torch.no_grad():
            results = _tensors(integer_model(*args, **kwargs))
        by_value = {integers[key]: counts for key, counts in comparison.counts.items()}
        for value, counts in by_value.items():
            prefix = "" if is_exact(_quantized(value)) else "float_"
            totals.update({f"{prefix}compared": counts[0], f"{prefix}differing": counts[1]})
        for value, result in zip(model.graph.outputs, results, strict=True):
            expected, actual = result.numpy(), found[value.name]
            if has_exact_result(value):
                totals.update(compared=expected.size, differing=int((expected != actual).sum()))
            elif result.is_floating_point() and result.numel() > 0:
                largest = max(float(np.abs(expected).max()), np.finfo(np.float32).tiny)
                error = max(error, float(np.abs(expected - actual).max()) / largest)
        if totals["compared"] + totals["float_compared"] >= _INTEGERS:
            break
    notes = _notes(options, fused)
    if (totals["differing"] or totals["float_differing"]) and saturates():
        notes += (_SATURATION,)
    return {"fused": fused, "error": error, "notes": notes, **totals}


def _notes(options: list[tuple[str, str]], fused: Mapping[str, str]) -> tuple[str, ...]:
    """Returns why the session options that matter for the file have to be set."""
    reasons = {
        _INT4_OPTION: "quantizes the activations of layers whose weights alone are quantized",
        _INT8_OPTION: "computes layers with symmetric activations in float on x86",
    }
    if _INT4_KERNEL not in fused.values():
        options = options[1:]
    return tuple(
        f"Set the session option {key}={value}: without it, onnxruntime {reasons[key, value]}."
        for key, value in options
    )


@functools.cache
def saturates() -> bool:
    """Returns whether onnxruntime adds the largest products of uint8 and int8 wrongly on this processor."""
    import onnxruntime

    x, weight = np.full((4, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    values = [
        ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
        )
        for name, array in (("x", x), ("weight", weight))
    ]
    values[1].const_value = ir.tensor(weight, name="weight")
    product = ir.node("MatMulInteger", values)
    product.outputs[0].name, product.outputs[0].type = "y", ir.TensorType(ir.DataType.INT32)
    graph = ir.Graph(
        values[:1],
        product.outputs,
        nodes=[product],
        initializers=values[1:],
        opset_imports={"": 21},
        name="product",
    )
    file = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return bool((session.run(None, {"x": x})[0] != 64 * 255 * 127).any())


def _quantized(integers: ir.Value) -> ir.Value | None:
    """Returns what a quantization takes."""
    node = integers.producer()
    while node.op_type != "QuantizeLinear":
        node = node.inputs[0].producer()
    return node.inputs[0]


@contextmanager
def _with_outputs(model: ir.Model, values: Iterable[ir.Value]) -> Iterator[None]:
    """Adds values to the outputs in the block."""
    outputs = model.graph.outputs
    count = len(outputs)
    outputs.extend(value for value in dict.fromkeys(values) if value not in outputs)
    try:
        yield
    finally:
        del outputs[count:]


class _Session:
    """onnxruntime with all optimizations, and the names and operators of the nodes that it runs."""

    def __init__(self, path: str | os.PathLike[str], config: Iterable[tuple[str, str]]) -> None:
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # the optimized model is for this machine, as is asked for
        options.intra_op_num_threads = torch.get_num_threads()
        for option in config:
            options.add_session_config_entry(*option)
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
            providers = ["CPUExecutionProvider"]
            self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=providers)
            optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
        self.kinds = {re.sub(r"_token_\d+$", "", node.name): node.op_type for node in optimized.graph.node}

    def products(self, model: ir.Model) -> dict[str, str]:
        """Returns by layer the kernel of its product if that multiplies integers, or else "float"."""
        products: dict[str, str] = {}
        for node in model.graph:
            if role(node) in ("product", "levels"):
                kind, layer = self.kinds.get(node.name, FLOAT), node.metadata_props[LAYER]
                is_known = kind in _INTEGER_KERNELS or kind == _INT4_KERNEL
                products[layer] = kind if is_known and products.get(layer) != FLOAT else FLOAT
        return products

    def run(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        feeds = {value.name: array for value, array in zip(self.session.get_inputs(), arrays, strict=True)}
        names = [value.name for value in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, feeds), strict=True))


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
    def forced(self, model: nn.Module) -> Iterator[None]:
        """Replaces the values of integers in the block by those of onnxruntime."""
        handles = []
        for name, layer in self.layers.items():
            input, output = qdq.input_grid(layer), qdq.output_grid(layer)
            if input is not None:
                handles.append(layer.register_forward_pre_hook(self._before(name, input)))
            if output is not None:
                handles.append(layer.register_forward_hook(self._after(name, output)))
        attentions = [module for module in model.modules() if isinstance(module, IntegerMultiheadAttention)]
        for attention in attentions:
            vars(attention)["_projected"] = self._projected(attention)
        try:
            yield
        finally:
            for attention in attentions:
                del vars(attention)["_projected"]
            for handle in handles:
                handle.remove()

    def _projected(self, attention: Any) -> Any:
        """The projections of query, key and value are not called: their inputs are replaced before."""
        names = {layer: name for name, layer in self.layers.items()}
        projected = attention._projected

        def forced(*inputs: Tensor) -> list[Tensor]:
            values: dict[int, Tensor] = {}
            for x, layer in zip(inputs, (attention.q_proj, attention.k_proj, attention.v_proj), strict=True):
                grid = qdq.input_grid(layer)
                if id(x) not in values:
                    values[id(x)] = x if grid is None else self._compared(names[layer], x, grid)
            return projected(*(values[id(x)] for x in inputs))

        return forced

    def _before(self, name: str, grid: Grid) -> Any:
        return lambda layer, args: (self._compared(name, args[0], grid), *args[1:])

    def _after(self, name: str, grid: Grid) -> Any:
        return lambda layer, args, result: self._compared(name, result, grid)

    def _compared(self, name: str, values: Tensor, grid: Grid) -> Tensor:
        if isinstance(values, ChainValue):  # on its way through the modules of a chain
            with torch._C.DisableTorchFunctionSubclass():
                plain = values.as_subclass(Tensor)
            return ChainValue.of(self._compared(name, plain, grid), values._chain, values._positions[-1])
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
