"""The report of a study: index.html (one self-contained file), results.json, model files and the plots as PNG."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from . import page, tables
from .experiments import Study
from .figures import svg
from .names import EXPLANATIONS, FLOAT_BITS, TITLES
from .noise import Spread
from .plots import (
    plot_accuracy_over_bits,
    plot_layer_errors,
    plot_signal,
    plot_training_history,
    visualize_weight_distributions,
)
from .results import as_json
from .signal_error import SignalError

PNG_DPI = 160
LIMITS = (
    "One small network and one data set: the order of the models may be another one elsewhere.",
    "All grids are affine and per tensor, from the smallest to the largest value. Deployed networks often use one "
    "scale per output channel and clip outliers, which helps PTQ at few bits.",
    "Quantized models are simulated in float32 on the integer grid; no integer device ran them.",
    "Learning rates and epochs were not tuned for any model, and fine-tuned models had the epochs of FP32 and as many "
    "again; 'FP32, trained longer' is the fair one to compare them with.",
    "Each interval holds for its own sentence. Of twenty differences that are only chance, about one is outside its "
    "95 % interval.",
)


@dataclass(frozen=True)
class Plot:
    """A figure of the report.

    Args:
        name: of its PNG, without suffix.
        figure: drawn.
        alt: what it shows, in words.
        caption: below it.
    """

    name: str
    figure: Figure
    alt: str
    caption: str

    def html(self) -> str:
        """As it stands in the page."""
        return page.figure(svg(self.figure), self.alt, self.caption)


def write_report(study: Study, signals: list[SignalError], folder: Path, *, seconds: float) -> None:
    """Writes index.html, results.json and the PNGs of a study beside its model files.

    Args:
        study: complete or interrupted.
        signals: the quantized signal at each bit width.
        folder: of the report.
        seconds: that the study took.

    Raises:
        OSError: a file cannot be written.
    """
    results = as_json(study, signals, seconds=seconds)
    plots = {group: list(found) for group, found in _plots(study, signals).items()}
    for plot in (plot for group in plots.values() for plot in group):
        plot.figure.savefig(folder / f"{plot.name}.png", dpi=PNG_DPI)
    html = page.page(_title(study), _body(study, results, plots, signals))
    (folder / "index.html").write_text(html, encoding="utf-8")
    written = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    results["files"] = sorted({"results.json", *written})
    text = json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")


def _title(study: Study) -> str:
    return f"FP32, PTQ and QAT on {study.samples.name}"


def _body(
    study: Study, results: dict[str, Any], plots: dict[str, list[Plot]], signals: list[SignalError]
) -> Iterator[str]:
    yield _header(study, results)
    if study.runs:
        yield page.section(
            "Accuracy",
            page.figures(plot.html() for plot in plots["accuracy"]),
            page.table(tables.accuracy_table(study)),
            page.definitions(
                {TITLES[name]: text for name, text in EXPLANATIONS.items() if _has(study, name)}
            ),
        )
        yield _findings(study, results)
    for content in (tables.batch_table(study), tables.size_table(study), tables.time_table(study)):
        if content.rows:
            yield page.section(content.title, page.table(content))
    if study.layer_errors:
        content = tables.layer_table(study)
        yield page.section(
            content.title, page.figures(plot.html() for plot in plots["errors"]), page.table(content)
        )
    if plots["bits"]:
        yield _training_and_weights(study, plots["bits"])
    yield page.section(
        "How quantization works",
        page.paragraph(
            "A value x becomes the integer q = clamp(round(x / scale) + zero point, 0, levels − 1) and is read back as "
            "(q − zero point) · scale. Below, a noisy sine before and after."
        ),
        page.figures(plot.html() for plot in plots["signal"]),
        page.table(tables.signal_table(signals)),
    )
    yield page.section("What these numbers do not say", page.bullets(LIMITS))
    yield _how_it_was_done(study, results)


def _header(study: Study, results: dict[str, Any]) -> str:
    settings = study.settings
    layers = " → ".join(str(size) for size in results["network"]["layers"])
    epochs = "one epoch" if settings.epochs == 1 else f"{settings.epochs} epochs"
    seeds = (
        "one seed"
        if settings.seeds == 1
        else f"{settings.seeds} seeds: each seed is another split, other first weights and another order"
    )
    parts = [
        f"<header>\n<h1>{page.escape(_title(study))}</h1>",
        page.paragraph(
            f"A network of three linear layers ({layers}, {study.parameters:,} parameters) is trained in 32-bit floats "
            "(FP32), put on grids of few bits afterwards (post-training quantization, PTQ), and trained on these grids "
            f"(quantization-aware training, QAT). {study.train_samples:,} samples for training, "
            f"{study.test_samples:,} for testing, {epochs} a training, {seeds}."
        ),
    ]
    parts += [page.paragraph(item["text"]) for item in results["insights"] if item["kind"] == "threshold"]
    if not study.complete:
        done = len({run.seed for run in study.runs})
        parts.append(
            page.paragraph(
                f"Partial report: the study was interrupted. It reached {done} of {settings.seeds} seeds, the last of "
                "them perhaps not whole; what is missing below was not measured.",
                "warning",
            )
        )
    return "\n".join([*parts, "</header>"])


def _findings(study: Study, results: dict[str, Any]) -> str:
    """The insights, grouped by bit width."""
    groups: dict[int, list[str]] = {}
    for insight in results["insights"]:
        if insight["kind"] == "threshold":
            continue  # stands in the header
        groups.setdefault(insight["bits"], []).append(
            insight["text"].removeprefix(f"{insight['bits']} bits: ")
        )
    parts = []
    for bits, texts in groups.items():
        heading = "Float" if bits == FLOAT_BITS else f"{bits} bits"
        parts += [f"<h3>{heading}</h3>", page.bullets(text[0].upper() + text[1:] for text in texts)]
    times = results["timing"]["insights"]
    if times:
        parts += ["<h3>Time</h3>", page.bullets(times)]
    note = (
        "Differences are in points of test accuracy, ± half the width of their 95 % interval; one that is not larger "
        "than that, or than one test sample, is called noise. "
        + (
            "They are means of differences seed by seed."
            if study.settings.seeds > 1
            else "With one seed the interval holds only the chance of the test samples, not that of the training."
        )
    )
    return page.section("What the numbers show", page.paragraph(note, "note"), *parts)


def _training_and_weights(study: Study, plots: list[Plot]) -> str:
    """The plots of each bit width, the lowest one unfolded."""
    widths = sorted(study.settings.bits)
    parts = []
    for bits in widths:
        found = [plot for plot in plots if plot.name.endswith(f"_{bits}bit")]
        if found:
            parts.append(
                page.details(
                    f"{bits} bits", page.figures(plot.html() for plot in found), open=bits == widths[0]
                )
            )
    note = (
        "First seed. The curves show each training epoch by epoch. The weights of each layer are shown in FP32 (before "
        "PTQ), after PTQ, and of the fine-tuned QAT network; on grids of at most 16 levels thin lines mark the levels."
    )
    return page.section("Training and weights", page.paragraph(note, "note"), *parts)


def _how_it_was_done(study: Study, results: dict[str, Any]) -> str:
    settings, machine, versions = study.settings, results["machine"], results["versions"]
    facts = {
        "Training": f"Adam, learning rate {settings.learning_rate:g} ({settings.finetune_learning_rate:g} to "
        f"fine-tune), batch {settings.batch_size}, cross entropy.",
        "Seeds": f"{settings.seed} to {settings.seed + settings.seeds - 1}. The same seeds on the same machine give "
        "the same results.json, apart from its keys timing, machine, versions and date.",
        "Data": f"{study.samples.name}, {results['data']['features']} features, classes "
        f"{', '.join(study.samples.class_names[:20])}; split 80/20 with the same share of each class.",
        "Machine": f"{machine['processor']}, {machine['system']}, {machine['threads']} threads, device "
        f"{machine['device']}. Kernels: {machine['kernels']} ({machine['instruction set']}).",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Time": f"{results['timing']['seconds']:.0f} s, ended {results['date']}.",
        "Files": "results.json beside this page holds every figure; models/ the model files; the plots are PNGs.",
    }
    return page.section("How it was done", page.definitions(facts))


def _plots(study: Study, signals: list[SignalError]) -> dict[str, Iterator[Plot]]:
    return {
        "accuracy": _accuracy_plots(study),
        "errors": _error_plots(study),
        "bits": _bit_plots(study),
        "signal": _signal_plots(signals),
    }


def _accuracy_plots(study: Study) -> Iterator[Plot]:
    found: dict[str, dict[int, Spread]] = {}
    for run in study.runs:
        if run.bits != FLOAT_BITS:
            values = study.accuracies(run.model, run.bits)
            found.setdefault(run.model, {})[run.bits] = Spread.of(list(values.values()))
    fp32 = study.accuracies("fp32", FLOAT_BITS)
    if not found:
        return
    ordered = {name: found[name] for name in TITLES if name in found}
    words = [
        f"{TITLES[name]}: " + ", ".join(f"{bits} bits {spread.mean:.1%}" for bits, spread in by_bits.items())
        for name, by_bits in ordered.items()
    ]
    base = Spread.of(list(fp32.values()))
    yield Plot(
        "accuracy_over_bits",
        plot_accuracy_over_bits(ordered, base),
        f"Test accuracy over bits. FP32: {100 * base.mean:.1f}%. {'; '.join(words)}.",
        "Mean over the seeds; the bars and the band reach one standard deviation to either side."
        if study.settings.seeds > 1
        else "One seed: how much chance there is in it is not measured.",
    )


def _error_plots(study: Study) -> Iterator[Plot]:
    if not study.layer_errors:
        return
    for figure_name, title, caption in (
        ("weight_error", "Error of the weights", "Of the weight matrix alone."),
        (
            "output_error",
            "Error of the outputs",
            "Of what the layer gives, with the errors of the layers before it.",
        ),
    ):
        values = [getattr(error, figure_name) for error in study.layer_errors]
        yield Plot(
            f"quantization_{figure_name}",
            plot_layer_errors(study.layer_errors, figure_name, f"{title}, relative"),
            f"{title} of each layer over bits, from {min(values):.2%} to {max(values):.2%}; the table below has all.",
            f"{caption} Logarithmic axis.",
        )


def _bit_plots(study: Study) -> Iterator[Plot]:
    for bits in study.settings.bits:
        histories = {
            name: history
            for (name, width), history in study.histories.items()
            if width == bits or (name, width) == ("fp32", FLOAT_BITS)
        }
        last = [f"{TITLES[name]} {history.test_accuracy[-1]:.1%}" for name, history in histories.items()]
        if len(histories) > 1:
            yield Plot(
                f"training_{bits}bit",
                plot_training_history(histories),
                f"Loss and accuracy over the epochs at {bits} bits. Test accuracy after the last: {', '.join(last)}.",
                "Ranges taken from the batch, as in training; fine-tuning starts from the FP32 weights.",
            )
        fp32, qat = study.weights.get(("fp32", FLOAT_BITS)), study.weights.get(("qat_finetuned", bits))
        if fp32 is None or qat is None:
            continue
        layers = [name for name, _ in fp32.named_children()]
        for layer, figure in zip(layers, visualize_weight_distributions(fp32, qat, bits), strict=True):
            yield Plot(
                f"weights_{layer}_{bits}bit",
                figure,
                f"Histograms of the weights of {layer}: FP32 spread smoothly; after PTQ and QAT on the grid of {bits} "
                "bits.",
                f"Weights of {layer}: how many have which value.",
            )


def _signal_plots(signals: list[SignalError]) -> Iterator[Plot]:
    for signal in signals:
        yield Plot(
            f"signal_{signal.num_bits}bit",
            plot_signal(signal),
            f"A noisy sine and its form on {signal.levels} levels; below, a histogram of the error, at most "
            f"{signal.max_error:.3g}.",
            f"{signal.num_bits} bits: mean error {signal.mean_error:.3g}, largest {signal.max_error:.3g}.",
        )


def _has(study: Study, model: str) -> bool:
    return any(run.model == model for run in study.runs)
