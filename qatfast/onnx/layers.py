"""The layers of a deployed model between QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import convolution, qdq
from ..config import QuantSpec
from ..geometry import Geometry, window_count
from ..integer import IntegerEmbedding, IntegerLinear
from ..qdq import Grid
from .nodes import Constant, DynamicQuantizer, Quantizer, barrier, node


class _Layer(nn.Module):
    """What linear layers and convolutions share.

    A layer that requantizes has the grid of its sums, which is that of its int32 bias.
    """

    bias: Any

    def __init__(self, layer: Any, name: str) -> None:
        super().__init__()
        self.name, self.dtype = name, layer.dtype
        self.requantizes = layer.requantization is not None
        self.multiplies_integers = layer.config.uses_int8_gemm(layer.rows[1])
        input, output = qdq.input_grid(layer), qdq.output_grid(layer)
        activation = layer.requantization.activation if self.requantizes else None
        self.input = quantizer(of_batch(layer, layer.config.input), input, name)
        self.output = quantizer(of_batch(layer, layer.config.output), output, name, activation)
        if self.requantizes:
            self.bias = Constant(layer.bias, qdq.grid_of_sums(layer), name)
        else:
            self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    def quantized_input(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.input is None:
            return x
        x = self.input(x)
        return x if self.multiplies_integers else barrier(x, self.name)

    def quantized_output(self, y: Tensor) -> Tensor:
        y = y if self.output is None else self.output(y)
        return y.to(self.dtype)


def quantizer(spec: QuantSpec | None, grid: Grid | None, name: str, activation: str | None = None) -> Any:
    """Returns what quantizes a tensor of a layer; None if it stays in float.

    Args:
        spec: of the tensor.
        grid: None if the range is dynamic.
        name: of the layer.
        activation: which the quantizer applies.
    """
    if grid is not None:
        return Quantizer(grid, name, activation)
    return None if spec is None else DynamicQuantizer(spec, name)


def of_batch(layer: Any, spec: QuantSpec | None) -> QuantSpec | None:
    """Returns the spec of a layer's input or output: per token of a convolution is one scale per sample."""
    return spec if isinstance(layer, (IntegerLinear, IntegerEmbedding)) else convolution.of_batch(spec)


def _role_of_weight(layer: Any) -> str:
    """Weights are stored in 4 bits where the layer multiplies floats: kernels on integers take int8."""
    multiplies_integers = layer.config.uses_int8_gemm(layer.rows[1])
    return "4 bits" if layer.config.weight.num_bits <= 4 and not multiplies_integers else ""


class Linear(_Layer):
    """Gemm with an int32 bias, or MatMul and Sum with a bias in float.

    onnxruntime multiplies integers in both. It would compute MatMul and Add, or Gemm with a bias in float, in float.
    """

    def __init__(self, layer: Any, name: str) -> None:
        super().__init__(layer, name)
        self.out_features, self.in_features = layer.rows
        if layer.config.weight is None:
            self.register_buffer("weight", layer.weight.detach().float().t().contiguous())
        else:
            integers, grid = qdq.weight_rows(layer)
            self.weight = Constant(integers.t().contiguous(), _transposed(grid), name, _role_of_weight(layer))

    def forward(self, x: Tensor) -> Tensor:
        if not self.requantizes:
            return self.quantized_output(self.product(self.quantized_input(x)))
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        y = self._node("Gemm", self.quantized_input(rows), self.weight(), self.bias(), role="product")
        y = self.quantized_output(y)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """Returns the layer of a quantized input, before the quantizer of its output."""
        weight = self.weight() if isinstance(self.weight, Constant) else self.weight
        y = self._node("MatMul", x, weight, role="product")
        return y if self.bias is None else self._node("Sum", y, self.bias)

    def _node(self, op_type: str, x: Tensor, *rest: Tensor, role: str = "") -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        return node(op_type, [x, *rest], shape, torch.float32, self.name, role)


def _transposed(grid: Grid) -> Grid:
    """Returns the grid of a matrix as that of the transposed matrix."""
    if grid.axis is None:
        return grid
    scale, zero_point = grid.scale, grid.zero_point
    if grid.group_size is not None:
        scale, zero_point = scale.t().contiguous(), zero_point.t().contiguous()
    return grid._replace(scale=scale, zero_point=zero_point, axis=1 - grid.axis % 2)


class Windows:
    """How a convolution moves over its input, for any operator that does."""

    def __init__(self, layer: Any) -> None:
        self.geometry = Geometry(layer.stride, (), layer.dilation, layer.transposed, (), layer.groups)
        self.kernel_size, self.channels, self.weight_shape = (
            layer.kernel_size,
            layer.out_channels,
            layer.weight_shape,
        )
        self.mode, self.layer = "zeros", layer
        if layer.transposed:
            self.pads = (*layer.padding, *layer.padding)
            return
        self.amounts = layer._reversed_padding_repeated_twice  # last dimension first, begin and end of each
        self.pads = (*self.amounts[::2][::-1], *self.amounts[1::2][::-1])
        if layer.padding_mode != "zeros":
            self.mode, self.pads = layer.padding_mode, (0,) * len(self.pads)

    def is_batch(self, x: Tensor) -> bool:
        return x.dim() == 2 + len(self.kernel_size)

    def pad(self, x: Tensor) -> Tensor:
        """Returns the input with the values that padding with zeros does not give."""
        return x if self.mode == "zeros" else F.pad(x, self.amounts, mode=self.mode)

    def node(
        self,
        op_type: str,
        inputs: list[Tensor],
        dtype: torch.dtype,
        name: str,
        role: str,
        output_size: list[int] | None,
        channels: int | None = None,
    ) -> Tensor:
        """Returns the result of a Conv, ConvInteger or ConvTranspose."""
        geometry, x = self.geometry, inputs[0]
        attributes: dict[str, Any] = {
            "strides": list(geometry.stride),
            "pads": list(self.pads),
            "dilations": list(geometry.dilation),
            "group": geometry.groups,
            "kernel_shape": list(self.kernel_size),
        }
        added = (0,) * len(self.kernel_size)
        if geometry.transposed:
            added = self._output_padding(x, output_size)
            attributes["output_padding"] = list(added)
        shape = (x.shape[0], channels or self.channels, *self._size(x, added))
        return node(op_type, inputs, shape, dtype, name, role, **attributes)

    def _output_padding(self, x: Tensor, output_size: list[int] | None) -> tuple[int, ...]:
        layer = self.layer
        dims = len(self.kernel_size)
        arguments = (layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation)
        return tuple(layer._output_padding(x, output_size, *arguments))

    def _size(self, x: Tensor, added: tuple[int, ...]) -> list[Any]:
        geometry, dims = self.geometry, len(self.kernel_size)
        pads = [begin + end for begin, end in zip(self.pads[:dims], self.pads[dims:], strict=True)]
        tuples = (self.kernel_size, geometry.stride, geometry.dilation, pads, added)
        sizes = list(zip(x.shape[2:], *tuples, strict=True))
        if geometry.transposed:
            return [(n - 1) * s - p + d * (k - 1) + a + 1 for n, k, s, d, p, a in sizes]
        return [window_count(n, k, s, p, d) for n, k, s, d, p, _ in sizes]


class Conv(_Layer):
    """Conv or ConvTranspose."""

    weight: Any

    def __init__(self, layer: Any, name: str) -> None:
        super().__init__(layer, name)
        self.windows = Windows(layer)
        if layer.config.weight is None:
            self.register_buffer("weight", layer.weight.detach().float())
            return
        integers, grid = qdq.weight_of_convolution(layer)
        self.weight = Constant(integers, grid, name, _role_of_weight(layer))

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        windows = self.windows
        weight = self.weight() if isinstance(self.weight, Constant) else self.weight
        if weight.shape != windows.weight_shape:
            weight = windows.geometry.from_rows(weight, torch.Size(windows.weight_shape))
        bias = self.bias() if isinstance(self.bias, Constant) else self.bias
        batch = x if windows.is_batch(x) else x.unsqueeze(0)
        operands = [windows.pad(self.quantized_input(batch)), weight, *([] if bias is None else [bias])]
        op_type = "ConvTranspose" if windows.geometry.transposed else "Conv"
        y = windows.node(op_type, operands, torch.float32, self.name, "product", output_size)
        y = self.quantized_output(y)
        return y if windows.is_batch(x) else y.squeeze(0)


class Embedding(nn.Module):
    """Gather of integer rows and of their scales."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    output: Any

    def __init__(self, layer: Any, name: str) -> None:
        super().__init__()
        self.dtype = layer.dtype
        self.output = quantizer(layer.config.output, qdq.output_grid(layer), name)
        self.grid: Any = None
        if layer.config.weight is None:
            self.register_buffer("weight", layer.weight.detach())
            return
        integers, self.grid = qdq.weight_rows(layer)
        self.register_buffer("weight", integers)
        self.register_buffer("scale", self.grid.scale.detach())
        self.register_buffer("zero_point", self.grid.zero_point.float())

    def forward(self, index: Tensor) -> Tensor:
        y = F.embedding(index, self.weight).float()
        if self.grid is not None:
            scale, zero_point = self.scale, self.zero_point
            if self.grid.axis == 0 or self.grid.group_size is not None:
                scale, zero_point = (F.embedding(index, x.reshape(len(x), -1)) for x in (scale, zero_point))
            groups = (-1, self.grid.group_size or y.shape[-1])
            y = ((y.unflatten(-1, groups) - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2)
        return (y if self.output is None else self.output(y)).to(self.dtype)
