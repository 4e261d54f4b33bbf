"""What the benchmarks share: a provider is set up, checked against the reference, then timed by pytest-benchmark.

On a CUDA device the time is the device's (qatfast/bench/device.py), for some rounds of one call.
"""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from qatfast.bench import prepare
from qatfast.bench.device import Clock

ROUNDS = 50  # on a CUDA device


def pytest_addoption(parser):
    with suppress(ValueError):  # the tests, run together with the benchmarks, have it too
        parser.addoption("--device", default="cpu", help="where the tensors live: cpu (default) or cuda")


def pytest_configure(config):
    if config.getoption("--device").startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device here")


def pytest_collection_modifyitems(config, items):
    device = config.getoption("--device")
    if device.startswith("cuda"):
        clock = pytest.mark.benchmark(timer=Clock(device))
        for item in items:
            item.add_marker(clock)


@pytest.fixture
def compete(benchmark, request):
    """Times a provider at a work, in the group of that work; skipped where it cannot do it."""

    def run(work, provider):
        work = replace(work, device=request.config.getoption("--device"))
        contest = prepare(work, [provider])
        if provider in contest.skipped:
            pytest.skip(f"{provider}: {contest.skipped[provider]}")
        benchmark.group = str(work)
        benchmark.extra_info.update(
            provider=provider, max_error=contest.errors[provider], baseline=work.baseline
        )
        run = contest.runs[provider]
        clock = request.node.get_closest_marker("benchmark")
        with work.grad_mode():
            if clock is None:
                benchmark(run)
            else:
                benchmark.pedantic(clock.kwargs["timer"].timed(run), rounds=ROUNDS, warmup_rounds=3)

    return run
