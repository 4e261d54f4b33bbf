"""ONNX operators as torch functions and modules: the exporter writes each call as one node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec
from ..qdq import Grid
from ..reference import quantized_dtype

# Metadata of nodes: the dotted name of their layer, and what they are in it:
#   "product"    the multiplication
#   "levels"     a convolution of floats that are integers, with exact sums
#   "integers"   the last node of a quantization
#   "relu", "relu6"   dequantizes integers to which the activation has been applied already
#   "4 bits"     dequantizes a weight that is stored in 4 bits
LAYER, ROLE = "qatfast.layer", "qatfast.role"


def node(
    op_type: str,
    inputs: Sequence[Tensor | None],
    shape: Sequence[int],
    dtype: torch.dtype,
    layer: str,
    role: str = "",
    **attributes: Any,
) -> Tensor:
    """Returns the result of an ONNX operator."""
    tags = {LAYER: layer, ROLE: role} if role else {LAYER: layer}
    return torch.onnx.ops.symbolic(op_type, inputs, attributes, dtype=dtype, shape=shape, metadata_props=tags)


def barrier(x: Tensor, layer: str) -> Tensor:
    """Returns ``x`` by a Sum of one tensor: onnxruntime replaces no operators across it."""
    return node("Sum", [x], x.shape, x.dtype, layer)


class _OnGrid(nn.Module):
    """Scale and zero point as initializers; the zero point has the dtype of the integers."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid, layer: str) -> None:
        super().__init__()
        self.layer, self.dtype = layer, grid.dtype
        self.attributes: dict[str, Any] = {} if grid.axis is None else {"axis": grid.axis}
        if grid.group_size is not None:
            self.attributes["block_size"] = grid.group_size
        self.register_buffer("scale", grid.scale.detach().clone())
        self.register_buffer("zero_point", grid.zero_point.to(grid.dtype).clone())

    def dequantized(self, q: Tensor, role: str = "") -> Tensor:
        operands = [q, self.scale, self.zero_point]
        return node("DequantizeLinear", operands, q.shape, torch.float32, self.layer, role, **self.attributes)


class Constant(_OnGrid):
    """A tensor that is stored as integers."""

    values: Tensor

    def __init__(self, values: Tensor, grid: Grid, layer: str, role: str = "") -> None:
        super().__init__(grid, layer)
        self.role = role
        self.register_buffer("values", values.detach().to(grid.dtype).clone())

    def forward(self) -> Tensor:
        return self.dequantized(self.values, self.role)


class Quantizer(_OnGrid):
    """Quantizes a tensor, and applies a ReLU or a ReLU6 to the integers."""

    low: Tensor
    high: Tensor

    def __init__(self, grid: Grid, layer: str, activation: str | None = None) -> None:
        super().__init__(grid, layer)
        self.activation = activation or ""
        low, high = integers_after(activation, grid)
        info = torch.iinfo(grid.dtype)
        self.is_clipped = (low, high) != (info.min, info.max)
        self.clips_floats = info.bits > 8  # runtimes have no Clip of integers of 16 bits
        for name, end in (("low", low), ("high", high)):
            value = (
                (end - grid.zero_point) * grid.scale
                if self.clips_floats
                else torch.tensor(end).to(grid.dtype)
            )
            self.register_buffer(name, value)

    def quantized(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Returns the integers of ``x``; with a scale of 1, of a multiple of the scale."""
        operands = [x, self.scale if scale is None else scale, self.zero_point]
        kind = (x.shape, self.dtype, self.layer)
        if self.is_clipped and self.clips_floats:
            operands[0] = torch.minimum(torch.maximum(x, self._along(x, self.low)), self._along(x, self.high))
        if not self.is_clipped or self.clips_floats:
            return node("QuantizeLinear", operands, *kind, "integers", **self.attributes)
        q = node("QuantizeLinear", operands, *kind, **self.attributes)
        return node("Clip", [q, self.low, self.high], *kind, "integers")

    def _along(self, x: Tensor, value: Tensor) -> Tensor:
        """Returns a number, or one per channel, in a shape that broadcasts with ``x``."""
        axis = self.attributes.get("axis")
        return (
            value
            if axis is None
            else value.reshape([-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())])
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.dequantized(self.quantized(x), self.activation)


class DynamicQuantizer(nn.Module):
    """Quantizes a tensor to the grid of its own range; NaN and infinities are not considered."""

    def __init__(self, spec: QuantSpec, layer: str) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        self.dtype = quantized_dtype(spec.quant_min, spec.quant_max)

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the integers, scale and zero point; the last two broadcast with ``x`` unless they are scalars."""
        spec = self.spec
        if spec.granularity == PerTensor() and not spec.symmetric and spec.num_bits == 8:
            shapes: Any = [x.shape, (), ()]
            dtypes = [torch.uint8, torch.float32, torch.uint8]
            q, scale, zero_point = torch.onnx.ops.symbolic_multi_out(
                "DynamicQuantizeLinear", [x], dtypes=dtypes, shapes=shapes, metadata_props={LAYER: self.layer}
            )
            return q, scale, zero_point
        dims = _dims_within_block(x, spec.granularity)
        lo, hi = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
        tiny = torch.finfo(torch.float32).tiny
        if spec.symmetric:
            scale = torch.maximum(lo / spec.quant_min, hi / spec.quant_max).clamp(min=tiny)
            zero_point = torch.zeros_like(scale)
        else:
            scale = ((hi - lo) / (spec.quant_max - spec.quant_min)).clamp(min=tiny)
            zero_point = (spec.quant_min - (lo / scale).round()).clamp(spec.quant_min, spec.quant_max)
        q = ((x / scale).round() + zero_point).clamp(spec.quant_min, spec.quant_max)
        if spec.granularity == PerTensor():
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        return q.to(self.dtype), scale, zero_point.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        granularity, shape = self.spec.granularity, x.shape
        if isinstance(granularity, PerGroup):
            x = x.unflatten(-1, (-1, granularity.group_size))
        q, scale, zero_point = self.quantized(x)
        return ((q.float() - zero_point.float()) * scale).reshape(shape)


def _dims_within_block(x: Tensor, granularity: Any) -> list[int]:
    if isinstance(granularity, (PerToken, PerGroup)):
        return [x.dim() - 1]
    kept = granularity.axis % x.dim() if isinstance(granularity, PerChannel) else None
    return [dim for dim in range(x.dim()) if dim != kept]


def integers_after(activation: str | None, grid: Grid) -> tuple[int, int]:
    """Returns the least and the largest integer that an activation leaves."""
    low, high = grid.quant_min, grid.quant_max
    if activation is not None:
        low = max(low, int(grid.zero_point))
    if activation == "relu6":
        steps = torch.round(torch.full_like(grid.scale, 6.0) / grid.scale)
        high = min(high, int(grid.zero_point) + int(steps))
    return low, high
