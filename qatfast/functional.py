"""The public functions: they check arguments and call the kernels or the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _fake, arguments, checks, kernels, reference
from .config import Granularity, PerTensor, QATConfig, checked_granularity

__all__ = [
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "fake_quantize_affine",
    "fake_quantize_learned",
    "qat_linear",
    "quantize",
    "search_qparams",
]

_PER_TENSOR = PerTensor()
_DEFAULT_CONFIG = QATConfig()


def fake_quantize(
    input: Tensor,
    num_bits: int = 8,
    *,
    symmetric: bool = False,
    granularity: Granularity = _PER_TENSOR,
    narrow_range: bool = True,
) -> Tensor:
    """Rounds ``input`` to an integer grid over its dynamic range and converts it back to floats.

    For the finite values ``x`` of each block::

        lo, hi     = min(x.min(), 0), max(x.max(), 0)
        scale      = max((hi - lo) / (quant_max - quant_min), eps)               affine
                     max(lo / quant_min, hi / quant_max, eps)                    symmetric
        zero_point = clamp(quant_min - round(lo / scale), quant_min, quant_max)
        y          = (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale

    ``round`` rounds half to even. NaN elements stay NaN; infinities saturate to the ends of the
    range. float16 and bfloat16 inputs are computed in float32 and rounded once at the end. The
    gradient passes unchanged.

    Args:
        input: a float32, float64, float16 or bfloat16 tensor; any shape and strides, may be empty.
        num_bits: number of bits, 2 to 16.
        symmetric: if False, the grid is ``[0, 2^b - 1]`` with a zero point; if True,
            ``[-(2^(b-1) - 1), 2^(b-1) - 1]`` with zero point 0.
        granularity: which elements share a scale: ``PerTensor()``, ``PerChannel(axis)``,
            ``PerGroup(group_size)`` or ``PerToken()``.
        narrow_range: if False, a symmetric grid is ``[-2^(b-1), 2^(b-1) - 1]``. It has no effect on
            an affine grid.

    Returns:
        A new tensor with the shape, dtype, device and memory format of ``input``.

    Raises:
        TypeError: ``input`` is not a dense floating-point tensor, ``num_bits`` is not an int, or
            another argument has the wrong type.
        ValueError: ``num_bits`` is not from 2 to 16, or ``granularity`` does not divide ``input``.

    Source:
        Jacob et al. 2018 (arXiv 1712.05877), equation 12; STE: Bengio et al. 2013
        (arXiv 1308.3432).

    Example:
        >>> fake_quantize(torch.tensor([-1.0, 0.0, 0.3, 2.0]), num_bits=2)
        tensor([-1.,  0.,  0.,  2.])
    """
    num_bits = arguments.num_bits("fake_quantize", num_bits)
    arguments.boolean("fake_quantize", "symmetric", symmetric)
    arguments.boolean("fake_quantize", "narrow_range", narrow_range)
    checked_granularity("fake_quantize", granularity)
    ops = kernels.route(input)
    if ops is not None:
        return ops.fake_quantize(input, num_bits, symmetric, granularity.code, narrow_range)
    return reference.fake_quantize(
        input, num_bits, symmetric=symmetric, granularity=granularity, narrow_range=narrow_range
    )


def fake_quantize_affine(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    *,
    granularity: Granularity = _PER_TENSOR,
) -> Tensor:
    """Rounds ``input`` to the integer grid of a static range and converts it back to floats.

    ::

        y = (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale

    The gradient passes where ``quant_min <= round(x / scale) + zero_point <= quant_max`` and is
    zero elsewhere. Backward needs a mask of one bit per element. ``scale`` and ``zero_point`` get
    no gradient.

    Args:
        input: a float32, float64, float16 or bfloat16 tensor; any shape and strides, may be empty.
        scale: the interval, positive and finite: a tensor, or a number if the granularity is per
            tensor. A tensor is float32 (float64 for float64 input) and has one element per block:
            shape ``()`` per tensor, ``(C,)`` per channel, the leading shape per token, the leading
            shape plus ``(groups,)`` per group; reduced dimensions may be kept as size 1.
        zero_point: from ``quant_min`` to ``quant_max``: an int32 tensor with the shape of ``scale``
            (other integer dtypes are converted), or an int if the granularity is per tensor.
        quant_min: at least -32768.
        quant_max: greater than ``quant_min``, at most 65535, and at most ``quant_min + 65535``.
        granularity: which elements share a scale.

    Returns:
        A new tensor with the shape, dtype, device and memory format of ``input``.

    Raises:
        TypeError: a tensor has the wrong dtype or layout, or another argument has the wrong type.
        ValueError: a shape or a range is wrong; a value is wrong (checked on the CPU only, because
            reading it would make another device wait); or ``scale`` requires grad in grad mode.
        RuntimeError: ``scale`` or ``zero_point`` is on another device.

    Source:
        Jacob et al. 2018 (arXiv 1712.05877), equation 1. Like
        ``torch.fake_quantize_per_tensor_affine`` and ``torch.fake_quantize_per_channel_affine``,
        but with IEEE division and rounding before the zero point is added, as in ONNX.

    Example:
        >>> fake_quantize_affine(torch.tensor([-9.0, 0.3, 9.0]), 0.5, 0, -8, 7)
        tensor([-4.0000,  0.5000,  3.5000])
    """
    quant_min, quant_max = checks.quant_range("fake_quantize_affine", quant_min, quant_max)
    scale, zero_point = checks.static_range(
        "fake_quantize_affine", input, scale, zero_point, quant_min, quant_max, granularity
    )
    ops = kernels.route(input, scale, zero_point)
    if ops is not None:
        return ops.fake_quantize_affine(input, scale, zero_point, quant_min, quant_max, granularity.code)
    return reference.fake_quantize_affine(
        input, scale, zero_point, quant_min, quant_max, granularity=granularity
    )


def choose_qparams(
    input: Tensor,
    num_bits: int = 8,
    *,
    symmetric: bool = False,
    granularity: Granularity = _PER_TENSOR,
    narrow_range: bool = True,
) -> tuple[Tensor, Tensor]:
    """Returns the scale and the zero point that ``fake_quantize`` uses for ``input``.

    For the finite values ``x`` of each block::

        lo, hi     = min(x.min(), 0), max(x.max(), 0)
        scale      = max((hi - lo) / (quant_max - quant_min), eps)               affine
                     max(lo / quant_min, hi / quant_max, eps)                    symmetric
        zero_point = clamp(quant_min - round(lo / scale), quant_min, quant_max)

    ``eps`` is the smallest normal float32 (float64 for float64 input). A block that is empty or has
    no finite values gets the scale ``eps`` and the zero point of ``lo = hi = 0``.

    Args:
        input: a float32, float64, float16 or bfloat16 tensor; any shape and strides, may be empty.
        num_bits: number of bits, 2 to 16.
        symmetric: see :func:`fake_quantize`.
        granularity: which elements share a scale.
        narrow_range: see :func:`fake_quantize`.

    Returns:
        ``(scale, zero_point)``: a float32 (float64 for float64 input) and an int32 tensor with one
        element per block: shape ``()`` per tensor, ``(C,)`` per channel, the leading shape per
        token, the leading shape plus ``(groups,)`` per group. Neither requires grad.

    Raises:
        TypeError: ``input`` is not a dense floating-point tensor, ``num_bits`` is not an int, or
            another argument has the wrong type.
        ValueError: ``num_bits`` is not from 2 to 16, or ``granularity`` does not divide ``input``.

    Source:
        Jacob et al. 2018 (arXiv 1712.05877), section 3.

    Example:
        >>> choose_qparams(torch.tensor([-1.0, 0.0, 2.0]), num_bits=2)
        (tensor(1.), tensor(1, dtype=torch.int32))
    """
    num_bits = arguments.num_bits("choose_qparams", num_bits)
    arguments.boolean("choose_qparams", "symmetric", symmetric)
    arguments.boolean("choose_qparams", "narrow_range", narrow_range)
    checked_granularity("choose_qparams", granularity)
    ops = kernels.route(input)
    if ops is not None:
        return ops.choose_qparams(input, num_bits, symmetric, granularity.code, narrow_range)
    return reference.choose_qparams(
        input, num_bits, symmetric=symmetric, granularity=granularity, narrow_range=narrow_range
    )


def search_qparams(
    input: Tensor,
    num_bits: int = 8,
    *,
    symmetric: bool = False,
    granularity: Granularity = _PER_TENSOR,
    narrow_range: bool = True,
) -> tuple[Tensor, Tensor]:
    """Returns the scale and zero point with the least squared error among those of 80 shrunk ranges.

    For each block, the ranges are ``(lo * f, hi * f)`` for ``f = i / 80``, ``i = 1 ... 80``, with ``lo`` and ``hi`` as
    in :func:`choose_qparams`. The error is the sum of ``(y - x)^2`` in float64 over the finite values, in an order that
    depends on the block's size only. If errors are equal, the largest ``f`` wins.

    Args:
        input: float32, float64, float16 or bfloat16; any shape and strides, empty too.
        num_bits: 2 to 16.
        symmetric: as in :func:`fake_quantize`.
        granularity: which elements share a scale.
        narrow_range: as in :func:`fake_quantize`.

    Returns:
        ``(scale, zero_point)`` as :func:`choose_qparams` returns them.

    Raises:
        TypeError: ``input`` is no dense floating tensor; ``num_bits`` is no int; another argument has a wrong type.
        ValueError: ``num_bits`` is not from 2 to 16; ``granularity`` does not divide ``input``.

    Source:
        Nagel et al. 2021 (arXiv 2106.08295), section 2.2.

    Example:
        >>> search_qparams(torch.tensor([-1.0, -0.9, 0.1, 0.9, 1.4]), num_bits=2)
        (tensor(0.8000), tensor(1, dtype=torch.int32))
    """
    num_bits = arguments.num_bits("search_qparams", num_bits)
    arguments.boolean("search_qparams", "symmetric", symmetric)
    arguments.boolean("search_qparams", "narrow_range", narrow_range)
    checked_granularity("search_qparams", granularity)
    ops = kernels.route(input)
    if ops is not None:
        return ops.search_qparams(input, num_bits, symmetric, granularity.code, narrow_range)
    return reference.search_qparams(
        input, num_bits, symmetric=symmetric, granularity=granularity, narrow_range=narrow_range
    )


def fake_quantize_learned(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    *,
    granularity: Granularity = _PER_TENSOR,
) -> Tensor:
    """Rounds ``input`` to a grid whose scale is trained (LSQ) and back to floats.

    With ``s = max(|scale|, eps)``, ``v = x / s``, n the elements of a block, and
    ``g = 1 / sqrt(n * max(quant_max - zero_point, 1))``::

        y      = (clamp(round(v) + zero_point, quant_min, quant_max) - zero_point) * s
        dx     = dy where quant_min <= round(v) + zero_point <= quant_max, else 0
        dscale = sign(scale) * g * sum(dy * t)
        t      = round(v) - v inside, quant_min - zero_point below, quant_max - zero_point above, 0 if x is NaN

    The products are float32 (float64 for float64 input). The sum is float64, in an order that depends on the block's
    size only, and is rounded once. Only ``input`` is kept for backward. There are no second derivatives.

    Args:
        input: float32, float64, float16 or bfloat16; any shape and strides, empty too.
        scale: finite; float32 (float64 for float64 input), shaped as in :func:`fake_quantize_affine`. It gets a
            gradient. Its sign does not change the result.
        zero_point: as in :func:`fake_quantize_affine`. It gets no gradient.
        quant_min: -32768 or more.
        quant_max: greater than ``quant_min``, at most 65535, and at most ``quant_min + 65535``.
        granularity: which elements share a scale.

    Returns:
        A new tensor like ``input``: shape, dtype, device and memory format.

    Raises:
        TypeError: a tensor has a wrong dtype or layout; another argument has a wrong type.
        ValueError: a shape, a range or (on the CPU, where reading them is free) a value is wrong.
        RuntimeError: ``scale`` or ``zero_point`` is on another device.

    Source:
        Esser et al. 2020 (arXiv 1902.08153).

    Example:
        >>> scale = torch.tensor(0.5, requires_grad=True)
        >>> y = fake_quantize_learned(torch.tensor([-2.4, 0.2, 5.0]), scale, 0, -4, 3)
        >>> y.sum().backward()
        >>> y.detach(), scale.grad
        (tensor([-2.0000,  0.0000,  1.5000]), tensor(-0.4667))
    """
    quant_min, quant_max = checks.quant_range("fake_quantize_learned", quant_min, quant_max)
    checked_granularity("fake_quantize_learned", granularity)
    if isinstance(scale, Tensor) and not isinstance(zero_point, Tensor):
        zero_point = checks.filled_zero_point("fake_quantize_learned", scale, zero_point)
    ops = kernels.route(input, scale, zero_point)
    if ops is not None:
        return ops.fake_quantize_learned(input, scale, zero_point, quant_min, quant_max, granularity.code)
    return reference.fake_quantize_learned(
        input, scale, zero_point, quant_min, quant_max, granularity=granularity
    )


def quantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    *,
    granularity: Granularity = _PER_TENSOR,
) -> Tensor:
    """Quantizes ``input`` to the integers of a static range.

    ::

        q = clamp(round(x / scale) + zero_point, quant_min, quant_max)

    NaN becomes ``zero_point``.

    Args:
        input: a float32, float64, float16 or bfloat16 tensor; any shape and strides, may be empty.
        scale: see :func:`fake_quantize_affine`.
        zero_point: see :func:`fake_quantize_affine`.
        quant_min: at least -32768.
        quant_max: greater than ``quant_min`` and at most 65535.
        granularity: which elements share a scale.

    Returns:
        A uint8 or uint16 tensor if ``quant_min >= 0``, otherwise an int8 or int16 tensor: the
        narrowest dtype that holds ``quant_min`` and ``quant_max``.

    Raises:
        TypeError: a tensor has the wrong dtype or layout, or another argument has the wrong type.
        ValueError: a shape, a range or (on the CPU) a value is wrong, or no 8-bit or 16-bit integer
            dtype holds ``quant_min`` and ``quant_max``.
        RuntimeError: ``scale`` or ``zero_point`` is on another device.

    Source:
        ONNX QuantizeLinear; Jacob et al. 2018 (arXiv 1712.05877), equation 1.

    Example:
        >>> quantize(torch.tensor([-9.0, 0.3, 9.0]), 0.5, 0, -8, 7)
        tensor([-8,  1,  7], dtype=torch.int8)
    """
    quant_min, quant_max = checks.quant_range("quantize", quant_min, quant_max)
    scale, zero_point = checks.static_range(
        "quantize", input, scale, zero_point, quant_min, quant_max, granularity
    )
    ops = kernels.route(input, scale, zero_point)
    if ops is not None:
        return ops.quantize(input, scale, zero_point, quant_min, quant_max, granularity.code)
    return reference.quantize(input, scale, zero_point, quant_min, quant_max, granularity=granularity)


def dequantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    *,
    granularity: Granularity = _PER_TENSOR,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Converts quantized integers back to floats.

    ::

        y = (q - zero_point) * scale

    The result is computed in float32 (float64 for ``dtype=torch.float64``) and rounded once to
    ``dtype``.

    Args:
        input: an int8, uint8, int16 or uint16 tensor; any shape and strides, may be empty.
        scale: see :func:`fake_quantize_affine`; a tensor is float32 (float64 for
            ``dtype=torch.float64``).
        zero_point: see :func:`fake_quantize_affine`; from -32768 to 65535.
        granularity: which elements share a scale.
        dtype: dtype of the result: float32, float64, float16 or bfloat16.

    Returns:
        A tensor of ``dtype`` with the shape and memory format of ``input``.

    Raises:
        TypeError: a tensor has the wrong dtype or layout, or another argument has the wrong type.
        ValueError: a shape or (on the CPU) a value is wrong, or ``scale`` requires grad in grad
            mode.
        RuntimeError: ``scale`` or ``zero_point`` is on another device.

    Source:
        ONNX DequantizeLinear; Jacob et al. 2018 (arXiv 1712.05877), equation 1.

    Example:
        >>> dequantize(torch.tensor([-8, 1, 7], dtype=torch.int8), 0.5, 0)
        tensor([-4.0000,  0.5000,  3.5000])
    """
    if dtype not in checks.FLOAT_DTYPES:
        raise TypeError(
            f"dequantize: expected dtype to be float32, float64, float16 or bfloat16, got {dtype}"
        )
    scale, zero_point = checks.static_range(
        "dequantize", input, scale, zero_point, -32768, 65535, granularity, dtype
    )
    ops = kernels.route(input, scale, zero_point)
    if ops is not None:
        return ops.dequantize(input, scale, zero_point, granularity.code, dtype)
    return reference.dequantize(input, scale, zero_point, granularity=granularity, dtype=dtype)


def qat_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, config: QATConfig = _DEFAULT_CONFIG
) -> Tensor:
    """Applies a linear layer to fake-quantized tensors, as a single autograd node.

    ::

        x_hat, w_hat, b_hat = fake_quantize(input), fake_quantize(weight), fake_quantize(bias)
        y = fake_quantize(F.linear(x_hat, w_hat, b_hat))

    ``config`` gives the arguments of each ``fake_quantize``, or leaves it out. If
    ``config.uses_int8_gemm(in_features)`` (input quantized per tensor or per token, weight per
    tensor or per output channel, both to at most 8 bits), the layer runs as an int8 GEMM, with the
    same bits on every device::

        y = sum((q_x - zero_point_x) * (q_w - zero_point_w)) * (scale_x * scale_w) + b_hat

    The sum over in_features is exact and is rounded once to float32 (float64 for float64 input).
    The output's quantizer is applied next; the result is then rounded once to its dtype. A NaN in a
    row of the input makes that row of the output NaN; a NaN in a row of the weight, that column.

    Gradients, also of higher order and in forward mode, are those of the float product with the
    straight-through estimator: ``dx = dy @ w_hat``, ``dw = dy.T @ x_hat``, ``db = dy.sum(0)``. The
    layer saves the input, the weight and the fake-quantized weight for backward; as an int8 GEMM,
    it saves the quantized input and the weight. Under ``torch.autocast`` the quantizers take the
    tensors in their own dtype; their results are cast for the product.

    Args:
        input: a float32, float64, float16 or bfloat16 tensor of shape ``(..., in_features)``.
        weight: a tensor of shape ``(out_features, in_features)`` with the dtype of ``input`` (any
            floating dtype under autocast).
        bias: a tensor of shape ``(out_features,)`` with the dtype of ``input`` (any floating dtype
            under autocast), or None.
        config: the specs of input, weight, bias and output, with the ranges ``Dynamic()`` or
            ``Fixed(lo, hi)``. QATLinear takes the others.

    Returns:
        A tensor of shape ``(..., out_features)`` with the dtype of the product.

    Raises:
        TypeError: a tensor has the wrong dtype or layout, or ``config`` is not a QATConfig.
        ValueError: a shape is wrong, ``config`` does not divide a tensor, or it has a range
            that a module keeps.
        RuntimeError: the tensors are on different devices.

    Source:
        Jacob et al. 2018 (arXiv 1712.05877), section 3; STE: Bengio et al. 2013 (arXiv 1308.3432).

    Example:
        >>> qat_linear(torch.ones(2, 3), torch.eye(3)).shape
        torch.Size([2, 3])
    """
    if not isinstance(config, QATConfig):
        raise TypeError(f"qat_linear: expected config to be a QATConfig, got {config!r}")
    if not config.is_dynamic:
        from . import ranges  # which imports this module

        return ranges.qat_linear_fixed(input, weight, bias, config)
    ops = kernels.route(input, weight) if bias is None else kernels.route(input, weight, bias)
    if ops is not None:
        return ops.qat_linear(input, weight, bias, config.codes)
    return reference.qat_linear(input, weight, bias, config=config)


if kernels.extension is not None:
    _fake.register(__all__)
