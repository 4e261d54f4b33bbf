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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments, checks
from .config import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConfig,
    QuantSpec,
    checked_granularity,
    quant_range,
)


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
    scale, zero_point = checks.qparam_tensors(op, input, scale, zero_point, -32768, 65535, granularity, dtype)
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
    x_hat = _by_spec(op, "input", input, config.input)
    w_hat = _by_spec(op, "weight", weight, config.weight)
    b_hat = None if bias is None else _by_spec(op, "bias", bias, config.bias)
    product = F.linear(x_hat, w_hat, b_hat)
    if product.is_meta or not config.uses_int8_gemm(weight.shape[1]):  # a meta tensor has no values
        return _by_spec(op, "output", product, config.output)
    assert config.input is not None and config.weight is not None
    y = _int8_gemm(input.detach(), config.input, weight.detach(), config.weight)
    if b_hat is not None:
        y = y + b_hat.detach()
    y = _by_spec(op, "output", y, config.output)
    return _straight_through(product, y.to(product.dtype))


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


def _by_spec(op: str, name: str, tensor: Tensor, spec: QuantSpec | None) -> Tensor:
    if spec is None:
        return tensor
    checks.blocks(f"{op}: {name}", tensor.shape, spec.granularity)
    return fake_quantize(tensor, **spec.arguments)


def _int8_gemm(x: Tensor, x_spec: QuantSpec, weight: Tensor, weight_spec: QuantSpec) -> Tensor:
    """Returns ``sum((q_x - zero_point_x) * (q_w - zero_point_w)) * (scale_x * scale_w)``.

    The sum is exact in float64.
    """
    x_levels, x_scale = _levels(x, x_spec)
    weight_levels, weight_scale = _levels(weight, weight_spec)
    total = x_levels @ weight_levels.t() + 0.0  # never -0.0
    return total.to(x_scale.dtype) * (x_scale * weight_scale.squeeze(-1))


def _levels(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Returns the levels in float64, NaN where ``x`` is NaN, and the scale as a column.

    The column has one element per row, or a single element if the granularity is per tensor.
    """
    quant_min, quant_max, granularity = spec.quant_min, spec.quant_max, spec.granularity
    scale, zero_point = _choose_qparams(x, quant_min, quant_max, spec.symmetric, granularity)
    blocks = _to_blocks(x.to(scale.dtype), granularity)
    block_scale = _broadcast(scale, blocks, granularity)
    block_zero_point = _broadcast(zero_point, blocks, granularity)
    q = torch.clamp(torch.round(blocks / block_scale) + block_zero_point, quant_min, quant_max)
    column = scale.reshape(1) if isinstance(granularity, PerTensor) else scale.reshape(*x.shape[:-1], 1)
    return (q - block_zero_point).reshape(x.shape).to(torch.float64), column


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
    scale, zero_point = checks.qparam_tensors(
        op, input, scale, zero_point, quant_min, quant_max, granularity, input.dtype
    )
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
    compute = checks.compute_dtype(x.dtype)
    eps = torch.finfo(compute).tiny
    shape = checks.shape_of_qparams(x.shape, granularity)
    x = _to_blocks(x.to(compute), granularity)
    finite = torch.where(x.isfinite(), x, torch.zeros_like(x))
    dims = _dims_within_block(x, granularity)
    if x.numel() == 0:
        lo = hi = x.new_zeros(shape)
    else:  # amin(()) would reduce every dimension
        lo = (finite.amin(dims) if dims else finite).clamp(max=0)
        hi = (finite.amax(dims) if dims else finite).clamp(min=0)
    # The divisors are tensors: on CUDA, torch multiplies by the rounded reciprocal of a number.
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
