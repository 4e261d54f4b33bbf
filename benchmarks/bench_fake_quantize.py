"""fake_quantize: sizes per tensor, forward and forward + backward, and the other granularities."""

import pytest

from qatfast.bench import measurements


@pytest.mark.parametrize(("workload", "provider"), measurements("fake_quantize"), ids=str)
def test_fake_quantize(run_benchmark, workload, provider):
    run_benchmark(workload, provider)
