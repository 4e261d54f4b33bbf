"""The quantized convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .. import checks, ranges, requantization, weight_cache
from ..chain import Carrier, Chain
from ..config import QUANTIZE, PerChannel, PerGroup, QATConfig
from ..convolution import allows_one_pass, of_batch, qat_conv, qat_conv_in_one_pass, takes_one_pass
from ..functional import fake_quantize
from ..geometry import Geometry, as_batch, is_channels_last
from ..int8_convolution import Int8Weight
from .base import (
    Obstacle,
    QuantizedLayer,
    TensorSpec,
    kind_name,
    open_recordings,
    static_config,
    wrong_dimensions,
)


def _unpadded(x: Tensor) -> Tensor:
    return x


class _QATConv(QuantizedLayer, _ConvNd):
    """What all convolutions share."""

    _caches_weight: ClassVar[bool] = True  # cached_weights selects layers by this attribute
    _allows_one_pass: bool = False  # whether the config allows qat_conv_in_one_pass

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"]
        names += ["padding_mode", *(["output_padding"] if module.transposed else [])]
        return {name: getattr(module, name) for name in names} | {"bias": module.bias is not None}

    @classmethod
    def _own_obstacle(cls, module: Any) -> Obstacle | None:
        return wrong_dimensions(module.weight, 2 + len(module.kernel_size))

    @classmethod
    def check_config(cls, config: QATConfig, module: Any) -> None:
        name = kind_name(cls)
        dims = 2 + len(module.kernel_size)
        fan_in = module.in_channels // module.groups * prod(module.kernel_size)
        for tensor, axis, legal in (
            ("weight", 0, (0, -2, -dims)),
            ("bias", 0, (0, -1)),
            ("input", 1, (1, 1 - dims)),
            ("output", 1, (1, 1 - dims)),
        ):
            spec = config.specs[tensor]
            if spec is None or (tensor == "bias" and module.bias is None):
                continue
            granularity = spec.granularity
            if isinstance(granularity, PerChannel) and granularity.axis not in legal:
                raise ValueError(
                    f"{name}: expected the axis of config.{tensor} to be {axis}, got {granularity.axis}; write "
                    f"PerChannel({axis}) for one scale per channel"
                )
            if not isinstance(granularity, PerGroup):
                continue
            if tensor in ("input", "output"):
                raise ValueError(
                    f"{name}: expected config.{tensor} per tensor, per channel or per token, got {granularity}"
                )
            size = fan_in if tensor == "weight" else module.out_channels
            if size % granularity.group_size != 0:
                what = "in_channels / groups * kernel elements" if tensor == "weight" else "out_channels"
                raise ValueError(
                    f"{name}: expected {what} to be divisible by group_size={granularity.group_size} of "
                    f"config.{tensor}, got {size}; write a group_size that divides {size}"
                )

    @property
    def _fan_in(self) -> int:
        return self.in_channels // self.groups * prod(self.kernel_size)

    def _tensors(self) -> dict[str, TensorSpec]:
        ones = (1,) * len(self.kernel_size)
        config = self.config
        return {
            "input_quantizer": TensorSpec(config.input, (1, self.in_channels, *ones)),
            "weight_quantizer": TensorSpec(config.weight, (self.out_channels, self._fan_in)),
            "output_quantizer": TensorSpec(config.output, (1, self.out_channels, *ones)),
        }

    def _set_mode(self, mode: str) -> None:
        super()._set_mode(mode)
        vars(self)["_allows_one_pass"] = allows_one_pass(self.config, self._fan_in)

    def _apply_to(
        self, input: Tensor, geometry: Geometry, pad: Callable[[Tensor], Tensor] = _unpadded
    ) -> Tensor:
        if open_recordings:
            self._record_call()
        parameters: dict[str, Any] = self._parameters
        if "weight" in parameters and "bias" in parameters:  # nn.Module.__getattr__ takes 0.5 us each
            weight, bias = parameters["weight"], parameters["bias"]
        else:  # computed from other parameters by a parametrization
            weight, bias = self.weight, self.bias
        dtype = ranges.product_dtype(weight)
        if isinstance(input, Carrier):
            is_open, input = input._is_open, input.read_by(self)
            if is_open:  # computed in float32 and rounded once
                weight, bias = weight.to(input.dtype), None if bias is None else bias.to(input.dtype)
        name = kind_name(type(self))
        checks.operands(name, input, weight, bias)
        x = as_batch(name, input, self.in_channels, self.kernel_size, geometry, pad)
        chain = self._chain
        acts = chain is not None and chain.acts()
        if acts:
            y = self._head_of_chain(chain, x, weight, bias, geometry, pad)  # type: ignore[arg-type]
        else:
            y = self._of_batch(x, weight, bias, geometry, pad)
        y = y if x.dim() == input.dim() else y.squeeze(0)
        if y.dtype != dtype and not (acts and chain.has_readers):  # type: ignore[union-attr]
            y = y.to(dtype)
        if chain is None or not (acts or self.config.output is None):
            return y
        return chain.carried(y, is_float=not acts)

    def _head_of_chain(
        self,
        chain: Chain,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        pad: Callable[[Tensor], Tensor],
    ) -> Tensor:
        def product(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
            return geometry.convolve(pad(x), geometry.from_rows(rows, weight.shape), bias)

        spec: Any = self.config.input
        channels_last = is_channels_last(x) or is_channels_last(weight)
        int8_conv = requantization.traced_conv if is_compiling() else requantization.conv

        def int8_product(scale: Tensor, zero_point: Tensor, operands: Any) -> Tensor:
            ends = (spec.quant_min, spec.quant_max)
            return int8_conv(
                pad(x), scale, zero_point, ends, operands, self.kernel_size, geometry, channels_last
            )

        rows = partial(geometry.to_rows, weight)  # a copy, if the weight is channels-last
        return chain.run(self, x, weight, bias, rows, product, 1, int8_product)

    def _of_batch(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        pad: Callable[[Tensor], Tensor],
    ) -> Tensor:
        own: dict[str, Any] = self._modules
        of_input, of_weight, of_output = (own.get(key) for key in self._quantizers)
        if self.config.output is None:  # one of a chain comes later
            of_output = None
        if self._mode != QUANTIZE:
            if of_input is not None:
                of_input.forward(x)
            if of_weight is not None:
                of_weight.forward(geometry.to_rows(weight))
            y = geometry.convolve(pad(x), weight, bias)
            return y if of_output is None else of_output.forward(y)
        config = self.config
        if self._allows_one_pass and pad is _unpadded and takes_one_pass(x, weight, bias):
            assert config.input is not None
            quantize: Any = partial(ranges.int8_conv_input, spec=config.input)
            grid = None
            if of_input is not None:
                quantize = partial(of_input.int8_conv_input, input=x, reader=self)
                grid = None if of_input.observes else partial(of_input.grid, x, self)
            y = qat_conv_in_one_pass(x, weight, bias, config, quantize, geometry, self._kept, grid)
        else:
            grids = {}
            if of_input is not None:
                grids["input"] = of_input.grid(x, self)
            if of_weight is not None:
                grids["weight"] = of_weight.grid(geometry.to_rows(weight), self)
            kept = partial(self._kept, grid=grids.get("weight"))
            y = qat_conv(x, weight, bias, config, grids, geometry, pad, kept)
        if of_output is not None:
            y = of_output.forward(y)
        elif self.config.output is not None:
            y = fake_quantize(y, **of_batch(self.config.output).arguments)  # type: ignore[union-attr]
        return y

    def _kept(self, quantize: Callable[[], Any], grid: tuple[Tensor, Tensor] | None = None) -> Any:
        """Returns what ``quantize`` returns for the weight or, in ``cached_weights``, returned for it.

        ``grid`` is that of a range that is not Dynamic. Its scale may need a gradient, which integers do not pass.
        """
        slot = weight_cache.slot_of(self)
        if slot is None or (
            grid is not None and torch.is_grad_enabled() and not self.config.uses_int8_gemm(self._fan_in)
        ):
            return quantize()

        def to_keep() -> Any:
            quantized = quantize()
            return quantized._replace(packed={}) if isinstance(quantized, Int8Weight) else quantized

        if grid is not None:
            return weight_cache.kept_for(slot, self.weight, self.config, [*grid], to_keep)
        return weight_cache.kept(slot, self.weight, self.config, to_keep)


class _QATConvNd(_QATConv):
    """A convolution that is not transposed."""

    _methods = ("forward", "_conv_forward")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        config: QATConfig | None = None,
    ) -> None:
        config = static_config(type(self), config)
        check_bias(type(self), bias)
        arguments: Any = (
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        super().__init__(*arguments)
        self._set_up(config)

    def forward(self, input: Tensor) -> Tensor:
        zeros = (0,) * len(self.kernel_size)
        amounts = self._reversed_padding_repeated_twice
        is_symmetric = amounts[::2] == amounts[1::2]
        rest = (self.dilation, False, zeros, self.groups)
        if self.padding_mode == "zeros" and is_symmetric:
            return self._apply_to(input, Geometry(self.stride, tuple(amounts[::-2]), *rest))
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return self._apply_to(
            input, Geometry(self.stride, zeros, *rest), lambda x: F.pad(x, amounts, mode=mode)
        )


class _QATConvTransposeNd(_QATConv, _ConvTransposeNd):
    """A transposed convolution."""

    _methods = ("forward", "_output_padding")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        config: QATConfig | None = None,
    ) -> None:
        config = static_config(type(self), config)
        check_bias(type(self), bias)
        arguments: Any = (
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        super().__init__(*arguments)
        self._set_up(config)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        padding: Any = self.padding
        arguments: Any = (self.stride, padding, self.kernel_size, len(self.kernel_size), self.dilation)
        output_padding = self._output_padding(input, output_size, *arguments)
        geometry = Geometry(self.stride, padding, self.dilation, True, tuple(output_padding), self.groups)
        return self._apply_to(input, geometry)


def check_bias(cls: type[QuantizedLayer], bias: Any) -> None:
    if not isinstance(bias, bool):
        raise TypeError(f"{kind_name(cls)}: expected bias to be a bool, got {bias!r}")


class QATConv1d(_QATConvNd, nn.Conv1d):
    """An ``nn.Conv1d`` that fake-quantizes its tensors; see :class:`QATConv2d`."""

    _float_class = nn.Conv1d


class QATConv2d(_QATConvNd, nn.Conv2d):
    """An ``nn.Conv2d`` that fake-quantizes its tensors.

    ::

        y = fake_quantize(F.conv2d(x_hat, w_hat, b_hat))

    Parameters, initial values and ``state_dict`` keys are those of ``nn.Conv2d``. For each range that is not
    ``Dynamic()`` the layer has a :class:`FakeQuantize`: ``input_quantizer``, ``weight_quantizer``,
    ``output_quantizer``. A ``state_dict`` of an ``nn.Conv2d`` loads strictly in any case. In the config,

    - the weight is a matrix with a row per output channel, also in a transposed convolution and with groups:
      ``PerChannel(0)`` is one scale per output channel, ``PerGroup(n)`` divides the row, which has
      ``in_channels / groups * kernel elements`` values;
    - ``PerToken()`` of input or output is one scale per sample, ``PerChannel(1)`` one per channel;
    - padding is 0.0, the zero point.

    If input (per tensor or per token) and weight (per tensor or per output channel) have at most 8 bits, the layer
    multiplies integers, with the same bits on every device::

        y = sum((q_x - zero_point_x) * (q_w - zero_point_w)) * (scale_x * scale_w) + b_hat

    The sum is exact and is rounded once to float32 (float64 for float64 input). The output's quantizer is applied
    next; the result is then rounded once to its dtype. A NaN in the input makes the outputs of its windows NaN, one in
    the weight its output channel. Gradients are those of the float formula with the straight-through estimator; kept
    for backward are the input's integers, a byte each, and the weight itself.

    The arguments are those of ``nn.Conv2d``, and

    Args:
        config: the specs of input, weight, bias and output. None means ``QATConfig.static()``.

    Shape:
        That of ``nn.Conv2d``; an input without a batch dimension is one sample.

    Raises:
        TypeError: ``config`` is not a QATConfig, ``bias`` is not a bool, or a tensor has a wrong dtype.
        ValueError: ``config`` does not fit the layer's tensors, or an input has a wrong shape.
        RuntimeError: the layer runs in evaluation and nothing has been observed; see :class:`FakeQuantize`.

    Source:
        Jacob et al. 2018 (arXiv 1712.05877), sections 2 and 3; STE: Bengio et al. 2013 (arXiv 1308.3432).

    Example:
        >>> import torch
        >>> QATConv2d(3, 8, 3, padding=1)(torch.randn(2, 3, 6, 6)).shape
        torch.Size([2, 8, 6, 6])
    """

    _float_class = nn.Conv2d


class QATConv3d(_QATConvNd, nn.Conv3d):
    """An ``nn.Conv3d`` that fake-quantizes its tensors; see :class:`QATConv2d`."""

    _float_class = nn.Conv3d


class QATConvTranspose1d(_QATConvTransposeNd, nn.ConvTranspose1d):
    """An ``nn.ConvTranspose1d`` that fake-quantizes its tensors; see :class:`QATConv2d`."""

    _float_class = nn.ConvTranspose1d


class QATConvTranspose2d(_QATConvTransposeNd, nn.ConvTranspose2d):
    """An ``nn.ConvTranspose2d`` that fake-quantizes its tensors; see :class:`QATConv2d`."""

    _float_class = nn.ConvTranspose2d


class QATConvTranspose3d(_QATConvTransposeNd, nn.ConvTranspose3d):
    """An ``nn.ConvTranspose3d`` that fake-quantizes its tensors; see :class:`QATConv2d`."""

    _float_class = nn.ConvTranspose3d
