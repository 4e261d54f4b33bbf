"""Fake quantization as tutorials write it: a chain of PyTorch calls whose gradient is passed on unchanged.

It rounds after adding the zero point, and its range does not include 0 unless the values do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import Granularity, PerChannel, PerGroup, PerTensor

QUANT_MAX = 255


def blocks(x: Tensor, granularity: Granularity) -> tuple[Tensor, tuple[int, ...] | None]:
    """Returns ``x``, viewed as groups if needed, and the dimensions that share a scale, None for all of them."""
    if isinstance(granularity, PerTensor):
        return x, None
    if isinstance(granularity, PerGroup):
        return x.unflatten(-1, (-1, granularity.group_size)), (-1,)
    if isinstance(granularity, PerChannel):
        return x, tuple(dim for dim in range(x.dim()) if dim != granularity.axis % x.dim())
    return x, (-1,)


def choose_qparams(x: Tensor, dims: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point, both as floats."""
    if dims is None:
        low, high = x.min(), x.max()
    else:
        low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    scale = (high - low) / QUANT_MAX
    return scale, torch.round(-low / scale)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Returns the integers, as floats."""
    return torch.clamp(torch.round(x / scale + zero_point), 0, QUANT_MAX)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Returns the values that the integers stand for."""
    return (q - zero_point) * scale


class FakeQuantize(torch.autograd.Function):
    """Quantizes and dequantizes, in the range of the input or with a given ``(scale, zero_point)``."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        granularity: Granularity = PerTensor(),
        qparams: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        x, dims = blocks(input, granularity)
        scale, zero_point = qparams or choose_qparams(x, dims)
        return dequantize(quantize(x, scale, zero_point), scale, zero_point).reshape(input.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class Linear(nn.Linear):
    """A linear layer whose weight, bias and output are fake-quantized."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = FakeQuantize.apply(self.weight), FakeQuantize.apply(self.bias)
        return FakeQuantize.apply(nn.functional.linear(input, weight, bias))


class Int8Linear(nn.Linear):
    """A linear layer whose input is fake-quantized per tensor and whose weight per output channel."""

    def forward(self, input: Tensor) -> Tensor:
        weight = FakeQuantize.apply(self.weight, PerChannel(0))
        return nn.functional.linear(FakeQuantize.apply(input), weight, self.bias)
