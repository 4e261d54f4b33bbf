"""Passes over the exported graph, so that runtimes find the patterns of quantized layers."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from onnxscript import ir
from onnxscript.optimizer import fold_constants

from .nodes import LAYER, ROLE

# Operators that move values and make none.
MOVERS = frozenset(
    ["Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "GlobalMaxPool", "Identity"]
)
# Between DequantizeLinear and QuantizeLinear, onnxruntime replaces these by kernels with other results.
_REPLACED = frozenset(
    ["AveragePool", "GlobalAveragePool", "LeakyRelu", "Mul", "Resize", "Sigmoid", "Softmax", "Where"]
)
_OF_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear", "Clip", "Max", "Min")


class Quantization(NamedTuple):
    """A quantization in a layer; ``position`` counts those of all its calls."""

    layer: str
    position: int


def tidy(model: ir.Model) -> dict[Quantization, ir.Value]:
    """Rewrites the graph in place.

    Returns:
        The integers of each quantization.
    """
    graph = model.graph
    integers = _Integers(graph)
    fold_constants(model)
    ir.passes.common.DeduplicateInitializersPass()(model)
    _remove_activations(graph)
    for node in list(graph):
        _remove_repeated(node, integers)
        _keep_in_float(node, graph)
    _narrow_weights(graph)
    # Not onnxscript's optimize: its rewriting of Relu before Min and Max leaves an invalid graph.
    common = ir.passes.common
    lift = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    ir.passes.Sequential(common.RemoveUnusedNodesPass(), lift, common.NameFixPass())(model)
    _name_nodes(graph)
    _remove_metadata(model)
    return integers.values


class _Integers:
    """The values that hold the integers of quantizations, while nodes are replaced."""

    def __init__(self, graph: ir.Graph) -> None:
        self.values: dict[Quantization, ir.Value] = {}
        counts: Counter[str] = Counter()
        for node in graph:
            if role(node) == "integers":
                layer = node.metadata_props[LAYER]
                self.values[Quantization(layer, counts[layer])] = node.outputs[0]
                counts[layer] += 1

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        _replace(old, new)
        for key, value in self.values.items():
            if value is old:
                self.values[key] = new


def role(node: ir.Node) -> str:
    return node.metadata_props.get(ROLE, "")


def _replace(old: ir.Value, new: ir.Value) -> None:
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Returns the numbers of an initializer or a Constant."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def consumers(value: ir.Value) -> list[ir.Node]:
    return [node for node, _ in value.uses()]


# Activations


def _remove_activations(graph: ir.Graph) -> None:
    """Removes each ReLU whose input is not negative, and each ReLU6 that the integers have been clipped for."""
    for node in list(graph):
        if node.op_type == "DequantizeLinear":
            kinds = {"Relu"} if _is_nonnegative(node) else set()
            if role(node) == "relu6":
                kinds.add("Clip")
            if kinds:
                _remove_after(node.outputs[0], kinds)


def _is_nonnegative(dequantize: ir.Node) -> bool:
    if role(dequantize) in ("relu", "relu6"):
        return True
    zero_point = constant(dequantize.inputs[2])
    source = dequantize.inputs[0]
    low = None if source is None or source.dtype is None else _least(source)
    return zero_point is not None and low is not None and bool((zero_point <= low).all())


def _least(integers: ir.Value) -> int | None:
    """Returns the least integer that a value can hold."""
    node = integers.producer()
    if node is not None and node.op_type == "Clip":
        low = constant(node.inputs[1])
        return None if low is None else int(low)
    return np.iinfo(integers.dtype.numpy()).min


def _remove_after(value: ir.Value, kinds: set[str]) -> None:
    for node in consumers(value):
        if node.op_type in MOVERS and node.inputs[0] is value:
            _remove_after(node.outputs[0], kinds)
        elif (
            node.op_type in kinds and node.inputs[0] is value and (node.op_type == "Relu" or _is_relu6(node))
        ):
            _replace(node.outputs[0], value)


def _is_relu6(clip: ir.Node) -> bool:
    return [constant(bound) for bound in clip.inputs[1:]] == [0, 6]


# Quantizations


def _remove_repeated(node: ir.Node, integers: _Integers) -> None:
    """Removes a node that repeats another, and a quantization of values that are on its grid."""
    if node.op_type not in _OF_QUANTIZERS or node.inputs[0] is None:
        return
    # First what is on the grid already: nodes that are replaced stay among the consumers, for others to repeat.
    source = node.inputs[0].producer()
    kinds = (node.op_type, None if source is None else source.op_type)
    if kinds == ("QuantizeLinear", "DequantizeLinear") and _have_one_grid(node, source):
        integers.replace(node.outputs[0], source.inputs[0])
        return
    if kinds == ("Clip", "Clip") and role(source) == "integers" and _holds(source, node):
        integers.replace(node.outputs[0], source.outputs[0])
        return
    for other in consumers(node.inputs[0]):
        if other is not node and _are_equal(node, other) and _is_before(other, node):
            integers.replace(node.outputs[0], other.outputs[0])
            return


def _have_one_grid(node: ir.Node, other: ir.Node) -> bool:
    return node.inputs[1:] == other.inputs[1:] and _attributes(node) == _attributes(other)


def _are_equal(node: ir.Node, other: ir.Node) -> bool:
    return node.op_type == other.op_type and node.inputs[0] is other.inputs[0] and _have_one_grid(node, other)


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _is_before(node: ir.Node, other: ir.Node) -> bool:
    for candidate in node.graph:
        if candidate is node or candidate is other:
            return candidate is node
    return False


def _holds(inner: ir.Node, outer: ir.Node) -> bool:
    """Returns whether the bounds of a Clip lie within those of another."""
    (low, high), (least, largest) = (
        [constant(bound) for bound in clip.inputs[1:]] for clip in (inner, outer)
    )
    if low is None or high is None or least is None or largest is None:
        return False
    return bool(least <= low and high <= largest)


# Operators in float


def _keep_in_float(node: ir.Node, graph: ir.Graph) -> None:
    """Writes a sum as Sum, and others with a Sum behind them: onnxruntime has no kernels on integers for it."""
    if not any(value is not None and _is_dequantized(value) for value in node.inputs):
        return
    if node.op_type == "Add":
        node.op_type = "Sum"
    elif node.op_type in _REPLACED:
        result = node.outputs[0]
        barrier = ir.node("Sum", [result])
        barrier.outputs[0].shape, barrier.outputs[0].type = result.shape, result.type
        _replace(result, barrier.outputs[0])
        barrier.replace_input_with(0, result)
        graph.insert_after(node, barrier)


def _is_dequantized(value: ir.Value) -> bool:
    node = value.producer()
    while node is not None and (node.op_type in MOVERS or node.op_type in ("Relu", "Clip", "Concat")):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return node is not None and node.op_type == "DequantizeLinear"


# Storage and names


def _narrow_weights(graph: ir.Graph) -> None:
    """Stores weights of at most 4 bits that no kernel takes as int8 in 4 bits."""
    for node in graph:
        if node.op_type != "DequantizeLinear" or role(node) != "4 bits":
            continue
        is_signed = node.inputs[0].dtype == ir.DataType.INT8
        dtype = ir.DataType.INT4 if is_signed else ir.DataType.UINT4
        for index in (0, 2):
            value = node.inputs[index]
            narrow = ir.Value(
                name=f"{value.name}_{dtype.name.lower()}", shape=value.shape, type=ir.TensorType(dtype)
            )
            narrow.const_value = ir.Tensor(value.const_value.numpy().astype(dtype.numpy()), name=narrow.name)
            if narrow.name in graph.initializers:
                narrow = graph.initializers[narrow.name]
            else:
                graph.register_initializer(narrow)
            node.replace_input_with(index, narrow)


def _name_nodes(graph: ir.Graph) -> None:
    counts: Counter[str] = Counter()
    for node in graph:
        layer = node.metadata_props.get(LAYER)
        if layer is not None:
            name = f"{layer}/{node.op_type}"
            counts[name] += 1
            node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"


def _remove_metadata(model: ir.Model) -> None:
    """Removes what the exporter writes about the source: stack traces with paths, and names of torch."""
    for holder in (model.graph, *model.graph, *(value for node in model.graph for value in node.outputs)):
        kept = {name: holder.metadata_props[name] for name in (LAYER, ROLE) if name in holder.metadata_props}
        holder.metadata_props.clear()
        holder.metadata_props.update(kept)
