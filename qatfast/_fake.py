"""Fake kernels for torch.compile, torch.export and meta tensors, and FLOP formulas.

The strides must be those that the operators in ``csrc/ops/`` return: compiled graphs rely on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import checks, reference
from .config import PerGroup, PerToken, granularity_from_code
from .geometry import window_count


def register(functions: Sequence[str]) -> None:
    """Registers the fake kernels and the FLOP formulas. The extension must be loaded.

    Args:
        functions: the public functions. Without a fake kernel here, one returns a tensor like its input, and the
            operator ``<function>_forward`` that and the mask of the gradient.
    """
    _register_fakes(functions)
    _register_flops()


_FAKES: dict[str, Callable[..., Any]] = {}


def fake(op: str) -> Callable[[Any], Any]:
    """Makes a function the fake kernel of an operator."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _FAKES[op] = function
        return function

    return add


def _register_fakes(functions: Sequence[str]) -> None:
    functions = (*functions, "relu")  # which has no public function
    fakes = {op: like_input(op) for op in functions} | _FAKES
    for op in functions:
        if hasattr(torch.ops.qatfast, f"{op}_forward"):
            fakes.setdefault(f"{op}_forward", with_mask(op))
    for op, function in fakes.items():
        torch.library.register_fake(f"qatfast::{op}")(function)


def same_device(op: str, input: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None:
            checks.same_device(op, name, other, input)


def mask_of(input: Tensor) -> Tensor:
    return input.new_empty((input.numel() + 7) // 8, dtype=torch.uint8)


@fake("fake_quantize_affine_backward")
def _(grad: Tensor, mask: Tensor, stride: Sequence[int]) -> Tensor:
    same_device("fake_quantize_affine_backward", grad, mask=mask)
    return torch.empty_strided(grad.shape, stride, dtype=grad.dtype, device=grad.device)


def qparams(input: Tensor, granularity: Sequence[int]) -> tuple[Tensor, Tensor]:
    shape = checks.shape_of_qparams(input.shape, granularity_from_code(granularity))
    dtype = checks.compute_dtype(input.dtype)
    return input.new_empty(shape, dtype=dtype), input.new_empty(shape, dtype=torch.int32)


def of_dynamic_range(
    input: Tensor,
    num_bits: int = 8,
    symmetric: bool = False,
    granularity: Sequence[int] = (0, 0),
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor]:
    return qparams(input, granularity)


fake("choose_qparams")(of_dynamic_range)
fake("search_qparams")(of_dynamic_range)


@fake("observe_range")
def _(
    input: Tensor, running_min: Tensor, running_max: Tensor, num_batches: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return qparams(input, rest[3])


@fake("fake_quantize_observed")
def _(
    input: Tensor, running_min: Tensor, running_max: Tensor, num_batches: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(input), *qparams(input, rest[3])


@fake("fake_quantize_observed_forward")
def _(
    input: Tensor, running_min: Tensor, running_max: Tensor, num_batches: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(input), mask_of(input), *qparams(input, rest[3])


@fake("qparams_of_range")
def _(lo: Tensor, hi: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    same_device("qparams_of_range", lo, hi=hi)
    return lo.new_empty(lo.shape, dtype=rest[3]), lo.new_empty(lo.shape, dtype=torch.int32)


@fake("fake_quantize_learned_backward")
def _(grad: Tensor, input: Tensor, scale: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), torch.empty_like(scale, memory_format=torch.contiguous_format)


@fake("quantize")
def _(
    input: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, *_: Any, **__: Any
) -> Tensor:
    same_device("quantize", input, scale=scale, zero_point=zero_point)
    return torch.empty_like(input, dtype=reference.quantized_dtype(quant_min, quant_max))


@fake("dequantize")
def _(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    granularity: Sequence[int] = (0, 0),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    same_device("dequantize", input, scale=scale, zero_point=zero_point)
    return torch.empty_like(input, dtype=dtype)


def layer_output(
    input: Tensor, weight: Tensor, bias: Tensor | None, *_: Any, dtype: torch.dtype | None = None
) -> Tensor:
    same_device("qat_linear", input, weight=weight, bias=bias)
    return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=dtype or input.dtype)


fake("qat_linear")(layer_output)


def weight_hat(weight: Tensor, code: Sequence[int], dtype: torch.dtype) -> Tensor:
    if code[0] == 0:
        return weight.new_empty((0,), dtype=dtype)
    by_rows = isinstance(granularity_from_code(code[2:]), (PerGroup, PerToken))
    contiguous = by_rows and weight.device.type != "cpu"
    return torch.empty_like(weight.contiguous() if contiguous else weight, dtype=dtype)


@fake("qat_linear_forward")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    specs: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    output = layer_output(input, weight, bias, dtype=dtype)
    return output, weight_hat(weight, specs[4:8], output.dtype)


def rows_of(matrix: Tensor, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        matrix.new_empty((rows, matrix.shape[-1]), dtype=torch.int8),
        matrix.new_empty((rows,), dtype=checks.compute_dtype(matrix.dtype)),
        matrix.new_empty((rows,), dtype=torch.int32),
    )


@fake("qat_linear_int8_weight")
def _(weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = weight.shape[0]
    return *rows_of(weight, rows), weight.new_empty((rows,), dtype=torch.int64)


fake("qat_linear_int8")(layer_output)


@fake("qat_linear_int8_static")
def _(input: Tensor, weight: Tensor, bias_hat: Tensor | None, *_: Any) -> Tensor:
    return layer_output(input, weight, bias_hat, dtype=checks.compute_dtype(input.dtype))


@fake("qat_linear_int8_static_forward")
def _(
    input: Tensor, weight: Tensor, bias_hat: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    output = layer_output(input, weight, bias_hat, dtype=checks.compute_dtype(input.dtype))
    return output, mask_of(input), *rows_of(input, math.prod(input.shape[:-1]))


@fake("qat_linear_int8_static_backward")
def _(
    grad: Tensor, mask: Tensor, values: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(values.shape), grad.new_empty(weight.shape)


@fake("qat_linear_int8_forward")
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, *_: Any, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output = layer_output(input, weight, bias, dtype=dtype)
    return output, *rows_of(input, math.prod(input.shape[:-1]))


@fake("int8_product")
def _(int8_input: list[Tensor], int8_weight: list[Tensor], bias: Tensor | None) -> Tensor:
    return int8_input[1].new_empty((int8_input[0].shape[0], int8_weight[0].shape[0]))


@fake("qat_linear_int8_input")
def _(values: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    return values.new_empty(values.shape, dtype=dtype)


@fake("qat_linear_int8_backward")
def _(
    grad: Tensor,
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_spec: Sequence[int],
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(values.shape), grad.new_empty(weight.shape)


def int8_conv_input(
    input: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    running_min: Tensor | None,
    running_max: Tensor | None,
    num_batches: Tensor | None,
    averaging_constant: float,
    input_spec: Sequence[int],
    with_mask: bool,
) -> tuple[Tensor, ...]:
    mask = mask_of(input) if with_mask else input.new_empty((0,), dtype=torch.uint8)
    grid = qparams(input, (0, 0))
    poison = input.new_empty((), dtype=torch.float32)
    return torch.empty_like(input, dtype=torch.uint8), mask, *grid, torch.empty_like(grid[1]), poison


fake("int8_conv_input")(int8_conv_input)


@fake("int8_conv_scale_")
def _(sums: Tensor, *_: Any) -> Tensor:
    return sums.new_empty(())


@fake("int8_requantize_")
def _(sums: Tensor, *_: Any) -> Tensor:
    return sums


@fake("int8_conv_mask_")
def _(grad: Tensor, *_: Any) -> Tensor:
    return grad


def int8_conv_depthwise(
    values: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    tuples = zip(values.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    size = [window_count(n, k, s, 2 * p, d) for n, k, s, p, d in tuples]
    y = values.new_empty((*values.shape[:2], *size), dtype=torch.float32)
    return y.contiguous(memory_format=torch.channels_last)


fake("int8_conv_depthwise")(int8_conv_depthwise)


@fake("int8_conv_depthwise_forward")
def _(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    operands, (with_values, with_mask) = args[7:-2], args[-2:]
    y = int8_conv_depthwise(input, None, None, *operands)
    values, *rest = int8_conv_input(*(input, *args[:7], with_mask))
    is_kept = with_values or with_mask or not input.is_contiguous(memory_format=torch.channels_last)
    return values if is_kept else values.new_empty((0,)), *rest, y


@fake("int8_conv_windows")
def _(values: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    kernel_size, *_, output_size = arguments[3:]
    rows = values.shape[0] * math.prod(output_size)
    integers = values.new_empty((rows, values.shape[1] * math.prod(kernel_size)), dtype=torch.int8)
    zero_point = values.new_empty((rows,), dtype=torch.int32)
    return integers, scale.new_empty((rows,)), zero_point, values.new_empty((rows,), dtype=torch.int64)


@fake("int8_conv_grouped")
def _(values: Tensor, scale: Tensor, *arguments: Any) -> Tensor:
    int8_weight, output_size = arguments[3], arguments[-1]
    return scale.new_empty((values.shape[0], *output_size, int8_weight[0].shape[0])).movedim(-1, 1)


@fake("int8_conv_pointwise_weight")
def _(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    return weight.new_empty((rows + 15) // 16 * 16 * (1 + (columns + 3) // 4), dtype=torch.int32)


def pointwise(input: Tensor, *arguments: Any) -> Tensor:
    shape = (input.shape[0], arguments[5].shape[0], *input.shape[2:])
    y = input.new_empty(shape, dtype=torch.float32)
    return y.contiguous(memory_format=torch.channels_last if y.dim() == 4 else torch.channels_last_3d)


fake("int8_conv_pointwise")(pointwise)
fake("int8_conv_pointwise_requantized")(pointwise)


@fake("int8_conv_depthwise_backward")
def _(
    grad: Tensor, values: Tensor, scale: Tensor, zero_point: Tensor, weight_hat: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    dx = torch.empty_like(values, dtype=grad.dtype)
    results = (dx, torch.empty_like(weight_hat), grad.new_empty(values.shape[1:2]))
    return tuple(result if is_needed else None for result, is_needed in zip(results, rest[-1], strict=True))


@fake("qat_linear_grad_weight")
def _(grad: Tensor, input: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[1], input.shape[1]))


def like_input(op: str) -> Callable[..., Tensor]:
    names = [argument.name for argument in getattr(torch.ops.qatfast, op).default._schema.arguments]

    def fake_kernel(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        others = {**dict(zip(names[1:], args, strict=False)), **kwargs}
        same_device(op, input, **{name: x for name, x in others.items() if isinstance(x, Tensor)})
        return torch.empty_like(input)

    return fake_kernel


def with_mask(op: str) -> Callable[..., tuple[Tensor, Tensor]]:
    output = like_input(op)
    return lambda input, *args, **kwargs: (output(input, *args, **kwargs), mask_of(input))


def _register_flops() -> None:
    """Registers FLOP formulas: 2 M N K per matrix product, as torch counts nn.Linear.

    Quantizers count 0, like other elementwise operators.
    """
    ops = torch.ops.qatfast
    forwards = [
        ops.qat_linear,
        ops.qat_linear_forward,
        ops.qat_linear_int8,
        ops.qat_linear_int8_forward,
    ]
    for op in (*forwards, ops.qat_linear_grad_weight, ops.qat_linear_int8_backward):
        # Removes the formula of an earlier import in this process: torch rejects a second one.
        flop_registry.pop(op, None)

    @register_flop_formula(forwards)
    def _(input: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(input) * weight[0]

    @register_flop_formula(ops.qat_linear_grad_weight)
    def _(grad: Sequence[int], input: Sequence[int], **_: Any) -> int:
        return 2 * math.prod(grad) * input[1]

    @register_flop_formula(ops.qat_linear_int8_backward)
    def _(grad: Sequence[int], values: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * 2 * math.prod(grad) * values[1]
