"""What the benchmarks share: the contest of a work runs once, its providers in turns; each benchmark reports its own.

pytest-benchmark shows and saves the times. What was measured besides is in the same JSON file, under "qatfast".
"""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from qatfast.bench import measure, prepare
from qatfast.bench.command import FULL_SECONDS
from qatfast.bench.record import as_json

RESULTS = pytest.StashKey()


class Replay:
    """A timer in Python's sense that shows the times that a contest took."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def of(self, rounds):
        """A call that takes the time of the next round."""
        remaining = iter(rounds)

        def turn():
            self.now += next(remaining)

        return turn


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, default=FULL_SECONDS, help="for the rounds of one contest")
    with suppress(ValueError):  # the tests, run together with the benchmarks, have it too
        parser.addoption("--device", default="cpu", help="where the tensors live: cpu (default) or cuda")


def pytest_configure(config):
    config.stash[RESULTS] = {}
    if config.getoption("--device").startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device here")


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=Replay()))


def pytest_benchmark_update_json(config, output_json):
    output_json["qatfast"] = as_json(list(config.stash[RESULTS].values()))


@pytest.fixture
def compete(benchmark, request):
    """Reports the times of a provider at a work, in the group of that work; skipped where it cannot do it."""
    results = request.config.stash[RESULTS]

    def run(work, provider):
        if work not in results:
            chosen = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            selected = [one["provider"] for one in chosen if one.get("work") == work]
            contest = prepare(
                replace(work, device=request.config.getoption("--device")),
                dict.fromkeys([work.baseline, *selected]),
            )
            results[work] = measure(contest, seconds=request.config.getoption("--seconds"))
        timing = results[work].timing(provider)
        if timing is None:
            pytest.skip(f"{provider}: {results[work].skipped[provider]}")
        benchmark.group = str(work)
        benchmark.extra_info.update(provider=provider, baseline=work.baseline, max_error=timing.error)
        if timing.memory:
            benchmark.extra_info.update(timing.memory._asdict())
        replay = request.node.get_closest_marker("benchmark").kwargs["timer"]
        benchmark.pedantic(replay.of(timing.rounds), rounds=len(timing.rounds))

    return run
