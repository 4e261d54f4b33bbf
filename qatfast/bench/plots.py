"""The results as pictures, in the style of the study's figures."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.figure import Figure

from ..study.plots import INK, MUTED, PAPER, PTQ, QAT, new_figure, styled
from .results import Result, duration, ratio
from .workloads import (
    COMPILED,
    FORWARD,
    MIDDLE_LAYER,
    ONE_THREAD,
    OURS,
    REFERENCE,
    STEP,
    TUTORIAL,
    elements,
)

WIDTH = 4.6
OTHER_BARS = "#b8bec7"
# Okabe and Ito's colours, which colour-blind readers can tell apart, and a marker each.
PROVIDERS = {
    "clone": (INK, ""),
    OURS: (QAT, "o"),
    COMPILED: ("#E69F00", "s"),
    TUTORIAL: (PTQ, "^"),
    "torch.ao fused op": ("#009E73", "v"),
    "torch.ao FakeQuantize": ("#CC79A7", "D"),
    "aten ops": ("#56B4E9", "P"),
    REFERENCE: (MUTED, "x"),
}
SIZES = [f"fake_quantize, {FORWARD}, per tensor{part}" for part in (", small", "", ", large")]
TITLES = {
    "tutorial config": "weight, bias and output quantized",
    "int8 config": "input and weight quantized",
}
STEPS = [f"qat_linear, {config}, {STEP}" for config in TITLES]


def fake_quantize_over_size(results: Iterable[Result]) -> Figure:
    """Draws the time of ``fake_quantize`` over the number of elements: one line per provider and one for a copy."""
    shown = [result for result in results if result.workload.title in SIZES]
    with styled():
        figure, (axes,) = new_figure(height=4.9, width=WIDTH)
        for name, (color, marker) in PROVIDERS.items():
            points = sorted(
                (result.workload.shape[0], timing.seconds)
                for result in shown
                if (timing := result.timing(name))
            )
            if points:
                label = "clone, a plain copy" if name == "clone" else name
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=3.5, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlim(left=0.7)  # keeps the marker at 1 from being cut
        axes.xaxis.set_major_formatter(lambda value, _: elements((round(value),)))
        axes.yaxis.set_major_formatter(lambda value, _: duration(value))
        axes.set(
            title="Fake quantization of one tensor",
            xlabel="elements, float32",
            ylabel="time of one call",
        )
        if shown:
            figure.legend(loc="outside lower center", ncols=2)
    return figure


def layer_steps(results: Iterable[Result]) -> Figure:
    """Draws the time of a layer's training step as a multiple of ``nn.Linear``'s: a panel per config."""
    shown = [
        result
        for result in results
        if result.workload.title in STEPS and result.workload.shape == MIDDLE_LAYER
    ]
    with styled():
        figure, panels = new_figure(max(1, len(shown)), height=1.0 + 2.4 * len(shown), width=WIDTH)
        for axes, result in zip(panels, shown, strict=False):
            names = [
                timing.provider
                for timing in result.timings
                if timing.provider != REFERENCE and not timing.provider.endswith(ONE_THREAD)
            ]
            values = [part.median if (part := result.ratio(name)) else 0.0 for name in names]
            bars = axes.barh(names, values, color=[QAT if name == OURS else OTHER_BARS for name in names])
            labels = axes.bar_label(bars, [ratio(value) for value in values], padding=3, zorder=3)
            for label in labels:  # in front of the line at 1
                label.set_bbox({"facecolor": PAPER, "edgecolor": "none", "pad": 0.5})
            axes.grid(visible=False)
            axes.invert_yaxis()
            axes.axvline(1.0, color=INK, linewidth=0.8)
            axes.margins(x=0.16)
            axes.set_title(TITLES[result.workload.config])
        batch, in_features, out_features = MIDDLE_LAYER
        panels[-1].set_xlabel(
            "time of a training step, nn.Linear = 1\n"
            f"batch {batch}, {in_features} features in, {out_features} out"
        )
    return figure
