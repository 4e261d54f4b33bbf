"""Operators for ranges that modules keep: what is observed, and a layer with static ranges."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .config import MovingAverage, QATConfig, QuantSpec


def observe_range(
    input: Tensor, running_min: Tensor, running_max: Tensor, num_batches: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Moves a stored range by ``input``, in place, without a host sync.

    A block whose stored range is (0, 0) takes the range of ``input``. ``num_batches`` counts the tensors that have a
    finite value; others change nothing, and a block without a finite value keeps its range.

    Args:
        input: A floating-point tensor of any shape.
        running_min: Float32, one element per block.
        running_max: Likewise.
        num_batches: Int64, shape ``()``.
        spec: With the range MovingAverage or MinMax.

    Returns:
        The scale and the zero point that quantize ``input``: those of the stored range before it moves, or of the range
        of ``input`` if there was none.
    """
    constant = spec.range.averaging_constant if isinstance(spec.range, MovingAverage) else 0.0
    return reference.observe_range(input, running_min, running_max, num_batches, constant, **spec.arguments)


def qparams_of_range(lo: Tensor, hi: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Returns the scale and the zero point for blocks with the range ``lo <= 0 <= hi`` (float32 or float64)."""
    return reference.qparams_of_range(lo, hi, spec.quant_min, spec.quant_max, spec.symmetric)


def qat_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: QATConfig,
    grids: reference.StaticGrids,
) -> Tensor:
    """Returns :func:`qatfast.qat_linear` with static ranges.

    Args:
        input: ``(..., in_features)``.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
        config: What is quantized how.
        grids: Scale and zero point of each of ``input``, ``weight`` and ``output`` whose range is not Dynamic. The
            scale of a Learned range gets a gradient.
    """
    return reference.qat_linear_static(input, weight, bias, config, grids)
