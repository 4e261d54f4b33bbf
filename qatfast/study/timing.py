"""The time of a training step: in float, as tutorials quantize in plain PyTorch, and with qatfast."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qatfast.bench import tutorial
from qatfast.bench.results import spread
from qatfast.bench.timer import time_in_turns, turn_of

from .data import plural
from .networks import FunctionalQATConvNet, FunctionalQATNet, float_network, quantize_layers
from .training import seeded

REPETITIONS = 30


@dataclass(frozen=True)
class StepTime:
    """The time of one training step (forward, backward, Adam) of a network.

    Args:
        network: Sizes of the layers, the batch and the number of threads, as a text.
        model: ``fp32``, ``tutorial`` or ``qatfast``.
        seconds: Median of the repetitions.
        ratio: Median of the ratios to ``fp32``, each of two times of the same round.
        quartiles: First and third quartile of these ratios.
    """

    network: str
    model: str
    seconds: float
    ratio: float
    quartiles: tuple[float, float]


def time_training_steps(
    in_features: int | Sequence[int],
    hidden_features: int,
    num_classes: int,
    *,
    network: str = "mlp",
    batch_size: int = 32,
    repetitions: int = REPETITIONS,
    device: str | torch.device = "cpu",
) -> list[StepTime]:
    """Times a training step in float, as tutorials write it at 8 bits, and as QAT learned at 8 bits.

    The networks are timed in turns, so that other programs slow down all of them alike.

    Args:
        in_features: Features of one sample, or their shape.
        hidden_features: Outputs of the first and the second layer.
        num_classes: Outputs of the third layer.
        network: ``mlp`` or ``cnn``.
        batch_size: Samples per step.
        repetitions: Number of timings of each network.
        device: Device of the networks.

    Returns:
        The times of ``fp32``, ``tutorial`` and ``qatfast``, in this order.
    """
    shape = (in_features,) if isinstance(in_features, int) else tuple(in_features)
    sizes = (shape, hidden_features, num_classes)
    with seeded(0):
        networks: dict[str, nn.Module] = {
            "fp32": float_network(network, *sizes),
            "tutorial": FunctionalQATNet(tutorial.FakeQuantize.apply, prod(shape), *sizes[1:])
            if network == "mlp"
            else FunctionalQATConvNet(tutorial.FakeQuantize.apply, *sizes),
            "qatfast": quantize_layers(float_network(network, *sizes), 8),
        }
        inputs = torch.randn(batch_size, prod(shape)).to(device)
        labels = torch.randint(num_classes, (batch_size,)).to(device)
    label = " → ".join(map(str, float_network(network, *sizes).sizes))
    turns = {
        name: turn_of(training_step(model.to(device), inputs, labels), str(device))
        for name, model in networks.items()
    }
    seconds = time_in_turns(turns, seconds=0, min_rounds=repetitions)
    label += f", batch {batch_size}, {plural(torch.get_num_threads(), 'thread')}"
    times = []
    for name, values in seconds.items():
        ratio = spread([value / base for value, base in zip(values, seconds["fp32"], strict=True)])
        times.append(StepTime(label, name, statistics.median(values), ratio.median, (ratio.low, ratio.high)))
    return times


def training_step(
    model: nn.Module, inputs: Tensor, labels: Tensor
) -> Callable[[], tuple[Tensor | None, ...]]:
    """Returns a function that runs one training step and returns the loss and the gradients of the parameters.

    The learning rate is 0, which takes the same time, so that every step computes the same numbers.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)

    def step() -> tuple[Tensor | None, ...]:
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        return loss, *(parameter.grad for parameter in model.parameters())

    return step
