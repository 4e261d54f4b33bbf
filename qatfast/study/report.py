"""The report of a study: its folder with index.html (a self-contained page), results.json, model files and PNGs."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qatfast.serialization import umask

from . import page
from .data import plural
from .experiments import CALIBRATION_SAMPLES, Study
from .insights import Spread, best, definition
from .networks import EDGE_BITS, EXPLANATIONS, FLOAT_BITS, LAYERS, TITLES, config_code
from .plots import (
    PNG_DPI,
    plot_accuracy_over_bits,
    plot_layer_errors,
    plot_training_history,
    svg,
    visualize_weight_distributions,
)
from .results import (
    PROGRAM,
    accuracy_table,
    as_json,
    batch_table,
    deployment_table,
    difference_table,
    layer_table,
    signal_table,
    size_table,
    time_table,
)
from .signals import SignalError, plot_signal

FINDINGS = ("gain", "diverged", "batch", "size")
LIMITS = (
    "One small network on one data set: in another one the order may differ, and the first and the last layer, which "
    "keep 8 bits, may hold a smaller share of the weights.",
    "Nothing was tuned for one model or bit width: the learning rate and the epochs are the same for all.",
    "The integers are computed on this machine, by qatfast and onnxruntime; no other device ran them.",
    "If two models are equally good, about one interval in twenty still does not contain 0.",
)


@dataclass(frozen=True)
class Plot:
    """A figure of the report.

    Args:
        name: Name of its PNG, without suffix.
        figure: The figure.
        alt: Description of what it shows.
        caption: Caption below the figure.
    """

    name: str
    figure: Figure
    alt: str
    caption: str

    def html(self) -> str:
        """Returns the figure as HTML."""
        return page.figure(svg(self.figure), self.alt, self.caption)


def write_report(study: Study, signals: list[SignalError], folder: Path, *, seconds: float) -> None:
    """Writes index.html, results.json and the PNGs of a study beside its model files.

    Args:
        study: A complete or interrupted study.
        signals: The quantized signal at each bit width.
        folder: Folder of the report.
        seconds: Duration of the study.

    Raises:
        OSError: A file cannot be written.
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
    findings = [item["text"] for item in results["insights"] if item["kind"] in FINDINGS]
    findings += results["timing"]["insights"]
    sections = {
        "accuracy": _accuracy(study, plots["accuracy"]) if study.runs else "",
        "code": _code(study) if study.runs else "",
        "deployment": _deployment(study) if study.deployments else "",
        "findings": page.section("findings", "Other findings", page.bullets(findings)) if findings else "",
        "limits": page.section("limits", "What these numbers do not say", page.bullets(LIMITS)),
        "details": page.section("details", "Details", *_details(study, results, plots, signals)),
    }
    headings = {
        "accuracy": "Accuracy",
        "code": "Code to paste",
        "deployment": "Deployed models",
        "findings": "Findings",
        "limits": "Limits",
        "details": "Details",
    }
    found = {name: html for name, html in sections.items() if html}
    yield _header(study, results, page.contents({name: headings[name] for name in found}))
    yield from found.values()


def _header(study: Study, results: dict[str, Any], contents: str) -> str:
    """Returns the headline, one line per bit width, and the definition of a loss."""
    parts = [f"<header>\n<h1>Is QAT worth it, at how many bits? {page.escape(_title(study))}</h1>"]
    if not study.complete:
        done = len({run.seed for run in study.runs})
        parts.append(
            page.paragraph(
                f"Partial report: the study was interrupted. It reached {done} of "
                f"{plural(study.settings.seeds, 'seed')}, the last of them perhaps incomplete; what is missing below "
                "was not measured.",
                "warning",
            )
        )
    parts += [
        page.paragraph(item["text"], "headline") for item in results["insights"] if item["kind"] == "headline"
    ]
    lines = {
        f"{item['bits']} bits": item["text"].removeprefix(f"{item['bits']} bits: ")
        for item in results["insights"]
        if item["kind"] == "verdict"
    }
    if lines:
        winner = best(study)
        lines = {bits: text[0].upper() + text[1:] for bits, text in lines.items()}
        parts.append(page.definitions(lines, "verdict", f"{winner[0]} bits" if winner else ""))
        parts.append(page.paragraph(f"{definition(study)} {_edges()}", "note"))
    return "\n".join([*parts, contents, "</header>"])


def _edges() -> str:
    return f"Below {EDGE_BITS} bits the first and the last layer keep {EDGE_BITS}."


def _accuracy(study: Study, plots: list[Plot]) -> str:
    labels = [name for name in TITLES if name != "fp32" and _has(study, name)]
    words = page.definitions({TITLES[name]: EXPLANATIONS[name] for name in labels})
    table = page.table(accuracy_table(study))
    return page.section(
        "accuracy",
        "Accuracy",
        page.beside(*(plot.html() for plot in plots), table),
        words,
        page.table(difference_table(study)),
    )


def _code(study: Study) -> str:
    winner = best(study)
    bits, model = winner or (max(study.settings.bits), "qat_learned")
    which = (
        f"The config at {bits} bits, the lowest without a loss" if winner else f"The config at {bits} bits"
    )
    text = f"{which}, for any model ({TITLES[model]})."
    code = page.code(config_code(bits, model))
    return page.section("code", "Code to paste", page.paragraph(text), code)


def _deployment(study: Study) -> str:
    return page.section("deployment", "Deployed models", page.table(deployment_table(study)))


def _details(
    study: Study, results: dict[str, Any], plots: dict[str, list[Plot]], signals: list[SignalError]
) -> Iterator[str]:
    def shown(group: str) -> str:
        return page.figures(plot.html() for plot in plots[group])

    if study.runs:
        batch = batch_table(study)
        yield page.details(
            "Spread over the seeds",
            page.table(accuracy_table(study, deviations=True, start=True)),
            page.definitions({TITLES["fp32"]: EXPLANATIONS["fp32"]}),
        )
        if batch.rows:
            yield page.details("Ranges from the batch", page.table(batch))
    if plots["training"]:
        note = (
            "The second half of the training, first seed: solid on test samples, dotted on training samples."
        )
        yield page.details("Training curves", page.paragraph(note, "note"), shown("training"))
    for content, name in (
        (size_table(study), "Model files"),
        (time_table(study), "Training time"),
    ):
        if content.rows:
            yield page.details(name, page.table(content))
    if study.layer_errors:
        content = layer_table(study)
        yield page.details(
            content.title, page.beside(*(p.html() for p in plots["errors"]), page.table(content))
        )
    if plots["weights"]:
        yield page.details("Weights", shown("weights"))
    how = (
        "A value x becomes the integer q = clamp(round(x / scale) + zero point, 0, levels − 1) and is read back as "
        "(q − zero point) · scale. Below, a noisy sine before and after."
    )
    signal = page.table(signal_table(signals))
    yield page.details("How quantization works", page.paragraph(how), shown("signal"), signal)
    yield page.details("How it was done", page.definitions(_facts(study, results)))


def _facts(study: Study, results: dict[str, Any]) -> dict[str, str]:
    settings, machine, versions = study.settings, results["machine"], results["versions"]
    layers = " → ".join(str(size) for size in results["network"]["layers"])
    epochs = plural(settings.epochs, "epoch")
    note = f" ({study.samples.note})" if study.samples.note else ""
    return {
        "Network": f"{study.float_network().description}, {layers}, {study.parameters:,} parameters.",
        "Training": f"{epochs} of FP32, then {epochs} of FP32 or QAT; Adam, learning rate from "
        f"{settings.learning_rate:g} to 0 along half a cosine in each half; batch {settings.batch_size}, cross "
        "entropy.",
        "Ranges": f"observed on {min(study.train_samples, CALIBRATION_SAMPLES):,} training samples before QAT, and for "
        "PTQ.",
        "Seeds": f"{settings.seed} to {settings.seed + settings.seeds - 1}: each one another split, other first "
        "weights and another order. The same seeds on the same machine give the same results.json, apart from its "
        "keys timing, machine, versions and date.",
        "Intervals": "of the paired differences: t · std · √(1/n + test/train), std at least one test sample (Nadeau "
        "and Bengio 2003).",
        "Diverged": "a training whose loss is not finite or rose (by a quarter and 0.1 nats above its lowest), or "
        "whose accuracy is that of guessing the most frequent class.",
        "Data": f"{study.samples.name}{note}, {study.train_samples:,} training and {study.test_samples:,} test samples "
        f"with the same share of each class; {plural(results['data']['features'], 'feature')}; classes "
        f"{', '.join(study.samples.class_names[:20])}.",
        "Machine": f"{machine['processor']}, {machine['system']}, {plural(int(machine['threads']), 'thread')} (one "
        f"for the study's network), device {machine['device']}. Kernels: {machine['kernels']}; "
        f"instruction set {machine['instruction set']}.",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "Time": f"{results['timing']['seconds']:.0f} s, ended {results['date']}.",
        "Files": "results.json beside this page holds every figure; models/ the model files; the plots are PNGs.",
    }


def _plots(study: Study, signals: list[SignalError]) -> dict[str, Iterator[Plot]]:
    return {
        "accuracy": _accuracy_plots(study),
        "training": _training_plots(study),
        "errors": _error_plots(study),
        "weights": _weight_plots(study),
        "signal": _signal_plots(signals),
    }


def _accuracy_plots(study: Study) -> Iterator[Plot]:
    found: dict[str, dict[int, Spread]] = {}
    left_out = []
    for model in study.settings.quantized_models:
        for bits in study.settings.bits:
            values = study.accuracies(model, bits)
            if study.divergences(model, bits):
                left_out.append(f"{TITLES[model]} at {bits} bits")
            elif values:
                found.setdefault(model, {})[bits] = Spread.of(list(values.values()))
    fp32 = study.accuracies("fp32_longer", FLOAT_BITS)
    if not found or not fp32:
        return
    words = [
        f"{TITLES[name]}: " + ", ".join(f"{bits} bits {spread.mean:.1%}" for bits, spread in by_bits.items())
        for name, by_bits in found.items()
    ]
    base = Spread.of(list(fp32.values()))
    caption = (
        "Mean over the seeds; bars and band: one standard deviation."
        if study.settings.seeds > 1
        else "One seed: its spread is not known."
    )
    if left_out:
        caption += f" Not drawn, because trainings diverged: {', '.join(left_out)}."
    yield Plot(
        "accuracy_over_bits",
        plot_accuracy_over_bits(found, base),
        f"Test accuracy over bits. FP32: {100 * base.mean:.1f}%. {'; '.join(words)}.",
        caption,
    )


def _error_plots(study: Study) -> Iterator[Plot]:
    if not study.layer_errors:
        return
    values = [error.output_error for error in study.layer_errors]
    yield Plot(
        "quantization_output_error",
        plot_layer_errors(study.layer_errors, "output_error", "Error of the outputs, relative"),
        f"Error of each layer's outputs over bits, from {min(values):.2%} to {max(values):.2%}; the table has all.",
        "PTQ MSE. Logarithmic axis.",
    )


def _training_plots(study: Study) -> Iterator[Plot]:
    for bits in study.settings.bits:
        trained = [name for name in study.settings.quantized_models if name.startswith("qat")]
        keys = [("fp32_longer", FLOAT_BITS), *((name, bits) for name in trained)]
        histories = {key[0]: study.histories[key] for key in keys if key in study.histories}
        if len(histories) < 2:
            continue
        last = [f"{TITLES[name]} {history.test_accuracy[-1]:.1%}" for name, history in histories.items()]
        yield Plot(
            f"training_{bits}bit",
            plot_training_history(histories),
            f"Loss and accuracy over the epochs at {bits} bits. Test accuracy after the last: {', '.join(last)}.",
            f"{bits} bits",
        )


def _weight_plots(study: Study) -> Iterator[Plot]:
    """Draws the weights at the lowest bits without a loss, or at the lowest bits if all have a loss."""
    winner = best(study)
    bits = winner[0] if winner else min(study.settings.bits)
    fp32, qat = study.weights.get(("fp32_longer", FLOAT_BITS)), study.weights.get(("qat_learned", bits))
    if fp32 is None or qat is None:
        return
    layers = [name for name, module in fp32.named_children() if isinstance(module, LAYERS)]
    for layer, figure in zip(layers, visualize_weight_distributions(fp32, qat, bits), strict=True):
        yield Plot(
            f"weights_{layer}_{bits}bit",
            figure,
            f"Histograms of the weights of {layer} in FP32, after PTQ and after QAT at {bits} bits.",
            f"Weights of {layer}: how many have which value. Each output channel has a grid of its own.",
        )


def _signal_plots(signals: list[SignalError]) -> Iterator[Plot]:
    for signal in signals:
        yield Plot(
            f"signal_{signal.num_bits}bit",
            plot_signal(signal),
            f"A noisy sine and its form on {signal.levels} levels; below, a histogram of the error, at most "
            f"{signal.max_error:.3g}.",
            f"{signal.num_bits} bits: mean error {signal.mean_error:.3g}",
        )


def _has(study: Study, model: str) -> bool:
    return any(run.model == model for run in study.runs)


class FolderError(ValueError):
    """A folder cannot take a report. The message is one line that says why and what is allowed."""


class ReportFolder:
    """A temporary folder beside ``out`` that replaces ``out`` when the report is finished.

    Args:
        out: Folder of the report. It does not exist, or is empty, or holds an earlier report and no other files.

    Raises:
        FolderError: ``out`` holds other files, is not a folder, or cannot be written.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out).resolve()
        check_replaceable(self.out)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
            self.path.chmod(0o777 & ~umask())  # mkdtemp's 0700 would hide the report from a web server
        except OSError as error:
            raise FolderError(f"{out}: cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> ReportFolder:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self.out.exists():
            shutil.rmtree(self._old, ignore_errors=True)

    @property
    def _old(self) -> Path:
        """Path of the earlier report while the new report is moved to its place."""
        return self.path.with_name(f"{self.path.name}-old")

    def finish(self, *, complete: bool) -> Path:
        """Moves the report to ``out``, or to ``out-partial`` if ``out`` holds a complete report and this is partial.

        Args:
            complete: Whether the study is complete.

        Returns:
            Path of the moved report.

        Raises:
            FolderError: Files that are not a report's have been written there in the meantime.
            OSError: The report cannot be moved.
        """
        place = self.out
        if not complete and _report(place).get("complete"):
            place = place.with_name(f"{place.name}-partial")
        check_replaceable(place)
        old = self._old
        if place.exists():
            place.rename(old)
        try:
            self.path.rename(place)
        except BaseException:
            if old.exists():
                old.rename(place)
            raise
        shutil.rmtree(old, ignore_errors=True)
        return place


def check_replaceable(folder: Path) -> None:
    """Raises FolderError if ``folder`` holds files that are not an earlier report's, or cannot be a report."""
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise FolderError(f"{folder}: is the current folder or holds it; name a new folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FolderError(f"{folder}: is a file; name a new folder, an empty one or an earlier report's")
    report = _report(folder)
    known = {"results.json", *report["files"]} if report else set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name not in known and (path.is_symlink() or not path.is_dir()):
            raise FolderError(
                f"{folder}: holds files that are not a report's ({name}); name a new folder, an empty one or an "
                "earlier report's"
            )


def _report(folder: Path) -> dict[str, Any]:
    """Returns results.json of an earlier report, or an empty dict if there is none."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    ours = (
        isinstance(results, dict)
        and results.get("program") == PROGRAM
        and isinstance(results.get("files"), list)
    )
    return results if ours else {}
