"""The tensors of a deployed layer as integers on a grid, and models of PyTorch's q/dq operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .config import Granularity, PerChannel, PerGroup, PerTensor, QuantSpec


class Grid(NamedTuple):
    """How integers stand for the values of a tensor: ``y = (q - zero_point) * scale``.

    Attributes:
        scale: float32: a scalar, one per index of ``axis``, or with groups ``(rows, groups)``.
        zero_point: int32, in the shape of ``scale``.
        quant_min: the least integer.
        quant_max: the largest integer.
        axis: None per tensor; with groups the axis that they divide.
        group_size: None if the blocks are not groups.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    axis: int | None = None
    group_size: int | None = None

    @classmethod
    def of(cls, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> Grid:
        """Returns the grid with the scale and the zero point that a layer keeps; None is the zero point 0."""
        if zero_point is None:
            zero_point = torch.zeros_like(scale, dtype=torch.int32)
        zero_point = zero_point.expand_as(scale)
        granularity, ends = spec.granularity, (spec.quant_min, spec.quant_max)
        if isinstance(granularity, PerTensor) and scale.numel() == 1:
            return cls(scale.reshape(()), zero_point.reshape(()), *ends)
        if isinstance(granularity, PerGroup) and scale.shape[-1] > 1:
            return cls(scale, zero_point, *ends, 1, granularity.group_size)
        axis = granularity.axis if isinstance(granularity, PerChannel) else 0  # per token, or a group per row
        return cls(scale.reshape(-1), zero_point.reshape(-1), *ends, axis)

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest integer dtype that holds the integers."""
        if self.quant_max > 65535:
            return torch.int32
        return reference.quantized_dtype(self.quant_min, self.quant_max)

    @property
    def granularity(self) -> Granularity:
        """That of the tensor, for a grid without groups."""
        return PerTensor() if self.axis is None else PerChannel(self.axis)


def input_grid(layer: Any) -> Grid | None:
    """Returns the grid of an integer layer's input; None if it stays in float or its range is dynamic."""
    if layer.input_scale is None:
        return None
    return Grid.of(layer.config.input, layer.input_scale, layer.input_zero_point)


def output_grid(layer: Any) -> Grid | None:
    """Returns the grid of an integer layer's result; None if it stays in float or its range is dynamic."""
    if layer.output_scale is None:
        return None
    spec = layer.config.output if layer.requantization is None else layer.requantization.spec
    return Grid.of(spec, layer.output_scale, layer.output_zero_point)


def weight_rows(layer: Any) -> tuple[Tensor, Grid]:
    """Returns the integers of a weight as a matrix with a row per output channel, and their grid."""
    integers, spec = layer.integers(), layer.config.weight
    if layer.requantization is not None:  # a scale per row, whatever it was
        spec = QuantSpec(spec.num_bits, spec.symmetric, PerChannel(0))
    grid = Grid.of(spec, layer.weight_scale, layer.weight_zero_point)
    ends = torch.iinfo(integers.dtype)  # affine integers of 8 and 16 bits are stored less half of their range
    if not spec.symmetric and spec.num_bits in (8, 16):
        grid = grid._replace(quant_min=ends.min, quant_max=ends.max)
    return integers, grid._replace(axis=None if grid.axis is None else grid.axis % 2)
