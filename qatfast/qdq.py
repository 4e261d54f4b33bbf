"""The tensors of a deployed layer as integers on a grid, and models of PyTorch's q/dq operators."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  defines torch.ops.quantized_decomposed
from torch.fx import GraphModule, Node
from torch.nn.modules.conv import _ConvTransposeNd

from . import checks, ranges, reference
from .config import Fixed, Granularity, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec
from .convolution import of_batch
from .geometry import Geometry
from .integer import IntegerEmbedding, IntegerLayer, IntegerLinear, IntegerMultiheadAttention
from .integer.base import integer_dtype
from .modules import FakeQuantize
from .modules.conv import _QATConvNd, _QATConvTransposeNd


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
        zero_point = zero_point.to(torch.int32).expand_as(scale)
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
        """The granularity of the tensor, for a grid without groups."""
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


def grid_of_sums(layer: Any) -> Grid:
    """Returns the grid of the sums of a layer that requantizes, which is that of its bias."""
    scale = reference.scale_of_sums(layer.input_scale, layer.weight_scale)
    ends = torch.iinfo(torch.int32)
    return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), ends.min, ends.max, 0)


def weight_of_convolution(layer: Any) -> tuple[Tensor, Grid]:
    """Returns the integers of a weight in the shape of the float layer, and their grid.

    Where the blocks of the scales are not on an axis of that shape, it is :func:`weight_rows`.
    """
    rows, grid = weight_rows(layer)
    is_per_channel = grid.axis == 0 and (not layer.transposed or layer.groups == 1)
    if grid.axis is not None and not is_per_channel:
        return rows, grid
    axis = None if grid.axis is None else int(layer.transposed)
    return layer.from_rows(rows).contiguous(), grid._replace(axis=axis)


def grid_of_quantizer(quantizer: FakeQuantize) -> Grid | None:
    """Returns the grid of a FakeQuantize in evaluation; None if its range is dynamic."""
    spec = quantizer.spec
    if spec.is_dynamic:
        return None
    if isinstance(spec.range, Fixed):  # the same for all channels
        spec = replace(spec, granularity=PerTensor())
        scale, zero_point = ranges.fixed_grid(torch.empty(0), spec)
    else:
        scale, zero_point = quantizer.grid(torch.empty(0))
    return Grid.of(spec, checks.positive_scale(scale), zero_point.detach())


def with_layers(model: nn.Module, made: Callable[[nn.Module, str], nn.Module]) -> nn.Module:
    """Returns a copy of an integer model with other layers.

    Args:
        model: whose integer layers and FakeQuantize modules are replaced.
        made: returns the new module for one of them and its name. One for an IntegerLinear has the methods
            ``quantized_input`` and ``product``, of which attention takes the projections.
    """
    replacements: dict[int, Any] = {
        id(module): made(module, name)
        for name, module in model.named_modules()
        if isinstance(module, (IntegerLayer, FakeQuantize))
    }
    result = copy.deepcopy(model, dict(replacements))
    for module in result.modules():
        if isinstance(module, IntegerMultiheadAttention):
            vars(module)["_projected"] = _Projections(module)
    return result.eval()


class _Projections:
    """The projections of query, key and value of an IntegerMultiheadAttention with other layers."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Tensors that are the same object are quantized once, by the first of their quantizers."""
        quantized: dict[int, Tensor] = {}
        results = []
        for x, name in zip((query, key, value), ("q_proj", "k_proj", "v_proj"), strict=True):
            layer = getattr(self.attention, name)
            if id(x) not in quantized:
                quantized[id(x)] = layer.quantized_input(x)
            results.append(layer.product(quantized[id(x)]))
        return results


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``x.to(dtype)``, without a node in traced graphs where that is ``x``."""
    return x if x.dtype == dtype else x.to(dtype)


# PyTorch's own operators

_ops = torch.ops.quantized_decomposed


def decomposed(model: nn.Module) -> nn.Module:
    """Returns a copy of an integer model with the operators of ``torch.ops.quantized_decomposed``.

    Each quantized tensor is quantized and dequantized around float operators, a pattern that ExecuTorch, LiteRT,
    Inductor and torchao replace by integer kernels. Biases are in float, as these expect them.
    """

    def made(module: nn.Module, name: str) -> nn.Module:
        if isinstance(module, FakeQuantize):
            return _FakeQuantizer(module)
        if isinstance(module, IntegerEmbedding):
            return _Embedding(module)
        if isinstance(module, IntegerLinear):
            return _Linear(module)
        return _ConvTranspose(module) if module.transposed else _Conv(module)

    return with_layers(model, made)


class _Quantizer(nn.Module):
    """Quantizes and dequantizes a tensor."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, grid: Grid | None) -> None:
        super().__init__()
        # XNNPACK and LiteRT take int8 only: affine integers of 8 and 16 bits are less half of their range
        shift = 0 if spec.symmetric or spec.num_bits not in (8, 16) else 2 ** (spec.num_bits - 1)
        self.spec = spec
        self.grid = grid = None if grid is None else grid._replace(zero_point=grid.zero_point - shift)
        self.ends = (spec.quant_min - shift, spec.quant_max - shift, integer_dtype(spec))
        if grid is not None and grid.axis is not None:
            self.register_buffer("scale", grid.scale.clone())
            self.register_buffer("zero_point", grid.zero_point.long())

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """Quantizes and dequantizes the result of an activation: None, ``"relu"`` or ``"relu6"``."""
        grid, granularity = self.grid, self.spec.granularity
        x = self._bounded(x, activation)
        if grid is None:
            return self._dynamic(x, granularity)
        if grid.axis is None:
            arguments = (float(grid.scale), int(grid.zero_point), *self.ends)
            return _ops.dequantize_per_tensor(_ops.quantize_per_tensor(x, *arguments), *arguments)
        blocks = (self.scale, self.zero_point, grid.axis % x.dim(), *self.ends)
        return _ops.dequantize_per_channel(_ops.quantize_per_channel(x, *blocks), *blocks)

    def _bounded(self, x: Tensor, activation: str | None) -> Tensor:
        """Returns the result of the activation, within the grid where that is narrower than the dtype.

        XNNPACK's kernels clamp to the bounds of the dtype, whatever those of the operator are.
        """
        grid, (quant_min, quant_max, dtype) = self.grid, self.ends
        ends = torch.iinfo(dtype)
        if grid is None or grid.axis is not None or (ends.min, ends.max) == (quant_min, quant_max):
            return _activated(x, activation)
        low, high = (float(grid.scale) * (end - int(grid.zero_point)) for end in (quant_min, quant_max))
        low = low if activation is None else 0.0
        return F.hardtanh(x, low, min(high, 6.0) if activation == "relu6" else high)

    def _dynamic(self, x: Tensor, granularity: Granularity) -> Tensor:
        spec, dtype = self.spec, self.ends[2]
        if granularity == PerTensor():
            choose = _ops.choose_qparams_symmetric if spec.symmetric else _ops.choose_qparams
            grid = choose.tensor(x, *self.ends[:2], torch.finfo(torch.float32).tiny, dtype)
            arguments = (*grid, *self.ends)
            return _ops.dequantize_per_tensor.tensor(
                _ops.quantize_per_tensor.tensor(x, *arguments), *arguments
            )
        if granularity == PerToken() and (spec.num_bits, spec.symmetric) == (8, False):
            tokens = (*_ops.choose_qparams_per_token_asymmetric(x, dtype), *self.ends)
            return _ops.dequantize_per_token(_ops.quantize_per_token(x, *tokens), *tokens, torch.float32)
        # there is no operator for other bits, or per channel or group: plain arithmetic
        return reference.fake_quantize(x, **spec.arguments)


def _activated(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    return F.relu6(x) if activation == "relu6" else F.relu(x)


def _weight(layer: Any, stored: Callable[[Any], tuple[Tensor, Grid]]) -> nn.Module:
    """Returns the module whose result is the weight."""
    if layer.config.weight is None:
        return _FloatWeight(layer.weight.detach().float())
    integers, grid = stored(layer)
    integers = integers.to(integer_dtype(layer.config.weight)).clone()
    return (_SymmetricWeight if layer.config.weight.symmetric else _AffineWeight)(integers, grid)


class _FloatWeight(nn.Module):
    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def forward(self) -> Tensor:
        return self.values


class _SymmetricWeight(_FloatWeight):
    """Dequantizes the weight by the operators that runtimes look for."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, integers: Tensor, grid: Grid) -> None:
        super().__init__(integers)
        self.grid = grid
        self.ends = (grid.quant_min, grid.quant_max, integers.dtype)
        self.register_buffer("scale", grid.scale.clone())
        self.register_buffer("zero_point", grid.zero_point.long())

    def forward(self) -> Tensor:
        grid, ends = self.grid, self.ends
        if grid.axis is None:
            return _ops.dequantize_per_tensor(self.values, float(grid.scale), int(grid.zero_point), *ends)
        if grid.group_size is None:
            return _ops.dequantize_per_channel(self.values, self.scale, self.zero_point, grid.axis, *ends)
        return _ops.dequantize_per_channel_group(
            self.values, self.scale, self.zero_point, *ends, grid.group_size, torch.float32
        )


class _AffineWeight(_FloatWeight):
    """Dequantizes the weight by plain arithmetic: XNNPACK takes the operators, and ignores the zero point."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, integers: Tensor, grid: Grid) -> None:
        super().__init__(integers)
        blocks = [1] * integers.dim()
        if grid.axis is not None:
            blocks[grid.axis] = -1
        self.blocks = integers.shape
        if grid.group_size is not None:
            self.blocks, blocks = torch.Size((len(integers), -1, grid.group_size)), [len(integers), -1, 1]
        self.register_buffer("scale", grid.scale.reshape(blocks).clone())
        self.register_buffer("zero_point", grid.zero_point.reshape(blocks).float())

    def forward(self) -> Tensor:
        levels = self.values.float().view(self.blocks) - self.zero_point
        return (levels * self.scale).view(self.values.shape)


class _Layer(nn.Module):
    """What linear layers and convolutions share."""

    bias: Tensor | None

    def __init__(self, layer: Any, specs: list[QuantSpec | None], stored: Any) -> None:
        super().__init__()
        self.dtype = layer.dtype
        self.input = _quantizer(specs[0], input_grid(layer))
        output = output_grid(layer)
        self.activation = None
        if layer.requantization is not None:
            specs[1], self.activation = layer.requantization.spec, layer.requantization.activation
        self.output = _quantizer(specs[1], output)
        self.weight = _weight(layer, stored)
        bias = layer.bias
        if bias is not None and layer.requantization is not None:
            bias = (bias.double() * grid_of_sums(layer).scale.double()).float()
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def quantized_input(self, x: Tensor) -> Tensor:
        x = as_dtype(x, torch.float32)
        return x if self.input is None else self.input(x)

    def quantized_output(self, y: Tensor) -> Tensor:
        return as_dtype(y if self.output is None else self.output(y, self.activation), self.dtype)


class _Linear(_Layer):
    def __init__(self, layer: Any) -> None:
        super().__init__(layer, [layer.config.input, layer.config.output], weight_rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantized_output(self.product(self.quantized_input(x)))

    def product(self, x: Tensor) -> Tensor:
        """Returns the layer of a quantized input, before the quantizer of its output."""
        return F.linear(x, self.weight(), self.bias)


class _Conv(_Layer):
    weight_shape: torch.Size
    forward = _QATConvNd.forward

    def __init__(self, layer: Any) -> None:
        specs = [of_batch(layer.config.input), of_batch(layer.config.output)]
        super().__init__(layer, specs, weight_of_convolution)
        vars(self).update(layer.arguments, weight_shape=torch.Size(layer.weight_shape))
        if not layer.transposed:
            self._reversed_padding_repeated_twice = layer._reversed_padding_repeated_twice

    def _apply_to(
        self, x: Tensor, geometry: Geometry, pad: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Tensor:
        weight = self.weight()
        if weight.shape != self.weight_shape:
            weight = geometry.from_rows(weight, self.weight_shape)
        return self.quantized_output(geometry.convolve(pad(self.quantized_input(x)), weight, self.bias))


class _ConvTranspose(_Conv):
    forward = _QATConvTransposeNd.forward
    _output_padding = _ConvTransposeNd._output_padding


class _Embedding(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.dtype = layer.dtype
        self.weight = _weight(layer, weight_rows)
        self.output = _quantizer(layer.config.output, output_grid(layer))

    def forward(self, index: Tensor) -> Tensor:
        y = F.embedding(index, self.weight())
        return as_dtype(y if self.output is None else self.output(y), self.dtype)


class _FakeQuantizer(nn.Module):
    def __init__(self, module: FakeQuantize) -> None:
        super().__init__()
        self.quantizer = _Quantizer(module.spec, grid_of_quantizer(module))

    def forward(self, x: Tensor) -> Tensor:
        return as_dtype(self.quantizer(as_dtype(x, torch.float32)), x.dtype)


def _quantizer(spec: QuantSpec | None, grid: Grid | None) -> _Quantizer | None:
    return None if spec is None else _Quantizer(spec, grid)


def with_float_weights(module: GraphModule) -> GraphModule:
    """Returns a copy of an exported ``"quantized_decomposed"`` model that quantizes its weights itself.

    LiteRT's converter expects each weight as floats that QuantizeLinear makes integers; its files hold the integers.

    Args:
        module: ``torch.export.export(qatfast.convert(model, form="quantized_decomposed"), inputs).module()``.
    """
    result = copy.deepcopy(module)
    for node in list(result.graph.nodes):
        quantize = _QUANTIZE.get(node.target)
        if quantize is None or node.args[0].op != "get_attr":
            continue
        integers, arguments = node.args[0], node.args[1:]
        values = [_attribute(result, arg) if isinstance(arg, Node) else arg for arg in (integers, *arguments)]
        name = f"{node.name}_values"
        result.register_buffer(name, node.target(*values))
        with result.graph.inserting_before(node):
            floats = result.graph.get_attr(name)
            node.replace_input_with(integers, result.graph.call_function(quantize, (floats, *arguments)))
    result.graph.eliminate_dead_code()
    result.recompile()
    return result


def with_uint8_activations(module: GraphModule) -> GraphModule:
    """Returns a copy of an exported ``"quantized_decomposed"`` model with uint8 in the place of int8 activations.

    The values are the same. The convolutions of Inductor and torchao take uint8; ExecuTorch and LiteRT take int8.

    Args:
        module: ``torch.export.export(qatfast.convert(model, form="quantized_decomposed"), inputs).module()``.
    """
    result = copy.deepcopy(module)
    for node in result.graph.nodes:
        is_activation = node.target in _PER_TENSOR and node.args[0].op != "get_attr"
        if is_activation and node.args[-3:] == (-128, 127, torch.int8):
            x, scale, zero_point = node.args[:3]
            node.args = (x, scale, zero_point + 128, 0, 255, torch.uint8)
    result.recompile()
    return result


_QUANTIZE = {
    _ops.dequantize_per_tensor.default: _ops.quantize_per_tensor.default,
    _ops.dequantize_per_channel.default: _ops.quantize_per_channel.default,
}
_PER_TENSOR = frozenset([_ops.quantize_per_tensor.default, _ops.dequantize_per_tensor.default])


def _attribute(module: nn.Module, node: Node) -> Any:
    return attrgetter(str(node.target))(module)
