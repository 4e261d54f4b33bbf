"""``qatfast compare``: runs the study, prints its verdict and writes its report."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from qatfast import kernels

from .data import DataError, load_samples, plural
from .experiments import Settings, Study, count_trainings, run_study
from .insights import best, definition, find_insights, time_insights
from .networks import EDGE_BITS, config_code
from .report import ReportFolder, write_report
from .results import (
    Table,
    accuracy_table,
    batch_table,
    deployment_table,
    difference_table,
    layer_table,
    signal_table,
    size_table,
    time_table,
)
from .signals import SignalError, quantize_signal
from .training import study_progress

INTERRUPTED = 130
"""The exit code after Ctrl-C."""


def run_compare(settings: Settings, out: str | Path, *, verbose: bool = False) -> int:
    """Runs the study of ``settings`` and writes its report into ``out``. Ctrl-C leaves a partial report.

    Args:
        settings: Valid settings.
        out: Folder of the report.
        verbose: Whether to print every table too.

    Returns:
        The exit code: 0, or 130 if Ctrl-C ended the study.

    Raises:
        DataError: The data cannot be used.
        FolderError: ``out`` cannot take a report.
        OSError: A file of the report cannot be written.
    """
    samples = load_samples(settings.data, settings.target, seed=settings.seed)
    if settings.network == "cnn" and not samples.shape:
        raise DataError(
            f"--network cnn: expected images or signals (--data digits or mnist1d), got {samples.name}; "
            "write --network mlp"
        )
    study = Study(settings, samples)
    start = time.monotonic()
    with ReportFolder(out) as folder, warnings.catch_warnings():
        # _announcement says the same in one line
        warnings.filterwarnings("ignore", message="qatfast (runs without its|has no) compiled kernels")
        _print(_announcement(study))
        try:
            with study_progress(count_trainings(settings), settings.epochs) as progress:
                run_study(study, folder.path, progress.training)
        except KeyboardInterrupt:
            _print(["", "Interrupted: the report will hold what was finished."])
        signals = [quantize_signal(bits) for bits in settings.bits]
        write_report(study, signals, folder.path, seconds=time.monotonic() - start)
        place = folder.finish(complete=study.complete)
    _print(_results(study, signals, verbose))
    winner = best(study)
    if verbose and winner:
        bits, model = winner
        print(config_code(bits, model))
    elif not verbose:
        print("The report has the config as code to paste. Every table: --verbose.")
    print(f"{'Report' if study.complete else 'Partial report'}: {place / 'index.html'}")
    return 0 if study.complete else INTERRUPTED


def _announcement(study: Study) -> Iterator[str]:
    samples, settings = study.samples, study.settings
    features, classes = samples.inputs.shape[1], len(samples.class_names)
    note = f" ({samples.note})" if samples.note else ""
    yield (
        f"{samples.name}{note}: {plural(len(samples.labels), 'sample')}, {plural(features, 'feature')}, "
        f"{plural(classes, 'class', 'classes')}"
    )
    layers = " → ".join(map(str, study.float_network().sizes))
    kind = {"mlp": "Network", "cnn": "Convolutional network"}[settings.network]
    yield (
        f"{kind} {layers}; {plural(count_trainings(settings), 'training')} of "
        f"{plural(settings.epochs, 'epoch')}: {plural(settings.seeds, 'seed')}"
    )
    if kernels.reason():
        yield f"Without compiled kernels, slower, same results: {kernels.reason()}"


def _results(study: Study, signals: list[SignalError], verbose: bool) -> Iterator[str]:
    insights = find_insights(study)
    yield ""
    yield from (insight.text for insight in insights if insight.kind == "headline")
    verdicts = [insight.text for insight in insights if insight.kind == "verdict"]
    yield from (f"  {text}" for text in verdicts)
    if verdicts:
        yield f"{definition(study)} Below {EDGE_BITS} bits the first and the last layer keep {EDGE_BITS}."
    if study.runs:
        yield from _lines(accuracy_table(study, deviations=verbose, start=verbose))
        if verbose or study.settings.every_model:  # the verdicts have the differences of the default models
            yield from _lines(difference_table(study))
    if verbose:
        others = (deployment_table, batch_table, layer_table, size_table, time_table)
        for table in (*(make(study) for make in others), signal_table(signals)):
            if table.rows:
                yield from _lines(table)
    findings = [insight.text for insight in insights if insight.kind not in ("headline", "verdict")]
    findings += time_insights(study.step_times)
    if findings:
        yield ""
        yield from (f"- {text}" for text in findings)
    yield ""


def _lines(table: Table) -> Iterator[str]:
    """Returns the table in columns, with words aligned to the left and numbers to the right."""
    rows = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]
    yield ""
    yield f"{table.title}. {table.explanation}"
    for row in rows:
        cells = [
            cell.ljust(width) if column < table.text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def _print(lines: Iterator[str] | list[str]) -> None:
    """Prints lines, wrapped to the width of the terminal, or to 100 columns if there is none."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100
    for line in lines:
        indent = line[: len(line) - len(line.lstrip(" -"))]
        if not (line.startswith("  ") and "  " in line.strip()):  # not the row of a table
            hanging = " " * (len(indent) + 2 * line.startswith("  "))
            line = textwrap.fill(
                line,
                max(columns, 40),
                subsequent_indent=hanging,
                break_on_hyphens=False,
                break_long_words=False,
            )
        # they have kept a figure and its margin on one line
        print(line.replace("\N{NO-BREAK SPACE}", " "))
    sys.stdout.flush()
