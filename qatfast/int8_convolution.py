"""Convolutions of integers: sums that are exact, rounded once to float32.

On the CPU by oneDNN where it is exact; on other devices by an int8 GEMM of the windows of the input (im2col).
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
_WINDOW_BYTES = 2**28  # of the windows that exist at a time


class Int8Weight(NamedTuple):
    """A quantized weight: integers and, for each output channel, the scale and the zero point.

    The integers are int8 if the weight is symmetric, else uint8, or int16 with values of int8.
    The scale is NaN if the channel holds a NaN. ``packed`` keeps what a library makes of the
    integers, or is None if they are used once. ``total`` is the sum of each channel's integers, if known.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    packed: dict[Any, Tensor] | None = None
    total: Tensor | None = None


class Int8Input(NamedTuple):
    """A quantized input: integers (uint8), scale, the zero point of the integers, and where it held a NaN.

    Scale and zero point have one element, or one per sample. ``nan`` is None if there was no NaN.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    nan: Tensor | None


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
    if uses_windows(input):
        nan = input.isnan()
        y = by_windows(Int8Input(q, scale, zero_point, nan), weight, kernel_size, bias, geometry)
        poison = torch.where(nan.any(), torch.nan, 0.0)
        return _channels_last(y) if channels_last else y.contiguous(), q, poison
    poison = input.new_zeros((), dtype=torch.float32)
    if input.numel() and input.amax().isnan():
        poison.fill_(torch.nan)
    integers = Int8Input(q, scale, zero_point, input.isnan() if isnan(poison.item()) else None)
    return product(integers, weight, kernel_size, bias, geometry, channels_last), q, poison


def takes(input: Tensor, geometry: Geometry) -> bool:
    """Returns whether :func:`forward` computes this convolution."""
    if input.dtype == torch.float64:
        return False
    return not uses_windows(input) or (geometry.groups == 1 and input.numel() > 0)


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
    q, scale, zero_point, nan = integers
    ops: Any = kernels.extension
    is_plain = nan is None and scale.dim() == 0 and weight.values.dtype == torch.int8
    if is_plain and is_depthwise(q, weight.values, kernel_size, geometry):
        sizes = (tuple(kernel_size), *geometry[:3])
        floats = None if bias is None else bias.to(torch.float32).contiguous()
        y = ops.int8_conv_depthwise(q, scale, zero_point, weight.values, weight.scale, floats, *sizes)
        return y if channels_last else y.contiguous()
    if is_plain and takes_pointwise(q, weight.values, weight.packed, kernel_size, geometry):
        return pointwise(q, scale, zero_point, (0, 255), weight, bias, channels_last)
    kernel, convolution = _as_plain(weight, kernel_size, geometry)

    def sums_of(way: Any, q: Tensor, zero_point: int, nan: Tensor | None) -> Tensor:
        if geometry.transposed:
            q = _spread(q, geometry.stride, zero_point)
            nan = None if nan is None else _spread(nan, geometry.stride, 0)
        if nan is None:
            return way(q, zero_point, kernel, weight, convolution)
        return _by_floats(q, zero_point, kernel, weight, convolution, nan)

    def result(way: Any) -> tuple[Tensor, float]:
        points: Any = zero_point.tolist()
        if scale.dim() == 0:
            sums = sums_of(way, q, points, nan)
        elif points:
            nans: Any = (None,) * len(points) if nan is None else nan.split(1)
            samples = zip(q.split(1), points, nans, strict=True)
            sums = torch.cat([sums_of(way, *sample) for sample in samples])
        else:
            sums = sums_of(way, q, 0, nan)
        return _scaled(sums, scale, weight.scale, bias)

    y, largest = result(_sums)
    if largest >= FLOAT_LIMIT:
        y, _ = result(_by_floats)
    return _channels_last(y) if channels_last else y.contiguous()


def takes_pointwise(
    input: Tensor,
    weight: Tensor,
    packed: dict[Any, Tensor] | None,
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
    if packed is None and input.numel() <= 8 * weight.numel():  # as in _packing_dominates
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
    return y if channels_last else y.contiguous()


def packed_pointwise(weight: Tensor, packed: dict[Any, Tensor] | None) -> Tensor:
    """Returns the weight as the kernels of a pointwise convolution take it."""
    kept = None if packed is None else packed.get("pointwise")
    if kept is None:
        ops: Any = kernels.extension
        kept = ops.int8_conv_pointwise_weight(weight.flatten(1).contiguous())
        if packed is not None:
            packed["pointwise"] = kept
    return kept


def exact_sums(
    q: Tensor,
    zero_point: int,
    weight: Int8Weight,
    kernel_size: Sequence[int],
    geometry: Geometry,
    reach: int | None,
) -> Tensor | None:
    """Returns the sums of a convolution in float32, or None if it does not hold them or no library computes them.

    Args:
        q: uint8, the integers of the input.
        zero_point: of ``q``.
        weight: symmetric.
        kernel_size: of the layer.
        geometry: its Geometry.
        reach: which no sum exceeds, or None.
    """
    kernel, convolution = _as_plain(weight, kernel_size, geometry)
    q = _spread(q, geometry.stride, zero_point) if geometry.transposed else q
    sums = _sums_by_library(q, zero_point, kernel, weight, convolution)
    most = prod(kernel.shape[1:]) * 255 * 128
    if sums is None or min(most, most if reach is None else reach) < FLOAT_LIMIT:
        return sums
    return sums if max(-sums.amin(), sums.amax()) < FLOAT_LIMIT else None


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
    """Returns whether each channel of an image is its own group, with sums below 2^24."""
    if geometry.transposed or q.dim() != 4 or not geometry.groups == q.shape[1] == weight.shape[0]:
        return False
    extension: Any = kernels.extension
    return 0 < prod(kernel_size) <= extension.most_depthwise_taps


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


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


def _pads(convolution: _Conv) -> list[int]:
    """Returns the padding as F.pad takes it."""
    return [n for pair in reversed(convolution.padding) for n in pair]


def _by_floats(
    q: Tensor,
    zero_point: int,
    kernel: Tensor,
    weight: Int8Weight,
    convolution: _Conv,
    nan: Tensor | None = None,
) -> Tensor:
    """The sums by a product of float64, which is exact; slow."""
    levels = q.double() - zero_point
    if nan is not None:
        levels = levels.masked_fill(nan, torch.nan)
    column = weight.zero_point.reshape((-1,) + (1,) * (kernel.dim() - 1))
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[q.dim() - 3]
    stride, _, dilation, groups = convolution
    padded = F.pad(levels, _pads(convolution))
    sums = function(padded, kernel.double() - column, None, stride, 0, dilation, groups)
    return (sums + 0.0).float()


def _sums(q: Tensor, zero_point: int, kernel: Tensor, weight: Int8Weight, convolution: _Conv) -> Tensor:
    """Returns ``sum((q - zero_point) * (kernel - weight.zero_point))``, exact where it is below 2^24."""
    sums = _sums_by_library(q, zero_point, kernel, weight, convolution)
    return _by_floats(q, zero_point, kernel, weight, convolution) if sums is None else sums


def _sums_by_library(
    q: Tensor, zero_point: int, kernel: Tensor, weight: Int8Weight, convolution: _Conv
) -> Tensor | None:
    """The same; None if no library computes them."""
    reach = prod(kernel.shape[1:]) * 255 * 128  # of the sums, also before the zero point is subtracted
    if kernel.dtype != torch.int8 or q.numel() == 0 or kernel.numel() == 0 or reach >= _INT_LIMIT:
        return None
    if _packing_dominates(q, kernel, weight, convolution) and _int_mm_is_exact():
        return _by_matrix(q, zero_point, kernel, convolution, weight.total)
    if not _library_is_exact(q.dim() - 2):
        return None
    return _by_library(q, zero_point, kernel, weight.packed, convolution)


def _packing_dominates(q: Tensor, kernel: Tensor, weight: Int8Weight, convolution: _Conv) -> bool:
    """Whether oneDNN would take longer to pack the weight than the matrix of windows takes to fill."""
    if convolution.groups != 1 or weight.packed is not None:
        return False
    outputs = q.shape[0] * prod(_output_size(q.shape[2:], kernel.shape[2:], convolution))
    return outputs <= 8 * kernel.shape[0]


def _by_library(
    q: Tensor, zero_point: int, kernel: Tensor, packed: dict[Any, Tensor] | None, convolution: _Conv
) -> Tensor:
    """By oneDNN, whose sums are exact in 32 bits; scales of 1 leave them as they are."""
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
    """Returns the result in the dtype of the scales by the int8 GEMM of linear layers.

    Nothing waits for the device.
    """
    kernel, convolution = _as_plain(weight, kernel_size, geometry)
    columns = _int8_rows(kernel.movedim(1, -1).flatten(1), weight)
    bias = None if bias is None else bias.to(weight.scale.dtype).contiguous()
    q, scale, zero_point, nan = integers
    samples = q.shape[0]
    scale, zero_point = (x.reshape(-1).expand(samples) for x in (scale, zero_point))
    per_sample = kernel[0].numel() * prod(geometry.output_size(q.shape[2:], kernel_size))
    step = max(1, _WINDOW_BYTES // max(1, per_sample))

    def part(x: Any, begin: int) -> Any:
        return None if x is None else x[begin : begin + step]

    parts = [
        _product_of_windows(
            Int8Input(*(part(x, begin) for x in (q, scale, zero_point, nan))),
            kernel, columns, bias, geometry, convolution,
        )
        for begin in range(0, samples, step)
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _product_of_windows(
    integers: Int8Input,
    kernel: Tensor,
    columns: list[Tensor],
    bias: Tensor | None,
    geometry: Geometry,
    convolution: _Conv,
) -> Tensor:
    q, scale, zero_point, nan = integers
    # An integer XOR the zero point is 0 where it is the zero point, with which the input is padded.
    fill = zero_point.to(torch.uint8).view(torch.int8).reshape(-1, *(1,) * (q.dim() - 1))

    def windows_of(x: Tensor) -> Tensor:
        if geometry.transposed:
            x = _spread(x, geometry.stride, 0)
        return F.pad(x.movedim(1, -1), [0, 0, *_pads(convolution)]).contiguous()

    last = windows_of(q.view(torch.int8) ^ fill) ^ (fill.movedim(1, -1) ^ -_SHIFT)
    windows, sizes = _windows(last, kernel, convolution)
    positions = prod(sizes)

    def of_rows(x: Tensor) -> Tensor:
        return x.unsqueeze(1).expand(-1, positions).reshape(-1).contiguous()

    point = of_rows(zero_point - _SHIFT)
    # A symmetric weight does not read the sums of the input's levels.
    level_sums = torch.zeros_like(point, dtype=torch.int64)
    if kernel.dtype != torch.int8:
        level_sums = windows.sum(1, dtype=torch.int64) - windows.shape[1] * point.long()
    row_scale = of_rows(scale)
    if nan is not None:
        nans, _ = _windows(windows_of(nan.any(1, keepdim=True).to(torch.int8)), kernel[:1, :1], convolution)
        row_scale = torch.where(nans.any(1), torch.nan, row_scale)
    y = torch.ops.qatfast.int8_product([windows, row_scale, point, level_sums], columns, bias)
    return y.view(q.shape[0], *sizes, -1).movedim(-1, 1)


def int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """Returns ``x @ weight.T`` of int8 matrices in int32, on the CPU."""
    if weight.shape[1] == 1:  # oneDNN misreads the strides
        return x.int() * weight.t()
    # It also misreads other strides of a single row than those that view() gives.
    return torch._int_mm(x.view(x.shape), weight.view(weight.shape).t())


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


def _int8_rows(matrix: Tensor, weight: Int8Weight) -> list[Tensor]:
    """Returns the values (int8), scales, zero points and sums of levels of the rows of a weight."""
    zero_point = weight.zero_point
    if matrix.dtype == torch.uint8:
        matrix, zero_point = matrix.view(torch.int8) ^ -_SHIFT, zero_point - _SHIFT
    matrix, zero_point = matrix.to(torch.int8).contiguous(), zero_point.to(torch.int32).contiguous()
    level_sums = matrix.sum(1, dtype=torch.int64) - matrix.shape[1] * zero_point.long()
    return [matrix, weight.scale.contiguous(), zero_point, level_sums]


def _output_size(sizes: Sequence[int], kernel_size: Sequence[int], convolution: _Conv) -> list[int]:
    tuples = zip(sizes, kernel_size, *convolution[:3], strict=True)
    return [window_count(n, k, s, sum(p), d) for n, k, s, p, d in tuples]


def _windows(last: Tensor, kernel: Tensor, convolution: _Conv) -> tuple[Tensor, list[int]]:
    """Returns the windows of a padded input (batch, ..., channels) as rows, and their number per dimension."""
    padded = convolution._replace(padding=((0, 0),) * len(convolution.stride))
    sizes = _output_size(last.shape[1:-1], kernel.shape[2:], padded)
    strides = last.stride()
    steps = [s * n for s, n in zip(convolution.stride, strides[1:-1], strict=True)]
    inner = [d * n for d, n in zip(convolution.dilation, strides[1:-1], strict=True)]
    shape = (last.shape[0], *sizes, *kernel.shape[2:], last.shape[-1])
    windows = last.as_strided(shape, (strides[0], *steps, *inner, strides[-1]))
    return windows.reshape(last.shape[0] * prod(sizes), -1).contiguous(), sizes  # a view may overlap


def _by_matrix(
    q: Tensor, zero_point: int, kernel: Tensor, convolution: _Conv, total: Tensor | None = None
) -> Tensor:
    """By a matrix product of all windows of the input (im2col)."""
    dims = q.dim() - 2
    last = q.movedim(1, -1).contiguous()
    signed = last.view(torch.int8) ^ -_SHIFT  # less 128
    zero_point -= _SHIFT
    if any(_pads(convolution)):
        signed = F.pad(signed, [0, 0, *_pads(convolution)], value=zero_point)
    windows, sizes = _windows(signed, kernel, convolution)
    matrix = kernel.movedim(1, -1).reshape(kernel.shape[0], -1)
    sums = int_mm(windows, matrix)
    total = matrix.sum(1, dtype=torch.int32) if total is None else total
    sums -= (zero_point * total).to(torch.int32)
    return sums.float().view(q.shape[0], *sizes, -1).movedim(-1, 1) if dims else sums.float()


@functools.cache
def _library_is_exact(dims: int) -> bool:
    """Whether oneDNN adds the largest products exactly: without VNNI it may saturate in 16 bits."""
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
            zeros = torch.zeros(32, dtype=torch.int32, device="cpu")
            expected = _by_floats(q, 128, kernel, Int8Weight(kernel, zeros, zeros), convolution)
            if not torch.equal(_by_library(q, 128, kernel, None, convolution), expected):
                return False
    return True


@functools.cache
def _int_mm_is_exact() -> bool:
    """The same for the product of matrices."""
    for rows, features in ((1, 64), (33, 200), (33, 4099)):
        for left, right in ((-128, -128), (-128, 127), (127, 127)):
            x = torch.full((rows, features), left, dtype=torch.int8, device="cpu")
            weight = torch.full((48, features), right, dtype=torch.int8, device="cpu")
            if not bool((torch._int_mm(x, weight.t()) == left * right * features).all()):
                return False
    return True
