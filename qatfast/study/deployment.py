"""Deployed models: the integer model of convert and its ONNX file, compared with the trained model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import qatfast
from qatfast.bench.results import spread
from qatfast.bench.timer import time_in_turns, turn_of

from .data import Dataset

LATENCY_BATCHES = (1, 64)


@dataclass(frozen=True)
class Latency:
    """The time of one forward of the integer model, as a multiple of that of FP32.

    Args:
        batch: Samples per forward.
        ratio: Median of the ratios turn by turn.
        quartiles: First and third quartile of these ratios.
    """

    batch: int
    ratio: float
    quartiles: tuple[float, float]


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file in onnxruntime, with all its optimizations.

    Args:
        bytes: Size of the file.
        file: Path relative to the report's folder.
        accuracy: Share of the test samples classified correctly.
        differing_predictions: Test samples that it classifies in another way than the trained model.
        compared: Integers compared with those of the integer model.
        differing: How many of them differ.
    """

    bytes: int
    file: str
    accuracy: float
    differing_predictions: int
    compared: int
    differing: int


@dataclass(frozen=True)
class Deployment:
    """A trained model as integers (first seed).

    Args:
        model: A key of TITLES.
        bits: Bits of the hidden layers.
        bytes: Size of the file that :func:`qatfast.save` writes.
        file: Path relative to the report's folder.
        accuracy: Share of the test samples that the integer model classifies correctly.
        differing_predictions: Test samples that it classifies in another way than the trained model.
        compared: Scores compared with those of the trained model.
        differing: How many of them differ, in any bit.
        latencies: Times of a forward.
        onnx: None if onnx, onnxscript or onnxruntime is not installed.
    """

    model: str
    bits: int
    bytes: int
    file: str
    accuracy: float
    differing_predictions: int
    compared: int
    differing: int
    latencies: tuple[Latency, ...]
    onnx: OnnxFile | None


@torch.no_grad()
def deploy(
    name: str,
    bits: int,
    trained: nn.Module,
    fp32: nn.Module,
    data: Dataset,
    folder: Path,
    *,
    repetitions: int,
) -> Deployment:
    """Converts and saves a trained model, exports it if that is possible, and compares all of them on the test samples.

    Args:
        name: A key of TITLES.
        bits: Bits of its hidden layers.
        trained: A prepared model after training.
        fp32: The float model, for the times.
        data: The samples.
        folder: Folder of the report. The files go into its subfolder ``models``.
        repetitions: Number of timings of a forward; 0 means none.
    """
    deployed = qatfast.convert(trained)
    path = folder / "models" / f"{name}_{bits}bit.safetensors"
    qatfast.save(deployed, path)
    expected, found = trained.eval()(data.test_inputs), deployed(data.test_inputs)
    accuracy, differing_predictions = _compared(found, expected, data.test_labels)
    return Deployment(
        model=name,
        bits=bits,
        bytes=path.stat().st_size,
        file=path.relative_to(folder).as_posix(),
        accuracy=accuracy,
        differing_predictions=differing_predictions,
        compared=expected.numel(),
        differing=int((found != expected).sum()),
        latencies=_latencies(deployed, fp32, data.test_inputs, repetitions) if repetitions else (),
        onnx=_onnx_file(deployed, expected, data, path.with_suffix(".onnx"), folder),
    )


def _compared(scores: Tensor, expected: Tensor, labels: Tensor) -> tuple[float, int]:
    """Returns the accuracy, and how many predictions differ from those of the expected scores."""
    predictions = scores.argmax(1)
    return float((predictions == labels).float().mean()), int((predictions != expected.argmax(1)).sum())


def _latencies(deployed: nn.Module, fp32: nn.Module, inputs: Tensor, repetitions: int) -> tuple[Latency, ...]:
    found = []
    for batch in LATENCY_BATCHES:
        samples, device = inputs[:batch], str(inputs.device)
        turns = {
            name: turn_of(_forward(model.eval(), samples), device)
            for name, model in (("fp32", fp32), ("integer", deployed))
        }
        seconds = time_in_turns(turns, seconds=0, min_rounds=repetitions)
        pairs = zip(seconds["integer"], seconds["fp32"], strict=True)
        ratio = spread([integer / base for integer, base in pairs])
        found.append(Latency(len(samples), ratio.median, (ratio.low, ratio.high)))
    return tuple(found)


def _forward(model: nn.Module, inputs: Tensor) -> Callable[[], tuple[Tensor]]:
    return lambda: (model(inputs),)


def _onnx_file(
    deployed: nn.Module, expected: Tensor, data: Dataset, path: Path, folder: Path
) -> OnnxFile | None:
    if not all(find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime")):
        return None
    import onnxruntime

    import qatfast.onnx

    inputs = data.test_inputs.cpu()
    report = qatfast.onnx.export(deployed, inputs, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    accuracy, differing_predictions = _compared(
        torch.from_numpy(scores), expected.cpu(), data.test_labels.cpu()
    )
    return OnnxFile(
        report.bytes,
        path.relative_to(folder).as_posix(),
        accuracy,
        differing_predictions,
        report.compared,
        report.differing,
    )
