"""Time of a training step: float, the tutorials' fake quantization in plain PyTorch, and qatfast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .data import plural
from .networks import ThreeLayerNet, quantize_layers
from .training import seeded

REPETITIONS = 30
Step = Callable[[], None]


class TutorialFakeQuantize(torch.autograd.Function):
    """Affine fake quantization as tutorials write it: one PyTorch call after another, gradient passed unchanged."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, num_bits: int) -> Tensor:
        quant_max = 2**num_bits - 1
        scale = (input.max() - input.min()) / quant_max
        zero_point = torch.round(-input.min() / scale)
        integers = torch.clamp(torch.round(input / scale + zero_point), 0, quant_max)
        return (integers - zero_point) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class TutorialLinear(nn.Linear):
    """A linear layer with weight, bias and output put through TutorialFakeQuantize."""

    num_bits = 8

    def forward(self, input: Tensor) -> Tensor:
        weight = TutorialFakeQuantize.apply(self.weight, self.num_bits)
        bias = TutorialFakeQuantize.apply(self.bias, self.num_bits)
        return TutorialFakeQuantize.apply(nn.functional.linear(input, weight, bias), self.num_bits)


class TutorialNet(ThreeLayerNet):
    """:class:`ThreeLayerNetQAT` at 8 bits in plain PyTorch."""

    def __init__(self, in_features: int, hidden_features: int, num_classes: int) -> None:
        super().__init__(in_features, hidden_features, num_classes)
        self.fc1 = TutorialLinear(in_features, hidden_features)
        self.fc2 = TutorialLinear(hidden_features, hidden_features)
        self.fc3 = TutorialLinear(hidden_features, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(TutorialFakeQuantize.apply(input, TutorialLinear.num_bits))


@dataclass(frozen=True)
class StepTime:
    """The time of one training step (forward, backward, Adam) of one kind of network.

    Args:
        network: sizes of the layers, the batch and the threads, in words.
        model: ``fp32``, ``tutorial`` or ``qatfast``.
        seconds: median of the repetitions.
        ratio: median of the time over that of ``fp32`` in the same turn.
        quartiles: of these ratios: a quarter of them lies below the first, a quarter above the second.
    """

    network: str
    model: str
    seconds: float
    ratio: float
    quartiles: tuple[float, float]


def time_training_steps(
    in_features: int,
    hidden_features: int,
    num_classes: int,
    *,
    batch_size: int = 32,
    repetitions: int = REPETITIONS,
    device: str | torch.device = "cpu",
) -> list[StepTime]:
    """Times a training step in float, as tutorials write it at 8 bits, and with the recommended config at 8 bits.

    The networks take turns, so that a busy moment hits all.

    Args:
        in_features: of one sample.
        hidden_features: outputs of the first and the second layer.
        num_classes: outputs of the third layer.
        batch_size: samples a step.
        repetitions: timings of each network, after two that do not count.
        device: where to run.

    Returns:
        The times of ``fp32``, ``tutorial`` and ``qatfast``, in this order.
    """
    sizes = (in_features, hidden_features, num_classes)
    with seeded(0):
        networks: dict[str, nn.Module] = {
            "fp32": ThreeLayerNet(*sizes),
            "tutorial": TutorialNet(*sizes),
            "qatfast": quantize_layers(ThreeLayerNet(*sizes), 8),
        }
        inputs = torch.randn(batch_size, in_features).to(device)
        labels = torch.randint(num_classes, (batch_size,)).to(device)
    steps = {name: _training_step(network.to(device), inputs, labels) for name, network in networks.items()}
    calls = _calls_per_timing(steps["fp32"], device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(-2, repetitions):
        for name, step in steps.items():
            once = _time(step, calls, device)
            if repetition >= 0:
                seconds[name].append(once)
    label = " → ".join(str(size) for size in (in_features, hidden_features, hidden_features, num_classes))
    label += f", batch {batch_size}, {plural(torch.get_num_threads(), 'thread')}"
    times = []
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["fp32"], strict=True)]
        times.append(
            StepTime(label, name, statistics.median(values), statistics.median(ratios), _quartiles(ratios))
        )
    return times


def _training_step(model: nn.Module, inputs: Tensor, labels: Tensor) -> Step:
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return step


def _calls_per_timing(step: Step, device: str | torch.device) -> int:
    """So many that one timing of the fastest network takes about 5 ms, far more than the clock's grain."""
    fastest = min(_time(step, 1, device) for _ in range(10))
    return max(1, min(50, round(0.005 / fastest)))


def _time(step: Step, calls: int, device: str | torch.device) -> float:
    """Seconds of one call."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4)
    return first, third
