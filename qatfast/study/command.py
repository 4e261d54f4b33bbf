"""``qatfast compare``: runs the study, shows its tables, writes its report."""

from __future__ import annotations

import itertools
import time
import warnings
from pathlib import Path

from rich.console import Console

from qatfast import kernels

from .data import load_samples
from .experiments import Settings, Study, count_trainings, run_study
from .folder import ReportFolder
from .insights import find_insights, time_insights
from .progress import StudyBar
from .report import write_report
from .signal_error import SignalError, quantize_signal
from .tables import (
    accuracy_table,
    batch_table,
    layer_table,
    print_table,
    signal_table,
    size_table,
    time_table,
)

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended."""


def run_compare(settings: Settings, out: str | Path) -> int:
    """Runs the study of ``settings`` and leaves its report in ``out``; Ctrl-C leaves a partial one.

    Args:
        settings: valid ones.
        out: folder of the report.

    Returns:
        The exit code: 0, or 130 where Ctrl-C ended the study.

    Raises:
        DataError: the data cannot be used.
        FolderError: ``out`` cannot take a report.
        OSError: a file of the report cannot be written.
    """
    console = _console()
    samples = load_samples(settings.data, settings.target, seed=settings.seed)
    study = Study(settings, samples)
    start = time.monotonic()
    with ReportFolder(out) as folder, warnings.catch_warnings():
        # said once below, in one line
        warnings.filterwarnings("ignore", message="qatfast (runs without its|has no) compiled kernels")
        _announce(console, study)
        try:
            with StudyBar(count_trainings(settings) * settings.epochs, settings.epochs) as bar:
                run_study(study, folder.path, bar.training)
        except KeyboardInterrupt:
            console.print("Interrupted: the report will hold what was finished.")
        signals = [quantize_signal(bits) for bits in settings.bits]
        write_report(study, signals, folder.path, seconds=time.monotonic() - start)
        place = folder.finish(complete=study.complete)
    _print_results(console, study, signals)
    console.print(
        f"\n{'Report' if study.complete else 'Partial report'}: {place / 'index.html'}", soft_wrap=True
    )
    return 0 if study.complete else INTERRUPTED


def _print_results(console: Console, study: Study, signals: list[SignalError]) -> None:
    tables = [
        accuracy_table(study),
        batch_table(study),
        layer_table(study),
        size_table(study),
        time_table(study),
    ]
    for table in [*tables, signal_table(signals)]:
        if table.rows:
            print_table(console, table)
    for sentence in [*(insight.text for insight in find_insights(study)), *time_insights(study.step_times)]:
        console.print(f"- {sentence}", highlight=False)


def _announce(console: Console, study: Study) -> None:
    samples, settings = study.samples, study.settings
    features, classes, hidden = samples.inputs.shape[1], len(samples.class_names), settings.hidden_features
    layers = [features, hidden, hidden, classes]
    parameters = sum((before + 1) * after for before, after in itertools.pairwise(layers))
    console.print(
        f"{samples.name}: {len(samples.labels):,} samples, features: {features}, classes: {classes}. "
        f"Network {' → '.join(map(str, layers))}, {parameters:,} parameters, the same for FP32 and QAT. "
        f"{count_trainings(settings)} trainings of {settings.epochs} epoch{'s' if settings.epochs > 1 else ''}.",
        highlight=False,
    )
    if kernels.reason():
        console.print(f"Without compiled kernels, slower, same results: {kernels.reason()}", highlight=False)


def _console() -> Console:
    """A terminal's own width; 110 columns in a file."""
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=110, markup=False)
