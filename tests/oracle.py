"""An independent implementation of qatfast without arithmetic of torch or code of the package.

Scalars are exact fractions. They are rounded to a floating-point format, half to even, once per
operation of the contract. For large arrays there are functions in numpy; test_oracle.py compares
them with the fractions.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qatfast import PerChannel, PerGroup, PerTensor, PerToken, QATConfig, QuantSpec


class Format(NamedTuple):
    digits: int
    smallest_exponent: int
    largest_exponent: int


FORMATS = {
    torch.float16: Format(11, -14, 15),
    torch.bfloat16: Format(8, -126, 127),
    torch.float32: Format(24, -126, 127),
    torch.float64: Format(53, -1022, 1023),
}


def rounded(value: Fraction, dtype: torch.dtype) -> Fraction | float:
    """Rounds to the nearest number of ``dtype``, half to even; overflows to an infinity."""
    if value == 0:
        return value
    digits, smallest, largest = FORMATS[dtype]
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, smallest) - digits + 1)
    result = round(value / unit) * unit
    if abs(result) >= Fraction(2) ** (largest + 1):
        return math.inf if value > 0 else -math.inf
    return result


def quant_range(num_bits: int, symmetric: bool, narrow_range: bool = True) -> tuple[int, int]:
    top = 2 ** (num_bits - 1) - 1
    return (-top if narrow_range else -top - 1, top) if symmetric else (0, 2**num_bits - 1)


def choose_scalar(
    values: list[float], num_bits: int, symmetric: bool, dtype: torch.dtype, narrow_range: bool = True
) -> tuple[Fraction, int]:
    """Returns (scale, zero_point) of a block; ``dtype`` is that of the arithmetic."""
    quant_min, quant_max = quant_range(num_bits, symmetric, narrow_range)
    finite = [Fraction(value) for value in values if math.isfinite(value)]
    low, high = min([*finite, Fraction(0)]), max([*finite, Fraction(0)])
    if symmetric:
        scale = rounded(max(low / quant_min, high / quant_max), dtype)
    else:
        intervals = quant_max - quant_min
        width = rounded(high - low, dtype)
        if width == math.inf:
            scale = rounded(rounded(high / intervals, dtype) - rounded(low / intervals, dtype), dtype)
        else:
            scale = rounded(width / intervals, dtype)
    scale = max(scale, Fraction(2) ** FORMATS[dtype].smallest_exponent)
    if symmetric:
        return scale, 0
    return scale, min(max(quant_min - round(rounded(low / scale, dtype)), quant_min), quant_max)


def unclamped_scalar(x: float, scale: Fraction, zero_point: int, dtype: torch.dtype) -> int | float:
    """Returns ``round(x / scale) + zero_point``, without the clamp; it may be infinite or NaN."""
    quotient = rounded(Fraction(x) / scale, dtype) if math.isfinite(x) else x
    return round(quotient) + zero_point if math.isfinite(quotient) else quotient


def quantize_scalar(
    x: float, scale: Fraction, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> int:
    if math.isnan(x):
        return zero_point
    return int(min(max(unclamped_scalar(x, scale, zero_point, dtype), quant_min), quant_max))


def dequantize_scalar(
    q: int, scale: Fraction, zero_point: int, dtype: torch.dtype, out: torch.dtype
) -> float:
    product = rounded((q - zero_point) * scale, dtype)
    return float(product if isinstance(product, float) else rounded(product, out))


def block_of_each_element(shape: tuple[int, ...], granularity: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    """Returns the flat index of the block of each element, and the shape of the blocks."""
    if isinstance(granularity, PerTensor):
        return np.zeros(shape, dtype=int), ()
    if isinstance(granularity, PerChannel):
        axis = granularity.axis % len(shape)
        return np.indices(shape)[axis], (shape[axis],)
    size = granularity.group_size if isinstance(granularity, PerGroup) else max(shape[-1], 1)
    groups = shape[-1] // size if isinstance(granularity, PerGroup) else 1
    rows = np.arange(math.prod(shape[:-1])).reshape((*shape[:-1], 1))
    index = np.broadcast_to(rows * groups + np.arange(shape[-1]) // size, shape)
    return index, (*shape[:-1], groups) if isinstance(granularity, PerGroup) else shape[:-1]


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _list(x: Tensor) -> list[float]:
    return (
        x.detach().cpu().double().flatten().tolist() if x.is_floating_point() else x.cpu().flatten().tolist()
    )


def choose_qparams(
    x: Tensor,
    num_bits: int = 8,
    *,
    symmetric: bool = False,
    granularity: Any = PerTensor(),
    narrow_range: bool = True,
) -> tuple[Tensor, Tensor]:
    index, shape = block_of_each_element(tuple(x.shape), granularity)
    members: list[list[float]] = [[] for _ in range(math.prod(shape))]
    for value, block in zip(_list(x), index.flatten(), strict=True):
        members[block].append(value)
    dtype = _compute(x.dtype)
    pairs = [choose_scalar(values, num_bits, symmetric, dtype, narrow_range) for values in members]
    scale = torch.tensor([float(pair[0]) for pair in pairs], dtype=torch.float64).to(dtype)
    return scale.reshape(shape), torch.tensor([pair[1] for pair in pairs], dtype=torch.int32).reshape(shape)


def _map_elements(function: Any, x: Tensor, scale: Tensor, zero_point: Tensor, granularity: Any) -> list[Any]:
    index, _ = block_of_each_element(tuple(x.shape), granularity)
    scales, zero_points = [Fraction(value) for value in _list(scale)], _list(zero_point)
    return [
        function(value, scales[block], zero_points[block])
        for value, block in zip(_list(x), index.flatten(), strict=True)
    ]


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    granularity: Any = PerTensor(),
) -> Tensor:
    def element(value: float, s: Fraction, z: int) -> int:
        return quantize_scalar(value, s, z, quant_min, quant_max, _compute(x.dtype))

    q = torch.tensor(_map_elements(element, x, scale, zero_point, granularity), dtype=torch.int32)
    return q.reshape(x.shape).to(quantized_dtype(quant_min, quant_max))


def quantized_dtype(quant_min: int, quant_max: int) -> torch.dtype:
    if quant_min >= 0:
        return torch.uint8 if quant_max <= 255 else torch.uint16
    return torch.int8 if quant_min >= -128 and quant_max <= 127 else torch.int16


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    granularity: Any = PerTensor(),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    def element(value: int, s: Fraction, z: int) -> float:
        return dequantize_scalar(value, s, z, _compute(dtype), dtype)

    y = torch.tensor(_map_elements(element, q, scale, zero_point, granularity), dtype=torch.float64)
    return y.reshape(q.shape).to(dtype)


def fake_quantize_affine(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    granularity: Any = PerTensor(),
) -> Tensor:
    compute = _compute(x.dtype)

    def element(value: float, s: Fraction, z: int) -> float:
        if math.isnan(value):
            return math.nan
        return dequantize_scalar(
            quantize_scalar(value, s, z, quant_min, quant_max, compute), s, z, compute, x.dtype
        )

    y = torch.tensor(_map_elements(element, x, scale, zero_point, granularity), dtype=torch.float64)
    return y.reshape(x.shape).to(x.dtype)


def inside(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    granularity: Any = PerTensor(),
) -> Tensor:
    """Returns where ``fake_quantize_affine`` passes the gradient."""

    def element(value: float, s: Fraction, z: int) -> bool:
        return quant_min <= unclamped_scalar(value, s, z, _compute(x.dtype)) <= quant_max

    return torch.tensor(_map_elements(element, x, scale, zero_point, granularity), dtype=torch.bool).reshape(
        x.shape
    )


def fake_quantize(
    x: Tensor,
    num_bits: int = 8,
    *,
    symmetric: bool = False,
    granularity: Any = PerTensor(),
    narrow_range: bool = True,
) -> Tensor:
    scale, zero_point = choose_qparams(
        x, num_bits, symmetric=symmetric, granularity=granularity, narrow_range=narrow_range
    )
    ends = quant_range(num_bits, symmetric, narrow_range)
    return fake_quantize_affine(x, scale, zero_point, *ends, granularity=granularity)


def round_array(y: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Rounds a float32 or float64 array half to even; returns a tensor of ``dtype``."""
    if dtype != torch.bfloat16:
        numpy_dtype = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}[dtype]
        with np.errstate(over="ignore"):
            return torch.from_numpy(y.astype(numpy_dtype))
    patterns = y.view(np.uint32).astype(np.uint64)
    upper = ((patterns + 0x7FFF + ((patterns >> 16) & 1)) >> 16).astype(np.uint16)
    upper = np.where(np.isnan(y), np.uint16(0x7FC0), upper)
    return torch.from_numpy(upper.view(np.int16).copy()).view(torch.bfloat16)


def fake_quantize_affine_array(
    x: np.ndarray, scale: np.ndarray, zero_point: int, quant_min: int, quant_max: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (y, q); ``x`` and y are float32 or float64, and ``scale`` broadcasts."""
    scale = np.asarray(scale, dtype=x.dtype)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        levels = np.clip(np.rint(x / scale), quant_min - zero_point, quant_max - zero_point)
        y = levels * scale + x.dtype.type(0)
    q = np.where(np.isnan(x), zero_point, levels + zero_point)
    return np.where(np.isnan(x), x, y), q.astype(np.int32)


def uses_int8_gemm(config: QATConfig, in_features: int) -> bool:
    """Returns whether the layer runs as an int8 GEMM; otherwise it is the float formula."""
    if config.input is None or config.weight is None:
        return False
    if config.input.num_bits > 8 or config.weight.num_bits > 8:
        return False
    if config.input.granularity not in (PerTensor(), PerToken()):
        return False
    index, _ = block_of_each_element((3, max(in_features, 1)), config.weight.granularity)
    return bool((index == index[:, :1]).all())  # a block consists of rows


def levels_array(x: Tensor, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the levels, and per row the scale and whether the row has a NaN.

    A block must be a row or the whole matrix.
    """
    dtype = _compute(x.dtype)
    values = x.detach().cpu().to(dtype).numpy()
    ends = quant_range(spec.num_bits, spec.symmetric, spec.narrow_range)
    levels = np.zeros(values.shape, dtype=np.int64)
    scales = np.zeros(len(values), dtype=values.dtype)
    is_one_block = spec.granularity == PerTensor()
    for rows in [slice(None)] if is_one_block else [slice(row, row + 1) for row in range(len(values))]:
        finite = values[rows][np.isfinite(values[rows])]
        block_range = [float(finite.min(initial=0)), float(finite.max(initial=0))]
        scale, zero_point = choose_scalar(
            block_range, spec.num_bits, spec.symmetric, dtype, spec.narrow_range
        )
        scales[rows] = float(scale)
        _, q = fake_quantize_affine_array(values[rows], scales.dtype.type(float(scale)), zero_point, *ends)
        levels[rows] = q - zero_point
    return levels, scales, np.isnan(values).any(1)


def int8_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, config: QATConfig, dtype: torch.dtype | None = None
) -> Tensor:
    """Computes the layer as an int8 GEMM; ``dtype`` (default: the input's) is the result's."""
    assert config.input is not None and config.weight is not None
    compute = _compute(input.dtype)
    matrix = input.detach().reshape(math.prod(input.shape[:-1]), input.shape[-1])
    x, x_scale, x_nan = levels_array(matrix, config.input)
    w, w_scale, w_nan = levels_array(weight, config.weight)
    total = (x @ w.T).astype(x_scale.dtype)  # rounded once, from int64
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        y = total * (x_scale[:, None] * w_scale)
        if bias is not None:
            y = y + fake_quantize_by_spec(bias, config.bias).to(compute).numpy()
    y[x_nan], y[:, w_nan] = np.nan, np.nan
    result = torch.from_numpy(y).reshape(*input.shape[:-1], weight.shape[0])
    return round_array(fake_quantize_by_spec(result, config.output).numpy(), dtype or input.dtype)


def fake_quantize_by_spec(x: Tensor, spec: QuantSpec | None) -> Tensor:
    if spec is None:
        return x.detach().cpu()
    return fake_quantize(x, **spec.arguments)
