"""quantize to 8 bits with all granularities."""

import pytest

from qatfast.bench import measurements


@pytest.mark.parametrize(("workload", "provider"), measurements("quantize"), ids=str)
def test_quantize(run_benchmark, workload, provider):
    run_benchmark(workload, provider)
