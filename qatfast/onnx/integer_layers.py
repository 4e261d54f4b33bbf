"""The layers of a deployed model as products of integers, with the arithmetic around them written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, qdq, reference
from ..config import PerTensor
from ..qdq import Grid
from .layers import Windows, of_batch, quantizer
from .nodes import DynamicQuantizer, Quantizer, node

Quantized = tuple[Tensor, Tensor, Tensor]  # the integers, scale and zero point


class _Layer(nn.Module):
    """What linear layers and convolutions share.

    ::

        y = float(acc) * (input_scale * weight_scale) + bias                            or, where it requantizes,
        q = clamp(round(float(acc + bias) * (input_scale * weight_scale / output_scale)) + output_zero_point, low, high)

    ``acc`` is the exact sum of the products of the integers.
    """

    weight: Tensor
    weight_zero_point: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    factor: Tensor
    one: Tensor

    def __init__(self, layer: Any, name: str, trailing: int) -> None:
        """``trailing`` is the number of dimensions behind that of the channels in the result."""
        super().__init__()
        self.name, self.dtype, self.config = name, layer.dtype, layer.config
        self.shape = (-1,) + (1,) * trailing
        self.requantizes = layer.requantization is not None
        activation = layer.requantization.activation if self.requantizes else None
        self.input = quantizer(of_batch(layer, layer.config.input), qdq.input_grid(layer), name)
        output = qdq.output_grid(layer)
        self.output = quantizer(of_batch(layer, layer.config.output), output, name, activation)
        rows, grid = qdq.weight_rows(layer)
        self._set_weight(layer, rows.to(grid.dtype), grid)
        self.register_buffer("weight_scale", grid.scale.reshape(self.shape).clone())
        bias = layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach().reshape(self.shape).clone())
        if output is not None and self.requantizes:
            scale = reference.scale_of_sums(layer.input_scale, self.weight_scale)
            factor = scale / checks.positive_scale(output.scale)
            self.register_buffer("factor", factor.clamp(max=reference.FLOAT32_MAX))
            self.register_buffer("one", torch.ones(()))

    def _set_weight(self, layer: Any, rows: Tensor, grid: Grid) -> None:
        raise NotImplementedError

    def quantized_input(self, x: Tensor) -> Quantized:
        x = x.float()
        if isinstance(self.input, DynamicQuantizer):
            return self.input.quantized(x)
        return self.input.quantized(x), self.input.scale, self.input.zero_point

    def result(self, acc: Tensor, input_scale: Tensor) -> Tensor:
        """Returns the float result of int32 sums, before the quantizer of the output."""
        if self.requantizes:
            assert self.bias is not None
            return (acc + self.bias).float() * self.factor
        scale = input_scale * self.weight_scale
        y = acc.float() * scale
        if self.bias is None:
            return y
        if self.config.has_int32_bias and isinstance(self.input, DynamicQuantizer):
            step = scale.clamp(min=torch.finfo(torch.float32).tiny).double()
            return y + ((self.bias.double() / step).round() * step).float()
        return y + self.bias

    def quantized_output(self, y: Tensor) -> Tensor:
        if self.requantizes:
            y = self.output.dequantized(self.output.quantized(y, self.one), self.output.activation)
        elif self.output is not None:
            y = self.output(y)
        return y.to(self.dtype)


class Linear(_Layer):
    """MatMulInteger."""

    sums: Tensor

    def __init__(self, layer: Any, name: str) -> None:
        super().__init__(layer, name, 0)

    def _set_weight(self, layer: Any, rows: Tensor, grid: Grid) -> None:
        self.out_features, self.in_features = rows.shape
        zero_point = grid.zero_point.expand(self.out_features)
        self.register_buffer("weight", rows.t().contiguous())
        self.register_buffer("weight_zero_point", zero_point.to(grid.dtype).contiguous())
        # of the levels of a row, to correct for a zero point per row of the input
        sums = rows.sum(1, dtype=torch.int64) - zero_point.long() * self.in_features
        self.register_buffer("sums", sums.to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return self.quantized_output(self.product(self.quantized_input(x)))

    def product(self, x: Quantized) -> Tensor:
        """Returns the layer of a quantized input, before the quantizer of its output."""
        q, scale, zero_point = x
        is_scalar = zero_point.dim() == 0
        of_input = zero_point if is_scalar else torch.zeros((), dtype=q.dtype)
        operands = [q, self.weight, of_input, self.weight_zero_point]
        shape = (*q.shape[:-1], self.out_features)
        acc = node("MatMulInteger", operands, shape, torch.int32, self.name, "product")
        if not is_scalar:
            acc = acc - zero_point.to(torch.int32) * self.sums
        return self.result(acc, scale)


class Conv(_Layer):
    """ConvInteger, or a convolution of levels in float32, which is exact below 2^24.

    ConvInteger is not transposed, and its zero points are scalars.
    """

    levels: Tensor
    ones: Tensor | None  # a kernel of ones: sums of the input's levels, for zero points per channel
    zero: Tensor  # the zero point of the weight

    def __init__(self, layer: Any, name: str) -> None:
        super().__init__(layer, name, len(layer.kernel_size))
        self.windows = Windows(layer)

    def _set_weight(self, layer: Any, rows: Tensor, grid: Grid) -> None:
        self.uses_levels = layer.transposed or layer.config.input.granularity != PerTensor()
        zero_point = grid.zero_point
        if self.uses_levels:
            levels = rows.to(torch.int32) - zero_point.reshape(-1, 1)
            self._check_sums(levels)
            self.register_buffer("levels", layer.from_rows(levels.float()).contiguous())
            return
        self.register_buffer("weight", layer.from_rows(rows).contiguous())
        self.register_buffer("ones", None)
        self.register_buffer("zero", torch.zeros((), dtype=grid.dtype))
        if zero_point.numel() > 1 and bool((zero_point != 0).any()):
            shape = (layer.groups, *self.weight.shape[1:])
            self.register_buffer("ones", torch.ones(shape, dtype=grid.dtype))
            self.register_buffer("weight_zero_point", zero_point.reshape(self.shape).clone())
        elif zero_point.numel() == 1:
            self.zero = zero_point.reshape(()).to(grid.dtype)

    def _check_sums(self, levels: Tensor) -> None:
        """Raises ValueError if a sum of levels may not be exact in float32."""
        if isinstance(self.input, Quantizer):
            ends = torch.stack([self.input.low, self.input.high]).to(torch.int32)
            largest = int((ends - self.input.zero_point.to(torch.int32)).abs().max())
        else:
            largest = self.input.spec.quant_max - self.input.spec.quant_min
        bound = largest * int(levels.abs().sum(1).max())
        if bound >= 2**24:
            raise ValueError(
                "qatfast.onnx.export: expected sums below 2^24 in a layer that the form 'integer' computes as a "
                f"convolution of floats, got up to {bound} in {self.name!r}; write form='qdq'"
            )

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        windows = self.windows
        batch = x if windows.is_batch(x) else x.unsqueeze(0)
        q, scale, zero_point = self.quantized_input(batch)
        acc = self._sums(windows.pad(q), zero_point, output_size)
        y = self.quantized_output(self.result(acc, scale))
        return y if windows.is_batch(x) else y.squeeze(0)

    def _sums(self, q: Tensor, zero_point: Tensor, output_size: list[int] | None) -> Tensor:
        windows, geometry = self.windows, self.windows.geometry
        if self.uses_levels:
            operands = [q.float() - zero_point.float(), self.levels]
            op_type = "ConvTranspose" if geometry.transposed else "Conv"
            sums = windows.node(op_type, operands, torch.float32, self.name, "levels", output_size)
            return sums.to(torch.int32)
        operands = [q, self.weight, zero_point, self.zero]
        acc = windows.node("ConvInteger", operands, torch.int32, self.name, "product", None)
        if self.ones is None:
            return acc
        operands = [q, self.ones, zero_point, self.zero]
        totals = windows.node("ConvInteger", operands, torch.int32, self.name, "", None, geometry.groups)
        totals = totals.repeat_interleave(windows.channels // geometry.groups, 1)
        return acc - totals * self.weight_zero_point
