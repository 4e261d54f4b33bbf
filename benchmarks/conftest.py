"""What the benchmarks share: all providers of a workload are measured together, and each benchmark reports its own.

pytest-benchmark shows and saves the times. All other figures are in the same JSON file, under "qatfast".
"""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from qatfast.bench import measure, prepare
from qatfast.bench.command import FULL_SECONDS
from qatfast.bench.results import as_json

RESULTS = pytest.StashKey()


class Replay:
    """A clock that shows the times that have been measured already."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def of(self, rounds):
        """Returns a function that takes the time of the next round."""
        remaining = iter(rounds)

        def turn():
            self.now += next(remaining)

        return turn


def pytest_addoption(parser):
    parser.addoption(
        "--seconds", type=float, default=FULL_SECONDS, help="time for the rounds of one workload"
    )
    with suppress(ValueError):  # the tests define it too, if they run together with the benchmarks
        parser.addoption("--device", default="cpu", help="device of the tensors: cpu (default) or cuda")


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
def run_benchmark(benchmark, request):
    """Reports the times of a provider in the group of its workload. Skips the test if the provider did not run."""
    results = request.config.stash[RESULTS]

    def run(workload, provider):
        if workload not in results:
            parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            selected = [values["provider"] for values in parameters if values.get("workload") == workload]
            runner = prepare(
                replace(workload, device=request.config.getoption("--device")),
                dict.fromkeys([workload.baseline, *selected]),
            )
            results[workload] = measure(runner, seconds=request.config.getoption("--seconds"))
        timing = results[workload].timing(provider)
        if timing is None:
            pytest.skip(f"{provider}: {results[workload].skipped[provider]}")
        benchmark.group = str(workload)
        benchmark.extra_info.update(provider=provider, baseline=workload.baseline, max_error=timing.error)
        if timing.memory:
            benchmark.extra_info.update(timing.memory._asdict())
        replay = request.node.get_closest_marker("benchmark").kwargs["timer"]
        benchmark.pedantic(replay.of(timing.rounds), rounds=len(timing.rounds))

    return run
