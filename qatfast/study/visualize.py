"""How quantization works, on a signal: the numbers printed, the picture drawn."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from .plots import plot_signal
from .signal_error import SignalError, quantize_signal


def visualize_quantization(num_bits: int = 8, *, seed: int = 42, path: str | Path | None = None) -> Figure:
    """Quantizes ``2 sin(x) + 0.1 N(0, 1)``, prints the figures of the grid and its error, and draws both.

    Args:
        num_bits: 2 to 16.
        seed: of the noise.
        path: where to save the picture, with a suffix that matplotlib knows; None: nowhere.

    Returns:
        The picture: original against quantized, and a histogram of the error. A notebook shows it by itself.

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
    """Writes beside ``path`` and moves it there: an interrupted picture does not take the place of a whole one."""
    partial = path.with_name(f".{path.stem}-partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=160)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def describe(signal: SignalError) -> dict[str, str]:
    """The figures of a quantized signal in words and numbers, in the order in which they are shown."""
    return {
        "bits": str(signal.num_bits),
        "levels": str(signal.levels),
        "scale": f"{signal.scale:.6g}",
        "zero point": str(signal.zero_point),
        "mean abs error": f"{signal.mean_error:.6g}",
        "max abs error": f"{signal.max_error:.6g}",
    }
