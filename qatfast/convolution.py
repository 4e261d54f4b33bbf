"""What quantized convolutions compute: on fake-quantized floats, or as an exact product of integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, functional, int8_convolution, kernels, ranges, reference
from .config import Learned, PerChannel, PerTensor, PerToken, QATConfig, QuantSpec
from .geometry import Geometry, is_channels_last
from .int8_convolution import Int8Input, Int8Weight


def of_batch(spec: QuantSpec | None) -> QuantSpec | None:
    """Returns the spec for a tensor (batch, channels, ...): per token means one scale per sample."""
    if spec is None or not isinstance(spec.granularity, PerToken):
        return spec
    return QuantSpec(spec.num_bits, spec.symmetric, PerChannel(0), spec.range, spec.narrow_range)


def qat_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: QATConfig,
    grids: reference.StaticGrids,
    geometry: Geometry,
    pad: Callable[[Tensor], Tensor],
    kept: Callable[[Callable[[], Any]], Any],
) -> Tensor:
    """Returns the convolution of quantized tensors, before the quantizer of its output.

    ::

        y = conv(x_hat, w_hat, b_hat)

    If ``config.uses_int8_gemm(in_channels / groups * elements of the kernel)``, it is an exact
    product of integers, in the compute dtype::

        y = sum((q_x - zero_point_x) * (q_w - zero_point_w)) * (scale_x * scale_w) + b_hat

    Args:
        input: ``(batch, in_channels, ...)``.
        weight: as the layer of torch.nn has it.
        bias: ``(out_channels,)`` or None.
        config: what is quantized how. Blocks of the weight are those of ``geometry.to_rows``.
        grids: scale and zero point of ``input`` and ``weight`` where their range is not Dynamic.
        geometry: the arguments of the convolution.
        pad: pads a tensor beyond what ``geometry`` does.
        kept: calls a function that quantizes the weight, or returns what it returned for this weight.
    """
    x_spec, w_spec = of_batch(config.input), config.weight
    of_bias = geometry.to_rows(weight) if config.has_int32_bias else weight
    b_hat = ranges.bias_hat(input, of_bias, bias, config, grids)

    def fake_quantized_input() -> Tensor:
        return pad(ranges.fake_quantized("input", input, x_spec, grids))

    def fake_quantized_weight() -> Tensor:
        rows = ranges.fake_quantized("weight", geometry.to_rows(weight), w_spec, grids)
        return geometry.from_rows(rows, weight.shape)

    if not config.uses_int8_gemm(geometry.fan_in(weight)):
        w_hat = weight if w_spec is None else kept(fake_quantized_weight)
        return geometry.convolve(fake_quantized_input(), w_hat, b_hat)
    assert x_spec is not None and w_spec is not None
    tensors = (input, weight) if bias is None else (input, weight, bias)
    x_grid = ranges.grid_of_blocks(input, x_spec, grids.get("input"))
    ops = kernels.route(*tensors)
    if ops is None or not int8_convolution.takes(input) or kernels.is_forward_mode():
        product = geometry.convolve(fake_quantized_input(), fake_quantized_weight(), b_hat)
        rows = geometry.to_rows(weight.detach())
        w_grid = ranges.grid_of_blocks(rows, w_spec, grids.get("weight"))
        x = pad(input.detach())
        value = _exact_result(x, x_spec, x_grid, rows, w_spec, w_grid, b_hat, weight.shape, geometry)
        return reference._straight_through(product.to(value.dtype), value)

    w = kept(lambda: ranges.quantized_weight(geometry.to_rows(weight.detach()), w_spec, grids.get("weight")))
    call: Any = int8_convolution.forward if ops is kernels.extension else traced_forward
    value, q, poison = call(
        pad(input.detach()),
        *x_grid,
        x_spec.quant_min,
        x_spec.quant_max,
        w,
        list(weight.shape[2:]),
        None if b_hat is None else b_hat.detach(),
        geometry,
        is_channels_last(input) or is_channels_last(weight),
    )
    learned = [scale for scale, _ in grids.values()]
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *learned))):
        return value
    x_link = fake_quantized_input() if "input" in grids else pad(input)
    w_link: Any = weight
    of_weight: Any = (None, None, None)  # where the weight itself stands in the graph
    if "weight" in grids:
        scale, zero_point = grids["weight"]
        w_link, of_weight = (
            _Link.apply(fake_quantized_weight()),
            (weight, checks.positive_scale(scale), zero_point),
        )
    return _Gradients.apply(
        _Link.apply(x_link),
        w_link,
        b_hat,
        value,
        q,
        poison,
        *x_grid,
        *of_weight,
        None,
        x_spec,
        w_spec,
        geometry,
    )


def allows_one_pass(config: QATConfig, fan_in: int) -> bool:
    """Returns whether :func:`qat_conv_in_one_pass` computes layers with this config."""
    x_spec, w_spec = config.input, config.weight
    if x_spec is None or w_spec is None or config.has_int32_bias or not config.uses_int8_gemm(fan_in):
        return False
    if not isinstance(x_spec.granularity, PerTensor) or isinstance(x_spec.range, Learned):
        return False
    return w_spec.is_dynamic and w_spec.symmetric


def takes_one_pass(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Returns whether it computes layers with these tensors, if the config allows it."""
    if torch.compiler.is_compiling() or kernels.is_forward_mode() or input.numel() == 0:
        return False
    if input.dtype == torch.float64 or input.dtype != weight.dtype:
        return False
    ops = kernels.route(input, weight) if bias is None else kernels.route(input, weight, bias)
    return ops is not None and ops is kernels.extension


def qat_conv_in_one_pass(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: QATConfig,
    quantize_input: Callable[[Callable[..., tuple[Tensor, ...]]], tuple[Tensor, ...]],
    geometry: Geometry,
    kept: Callable[[Callable[[], Any]], Any],
    grid_of_input: Callable[[], tuple[Tensor, Tensor]] | None,
) -> Tensor:
    """Returns :func:`qat_conv` where one pass over the input observes its range and quantizes it.

    A depthwise convolution is computed in the same pass.

    Args:
        quantize_input: calls its argument with the arguments of the input's grid that int8_conv_input takes.
        grid_of_input: gives scale and zero point of an input that is not observed, or None.
    """
    x_spec, w_spec = config.input, config.weight
    assert x_spec is not None and w_spec is not None
    b_hat = ranges.bias_hat(input, weight, bias, config, {})
    w = kept(lambda: _symmetric_int8_weight(weight.detach(), w_spec, geometry))
    tensors = (input, weight) if bias is None else (input, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    channels_last = is_channels_last(input) or is_channels_last(weight)
    x, kernel_size = input.detach(), tuple(weight.shape[2:])
    floats = None if b_hat is None else b_hat.detach().to(torch.float32)
    if (
        grid_of_input is not None
        and not needs_grad
        and int8_convolution.takes_pointwise(x, w.values, w.packed, kernel_size, geometry)
    ):
        scale, zero_point = grid_of_input()
        *ends, shifted = int8_convolution.unsigned(x_spec.quant_min, x_spec.quant_max, zero_point)
        return int8_convolution.pointwise(x, scale, shifted, ends, w, floats, channels_last)
    needs_mask = needs_grad and input.requires_grad and not x_spec.is_dynamic
    ops: Any = kernels.extension

    def integers(*grid: Any) -> tuple[Tensor, ...]:
        return ops.int8_conv_input(x, *grid, needs_mask)

    def integers_and_result(*grid: Any) -> tuple[Tensor, ...]:
        sizes = (kernel_size, *geometry[:3])
        operands = (w.values, w.scale, None if floats is None else floats.contiguous())
        return ops.int8_conv_depthwise_forward(x, *grid, *operands, *sizes, needs_grad, needs_mask)

    is_fused = int8_convolution.is_depthwise(x, w.values, kernel_size, geometry)
    q, mask, scale, zero_point, shifted, poison, *result = quantize_input(
        integers_and_result if is_fused else integers
    )
    integers_of_x = int8_convolution.with_nans(Int8Input(q, scale, shifted), x, poison)
    if result and integers_of_x.poison is None:
        value = int8_convolution.in_format(result[0], channels_last)
    else:
        if q.dim() == 1:
            q = ranges.int8_conv_input(integers, x_spec, scale, zero_point)[0]
            integers_of_x = integers_of_x._replace(values=q)
        value = int8_convolution.product(integers_of_x, w, kernel_size, floats, geometry, channels_last)
    if not needs_grad:
        return value
    of_weight = (None, None, None)
    nan = integers_of_x.poison
    if nan is not None and x.is_cpu:
        nan = x.isnan()
    return _Gradients.apply(
        _Link.apply(input), weight, b_hat, value, q, nan, scale, zero_point, *of_weight,
        mask if needs_mask else None, x_spec, w_spec, geometry,
    )  # fmt: skip


def _symmetric_int8_weight(weight: Tensor, spec: QuantSpec, geometry: Geometry) -> Int8Weight:
    """Returns a weight with a symmetric dynamic range, in its memory format."""
    ops: Any = kernels.extension
    values, scale, zero_point, total = ops.qat_linear_int8_weight(geometry.memory_rows(weight), spec.code)
    if not geometry.transposed:
        values = geometry.from_memory_rows(values, weight)
    return Int8Weight(values, scale, zero_point, total=total)


def _exact_result(
    x: Tensor,
    x_spec: QuantSpec,
    x_grid: tuple[Tensor, Tensor],
    rows: Tensor,
    w_spec: QuantSpec,
    w_grid: tuple[Tensor, Tensor],
    b_hat: Tensor | None,
    weight_shape: torch.Size,
    geometry: Geometry,
) -> Tensor:
    """The product of integers in plain PyTorch: that of the levels in float64 is exact."""
    kernel = geometry.from_rows(reference.levels(rows, w_spec, *w_grid), weight_shape)
    sums = geometry.convolve(reference.levels(x, x_spec, *x_grid), kernel, None) + 0.0  # never -0.0
    ones = (1,) * (x.dim() - 2)
    scale = x_grid[0].reshape(-1, 1, *ones) * ranges.scale_of_rows(rows, w_grid[0]).reshape(1, -1, *ones)
    y = sums.to(scale.dtype) * scale
    return y if b_hat is None else y + b_hat.detach().to(y.dtype).reshape(1, -1, *ones)


class _Link(torch.autograd.Function):
    """A tensor without memory of its own in the place of ``x`` in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _pointwise_gradients(
    dy: Tensor,
    weight: Tensor,
    w_rows: Tensor,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of input, weight and bias where the convolution is a matrix product.

    The gradient of the input is written to the memory of x_hat, as fresh memory takes as long as half a product.
    ``weight`` gives the shape and the memory format of its gradient.
    """
    ops = torch.ops.qatfast
    dx = dw = db = None
    if needed[1] or needed[2]:
        dx = ops.dequantize(q, scale, zero_point, (0, 0))
        output_mask = [False, *needed[1:]]
        _, dw, db = torch.ops.aten.convolution_backward(
            dy, dx, weight, list(weight.shape[:1]), *geometry, output_mask
        )
    if not needed[0]:
        return None, dw, db
    if dx is None:
        dx = torch.empty_like(q, dtype=scale.dtype)
    rows = dy.movedim(1, -1).reshape(-1, dy.shape[1])
    torch.mm(rows, w_rows, out=dx.movedim(1, -1).view(-1, q.shape[1]))
    return dx if mask is None else ops.int8_conv_mask_(dx, mask, q), dw, db


def _is_float32_depthwise(dy: Tensor, q: Tensor, scale: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Returns whether the gradients are those of int8_conv_depthwise."""
    if not dy.dtype == weight.dtype == scale.dtype == torch.float32:
        return False
    return int8_convolution.is_depthwise(q, weight, weight.shape[2:], geometry)


class _Gradients(torch.autograd.Function):
    """A result ``value`` with the gradients of the convolution of x_hat, w_hat and b_hat.

    ``x`` and ``w`` stand for x_hat and w_hat in the graph. Kept are the integers ``q`` of the input
    and the weight itself (``weight``, or ``w`` if it is None), from which both are made again.
    ``poison`` is NaN if the input holds a NaN, else 0, or marks the NaNs, or is None without one. With
    a ``mask``, ``x`` is the float input, whose gradient passes where the mask is set.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        value: Tensor,
        q: Tensor,
        poison: Tensor | None,
        scale: Tensor,
        zero_point: Tensor,
        weight: Tensor | None,
        w_scale: Tensor | None,
        w_zero_point: Tensor | None,
        mask: Tensor | None,
        x_spec: QuantSpec,
        w_spec: QuantSpec,
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(x, w, q, poison, scale, zero_point, weight, w_scale, w_zero_point, mask)
        ctx.specs, ctx.geometry = (x_spec, w_spec), geometry
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return value.detach()  # unlike a view, it may be written in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, q, poison, scale, zero_point, weight, w_scale, w_zero_point, mask = ctx.saved_tensors
        (x_spec, w_spec), geometry = ctx.specs, ctx.geometry
        *_, shifted = int8_convolution.unsigned(x_spec.quant_min, x_spec.quant_max, zero_point)
        granularity = PerChannel(0) if scale.dim() else PerTensor()
        ops = torch.ops.qatfast  # there are kernels, or this node would not run
        is_plain = (  # nothing else sees the tensors made here
            not torch.compiler.is_compiling() and not torch.is_grad_enabled() and type(dy) is Tensor
        )
        needed = [*ctx.needs_input_grad[:2], ctx.bias is not None and ctx.needs_input_grad[2]]

        def gradients(dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> tuple[Tensor | None, ...]:
            return (
                None if dx is None else dx.to(x.dtype),
                None if dw is None else dw.to(w.dtype),
                db.to(ctx.bias[1]) if needed[2] and db is not None else None,
                *(None,) * 12,
            )

        has_kernel = is_plain and poison is None and w_scale is None and scale.dim() == 0
        is_matrix = has_kernel and is_channels_last(q) and geometry.is_pointwise(w.shape[2:])
        if is_matrix or (has_kernel and _is_float32_depthwise(dy, q, scale, w, geometry)):
            w_rows = functional.fake_quantize(w.detach().flatten(1), **w_spec.arguments)
            if is_matrix:
                dy, w_rows, weight = (tensor.to(scale.dtype) for tensor in (dy, w_rows, w.detach()))
                return gradients(
                    *_pointwise_gradients(dy, weight, w_rows, q, scale, shifted, mask, geometry, needed)
                )
            extension: Any = kernels.extension
            dx, dw, db = extension.int8_conv_depthwise_backward(
                dy, q, scale, shifted, w_rows, mask, tuple(w.shape[2:]), *geometry[:3], needed
            )
            return gradients(dx, None if dw is None else dw.view(w.shape), db)
        x_hat = ops.dequantize(q, scale, shifted, granularity.code)
        if poison is not None:
            x_hat = x_hat.add_(poison) if poison.dim() == 0 else x_hat.masked_fill_(poison, torch.nan)
        weight = w if weight is None else weight
        rows = geometry.memory_rows(weight.detach())
        if w_scale is None:
            arguments = (w_spec.num_bits, w_spec.symmetric, w_spec.granularity.code, w_spec.narrow_range)
            w_rows = ops.fake_quantize(rows, *arguments)
        else:
            ends = (w_spec.quant_min, w_spec.quant_max, w_spec.granularity.code)
            w_rows = ops.fake_quantize_affine(rows, w_scale, w_zero_point, *ends)
        w_hat = geometry.from_memory_rows(w_rows, weight)
        if torch.is_grad_enabled():
            if mask is not None:
                x = ops.fake_quantize_affine_backward(x, mask, q.stride())
            x_hat = reference._straight_through(x.to(x_hat.dtype), x_hat)
            w_hat = reference._straight_through(w, w_hat)
        sizes = None if ctx.bias is None else list(ctx.bias[0])
        dy = dy.to(x_hat.dtype)
        backward: Any = torch.ops.aten.convolution_backward
        if is_plain and needed[0] and needed[1] and weight.dtype == x_hat.dtype:
            dx, _, _ = backward(dy, x_hat, w_hat, sizes, *geometry, [True, False, False])
            del rows, w_rows, w_hat  # the gradient of a large weight is made in the memory of w_hat
            _, dw, db = backward(dy, x_hat, weight.detach(), sizes, *geometry, [False, *needed[1:]])
        else:
            dx, dw, db = backward(dy, x_hat, w_hat.to(x_hat.dtype), sizes, *geometry, needed)
        if dx is not None and mask is not None:
            dx = (
                ops.int8_conv_mask_(dx, mask, q)
                if is_plain
                else ops.fake_quantize_affine_backward(dx, mask, q.stride())
            )
        return gradients(dx, dw, db)


@torch.library.custom_op("qatfast::qat_conv_int8", mutates_args=())
def _operator(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    kernel_size: Sequence[int],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`int8_convolution.forward` as an operator, which tracers take as it is."""
    geometry = Geometry.of_operator(stride, padding, dilation, transposed, output_padding, groups)
    return int8_convolution.forward(
        input, scale, zero_point, quant_min, quant_max, Int8Weight(weight, weight_scale, weight_zero_point),
        kernel_size, bias, geometry, channels_last,
    )  # fmt: skip


@_operator.register_fake
def _(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, kernel_size, channels_last = arguments[4], arguments[7], arguments[-1]
    geometry = Geometry(*arguments[9:15])
    size = geometry.output_size(input.shape[2:], kernel_size)
    y = input.new_empty((input.shape[0], weight.shape[0], *size), dtype=torch.float32)
    return (
        int8_convolution.in_format(y, channels_last),
        torch.empty_like(input, dtype=torch.uint8),
        input.new_empty((), dtype=torch.float32),
    )


def traced_forward(
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
    """:func:`int8_convolution.forward` as an operator."""
    return torch.ops.qatfast.qat_conv_int8(
        input,
        scale,
        zero_point,
        quant_min,
        quant_max,
        *weight[:3],
        list(kernel_size),
        bias,
        *geometry,
        channels_last,
    )
