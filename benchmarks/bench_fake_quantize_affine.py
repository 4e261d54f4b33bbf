"""fake_quantize_affine with all granularities, and per tensor also forward + backward."""

import pytest

from qatfast.bench import measurements


@pytest.mark.parametrize(("workload", "provider"), measurements("fake_quantize_affine"), ids=str)
def test_fake_quantize_affine(run_benchmark, workload, provider):
    run_benchmark(workload, provider)
