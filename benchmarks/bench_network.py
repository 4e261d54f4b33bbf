"""A training step of the study's network (forward, loss, backward, Adam) next to the float network."""

import pytest

from qatfast.bench import measurements


@pytest.mark.parametrize(("workload", "provider"), measurements("network"), ids=str)
def test_network(run_benchmark, workload, provider):
    run_benchmark(workload, provider)
