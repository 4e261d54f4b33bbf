"""dequantize from 8 bits: every granularity; next to the clone of the float tensor that it makes."""

import pytest

from qatfast.bench import measurements


@pytest.mark.parametrize(("workload", "provider"), measurements("dequantize"), ids=str)
def test_dequantize(run_benchmark, workload, provider):
    run_benchmark(workload, provider)
