"""The results of a study as results.json, and as tables for the terminal and the page.

In results.json accuracies are shares from 0 to 1, losses are in nats and times in seconds. A figure that is missing or
not finite is null. The same settings on the same machine give the same file, apart from the keys ``timing``,
``machine``, ``versions`` and ``date``::

    program           "qatfast compare"
    complete          false if the study was interrupted; what is missing was not measured then
    settings          settings of the study: data, target, network, bits, epochs, seeds, seed, device, ...
    data              {name, features, classes, train_samples, test_samples}
    network           {layers: [in, hidden, hidden, out], parameters}
    models            {model: {title, explanation}}
    verdict           {bits, model, code}: the lowest bits without a loss, ptq_mse or qat_learned, and code to paste;
                      all null if no bits are known to be without a loss
    accuracy          [{model, bits, diverged, accuracy, accuracy_batch_1, loss}]: diverged is the number of trainings
                      that diverged, each figure is {mean, std, values} with one value per seed and std null for one
                      seed; accuracy_batch_1 is null for models that do not depend on the batch
    differences       [{model, against, bits, mean, margin, clear}]: accuracy of model minus that of against, paired by
                      seed, a share; margin is half the 95 % interval, null for one seed
    runs              [{seed, model, bits, loss, accuracy, accuracy_batch_1, diverged}]: diverged says how the training
                      failed, and is empty if it did not fail
    insights          [{kind, bits, value, margin, clear, text}], the headline first, then a verdict per bit width
    histories         [{model, bits, train_loss, train_accuracy, test_loss, test_accuracy}] of the first seed: lists
                      with one figure per epoch
    layer_errors      [{model, bits, layer, weight_error, output_error}] of the first seed
    signal            [{num_bits, scale, zero_point, levels, mean_error, max_error}]
    deployment        [{model, bits, bytes, file, accuracy, differing_predictions, compared, differing, onnx}] of the
                      first seed: the integer model compared with the trained one; onnx: {bytes, file, accuracy,
                      differing_predictions, compared, differing} in onnxruntime, null if it is not installed
    sizes             [{model, bits, bytes, file}] of the first seed: file is relative to the folder of results.json
    files             all files of the report, relative to the folder of results.json
    timing            {seconds, steps: [{network, model, seconds, ratio, quartiles}],
                      forwards: [{model, bits, batch, ratio, quartiles}] of deployed models, insights: [text]}
    machine           {processor, cores, caches, system, threads, instruction set, kernels, device, ...}: texts
    versions          {qatfast, torch, numpy, python}
    date              end of the study, ISO 8601, UTC

``bits`` is 32 for a float model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

from qatfast.bench.machine import machine, versions

from .data import plural
from .deployment import LATENCY_BATCHES
from .experiments import Study
from .insights import (
    RIVALS,
    Difference,
    Spread,
    best,
    difference_of,
    difference_to_fp32,
    find_insights,
    time_insights,
)
from .networks import EXPLANATIONS, FLOAT_BITS, TITLES, config_code
from .signals import SignalError, describe

PROGRAM = "qatfast compare"
FIGURES = ("accuracy", "accuracy_batch_1", "loss")


def as_json(study: Study, signals: list[SignalError], *, seconds: float) -> dict[str, Any]:
    """Returns the study in the shape of results.json, without ``files``.

    Args:
        study: A complete or interrupted study.
        signals: The quantized signal at each bit width.
        seconds: Duration of the study.

    Returns:
        A dict that ``json.dumps`` accepts with ``allow_nan=False``.
    """
    samples, settings = study.samples, study.settings
    results = {
        "program": PROGRAM,
        "complete": study.complete,
        "settings": {**asdict(settings), "bits": list(settings.bits)},
        "data": {
            "name": samples.name,
            "features": samples.inputs.shape[1],
            "classes": list(samples.class_names),
            "train_samples": study.train_samples,
            "test_samples": study.test_samples,
        },
        "network": {"layers": study.float_network().sizes, "parameters": study.parameters},
        "models": {model: {"title": TITLES[model], "explanation": EXPLANATIONS[model]} for model in TITLES},
        "verdict": _verdict(study),
        "accuracy": _accuracy(study),
        "differences": [
            {
                "model": model,
                "against": against,
                "bits": bits,
                "mean": found.mean,
                "margin": found.margin,
                "clear": found.clear,
            }
            for (model, against), by_bits in differences(study).items()
            for bits, found in by_bits.items()
        ],
        "runs": [asdict(run) for run in study.runs],
        "insights": [asdict(insight) for insight in find_insights(study)],
        "histories": [
            {"model": model, "bits": bits, **asdict(history)}
            for (model, bits), history in study.histories.items()
        ],
        "layer_errors": [asdict(error) for error in study.layer_errors],
        "signal": [_signal(signal) for signal in signals],
        "deployment": [asdict(replace(entry, latencies=())) for entry in study.deployments],
        "sizes": [asdict(size) for size in study.sizes],
        "timing": {
            "seconds": seconds,
            "steps": [asdict(entry) for entry in study.step_times],
            "forwards": [
                {"model": entry.model, "bits": entry.bits, **asdict(latency)}
                for entry in study.deployments
                for latency in entry.latencies
            ],
            "insights": time_insights(study.step_times),
        },
        "machine": {**machine(), "device": settings.device},
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return _finite(results)


def _verdict(study: Study) -> dict[str, Any]:
    bits, model = best(study) or (None, None)
    code = None if bits is None or model is None else config_code(bits, model)
    return {"bits": bits, "model": model, "code": code}


def _accuracy(study: Study) -> list[dict[str, Any]]:
    keys = sorted(
        {(run.model, run.bits) for run in study.runs}, key=lambda key: (list(TITLES).index(key[0]), -key[1])
    )
    return [
        {
            "model": model,
            "bits": bits,
            "diverged": len(study.divergences(model, bits)),
            **{name: _figure(study, model, bits, name) for name in FIGURES},
        }
        for model, bits in keys
    ]


def _figure(study: Study, model: str, bits: int, name: str) -> dict[str, Any] | None:
    values = list(study.accuracies(model, bits, name).values())
    return asdict(Spread.of(values)) if values else None


def differences(study: Study) -> dict[tuple[str, str], dict[int, Difference]]:
    """Returns the differences that a report lists, by the two models and the bits.

    These are each quantized model minus FP32, and the pairs of RIVALS. A mean over diverged trainings is left out.
    """
    models, bits = study.settings.quantized_models, study.settings.bits
    found = {
        (model, "fp32_longer"): {b: difference_to_fp32(study, model, b) for b in bits} for model in models
    }
    for first, second in RIVALS:
        if first in models and second in models:
            found[first, second] = {b: difference_of(study, first, second, b) for b in bits}
    failed = {(model, b) for model in models for b in bits if study.divergences(model, b)}
    return {
        pair: {
            b: difference
            for b, difference in by_bits.items()
            if difference is not None and not {(model, b) for model in pair} & failed
        }
        for pair, by_bits in found.items()
    }


def _signal(signal: SignalError) -> dict[str, Any]:
    names = ("num_bits", "scale", "zero_point", "levels", "mean_error", "max_error")
    return {name: getattr(signal, name) for name in names}


def _finite(value: Any) -> Any:
    """Returns ``value`` with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        title: What the table shows.
        explanation: One or two sentences about the meaning of its numbers.
        header: One text per column. The first column names the rows.
        rows: As many texts per row.
        text_columns: Number of columns from the left that hold words. The others hold numbers.
    """

    title: str
    explanation: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    text_columns: int = 1


def accuracy_table(study: Study, *, deviations: bool = False, start: bool = False) -> Table:
    """Returns the test accuracy of each model at each bit width.

    Args:
        study: A complete or interrupted study.
        deviations: Whether to add the standard deviation over the seeds.
        start: Whether to add FP32 after the first half of the training.
    """
    spread = "one seed"
    if study.settings.seeds > 1:
        seeds = plural(study.settings.seeds, "seed")
        spread = f"mean ± standard deviation over {seeds}" if deviations else f"mean over {seeds}"
    explanation = (
        f"In percent, {spread}; one of {plural(study.test_samples, 'test sample')} is "
        f"{100 / max(1, study.test_samples):.2f}."
    )
    rows = []
    for model in (name for name in TITLES if start or name != "fp32"):
        cells = [_accuracy_cell(study, model, width, deviations) for width in widths(study)]
        if any(cells):
            rows.append((TITLES[model], *cells))
    return Table("Test accuracy", explanation, _header(study), rows)


def difference_table(study: Study) -> Table:
    """Returns the differences between models at each bit width, with their 95 % intervals."""
    explanation = (
        "Points of test accuracy between two models: mean over paired seeds ± half the 95 % interval"
        if study.settings.seeds > 1
        else "Points of test accuracy between two models; one seed has no interval"
    )
    rows = []
    for (model, against), by_bits in differences(study).items():
        cells = [found.points if (found := by_bits.get(width)) else "" for width in study.settings.bits]
        if any(cells):
            rows.append((f"{TITLES[model]} − {TITLES[against]}", *cells))
    return Table("Differences", f"{explanation}.", _header(study)[:1] + _header(study)[2:], rows)


def batch_table(study: Study) -> Table:
    """Returns the accuracies with batch 1 and batch 256 of the models that take their ranges from the batch."""
    explanation = (
        "A model that takes each range from the batch itself, as in training: one test sample at a time / 256 at a "
        "time. The ranges depend on the other samples of the batch, so the same sample may be classified "
        "differently. In percent, mean over the seeds. All other models give the same result for any batch."
    )
    bits = study.settings.bits
    rows = []
    for model, title in TITLES.items():
        cells = [_both_batches(study, model, width) for width in bits]
        if any(cells):
            rows.append((title, *cells))
    return Table("Ranges from the batch", explanation, _header(study)[:1] + _header(study)[2:], rows)


def size_table(study: Study) -> Table:
    """Returns the sizes of the model files."""
    explanation = (
        "Bytes of the files in models/, and how many times smaller than FP32: float weights as torch.save writes them; "
        "else packed integers with their scales. Below 8 bits the first and the last layer keep 8 bits. "
        "The names and shapes in each file weigh more the smaller the network is."
    )
    bits = study.settings.bits
    found = {(file.model, file.bits): file.bytes for file in study.sizes}
    fp32 = found.get(("fp32_longer", FLOAT_BITS))
    rows = [] if fp32 is None else [("FP32", f"{fp32:,}", *[""] * len(bits))]
    for model, title in (
        ("ptq_mse", "PTQ and QAT"),
        ("qat_tutorial", TITLES["qat_tutorial"]),
    ):
        cells = [_bytes(found.get((model, width)), fp32) for width in bits]
        if any(cells):
            rows.append((title, "", *cells))
    return Table("Model file", explanation, _header(study), rows)


def deployment_table(study: Study) -> Table:
    """Returns the deployed models beside the trained ones."""
    explanation = (
        "QAT learned as integers (qatfast.convert, qatfast.save) and as an ONNX file in onnxruntime, first seed. "
        "Predictions and scores that differ are those of the trained model on the test samples; integers those that "
        "onnxruntime gives between the layers. Time: a forward of the integer model, times FP32."
    )
    found = {entry.bits: entry for entry in study.deployments}
    entries = [found.get(width) for width in study.settings.bits]
    onnx = [entry and entry.onnx for entry in entries]

    def share(differing: int, of: int) -> str:
        return f"{differing:,} of {of:,}"

    samples = study.test_samples
    rows = [
        ("File, bytes", *(f"{e.bytes:,}" if e else "" for e in entries)),
        ("Accuracy, %", *(f"{100 * e.accuracy:.1f}" if e else "" for e in entries)),
        ("Predictions that differ", *(share(e.differing_predictions, samples) if e else "" for e in entries)),
        ("Scores that differ", *(share(e.differing, e.compared) if e else "" for e in entries)),
        ("ONNX file, bytes", *(f"{o.bytes:,}" if o else "" for o in onnx)),
        ("ONNX accuracy, %", *(f"{100 * o.accuracy:.1f}" if o else "" for o in onnx)),
        (
            "ONNX predictions that differ",
            *(share(o.differing_predictions, samples) if o else "" for o in onnx),
        ),
        ("ONNX integers that differ", *(share(o.differing, o.compared) if o else "" for o in onnx)),
    ]
    for index, batch in enumerate(LATENCY_BATCHES):
        times = [e.latencies[index].ratio if e and e.latencies else None for e in entries]
        rows.append((f"Time, batch {batch}", *("" if time is None else f"{time:.2f}" for time in times)))
    rows = [row for row in rows if any(row[1:])]
    return Table("Deployed models", explanation, _header(study)[:1] + _header(study)[2:], rows)


def time_table(study: Study) -> Table:
    """Returns the times of a training step."""
    explanation = (
        "Median time of a training step (forward, backward, Adam), in turns with the other networks. Times FP32: "
        "the median of the ratios turn by turn, and their middle half. QAT learned has 8 bits, and tutorial code is "
        "plain PyTorch with 8 bits."
    )
    titles = {"fp32": "FP32", "tutorial": "Tutorial code", "qatfast": TITLES["qat_learned"]}
    rows = [
        (
            entry.network,
            titles[entry.model],
            _milliseconds(entry.seconds),
            f"{entry.ratio:.2f}",
            "" if entry.model == "fp32" else "–".join(f"{ratio:.2f}" for ratio in entry.quartiles),
        )
        for entry in study.step_times
    ]
    return Table("Training time", explanation, ("network", "", "ms", "times FP32", "middle half"), rows, 2)


def layer_table(study: Study) -> Table:
    """Returns the relative quantization error of each layer."""
    explanation = (
        "Norm of the error of PTQ MSE in percent of the norm of the float values (first seed): the weights alone / the "
        "output for the test samples, with the errors of the layers before it. Give more bits to a layer with a much "
        "larger error than the others."
    )
    bits = study.settings.bits
    found = {(e.layer, e.bits): e for e in study.layer_errors}
    rows = []
    for layer in dict.fromkeys(error.layer for error in study.layer_errors):
        errors = [found.get((layer, width)) for width in bits]
        cells = [
            f"{100 * e.weight_error:.2g} / {100 * e.output_error:.2g}" if e is not None else ""
            for e in errors
        ]
        rows.append((layer, *cells))
    return Table("Error of each layer", explanation, _header(study)[:1] + _header(study)[2:], rows)


def signal_table(signals: list[SignalError]) -> Table:
    """Returns the figures of the quantized signal at several bit widths."""
    explanation = (
        "The scale is the interval between adjacent levels. Rounding changes a value in the range by at most half of "
        "it. The zero point is the integer that stands for 0.0."
    )
    columns = [describe(signal) for signal in signals]
    header, *rest = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return Table("A signal", explanation, tuple(header), rest)


def widths(study: Study) -> tuple[int, ...]:
    """Returns the bits of all tables and figures, in their order."""
    return (FLOAT_BITS, *study.settings.bits)


def _header(study: Study) -> tuple[str, ...]:
    return ("", *(f"{width} bits" for width in widths(study)))


def _both_batches(study: Study, model: str, bits: int) -> str:
    batch_1, batch_256 = study.accuracies(model, bits, "accuracy_batch_1"), study.accuracies(model, bits)
    means = (
        f"{100 * Spread.of(list(values.values())).mean:.1f}" for values in (batch_1, batch_256) if batch_1
    )
    return " / ".join(means)


def _accuracy_cell(study: Study, model: str, bits: int, deviations: bool) -> str:
    """Returns a text such as ``96.7 ± 0.5``, or the number of diverged trainings, whose mean is meaningless."""
    values, failed = study.accuracies(model, bits), study.divergences(model, bits)
    if failed:
        return f"{len(failed)} of {len(values)} diverged" if len(values) > 1 else "diverged"
    return _percent(values, deviations)


def _bytes(size: int | None, fp32: int | None) -> str:
    if size is None:
        return ""
    return f"{size:,}" if fp32 is None or size == fp32 else f"{size:,} ({fp32 / size:.1f}×)"


def _percent(values: dict[int, float], deviation: bool) -> str:
    if not values:
        return ""
    spread = Spread.of(list(values.values()))
    mean = f"{100 * spread.mean:.1f}"
    return (
        mean if spread.std is None or not deviation else f"{mean} ±\N{NO-BREAK SPACE}{100 * spread.std:.1f}"
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 0.1 else f"{1000 * seconds:.0f}"
