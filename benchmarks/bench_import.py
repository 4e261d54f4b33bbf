"""The import of qatfast after torch, in a fresh process."""

import pytest

from qatfast.bench import measurements


@pytest.mark.parametrize(("workload", "provider"), measurements("import"), ids=str)
def test_import(run_benchmark, workload, provider):
    run_benchmark(workload, provider)
