"""How figures look, and how they become files: SVG for light and dark pages, PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Each light colour and the dark one that stands for it. The hues are told apart by colour-blind readers too.
DARK = {
    "#1c2430": "#e6e9ee",  # text
    "#5b6675": "#a7b0bd",  # secondary text, FP32
    "#d9dee5": "#39424f",  # grid and frames
    "#fdfdfe": "#171c23",  # paper
    "#c2620a": "#f0a04b",  # PTQ
    "#e3a55f": "#9c6a34",  # PTQ, second
    "#1a6fb8": "#62b0f2",  # QAT
    "#7fb3dd": "#3d729f",  # QAT, second
    "#17805e": "#4cc79c",  # QAT, third
}
INK, MUTED, LINES, PAPER, PTQ, PTQ_LIGHT, QAT, QAT_LIGHT, QAT_THIRD = DARK

COLORS = {
    "fp32": MUTED,
    "fp32_longer": MUTED,
    "ptq": PTQ,
    "qat_finetuned": QAT,
    "ptq_every_layer": PTQ_LIGHT,
    "ptq_tutorial": PTQ_LIGHT,
    "qat_tutorial": QAT_THIRD,
}

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINES,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": PAPER,
    "figure.titlesize": 11,
    "font.size": 9,
    "grid.color": LINES,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.hashsalt": "qatfast",
}


@contextmanager
def styled() -> Iterator[None]:
    """Inside, new figures look like the report's; the caller's matplotlib settings are as before afterwards."""
    with matplotlib.rc_context(STYLE):
        yield


def new_figure(
    rows: int = 1, *, height: float = 3.2, width: float = 3.4, share_x: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of panels one above the other, narrow enough to be read on a phone.

    Args:
        rows: panels.
        height: of the figure, in inches.
        width: of the figure, in inches.
        share_x: whether the panels have the same x axis.

    Returns:
        The figure and its panels, from the top.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, sharex=share_x)
    return figure, list(axes[:, 0])


def svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same figure, for light pages."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # a hundredth of a point is finer than any screen; the digits beyond are half of the file
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), buffer.getvalue())


def darkened(light: str) -> str:
    """The SVG of :func:`svg` in the colours for dark pages."""
    for color, dark in DARK.items():
        light = light.replace(color, dark)
    return light
