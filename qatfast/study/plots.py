"""The plots of the study, and the style of all figures."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor, nn

from qatfast import PerTensor, QuantSpec, choose_qparams, fake_quantize_affine, search_qparams
from qatfast.modules.base import QuantizedLayer

from .data import plural
from .insights import Spread
from .networks import COMPARED, LAYERS, TITLES
from .ptq import LayerError, weight_qparams
from .training import History

# Each colour of a light page and its replacement on a dark page. Colour-blind readers can tell the hues apart.
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
    "ptq_minmax": PTQ_LIGHT,
    "ptq_mse": PTQ,
    "qat_tutorial": QAT_THIRD,
    "qat_moving_average": QAT_LIGHT,
    "qat_learned": QAT,
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

PNG_DPI = 160

GRID_LEVELS = 16
"""The weight plots show the levels of a grid that has at most this many."""

AXIS_SPAN = 0.1
"""Maximum length of the accuracy axis. On a longer axis a point of accuracy would be too short to see."""

PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")
"""Formats a share as a percentage without rounding, as rounded labels would make even ticks look uneven."""


@contextmanager
def styled() -> Iterator[None]:
    """Sets the style of new figures inside the block, and restores the caller's matplotlib settings after it."""
    with matplotlib.rc_context(STYLE):
        yield


def new_figure(
    rows: int = 1, *, height: float = 3.2, width: float = 3.4, share_x: bool = False
) -> tuple[Figure, list[Axes]]:
    """Makes a figure of panels one above the other, narrow enough to be read on a phone.

    Args:
        rows: Number of panels.
        height: Height of the figure, in inches.
        width: Width of the figure, in inches.
        share_x: Whether the panels have the same x axis.

    Returns:
        The figure and its panels, from the top.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, sharex=share_x)
    return figure, list(axes[:, 0])


def svg(figure: Figure) -> str:
    """Returns the figure as SVG for light pages. Equal figures have equal SVGs."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # More digits than hundredths of a point are half of the file, and no screen shows them.
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), buffer.getvalue())


def darkened(light: str) -> str:
    """Returns an SVG of :func:`svg` in the colours of dark pages."""
    for color, dark in DARK.items():
        light = light.replace(color, dark)
    return light


def plot_training_history(histories: History | Mapping[str, History]) -> Figure:
    """Draws loss and accuracy over the epochs, solid for the test samples and dotted for the training samples.

    Args:
        histories: History of one training, or of several by name. Keys of TITLES get the colours of the report.

    Returns:
        A figure of two panels.
    """
    named = {"": histories} if isinstance(histories, History) else histories
    with styled():
        figure, (above, below) = new_figure(2, height=4.0, share_x=True)
        for number, (name, history) in enumerate(named.items()):
            color = COLORS.get(name, list(COLORS.values())[number % len(COLORS)])
            epochs = range(1, len(history.test_loss) + 1)
            marker = "o" if len(epochs) == 1 else None
            for axes, train, test in (
                (above, history.train_loss, history.test_loss),
                (below, history.train_accuracy, history.test_accuracy),
            ):
                axes.plot(epochs, train, color=color, linestyle=":", linewidth=1.2, marker=marker)
                axes.plot(
                    epochs,
                    test,
                    color=color,
                    marker=marker,
                    label=TITLES.get(name, name) or "on test samples",
                )
        above.set(title="Cross entropy (nats)", ylim=(0, None))
        below.set(title="Accuracy", xlabel="epoch")
        _show_percent(below)
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles = above.get_legend_handles_labels()[0]
        handles.append(Line2D([], [], color=INK, linestyle=":", linewidth=1.2, label="on training samples"))
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def visualize_weight_distributions(model: nn.Module, qat_model: nn.Module, num_bits: int) -> list[Figure]:
    """Draws the weights of each layer in FP32, after PTQ, and of a QAT model on its grid.

    Args:
        model: A model trained in FP32.
        qat_model: The same layers after QAT, with raw weights. The config of a quantized layer describes its
            grids, also for PTQ, which searches the scales that QAT learns. All other layers have one grid of
            ``num_bits`` bits.
        num_bits: Bits of the grid, 2 to 16. If a layer has one grid of at most 16 levels, these are drawn as lines.

    Returns:
        One figure per layer, of three panels with the same x axis.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    figures = []
    for layer in layers:
        qat_layer = qat_model.get_submodule(layer)
        spec = _weight_spec(qat_layer, num_bits)
        float_weight, qat_weight = _weight(model, layer), _weight(qat_model, layer)
        searched = _ptq_qparams(float_weight, spec)
        of_qat_weight = _ptq_qparams(qat_weight, spec)
        if isinstance(qat_layer, QuantizedLayer) and qat_layer.config.weight is not None:
            of_qat_weight = weight_qparams(qat_layer)
        panels = {
            "fp32_longer": (float_weight.flatten(), None),
            "ptq_mse": _on_grid(float_weight, spec, searched),
            "qat_learned": _on_grid(qat_weight, spec, of_qat_weight),
        }
        figures.append(_plot_weights(layer, spec.num_bits, panels))
    return figures


def plot_accuracy_over_bits(figures: Mapping[str, Mapping[int, Spread]], fp32: Spread | None) -> Figure:
    """Draws the mean test accuracy over bits, most bits first, with error bars of one standard deviation.

    The axis does not start at 0, because 8 and 4 bits could not be told apart then; the title says where it starts. If
    accuracies are further apart than AXIS_SPAN, the lowest are marked at the lower end of the axis with their values.

    Args:
        figures: Accuracy by model key and bits.
        fp32: Accuracy of the float model, drawn as a band.

    Returns:
        A figure of one panel.
    """
    with styled():
        figure, (axes,) = new_figure(height=3.3, width=4.6)
        widths = sorted({bits for by_bits in figures.values() for bits in by_bits}, reverse=True)
        bottom, top = _axis_ends(
            [spread for by_bits in figures.values() for spread in by_bits.values()], fp32
        )
        if fp32 is not None:
            deviation = fp32.std or 0.0
            axes.axhspan(fp32.mean - deviation, fp32.mean + deviation, color=MUTED, alpha=0.2, linewidth=0)
            axes.axhline(fp32.mean, color=MUTED, linewidth=1.2, label=TITLES["fp32_longer"])
        below: dict[int, list[tuple[float, str]]] = {}
        for number, (name, by_bits) in enumerate(figures.items()):
            bits = sorted(by_bits, reverse=True)
            # shifted a little, because the error bars would hide one another
            shift = 0.08 * (number - (len(figures) - 1) / 2)
            positions = [widths.index(width) + shift for width in bits]
            axes.errorbar(
                positions,
                [by_bits[width].mean for width in bits],
                yerr=[by_bits[width].std or 0.0 for width in bits],
                color=COLORS[name],
                marker="osD^vP"[number % 6],
                markersize=4.5,
                linestyle="-" if name in COMPARED else "--",
                linewidth=1.3,
                capsize=2.5,
                label=TITLES.get(name, name),
            )
            for position, width in zip(positions, bits, strict=True):
                if by_bits[width].mean < bottom:
                    _mark_below(axes, position, bottom, COLORS[name])
                    below.setdefault(width, []).append((by_bits[width].mean, COLORS[name]))
        for width, values in below.items():
            _list_below(axes, widths.index(width) + 0.04 * (len(figures) + 1), bottom, values)
        axes.set_xticks(range(len(widths)), [str(width) for width in widths])
        axes.set_xlim(-0.4, len(widths) - 0.5)
        axes.set_ylim(bottom, top)
        _show_percent(axes)
        repeated = any(spread.std is not None for by_bits in figures.values() for spread in by_bits.values())
        spread = "mean ± standard deviation" if repeated else "one seed"
        axes.set(xlabel="bits", title=f"Test accuracy, {spread}; axis from {PERCENT(bottom, 0)}")
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def _axis_ends(spreads: Sequence[Spread], fp32: Spread | None) -> tuple[float, float]:
    """Returns whole percentages around the accuracies and their deviations, at most about AXIS_SPAN apart."""
    every = [*spreads, *([fp32] if fp32 is not None else [])]
    low = min((spread.mean - (spread.std or 0.0) for spread in every), default=0.0)
    high = max((spread.mean + (spread.std or 0.0) for spread in every), default=1.0)
    top = min(1.0, math.ceil(100 * high + 0.5) / 100)
    return max(0.0, min(math.floor(100 * max(low, top - AXIS_SPAN) - 0.5) / 100, top - 0.02)), top


def _mark_below(axes: Axes, position: float, bottom: float, color: str) -> None:
    """Marks an accuracy below the axis by an arrow at its lower end."""
    axes.plot(position, bottom, marker="v", markersize=7, color=color, clip_on=False, zorder=5)


def _list_below(axes: Axes, position: float, bottom: float, values: Sequence[tuple[float, str]]) -> None:
    """Writes accuracies below the axis in their colours, the largest at the top, beside the arrows."""
    for line, (mean, color) in enumerate(sorted(values)):
        offset = (2, 3 + 9 * line)
        axes.annotate(
            f"{mean:.0%}", (position, bottom), offset, textcoords="offset points", color=color, fontsize=8
        )


def plot_layer_errors(errors: Sequence[LayerError], figure_name: str, title: str) -> Figure:
    """Draws the relative error of each layer over bits, most bits first, on a logarithmic axis.

    Args:
        errors: Errors of all models, layers and bits.
        figure_name: ``weight_error`` or ``output_error``.
        title: Title of the panel.

    Returns:
        A figure of one panel with a colour per model, and a marker and a line style per layer.
    """
    with styled():
        figure, (axes,) = new_figure(height=3.3, width=4.6)
        widths = sorted({error.bits for error in errors}, reverse=True)
        models, layers = (
            list(dict.fromkeys(getattr(error, key) for error in errors)) for key in ("model", "layer")
        )
        looks: dict[str, Any] = {
            layer: {"marker": marker, "markersize": 4.5, "linestyle": line, "linewidth": 1.1}
            for layer, marker, line in zip(
                layers, "osD^vP" * len(layers), ["-", "--", ":"] * len(layers), strict=False
            )
        }
        for (model, layer), found in _by_model_and_layer(errors, figure_name).items():
            bits = sorted(found, reverse=True)
            positions, values = [widths.index(width) for width in bits], [found[width] for width in bits]
            axes.plot(positions, values, color=COLORS[model], **looks[layer])
        named = models if len(models) > 1 else []
        handles = [Line2D([], [], color=COLORS[model], label=TITLES[model]) for model in named]
        handles += [Line2D([], [], color=INK, label=layer, **looks[layer]) for layer in layers]
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(range(len(widths)), [str(width) for width in widths])
        axes.set(xlabel="bits", title=title)
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _by_model_and_layer(
    errors: Sequence[LayerError], figure_name: str
) -> dict[tuple[str, str], dict[int, float]]:
    """Returns one figure by model and layer, then by bits."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for error in errors:
        found.setdefault((error.model, error.layer), {})[error.bits] = getattr(error, figure_name)
    return found


def _show_percent(axes: Axes) -> None:
    """Labels the y axis with percentages in steps of 1, 2 or 5."""
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PERCENT)


def _plot_weights(layer: str, num_bits: int, panels: Mapping[str, tuple[Tensor, Tensor | None]]) -> Figure:
    with styled():
        figure, all_axes = new_figure(len(panels), height=3.9, share_x=True)
        ends = torch.cat([weights for weights, _ in panels.values()])
        edges = np.linspace(float(ends.min()), float(ends.max()), 62)
        for axes, (name, (weights, levels)) in zip(all_axes, panels.items(), strict=True):
            if levels is not None and len(levels) <= GRID_LEVELS:
                _draw_levels(axes, weights, levels, COLORS[name])
            else:
                counts, _ = np.histogram(weights.numpy(), edges)
                axes.stairs(counts, edges, fill=True, color=COLORS[name])
            count = "" if name.startswith("fp32") else f": {plural(weights.unique().numel(), 'value')} used"
            axes.set(title=f"{TITLES.get(name, name)}{count}")
            axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        all_axes[-1].set(xlabel="weight")
        figure.suptitle(f"Weights of {layer} at {num_bits} bits", x=0.01, ha="left", color=INK)
    return figure


def _draw_levels(axes: Axes, weights: Tensor, levels: Tensor, color: str) -> None:
    """Draws a line at each level of the grid, as high as the number of weights on it."""
    counts = torch.bincount(torch.bucketize(weights, (levels[1:] + levels[:-1]) / 2), minlength=len(levels))
    axes.grid(visible=False, axis="x")
    for level in levels.tolist():
        axes.axvline(level, color=LINES, linewidth=0.9)
    axes.vlines(levels.numpy(), 0, counts.numpy(), color=color, linewidth=4)


def _weight_spec(layer: nn.Module, num_bits: int) -> QuantSpec:
    spec = layer.config.weight if isinstance(layer, QuantizedLayer) else None
    return QuantSpec(num_bits) if spec is None else spec


def _ptq_qparams(weights: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point of weights that are not trained further."""
    return (choose_qparams if spec.is_dynamic else search_qparams)(weights, **spec.arguments)


def _on_grid(
    weights: Tensor, spec: QuantSpec, qparams: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Returns the flattened weights on their grid, and the levels of the grid if there is only one grid."""
    scale, zero_point = (tensor.cpu() for tensor in qparams)
    ends = spec.quant_min, spec.quant_max
    rounded = fake_quantize_affine(weights, scale, zero_point, *ends, granularity=spec.granularity).flatten()
    if not isinstance(spec.granularity, PerTensor):
        return rounded, None
    return rounded, (torch.arange(spec.quant_min, spec.quant_max + 1) - zero_point) * scale


def _weight(model: nn.Module, layer: str) -> Tensor:
    return model.get_parameter(f"{layer}.weight").detach().cpu()
