"""What quantization does to a signal: the numbers behind the first picture of the report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qatfast import choose_qparams, fake_quantize_affine


@dataclass(frozen=True)
class SignalError:
    """A signal before and after quantization.

    Args:
        num_bits: of the grid.
        x: (1000,), float32, where the signal was taken.
        original: (1000,), float32.
        quantized: (1000,), float32, on the grid.
        scale: distance of two neighbours of the grid, in units of the signal.
        zero_point: the integer that stands for 0.0.
        levels: how many different values the grid has.
        mean_error: mean of ``|quantized - original|``, in units of the signal.
        max_error: the largest.
    """

    num_bits: int
    x: Tensor
    original: Tensor
    quantized: Tensor
    scale: float
    zero_point: int
    levels: int
    mean_error: float
    max_error: float


def quantize_signal(num_bits: int = 8, *, seed: int = 42) -> SignalError:
    """Quantizes ``2 sin(x) + 0.1 N(0, 1)`` at 1000 points of [-5, 5] to the affine grid of its own range.

    Args:
        num_bits: 2 to 16.
        seed: of the noise.

    Returns:
        The signal, its quantized form and the error between them.

    Raises:
        ValueError: ``num_bits`` is not from 2 to 16.
    """
    x = np.linspace(-5, 5, 1000)
    noise = np.random.default_rng(seed).standard_normal(1000)
    original = torch.from_numpy(2 * np.sin(x) + 0.1 * noise).float()
    scale, zero_point = choose_qparams(original, num_bits)
    quantized = fake_quantize_affine(original, scale, zero_point, 0, 2**num_bits - 1)
    error = (quantized - original).abs()
    return SignalError(
        num_bits,
        torch.from_numpy(x).float(),
        original,
        quantized,
        float(scale),
        int(zero_point),
        2**num_bits,
        float(error.mean()),
        float(error.max()),
    )
