"""Operators for ranges that modules keep: what is observed, and a layer with static ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, functional, kernels, reference, weight_cache
from .config import Learned, QATConfig, QuantSpec
from .int8_convolution import Int8Weight, int8_rows


def observe_range(
    input: Tensor, running_min: Tensor, running_max: Tensor, num_batches: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Moves a stored range by ``input``, in place, without a host sync.

    A block whose stored range is (0, 0) takes the range of ``input``. ``num_batches`` counts the
    tensors that have a finite value; others change nothing, and a block without a finite value
    keeps its range.

    Args:
        input: a floating-point tensor of any shape.
        running_min: float32, one element per block.
        running_max: likewise.
        num_batches: int64, shape ``()``.
        spec: with the range MovingAverage or MinMax.

    Returns:
        The scale and the zero point that quantize ``input``: those of the stored range before it
        moves, or of the range of ``input`` if there was none.
    """
    constant = spec.averaging_constant
    state = (running_min, running_max, num_batches)
    ops = kernels.route(input, *state)
    if ops is not None:
        granularity = spec.granularity.code
        return ops.observe_range(
            input, *state, constant, spec.num_bits, spec.symmetric, granularity, spec.narrow_range
        )
    return reference.observe_range(input, *state, constant, **spec.arguments)


def fake_quantize_observed(
    input: Tensor, running_min: Tensor, running_max: Tensor, num_batches: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake-quantizes ``input`` and moves the stored range, in one pass over memory.

    Args:
        input: as for :func:`observe_range`; so are the other arguments.
        running_min: float32, one element per block.
        running_max: float32, one element per block.
        num_batches: int64, shape ``()``.
        spec: with the range MovingAverage or MinMax.

    Returns:
        The result of :func:`qatfast.fake_quantize_affine`, and the scale and the zero point of :func:`observe_range`.
    """
    state = (running_min, running_max, num_batches)
    ops = kernels.route(input, *state)
    if ops is not None:
        constant, granularity = spec.averaging_constant, spec.granularity.code
        return ops.fake_quantize_observed(
            input, *state, constant, spec.num_bits, spec.symmetric, granularity, spec.narrow_range
        )
    scale, zero_point = observe_range(input.detach(), *state, spec)
    ends = (spec.quant_min, spec.quant_max)
    y = functional.fake_quantize_affine(input, scale, zero_point, *ends, granularity=spec.granularity)
    return y, scale, zero_point


def int8_conv_input(
    call: Callable[..., tuple[Tensor, ...]], spec: QuantSpec, *grid: Tensor
) -> tuple[Tensor, ...]:
    """Returns what an operator makes of a convolution's input, for plain tensors on the CPU.

    Args:
        call: int8_conv_input, or an operator that also computes the result; takes the arguments from
            ``scale`` to ``input_spec``.
        spec: per tensor.
        grid: scale and zero point, or running_min, running_max and num_batches, which move, or
            nothing for a dynamic range.

    Returns:
        The integers (uint8), the mask, the scale and the zero point that quantize the input, the zero
        point of the integers, and NaN if the input holds a NaN, else 0; then the result, if any.
    """
    given = (None, None, *grid) if len(grid) == 3 else (*(grid or (None, None)), None, None, None)
    return call(*given, spec.averaging_constant, spec.code)


def qparams_of_range(lo: Tensor, hi: Tensor, spec: QuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point for blocks with the range ``lo <= 0 <= hi``.

    Args:
        lo: float32 or float64, one element per block.
        hi: likewise.
        spec: the bits and the symmetry.
        dtype: float32 or float64: that of the scale, to which ``lo`` and ``hi`` are converted first.
    """
    ops = kernels.route(lo, hi)
    if ops is not None and lo.is_cpu:
        return ops.qparams_of_range(lo, hi, spec.num_bits, spec.symmetric, spec.narrow_range, dtype)
    ends = (spec.quant_min, spec.quant_max)
    return reference.qparams_of_range(lo.to(dtype), hi.to(dtype), *ends, spec.symmetric)


def fixed_grid(input: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Returns the scale and the zero point of a Fixed range for ``input``."""
    lo, hi = reference.ends_of_fixed(input, spec)
    return qparams_of_range(lo, hi, spec, lo.dtype)


def qat_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: QATConfig,
    grids: reference.StaticGrids,
    int8_weight: tuple[Tensor, ...] = (),
) -> Tensor:
    """Returns :func:`qatfast.qat_linear` with static ranges, for operands that the caller has checked.

    Args:
        input: ``(..., in_features)``.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
        config: what is quantized how.
        grids: scale and zero point of each of ``input``, ``weight`` and ``output`` whose range is
            not Dynamic. The scale of a Learned range gets a gradient.
        int8_weight: what :func:`kept_weight` returns for ``weight``, or nothing.
    """
    # These take neither the operators nor _LinearGradients.
    if torch._C._are_functorch_transforms_active() or kernels.is_forward_mode():
        return reference.qat_linear_static(input, weight, bias, config, grids)
    if takes_int8_weight(config) and config.uses_int8_gemm(weight.shape[-1]) and weight.dtype == input.dtype:
        ops = kernels.route(input, weight) if bias is None else kernels.route(input, weight, bias)
        if ops is not None and input.is_cpu:
            b_hat = bias_hat(input, weight, bias, config, grids)
            y = ops.qat_linear_int8_static(
                input, weight, b_hat, int8_weight, *grids["input"], None, None, config.codes
            )
            if config.output is not None:
                y = fake_quantized("output", y, config.output, grids)
            dtype = product_dtype(input)
            return y if y.dtype == dtype else y.to(dtype)  # a conversion that does nothing takes 1 us
    b_hat = bias_hat(input, weight, bias, config, grids)

    def hats() -> tuple[Tensor, Tensor]:
        x_hat = fake_quantized("input", input, config.input, grids)
        return x_hat, fake_quantized("weight", weight, config.weight, grids)

    if not config.uses_int8_gemm(weight.shape[-1]):
        return fake_quantized("output", F.linear(*hats(), b_hat), config.output, grids)
    y = _int8_result(input.detach(), weight.detach(), b_hat, config, grids, int8_weight)
    tensors = [input, weight, *([] if b_hat is None else [b_hat]), *(scale for scale, _ in grids.values())]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        y = _LinearGradients.apply(*hats(), b_hat, y)
    y = fake_quantized("output", y, config.output, grids)
    return y.to(product_dtype(input))


def qat_linear_fixed(input: Tensor, weight: Tensor, bias: Tensor | None, config: QATConfig) -> Tensor:
    """Returns :func:`qat_linear` with ranges that are Dynamic or Fixed.

    Raises:
        ValueError: A range has a state.
    """
    checks.linear_operands("qat_linear", input, weight, bias)
    return qat_linear(input, weight, bias, config, reference.fixed_grids(input, weight, config, fixed_grid))


def qat_linear_observed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: QATConfig,
    state: tuple[Tensor, Tensor, Tensor],
    int8_weight: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns :func:`observe_range` and :func:`qat_linear` of an input in one call.

    Args:
        input: as for :func:`qat_linear`, like weight and bias; they are checked here.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
        config: with an int8 GEMM, as :func:`takes_int8_weight` requires, an observed input, and
            bias and output in float.
        state: running_min, running_max and num_batches of the input.
        int8_weight: as for :func:`qat_linear`.

    Returns:
        The result, and scale and zero point of the input. None if this call takes the two
        operators one after the other, as under torch.compile and autocast.
    """
    tensors = (input, weight, *state) if bias is None else (input, weight, bias, *state)
    ops = kernels.route(*tensors)
    if ops is None or ops is torch.ops.qatfast or not input.is_cpu:
        return None
    if torch.is_autocast_enabled("cpu") or kernels.is_forward_mode():
        return None
    assert config.input is not None
    constant = config.input.averaging_constant
    y, *grid = ops.qat_linear_int8_observed(input, weight, bias, int8_weight, *state, constant, config.codes)
    return y if y.dtype == input.dtype else y.to(input.dtype), *grid


def takes_int8_weight(config: QATConfig) -> bool:
    """Returns whether one operator has the gradients of both: the input is static, the weight dynamic."""
    input, weight = config.input, config.weight
    if input is None or weight is None or input.is_dynamic or not weight.is_dynamic:
        return False
    return not isinstance(input.range, Learned)


def kept_weight(
    slot: weight_cache.Slot, weight: Tensor, config: QATConfig, grids: reference.StaticGrids
) -> tuple[tuple[Tensor, ...], Tensor, QATConfig]:
    """Returns what ``cached_weights`` keeps of a weight, as :func:`qat_linear` takes it.

    Args:
        slot: of the layer.
        weight: ``(out_features, in_features)``.
        config: of the layer.
        grids: as for :func:`qat_linear`.

    Returns:
        ``int8_weight``, which is () if none is kept; the weight, which is fake-quantized if that is kept; and the
        config that is left for it.
    """
    spec = config.weight
    if spec is None:
        return (), weight, config
    if config.uses_int8_gemm(weight.shape[-1]):
        if "weight" not in grids:
            return weight_cache.int8_weight(slot, weight, config), weight, config
        if kernels.route(weight) is None:
            return (), weight, config
        grid = grids["weight"]

        def as_rows() -> tuple[Tensor, ...]:
            quantized = quantized_weight(weight.detach(), spec, grid)
            return int8_rows(quantized.values, quantized)

        return weight_cache.kept_for(slot, weight, config, [*grid], as_rows), weight, config
    if "weight" not in grids:
        w_hat, others = weight_cache.quantized(slot, weight, config)
        return ((), weight, config) if others is None else ((), w_hat, others)
    if torch.is_grad_enabled():  # the scale may need a gradient
        return (), weight, config
    w_hat = weight_cache.kept_for(
        slot, weight, config, [*grids["weight"]], lambda: fake_quantized("weight", weight, spec, grids)
    )
    return (), w_hat, weight_cache.without_weight(config)


def quantized_weight(rows: Tensor, spec: QuantSpec, grid: tuple[Tensor, Tensor] | None) -> Int8Weight:
    """Returns the integers of a weight with a row per output channel; ``grid`` is None if its range is Dynamic."""
    scale, zero_point = grid_of_blocks(rows, spec, grid)
    ends = (spec.quant_min, spec.quant_max)
    values = functional.quantize(rows, scale, zero_point, *ends, granularity=spec.granularity)
    zero_points = zero_point.reshape(-1).expand(rows.shape[0])
    return Int8Weight(values, scale_of_rows(rows, scale), zero_points)


def grid_of_blocks(x: Tensor, spec: QuantSpec, grid: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Returns the scale and the zero point that quantize ``x``, in the shape of its blocks."""
    if grid is None:
        return functional.choose_qparams(x.detach(), **spec.arguments)
    shape = checks.shape_of_qparams(x.shape, spec.granularity)
    return checks.positive_scale(grid[0]).reshape(shape), grid[1].reshape(shape)


def scale_of_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """Returns the scale of each row, NaN where the row holds a NaN."""
    return torch.where(rows.isnan().any(1), torch.nan, scale.reshape(-1).expand(rows.shape[0]))


def bias_hat(
    input: Tensor, weight: Tensor, bias: Tensor | None, config: QATConfig, grids: reference.StaticGrids
) -> Tensor | None:
    """Returns the quantized bias of a layer whose weight is a matrix with a row per output channel."""
    if bias is None or config.bias is None:
        return bias
    if not config.has_int32_bias:
        return fake_quantized("bias", bias, config.specs["bias"], grids)
    assert config.input is not None and config.weight is not None
    scales = (
        (grids.get(name) or functional.choose_qparams(tensor.detach(), **spec.arguments))[0]
        for name, tensor, spec in (("input", input, config.input), ("weight", weight, config.weight))
    )
    return reference.int32_bias(bias, *scales)


def product_dtype(input: Tensor) -> torch.dtype:
    kind = input.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or input.dtype == torch.float64:
        return input.dtype
    return torch.get_autocast_dtype(kind)


def fake_quantized(name: str, tensor: Tensor, spec: QuantSpec | None, grids: reference.StaticGrids) -> Tensor:
    if spec is None:
        return tensor
    if name not in grids:
        return functional.fake_quantize(tensor, **spec.arguments)
    function: Any = functional.fake_quantize_affine
    if isinstance(spec.range, Learned):
        function = functional.fake_quantize_learned
    scale, zero_point = grids[name]
    ends = (spec.quant_min, spec.quant_max)
    return function(tensor, scale, zero_point, *ends, granularity=spec.granularity)


@torch.no_grad()
def _int8_result(
    input: Tensor,
    weight: Tensor,
    b_hat: Tensor | None,
    config: QATConfig,
    grids: reference.StaticGrids,
    int8_weight: tuple[Tensor, ...],
) -> Tensor:
    """Returns the int8 GEMM with the bias, in the compute dtype."""
    grid_of_input, grid_of_weight = (_grid(grids.get(name)) for name in ("input", "weight"))
    tensors = (input, weight) if b_hat is None else (input, weight, b_hat)
    ops = kernels.route(*tensors)
    if ops is not None and weight.dtype == input.dtype:
        return ops.qat_linear_int8_static(
            input, weight, b_hat, int8_weight, *grid_of_input, *grid_of_weight, config.codes
        )
    return reference.int8_result(input, weight, b_hat, config, grids)


def _grid(grid: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns scale and zero point as a static grid: a learned scale may be negative."""
    if grid is None:
        return None, None
    scale, zero_point = grid
    return checks.positive_scale(scale), zero_point


def with_gradient_of_whole(scale: Tensor, part: float) -> Tensor:
    """Returns a learned scale for a part of its blocks, with the gradient of the whole blocks.

    The gradient of a learned scale has the factor ``1 / sqrt(n)`` for n elements per block.

    Args:
        scale: one element per block.
        part: the elements of a block that are quantized with it, divided by all of its elements.
    """
    if part == 1 or not (scale.requires_grad and torch.is_grad_enabled()):
        return scale
    return _ScaledGradient.apply(scale, math.sqrt(part))


class _ScaledGradient(torch.autograd.Function):
    """``x`` as it is, with ``factor`` times its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy * ctx.factor, None


class _LinearGradients(torch.autograd.Function):
    """A result ``value`` with the gradients of ``F.linear(x, weight, bias)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_dirty(value)  # returned as it is: a view could not be modified in place
        return value

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        rows = dy.flatten(0, -2) if dy.dim() > 1 else dy.unsqueeze(0)
        if ctx.needs_input_grad[0]:
            dx = (dy.to(weight.dtype) @ weight).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = (rows.to(x.dtype).t() @ x.reshape(rows.shape[0], -1)).to(weight.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            db = rows.sum(0).to(ctx.bias_dtype)
        return dx, dw, db, None
