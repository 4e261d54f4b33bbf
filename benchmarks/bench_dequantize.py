"""dequantize from 8 bits with all granularities, next to a clone of the float tensor."""

import pytest

from qatfast.bench import measurements


@pytest.mark.parametrize(("workload", "provider"), measurements("dequantize"), ids=str)
def test_dequantize(run_benchmark, workload, provider):
    run_benchmark(workload, provider)
