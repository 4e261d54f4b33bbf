"""Builds an ONNX model of QuantizeLinear and DequantizeLinear without the onnx package."""

from __future__ import annotations

import numpy as np

ELEMENT_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5}


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _tensor_type(name: str, dtype: str, dims: int) -> bytes:
    shape = b"".join(_field(1, _field(2, f"{name}_{dim}")) for dim in range(dims))
    return _field(1, name) + _field(2, _field(1, _field(1, ELEMENT_TYPES[dtype]) + _field(2, shape)))


def _node(kind: str, inputs: list[str], output: str, axis: int) -> bytes:
    attribute = _field(1, "axis") + _field(3, axis) + _field(20, 2)
    names = b"".join(_field(1, name) for name in inputs)
    return names + _field(2, output) + _field(3, kind) + _field(4, kind) + _field(5, attribute)


def _model(dtype: str, dims: int, qparam_dims: int, axis: int) -> bytes:
    graph = (
        _field(1, _node("QuantizeLinear", ["x", "scale", "zero_point"], "q", axis))
        + _field(1, _node("DequantizeLinear", ["q", "scale", "zero_point"], "y", axis))
        + _field(2, "quantize_dequantize")
        + _field(11, _tensor_type("x", "float32", dims))
        + _field(11, _tensor_type("scale", "float32", qparam_dims))
        + _field(11, _tensor_type("zero_point", dtype, qparam_dims))
        + _field(12, _tensor_type("q", dtype, dims))
        + _field(12, _tensor_type("y", "float32", dims))
    )
    return _field(1, 10) + _field(8, _field(1, "") + _field(2, 21)) + _field(7, graph)


def quantize_dequantize(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (q, y) of onnxruntime; the granularity is per tensor if ``axis`` is None."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    model = _model(zero_point.dtype.name, x.ndim, scale.ndim, 0 if axis is None else axis)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    q, y = session.run(["q", "y"], {"x": x, "scale": scale, "zero_point": zero_point})
    return q, y
