"""A whole training step of the study's networks: forward, loss, backward, Adam."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import reference
from . import tutorial
from .names import OURS, REFERENCE, TUTORIAL
from .providers import Run
from .works import Work, normal


def names(work: Work) -> list[str]:
    """Who does it, the baseline first."""
    return [work.baseline, OURS, REFERENCE, TUTORIAL]


def runs(work: Work, inside: ExitStack) -> Callable[[str], Run]:
    """Sets up the networks, with the same first weights: gives the step of one by its name."""
    from ..study import networks

    class Substitute(networks.ThreeLayerNet):
        """ThreeLayerNetQAT in plain PyTorch."""

        def __init__(self, fake_quantize: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.fake_quantize = fake_quantize

        def forward(self, input: Tensor) -> Tensor:
            hidden = self.fake_quantize(input)
            for layer in (self.fc1, self.fc2, self.fc3):
                hidden = hidden if layer is self.fc1 else torch.relu(hidden)
                weight, bias = self.fake_quantize(layer.weight), self.fake_quantize(layer.bias)
                hidden = self.fake_quantize(nn.functional.linear(hidden, weight, bias))
            return hidden

    makers: dict[str, Callable[[], nn.Module]] = {
        work.baseline: networks.ThreeLayerNet,
        OURS: networks.ThreeLayerNetQAT,
        REFERENCE: lambda: Substitute(reference.fake_quantize),
        TUTORIAL: lambda: Substitute(tutorial.FakeQuantize.apply),
    }
    x = normal(work, *work.shape, 10)
    labels = torch.arange(len(x), device=work.device) % 2

    def run_of(name: str) -> Run:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = makers[name]().to(work.device, work.dtype)
        # a rate of 0 costs the same, and every step has the same numbers
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)

        def step() -> tuple[Tensor | None, ...]:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            return loss, *(parameter.grad for parameter in model.parameters())

        return step

    return run_of
