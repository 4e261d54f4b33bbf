"""Model files: float weights as torch.save writes them, and quantized ones as the integers a device stores."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatfast import PerChannel, PerTensor, QATLinear, QuantSpec, choose_qparams, dequantize, quantize
from qatfast.packing import pack, unpack

from .ptq import FixedFakeQuantize


def calculate_model_size(
    model: nn.Module, num_bits: int | None = None, *, path: str | Path | None = None
) -> int:
    """The bytes of a file that holds the model, counted on a file really written.

    Args:
        model: in float.
        num_bits: None: its float ``state_dict``; 2 to 16: its parameters as packed integers (:func:`save_quantized`).
        path: where to leave the file; None: it is removed again.

    Returns:
        Bytes of the file.

    Raises:
        OSError: the file cannot be written.
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
    """Writes the ``state_dict`` with torch.save, on the CPU.

    Args:
        model: in float.
        path: of the file.
    """
    _write({name: value.cpu() for name, value in model.state_dict().items()}, path)


def save_quantized(
    model: nn.Module, num_bits: int, path: str | Path, *, calibrated: nn.Module | None = None
) -> None:
    """Writes each parameter as packed integers with its scales and zero points.

    A QATLinear's weight and bias are stored as its config says, float ones as float32. Every other parameter has
    ``num_bits`` bits per tensor, as in :func:`quantize_model_weights`.

    Args:
        model: with its parameters in float.
        num_bits: 2 to 16, of the parameters that no config describes.
        path: of the file.
        calibrated: the same model from :func:`quantize_model`; its activation ranges are stored too.

    Raises:
        ValueError: ``num_bits`` is not from 2 to 16.
    """
    specs = {
        f"{name}.{kind}" if name else kind: getattr(module.config, kind)
        for name, module in model.named_modules()
        if isinstance(module, QATLinear)
        for kind in ("weight", "bias")
    }
    parameters = {
        name: _stored(parameter.detach().cpu(), specs.get(name, QuantSpec(num_bits)))
        for name, parameter in model.named_parameters()
    }
    activations = {
        name: (float(module.scale), int(module.zero_point))
        for name, module in (calibrated.named_modules() if calibrated is not None else ())
        if isinstance(module, FixedFakeQuantize)
    }
    _write({"num_bits": num_bits, "parameters": parameters, "activations": activations}, path)


def load_quantized(path: str | Path) -> dict[str, Tensor]:
    """The parameters of a file of :func:`save_quantized`, back in float32: a ``state_dict``.

    Args:
        path: of the file.

    Returns:
        ``(integer - zero_point) * scale`` for each parameter.
    """
    stored: Mapping[str, Any] = torch.load(path, weights_only=True)
    return {name: _restored(entry) for name, entry in stored["parameters"].items()}


def _stored(values: Tensor, spec: QuantSpec | None) -> Tensor | dict[str, Any]:
    """Integers from 0, packed, with what turns them back; a float tensor as it is.

    Raises:
        ValueError: the granularity is neither per tensor nor per channel.
    """
    if spec is None:
        return values.clone()
    if not isinstance(spec.granularity, PerTensor | PerChannel):
        raise ValueError(f"save_quantized: expected weights per tensor or per channel, got {spec}")
    options: dict[str, Any] = {"symmetric": spec.symmetric, "granularity": spec.granularity}
    scale, zero_point = choose_qparams(values, spec.num_bits, **options)
    integers = quantize(
        values, scale, zero_point, spec.quant_min, spec.quant_max, granularity=spec.granularity
    )
    return {
        "packed": pack(integers.int() - spec.quant_min, spec.num_bits),
        "num_bits": spec.num_bits,
        "shape": list(values.shape),
        "axis": spec.granularity.axis if isinstance(spec.granularity, PerChannel) else None,
        # a tensor takes a file of its own inside the file
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
    # dequantize takes integers of 8 and 16 bits
    narrow = integers.to(torch.int16) if int(integers.min()) < 0 else integers.to(torch.uint16)
    return dequantize(narrow, entry["scale"], zero_point, granularity=granularity)


def _write(content: Mapping[str, Any], path: str | Path) -> None:
    """torch.save by way of memory: given a path it stores the file's name too, once a tensor."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    Path(path).write_bytes(buffer.getvalue())
