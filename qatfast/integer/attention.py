"""IntegerMultiheadAttention, attention with integer projections."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, functional, reference
from ..config import QUANTIZE, QATConfig, QuantSpec
from ..modules import FakeQuantize, QATMultiheadAttention
from ..modules.attention import _OPERANDS, grid_of_projection, is_per_row
from .base import Grid, fake_quantized
from .buffers import grid_of, static_grid, stored_weight
from .linear import IntegerLinear


class IntegerMultiheadAttention(nn.Module):
    """Attention with integer projections, made of a :class:`qatfast.QATMultiheadAttention` by :func:`qatfast.convert`.

    ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` are :class:`IntegerLinear`. What is between them is that of the
    quantized layer: floats, or quantized q, k, softmax and v. A quantized or int32 bias of the first three is stored
    in float and quantized at each call, as its grid depends on whether they read one tensor.

    Shape:
        That of ``nn.MultiheadAttention``.
    """

    _source = QATMultiheadAttention
    _float_class = nn.MultiheadAttention  # for messages
    _mode = QUANTIZE
    in_proj_bias = None  # nn.TransformerEncoderLayer then leaves out its fast path, which reads float weights
    in_proj_weight = None

    embed_dim: int
    num_heads: int
    dropout: float
    add_zero_attn: bool
    kdim: int
    vdim: int
    batch_first: bool
    bias_k: Tensor | None
    bias_v: Tensor | None
    q_proj: IntegerLinear
    k_proj: IntegerLinear
    v_proj: IntegerLinear
    out_proj: IntegerLinear

    def __init__(
        self,
        arguments: dict[str, Any],
        config: QATConfig,
        attention: QuantSpec | None,
        is_packed: bool,
        modules: dict[str, nn.Module],
        buffers: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.arguments = arguments
        for name, value in arguments.items():
            setattr(self, name, value)
        self.head_dim = self.embed_dim // self.num_heads
        self._qkv_same_embed_dim = self.kdim == self.embed_dim == self.vdim
        self.config, self.attention, self.is_packed = config, attention, is_packed
        for name, module in modules.items():
            self.add_module(name, module)
        for name in ("bias_k", "bias_v"):
            self.register_buffer(name, buffers.get(name))
        self.training = False

    @classmethod
    @torch.no_grad()
    def from_qat(cls, layer: Any) -> IntegerMultiheadAttention:
        config = layer.config
        modules: dict[str, nn.Module] = {
            f"{name}_proj": projection for name, projection in zip("qkv", _projections(layer), strict=True)
        }
        modules["out_proj"] = IntegerLinear.from_qat(layer.out_proj)
        for name in _OPERANDS:
            quantizer = layer._modules.get(f"{name}_quantizer")
            if isinstance(quantizer, FakeQuantize):
                quantizer = copy.deepcopy(quantizer).requires_grad_(False).eval()
                quantizer.grid(layer.out_proj.weight)  # raises if nothing has been observed
                quantizer.frozen = True
                modules[f"{name}_quantizer"] = quantizer
        names = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
        arguments = {name: getattr(layer, name) for name in names}
        spec = config.weight
        is_packed = layer._qkv_same_embed_dim and (is_per_row(spec) or "weight_quantizer" in layer._modules)
        buffers = {
            name: getattr(layer, name).detach().clone()
            for name in ("bias_k", "bias_v")
            if getattr(layer, name) is not None
        }
        return cls(arguments, config, layer.attention, is_packed, modules, buffers)

    forward = QATMultiheadAttention.forward
    _mask = QATMultiheadAttention._mask
    _attend = QATMultiheadAttention._attend
    _operand = QATMultiheadAttention._operand
    _of_nested = QATMultiheadAttention._of_nested

    def _record_call(self) -> None:
        """The blocks of ``unused_layers`` list quantized layers only."""

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Returns q, k and v. Tensors that are the same object are quantized once, by the first of their grids."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        inputs = (query, key, value)
        grids: dict[int, Grid | None] = {}
        for name, x, projection in zip(("query", "key", "value"), inputs, projections, strict=True):
            projection._check_input(x)
            if id(x) not in grids:
                grids[id(x)] = self._grid_of(name, x, projection)
        is_one = query is key and key is value and self.is_packed
        biases = self._biases([grids[id(x)] for x in inputs], is_one)
        if is_one and not self.config.uses_int8_gemm(
            self.embed_dim
        ):  # one product: its bits depend on its size
            x_hat = fake_quantized(query.detach(), self.config.input, grids[id(query)])
            dtype = self.q_proj._float_dtype(query)
            weight = torch.cat([projection.dequantize(dtype) for projection in projections])
            bias = None if biases[0] is None else torch.cat(biases).to(dtype)  # type: ignore[arg-type]
            return list(F.linear(x_hat, weight, bias).chunk(3, -1))
        return [
            projection._rounded(projection.product(x.detach(), grids[id(x)], bias), x)
            for x, projection, bias in zip(inputs, projections, biases, strict=True)
        ]

    def _grid_of(self, name: str, x: Tensor, projection: IntegerLinear) -> Grid | None:
        spec = self.config.input
        if spec is None:
            return None
        grid = projection._input_grid(checks.compute_dtype(x.dtype))
        if grid is None and not spec.is_dynamic:
            raise RuntimeError(
                f"{type(self).__name__}: expected {name} to be the tensor before it, as in training, got one whose "
                "range has not been observed"
            )
        if grid is None and self.config.has_int32_bias:
            return functional.choose_qparams(x.detach(), **spec.arguments)
        return grid

    def _biases(self, grids: list[Grid | None], is_one: bool) -> list[Tensor | None]:
        """Returns the biases as they are added to the products of inputs with these grids."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        biases: list[Any] = [projection.bias for projection in projections]
        spec = self.config.specs["bias"]
        if biases[0] is None:
            return biases
        if spec is None and not self.config.has_int32_bias:
            return biases
        if spec is None:
            scales = [projection._rows_of_grid()[0] for projection in projections]
            return [
                reference.int32_bias(bias, grid[0], scale)  # type: ignore[index]
                for bias, grid, scale in zip(biases, grids, scales, strict=True)
            ]
        if is_one:
            return list(functional.fake_quantize(torch.cat(biases), **spec.arguments).chunk(3))
        return [functional.fake_quantize(bias, **spec.arguments) for bias in biases]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.arguments.items())


def _projections(layer: Any) -> list[IntegerLinear]:
    """Returns those of query, key and value."""
    own = layer._modules
    config = replace(layer.config, output=None)
    if layer._qkv_same_embed_dim:
        names = ("weight_quantizer",) * 3
        weights = layer.in_proj_weight.detach().chunk(3)
        whole = layer.in_proj_weight.detach()
        grid = static_grid(own[names[0]], whole) if names[0] in own else None
        grids = [
            None if grid is None else _copied(grid_of_projection(grid, config.weight, i)) for i in range(3)
        ]
    else:
        weights = tuple(getattr(layer, f"{name}_proj_weight").detach() for name in "qkv")
        keys = [f"{name}_weight_quantizer" for name in "qkv"]
        grids = [
            static_grid(own[key], weight) if key in own else None
            for key, weight in zip(keys, weights, strict=True)
        ]
    biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.detach().chunk(3)
    result = []
    for i, name in enumerate(("input_quantizer", "key_quantizer", "value_quantizer")):
        key = name if name in own else "input_quantizer"
        weight, bias = weights[i], biases[i]
        buffers = stored_weight(weight, config.weight, grids[i])
        x_grid = _input_grid(layer, key, weight)
        if x_grid is not None:
            buffers["input_scale"], buffers["input_zero_point"] = x_grid
        if bias is not None:
            buffers["bias"] = bias.to(checks.compute_dtype(weight.dtype), copy=True)
        arguments = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
        result.append(IntegerLinear(arguments, config, weight.dtype, None, buffers))
    return result


def _input_grid(layer: Any, key: str, weight: Tensor) -> Grid | None:
    """Returns the grid of query, key or value. In self-attention that of the query serves for all."""
    quantizer = layer._modules.get(key)
    is_unused = key != "input_quantizer" and quantizer.spec.has_state and not quantizer._has_observed()
    return None if is_unused else grid_of(layer, key, weight)


def _copied(grid: Grid) -> Grid:
    scale, zero_point = grid
    return scale.clone(), zero_point.clone()
