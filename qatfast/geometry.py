"""The arguments of a convolution, and the layout of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """The arguments of a convolution; the tuples have a number per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @classmethod
    def of_operator(
        cls,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
    ) -> Geometry:
        """Returns it from the arguments of an operator, which are lists."""
        return cls(tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups)

    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the convolution as torch.nn.functional computes it, also under autocast."""
        dims = len(self.stride)
        function: Any
        if self.transposed:
            function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
            rest = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
            return function(input, weight, bias, *rest)
        function = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        return function(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def output_size(self, input_size: Sequence[int], kernel_size: Sequence[int]) -> list[int]:
        tuples = (self.stride, self.padding, self.dilation, self.output_padding)
        sizes = zip(input_size, kernel_size, *tuples, strict=True)
        if self.transposed:
            return [(i - 1) * s - 2 * p + d * (k - 1) + o + 1 for i, k, s, p, d, o in sizes]
        return [window_count(i, k, s, 2 * p, d) for i, k, s, p, d, _ in sizes]

    def is_pointwise(self, kernel_size: Sequence[int]) -> bool:
        """Returns whether the convolution is a matrix product at each position."""
        ones, zeros = (1,) * len(self.stride), (0,) * len(self.stride)
        if self.transposed or self.groups != 1 or tuple(kernel_size) != ones:
            return False
        return tuple(self.stride) == ones and tuple(self.padding) == zeros

    def fan_in(self, weight: Tensor) -> int:
        """Returns the number of products in a sum."""
        inputs = weight.shape[0] // self.groups if self.transposed else weight.shape[1]
        return inputs * prod(weight.shape[2:])

    def to_rows(self, weight: Tensor) -> Tensor:
        """Returns the weight as a matrix with a row per output channel, like that of a linear layer."""
        if self.transposed:
            sizes = (self.groups, weight.shape[0] // self.groups)
            weight = weight.unflatten(0, sizes).transpose(1, 2).flatten(0, 1)
        return weight.flatten(1)

    def from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Returns the matrix of ``to_rows`` as a weight of this shape."""
        if not self.transposed:
            return rows.view(shape)
        rows = rows.view(self.groups, shape[1], shape[0] // self.groups, *shape[2:])
        return rows.transpose(1, 2).reshape(shape)

    def memory_rows(self, weight: Tensor) -> Tensor:
        """Returns ``to_rows`` with columns in the order of memory, for grids that a row's order does not change.

        A weight in channels-last format is not copied.
        """
        if self.transposed or not is_channels_last(weight):
            return self.to_rows(weight)
        return weight.movedim(1, -1).flatten(1)

    def from_memory_rows(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Returns the matrix of ``memory_rows`` in the shape of ``weight``."""
        if self.transposed or not is_channels_last(weight):
            return self.from_rows(rows, weight.shape)
        return rows.view(weight.shape[0], *weight.shape[2:], weight.shape[1]).movedim(-1, 1)


def window_count(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Returns how many windows a dimension has; ``padding`` is that of both ends together."""
    return (size + padding - dilation * (kernel - 1) - 1) // stride + 1


def is_channels_last(x: Tensor) -> bool:
    if x.dim() not in (4, 5) or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def as_batch(
    name: str,
    input: Tensor,
    in_channels: int,
    kernel_size: Sequence[int],
    geometry: Geometry,
    pad: Callable[[Tensor], Tensor],
) -> Tensor:
    """Returns the input of a layer with a dimension of samples.

    Raises:
        ValueError: The input has another shape, or is smaller than the kernel.
    """
    dims = len(kernel_size)
    if input.dim() not in (dims + 1, dims + 2) or input.shape[-dims - 1] != in_channels:
        sizes = ", ".join("DHW"[-dims:])
        raise ValueError(
            f"{name}: expected input to have shape (N, {in_channels}, {sizes}) or ({in_channels}, {sizes}), got "
            f"{tuple(input.shape)}"
        )
    x = input if input.dim() == dims + 2 else input.unsqueeze(0)
    size = geometry.output_size(pad(x).shape[2:], kernel_size)
    if min(size) < 1:
        raise ValueError(
            f"{name}: expected an input that is at least as large as the kernel, got {tuple(input.shape)}, whose "
            f"output would have the size {tuple(size)}"
        )
    return x
