"""The plots of the study; each function draws one figure and returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor, nn

from qatfast import choose_qparams

from .figures import COLORS, INK, LINES, MUTED, PTQ, QAT, new_figure, styled
from .layer_error import LayerError
from .names import TITLES
from .noise import Spread
from .ptq import quantize_model_weights
from .signal_error import SignalError
from .training import History

GRID_LEVELS = 16
"""A grid of at most so many levels is drawn into the weight plots."""

PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")
"""A share as a percentage with the decimals that it has: rounded ones would make even ticks look uneven."""


def plot_signal(signal: SignalError) -> Figure:
    """A signal against its quantized form, and a histogram of the error between them.

    Args:
        signal: from :func:`quantize_signal`.

    Returns:
        A figure of two panels.
    """
    with styled():
        figure, (above, below) = new_figure(2, height=4.6)
        above.plot(signal.x, signal.original, color=MUTED, linewidth=0.9, label="original")
        above.plot(
            signal.x, signal.quantized, color=QAT, linewidth=1.1, drawstyle="steps-mid", label="quantized"
        )
        above.set(title=f"2 sin(x) + noise on {signal.levels} levels ({signal.num_bits} bits)", xlabel="x")
        above.legend(loc="upper right", ncols=2)
        above.margins(y=0.18)
        below.hist((signal.quantized - signal.original).numpy(), bins=41, color=QAT)
        for half in (-signal.scale / 2, signal.scale / 2):
            below.axvline(half, color=PTQ, linestyle="--", linewidth=1)
        below.set(
            title="Error, and half a step to either side (dashed)",
            xlabel="quantized − original",
            ylabel="points",
        )
        below.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def plot_training_history(histories: History | Mapping[str, History]) -> Figure:
    """Loss and accuracy over the epochs: solid on the test samples, dotted on the training samples.

    Args:
        histories: of one training, or of several by name; keys of TITLES get the colours of the report.

    Returns:
        A figure of two panels.
    """
    named = {"": histories} if isinstance(histories, History) else histories
    with styled():
        figure, (above, below) = new_figure(2, height=5.0, share_x=True)
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
    """The weights of each linear layer: in FP32, after PTQ, and of a QAT model on its grid.

    Args:
        model: trained in FP32.
        qat_model: the same layers after QAT, raw weights.
        num_bits: of the grids, 2 to 16. The levels of grids of at most 16 levels are drawn as lines.

    Returns:
        One figure a linear layer, of three panels with the same x axis.
    """
    rounded, qat_rounded = (
        quantize_model_weights(model, num_bits),
        quantize_model_weights(qat_model, num_bits),
    )
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [
        _plot_weights(
            layer,
            num_bits,
            {
                "fp32": (_weight(model, layer), None),
                "ptq": (_weight(rounded, layer), _levels(_weight(model, layer), num_bits)),
                "qat_finetuned": (_weight(qat_rounded, layer), _levels(_weight(qat_model, layer), num_bits)),
            },
        )
        for layer in layers
    ]


def plot_accuracy_over_bits(figures: Mapping[str, Mapping[int, Spread]], fp32: Spread | None) -> Figure:
    """Mean test accuracy over bits, with one standard deviation to either side.

    Args:
        figures: accuracy by model key and bits.
        fp32: of the float model, drawn as a band.

    Returns:
        A figure of one panel.
    """
    with styled():
        figure, (axes,) = new_figure(height=4.2)
        widths = sorted({bits for by_bits in figures.values() for bits in by_bits})
        if fp32 is not None:
            deviation = fp32.std or 0.0
            axes.axhspan(fp32.mean - deviation, fp32.mean + deviation, color=MUTED, alpha=0.2, linewidth=0)
            axes.axhline(fp32.mean, color=MUTED, linewidth=1.2, label=TITLES["fp32"])
        for number, (name, by_bits) in enumerate(figures.items()):
            bits = sorted(by_bits)
            # shifted a little to either side, or the error bars hide one another
            shift = 0.05 * (number - (len(figures) - 1) / 2)
            axes.errorbar(
                [widths.index(width) + shift for width in bits],
                [by_bits[width].mean for width in bits],
                yerr=[by_bits[width].std or 0.0 for width in bits],
                color=COLORS[name],
                marker="osD^vP"[number % 6],
                markersize=4.5,
                linestyle="--" if "float_scores" in name else "-",
                linewidth=1.3,
                capsize=2.5,
                label=TITLES.get(name, name),
            )
        axes.set_xticks(range(len(widths)), [str(width) for width in widths])
        _show_percent(axes)
        repeated = any(spread.std is not None for by_bits in figures.values() for spread in by_bits.values())
        title = f"Test accuracy ({'mean ± standard deviation' if repeated else 'one seed'})"
        axes.set(xlabel="bits", title=title)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def plot_layer_errors(errors: Sequence[LayerError], figure_name: str, title: str) -> Figure:
    """The relative error of each layer over bits, on a logarithmic axis.

    Args:
        errors: of all models, layers and bits.
        figure_name: ``weight_error`` or ``output_error``.
        title: of the panel.

    Returns:
        A figure of one panel; colours are models, markers and line styles layers.
    """
    with styled():
        figure, (axes,) = new_figure(height=3.9)
        widths = sorted({error.bits for error in errors})
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
            bits = sorted(found)
            positions, values = [widths.index(width) for width in bits], [found[width] for width in bits]
            axes.plot(positions, values, color=COLORS[model], **looks[layer])
        handles = [Line2D([], [], color=COLORS[model], label=TITLES[model]) for model in models]
        handles += [Line2D([], [], color=INK, label=layer, **looks[layer]) for layer in layers]
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(range(len(widths)), [str(width) for width in widths])
        axes.set(xlabel="bits", title=title)
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _by_model_and_layer(
    errors: Sequence[LayerError], figure_name: str
) -> dict[tuple[str, str], dict[int, float]]:
    """One figure by model and layer, then by bits."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for error in errors:
        found.setdefault((error.model, error.layer), {})[error.bits] = getattr(error, figure_name)
    return found


def _show_percent(axes: Axes) -> None:
    """Percentages beside the y axis, at steps of 1, 2 or 5."""
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PERCENT)


def _plot_weights(layer: str, num_bits: int, panels: Mapping[str, tuple[Tensor, Tensor | None]]) -> Figure:
    with styled():
        figure, all_axes = new_figure(len(panels), height=4.8, share_x=True)
        ends = torch.cat([weights for weights, _ in panels.values()])
        edges = np.linspace(float(ends.min()), float(ends.max()), 62)
        for axes, (name, (weights, levels)) in zip(all_axes, panels.items(), strict=True):
            if levels is not None and len(levels) <= GRID_LEVELS:
                _draw_levels(axes, weights, levels, COLORS[name])
            else:
                counts, _ = np.histogram(weights.numpy(), edges)
                axes.stairs(counts, edges, fill=True, color=COLORS[name])
            axes.set(
                title=TITLES.get(name, name)
                if levels is None
                else f"{TITLES.get(name, name)}: {weights.unique().numel()} values used"
            )
            axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        all_axes[-1].set(xlabel="weight")
        figure.suptitle(f"{layer}, {num_bits} bits", x=0.01, ha="left", color=INK)
    return figure


def _draw_levels(axes: Axes, weights: Tensor, levels: Tensor, color: str) -> None:
    """A line at each level of the grid, as high as the number of weights on it."""
    counts = torch.bincount(torch.bucketize(weights, (levels[1:] + levels[:-1]) / 2), minlength=len(levels))
    axes.grid(visible=False, axis="x")
    for level in levels.tolist():
        axes.axvline(level, color=LINES, linewidth=0.9)
    axes.vlines(levels.numpy(), 0, counts.numpy(), color=color, linewidth=4)


def _levels(weights: Tensor, num_bits: int) -> Tensor:
    """The values of the grid of ``weights``."""
    scale, zero_point = choose_qparams(weights, num_bits)
    return (torch.arange(2**num_bits) - zero_point) * scale


def _weight(model: nn.Module, layer: str) -> Tensor:
    return model.get_parameter(f"{layer}.weight").detach().cpu().flatten()
