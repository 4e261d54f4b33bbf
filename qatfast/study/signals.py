"""What quantization does to a signal: its error in numbers and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from qatfast import choose_qparams, fake_quantize_affine

from .plots import MUTED, PNG_DPI, PTQ, QAT, new_figure, styled


@dataclass(frozen=True)
class SignalError:
    """A signal before and after quantization.

    Args:
        num_bits: Bits of the grid.
        x: (1000,), float32, points of the signal.
        original: (1000,), float32.
        quantized: (1000,), float32, values on the grid.
        scale: Interval between adjacent levels, in units of the signal.
        zero_point: Integer that stands for 0.0.
        levels: Number of levels of the grid.
        mean_error: Mean of ``|quantized - original|``, in units of the signal.
        max_error: Maximum of ``|quantized - original|``, in units of the signal.
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
        num_bits: Bits of the grid, 2 to 16.
        seed: Seed of the noise.

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


def plot_signal(signal: SignalError) -> Figure:
    """Draws a signal and its quantized form, and a histogram of the error between them.

    Args:
        signal: Result of :func:`quantize_signal`.

    Returns:
        A figure of two panels.
    """
    with styled():
        figure, (above, below) = new_figure(2, height=3.9)
        above.plot(signal.x, signal.original, color=MUTED, linewidth=0.9, label="original")
        above.plot(
            signal.x, signal.quantized, color=QAT, linewidth=1.1, drawstyle="steps-mid", label="quantized"
        )
        above.set(title=f"2 sin(x) + noise, {signal.num_bits} bits: {signal.levels} levels", xlabel="x")
        above.legend(loc="upper right", ncols=2)
        above.margins(y=0.18)
        below.hist((signal.quantized - signal.original).numpy(), bins=41, color=QAT)
        for half in (-signal.scale / 2, signal.scale / 2):
            below.axvline(half, color=PTQ, linestyle="--", linewidth=1)
        below.set(
            title="Error; dashed: half an interval",
            xlabel="quantized − original",
            ylabel="points",
        )
        below.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def visualize_quantization(num_bits: int = 8, *, seed: int = 42, path: str | Path | None = None) -> Figure:
    """Quantizes ``2 sin(x) + 0.1 N(0, 1)``, prints the figures of the grid and the error, and draws a picture.

    Args:
        num_bits: Bits of the grid, 2 to 16.
        seed: Seed of the noise.
        path: File of the picture, with a suffix that matplotlib knows. None means that it is not saved.

    Returns:
        The picture of the original and the quantized signal and a histogram of the error. A notebook shows it.

    Raises:
        ValueError: ``num_bits`` is not from 2 to 16.
        OSError: ``path`` cannot be written.
    """
    signal = quantize_signal(num_bits, seed=seed)
    figure = plot_signal(signal)
    for name, value in describe(signal).items():
        print(f"{name:<16}{value}")
    if path is not None:
        _save(figure, Path(path))
    return figure


def _save(figure: Figure, path: Path) -> None:
    """Writes a file beside ``path`` and moves it there, so an interruption leaves an earlier picture intact."""
    partial = path.with_name(f".{path.stem}-partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=PNG_DPI)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def describe(signal: SignalError) -> dict[str, str]:
    """Returns the figures of a quantized signal as texts by name, in the order in which they are shown."""
    return {
        "bits": str(signal.num_bits),
        "levels": str(signal.levels),
        "scale": f"{signal.scale:.6g}",
        "zero point": str(signal.zero_point),
        "mean abs error": f"{signal.mean_error:.6g}",
        "max abs error": f"{signal.max_error:.6g}",
    }
