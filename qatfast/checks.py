"""The argument checks of the operators.

Each message names the operator, the rule and the value. The messages for tensors are those of
csrc/checks.cpp.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import kernels
from .arguments import integer
from .config import Granularity, PerChannel, PerGroup, PerTensor, checked_granularity

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGER_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.uint16)
ZERO_POINT_DTYPES = (*INTEGER_DTYPES, torch.int32, torch.uint32, torch.int64, torch.uint64)

_FLOAT32_ENDS = (2.0**-150, (2 - 2.0**-24) * 2.0**127)  # the bounds round to 0 and to infinity


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the arithmetic: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dense(op: str, name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a dense (strided) tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected {name} to be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"{op}: expected {name} to be a strided tensor, got {kind}")


def tensor(op: str, name: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises TypeError unless ``value`` is a dense tensor with one of the ``dtypes``."""
    dense(op, name, value)
    if value.dtype not in dtypes:
        names = [dtype_name(dtype) for dtype in dtypes]
        allowed = ", ".join(names[:-1]) + (" or " if names[:-1] else "") + names[-1]
        raise TypeError(f"{op}: expected {name} to be {allowed}, got {dtype_name(value.dtype)}")


def same_device(op: str, name: str, value: Tensor, input: Tensor) -> None:
    if value.device != input.device:
        raise RuntimeError(
            f"{op}: expected {name} on {input.device}, the device of input, got {value.device}"
        )


def blocks(op: str, shape: torch.Size, granularity: Granularity) -> None:
    """Raises ValueError unless ``granularity`` divides a tensor of ``shape``."""
    if isinstance(granularity, PerTensor):
        return
    if len(shape) == 0:
        raise ValueError(f"{op}: expected PerTensor() for a 0-dimensional input, got {granularity}")
    if isinstance(granularity, PerChannel) and not -len(shape) <= granularity.axis < len(shape):
        raise ValueError(
            f"{op}: expected axis to be from {-len(shape)} to {len(shape) - 1} for an input of {len(shape)} "
            f"dimensions, got {granularity.axis}"
        )
    if isinstance(granularity, PerGroup) and shape[-1] % granularity.group_size != 0:
        raise ValueError(
            f"{op}: expected the last dimension to be divisible by group_size={granularity.group_size}, got "
            f"{shape[-1]}; write PerGroup() with a divisor of {shape[-1]}"
        )


def quant_range(op: str, quant_min: Any, quant_max: Any) -> tuple[int, int]:
    quant_min, quant_max = integer(op, "quant_min", quant_min), integer(op, "quant_max", quant_max)
    if not -32768 <= quant_min < quant_max <= 65535:
        raise ValueError(
            f"{op}: expected -32768 <= quant_min < quant_max <= 65535, got quant_min={quant_min}, quant_max={quant_max}"
        )
    if quant_max - quant_min > 65535:
        raise ValueError(f"{op}: expected quant_max - quant_min <= 65535, got {quant_max - quant_min}")
    return quant_min, quant_max


def shape_of_qparams(shape: torch.Size, granularity: Granularity) -> tuple[int, ...]:
    """Returns the shape of scale and zero point, which have one element per block.

    It is ``()`` per tensor, ``(C,)`` per channel, the leading shape per token and
    ``(..., groups)`` per group.
    """
    if isinstance(granularity, PerTensor):
        return ()
    if isinstance(granularity, PerChannel):
        return (shape[granularity.axis],)
    if isinstance(granularity, PerGroup):
        return (*shape[:-1], shape[-1] // granularity.group_size)
    return tuple(shape[:-1])


def keepdim_shape(shape: torch.Size, granularity: Granularity) -> tuple[int, ...]:
    """Returns ``shape_of_qparams`` with reduced dimensions kept as size 1.

    The checkpoints of other libraries store scales in this shape.
    """
    if isinstance(granularity, PerTensor):
        return (1,) * len(shape)
    if isinstance(granularity, PerChannel):
        axis = granularity.axis % len(shape)
        return tuple(size if dim == axis else 1 for dim, size in enumerate(shape))
    return (*shape_of_qparams(shape, granularity), 1)


def static_range(
    op: str,
    input: Any,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    granularity: Granularity,
    dtype: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """Checks what Python gives for a static range. Returns scale and zero point, as tensors if ``input`` is one.

    Numbers become 0-dimensional tensors; only PerTensor() takes them. ``dtype`` (default: that of ``input``) decides
    the dtype of the scale.
    """
    checked_granularity(op, granularity)
    if (isinstance(scale, Tensor) and isinstance(zero_point, Tensor)) or not isinstance(input, Tensor):
        return scale, zero_point
    for name, value, number_type, type_name in (
        ("scale", scale, numbers.Real, "a number"),
        ("zero_point", zero_point, numbers.Integral, "an int"),
    ):
        if isinstance(value, Tensor):
            continue
        if isinstance(value, bool) or not isinstance(value, number_type):
            raise TypeError(f"{op}: expected {name} to be a torch.Tensor or {type_name}, got {value!r}")
        if not isinstance(granularity, PerTensor):
            raise TypeError(f"{op}: expected {name} to be a torch.Tensor for {granularity}, got {value!r}")
    if not isinstance(scale, Tensor):
        compute = compute_dtype(dtype or input.dtype)
        low, high = (0, math.inf) if compute == torch.float64 else _FLOAT32_ENDS
        scale = scale if isinstance(scale, int) else float(scale)
        if not low < scale < high:
            is_inexact = scale > 0 and scale != math.inf
            reason = f", which is {'inf' if scale > 1 else 0} in {dtype_name(compute)}" if is_inexact else ""
            raise ValueError(f"{op}: expected scale to be positive and finite, got {_text(scale)}{reason}")
        # torch.full needs no copy from the host, which would synchronize with the device.
        scale = torch.full((), float(scale), dtype=compute, device=input.device)
    if not isinstance(zero_point, Tensor):
        zero_point = int(zero_point)
        if not quant_min <= zero_point <= quant_max:
            raise ValueError(
                f"{op}: expected zero_point to be from {quant_min} to {quant_max}, got {zero_point}"
            )
        zero_point = torch.full((), zero_point, dtype=torch.int32, device=input.device)
    return scale, zero_point


def qparams(
    op: str,
    input: Tensor,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    granularity: Granularity,
    dtype: torch.dtype,
    of: str = "input",
) -> tuple[Tensor, Tensor]:
    """Checks that scale and zero point fit ``input``.

    Returns them with shape ``shape_of_qparams``, the zero point as int32.
    """
    scale, zero_point = static_range(op, input, scale, zero_point, quant_min, quant_max, granularity, dtype)
    dense(op, "scale", scale)
    dense(op, "zero_point", zero_point)
    if scale.dtype != compute_dtype(dtype):
        raise TypeError(
            f"{op}: expected scale to be {dtype_name(compute_dtype(dtype))} for {dtype_name(dtype)} {of}, got "
            f"{dtype_name(scale.dtype)}"
        )
    if zero_point.dtype not in ZERO_POINT_DTYPES:
        raise TypeError(
            f"{op}: expected zero_point to be an integer tensor, got {dtype_name(zero_point.dtype)}"
        )
    shape = shape_of_qparams(input.shape, granularity)
    legal = [shape, keepdim_shape(input.shape, granularity), *([(1,)] if shape == () else [])]
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        if tuple(value.shape) not in legal:
            raise ValueError(
                f"{op}: expected {name} to have shape {shape} for {granularity}, got {tuple(value.shape)}"
            )
        same_device(op, name, value, input)
    if _readable(scale):
        _all(op, "scale", scale, (scale > 0) & scale.isfinite(), "to be positive and finite")
    if _readable(zero_point):
        wide = zero_point.to(torch.int64)  # torch does not compare uint16, uint32 and uint64
        inside = (wide >= quant_min) & (wide <= quant_max)
        if zero_point.dtype == torch.uint64:
            inside &= wide >= 0  # values from 2^63 on wrap
        _all(op, "zero_point", zero_point, inside, f"to be from {quant_min} to {quant_max}")
    return scale.detach().reshape(shape), zero_point.reshape(shape).to(torch.int32)


def filled_zero_point(op: str, scale: Tensor, value: Any) -> Tensor:
    """Returns an int32 tensor in the shape of ``scale``."""
    value = integer(op, "zero_point", value)
    return torch.full_like(scale, value, dtype=torch.int32, requires_grad=False)


def learned_qparams(
    op: str,
    input: Tensor,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    granularity: Granularity,
) -> Tensor:
    """Checks scale and zero point of a learned range. Returns the zero point as an int32 tensor."""
    dense(op, "scale", scale)
    if scale.dtype != compute_dtype(input.dtype):
        expected = dtype_name(compute_dtype(input.dtype))
        raise TypeError(
            f"{op}: expected scale to be {expected} for {dtype_name(input.dtype)} input, got {dtype_name(scale.dtype)}"
        )
    if not isinstance(zero_point, Tensor):
        zero_point = filled_zero_point(op, scale, zero_point)
    _, zero_point = qparams(
        op, input, positive_scale(scale), zero_point, quant_min, quant_max, granularity, input.dtype
    )
    return zero_point


def positive_scale(scale: Tensor) -> Tensor:
    """Returns a scale as it quantizes: ``max(|scale|, tiny)``, as a learned one may be negative or 0."""
    return scale.detach().abs().clamp(min=torch.finfo(scale.dtype).tiny)


def fixed_scale(op: str, scale: Any) -> None:
    """Raises ValueError if ``scale`` requires grad or has a tangent.

    The operators compute no gradient for the scale; without this check it would never be trained.
    """
    if not isinstance(scale, Tensor):
        return
    remedy = "; write fake_quantize_learned to train it, or scale.detach()"
    if scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: expected scale not to require grad, got one that does{remedy}")
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(scale).tangent is not None:
        raise ValueError(f"{op}: expected scale to have no tangent, got one that does{remedy}")


def linear_operands(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Checks dtypes, devices and shapes of the arguments of ``F.linear``."""
    operands(op, input, weight, bias)
    if weight.dim() != 2:
        raise ValueError(
            f"{op}: expected weight to have shape (out_features, in_features), got {tuple(weight.shape)}"
        )
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: expected input to have shape (..., {weight.shape[1]}), the in_features of weight, got "
            f"{tuple(input.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{op}: expected bias to have shape ({weight.shape[0]},), the out_features of weight, got "
            f"{tuple(bias.shape)}"
        )


def operands(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Checks dtypes and devices of the arguments of a layer."""
    # What is legal in most calls takes a third of the time of the checks below, which say what is not.
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if kernels.are_plain(*tensors) and input.dtype in FLOAT_DTYPES:
        dtype, device = input.dtype, input.device
        if all(other.dtype is dtype and other.device == device for other in tensors[1:]):
            return
    others = [("weight", weight)] + ([("bias", bias)] if bias is not None else [])
    for name, value in [("input", input), *others]:
        tensor(op, name, value, FLOAT_DTYPES)
    autocast = input.device.type != "meta" and torch.is_autocast_enabled(input.device.type)
    mixed = autocast and all(
        value.dtype != torch.float64 for value in (input, weight, *([] if bias is None else [bias]))
    )
    for name, value in others:
        same_device(op, name, value, input)
        if value.dtype != input.dtype and not mixed:
            raise TypeError(
                f"{op}: expected {name} to be {dtype_name(input.dtype)}, the dtype of input, got "
                f"{dtype_name(value.dtype)}"
            )


def _readable(value: Tensor) -> bool:
    """Returns whether the values of ``value`` can be checked.

    Reading them on another device would synchronize with it; in a transform or a trace there are no
    values.
    """
    return (
        value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(value) in (Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
    )


def _all(op: str, name: str, value: Tensor, is_legal: Tensor, rule: str) -> None:
    if not bool(is_legal.all()):
        raise ValueError(f"{op}: expected {name} {rule}, got {_text(value[~is_legal].flatten()[0].item())}")


def _text(number: float | int) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
