"""qat_linear as the layer QATLinear next to nn.Linear: training step, inference and backward."""

import pytest

from qatfast.bench import measurements


@pytest.mark.parametrize(("workload", "provider"), measurements("qat_linear"), ids=str)
def test_qat_linear(run_benchmark, workload, provider):
    run_benchmark(workload, provider)
