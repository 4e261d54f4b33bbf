"""The buffers of integer layers: what the tensors of a quantized layer become."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks, functional, packing, reference
from ..config import QUANTIZE, QATConfig, QuantSpec
from ..modules.base import QuantizedLayer
from ..modules.fake_quantize import FakeQuantize
from .base import Grid, Requantization, integer_dtype


@torch.no_grad()
def static_grid(quantizer: FakeQuantize, tensor: Tensor) -> Grid:
    """Returns the grid that a quantizer has in evaluation, in the shape of the blocks of ``tensor``.

    The quantizer stays as it is: a learned range of a weight that was never used is searched each time.
    """
    quantizer = copy.deepcopy(quantizer).eval()
    quantizer._set_mode(QUANTIZE)
    scale, zero_point = quantizer.grid(tensor)
    shape = checks.shape_of_qparams(tensor.shape, quantizer.spec.granularity)
    scale = checks.positive_scale(scale)
    return scale.reshape(shape).clone(), zero_point.reshape(shape).clone()


def grid_of(layer: QuantizedLayer, key: str, weight: Tensor) -> Grid | None:
    """Returns the grid of a layer's input or output; None if there is none or the range is dynamic.

    Args:
        layer: with the quantizers.
        key: the name of the quantizer.
        weight: of the dtype and on the device of the input.
    """
    quantizer = layer._modules.get(key)
    if not isinstance(quantizer, FakeQuantize):
        return None
    return static_grid(quantizer, weight.new_empty(layer._tensors()[key].shape))


def stored_weight(rows: Tensor, spec: QuantSpec | None, grid: Grid | None) -> dict[str, Tensor]:
    """Returns the buffers of a weight; that of ``weight`` as a matrix.

    Args:
        rows: the float weight as a matrix with a row per output channel.
        spec: None leaves it in float.
        grid: None if the range is dynamic.
    """
    if spec is None:
        return {"weight": rows.clone()}
    scale, zero_point = functional.choose_qparams(rows, **spec.arguments) if grid is None else grid
    ends = (spec.quant_min, spec.quant_max)
    integers = functional.quantize(rows, scale, zero_point, *ends, granularity=spec.granularity)
    buffers = stored_integers(integers, zero_point, spec) | {"weight_scale": scale}
    positions = rows.flatten().isnan().nonzero().flatten()
    return buffers | ({"weight_nan": positions} if len(positions) else {})


def stored_integers(integers: Tensor, zero_point: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """Returns a matrix of integers and, if they are affine, their zero points as buffers."""
    integers = integers.to(torch.int32)
    shift = 2 ** (spec.num_bits - 1) if not spec.symmetric and spec.num_bits in (8, 16) else 0
    if packing.values_per_byte(spec.num_bits) > 1:
        weight = packing.pack_rows(integers, spec.num_bits)
    else:
        weight = (integers - shift).to(integer_dtype(spec))
    if spec.symmetric:
        return {"weight": weight}
    return {"weight": weight, "weight_zero_point": (zero_point - shift).to(integer_dtype(spec))}


@torch.no_grad()
def quantized_tensors(layer: Any, to_rows: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], Any]:
    """Returns the buffers of a linear layer or convolution, and its Requantization or None.

    ``weight`` is a matrix.
    """
    config, chain = layer.config, layer._chain
    weight, bias = to_rows(layer.weight.detach()), layer.bias
    compute = checks.compute_dtype(weight.dtype)
    of_weight = layer._modules.get("weight_quantizer")
    weight_grid = None if of_weight is None else static_grid(of_weight, weight)
    buffers: dict[str, Tensor] = {}

    def add(name: str, grid: Grid | None) -> None:
        if grid is not None:
            buffers[f"{name}_scale"], buffers[f"{name}_zero_point"] = grid

    add("input", grid_of(layer, "input_quantizer", weight))
    if chain is not None and chain.acts():
        add("output", static_grid(chain.quantizer, weight.new_empty(())))
        requantization = Requantization(chain.quantizer.spec, chain.activation, bool(chain.readers))
        return buffers | _folded(
            weight, bias, config, buffers["input_scale"], weight_grid, chain
        ), requantization
    add("output", grid_of(layer, "output_quantizer", weight))
    buffers |= stored_weight(weight, config.weight, weight_grid)
    if bias is not None:
        bias = bias.detach().to(compute)
        if config.specs["bias"] is not None:
            bias = functional.fake_quantize(bias, **config.specs["bias"].arguments)
        elif config.has_int32_bias and "input_scale" in buffers:
            bias = reference.int32_bias(bias, buffers["input_scale"], buffers["weight_scale"])
        buffers["bias"] = bias.clone()
    return buffers, None


def _folded(
    weight: Tensor, bias: Tensor | None, config: QATConfig, input_scale: Tensor, grid: Grid | None, chain: Any
) -> dict[str, Tensor]:
    """Returns the buffers of weight and bias of a layer that requantizes, with its BatchNorm."""
    spec = config.weight
    assert spec is not None
    scale, zero_point = functional.choose_qparams(weight, **spec.arguments) if grid is None else grid
    rows = weight.shape[0]
    folded = reference.fold(scale.reshape(-1).expand(rows), input_scale, bias, chain._statistics())
    levels = folded.of_rows(reference.levels(weight, spec, scale, zero_point), torch.float64)
    is_nan = levels.isnan().any(1) | folded.is_nan
    zero_point = zero_point if zero_point.numel() == 1 else zero_point.reshape(-1)
    integers = levels.nan_to_num(0.0) + zero_point.unsqueeze(-1)
    return {
        **stored_integers(integers, zero_point, spec),
        "weight_scale": torch.where(is_nan, torch.nan, folded.scale),
        "bias": folded.b32.nan_to_num(0.0).to(torch.int32),
    }
