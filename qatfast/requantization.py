"""Layers that requantize: exact int8 products, and the integers that follow from their sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, functional, int8_convolution, kernels, reference
from .config import QuantSpec
from .geometry import Geometry
from .int8_convolution import Int8Input, Int8Weight
from .reference import on_grid


class Operands(NamedTuple):
    """What a layer knows before its input: its weight's integers (int8), and what turns sums into integers.

    ``total`` holds the sum of each row of the weight, ``reach`` is the largest sum of products with its bias; both are
    None if they are not known. ``packed`` keeps what a library makes of the weight, ``arguments`` what the kernel of
    a linear layer takes after the input and its scale.
    """

    weight: Tensor
    b32: Tensor
    factor: Tensor
    low: Tensor
    high: Tensor
    y_scale: Tensor
    total: Tensor | None = None
    reach: int | None = None
    packed: dict[Any, Any] | None = None
    arguments: tuple[Any, ...] | None = None

    def with_sums(self, zero_point: Tensor, ends: tuple[int, int]) -> Operands:
        """Returns them for many calls with an input of this grid."""
        total = self.weight.sum(1, dtype=torch.int32)
        if not self.weight.is_cpu:  # which asks for no reach
            return self._replace(total=total)
        level = max(ends[1] - int(zero_point), int(zero_point) - ends[0])
        sizes = self.weight.double().abs().sum(1) * level + self.b32.abs()
        reach = int(sizes.max()) if len(sizes) else 0
        return self._replace(total=total, reach=reach, packed={})

    def of_linear(self, zero_point: Tensor, ends: tuple[int, int]) -> Operands:
        """Returns them for many calls of a linear layer with an input of this grid."""
        if not self.weight.is_cpu:
            return self
        zero_point, quant_min, quant_max = _int8(zero_point, ends)
        bounds = float(self.low), float(self.high), float(self.y_scale)
        offset = self._offset(zero_point)
        return self._replace(
            arguments=(zero_point, quant_min, quant_max, self.weight, offset, self.factor, *bounds)
        )

    def _offset(self, zero_point: Tensor) -> Tensor:
        """Returns what is added to the products of the weight with integers of this zero point."""
        total = self.weight.sum(1, dtype=torch.int32) if self.total is None else self.total
        return self.b32 - zero_point * total


def takes_int8(input: Tensor, is_symmetric: bool) -> bool:
    """Returns whether :func:`linear` and :func:`conv` take the input, and a weight that is symmetric or not."""
    return (
        kernels.extension is not None
        and (input.is_cpu or (input.is_cuda and kernels.route(input) is not None))
        and input.dtype != torch.float64
        and is_symmetric
        and not torch._C._are_functorch_transforms_active()
    )


def operands_of(
    weight: Tensor,
    bias: Tensor | None,
    spec: QuantSpec,
    weight_grid: tuple[Tensor, Tensor] | None,
    input_scale: Tensor,
    batch_norm: tuple[Any, Any, Any, Any, float] | None,
    activation: str | None,
    output: tuple[Tensor, Tensor],
    output_spec: QuantSpec,
) -> Operands:
    """Returns the operands of a layer with a float weight; see :func:`qatfast.reference.requantized`.

    Args:
        weight: a matrix with a row per output channel, not float64.
        bias: or None.
        spec: of the weight: symmetric.
        weight_grid: None if the range is Dynamic.
        input_scale: one element.
        batch_norm: as for ``reference.requantized``; so are the arguments after it.
        activation: None, ``"relu"`` or ``"relu6"``.
        output: scale and zero point of the result.
        output_spec: the spec of the result.
    """
    weight = weight.detach()
    grid = functional.choose_qparams(weight, **spec.arguments) if weight_grid is None else weight_grid
    scale = checks.positive_scale(grid[0]).reshape(checks.shape_of_qparams(weight.shape, spec.granularity))
    zero_point = grid[1].reshape(scale.shape)
    ends = (spec.quant_min, spec.quant_max)
    rows = functional.quantize(weight, scale, zero_point, *ends, granularity=spec.granularity)
    folded = reference.fold(scale.reshape(-1).expand(len(rows)), input_scale, bias, batch_norm)
    is_nan = weight.isnan().any(1) | folded.is_nan
    factor, low, high, y_scale = reference.requantization(
        input_scale, torch.where(is_nan, torch.nan, folded.scale), activation, output, output_spec
    )
    b32 = folded.b32.nan_to_num(0.0).to(torch.int32)
    return Operands(folded.of_rows(rows, torch.int8), b32, factor, low, high, y_scale)


def linear(
    input: Tensor, scale: Tensor, zero_point: Tensor, ends: tuple[int, int], operands: Operands
) -> Tensor:
    """Returns the result of a linear layer that requantizes, in float32.

    Args:
        input: ``(..., in_features)``, not float64.
        scale: of ``input``, per tensor.
        zero_point: likewise.
        ends: quant_min and quant_max of ``input``.
        operands: of the layer.
    """
    if operands.arguments is not None and input.numel() > 0:
        ops = kernels.route(input, scale)
        if ops is not None and ops is kernels.extension:
            return ops.int8_linear_requantized(input, scale, *operands.arguments)  # type: ignore[union-attr]
    weight = operands.weight
    rows = input.reshape(input.shape[:-1].numel(), weight.shape[1])
    zero_point, quant_min, quant_max = _int8(zero_point, ends)
    q = functional.quantize(rows, scale, zero_point, quant_min, quant_max)
    y = _requantized(_int_mm(q, weight), operands._offset(zero_point), operands)
    if not rows.is_cpu or (rows.numel() and rows.amax().isnan()):  # others do not wait for the answer
        y = y.masked_fill_(rows.isnan().any(1, keepdim=True), torch.nan)
    return y.view(*input.shape[:-1], len(weight))


def _int8(zero_point: Tensor, ends: tuple[int, int]) -> tuple[Tensor, int, int]:
    """Returns zero point, quant_min and quant_max of the int8 integers that stand for the same values."""
    shift = 128 if ends[0] >= 0 else 0
    return zero_point - shift, ends[0] - shift, ends[1] - shift


def _int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """Returns ``x @ weight.T`` of int8 matrices in int32, exact for less than 2^15 columns.

    On other devices than the CPU it is exact for any number of columns, in float64.
    """
    if not x.is_cpu:
        return int8_convolution.product_of_rows(x, weight)
    ops: Any = kernels.extension
    return ops.int8_mm(x, weight)


def conv(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    ends: tuple[int, int],
    operands: Operands,
    kernel_size: Sequence[int],
    geometry: Geometry,
    channels_last: bool,
) -> Tensor:
    """Returns the result of a convolution that requantizes, in float32.

    Args:
        input: ``(batch, channels, ...)``, not float64.
        scale: of ``input``, per tensor.
        zero_point: likewise.
        ends: quant_min and quant_max of ``input``.
        operands: of the layer; the weight is a matrix.
        kernel_size: of the layer.
        geometry: of the layer.
        channels_last: the memory format of the result.
    """
    quant_min, quant_max, zero_point = int8_convolution.unsigned(*ends, zero_point)
    weight, packed = operands.weight, operands.packed
    extension: Any = kernels.extension
    if (
        extension is not None
        and kernels.route(input, scale) is extension
        and operands.reach is not None
        and operands.reach < 2**31
        and int8_convolution.takes_pointwise(input, weight, packed, kernel_size, geometry)
    ):
        bounds = (float(operands.low), float(operands.high), float(operands.y_scale))
        y = extension.int8_conv_pointwise_requantized(
            input, scale, zero_point, quant_min, quant_max,
            int8_convolution.packed_pointwise(weight, packed), operands.b32, operands.factor, *bounds,
        )  # fmt: skip
        return int8_convolution.in_format(y, channels_last)
    q = functional.quantize(input, scale, zero_point, quant_min, quant_max)
    integers = Int8Input(q, scale, zero_point)
    integers = int8_convolution.with_nans(integers, input, int8_convolution.poison_of(input))
    kernel = Int8Weight(weight, operands.factor, torch.zeros_like(operands.b32), packed, operands.total)
    sums = int8_convolution.exact_sums(integers, kernel, kernel_size, geometry, operands.reach)
    matrix = sums.movedim(1, -1).reshape(-1, sums.shape[1])  # a view of sums in channels-last format
    y = _requantized(matrix, operands.b32, operands).view(len(sums), *sums.shape[2:], -1).movedim(-1, 1)
    return int8_convolution.in_format(y, channels_last)


def _requantized(sums: Tensor, offset: Tensor, operands: Operands) -> Tensor:
    """Returns the values of the integers that follow from ``sums + offset``; may write into ``sums``.

    Args:
        sums: ``(rows, outputs)``, int32, float32 or float64.
        offset: one element per output.
        operands: of the layer.
    """
    ops = None if sums.dtype == torch.float64 else kernels.extension
    if ops is not None:
        bounds = float(operands.low), float(operands.high)
        ops.int8_requantize_(sums, offset, operands.factor, *bounds, float(operands.y_scale))
        return sums.view(torch.float32)
    if sums.dtype == torch.float32:  # which does not hold sums + offset
        sums = sums.to(torch.int32)
    return on_grid((sums + offset).float(), operands.factor, operands.low, operands.high, operands.y_scale)


# As operators, which tracers take as they are


@torch.library.custom_op("qatfast::integer_linear", mutates_args=())
def _linear_operator(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    weight: Tensor,
    b32: Tensor,
    factor: Tensor,
    low: Tensor,
    high: Tensor,
    y_scale: Tensor,
) -> Tensor:
    """:func:`linear`."""
    operands = Operands(weight, b32, factor, low, high, y_scale)
    return linear(input, scale, zero_point, (quant_min, quant_max), operands)


@_linear_operator.register_fake
def _(input: Tensor, *arguments: Any) -> Tensor:
    return input.new_empty((*input.shape[:-1], arguments[4].shape[0]), dtype=torch.float32)


@torch.library.custom_op("qatfast::integer_conv", mutates_args=())
def _conv_operator(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    weight: Tensor,
    b32: Tensor,
    factor: Tensor,
    low: Tensor,
    high: Tensor,
    y_scale: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """:func:`conv`."""
    operands = Operands(weight, b32, factor, low, high, y_scale)
    geometry = Geometry.of_operator(stride, padding, dilation, transposed, output_padding, groups)
    return conv(
        input, scale, zero_point, (quant_min, quant_max), operands, kernel_size, geometry, channels_last
    )


@_conv_operator.register_fake
def _(input: Tensor, *arguments: Any) -> Tensor:
    weight, kernel_size, channels_last = arguments[4], arguments[10], arguments[-1]
    size = Geometry(*arguments[11:17]).output_size(input.shape[2:], kernel_size)
    y = input.new_empty((input.shape[0], weight.shape[0], *size), dtype=torch.float32)
    return int8_convolution.in_format(y, channels_last)


def traced_linear(
    input: Tensor, scale: Tensor, zero_point: Tensor, ends: tuple[int, int], operands: Operands
) -> Tensor:
    """:func:`linear` as an operator."""
    return torch.ops.qatfast.integer_linear(input, scale, zero_point, *ends, *_traced(operands))


def traced_conv(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    ends: tuple[int, int],
    operands: Operands,
    kernel_size: Sequence[int],
    geometry: Geometry,
    channels_last: bool,
) -> Tensor:
    """:func:`conv` as an operator."""
    return torch.ops.qatfast.integer_conv(
        input, scale, zero_point, *ends, *_traced(operands), list(kernel_size), *geometry, channels_last
    )


def _traced(operands: Operands) -> tuple[Tensor, ...]:
    """Returns the fields that the operators take: torch.compile of torch 2.8 traces no slice of a named tuple."""
    weight, b32, factor, low, high, y_scale, *_ = operands
    return weight, b32, factor, low, high, y_scale
