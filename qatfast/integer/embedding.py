"""IntegerEmbedding, an embedding with integer rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, functional, packing
from ..config import PerChannel, PerGroup, PerTensor, PerToken
from ..modules import QATEmbedding
from .base import IntegerLayer
from .buffers import grid_of, static_grid, stored_weight


class IntegerEmbedding(IntegerLayer):
    """An embedding with integer rows; :func:`qatfast.convert` makes it of a :class:`qatfast.QATEmbedding`.

    ::

        y = (weight[input] - weight_zero_point) * weight_scale

    The buffers are those of :class:`qatfast.integer.IntegerLayer`.

    Shape:
        That of ``nn.Embedding``.
    """

    _source = QATEmbedding
    num_embeddings: int
    embedding_dim: int

    @classmethod
    @torch.no_grad()
    def from_qat(cls, layer: Any) -> IntegerEmbedding:
        weight = layer.weight.detach()
        if layer.max_norm is not None:  # which the float layer applies to the rows that it uses
            weight = weight.clone()
            every = torch.arange(layer.num_embeddings, device=weight.device)
            F.embedding(every, weight, layer.padding_idx, layer.max_norm, layer.norm_type)
        of_weight = layer._modules.get("weight_quantizer")
        grid = None if of_weight is None else static_grid(of_weight, weight)
        buffers = stored_weight(weight, layer.config.weight, grid)
        output = grid_of(layer, "output_quantizer", weight)
        if output is not None:
            buffers["output_scale"], buffers["output_zero_point"] = output
        arguments = {"num_embeddings": layer.num_embeddings, "embedding_dim": layer.embedding_dim}
        return cls(arguments, layer.config, weight.dtype, None, buffers)

    @property
    def rows(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.rows[1:]

    def _legal_buffers(self) -> dict[str, Any]:
        return super()._legal_buffers() | {key: [None] for key in ("bias", "input_scale", "input_zero_point")}

    def forward(self, input: Tensor) -> Tensor:
        y = self._rows_at(input)
        spec = self.config.output
        if spec is None:
            return y
        grid = self._grid("output", checks.compute_dtype(y.dtype))
        if grid is None:
            return functional.fake_quantize(y, **spec.arguments)
        ends = (spec.quant_min, spec.quant_max)
        return functional.fake_quantize_affine(y, *grid, *ends, granularity=spec.granularity)

    def _rows_at(self, index: Tensor) -> Tensor:
        spec = self.config.weight
        rows = F.embedding(index, self.weight)
        if spec is None:
            return rows.to(self.dtype)
        if packing.values_per_byte(spec.num_bits) > 1:
            rows = packing.unpack_rows(rows, spec.num_bits, self.embedding_dim, spec.symmetric)
        granularity = spec.granularity
        scale = self.weight_scale.to(checks.compute_dtype(self.dtype))
        zero_point = self._zero_point_like(scale)
        if isinstance(granularity, (PerToken, PerGroup)) or granularity in (PerChannel(0), PerChannel(-2)):
            scale, zero_point = scale[index], zero_point[index]
            granularity = granularity if isinstance(granularity, PerGroup) else PerToken()
        elif not isinstance(granularity, PerTensor):
            granularity = PerChannel(-1)
        y = functional.dequantize(rows, scale, zero_point, granularity=granularity, dtype=self.dtype)
        if self.weight_nan is not None:
            columns = torch.arange(self.embedding_dim, device=index.device)
            positions = index.unsqueeze(-1) * self.embedding_dim + columns
            y = y.masked_fill(torch.isin(positions, self.weight_nan), torch.nan)
        return y
