"""Every workload with every provider that takes part in it. Select with ``-k``: ``-k quantize``, ``-k "import"``."""

import pytest

from qatfast.bench import measurements
from qatfast.bench.workloads import SUBJECTS


def cases():
    for subject in SUBJECTS:
        for workload, provider in measurements(subject):
            yield pytest.param(workload, provider, id=f"{subject}-{workload}-{provider}")


@pytest.mark.parametrize(("workload", "provider"), cases())
def test_workload(run_benchmark, workload, provider):
    run_benchmark(workload, provider)
