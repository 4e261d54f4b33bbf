"""Model files: float weights as torch.save writes them, and quantized weights as packed integers."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qatfast import (
    FakeQuantize,
    PerChannel,
    PerTensor,
    QuantSpec,
    choose_qparams,
    dequantize,
    quantize,
)
from qatfast.checks import positive_scale
from qatfast.modules.base import QuantizedLayer
from qatfast.packing import pack, unpack

from .ptq import FixedFakeQuantize, weight_qparams


def calculate_model_size(
    model: nn.Module, num_bits: int | None = None, *, path: str | Path | None = None
) -> int:
    """Writes a file that holds the model and returns its size.

    Args:
        model: A float model.
        num_bits: Bits of its parameters as packed integers, 2 to 16, see :func:`save_quantized`. None means its float
            ``state_dict``.
        path: Path of the file. None means a temporary file.

    Returns:
        Number of bytes of the file.

    Raises:
        OSError: The file cannot be written.
        ValueError: ``num_bits`` is not from 2 to 16.
    """
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            return calculate_model_size(model, num_bits, path=Path(folder, "model.pt"))
    if num_bits is None:
        save_float(model, path)
    else:
        save_quantized(model, num_bits, path)
    return Path(path).stat().st_size


def save_float(model: nn.Module, path: str | Path) -> None:
    """Writes the ``state_dict`` on the CPU with torch.save.

    Args:
        model: A float model.
        path: Path of the file.
    """
    _write({name: value.cpu() for name, value in model.state_dict().items()}, path)


def save_quantized(
    model: nn.Module, num_bits: int, path: str | Path, *, calibrated: nn.Module | None = None
) -> None:
    """Writes each parameter as packed integers with its scales and zero points.

    The weight and the bias of a quantized layer are stored as its config says, and as float32 if that says float. A
    learned scale is stored as the scale of its tensor, and so is the range of an input. BatchNorm is stored as float32.
    All other parameters have ``num_bits`` bits per tensor, as in :func:`quantize_model_weights`.

    Args:
        model: A model with float parameters, whose ranges are observed.
        num_bits: Bits of the parameters that no config describes, 2 to 16.
        path: Path of the file.
        calibrated: The result of :func:`quantize_model` for the model, whose activation ranges are stored too.

    Raises:
        ValueError: ``num_bits`` is not from 2 to 16.
    """
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)
    }
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    parameters: dict[str, Tensor | dict[str, Any]] = {
        f"{name}.{key}": _stored(value, None)
        for name, norm in norms.items()
        for key, value in norm.state_dict().items()
    }
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        layer, values = layers.get(owner), parameter.detach()
        if owner.endswith("_quantizer"):
            continue  # a learned scale: it is stored with its tensor
        if owner in norms:
            continue
        if layer is None:
            parameters[name] = _stored(values, QuantSpec(num_bits))
        elif kind == "weight" and layer.config.weight is not None:
            parameters[name] = _stored(values, layer.config.weight, weight_qparams(layer))
        else:
            parameters[name] = _stored(values, getattr(layer.config, kind))
    activations = {
        name: (float(scale), int(zero_point))
        for module in (model, calibrated)
        if module is not None
        for name, (scale, zero_point) in _activation_qparams(module).items()
    }
    _write({"num_bits": num_bits, "parameters": parameters, "activations": activations}, path)


@torch.no_grad()
def _activation_qparams(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns scale and zero point of the activations with a stored range."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FixedFakeQuantize):
            found[name] = module.scale, module.zero_point
        elif isinstance(module, FakeQuantize) and name.endswith(("input_quantizer", "output_quantizer")):
            scale, zero_point = copy.deepcopy(module).eval().grid(torch.zeros(1))
            found[name] = positive_scale(scale), zero_point
    return found


def load_quantized(path: str | Path) -> dict[str, Tensor]:
    """Loads the parameters of a file that :func:`save_quantized` has written.

    Args:
        path: Path of the file.

    Returns:
        A ``state_dict`` with the float32 values ``(integer - zero_point) * scale`` of each parameter.
    """
    stored: Mapping[str, Any] = torch.load(path, weights_only=True)
    return {name: _restored(entry) for name, entry in stored["parameters"].items()}


def _stored(
    values: Tensor, spec: QuantSpec | None, qparams: tuple[Tensor, Tensor] | None = None
) -> Tensor | dict[str, Any]:
    """Returns packed integers and the figures that turn them back into values, or a copy of ``values`` without a spec.

    Args:
        values: The parameter.
        spec: How it is quantized.
        qparams: Scale and zero point. None means those of the range of ``values``.

    Raises:
        ValueError: The granularity is neither per tensor nor per channel.
    """
    if spec is None:
        return values.cpu().clone()
    if not isinstance(spec.granularity, PerTensor | PerChannel):
        raise ValueError(f"save_quantized: expected weights per tensor or per channel, got {spec}")
    scale, zero_point = choose_qparams(values, **spec.arguments) if qparams is None else qparams
    integers = quantize(
        values, scale, zero_point, spec.quant_min, spec.quant_max, granularity=spec.granularity
    )
    integers, scale, zero_point = integers.cpu(), scale.detach().cpu(), zero_point.cpu()
    return {
        "packed": pack(integers.int() - spec.quant_min, spec.num_bits),
        "num_bits": spec.num_bits,
        "shape": list(values.shape),
        "axis": spec.granularity.axis if isinstance(spec.granularity, PerChannel) else None,
        # A tensor would be a file of its own inside the file.
        "scale": scale if scale.dim() else float(scale),
        "zero_point": None if spec.symmetric else zero_point if zero_point.dim() else int(zero_point),
    }


def _restored(entry: Tensor | dict[str, Any]) -> Tensor:
    if isinstance(entry, Tensor):
        return entry
    bits, axis, zero_point = entry["num_bits"], entry["axis"], entry["zero_point"]
    integers = unpack(entry["packed"], bits, entry["shape"]).int()
    if zero_point is None:
        integers -= QuantSpec(bits, symmetric=True).quant_max
        zero_point = torch.zeros_like(torch.as_tensor(entry["scale"]), dtype=torch.int32)
    granularity = PerTensor() if axis is None else PerChannel(axis)
    # dequantize takes integers of 8 and 16 bits only.
    narrow = integers.to(torch.int16) if int(integers.min()) < 0 else integers.to(torch.uint16)
    return dequantize(narrow, entry["scale"], zero_point, granularity=granularity)


def _write(content: Mapping[str, Any], path: str | Path) -> None:
    """Saves via memory, because torch.save stores the name of a file once per tensor if it is given a path."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    Path(path).write_bytes(buffer.getvalue())
