"""The results as pictures, narrow enough to be read on a phone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .contest import Result
from .names import COMPILED, ONE_THREAD, OURS, REFERENCE, TUTORIAL
from .table import duration, ratio
from .works import CONFIGS, FORWARD, MIDDLE_LAYER, STEP, elements

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; the markers differ too.
LINES = {
    "clone": ("#000000", ""),
    OURS: ("#0072B2", "o"),
    COMPILED: ("#E69F00", "s"),
    TUTORIAL: ("#D55E00", "^"),
    "torch.ao fused op": ("#009E73", "v"),
    "torch.ao FakeQuantize": ("#CC79A7", "D"),
    "aten ops": ("#56B4E9", "P"),
    REFERENCE: ("#777777", "x"),
}
GRID = "#dddddd"
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9.5,
}
SIZES = [f"fake_quantize, {FORWARD}, per tensor{part}" for part in (", small", "", ", large")]
STEPS = [f"qat_linear, {config}, {STEP}" for config in CONFIGS]
TITLES = dict(zip(CONFIGS, ("weight, bias and output quantized", "input and weight quantized"), strict=True))


def fake_quantize_over_size(results: Iterable[Result]) -> Figure:
    """The time of ``fake_quantize`` over the number of elements, a line a provider, and that of a copy."""
    shown = [result for result in results if result.work.title in SIZES]
    figure, (axes,) = _new_figure(1, height=4.9)
    for name, (color, marker) in LINES.items():
        points = sorted(
            (result.work.shape[0], timing.seconds) for result in shown if (timing := result.timing(name))
        )
        if points:
            label = "clone, a plain copy" if name == "clone" else name
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=3.5, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(left=0.7)  # the marker at 1 is whole
    axes.xaxis.set_major_formatter(lambda value, _: elements((round(value),)))
    axes.yaxis.set_major_formatter(lambda value, _: duration(value))
    axes.set(xlabel="elements, float32", ylabel="time of one call")
    axes.set_title("Fake quantization of one tensor", loc="left")
    axes.grid(color=GRID)
    if shown:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def layer_steps(results: Iterable[Result]) -> Figure:
    """The time of a layer's training step in units of ``nn.Linear``'s, a panel a config, a bar a provider."""
    shown = [result for result in results if result.work.title in STEPS and result.work.shape == MIDDLE_LAYER]
    figure, panels = _new_figure(max(1, len(shown)), height=1.0 + 2.4 * len(shown))
    for axes, result in zip(panels, shown, strict=False):
        names = [timing.provider for timing in result.timings if not timing.provider.endswith(ONE_THREAD)]
        names = [name for name in names if name != REFERENCE]  # the specification: nobody trains with it
        values = [part.median if (part := result.ratio(name)) else 0.0 for name in names]
        colors = [LINES[OURS][0] if name == OURS else "#b8bec7" for name in names]
        bars = axes.barh(names, values, color=colors)
        labels = axes.bar_label(bars, [ratio(value) for value in values], padding=3, zorder=3)
        for label in labels:  # in front of the line at 1
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.invert_yaxis()
        axes.axvline(1.0, color=LINES["clone"][0], linewidth=0.8)
        axes.margins(x=0.16)
        axes.set_title(TITLES[result.work.config], loc="left")
    batch, in_features, out_features = MIDDLE_LAYER
    panels[-1].set_xlabel(
        f"time of a training step, nn.Linear = 1\nbatch {batch}, {in_features} features in, {out_features} out"
    )
    return figure


def _new_figure(rows: int, *, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])
