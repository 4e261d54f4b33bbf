"""qat_linear in the tutorial config, as the layer QATLinear, next to nn.Linear: training step and forward."""

import pytest

from qatfast.bench import contestants


@pytest.mark.parametrize(("work", "provider"), contestants("qat_linear"), ids=str)
def test_qat_linear(compete, work, provider):
    compete(work, provider)
