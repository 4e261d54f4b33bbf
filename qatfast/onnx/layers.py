"""The layers of a deployed model between QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import qdq
from ..convolution import Geometry
from ..integer import IntegerEmbedding, IntegerLayer, IntegerLinear, IntegerMultiheadAttention
from ..modules import FakeQuantize
from ..qdq import Grid
from .nodes import Constant, Quantizer, node


class _Layer(nn.Module):
    """What linear layers and convolutions share.

    A layer that requantizes has the grid of its sums, which is that of its int32 bias.
    """

    bias: Any

    def __init__(self, layer: Any, name: str) -> None:
        super().__init__()
        self.name, self.dtype = name, layer.dtype
        self.requantizes = layer.requantization is not None
        input, output = qdq.input_grid(layer), qdq.output_grid(layer)
        activation = layer.requantization.activation if self.requantizes else None
        self.input = None if input is None else Quantizer(input, name)
        self.output = None if output is None else Quantizer(output, name, activation)
        if self.requantizes:
            self.bias = Constant(layer.bias, _grid_of_sums(layer), name)
        else:
            self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    def quantized_input(self, x: Tensor) -> Tensor:
        x = x.float()
        return x if self.input is None else self.input(x)

    def quantized_output(self, y: Tensor) -> Tensor:
        y = y if self.output is None else self.output(y)
        return y.to(self.dtype)


def _grid_of_sums(layer: Any) -> Grid:
    scale = (layer.input_scale * layer.weight_scale).clamp(min=torch.finfo(torch.float32).tiny)
    ends = torch.iinfo(torch.int32)
    return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), ends.min, ends.max, 0)


def _role_of_weight(layer: Any) -> str:
    """Weights are stored in 4 bits where the input stays in float: kernels on integers take int8."""
    return "4 bits" if layer.config.input is None and layer.config.weight.num_bits <= 4 else ""


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


class Conv(_Layer):
    """Conv or ConvTranspose; padding with other values than zeros is a Pad before it."""

    def __init__(self, layer: Any, name: str) -> None:
        super().__init__(layer, name)
        self.geometry = Geometry(layer.stride, (), layer.dilation, layer.transposed, (), layer.groups)
        self.kernel_size, self.out_channels = layer.kernel_size, layer.out_channels
        self.weight_shape = layer._weight_shape
        dims = len(layer.kernel_size)
        if layer.transposed:
            self.padding_mode, self.pads = "zeros", layer.padding * 2
            self._output_padding, self.padding = layer._output_padding, layer.padding
        else:
            amounts = layer._reversed_padding_repeated_twice  # last dimension first, begin and end of each
            self.padding_mode, self.amounts = layer.padding_mode, amounts
            self.pads = (*amounts[::2][::-1], *amounts[1::2][::-1])
        if self.padding_mode != "zeros":
            self.pads = (0,) * 2 * dims
        self._set_weight(layer, name)

    def _set_weight(self, layer: Any, name: str) -> None:
        """Stores the weight in its shape, or as a matrix where the blocks of its scales are not on an axis of that."""
        if layer.config.weight is None:
            self.register_buffer("weight", layer.weight.detach().float())
            return
        rows, grid = qdq.weight_rows(layer)
        is_per_row = grid.axis == 0 and (not layer.transposed or layer.groups == 1)
        if grid.axis is None or is_per_row:
            axis = None if grid.axis is None else int(layer.transposed)
            rows, grid = self.geometry.from_rows(rows, self.weight_shape), grid._replace(axis=axis)
        self.weight = Constant(rows.contiguous(), grid, name, _role_of_weight(layer))

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        weight = self.weight() if isinstance(self.weight, Constant) else self.weight
        if weight.shape != self.weight_shape:
            weight = self.geometry.from_rows(weight, self.weight_shape)
        dims = len(self.kernel_size)
        is_batch = x.dim() == dims + 2
        x = x if is_batch else x.unsqueeze(0)
        x = self.quantized_input(x)
        if self.padding_mode != "zeros":
            x = F.pad(x, self.amounts, mode=self.padding_mode)
        bias = self.bias() if isinstance(self.bias, Constant) else self.bias
        operands = [x, weight, *([] if bias is None else [bias])]
        attributes, size = self._attributes(x, output_size)
        op_type = "ConvTranspose" if self.geometry.transposed else "Conv"
        shape = (x.shape[0], self.out_channels, *size)
        y = node(op_type, operands, shape, torch.float32, self.name, "product", **attributes)
        y = self.quantized_output(y)
        return y if is_batch else y.squeeze(0)

    def _attributes(self, x: Tensor, output_size: list[int] | None) -> tuple[dict[str, Any], list[Any]]:
        """Returns the attributes of the node, and the size of the result."""
        geometry, dims = self.geometry, len(self.kernel_size)
        attributes: dict[str, Any] = {
            "strides": list(geometry.stride),
            "pads": list(self.pads),
            "dilations": list(geometry.dilation),
            "group": geometry.groups,
            "kernel_shape": list(self.kernel_size),
        }
        sizes = zip(x.shape[2:], self.kernel_size, geometry.stride, geometry.dilation, strict=True)
        pads = [begin + end for begin, end in zip(self.pads[:dims], self.pads[dims:], strict=True)]
        if not geometry.transposed:
            return attributes, [
                (n + p - d * (k - 1) - 1) // s + 1 for (n, k, s, d), p in zip(sizes, pads, strict=True)
            ]
        arguments: Any = (geometry.stride, self.padding, self.kernel_size, dims, geometry.dilation)
        added = self._output_padding(x, output_size, *arguments)
        attributes["output_padding"] = list(added)
        return attributes, [
            (n - 1) * s - p + d * (k - 1) + a + 1
            for (n, k, s, d), p, a in zip(sizes, pads, added, strict=True)
        ]


class Embedding(nn.Module):
    """Gather of integer rows and of their scales."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    output: Any

    def __init__(self, layer: Any, name: str) -> None:
        super().__init__()
        self.dtype = layer.dtype
        output = qdq.output_grid(layer)
        self.output = None if output is None else Quantizer(output, name)
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


class FakeQuantizer(nn.Module):
    """A FakeQuantize of the model's own."""

    def __init__(self, module: FakeQuantize, name: str) -> None:
        super().__init__()
        scale, zero_point = module.grid(torch.empty(0))
        scale = scale.detach().abs().clamp(min=torch.finfo(torch.float32).tiny)
        self.quantizer = Quantizer(Grid.of(module.spec, scale, zero_point), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x.float()).to(x.dtype)


class Projections:
    """What projects query, key and value of an IntegerMultiheadAttention whose layers are those of this module."""

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


def deployed(model: nn.Module, form: str) -> nn.Module:
    """Returns a copy of an integer model whose layers are those of this module."""
    replacements: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize):
            replacements[id(module)] = FakeQuantizer(module, name)
        elif isinstance(module, IntegerLayer):
            replacements[id(module)] = _layer_class(module, form)(module, name)
    result = copy.deepcopy(model, dict(replacements))
    for module in result.modules():
        if isinstance(module, IntegerMultiheadAttention):
            vars(module)["_projected"] = Projections(module)
    return result.eval()


def check_static(model: nn.Module) -> None:
    """Raises ValueError if a range is dynamic, which QuantizeLinear does not have."""
    for name, module in model.named_modules():
        specs: dict[str, Any] = {}
        if isinstance(module, FakeQuantize):
            specs = {"range": module.spec}
        elif isinstance(module, IntegerLayer):
            keys = ("output",) if isinstance(module, IntegerEmbedding) else ("input", "output")
            specs = {f"config.{key}": getattr(module.config, key) for key in keys}
        elif isinstance(module, IntegerMultiheadAttention):
            specs = {"attention": module.attention}
        for key, spec in specs.items():
            if spec is not None and spec.is_dynamic:
                raise ValueError(
                    "qatfast.onnx.export: expected ranges that are not Dynamic() in the form 'qdq', got "
                    f"{key}={spec} of {name or 'the root'!r}; train with QATConfig.static(), or write form='integer'"
                )


def _layer_class(layer: nn.Module, form: str) -> type[nn.Module]:
    if isinstance(layer, IntegerLinear):
        return Linear
    return Embedding if isinstance(layer, IntegerEmbedding) else Conv
