"""QATEmbedding, an nn.Embedding that fake-quantizes its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, ranges, reference
from ..config import QUANTIZE, Learned, PerChannel, PerGroup, PerToken, QATConfig, QuantSpec
from ..functional import choose_qparams, fake_quantize, fake_quantize_affine, fake_quantize_learned
from .base import (
    Obstacle,
    QuantizedLayer,
    TensorSpec,
    kind_name,
    open_recordings,
    static_config,
    wrong_dimensions,
)


class QATEmbedding(QuantizedLayer, nn.Embedding):
    """An ``nn.Embedding`` that fake-quantizes its rows.

    ::

        y = fake_quantize(weight)[input]

    Only the rows that ``input`` names are computed. Parameters, initial values and ``state_dict``
    keys are those of ``nn.Embedding``, and its ``padding_idx``, ``max_norm``, ``scale_grad_by_freq``
    and ``sparse`` apply. The gradient of a row is that of the straight-through estimator.

    The arguments are those of ``nn.Embedding``, and

    Args:
        config: ``config.weight``, whose ``PerChannel(0)`` is one scale per row, and
            ``config.output``; input and bias do not exist. None means ``QATConfig.static()``.

    Shape:
        That of ``nn.Embedding``: ``(...)`` of int32 or int64 to ``(..., embedding_dim)``.

    Raises:
        TypeError: ``config`` is not a QATConfig.
        ValueError: ``config`` does not divide the weight or the output.
        RuntimeError: the layer runs in evaluation and nothing has been observed; see
            :class:`FakeQuantize`.

    Source:
        Jacob et al. 2018 (arXiv 1712.05877), section 2; STE: Bengio et al. 2013 (arXiv 1308.3432).

    Example:
        >>> import torch
        >>> QATEmbedding(10, 4)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 4])
    """

    _float_class = nn.Embedding
    _shared = ("weight",)
    _quantizers = ("weight_quantizer", "output_quantizer")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        config: QATConfig | None = None,
    ) -> None:
        config = static_config(type(self), config)
        arguments: Any = (num_embeddings, embedding_dim, padding_idx, max_norm, norm_type)
        arguments += (scale_grad_by_freq, sparse, _weight, _freeze, device, dtype)
        super().__init__(*arguments)
        self._set_up(config)

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        size = {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}
        return size | {name: getattr(module, name) for name in names}

    @classmethod
    def _own_obstacle(cls, module: Any) -> Obstacle | None:
        return wrong_dimensions(module.weight, 2)

    @classmethod
    def check_config(cls, config: QATConfig, module: Any) -> None:
        name = kind_name(cls)
        for tensor, spec in (("weight", config.weight), ("output", config.output)):
            granularity = None if spec is None else spec.granularity
            if isinstance(granularity, PerChannel):
                legal = (0, 1, -1, -2) if tensor == "weight" else (-1,)
                if granularity.axis not in legal:
                    expected = "from -2 to 1" if tensor == "weight" else "-1"
                    raise ValueError(
                        f"{name}: expected the axis of config.{tensor} to be {expected}, got {granularity.axis}"
                    )
            if isinstance(granularity, PerGroup) and module.embedding_dim % granularity.group_size != 0:
                raise ValueError(
                    f"{name}: expected embedding_dim to be divisible by group_size={granularity.group_size} of "
                    f"config.{tensor}, got {module.embedding_dim}; write a group_size that divides "
                    f"{module.embedding_dim}"
                )

    def _tensors(self) -> dict[str, TensorSpec]:
        return {
            "weight_quantizer": TensorSpec(self.config.weight, (self.num_embeddings, self.embedding_dim)),
            "output_quantizer": TensorSpec(self.config.output, (self.embedding_dim,)),
        }

    def forward(self, input: Tensor) -> Tensor:
        if open_recordings:
            self._record_call()
        weight, config = self.weight, self.config
        checks.tensor(kind_name(type(self)), "weight", weight, checks.FLOAT_DTYPES)
        arguments = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        rows = F.embedding(input, weight, *arguments)  # first: it may write to the weight (max_norm)
        own: dict[str, Any] = self._modules
        of_weight, of_output = own.get("weight_quantizer"), own.get("output_quantizer")
        if self._mode != QUANTIZE:
            if of_weight is not None:
                of_weight.forward(weight)
            return rows if of_output is None else of_output.forward(rows)
        y = rows
        if config.weight is not None:
            grid = None if of_weight is None else of_weight.grid(weight, self)
            y = _quantized_rows(rows, input, weight, config.weight, grid)
        if of_output is not None:
            return of_output.forward(y)
        return y if config.output is None else fake_quantize(y, **config.output.arguments)


def _quantized_rows(
    rows: Tensor, index: Tensor, weight: Tensor, spec: QuantSpec, grid: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Returns ``rows``, which are ``weight[index]``, as they are in the fake-quantized weight."""
    granularity = spec.granularity
    if granularity in (PerChannel(0), PerChannel(-2)):
        granularity = PerToken()
    elif isinstance(granularity, PerChannel):
        granularity = PerChannel(-1)
    has_row = isinstance(granularity, (PerToken, PerGroup))  # blocks are within a row
    if grid is None and has_row:
        return fake_quantize(rows, **replace(spec, granularity=granularity).arguments)
    scale, zero_point = choose_qparams(weight.detach(), **spec.arguments) if grid is None else grid
    if has_row:
        scale, zero_point = scale[index], zero_point[index]
    ends = (spec.quant_min, spec.quant_max)
    if grid is None:
        value = fake_quantize_affine(rows.detach(), scale, zero_point, *ends, granularity=granularity)
        return reference._straight_through(rows, value)
    function: Any = fake_quantize_affine
    if isinstance(spec.range, Learned):
        function = fake_quantize_learned
        scale = (
            scale if has_row else ranges.with_gradient_of_whole(scale, rows.numel() / max(weight.numel(), 1))
        )
    return function(rows, scale, zero_point, *ends, granularity=granularity)
