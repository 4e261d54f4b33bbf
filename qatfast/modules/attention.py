"""QATMultiheadAttention, an nn.MultiheadAttention with quantized projections."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import checks, ranges, weight_cache
from ..config import QUANTIZE, PerChannel, PerGroup, PerTensor, QATConfig, QuantSpec
from ..functional import fake_quantize, qat_linear
from .base import (
    Obstacle,
    QuantizedLayer,
    TensorSpec,
    _take_over,
    kind_name,
    open_recordings,
    static_config,
    why_not_from_float,
)
from .linear import QATLinear, check_parameters

_OPERANDS = ("q", "k", "softmax", "v")  # of the two products of attention


class QATMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` with quantized projections.

    ::

        q, k, v = qat_linear(query, W_q, b_q), qat_linear(key, W_k, b_k), qat_linear(value, W_v, b_v)
        y = out_proj(softmax(q k^T / sqrt(head_dim) + mask) v)

    Parameters, initial values and ``state_dict`` keys are those of ``nn.MultiheadAttention``, and so is the
    arithmetic between the projections; torch's fast path in evaluation, which reads the weights, is never taken.
    ``out_proj`` is a :class:`QATLinear`. For ranges that are not ``Dynamic()`` there are ``input_quantizer`` (query),
    ``key_quantizer`` and ``value_quantizer``: a tensor that is passed twice is quantized once, by the first of its
    quantizers. ``in_proj_weight`` has the ``weight_quantizer``; ``config.output`` applies to ``out_proj``.

    The arguments are those of ``nn.MultiheadAttention``, and

    Args:
        config: the specs of the projections. None means ``QATConfig.static()``.
        attention: the spec of q, k, softmax and v in the products of attention, per tensor or per token; None leaves
            them in float.

    Shape:
        That of ``nn.MultiheadAttention``.

    Raises:
        TypeError: ``config`` is not a QATConfig, or ``attention`` is not a QuantSpec.
        ValueError: ``config`` does not fit a projection; ``attention`` is per channel or per group.
        RuntimeError: the layer runs in evaluation and nothing has been observed; see :class:`FakeQuantize`.

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762); Jacob et al. 2018 (arXiv 1712.05877), section 3.

    Example:
        >>> x = torch.randn(5, 2, 16)
        >>> QATMultiheadAttention(16, 4)(x, x, x)[0].shape
        torch.Size([5, 2, 16])
    """

    _float_class = nn.MultiheadAttention
    _caches_weight = True  # in_proj_weight, where query, key and value are one tensor
    _shared = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
    _quantizers = (
        *("input_quantizer", "key_quantizer", "value_quantizer", "weight_quantizer"),
        *("q_weight_quantizer", "k_weight_quantizer", "v_weight_quantizer"),
        *(f"{name}_quantizer" for name in _OPERANDS),
    )

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        config: QATConfig | None = None,
        attention: QuantSpec | None = None,
    ) -> None:
        config = static_config(type(self), config)
        _check_attention(kind_name(type(self)), attention)
        sizes = (kdim, vdim)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            *sizes,
            batch_first,
            device,
            dtype,
        )
        self.attention = attention
        self._set_up(config)

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        names = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
        has = {"bias": module.in_proj_bias is not None, "add_bias_kv": module.bias_k is not None}
        return {name: getattr(module, name) for name in names} | has

    @classmethod
    def _own_obstacle(cls, module: Any) -> Obstacle | None:
        obstacle = why_not_from_float(module.out_proj, QATLinear)
        return obstacle and Obstacle(f"out_proj: {obstacle.reason}", f"out_proj: {obstacle.message}")

    @classmethod
    def check_config(cls, config: QATConfig, module: Any) -> None:
        for size in {module.embed_dim, module.kdim, module.vdim}:
            check_parameters(config, size, module.embed_dim, module.in_proj_bias is not None)

    def _tensors(self) -> dict[str, TensorSpec]:
        config, features = self.config, {"q": self.embed_dim, "k": self.kdim, "v": self.vdim}
        names = {"q": "input_quantizer", "k": "key_quantizer", "v": "value_quantizer"}
        tensors = {name: TensorSpec(config.input, (features[key],)) for key, name in names.items()}
        if self._qkv_same_embed_dim:
            tensors["weight_quantizer"] = TensorSpec(config.weight, (3 * self.embed_dim, self.embed_dim))
        else:
            for key, size in features.items():
                tensors[f"{key}_weight_quantizer"] = TensorSpec(config.weight, (self.embed_dim, size))
        attention = vars(self).get("attention")
        return tensors | {f"{name}_quantizer": TensorSpec(attention, ()) for name in _OPERANDS}

    def _set_quantizers(self) -> None:
        super()._set_quantizers()
        out_proj: Any = self.out_proj
        if not isinstance(out_proj, QATLinear) or out_proj.config != self.config:
            # A new layer, because from_float shares out_proj with its argument, whose config stays.
            self.out_proj = QATLinear.from_float(out_proj, config=self.config)  # type: ignore[assignment]

    def to_float(self) -> nn.MultiheadAttention:
        module = super().to_float()
        vars(module).pop("attention", None)
        linear = module.out_proj.to_float()
        size = (linear.in_features, linear.out_features, linear.bias is not None)
        module.out_proj = _take_over(linear, NonDynamicallyQuantizableLinear(*size, device="meta"))
        return module

    def _reset_parameters(self) -> None:
        super()._reset_parameters()
        self._reset_quantizers()

    def reset_parameters(self) -> None:
        self._reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if open_recordings:
            self._record_call()
        if query.is_nested:
            return self._of_nested(query, key, value, need_weights, average_attn_weights)
        if is_causal and attn_mask is None:
            raise RuntimeError(f"{kind_name(type(self))}: expected attn_mask if is_causal is True, got None")
        check: Any = F._mha_shape_check  # type: ignore[attr-defined]
        is_batched = check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        q, k, v = self._projected(query, key, value)
        if not is_batched:
            q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif self.batch_first:
            q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        mask = self._mask(query.dtype, q, k, key_padding_mask, attn_mask)
        y, weights = self._attend(q, k, v, mask, need_weights)
        y = self.out_proj(y)
        if not is_batched:
            y = y.squeeze(1)
        elif self.batch_first:
            y = y.transpose(0, 1)
        if weights is None:
            return y, None
        weights = weights.mean(1) if average_attn_weights else weights
        return y, weights if is_batched else weights.squeeze(0)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Returns q, k and v. Tensors that are the same object are quantized once."""
        own: dict[str, Any] = self._modules
        inputs = {"input_quantizer": query, "key_quantizer": key, "value_quantizer": value}
        grids: dict[int, Any] = {}  # by the identity of the tensor
        is_quantized = self._mode == QUANTIZE
        for name, x in inputs.items():
            quantizer = own.get(name, own.get("input_quantizer"))
            if quantizer is not None and id(x) not in grids:
                grids[id(x)] = quantizer.grid(x, self) if is_quantized else quantizer.forward(x)
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim:
            w_grid = self._weight_grid("weight_quantizer", self.in_proj_weight)
            spec = self.config.weight
            if query is key and key is value and (is_per_row(spec) or w_grid is not None):
                packed = self._linear(query, self.in_proj_weight, bias, grids.get(id(query)), w_grid)
                return list(packed.chunk(3, -1))
            w_grids = [None if w_grid is None else grid_of_projection(w_grid, spec, i) for i in range(3)]
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            w_grids = [
                self._weight_grid(f"{name}_weight_quantizer", weight)
                for name, weight in zip("qkv", weights, strict=True)
            ]
        biases = [None] * 3 if bias is None else bias.chunk(3)
        return [
            self._linear(x, weight, b, grids.get(id(x)), w_grid)
            for x, weight, b, w_grid in zip(inputs.values(), weights, biases, w_grids, strict=True)
        ]

    def _weight_grid(self, name: str, weight: Tensor) -> Any:
        quantizer: Any = self._modules.get(name)
        if quantizer is None:
            return None
        return quantizer.grid(weight, self) if self._mode == QUANTIZE else quantizer.forward(weight)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, x_grid: Any, w_grid: Any) -> Tensor:
        if self._mode != QUANTIZE:
            return F.linear(x, weight, bias)
        config = replace(self.config, output=None)
        slot = weight_cache.slot_of(self) if weight is self.in_proj_weight else None
        if config.is_dynamic:
            if slot is not None:
                return weight_cache.linear(slot, x, weight, bias, config)
            return qat_linear(x, weight, bias, config=config)
        checks.linear_operands("qat_linear", x, weight, bias)
        found = {"input": x_grid, "weight": w_grid}
        grids = {name: grid for name, grid in found.items() if grid is not None}
        int8_weight: tuple[Tensor, ...] = ()
        if slot is not None:
            int8_weight, weight, config = ranges.kept_weight(slot, weight, config, grids)
        return ranges.qat_linear(x, weight, bias, config, grids, int8_weight)

    def _mask(
        self,
        dtype: torch.dtype,
        q: Tensor,
        k: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> Tensor | None:
        """Returns what is added to the scores, (batch or 1, heads or 1, queries, keys), or None."""
        queries, batch, keys = q.shape[0], q.shape[1], k.shape[0]
        name = kind_name(type(self))
        mask = None
        if attn_mask is not None:
            attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", dtype, False)
            assert attn_mask is not None
            legal = [(queries, keys), (batch * self.num_heads, queries, keys)]
            if tuple(attn_mask.shape) not in legal:
                raise ValueError(
                    f"{name}: expected attn_mask to have shape {legal[0]} or {legal[1]}, got {tuple(attn_mask.shape)}"
                )
            mask = attn_mask.view(-1, 1 if attn_mask.dim() == 2 else self.num_heads, queries, keys)
        if key_padding_mask is not None:
            key_padding_mask = F._canonical_mask(
                key_padding_mask, "key_padding_mask", F._none_or_dtype(attn_mask), "attn_mask", dtype
            )
            assert key_padding_mask is not None
            if tuple(key_padding_mask.shape) != (batch, keys):
                raise ValueError(
                    f"{name}: expected key_padding_mask to have shape {(batch, keys)}, got "
                    f"{tuple(key_padding_mask.shape)}"
                )
            padding = key_padding_mask.view(batch, 1, 1, keys)
            mask = padding if mask is None else mask + padding
        added = (self.bias_k is not None) + self.add_zero_attn
        return F.pad(mask, (0, added)) if mask is not None and added else mask

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the attention of (length, batch, embed_dim) tensors, and the weights if they are needed."""
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, bias.to(x.dtype).expand(1, x.shape[1], -1)])
                for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        q, k, v = (self._operand(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
        if need_weights or self.attention is not None:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(self._operand("softmax", weights), dropout)
            y = weights.to(v.dtype) @ v
        else:
            mask = None if mask is None else mask.to(q.dtype)
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return y.permute(2, 0, 1, 3).flatten(2), weights if need_weights else None

    def _operand(self, name: str, x: Tensor) -> Tensor:
        """Returns an operand of a product of attention as it is quantized."""
        if self.attention is None:
            return x
        quantizer: Any = self._modules.get(f"{name}_quantizer")
        if quantizer is not None:
            return quantizer.forward(x)
        return fake_quantize(x, **self.attention.arguments) if self._mode == QUANTIZE else x

    def _of_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average_attn_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """nn.TransformerEncoder packs a padded batch into a nested tensor in evaluation; pads it again."""
        padded = {id(x): torch.nested.to_padded_tensor(x, 0.0) for x in (query, key, value)}
        lengths = [len(part) for part in key.unbind()]
        positions = torch.arange(max(lengths), device=key.device)
        mask = positions >= torch.tensor(lengths, device=key.device).unsqueeze(1)
        q, k, v = (padded[id(x)] for x in (query, key, value))
        y, weights = self.forward(q, k, v, mask, need_weights, None, average_attn_weights)
        rows = [row[: len(part)] for row, part in zip(y, query.unbind(), strict=True)]
        return torch.nested.as_nested_tensor(rows), weights


def is_per_row(spec: QuantSpec | None) -> bool:
    """Returns whether no block of ``in_proj_weight`` has elements of two rows."""
    return spec is None or spec.granularity not in (PerTensor(), PerChannel(1), PerChannel(-1))


def grid_of_projection(
    grid: tuple[Tensor, Tensor], spec: QuantSpec | None, index: int
) -> tuple[Tensor, Tensor]:
    """Returns the grid of a third of ``in_proj_weight``: the rows of query (0), key (1) or value (2)."""
    if is_per_row(spec):
        scale, zero_point = (value.chunk(3)[index] for value in grid)
        return scale, zero_point
    scale, zero_point = grid
    return ranges.with_gradient_of_whole(scale, 1 / 3), zero_point


def _check_attention(name: str, attention: Any) -> None:
    if attention is None:
        return
    if not isinstance(attention, QuantSpec):
        raise TypeError(f"{name}: expected attention to be a QuantSpec or None, got {attention!r}")
    if isinstance(attention.granularity, (PerChannel, PerGroup)):
        raise ValueError(
            f"{name}: expected attention per tensor or per token, got {attention.granularity}; write PerTensor()"
        )
