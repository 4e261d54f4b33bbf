"""The reference implementation of every function of qatfast in plain PyTorch: simple and slow.

It is the specification: the compiled kernels return the same bits. It also runs where there are no
kernels: on other devices, without a compiler and in functorch transforms.

For the finite values ``x`` of each block::

    lo, hi     = min(x.min(), 0), max(x.max(), 0)
    scale      = max((hi - lo) / (quant_max - quant_min), eps)                  affine
                 max(lo / quant_min, hi / quant_max, eps)                       symmetric
    zero_point = clamp(quant_min - round(lo / scale), quant_min, quant_max)
    q          = clamp(round(x / scale) + zero_point, quant_min, quant_max)
    y          = (q - zero_point) * scale

Source: Jacob et al. 2018 (arXiv 1712.05877), equations 1 and 12; STE: Bengio et al. 2013
(arXiv 1308.3432).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments, checks
from .config import (
    Fixed,
    Granularity,
    Learned,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConfig,
    QuantSpec,
    checked_granularity,
    quant_range,
)

SEARCH_STEPS = 80
FLOAT32_MAX = torch.finfo(torch.float32).max


def fake_quantize(
    input: Tensor,
    num_bits: int = 8,
    *,
    symmetric: bool = False,
    granularity: Granularity = PerTensor(),
    narrow_range: bool = True,
) -> Tensor:
    op = "fake_quantize"
    quant_min, quant_max = _check_dynamic(op, input, num_bits, symmetric, granularity, narrow_range)
    x = input.detach()
    scale, zero_point = _choose_qparams(x, quant_min, quant_max, symmetric, granularity)
    value, _ = _fake_quantize(x, scale, zero_point, quant_min, quant_max, granularity)
    return _straight_through(input, value)


def fake_quantize_affine(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    *,
    granularity: Granularity = PerTensor(),
) -> Tensor:
    op = "fake_quantize_affine"
    checks.fixed_scale(op, scale)
    scale, zero_point, quant_min, quant_max = _check_affine(
        op, input, scale, zero_point, quant_min, quant_max, granularity
    )
    value, inside = _fake_quantize(input.detach(), scale, zero_point, quant_min, quant_max, granularity)
    return _straight_through(input, value, inside)


def choose_qparams(
    input: Tensor,
    num_bits: int = 8,
    *,
    symmetric: bool = False,
    granularity: Granularity = PerTensor(),
    narrow_range: bool = True,
) -> tuple[Tensor, Tensor]:
    op = "choose_qparams"
    quant_min, quant_max = _check_dynamic(op, input, num_bits, symmetric, granularity, narrow_range)
    return _choose_qparams(input.detach(), quant_min, quant_max, symmetric, granularity)


def search_qparams(
    input: Tensor,
    num_bits: int = 8,
    *,
    symmetric: bool = False,
    granularity: Granularity = PerTensor(),
    narrow_range: bool = True,
) -> tuple[Tensor, Tensor]:
    op = "search_qparams"
    quant_min, quant_max = _check_dynamic(op, input, num_bits, symmetric, granularity, narrow_range)
    x = input.detach().to(checks.compute_dtype(input.dtype))
    lo, hi = _range(x, granularity)
    blocks = _to_blocks(x, granularity)
    best: tuple[Tensor, ...] = ()
    best_error = torch.full_like(lo, torch.inf, dtype=torch.float64)
    for i in range(SEARCH_STEPS, 0, -1):
        factor = torch.full_like(lo, i) / SEARCH_STEPS
        qparams = qparams_of_range(lo * factor, hi * factor, quant_min, quant_max, symmetric)
        values, _ = _fake_quantize(x, *qparams, quant_min, quant_max, granularity)
        error = _to_blocks(values, granularity).double() - blocks.double()
        squared = torch.where(blocks.isfinite(), error * error, 0.0)
        total = _sum_of_blocks(squared, granularity)
        is_better = total < best_error
        best_error = torch.where(is_better, total, best_error)
        best = tuple(torch.where(is_better, *pair) for pair in zip(qparams, best or qparams, strict=True))
    scale, zero_point = best
    return scale, zero_point


def fake_quantize_learned(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    *,
    granularity: Granularity = PerTensor(),
) -> Tensor:
    op = "fake_quantize_learned"
    quant_min, quant_max = checks.quant_range(op, quant_min, quant_max)
    checks.tensor(op, "input", input, checks.FLOAT_DTYPES)
    checks.blocks(op, input.shape, checked_granularity(op, granularity))
    zero_point = checks.learned_qparams(op, input, scale, zero_point, quant_min, quant_max, granularity)
    return _LearnedFakeQuantize.apply(input, scale, zero_point, quant_min, quant_max, granularity)


def observe_range(
    input: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    num_batches: Tensor,
    averaging_constant: float,
    num_bits: int,
    symmetric: bool,
    granularity: Granularity,
    narrow_range: bool,
) -> tuple[Tensor, Tensor]:
    """Moves a stored range by ``input``. Returns the scale and zero point that quantize ``input``.

    They are those of the stored range before it moves, or of the range of ``input`` if a block has none yet (0, 0).
    ``averaging_constant`` is 0 for a range that only widens.
    """
    op = "observe_range"
    quant_min, quant_max = _check_dynamic(op, input, num_bits, symmetric, granularity, narrow_range)
    shape = checks.shape_of_qparams(input.shape, granularity)
    for name, state in (("running_min", running_min), ("running_max", running_max)):
        if state.shape != shape:
            raise ValueError(f"{op}: expected {name} to have shape {tuple(shape)}, got {tuple(state.shape)}")
    x = input.detach()
    lo, hi = (end.float().clamp(-FLOAT32_MAX, FLOAT32_MAX) + 0.0 for end in _range(x, granularity))
    is_finite = _any_finite(x, granularity)
    is_new = (running_min == 0) & (running_max == 0)
    low, high = torch.where(is_new, lo, running_min), torch.where(is_new, hi, running_max)
    compute = checks.compute_dtype(x.dtype)
    qparams = qparams_of_range(low.to(compute), high.to(compute), quant_min, quant_max, symmetric)
    if averaging_constant == 0:
        moved_low, moved_high = torch.minimum(low, lo), torch.maximum(high, hi)
    else:
        constant = torch.full_like(low, averaging_constant)
        moved_low, moved_high = low + constant * (lo - low), high + constant * (hi - high)
    running_min.copy_(torch.where(is_finite, torch.where(is_new, lo, moved_low), running_min) + 0.0)
    running_max.copy_(torch.where(is_finite, torch.where(is_new, hi, moved_high), running_max) + 0.0)
    num_batches.add_(is_finite.any())
    return qparams


def quantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    *,
    granularity: Granularity = PerTensor(),
) -> Tensor:
    op = "quantize"
    scale, zero_point, quant_min, quant_max = _check_affine(
        op, input, scale, zero_point, quant_min, quant_max, granularity
    )
    dtype = quantized_dtype(quant_min, quant_max)
    x = _to_blocks(input.detach().to(checks.compute_dtype(input.dtype)), granularity)
    scale, zero_point = _broadcast(scale, x, granularity), _broadcast(zero_point, x, granularity)
    q = torch.clamp(torch.round(x / scale) + zero_point, quant_min, quant_max)
    q = torch.where(x.isnan(), zero_point.to(q.dtype), q)
    # On every device, torch converts float to uint16 through int32.
    return _like(q.to(torch.int32).reshape(input.shape).to(dtype), input)


def dequantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    *,
    granularity: Granularity = PerTensor(),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    op = "dequantize"
    checks.tensor(op, "input", input, checks.INTEGER_DTYPES)
    if dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"{op}: expected dtype to be float32, float64, float16 or bfloat16, got {dtype}")
    checks.blocks(op, input.shape, checked_granularity(op, granularity))
    checks.fixed_scale(op, scale)
    scale, zero_point = checks.qparams(
        op, input, scale, zero_point, -32768, 65535, granularity, dtype, "output"
    )
    q = _to_blocks(input.to(checks.compute_dtype(dtype)), granularity)
    y = (q - _broadcast(zero_point, q, granularity)) * _broadcast(scale, q, granularity)
    return _like(_rounded(y, dtype).reshape(input.shape), input)


def qat_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, config: QATConfig = QATConfig()
) -> Tensor:
    op = "qat_linear"
    if not isinstance(config, QATConfig):
        raise TypeError(f"{op}: expected config to be a QATConfig, got {config!r}")
    checks.linear_operands(op, input, weight, bias)
    return qat_linear_static(input, weight, bias, config, fixed_grids(input, weight, config))


# The scale and the zero point of each tensor of a layer whose range is not Dynamic, by the tensor's name.
StaticGrids = Mapping[str, tuple[Tensor, Tensor]]


def qat_linear_static(
    input: Tensor, weight: Tensor, bias: Tensor | None, config: QATConfig, grids: StaticGrids
) -> Tensor:
    """Returns :func:`qat_linear` with static ranges: ``grids`` has those of ``input``, ``weight`` and ``output``.

    The scale of a Learned range gets a gradient.
    """
    op = "qat_linear"
    x_hat = _by_spec(op, "input", input, config.input, grids)
    w_hat = _by_spec(op, "weight", weight, config.weight, grids)
    b_hat = _bias_hat(op, input, weight, bias, config, grids)
    product = F.linear(x_hat, w_hat, b_hat)
    if product.is_meta or not config.uses_int8_gemm(weight.shape[1]):  # a meta tensor has no values
        return _by_spec(op, "output", product, config.output, grids)
    y = int8_result(input.detach(), weight.detach(), b_hat, config, grids)
    y = _straight_through(product.to(y.dtype), y)
    return _by_spec(op, "output", y, config.output, grids).to(product.dtype)


def _bias_hat(
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None, config: QATConfig, grids: StaticGrids
) -> Tensor | None:
    if bias is None or not config.has_int32_bias:
        return None if bias is None else _by_spec(op, "bias", bias, config.specs["bias"], grids)
    assert config.input is not None and config.weight is not None
    scales = (
        (grids.get(name) or choose_qparams(tensor.detach(), **spec.arguments))[0]
        for name, tensor, spec in (("input", input, config.input), ("weight", weight, config.weight))
    )
    return int32_bias(bias, *scales)


def int32_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Returns the bias as integer runtimes have it: a multiple of ``S``, with the gradient of ``bias``.

    ::

        S = input_scale * weight_scale        b_hat = round(bias / S) * S        the quotient in float64

    Args:
        bias: ``(out_features,)``.
        input_scale: one element.
        weight_scale: one element, or one per output channel.
    """
    input_scale, weight_scale = input_scale.detach().abs(), weight_scale.detach().abs().flatten()
    scale = scale_of_sums(input_scale, weight_scale).double()
    b_hat = torch.round(bias.detach().double() / scale) * scale
    return _straight_through(bias, b_hat.to(weight_scale.dtype).to(bias.dtype))


def fixed_grids(
    input: Tensor, weight: Tensor, config: QATConfig, grid_of: Any = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the grids of a config whose ranges are all Dynamic or Fixed.

    ``grid_of`` computes one; None means :func:`fixed_grid`.

    Raises:
        ValueError: A range has a state.
    """
    grids = {}
    for name, tensor in (("input", input), ("weight", weight), ("output", input)):
        spec = getattr(config, name)
        if spec is None or spec.is_dynamic:
            continue
        if spec.has_state:
            raise ValueError(
                f"qat_linear: expected config.{name} to have the range Dynamic() or Fixed(lo, hi), got {spec.range}, "
                "whose state a module keeps; use QATLinear"
            )
        grids[name] = (grid_of or fixed_grid)(tensor, spec)
    return grids


def fixed_grid(input: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Returns the scale and the zero point of a Fixed range for ``input``."""
    return qparams_of_range(*ends_of_fixed(input, spec), spec.quant_min, spec.quant_max, spec.symmetric)


def ends_of_fixed(input: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Returns ``lo`` and ``hi`` of a Fixed range, one element per block of ``input``."""
    assert isinstance(spec.range, Fixed)
    shape = checks.shape_of_qparams(input.shape, spec.granularity)
    options: Any = {"dtype": checks.compute_dtype(input.dtype), "device": input.device}
    return torch.full(shape, spec.range.lo, **options), torch.full(shape, spec.range.hi, **options)


def int8_result(
    input: Tensor, weight: Tensor, b_hat: Tensor | None, config: QATConfig, grids: StaticGrids
) -> Tensor:
    """Returns the int8 GEMM with the bias, in the compute dtype."""
    assert config.input is not None and config.weight is not None
    y = _int8_gemm(
        _levels(input, config.input, grids.get("input")),
        _levels(weight, config.weight, grids.get("weight")),
    )
    return y if b_hat is None else y + b_hat.detach()


def requantized(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    specs: tuple[QuantSpec, QuantSpec],
    grids: StaticGrids,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    axis: int,
    batch_norm: tuple[Any, Any, Any, Any, float] | None,
    activation: str | None,
    output: tuple[Tensor, Tensor],
    output_spec: QuantSpec,
) -> Tensor:
    """Returns the values of the integers that a layer gives to the layer that reads it.

    ::

        g   = gamma / sqrt(var + eps)                       1 without BatchNorm
        sw' = max(sw * |g|, |b| / (sx * 2^30), tiny)
        S   = max(sx * sw', tiny)
        b   = (bias - mean) * g + beta                      b32 = round(b / S), in float64
        q   = clamp(round((acc + b32) * (S / sy)) + zy, low, high)
        y   = (q - zy) * sy

    ``acc`` is the exact product of the integers, where those of the weight have the sign of ``g``; a channel whose
    ``sw'`` is wider than ``sw * |g|`` has ``round(q_w * (sw * |g| / sw'))``. Each operation is rounded to the compute
    dtype, the root in float64 first. After a ReLU ``low`` is ``max(quant_min, zy)``, after a ReLU6 ``high`` is also at
    most ``zy + round(6 / sy)``.

    Args:
        input: of the layer.
        weight: a matrix with a row per output channel.
        bias: or None.
        specs: of input and weight.
        grids: of ``input`` and, unless it is Dynamic, ``weight``.
        product: the layer's product, of a matrix of weights.
        axis: of the output channels in the product.
        batch_norm: running mean and variance, gamma and beta (or None), eps.
        activation: ``"relu"``, ``"relu6"`` or None.
        output: scale and zero point of the integers.
        output_spec: their grid.
    """
    x_levels, sx = _levels(input.detach(), specs[0], grids["input"])
    w_levels, sw = _levels(weight.detach(), specs[1], grids.get("weight"))
    folded = fold(sw.reshape(-1).expand(weight.shape[0]), sx, bias, batch_norm)
    w_levels = torch.where(folded.is_nan.unsqueeze(-1), torch.nan, folded.of_rows(w_levels, torch.float64))
    acc = product(x_levels, w_levels, None)
    return requantize(acc, folded.b32, sx, folded.scale, axis, activation, output, output_spec)


class Folded(NamedTuple):
    """A layer's scales with its BatchNorm, one element per output channel; see :func:`requantized`.

    ``narrow`` is ``sw * |g|``, ``scale`` is ``sw'``; ``b32`` is float64.
    """

    g: Tensor
    narrow: Tensor
    scale: Tensor
    b32: Tensor
    is_nan: Tensor

    def of_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the integers of the weight with BatchNorm, from those without it."""
        widens, flips = self.scale > self.narrow, self.g < 0
        can_branch = self.g.is_cpu and not (
            torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        )
        if not can_branch or widens.any():
            widened = torch.round(rows.to(self.g.dtype) * (self.narrow / self.scale).unsqueeze(-1)).to(dtype)
            rows = torch.where(widens.unsqueeze(-1), widened, rows)
        if not can_branch or flips.any():
            rows = torch.where(flips.unsqueeze(-1), -rows, rows)
        return rows


def fold(
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    batch_norm: tuple[Any, Any, Any, Any, float] | None,
) -> Folded:
    """Returns the scales of a layer with its BatchNorm; see :func:`requantized`.

    Args:
        weight_scale: one element per output channel.
        input_scale: one element.
        bias: or None.
        batch_norm: as for :func:`requantized`.
    """
    sx, sw = input_scale.reshape(()), weight_scale
    g, b = _folded(bias, batch_norm, sw)
    narrow = sw * g.abs()
    wide = torch.maximum(narrow, b.abs() / (sx * 2.0**30)).clamp(min=torch.finfo(sw.dtype).tiny)
    b32 = torch.round(b.double() / scale_of_sums(sx, wide).double())
    return Folded(g, narrow, wide, b32, g.isnan() | b.isnan())


def scale_of_sums(input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Returns ``S``, the scale of the sums of an int8 GEMM.

    Args:
        input_scale: one element.
        weight_scale: of any shape.
    """
    return (input_scale.reshape(()) * weight_scale).clamp(min=torch.finfo(weight_scale.dtype).tiny)


def requantize(
    acc: Tensor,
    b32: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    axis: int,
    activation: str | None,
    output: tuple[Tensor, Tensor],
    output_spec: QuantSpec,
) -> Tensor:
    """Returns the values of the integers that follow from the exact sums ``acc``; see :func:`requantized`.

    Args:
        acc: float64, float32 or int32; of a type that holds ``acc + b32``.
        b32: likewise, one element per output channel.
        input_scale: one element.
        weight_scale: ``sw'``.
        axis: of the output channels in ``acc``.
        activation: as for :func:`requantized`.
        output: likewise.
        output_spec: likewise.
    """
    factor, low, high, y_scale = requantization(input_scale, weight_scale, activation, output, output_spec)
    shape = [-1 if dim == axis % acc.dim() else 1 for dim in range(acc.dim())]
    total = (acc + b32.reshape(shape)).to(factor.dtype)
    return on_grid(total, factor.reshape(shape), low, high, y_scale)


def requantization(
    input_scale: Tensor,
    weight_scale: Tensor,
    activation: str | None,
    output: tuple[Tensor, Tensor],
    output_spec: QuantSpec,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the factor of each output channel, the least and the greatest level, and the scale of the integers."""
    dtype = weight_scale.dtype
    y_scale, y_zero_point = (value.detach().reshape(()) for value in output)
    y_scale = checks.positive_scale(y_scale)
    factor = (scale_of_sums(input_scale, weight_scale) / y_scale).clamp(max=torch.finfo(dtype).max)
    z = y_zero_point.to(dtype)
    low, high = output_spec.quant_min - z, output_spec.quant_max - z
    if activation is not None:
        low = low.clamp(min=0)
    if activation == "relu6":
        high = torch.minimum(high, torch.round(torch.full_like(y_scale, 6.0) / y_scale))
    return factor, low, high, y_scale


def on_grid(
    total: Tensor, factor: Tensor, low: Tensor | float, high: Tensor | float, y_scale: Tensor
) -> Tensor:
    """Returns ``clamp(round(total * factor), low, high) * y_scale`` in ``total``.

    Numbers as bounds are ten times as fast as tensors. In the formula the clamp comes after the zero point, which is
    the same: sums that the dtype does not hold are clamped.
    """
    bounds: Any = (low, high)
    total.mul_(factor).round_()
    if isinstance(low, float):
        total.clamp_(*bounds)
    else:
        total.copy_(total.clamp(*bounds))  # vmap has no rule for clamp_ by tensors
    return total.mul_(y_scale).add_(0.0)


def _folded(
    bias: Tensor | None, batch_norm: tuple[Any, Any, Any, Any, float] | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the factor and the bias of each output channel, in the dtype of ``like``."""
    dtype = like.dtype
    b = torch.zeros_like(like) if bias is None else bias.detach().to(dtype)
    if batch_norm is None:
        return torch.ones_like(like), b
    mean, var = (value.detach().to(dtype) for value in batch_norm[:2])
    gamma, beta = (None if value is None else value.detach().to(dtype) for value in batch_norm[2:4])
    root = _sqrt((var + torch.full_like(var, batch_norm[4])).double()).to(dtype)
    g = (torch.ones_like(like) if gamma is None else gamma) / root
    b = (b - mean) * g
    return g, b if beta is None else b + beta


def quantized_dtype(quant_min: int, quant_max: int) -> torch.dtype:
    """Returns the narrowest integer dtype for the ends; it is unsigned if ``quant_min >= 0``."""
    candidates = (torch.uint8, torch.uint16) if quant_min >= 0 else (torch.int8, torch.int16)
    for dtype in candidates:
        if torch.iinfo(dtype).min <= quant_min and quant_max <= torch.iinfo(dtype).max:
            return dtype
    raise ValueError(
        "quantize: expected quant_min and quant_max to fit in one of int8, uint8, int16 and uint16, got "
        f"quant_min={quant_min}, quant_max={quant_max}"
    )


def _by_spec(op: str, name: str, tensor: Tensor, spec: QuantSpec | None, grids: StaticGrids) -> Tensor:
    if spec is None:
        return tensor
    checks.blocks(f"{op}: {name}", tensor.shape, spec.granularity)
    if name not in grids:
        return fake_quantize(tensor, **spec.arguments)
    function = fake_quantize_learned if isinstance(spec.range, Learned) else fake_quantize_affine
    scale, zero_point = grids[name]
    return function(tensor, scale, zero_point, spec.quant_min, spec.quant_max, granularity=spec.granularity)


def _int8_gemm(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor]) -> Tensor:
    """Returns ``sum(level_x * level_w) * (scale_x * scale_w)``, with the exact sum in float64."""
    x_levels, x_scale = x
    weight_levels, weight_scale = weight
    total = x_levels @ weight_levels.t() + 0.0  # never -0.0
    return total.to(x_scale.dtype) * (x_scale * weight_scale.squeeze(-1))


def _levels(x: Tensor, spec: QuantSpec, grid: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Returns the levels of ``x`` in float64 (NaN for NaN) and the scale of each row, or of all, as a column."""
    quant_min, quant_max, granularity = spec.quant_min, spec.quant_max, spec.granularity
    if grid is None:
        scale, zero_point = _choose_qparams(x, quant_min, quant_max, spec.symmetric, granularity)
    else:
        shape = checks.shape_of_qparams(x.shape, granularity)
        scale, zero_point = (value.detach().reshape(shape) for value in grid)
        scale = checks.positive_scale(scale)
    column = scale.reshape(1) if isinstance(granularity, PerTensor) else scale.reshape(*x.shape[:-1], 1)
    return levels(x, spec, scale, zero_point), column


def levels(x: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Returns the levels of ``x`` in float64, NaN for NaN."""
    blocks = _to_blocks(x.to(scale.dtype), spec.granularity)
    scale, zero_point = (_broadcast(value, blocks, spec.granularity) for value in (scale, zero_point))
    q = torch.clamp(torch.round(blocks / scale) + zero_point, spec.quant_min, spec.quant_max)
    return (q - zero_point).reshape(x.shape).to(torch.float64)


def _check_dynamic(
    op: str, input: Tensor, num_bits: int, symmetric: bool, granularity: Granularity, narrow_range: bool
) -> tuple[int, int]:
    num_bits = arguments.num_bits(op, num_bits)
    arguments.boolean(op, "symmetric", symmetric)
    arguments.boolean(op, "narrow_range", narrow_range)
    checked_granularity(op, granularity)
    checks.tensor(op, "input", input, checks.FLOAT_DTYPES)
    checks.blocks(op, input.shape, granularity)
    return quant_range(num_bits, symmetric, narrow_range)


def _check_affine(
    op: str,
    input: Tensor,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    granularity: Granularity,
) -> tuple[Tensor, Tensor, int, int]:
    checked_granularity(op, granularity)
    quant_min, quant_max = checks.quant_range(op, quant_min, quant_max)
    checks.tensor(op, "input", input, checks.FLOAT_DTYPES)
    checks.blocks(op, input.shape, granularity)
    scale, zero_point = checks.qparams(
        op, input, scale, zero_point, quant_min, quant_max, granularity, input.dtype
    )
    return scale, zero_point, quant_min, quant_max


def _to_blocks(x: Tensor, granularity: Granularity) -> Tensor:
    """Splits the last dimension into (groups, group_size) if the granularity is per group."""
    if isinstance(granularity, PerGroup):
        return x.unflatten(-1, (x.shape[-1] // granularity.group_size, granularity.group_size))
    return x


def _dims_within_block(x: Tensor, granularity: Granularity) -> tuple[int, ...]:
    """Returns the dimensions of ``_to_blocks(x)`` that a block spans."""
    if isinstance(granularity, PerTensor):
        return tuple(range(x.dim()))
    if isinstance(granularity, PerChannel):
        return tuple(dim for dim in range(x.dim()) if dim != granularity.axis % x.dim())
    return (x.dim() - 1,)


def _broadcast(qparam: Tensor, x: Tensor, granularity: Granularity) -> Tensor:
    """Reshapes ``qparam`` (one element per block) to broadcast against ``_to_blocks(x)``."""
    if isinstance(granularity, (PerGroup, PerToken)):
        return qparam.unsqueeze(-1)
    if isinstance(granularity, PerChannel):
        return qparam.reshape([-1 if dim == granularity.axis % x.dim() else 1 for dim in range(x.dim())])
    return qparam


def _choose_qparams(
    x: Tensor, quant_min: int, quant_max: int, symmetric: bool, granularity: Granularity
) -> tuple[Tensor, Tensor]:
    return qparams_of_range(*_range(x, granularity), quant_min, quant_max, symmetric)


def _range(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Returns the range of the finite values of each block, 0 included, in the compute dtype."""
    shape = checks.shape_of_qparams(x.shape, granularity)
    x = _to_blocks(x.to(checks.compute_dtype(x.dtype)), granularity)
    finite = torch.where(x.isfinite(), x, torch.zeros_like(x))
    dims = _dims_within_block(x, granularity)
    if x.numel() == 0:
        return x.new_zeros(shape), x.new_zeros(shape)
    # amin(()) would reduce every dimension, not none
    lo = (finite.amin(dims) if dims else finite).clamp(max=0)
    hi = (finite.amax(dims) if dims else finite).clamp(min=0)
    return lo, hi


def _any_finite(x: Tensor, granularity: Granularity) -> Tensor:
    """Returns whether each block has a finite value."""
    if x.numel() == 0:
        shape = checks.shape_of_qparams(x.shape, granularity)
        return torch.zeros(shape, dtype=torch.bool, device=x.device)
    x = _to_blocks(x, granularity)
    dims = _dims_within_block(x, granularity)
    return x.isfinite().any(dims) if dims else x.isfinite()


def qparams_of_range(
    lo: Tensor, hi: Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    eps = torch.finfo(lo.dtype).tiny
    # divisors are tensors: on CUDA torch divides by a Python number with a rounded reciprocal
    if symmetric:
        scale = torch.maximum(lo / torch.full_like(lo, quant_min), hi / torch.full_like(hi, quant_max))
    else:
        intervals = torch.full_like(lo, quant_max - quant_min)
        scale = torch.where((hi - lo).isinf(), hi / intervals - lo / intervals, (hi - lo) / intervals)
    scale = scale.clamp(min=eps)
    if symmetric:
        zero_point = torch.zeros_like(lo)
    else:
        zero_point = torch.clamp(quant_min - torch.round(lo / scale), quant_min, quant_max)
    return scale, zero_point.to(torch.int32)


def _fake_quantize(
    input: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, granularity: Granularity
) -> tuple[Tensor, Tensor]:
    """Returns the fake-quantized values, and where the gradient passes for a static range."""
    x = _to_blocks(input.to(checks.compute_dtype(input.dtype)), granularity)
    scale, zero_point = _broadcast(scale, x, granularity), _broadcast(zero_point, x, granularity)
    q = torch.round(x / scale) + zero_point
    inside = (quant_min <= q) & (q <= quant_max)
    y = (torch.clamp(q, quant_min, quant_max) - zero_point) * scale
    return _like(_rounded(y, input.dtype).reshape(input.shape), input), inside.reshape(input.shape)


def _sqrt(x: Tensor) -> Tensor:
    """Returns the correctly rounded root: torch's float64 one (MKL) is a unit off in 2 % of values."""
    if type(x) is not Tensor or x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.sqrt()
    return torch.tensor([math.sqrt(value) for value in x.flatten().tolist()], dtype=x.dtype).reshape(x.shape)


def _sum_of_blocks(values: Tensor, granularity: Granularity) -> Tensor:
    """Returns the sum of each block of ``_to_blocks(x)`` in an order that depends on the block's size only.

    A block's elements, in the order of a contiguous tensor, form chunks of 512, 16 rows of 32 lanes each. The rows of
    a chunk are added one after the other, then the halves of the lanes. The chunks' sums are added the same way.
    """
    if isinstance(granularity, PerTensor):
        rows = values.reshape(1, -1)
    elif isinstance(granularity, PerChannel):
        blocks = values.shape[granularity.axis]
        rows = values.movedim(granularity.axis, 0).reshape(blocks, values.numel() // max(blocks, 1))
    else:
        rows = values.reshape(values.shape[:-1].numel(), values.shape[-1])
    sums = _sums_of_chunks(rows.double())
    while sums.shape[1] > 1:
        sums = _sums_of_chunks(sums)
    shape = values.shape[:-1]
    if isinstance(granularity, PerTensor):
        shape = torch.Size()
    elif isinstance(granularity, PerChannel):
        shape = values.shape[granularity.axis : granularity.axis + 1 or None]
    return sums.reshape(shape)


def _sums_of_chunks(rows: Tensor) -> Tensor:
    missing = -rows.shape[1] % 512 if rows.shape[1] > 0 else 512
    chunks = F.pad(rows, (0, missing)).unflatten(1, (-1, 16, 32))
    lanes = torch.zeros_like(chunks[:, :, 0])
    for i in range(16):
        lanes = lanes + chunks[:, :, i]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes.squeeze(-1)


def _rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to ``dtype``; values that underflow become 0.0, never -0.0."""
    y = y.to(dtype)
    return torch.where(y == 0, torch.zeros_like(y), y)


def _like(value: Tensor, input: Tensor) -> Tensor:
    """Returns ``value`` in the memory format of ``torch.empty_like(input)``."""
    if torch._C._are_functorch_transforms_active():
        return value
    return torch.empty_like(input, dtype=value.dtype).copy_(value)


def _straight_through(input: Tensor, value: Tensor, inside: Tensor | None = None) -> Tensor:
    """Returns ``value`` with the derivative of ``input``, zero where ``inside`` is False."""
    if not torch.compiler.is_dynamo_compiling():
        return _StraightThroughBothModes.apply(input, value, inside)
    if not torch._C._are_functorch_transforms_active():
        return _StraightThrough.apply(input, value, inside)
    # In a functorch transform, torch.compile drops the backward of autograd functions. This formula
    # drops the derivative only where ``input`` is not finite.
    passes = input.isfinite() if inside is None else inside & input.isfinite()
    return value + torch.where(passes, input - input.detach(), 0)


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, value: Tensor, inside: Tensor | None) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.has_inside = inputs[2] is not None
        if ctx.has_inside:  # otherwise nothing is saved, and backward may run twice
            ctx.save_for_backward(inputs[2])
            ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (_where(ctx.saved_tensors[0], grad) if ctx.has_inside else grad), None, None


class _LearnedFakeQuantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        granularity: Granularity,
    ) -> Tensor:
        shape = checks.shape_of_qparams(input.shape, granularity)
        positive = checks.positive_scale(scale).reshape(shape)
        return _fake_quantize(input, positive, zero_point.reshape(shape), quant_min, quant_max, granularity)[
            0
        ]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.rest = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, scale, zero_point = ctx.saved_tensors
        compiling = torch.compiler.is_dynamo_compiling()
        gradients = _learned_gradients if compiling else _LearnedGradients.apply
        dx, ds = gradients(grad, input, scale, zero_point, *ctx.rest)
        return dx, ds, None, None, None, None


class _LearnedGradients(torch.autograd.Function):
    """The gradients of input and scale, which have none themselves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor,
        input: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        granularity: Granularity,
    ) -> tuple[Tensor, Tensor]:
        return _learned_gradients(grad, input, scale, zero_point, quant_min, quant_max, granularity)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("fake_quantize_learned: expected one differentiation, got a second derivative")


def _learned_gradients(
    grad: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    granularity: Granularity,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of input and scale of :func:`fake_quantize_learned`."""
    shape = checks.shape_of_qparams(input.shape, granularity)
    positive = checks.positive_scale(scale).reshape(shape)
    zero_point = zero_point.reshape(shape)
    compute = checks.compute_dtype(input.dtype)
    x = _to_blocks(input.to(compute), granularity)
    v = x / _broadcast(positive, x, granularity)
    level = torch.round(v)
    z = _broadcast(zero_point, x, granularity)
    low, high = (quant_min - z).to(compute), (quant_max - z).to(compute)
    t = torch.where(level < low, low, torch.where(level > high, high, level - v))
    products = torch.where(x.isnan(), 0, _to_blocks(grad.to(compute), granularity) * t)
    total = _sum_of_blocks(products, granularity)
    size = input.numel() // max(zero_point.numel(), 1)
    factor = 1 / _sqrt(size * (quant_max - zero_point.double()).clamp(min=1)) if size else 0.0
    sign = torch.where(scale < 0, -1.0, 1.0).to(scale.dtype)
    inside = ((low <= level) & (level <= high)).reshape(input.shape)
    ds = (factor * total).to(scale.dtype).reshape(scale.shape) * sign
    return _like(torch.where(inside, grad, 0), input), ds


class _StraightThroughBothModes(_StraightThrough):
    """Adds forward mode; separate because torch.compile rejects a ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        # Returns a copy: an in-place operation on the output also writes into its tangent.
        return _where(ctx.saved_tensors[0], tangent) if ctx.has_inside else tangent.clone()


def _where(inside: Tensor, derivative: Tensor) -> Tensor:
    """Returns ``derivative``, zero where ``inside`` is False.

    A sparse derivative, such as that of an embedding table, stays sparse.
    """
    if not derivative.is_sparse:
        return torch.where(inside, derivative, 0)
    derivative = derivative.coalesce()
    indices = derivative.indices()
    values = torch.where(inside[tuple(indices)], derivative.values(), 0)
    return torch.sparse_coo_tensor(
        indices, values, derivative.shape, is_coalesced=True, check_invariants=False
    )
