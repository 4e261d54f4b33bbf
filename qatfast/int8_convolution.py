"""Convolutions of integers: sums that are exact, rounded once to float32.

On the CPU by oneDNN where it is exact, else by a kernel of products of pairs (csrc/cpu/pair_products.cpp). On other
devices, and on a CPU without AVX2, by an int8 GEMM of the windows of the input (im2col), or with groups by a kernel of
their own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import isnan, prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional, kernels
from .config import PerChannel, PerTensor
from .geometry import Geometry, window_count

_SHIFT = 128  # between uint8 and int8
FLOAT_LIMIT = 2**24  # float32 holds all integers up to it
_INT_LIMIT = 2**31
_CPU_WINDOW_BYTES, _WINDOW_BYTES = 2**23, 2**28  # of the windows that exist at a time


class Int8Weight(NamedTuple):
    """A quantized weight: integers and, for each output channel, the scale and the zero point.

    The integers are int8 if the weight is symmetric, else uint8, or int16 with values of int8.
    The scale is NaN if the channel holds a NaN. ``packed`` keeps what a library makes of the
    integers, or is None if they are used once. ``total`` is the sum of each channel's integers, if known.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    packed: dict[Any, Any] | None = None
    total: Tensor | None = None


class Int8Input(NamedTuple):
    """A quantized input: integers (uint8), scale and the zero point of the integers.

    Scale and zero point have one element, or one per sample. ``poison`` is NaN if ``floats``, which were quantized,
    hold a NaN, else 0. Both are None if there is none.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    floats: Tensor | None = None
    poison: Tensor | None = None


class _Conv(NamedTuple):
    """A convolution that is not transposed; ``padding`` is (before, after) for each dimension."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


def unsigned(quant_min: int, quant_max: int, zero_point: Tensor) -> tuple[int, int, Tensor]:
    """Returns a grid that is moved to the range of uint8."""
    if quant_min >= 0:
        return quant_min, quant_max, zero_point
    return quant_min + _SHIFT, quant_max + _SHIFT, zero_point + _SHIFT


def forward(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    weight: Int8Weight,
    kernel_size: Sequence[int],
    bias: Tensor | None,
    geometry: Geometry,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the result in float32, the input's integers (uint8), and NaN if the input holds a NaN, else 0.

    ``scale`` and ``zero_point`` are those of the input: one element, or one per sample.
    """
    quant_min, quant_max, zero_point = unsigned(quant_min, quant_max, zero_point)
    granularity = PerChannel(0) if scale.dim() else PerTensor()
    q = functional.quantize(input, scale, zero_point, quant_min, quant_max, granularity=granularity)
    poison = poison_of(input)
    integers = with_nans(Int8Input(q, scale, zero_point), input, poison)
    return product(integers, weight, kernel_size, bias, geometry, channels_last), q, poison


def poison_of(input: Tensor) -> Tensor:
    """Returns NaN if ``input`` holds a NaN, else 0, in float32."""
    poison = input.new_zeros((), dtype=torch.float32)
    return poison.masked_fill_(input.amax().isnan(), torch.nan) if input.numel() else poison


def with_nans(integers: Int8Input, input: Tensor, poison: Tensor) -> Int8Input:
    """Returns the integers of ``input``; ``poison`` is NaN if that holds a NaN, else 0."""
    if not uses_windows(input) and not isnan(poison.item()):  # only the CPU waits for the answer
        return integers
    return integers._replace(floats=input, poison=poison)


def takes(input: Tensor) -> bool:
    """Returns whether :func:`forward` computes this convolution."""
    if input.dtype == torch.float64:
        return False
    return not uses_windows(input) or input.numel() > 0


def uses_windows(input: Tensor) -> bool:
    return not input.is_cpu


def product(
    integers: Int8Input,
    weight: Int8Weight,
    kernel_size: Sequence[int],
    bias: Tensor | None,
    geometry: Geometry,
    channels_last: bool,
) -> Tensor:
    """Returns the result of :func:`forward` from the integers of its input."""
    q, scale, zero_point, floats, _ = integers
    is_plain = floats is None and scale.dim() == 0 and weight.values.dtype == torch.int8
    if is_plain and is_depthwise(q, weight.values, kernel_size, geometry):
        y = _depthwise(q, scale, zero_point, weight.values, weight.scale, kernel_size, bias, geometry)
        return in_format(y, channels_last)
    if is_plain and takes_pointwise(q, weight.values, weight.packed, kernel_size, geometry):
        return pointwise(q, scale, zero_point, (0, 255), weight, bias, channels_last)
    sums = _sums_by_library(q, zero_point, weight, kernel_size, geometry) if floats is None else None
    if sums is not None:
        y, largest = _scaled(sums, scale, weight.scale, bias)
        if largest < FLOAT_LIMIT:
            return in_format(y, channels_last)
    return in_format(by_windows(integers, weight, kernel_size, bias, geometry), channels_last)


def takes_pointwise(
    input: Tensor,
    weight: Tensor,
    packed: dict[Any, Any] | None,
    kernel_size: Sequence[int],
    geometry: Geometry,
) -> bool:
    """Returns whether :func:`pointwise` computes this convolution, with a symmetric weight of one grid per output.

    It takes floats only if it need not copy them.
    """
    extension: Any = kernels.extension
    if not (input.is_cpu and extension.has_dot_products and input.dim() in (4, 5)):
        return False
    if not geometry.is_pointwise(kernel_size):
        return False
    if weight.dtype != torch.int8 or input.shape[1] * 255 * 128 >= _INT_LIMIT:
        return False
    if packed is None and input.numel() <= 8 * weight.numel():  # as in _sums_by_library
        return False
    return input.dtype == torch.uint8 or input.movedim(1, -1).is_contiguous()


def pointwise(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    ends: Sequence[int],
    weight: Int8Weight,
    bias: Tensor | None,
    channels_last: bool,
) -> Tensor:
    """Returns the result of :func:`forward` by a kernel that quantizes the input and multiplies it.

    Args:
        input: of the layer, or its integers (uint8).
        scale: of the input, one element.
        zero_point: of the integers.
        ends: of the integers: ``quant_min`` and ``quant_max``.
        weight: symmetric.
        bias: or None.
        channels_last: the memory format of the result.
    """
    ops: Any = kernels.extension
    packed = packed_pointwise(weight.values, weight.packed)
    floats = None if bias is None else bias.to(torch.float32).contiguous()
    y = ops.int8_conv_pointwise(
        _channels_last(input), scale, zero_point, *ends, packed, weight.scale.contiguous(), floats
    )
    return in_format(y, channels_last)


def packed_pointwise(weight: Tensor, packed: dict[Any, Any] | None) -> Tensor:
    """Returns the weight as the kernels of a pointwise convolution take it."""
    kept = None if packed is None else packed.get("pointwise")
    if kept is None:
        ops: Any = kernels.extension
        kept = ops.int8_conv_pointwise_weight(weight.flatten(1).contiguous())
        if packed is not None:
            packed["pointwise"] = kept
    return kept


def exact_sums(
    integers: Int8Input,
    weight: Int8Weight,
    kernel_size: Sequence[int],
    geometry: Geometry,
    reach: int | None,
) -> Tensor:
    """Returns the sums of a convolution: int32 or float32, or float64 if they are larger or one is NaN.

    Args:
        integers: of the input, per tensor; the scale is not read.
        weight: symmetric; the scale is not read.
        kernel_size: of the layer.
        geometry: its Geometry.
        reach: which no sum exceeds, or None.
    """
    q, _, zero_point, floats, poison = integers
    most = weight.values[0].numel() * 255 * 128 if len(weight.values) else 0
    is_float = floats is None and min(most, most if reach is None else reach) < FLOAT_LIMIT
    extension: Any = kernels.extension
    if floats is None:
        if q.numel() and is_depthwise(q, weight.values, kernel_size, geometry):
            one, ones, _ = _vectors(len(weight.values))
            return _depthwise(q, one.view(()), zero_point, weight.values, ones, kernel_size, None, geometry)
        sums = _sums_by_library(q, zero_point, weight, kernel_size, geometry)
        if sums is not None and (is_float or max(-sums.amin(), sums.amax()) < FLOAT_LIMIT):
            return sums
        if q.is_cpu and extension.has_pair_products and most < _INT_LIMIT // 2:
            rows, groups, sizes = _operands_of_windows(q, weight, kernel_size, geometry)
            return extension.int8_conv_sums(q, weight.scale[:1], zero_point, rows, groups, *sizes)
    dtype = torch.float32 if is_float else torch.float64
    unit = torch.ones_like(zero_point, dtype=dtype)
    units = weight._replace(scale=torch.ones_like(weight.zero_point, dtype=dtype), packed=None)
    return by_windows(Int8Input(q, unit, zero_point, floats, poison), units, kernel_size, None, geometry)


def _as_plain(
    weight: Int8Weight,
    kernel_size: Sequence[int],
    geometry: Geometry,
) -> tuple[Tensor, _Conv]:
    """Returns the kernel and the arguments of the convolution that is not transposed, of the spread input."""
    kernel = weight.values
    if kernel.dim() == 2:
        kernel = kernel.view(len(kernel), -1, *kernel_size)
    stride, padding, dilation, transposed, output_padding, groups = geometry
    if not transposed:
        return kernel, _Conv(stride, tuple((p, p) for p in padding), dilation, groups)
    spread = tuple((d * (k - 1) - p) for d, k, p in zip(dilation, kernel_size, padding, strict=True))
    pads = tuple((s, s + o) for s, o in zip(spread, output_padding, strict=True))
    kernel = kernel.flip(tuple(range(2, kernel.dim())))
    return kernel, _Conv((1,) * len(pads), pads, dilation, groups)


def is_depthwise(q: Tensor, weight: Tensor, kernel_size: Sequence[int], geometry: Geometry) -> bool:
    """Returns whether the CPU has kernels: each channel of an image is its own group, with sums below 2^24."""
    if (
        not q.is_cpu
        or geometry.transposed
        or q.dim() != 4
        or not geometry.groups == q.shape[1] == weight.shape[0]
    ):
        return False
    extension: Any = kernels.extension
    return 0 < prod(kernel_size) <= extension.most_depthwise_taps


def _depthwise(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    kernel_size: Sequence[int],
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Returns the result of a convolution that :func:`is_depthwise`, in channels-last format."""
    ops: Any = kernels.extension
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    sizes = (tuple(kernel_size), *geometry[:3])
    return ops.int8_conv_depthwise(q, scale, zero_point, weight, weight_scale, bias, *sizes)


def _scaled(sums: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> tuple[Tensor, float]:
    """Returns ``sums * (scale * weight_scale) + bias`` and the largest magnitude of a sum; overwrites ``sums``."""
    ops: Any = kernels.extension
    if bias is not None:
        bias = bias.to(sums.dtype).contiguous()
    if not sums.movedim(1, -1).is_contiguous():
        sums = sums.movedim(1, -1).contiguous().movedim(-1, 1)
    largest = ops.int8_conv_scale_(sums, scale, weight_scale.contiguous(), bias)
    return sums, largest.item()


def _spread(values: Tensor, stride: Sequence[int], fill: int) -> Tensor:
    """Returns ``values`` with ``stride - 1`` fills between neighbours, as a transposed convolution sees them."""
    if all(step == 1 for step in stride):
        return values
    size = [(n - 1) * step + 1 for n, step in zip(values.shape[2:], stride, strict=True)]
    result = _channels_last(values.new_full((*values.shape[:2], *size), fill))
    steps = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
    result[steps] = values
    return result


def in_format(x: Tensor, channels_last: bool) -> Tensor:
    """Returns ``x`` in the memory format of a result."""
    return _channels_last(x) if channels_last else x.contiguous()


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


def _pads(convolution: _Conv) -> list[int]:
    """Returns the padding as F.pad takes it."""
    return [n for pair in reversed(convolution.padding) for n in pair]


def _sums_by_library(
    q: Tensor, zero_point: Tensor, weight: Int8Weight, kernel_size: Sequence[int], geometry: Geometry
) -> Tensor | None:
    """Returns the sums in float32, exact where they are below 2^24; None if the library is wrong or slow."""
    extension: Any = kernels.extension
    if q.is_cpu and extension.prefers_pair_products:
        return None
    kernel, convolution = _as_plain(weight, kernel_size, geometry)
    reach = prod(kernel.shape[1:]) * 255 * 128  # of the sums, also before the zero point is subtracted
    if kernel.dtype != torch.int8 or q.numel() == 0 or kernel.numel() == 0 or reach >= _INT_LIMIT:
        return None
    outputs = q.shape[0] * prod(geometry.output_size(q.shape[2:], kernel_size))
    if convolution.groups == 1 and weight.packed is None and outputs <= 8 * kernel.shape[0]:
        return None  # the library would take longer to pack the weight than the windows take
    if not _library_is_exact(q.dim() - 2):
        return None

    def sums_of(q: Tensor, zero_point: int) -> Tensor:
        q = _spread(q, geometry.stride, zero_point) if geometry.transposed else q
        return _by_library(q, zero_point, kernel, weight.packed, convolution)

    points: Any = zero_point.tolist()
    if zero_point.dim() == 0:
        return sums_of(q, points)
    return torch.cat([sums_of(*sample) for sample in zip(q.split(1), points, strict=True)])


def _by_library(
    q: Tensor, zero_point: int, kernel: Tensor, packed: dict[Any, Any] | None, convolution: _Conv
) -> Tensor:
    """Returns the sums that oneDNN computes, exact in 32 bits; scales of 1 leave them as they are."""
    if q.dim() == 3:  # as two dimensions, the first of them of size 1
        two = _Conv(
            (1, *convolution.stride),
            ((0, 0), *convolution.padding),
            (1, *convolution.dilation),
            convolution.groups,
        )
        return _by_library(q.unsqueeze(2), zero_point, kernel.unsqueeze(2), packed, two).squeeze(2)
    q, convolution = _for_library(q, zero_point, kernel, convolution)
    stride, padding, dilation, groups = convolution
    q = _channels_last(q)
    begins = [before for before, _ in padding]
    channels = kernel.shape[0]
    one, ones, zeros = _vectors(channels)
    key = (tuple(q.shape), zero_point == 0, convolution)
    ready = None if packed is None else packed.get(key)
    ops: Any = torch.ops.onednn
    if ready is None:
        ready = ops.qconv_prepack(
            kernel, one, 1.0, zero_point, stride, begins, dilation, groups, list(q.shape)
        )
        if packed is not None:
            packed.clear()
            packed[key] = ready
    product = ops.qconv2d_pointwise if q.dim() == 4 else ops.qconv3d_pointwise
    return product(
        q, 1.0, zero_point, ready, ones, zeros, None, stride, begins, dilation, groups,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip


def _for_library(q: Tensor, zero_point: int, kernel: Tensor, convolution: _Conv) -> tuple[Tensor, _Conv]:
    """Returns an input and a convolution with the same sums, which oneDNN computes.

    It pads both ends alike. If a window lies within the padding it may crash; the sums of a dimension with one output
    may be wrong if it has padding or a stride.
    """
    stride, padding, dilation, groups = convolution
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[2:], strict=True)]
    outputs = _output_size(q.shape[2:], kernel.shape[2:], convolution)
    for (before, after), size, d, span, n in zip(padding, q.shape[2:], dilation, spans, outputs, strict=True):
        reaches_input = 0 <= before < span and d <= size  # each window
        if before != after or (before != 0 and (n == 1 or not reaches_input)):
            q, padding = F.pad(q, _pads(convolution), value=zero_point), ((0, 0),) * len(padding)
            break
    for dim, (n, step, span) in enumerate(zip(outputs, stride, spans, strict=True), 2):
        if n == 1 and step > 1:
            q = q.narrow(dim, 0, span)  # a stride of 1 would give the outputs between
    stride = tuple(1 if n == 1 else step for n, step in zip(outputs, stride, strict=True))
    return q, _Conv(stride, padding, dilation, groups)


@functools.lru_cache(maxsize=64)
def _vectors(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns one scale for the packing, which reads scales one by one, and scales and zero points."""
    with torch.inference_mode(False):
        ones = torch.ones(channels, device="cpu")
        return torch.ones(1, device="cpu"), ones, torch.zeros(channels, dtype=torch.int32, device="cpu")


def by_windows(
    integers: Int8Input,
    weight: Int8Weight,
    kernel_size: Sequence[int],
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Returns the result in the dtype of the scales, without a library that computes convolutions.

    It is exact at any size. Nothing waits for a device.
    """
    q, scale, zero_point, floats, poison = integers
    rows, groups, sizes = _operands_of_windows(q, weight, kernel_size, geometry)
    bias = None if bias is None else bias.to(scale.dtype).contiguous()
    extension: Any = kernels.extension
    ops: Any = extension if q.is_cpu else torch.ops.qatfast
    if groups > 1 or (q.is_cpu and extension.has_pair_products):
        return ops.int8_conv_grouped(q, scale, zero_point, floats, poison, rows, bias, groups, *sizes)
    outputs = sizes[-1]
    most = _CPU_WINDOW_BYTES if q.is_cpu else _WINDOW_BYTES
    step = max(1, most // max(1, rows[0].shape[1] * prod(outputs)))

    def part(x: Tensor | None, begin: int) -> Tensor | None:
        return x if x is None or x.dim() == 0 else x[begin : begin + step]

    parts = []
    for begin in range(0, len(q), step):
        windows = ops.int8_conv_windows(*(part(x, begin) for x in integers), *sizes)
        y = ops.int8_product(windows, rows, bias)
        parts.append(y.view(-1, *outputs, y.shape[1]).movedim(-1, 1))
    if not parts:
        return scale.new_empty((0, len(rows[0]), *outputs))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _operands_of_windows(
    q: Tensor, weight: Int8Weight, kernel_size: Sequence[int], geometry: Geometry
) -> tuple[tuple[Tensor, ...], int, tuple[tuple[int, ...], ...]]:
    """Returns the rows of the weight, the groups, and the arguments of int8_conv_windows after the tensors."""
    kernel, convolution = _as_plain(weight, kernel_size, geometry)
    stride, padding, dilation, groups = convolution
    rows: Any = None if weight.packed is None else weight.packed.get("rows")
    if rows is None:
        rows = int8_rows(kernel.movedim(1, -1).flatten(1), weight)
        if weight.packed is not None:
            weight.packed["rows"] = rows
    spread = geometry.stride if geometry.transposed else (1,) * len(geometry.stride)
    spread_size = [(n - 1) * s + 1 for n, s in zip(q.shape[2:], spread, strict=True)]
    before = tuple(amount for amount, _ in padding)
    outputs = tuple(_output_size(spread_size, kernel.shape[2:], convolution))
    return rows, groups, (kernel.shape[2:], stride, before, dilation, tuple(spread), outputs)


def product_of_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Returns ``x @ weight.T`` of int8 matrices in float64, exact for any number of columns."""

    def rows_of(matrix: Tensor) -> list[Tensor]:
        zeros = matrix.new_zeros(len(matrix), dtype=torch.int64)
        return [
            matrix.contiguous(),
            torch.ones_like(zeros, dtype=torch.float64),
            zeros.to(torch.int32),
            zeros,
        ]

    return torch.ops.qatfast.int8_product(rows_of(x), rows_of(weight), None)


def int8_rows(matrix: Tensor, weight: Int8Weight) -> tuple[Tensor, ...]:
    """Returns the values (int8), scales, zero points and sums of levels of the rows of a weight."""
    zero_point = weight.zero_point
    if matrix.dtype == torch.uint8:
        matrix, zero_point = matrix.view(torch.int8) ^ -_SHIFT, zero_point - _SHIFT
    matrix, zero_point = matrix.to(torch.int8).contiguous(), zero_point.to(torch.int32).contiguous()
    if weight.total is None:
        level_sums = matrix.sum(1, dtype=torch.int64) - matrix.shape[1] * zero_point.long()
    else:  # the weight is symmetric
        level_sums = weight.total.to(torch.int64)
    return matrix, weight.scale.contiguous(), zero_point, level_sums


def _output_size(sizes: Sequence[int], kernel_size: Sequence[int], convolution: _Conv) -> list[int]:
    tuples = zip(sizes, kernel_size, *convolution[:3], strict=True)
    return [window_count(n, k, s, sum(p), d) for n, k, s, p, d in tuples]


@functools.cache
def _library_is_exact(dims: int) -> bool:
    """Returns whether oneDNN adds the largest products exactly: without VNNI it may saturate in 16 bits."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qconv_prepack"):
        return False
    spatial = max(dims, 2)
    if spatial == 3 and not hasattr(torch.ops.onednn, "qconv3d_pointwise"):
        return False
    for channels, groups in ((3, 1), (64, 1), (32, 32)):
        for value, level in ((255, -128), (255, 127), (0, -128)):
            q = torch.full((1, channels, *(5,) * spatial), value, dtype=torch.uint8, device="cpu")
            kernel = torch.full(
                (32, channels // groups, *(3,) * spatial), level, dtype=torch.int8, device="cpu"
            )
            convolution = _Conv((1,) * spatial, ((1, 1),) * spatial, (1,) * spatial, groups)
            function: Any = F.conv2d if spatial == 2 else F.conv3d
            expected = function(q.double() - 128, kernel.double(), padding=1, groups=groups).float()
            if not torch.equal(_by_library(q, 128, kernel, None, convolution), expected):
                return False
    return True
