"""results.json: every figure of a study, in one documented shape.

Accuracies are shares from 0 to 1, losses nats, times seconds. A figure that is not there, or not finite, is null. The
same settings on the same machine give the same file, apart from the keys ``timing``, ``machine``, ``versions`` and
``date``::

    program           "qatfast compare"
    complete          false: the study was interrupted, and what is missing was not measured
    settings          what was asked for: data, target, bits, epochs, seeds, seed, device, batch_size, ...
    data              {name, features, classes, train_samples, test_samples}
    network           {layers: [in, hidden, hidden, out], parameters}
    models            {model: {title, explanation}}, what each model is
    verdict           {bits, model, code}: the lowest bits without a loss, ptq or qat_finetuned, and code to paste; all
                      null where no bits are known to be without a loss
    accuracy          [{model, bits, diverged, accuracy, accuracy_batch_1, accuracy_batch_256, loss}]: diverged is how
                      many trainings did, each figure {mean, std, values}: values one per seed, std null for one seed
    runs              [{seed, model, bits, loss, accuracy, accuracy_batch_1, accuracy_batch_256, diverged}]: diverged
                      is how the training failed, empty where it did not
    insights          [{kind, bits, value, margin, clear, text}], the headline first, then a verdict per bit width
    histories         [{model, bits, train_loss, train_accuracy, test_loss, test_accuracy}] of the first seed, each a
                      list with one figure an epoch
    layer_errors      [{model, bits, layer, weight_error, output_error}] of the first seed
    signal            [{num_bits, scale, zero_point, levels, mean_error, max_error}]
    sizes             [{model, bits, bytes, file}] of the first seed; file relative to this file's folder
    files             every file of the report, relative to this file's folder
    timing            {seconds, steps: [{network, model, seconds, ratio, quartiles}], insights: [text]}
    machine           {processor, system, threads, device, kernels, instruction set}
    versions          {qatfast, torch, numpy, python}
    date              when the study ended, ISO 8601, UTC

``bits`` is 32 for a float model.
"""

from __future__ import annotations

import math
import platform
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qatfast import __version__, kernels

from .experiments import Study
from .insights import best, find_insights, time_insights
from .names import EXPLANATIONS, TITLES
from .networks import config_code
from .noise import Spread
from .signal_error import SignalError

PROGRAM = "qatfast compare"
FIGURES = ("accuracy", "accuracy_batch_1", "accuracy_batch_256", "loss")


def as_json(study: Study, signals: list[SignalError], *, seconds: float) -> dict[str, Any]:
    """The study in the shape of results.json, without ``files``.

    Args:
        study: complete or interrupted.
        signals: the quantized signal at each bit width.
        seconds: that the study took.

    Returns:
        A dict that ``json.dumps`` takes with ``allow_nan=False``.
    """
    samples, settings = study.samples, study.settings
    features, classes = samples.inputs.shape[1], len(samples.class_names)
    hidden = settings.hidden_features
    results = {
        "program": PROGRAM,
        "complete": study.complete,
        "settings": {**asdict(settings), "bits": list(settings.bits)},
        "data": {
            "name": samples.name,
            "features": features,
            "classes": list(samples.class_names),
            "train_samples": study.train_samples,
            "test_samples": study.test_samples,
        },
        "network": {"layers": [features, hidden, hidden, classes], "parameters": study.parameters},
        "models": {model: {"title": TITLES[model], "explanation": EXPLANATIONS[model]} for model in TITLES},
        "verdict": _verdict(study),
        "accuracy": _accuracy(study),
        "runs": [asdict(run) for run in study.runs],
        "insights": [asdict(insight) for insight in find_insights(study)],
        "histories": [
            {"model": model, "bits": bits, **asdict(history)}
            for (model, bits), history in study.histories.items()
        ],
        "layer_errors": [asdict(error) for error in study.layer_errors],
        "signal": [_signal(signal) for signal in signals],
        "sizes": [asdict(size) for size in study.sizes],
        "timing": {
            "seconds": seconds,
            "steps": [asdict(entry) for entry in study.step_times],
            "insights": time_insights(study.step_times),
        },
        "machine": _machine(settings.device),
        "versions": {
            "qatfast": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return _finite(results)


def _verdict(study: Study) -> dict[str, Any]:
    bits, model = best(study) or (None, None)
    code = None if bits is None else config_code(bits, train=model == "qat_finetuned")
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
            **{
                name: asdict(Spread.of(list(study.accuracies(model, bits, name).values())))
                for name in FIGURES
            },
        }
        for model, bits in keys
    ]


def _signal(signal: SignalError) -> dict[str, Any]:
    names = ("num_bits", "scale", "zero_point", "levels", "mean_error", "max_error")
    return {name: getattr(signal, name) for name in names}


def _machine(device: str) -> dict[str, str]:
    facts = kernels.info()
    return {
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "device": device,
        "kernels": facts.get("kernels", ""),
        "instruction set": facts.get("instruction set", ""),
    }


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
