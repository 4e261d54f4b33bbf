"""What the benchmarks share: a provider is set up, checked against the reference, then timed by pytest-benchmark."""

from contextlib import suppress
from dataclasses import replace

import pytest

from qatfast.bench import prepare


def pytest_addoption(parser):
    with suppress(ValueError):  # the tests, run together with the benchmarks, have it too
        parser.addoption("--device", default="cpu", help="where the tensors live: cpu (default) or cuda")


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
        with work.grad_mode():
            benchmark(contest.runs[provider])

    return run
