"""The experiments: FP32, PTQ and QAT, trained and measured on the same samples for several seeds and bit widths."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import nn

from qatfast.bench.timer import one_thread

from .data import Dataset, Samples, split
from .deployment import Deployment, deploy
from .networks import (
    COMPARED,
    FLOAT_BITS,
    TITLES,
    SmallConvNet,
    ThreeLayerNet,
    count_parameters,
    float_network,
    quantize_layers,
)
from .ptq import LayerError, layer_errors
from .size import save_float, save_quantized
from .timing import StepTime, time_training_steps
from .training import (
    Epoch,
    Evaluation,
    History,
    divergence,
    evaluate_model,
    seeded,
    train_model,
)

CALIBRATION_SAMPLES = 1024
"""Ranges are observed on at most this many training samples."""


@dataclass(frozen=True)
class Settings:
    """What a study does.

    Args:
        data: ``synthetic``, ``digits``, ``mnist1d``, or the path of a .csv or .npz file.
        target: Label column or array of a file.
        bits: Bit widths, each 2 to 16.
        epochs: Epochs of each training. Models are compared after two trainings: FP32, then FP32 or QAT.
        seeds: Number of repetitions, with ``seed``, ``seed + 1``, ...
        seed: The first seed.
        device: Device of the networks.
        batch_size: Samples per training step.
        learning_rate: Learning rate of Adam at the start of each training. It falls to 0 along half a cosine.
        network: ``mlp`` (three linear layers) or ``cnn`` (two convolutions with BatchNorm and a linear layer, for
            images and signals).
        hidden_features: Outputs of the first and the second layer of ``mlp``.
        channels: Outputs of the first and the second layer of ``cnn``.
        timing_repetitions: Number of timings of a training step. 0 means that no times are taken.
        every_model: Whether to train all models, or those that a verdict compares only.
    """

    data: str = "digits"
    target: str | None = None
    bits: tuple[int, ...] = (8, 4, 3, 2)
    epochs: int = 20
    seeds: int = 7
    seed: int = 42
    device: str = "cpu"
    batch_size: int = 32
    learning_rate: float = 2e-3
    network: str = "mlp"
    hidden_features: int = 128
    channels: int = 32
    timing_repetitions: int = 30
    every_model: bool = False

    @property
    def hidden(self) -> int:
        """Outputs of the first and the second layer."""
        return self.hidden_features if self.network == "mlp" else self.channels

    @property
    def quantized_models(self) -> tuple[str, ...]:
        """Keys of the quantized models that the study measures, in the order of TITLES."""
        quantized = (name for name in TITLES if not name.startswith("fp32"))
        return tuple(name for name in quantized if self.every_model or name in COMPARED)


@dataclass(frozen=True)
class Run:
    """Loss and accuracy of one model of one seed on the test samples.

    Args:
        seed: Seed of the split, the first weights and the order of the samples.
        model: A key of TITLES.
        bits: Bits of the model, 32 for float.
        loss: Mean cross entropy (nats).
        accuracy: Share classified correctly, for 256 samples at a time.
        accuracy_batch_1: Share classified correctly for one sample at a time, if the model takes its ranges from the
            batch. None for the other models, which give the same result for any batch.
        diverged: How the training failed, see :func:`divergence`. Empty if it did not fail.
    """

    seed: int
    model: str
    bits: int
    loss: float
    accuracy: float
    accuracy_batch_1: float | None = None
    diverged: str = ""


@dataclass(frozen=True)
class ModelFile:
    """A model file in the report's folder.

    Args:
        model: A key of TITLES.
        bits: Bits of each stored number.
        bytes: Size of the file.
        file: Path relative to the report's folder.
    """

    model: str
    bits: int
    bytes: int
    file: str


@dataclass
class Study:
    """The results of a study, which an interruption can leave incomplete.

    Args:
        settings: What the study does.
        samples: The data.
        parameters: Number of parameters of each network.
        train_samples: Training samples of one split.
        test_samples: Test samples of one split.
        runs: All models of all seeds.
        histories: Histories of the first seed's trainings, by model and bits.
        layer_errors: Errors of the layers of the first seed's models.
        sizes: Model files of the first seed.
        deployments: Deployed QAT models of the first seed.
        step_times: Times of a training step.
        weights: The first seed's models, by model and bits.
        complete: Whether all results are there.
    """

    settings: Settings
    samples: Samples
    parameters: int = 0
    train_samples: int = 0
    test_samples: int = 0
    runs: list[Run] = field(default_factory=list)
    histories: dict[tuple[str, int], History] = field(default_factory=dict)
    layer_errors: list[LayerError] = field(default_factory=list)
    sizes: list[ModelFile] = field(default_factory=list)
    deployments: list[Deployment] = field(default_factory=list)
    step_times: list[StepTime] = field(default_factory=list)
    weights: dict[tuple[str, int], nn.Module] = field(default_factory=dict)
    complete: bool = False

    def float_network(self) -> ThreeLayerNet | SmallConvNet:
        """Returns a new float network for the samples."""
        shape = self.samples.shape or self.samples.inputs.shape[1:]
        return float_network(
            self.settings.network, shape, self.settings.hidden, len(self.samples.class_names)
        )

    def accuracies(self, model: str, bits: int, figure: str = "accuracy") -> dict[int, float]:
        """Returns one figure of a model by seed, without the seeds that do not have it."""
        runs = (run for run in self.runs if (run.model, run.bits) == (model, bits))
        return {run.seed: value for run in runs if (value := getattr(run, figure)) is not None}

    def divergences(self, model: str, bits: int) -> dict[int, str]:
        """Returns how trainings of a model failed, by seed. Seeds whose training did not fail are not in it."""
        runs = (run for run in self.runs if (run.model, run.bits) == (model, bits))
        return {run.seed: run.diverged for run in runs if run.diverged}

    @property
    def chance(self) -> float:
        """Accuracy of always guessing the most frequent class."""
        counts = np.bincount(self.samples.labels)
        return float(counts.max() / counts.sum())


OnTraining = Callable[[str], Callable[[Epoch], None]]


def _silent(_name: str) -> Callable[[Epoch], None]:
    return lambda _epoch: None


def count_trainings(settings: Settings) -> int:
    """Returns how many times the study trains a network for ``settings.epochs`` epochs."""
    trained = sum(name.startswith("qat") for name in settings.quantized_models)
    return settings.seeds * (2 + trained * len(settings.bits))


def run_study(study: Study, folder: Path, on_training: OnTraining = _silent) -> None:
    """Runs all experiments. It adds each result to ``study`` at once, so an interruption keeps what was finished.

    Args:
        study: A study with settings and samples only.
        folder: Folder of the report. Model files go into its subfolder ``models``.
        on_training: Called with the name of each training. The function that it returns is called after each epoch.

    Raises:
        DataError: The samples cannot be split.
        OSError: A model file cannot be written.
    """
    settings = study.settings
    # Layers as small as these gain nothing from a second thread, and wait for it if another program keeps a core busy.
    with one_thread():
        for seed in range(settings.seed, settings.seed + settings.seeds):
            _run_seed(study, seed, folder, on_training)
    if settings.timing_repetitions:
        _time_steps(study)
    study.complete = True


def _run_seed(study: Study, seed: int, folder: Path, on_training: OnTraining) -> None:
    settings = study.settings
    data = split(study.samples, seed=seed).to(settings.device)
    study.train_samples, study.test_samples = len(data.train_labels), len(data.test_labels)
    experiment = _SeedStudy(study, seed, data, folder, on_training)

    fp32 = experiment.network()
    study.parameters = count_parameters(fp32)
    experiment.train("fp32", FLOAT_BITS, fp32)
    experiment.measure("fp32", FLOAT_BITS, fp32)
    longer = copy.deepcopy(fp32)
    experiment.train("fp32_longer", FLOAT_BITS, longer)
    experiment.measure("fp32_longer", FLOAT_BITS, longer)

    calibration_inputs = data.train_inputs[:CALIBRATION_SAMPLES]
    for bits in settings.bits:
        for name in settings.quantized_models:
            trains = name.startswith("qat")
            network = quantize_layers(fp32 if trains else longer, bits, calibration_inputs, name=name)
            if trains:
                experiment.train(name, bits, network)
            experiment.measure(name, bits, network)
            if name == "qat_learned":
                experiment.deploy(name, bits, longer, network)
            if name == "ptq_mse":
                experiment.measure_layers(name, bits, longer, network)


class _SeedStudy:
    """The experiments of one seed."""

    def __init__(self, study: Study, seed: int, data: Dataset, folder: Path, on_training: OnTraining) -> None:
        self.study, self.seed, self.data, self.on_training = study, seed, data, on_training
        self.settings = study.settings
        self.first = seed == self.settings.seed
        self.folder, self.models = folder, folder / "models"
        self.diverged: dict[tuple[str, int], str] = {}

    def network(self) -> nn.Module:
        """Returns a float network with the seed's first weights."""
        with seeded(self.seed):
            return self.study.float_network().to(self.settings.device)

    def train(self, name: str, bits: int, network: nn.Module) -> None:
        settings = self.settings
        width = "" if bits == FLOAT_BITS else f", {bits} bits"
        history = train_model(
            network,
            self.data,
            epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            seed=self.seed,
            on_epoch=self.on_training(f"{TITLES[name]}{width}, seed {self.seed}"),
        )
        diverged = divergence(history, self.study.chance, len(self.data.test_labels))
        if diverged:
            self.diverged[name, bits] = diverged
        if self.first:
            self.study.histories[name, bits] = history

    def measure(self, name: str, bits: int, network: nn.Module) -> None:
        """Records loss and accuracy of a model, and writes the model file of the first seed."""
        result = self._evaluate(network)
        batch_1 = self._evaluate(network, 1).accuracy if name == "qat_tutorial" else None
        diverged = self.diverged.get((name, bits), "")
        self.study.runs.append(Run(self.seed, name, bits, result.loss, result.accuracy, batch_1, diverged))
        if self.first:
            self._keep(name, bits, network)

    def deploy(self, name: str, bits: int, fp32: nn.Module, network: nn.Module) -> None:
        """Records the deployed form of a model of the first seed that did not diverge."""
        if self.first and (name, bits) not in self.diverged:
            repetitions = self.settings.timing_repetitions
            self.study.deployments.append(
                deploy(name, bits, network, fp32, self.data, self.folder, repetitions=repetitions)
            )

    def measure_layers(self, name: str, bits: int, network: nn.Module, quantized: nn.Module) -> None:
        """Records the error of each layer of a quantized model of the first seed."""
        if self.first:
            layers = quantize_layers(
                network, bits, name=name
            )  # without chains, whose layers have no own outputs
            layers.load_state_dict(quantized.state_dict())
            self.study.layer_errors += layer_errors(name, bits, network, layers, self.data.test_inputs)

    def _evaluate(self, model: nn.Module, batch_size: int = 256) -> Evaluation:
        return evaluate_model(model, self.data.test_inputs, self.data.test_labels, batch_size=batch_size)

    def _keep(self, name: str, bits: int, network: nn.Module) -> None:
        self.study.weights[name, bits] = network
        self.models.mkdir(exist_ok=True)
        path = self.models / (f"{name}.pt" if bits == FLOAT_BITS else f"{name}_{bits}bit.pt")
        if bits == FLOAT_BITS:
            save_float(network, path)
        else:
            save_quantized(network, bits, path)
        self.study.sizes.append(ModelFile(name, bits, path.stat().st_size, f"models/{path.name}"))


def _time_steps(study: Study) -> None:
    """Times a training step of the study's network, and of a wide network whose arithmetic outweighs the calls."""
    settings, samples = study.settings, study.samples
    repetitions, device = settings.timing_repetitions, settings.device
    shape, classes = samples.shape or samples.inputs.shape[1:], len(samples.class_names)
    with one_thread():
        study.step_times += time_training_steps(
            shape,
            settings.hidden,
            classes,
            network=settings.network,
            batch_size=settings.batch_size,
            repetitions=repetitions,
            device=device,
        )
    fewer = max(1, repetitions // 3)  # a step takes about a hundred times as long
    wide = ((1024,), 1024, 10) if settings.network == "mlp" else (shape, 128, classes)
    study.step_times += time_training_steps(
        *wide, network=settings.network, batch_size=256, repetitions=fewer, device=device
    )
