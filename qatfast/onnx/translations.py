"""How torch.onnx.export writes the operators of qatfast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..config import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, granularity_from_code
from ..reference import quantized_dtype
from .export import require_extra

TINY = 2.0**-126


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Returns the table with which torch.onnx.export takes prepared and converted models as they are.

    ::

        torch.onnx.export(model, inputs, path, dynamo=True, custom_translation_table=qatfast.onnx.translations())

    The graph has QuantizeLinear and DequantizeLinear around the layers, or products of integers, as the operators of
    the model say. :func:`qatfast.onnx.export` also writes what runtimes need to multiply integers everywhere, and
    checks the file.

    Raises:
        ImportError: the extra ``qatfast[onnx]`` is not installed.
    """
    require_extra("qatfast.onnx.translations")
    names = (
        *("choose_qparams", "dequantize", "fake_quantize", "fake_quantize_affine", "fake_quantize_learned"),
        *("integer_conv", "integer_linear", "qat_conv_int8", "qat_linear", "qat_linear_int8"),
        *("qat_linear_int8_static", "qparams_of_range", "quantize"),
    )
    operators, aten = torch.ops.qatfast, torch.ops.aten
    table = {
        getattr(operators, name).default: globals()[f"_{name}"] for name in names if hasattr(operators, name)
    }
    return table | {operator.default: _convolution for operator in (aten.conv1d, aten.conv2d, aten.conv3d)}


def _op() -> Any:
    from onnxscript import opset18

    return opset18


def _dtype(dtype: torch.dtype) -> int:
    from onnxscript import ir

    return int(ir.DataType.from_numpy(torch.empty(0, dtype=dtype).numpy().dtype))


def _float(value: float) -> Any:
    op = _op()
    return op.Constant(value_float=float(value))


def _cast(x: Any, dtype: torch.dtype) -> Any:
    y = _op().Cast(x, to=_dtype(dtype))
    y.shape = x.shape
    return y


def _ints(values: Sequence[int]) -> Any:
    from onnxscript import ir

    return _op().Constant(value=ir.tensor(np.array(values, dtype=np.int64)))


# Quantizers


def _choose_qparams(
    input: Any,
    num_bits: int = 8,
    symmetric: bool = False,
    granularity: Sequence[int] = (0, 0),
    narrow_range: bool = True,
) -> Any:
    spec = QuantSpec(
        num_bits, bool(symmetric), granularity_from_code(granularity), narrow_range=bool(narrow_range)
    )
    return _qparams(input, spec)


def _qparams(x: Any, spec: QuantSpec) -> tuple[Any, Any]:
    """Returns scale and zero point (int32) of the tensor at hand."""
    op, granularity = _op(), spec.granularity
    x, axes = _cast(x, torch.float32), None
    if isinstance(granularity, PerChannel):
        dims = len(x.shape)
        axes = [axis for axis in range(dims) if axis != granularity.axis % dims]
    elif isinstance(granularity, (PerToken, PerGroup)):
        x = _as_blocks(x, granularity)
        axes = [-1]
    operands = [x] if axes is None else [x, _ints(axes)]
    return _of_range(op.ReduceMin(*operands, keepdims=0), op.ReduceMax(*operands, keepdims=0), spec)


def _of_range(lo: Any, hi: Any, spec: QuantSpec) -> tuple[Any, Any]:
    op = _op()
    low, high = _float(spec.quant_min), _float(spec.quant_max)
    lo, hi = op.Min(lo, _float(0)), op.Max(hi, _float(0))
    if spec.symmetric:
        scale = op.Max(op.Max(op.Div(lo, low), op.Div(hi, high)), _float(TINY))
        return scale, _cast(op.Mul(scale, _float(0)), torch.int32)
    scale = op.Max(op.Div(op.Sub(hi, lo), _float(spec.quant_max - spec.quant_min)), _float(TINY))
    zero_point = op.Sub(low, op.Round(op.Div(lo, scale)))
    return scale, _cast(op.Min(op.Max(zero_point, low), high), torch.int32)


def _qparams_of_range(
    lo: Any, hi: Any, num_bits: int, symmetric: bool, narrow_range: bool, dtype: int
) -> Any:
    return _of_range(lo, hi, QuantSpec(num_bits, bool(symmetric), narrow_range=bool(narrow_range)))


def _as_blocks(x: Any, granularity: Any) -> Any:
    """Returns the tensor with a last dimension per group."""
    if not isinstance(granularity, PerGroup):
        return x
    return _op().Reshape(x, _ints([*([0] * (len(x.shape) - 1)), -1, granularity.group_size]))


def _quantize(
    input: Any,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    granularity: Sequence[int] = (0, 0),
) -> Any:
    op, blocks = _op(), granularity_from_code(granularity)
    dtype = quantized_dtype(quant_min, quant_max)
    x = _cast(input, torch.float32)
    if isinstance(blocks, (PerTensor, PerChannel)) and torch.iinfo(dtype).bits == 8:
        axis = {} if isinstance(blocks, PerTensor) else {"axis": blocks.axis}
        q = op.QuantizeLinear(x, _shaped(scale, blocks), _cast(_shaped(zero_point, blocks), dtype), **axis)
        info = torch.iinfo(dtype)
        if (info.min, info.max) != (quant_min, quant_max):
            q = op.Clip(q, _cast(_float(quant_min), dtype), _cast(_float(quant_max), dtype))
        return _with_shape(q, input)
    dims, x = len(input.shape), _as_blocks(x, blocks)
    scale, zero_point = (_broadcast(value, blocks, dims) for value in (scale, zero_point))
    q = op.Add(op.Round(op.Div(x, scale)), _cast(zero_point, torch.float32))
    q = op.Min(op.Max(q, _float(quant_min)), _float(quant_max))
    return _with_shape(_cast(_like(q, input, blocks), dtype), input)


def _dequantize(
    input: Any, scale: Any, zero_point: Any, granularity: Sequence[int] = (0, 0), dtype: int = 1
) -> Any:
    op, blocks = _op(), granularity_from_code(granularity)
    dims, x = len(input.shape), _as_blocks(_cast(input, torch.float32), blocks)
    scale, zero_point = (_broadcast(value, blocks, dims) for value in (scale, zero_point))
    y = op.Mul(op.Sub(x, _cast(zero_point, torch.float32)), scale)
    return op.Cast(_like(y, input, blocks), to=dtype)


def _with_shape(y: Any, x: Any) -> Any:
    """Says that ``y`` has the shape of ``x``: the exporter infers none within a translation."""
    y.shape = x.shape
    return y


def _shaped(value: Any, granularity: Any) -> Any:
    """Returns a scale or zero point as a scalar or a vector."""
    return _op().Reshape(value, _ints([] if isinstance(granularity, PerTensor) else [-1]))


def _broadcast(value: Any, granularity: Any, dims: int) -> Any:
    op = _op()
    if isinstance(granularity, PerTensor):
        return op.Reshape(value, _ints([]))
    if isinstance(granularity, PerChannel):
        return op.Reshape(value, _ints([-1 if dim == granularity.axis % dims else 1 for dim in range(dims)]))
    return op.Unsqueeze(value, _ints([-1]))


def _like(y: Any, x: Any, granularity: Any) -> Any:
    op = _op()
    return op.Reshape(y, op.Shape(x)) if isinstance(granularity, PerGroup) else y


def _fake_quantize_affine(
    input: Any,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    granularity: Sequence[int] = (0, 0),
) -> Any:
    op, blocks = _op(), granularity_from_code(granularity)
    q = _quantize(input, scale, zero_point, quant_min, quant_max, granularity)
    dtype = quantized_dtype(quant_min, quant_max)
    if isinstance(blocks, (PerTensor, PerChannel)) and torch.iinfo(dtype).bits == 8:
        axis = {} if isinstance(blocks, PerTensor) else {"axis": blocks.axis}
        y = op.DequantizeLinear(q, _shaped(scale, blocks), _cast(_shaped(zero_point, blocks), dtype), **axis)
    else:
        y = _dequantize(q, scale, zero_point, granularity)
    return _with_shape(op.CastLike(y, input), input)


def _fake_quantize_learned(
    input: Any,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    granularity: Sequence[int] = (0, 0),
) -> Any:
    op = _op()
    scale = op.Max(op.Abs(scale), _float(TINY))
    return _fake_quantize_affine(input, scale, zero_point, quant_min, quant_max, granularity)


def _fake_quantize(
    input: Any,
    num_bits: int = 8,
    symmetric: bool = False,
    granularity: Sequence[int] = (0, 0),
    narrow_range: bool = True,
) -> Any:
    spec = QuantSpec(
        num_bits, bool(symmetric), granularity_from_code(granularity), narrow_range=bool(narrow_range)
    )
    scale, zero_point = _qparams(input, spec)
    return _fake_quantize_affine(input, scale, zero_point, spec.quant_min, spec.quant_max, granularity)


# Layers


def _qat_linear(input: Any, weight: Any, bias: Any, specs: Sequence[int], dtype: int | None = None) -> Any:
    x, w, b, output = (specs[i : i + 4] for i in range(0, 16, 4))
    y = _product(_by_code(input, x), _weight_by_code(weight, w), None if bias is None else _by_code(bias, b))
    return _op().CastLike(_by_code(y, output), input)


def _qat_linear_int8(
    input: Any,
    weight: Any,
    bias: Any,
    int8_weight: Sequence[Any],
    specs: Sequence[int],
    dtype: int | None = None,
) -> Any:
    w = _of_int8_weight(int8_weight) if len(int8_weight) else _weight_by_code(weight, specs[4:8])
    b = None if bias is None else _by_code(bias, specs[8:12])
    return _by_code(_product(_by_code(input, specs[:4]), w, b), specs[12:16])


def _qat_linear_int8_static(
    input: Any,
    weight: Any,
    bias_hat: Any,
    int8_weight: Sequence[Any],
    input_scale: Any,
    input_zero_point: Any,
    weight_scale: Any,
    weight_zero_point: Any,
    specs: Sequence[int],
) -> Any:
    x = _on_grid(input, input_scale, input_zero_point, specs[:4])
    w = _of_int8_weight(int8_weight) if len(int8_weight) else None
    w = _on_grid(weight, weight_scale, weight_zero_point, specs[4:8]) if w is None else w
    return _product(x, w, bias_hat)


def _on_grid(x: Any, scale: Any, zero_point: Any, code: Sequence[int]) -> Any:
    if scale is None:
        return _by_code(x, code)
    spec = _spec(code)
    return _fake_quantize_affine(x, scale, zero_point, spec.quant_min, spec.quant_max, spec.granularity.code)


def _of_int8_weight(int8_weight: Sequence[Any]) -> Any:
    values, scale, zero_point, *_ = int8_weight
    return _dequantize(values, scale, zero_point, PerChannel(0).code)


def _spec(code: Sequence[int]) -> QuantSpec:
    num_bits, grid, *granularity = code
    return QuantSpec(num_bits, grid > 0, granularity_from_code(granularity), narrow_range=grid != 2)


def _by_code(x: Any, code: Sequence[int]) -> Any:
    if code[0] == 0:
        return x
    spec = _spec(code)
    arguments = spec.arguments | {"granularity": spec.granularity.code}
    return _fake_quantize(x, **arguments)


def _weight_by_code(weight: Any, code: Sequence[int]) -> Any:
    """Arithmetic, which the exporter folds: behind DequantizeLinear, onnxruntime would quantize float inputs itself."""
    if code[0] == 0:
        return weight
    spec = _spec(code)
    scale, zero_point = _qparams(weight, spec)
    granularity = spec.granularity.code
    q = _quantize(weight, scale, zero_point, spec.quant_min, spec.quant_max, granularity)
    return _op().CastLike(_dequantize(q, scale, zero_point, granularity), weight)


def _product(x: Any, weight: Any, bias: Any) -> Any:
    op = _op()
    y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return y if bias is None else op.Add(y, bias)


def _integer_linear(
    input: Any,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    weight: Any,
    b32: Any,
    factor: Any,
    low: Any,
    high: Any,
    y_scale: Any,
) -> Any:
    op = _op()
    q = _quantize(input, scale, zero_point, quant_min, quant_max)
    zero_point = _cast(_shaped(zero_point, PerTensor()), quantized_dtype(quant_min, quant_max))
    acc = op.MatMulInteger(q, op.Transpose(weight, perm=[1, 0]), zero_point)
    return _requantized(acc, b32, factor, low, high, y_scale, 0)


def _requantized(acc: Any, b32: Any, factor: Any, low: Any, high: Any, y_scale: Any, trailing: int) -> Any:
    op, shape = _op(), _ints([-1] + [1] * trailing)
    total = op.Add(acc, _cast(op.Reshape(b32, shape), torch.int32))
    levels = op.Round(op.Mul(_cast(total, torch.float32), op.Reshape(factor, shape)))
    levels = op.Min(op.Max(levels, _shaped(low, PerTensor())), _shaped(high, PerTensor()))
    return op.Mul(levels, _shaped(y_scale, PerTensor()))


def _integer_conv(
    input: Any,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    weight: Any,
    b32: Any,
    factor: Any,
    low: Any,
    high: Any,
    y_scale: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Any:
    geometry = (kernel_size, stride, padding, dilation, transposed, output_padding, groups)
    acc = _sums(input, scale, zero_point, quant_min, quant_max, weight, None, *geometry)
    return _requantized(_cast(acc, torch.int32), b32, factor, low, high, y_scale, len(kernel_size))


def _qat_conv_int8(
    input: Any,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    weight: Any,
    weight_scale: Any,
    weight_zero_point: Any,
    kernel_size: Sequence[int],
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Any:
    op = _op()
    geometry = (kernel_size, stride, padding, dilation, transposed, output_padding, groups)
    sums = _sums(input, scale, zero_point, quant_min, quant_max, weight, weight_zero_point, *geometry)
    shape = _ints([-1] + [1] * len(kernel_size))
    of_input = op.Reshape(scale, shape) if len(scale.shape) else scale  # one per sample, or one for all
    of_input = op.Unsqueeze(of_input, _ints([1])) if len(scale.shape) else of_input
    y = op.Mul(_cast(sums, torch.float32), op.Mul(of_input, op.Reshape(weight_scale, shape)))
    y = y if bias is None else op.Add(y, op.Reshape(bias, shape))
    return y, _cast(input, torch.uint8), _float(0)  # the last two are for gradients


def _sums(
    input: Any,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    weight: Any,
    weight_zero_point: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """Returns the sums of the products, by ConvInteger where that takes the operands, else in float."""
    op = _op()
    rows, channels = weight.shape[0], input.shape[1]
    attributes: dict[str, Any] = {
        "strides": list(stride),
        "pads": [*padding, *padding],
        "dilations": list(dilation),
        "group": groups,
        "kernel_shape": list(kernel_size),
    }
    granularity = PerChannel(0) if len(scale.shape) else PerTensor()
    q = _quantize(input, scale, zero_point, quant_min, quant_max, granularity.code)
    if not transposed and weight_zero_point is None and not len(scale.shape):
        kernel = op.Reshape(weight, _ints([rows, channels // groups, *kernel_size]))
        zero_point = _cast(_shaped(zero_point, PerTensor()), quantized_dtype(quant_min, quant_max))
        return op.ConvInteger(q, kernel, zero_point, **attributes)
    levels = _dequantize(q, op.Add(op.Mul(scale, _float(0)), _float(1)), zero_point, granularity.code)
    kernel = _cast(weight, torch.float32)
    if weight_zero_point is not None:
        kernel = op.Sub(kernel, _cast(_broadcast(weight_zero_point, PerChannel(0), 2), torch.float32))
    if not transposed:
        return op.Conv(
            levels, op.Reshape(kernel, _ints([rows, channels // groups, *kernel_size])), **attributes
        )
    shape = [groups, rows // groups, channels // groups, math.prod(kernel_size)]
    kernel = op.Transpose(op.Reshape(kernel, _ints(shape)), perm=[0, 2, 1, 3])
    kernel = op.Reshape(kernel, _ints([channels, rows // groups, *kernel_size]))
    return op.ConvTranspose(levels, kernel, output_padding=list(output_padding), **attributes)


def _convolution(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Any:
    """A convolution of torch: of levels in float64, for which runtimes have none, in float32."""
    from onnxscript import ir

    op, dims = _op(), len(weight.shape) - 2
    stride, padding, dilation = (
        [*values] * (dims if len(values) == 1 else 1) for values in (stride, padding, dilation)
    )
    operands = [input, weight, *([] if bias is None else [bias])]
    is_double = input.dtype == ir.DataType.DOUBLE
    if is_double:
        operands = [_cast(operand, torch.float32) for operand in operands]
    is_batch = len(input.shape) == dims + 2
    if not is_batch:
        operands[0] = op.Unsqueeze(operands[0], _ints([0]))
    y = op.Conv(*operands, strides=stride, pads=[*padding, *padding], dilations=dilation, group=groups)
    y = y if is_batch else op.Squeeze(y, _ints([0]))
    return _cast(y, torch.float64) if is_double else y
