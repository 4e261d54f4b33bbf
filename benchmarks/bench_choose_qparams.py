"""choose_qparams with all granularities."""

import pytest

from qatfast.bench import measurements


@pytest.mark.parametrize(("workload", "provider"), measurements("choose_qparams"), ids=str)
def test_choose_qparams(run_benchmark, workload, provider):
    run_benchmark(workload, provider)
