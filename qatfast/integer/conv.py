"""The convolutions with an integer weight."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.modules.conv import _ConvTransposeNd

from .. import checks, functional, int8_convolution, kernels, packing, reference, requantization
from ..convolution import of_batch, traced_forward
from ..geometry import Geometry, as_batch, is_channels_last
from ..int8_convolution import Int8Weight
from ..modules import (
    QATConv1d,
    QATConv2d,
    QATConv3d,
    QATConvTranspose1d,
    QATConvTranspose2d,
    QATConvTranspose3d,
)
from ..modules.conv import _QATConvNd, _QATConvTransposeNd
from .base import Grid, IntegerLayer, fake_quantized
from .buffers import quantized_tensors


class _IntegerConv(IntegerLayer):
    """What all convolutions share."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    transposed = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._geometry = Geometry(
            self.stride, (), self.dilation, self.transposed, (0,) * len(self.kernel_size), self.groups
        )

    @classmethod
    def from_qat(cls, layer: Any) -> Any:
        arguments = {name: value for name, value in layer._arguments(layer).items() if name != "bias"}
        geometry = Geometry(layer.stride, (), layer.dilation, layer.transposed, (), layer.groups)
        buffers, requantization = quantized_tensors(layer, geometry.to_rows)
        spec = layer.config.weight
        if spec is None or packing.values_per_byte(spec.num_bits) == 1:
            buffers["weight"] = geometry.from_rows(buffers["weight"], layer.weight.shape).contiguous()
        return cls(arguments, layer.config, layer.weight.dtype, requantization, buffers)

    @property
    def rows(self) -> tuple[int, int]:
        return self.out_channels, self.in_channels // self.groups * prod(self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        first, second = self.out_channels, self.in_channels
        if self.transposed:
            first, second = second, first
        return (first, second // self.groups, *self.kernel_size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1, self.in_channels, *(1 for _ in self.kernel_size))

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (1, self.out_channels, *(1 for _ in self.kernel_size))

    def to_rows(self, weight: Tensor) -> Tensor:
        return self._geometry.to_rows(weight)

    def from_rows(self, rows: Tensor) -> Tensor:
        return self._geometry.from_rows(rows, torch.Size(self.weight_shape))

    def _output_spec(self) -> Any:
        return of_batch(self.config.output)

    def _apply_to(
        self, input: Tensor, geometry: Geometry, pad: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Tensor:
        self._check_input(input)
        name = type(self).__name__
        x = as_batch(name, input, self.in_channels, self.kernel_size, geometry, pad).detach()
        grid = self._input_grid(checks.compute_dtype(x.dtype))
        if self.requantization is not None:
            y = self._passed_on(self._of_integers(x, grid, geometry, pad), x)
        else:
            y = self._output(self._product(x, grid, geometry, pad), x)
        return y if x.dim() == input.dim() else y.squeeze(0)

    def _of_integers(
        self, x: Tensor, grid: Grid | None, geometry: Geometry, pad: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Returns the values of the integers that the layer gives."""
        spec = self.config.input
        assert grid is not None and spec is not None
        if not requantization.takes_int8(x, self.weight_zero_point is None):
            return self._requantized(self._sums(x, grid, geometry, pad), 1, x)
        ends, channels_last = (spec.quant_min, spec.quant_max), self._is_channels_last(x)
        function = requantization.traced_conv if is_compiling() else requantization.conv
        operands = self._kept(self._operands)
        return function(pad(x), *grid, ends, operands, self.kernel_size, geometry, channels_last)

    def _is_channels_last(self, x: Tensor) -> bool:
        return is_channels_last(x) or is_channels_last(self.weight)

    def _product(
        self, x: Tensor, grid: Grid | None, geometry: Geometry, pad: Callable[[Tensor], Tensor]
    ) -> Tensor:
        config, x_spec = self.config, of_batch(self.config.input)
        if not config.uses_int8_gemm(self.rows[1]):
            x_hat = fake_quantized(x, x_spec, grid)
            b_hat = self._b_hat(x, None)
            return geometry.convolve(pad(x_hat), self.dequantize(self._float_dtype(x)), b_hat)
        assert x_spec is not None
        scale, zero_point = functional.choose_qparams(x, **x_spec.arguments) if grid is None else grid
        b_hat = self._b_hat(x, scale)
        ops = kernels.route(x)
        if ops is None or not int8_convolution.takes(x):
            return self._exact_result(x, (scale, zero_point), b_hat, geometry, pad)
        weight, channels_last, padded = self._kept(self._int8_weight), self._is_channels_last(x), pad(x)
        ends, kernel_size = (x_spec.quant_min, x_spec.quant_max), self.kernel_size
        is_eager = ops is kernels.extension
        if (
            is_eager
            and scale.dim() == 0
            and int8_convolution.takes_pointwise(padded, weight.values, weight.packed, kernel_size, geometry)
        ):
            *ends_of_integers, zero_point = int8_convolution.unsigned(*ends, zero_point)
            return int8_convolution.pointwise(
                padded, scale, zero_point, ends_of_integers, weight, b_hat, channels_last
            )
        call: Any = int8_convolution.forward if is_eager else traced_forward
        value, _, _ = call(
            padded, scale, zero_point, *ends, weight, list(kernel_size), b_hat, geometry, channels_last
        )
        return value

    def _int8_weight(self) -> Int8Weight:
        values, (scale, zero_point) = self.integers(), self._rows_of_grid()
        if self.weight_zero_point is not None:  # int8 means symmetric there
            values = values.to(torch.int16)
        return Int8Weight(values.contiguous(), scale, zero_point, {})

    def _exact_result(
        self, x: Tensor, grid: Grid, b_hat: Tensor | None, geometry: Geometry, pad: Callable[[Tensor], Tensor]
    ) -> Tensor:
        sums = self._sums(x, grid, geometry, pad) + 0.0  # never -0.0
        ones = (1,) * (x.dim() - 2)
        scale = self._rows_of_grid()[0].to(grid[0].dtype)
        y = sums.to(scale.dtype) * (grid[0].reshape(-1, 1, *ones) * scale.reshape(1, -1, *ones))
        return y if b_hat is None else y + b_hat.to(y.dtype).reshape(1, -1, *ones)

    def _sums(
        self, x: Tensor, grid: Grid | None, geometry: Geometry, pad: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Returns the exact products of the integers, NaN in windows of the input that hold a NaN."""
        x_spec = of_batch(self.config.input)
        assert grid is not None and x_spec is not None
        levels = reference.levels(x, x_spec, *grid)
        return geometry.convolve(pad(levels), self.from_rows(self._levels()), None)


class _IntegerConvNd(_IntegerConv):
    """A convolution that is not transposed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        layer: Any = self._source._float_class(**self.arguments, bias=False, device="meta")
        self._reversed_padding_repeated_twice = layer._reversed_padding_repeated_twice

    forward = _QATConvNd.forward


class _IntegerConvTransposeNd(_IntegerConv):
    """A transposed convolution."""

    transposed = True
    output_padding: tuple[int, ...]
    forward = _QATConvTransposeNd.forward
    _output_padding = _ConvTransposeNd._output_padding


class IntegerConv1d(_IntegerConvNd):
    """A convolution with an integer weight, made of a :class:`qatfast.QATConv1d`."""

    _source = QATConv1d


class IntegerConv2d(_IntegerConvNd):
    """A convolution with an integer weight, made of a :class:`qatfast.QATConv2d`."""

    _source = QATConv2d


class IntegerConv3d(_IntegerConvNd):
    """A convolution with an integer weight, made of a :class:`qatfast.QATConv3d`."""

    _source = QATConv3d


class IntegerConvTranspose1d(_IntegerConvTransposeNd):
    """A transposed convolution with an integer weight, made of a :class:`qatfast.QATConvTranspose1d`."""

    _source = QATConvTranspose1d


class IntegerConvTranspose2d(_IntegerConvTransposeNd):
    """A transposed convolution with an integer weight, made of a :class:`qatfast.QATConvTranspose2d`."""

    _source = QATConvTranspose2d


class IntegerConvTranspose3d(_IntegerConvTransposeNd):
    """A transposed convolution with an integer weight, made of a :class:`qatfast.QATConvTranspose3d`."""

    _source = QATConvTranspose3d
