"""IntegerLinear, a linear layer with an integer weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks, functional, kernels, reference, requantization
from ..int8_convolution import Int8Weight, int8_rows
from ..modules import QATLinear
from ..modules.linear import _forward_nested
from ..requantization import Operands
from .base import Grid, IntegerLayer, fake_quantized
from .buffers import quantized_tensors


class IntegerLinear(IntegerLayer):
    """A linear layer with an integer weight; :func:`qatfast.convert` makes it of a :class:`qatfast.QATLinear`.

    It computes what that layer computes in evaluation, with the same bits: the product of integers, or
    ``F.linear(x_hat, w_hat, b_hat)``. As the first layer of a chain it computes the integers that the next layer
    reads, with BatchNorm and ReLU::

        q = clamp(round((acc + bias) * (input_scale * weight_scale / output_scale)) + output_zero_point, low, high)
        y = (q - output_zero_point) * output_scale

    The buffers are those of :class:`qatfast.integer.IntegerLayer`.

    Shape:
        That of ``nn.Linear``.
    """

    _source = QATLinear
    in_features: int
    out_features: int

    @classmethod
    def from_qat(cls, layer: Any) -> IntegerLinear:
        buffers, requantization = quantized_tensors(layer, lambda weight: weight)
        arguments = {"in_features": layer.in_features, "out_features": layer.out_features}
        return cls(arguments, layer.config, layer.weight.dtype, requantization, buffers)

    @property
    def rows(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, input: Tensor) -> Tensor:
        if getattr(input, "is_nested", False):
            return _forward_nested(self, input)  # type: ignore[arg-type]
        self._check_input(input)
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"{type(self).__name__}: expected input to have shape (..., {self.in_features}), got "
                f"{tuple(input.shape)}"
            )
        input = input.detach()
        grid = self._input_grid(checks.compute_dtype(input.dtype))
        if self.requantization is not None:
            return self._passed_on(self._of_integers(input, grid), input)
        return self._output(self.product(input, grid), input)

    def product(self, input: Tensor, grid: Grid | None, bias: Tensor | None = None) -> Tensor:
        """Returns the layer without the quantizer of its output.

        Args:
            input: ``(..., in_features)``.
            grid: of the input; None if its range is dynamic.
            bias: in the place of that of the layer.
        """
        config, x_spec = self.config, self.config.input
        if not config.uses_int8_gemm(self.in_features):
            x_hat = fake_quantized(input, x_spec, grid)
            return F.linear(x_hat, self.dequantize(self._float_dtype(input)), self._b_hat(input, None, bias))
        assert x_spec is not None
        if grid is None and config.has_int32_bias:
            grid = functional.choose_qparams(input, **x_spec.arguments)
        b_hat = self._b_hat(input, None if grid is None else grid[0], bias)
        ops = kernels.route(input)
        if ops is None or input.is_meta:
            x = reference._levels(input, x_spec, grid)
            scale = self._rows_of_grid()[0].to(x[1].dtype)
            y = reference._int8_gemm(x, (self._levels(), scale))
            return y if b_hat is None else y + b_hat.to(y.dtype)
        compute = checks.compute_dtype(input.dtype)
        weight = self._kept(lambda: self._int8_weight(compute))
        shape_of_weight = input.new_empty_strided(self.rows, (0, 0))  # the operator reads no more of it
        is_fused = b_hat is not None and b_hat.dtype == input.dtype
        y = ops.qat_linear_int8_static(
            input, shape_of_weight, b_hat if is_fused else None, weight, *(grid or (None, None)), None, None,
            config.codes,
        )  # fmt: skip
        return y if b_hat is None or is_fused else y + b_hat.to(y.dtype)

    def _of_integers(self, input: Tensor, grid: Grid | None) -> Tensor:
        """Returns the values of the integers that the layer gives."""
        spec = self.config.input
        assert grid is not None and spec is not None
        if not requantization.takes_int8(input, self._buffers["weight_zero_point"] is None):
            return self._requantized(self._sums(input, grid), -1, input)
        function = requantization.traced_linear if is_compiling() else requantization.linear
        return function(input, *grid, (spec.quant_min, spec.quant_max), self._kept(self._operands))

    def _operands(self) -> Operands:
        operands, spec = super()._operands(), self.config.input
        if is_compiling():
            return operands
        assert spec is not None and self.input_zero_point is not None
        return operands.of_linear(self.input_zero_point, (spec.quant_min, spec.quant_max))

    def _sums(self, input: Tensor, grid: Grid | None) -> Tensor:
        """Returns the exact products of the integers, NaN in rows of the input that hold a NaN."""
        x_levels, _ = reference._levels(input, self.config.input, grid)  # type: ignore[arg-type]
        return x_levels @ self._levels().t()

    def _int8_weight(self, compute: torch.dtype) -> tuple[Tensor, ...]:
        """Returns the weight as ``qat_linear_int8_weight`` does."""
        values, (scale, zero_point) = self.integers(), self._rows_of_grid()
        return int8_rows(values, Int8Weight(values, scale.to(compute), zero_point))
