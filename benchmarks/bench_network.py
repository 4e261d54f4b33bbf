"""A training step of the study's network: forward, loss, backward, Adam; next to the float one."""

import pytest

from qatfast.bench import contestants


@pytest.mark.parametrize(("work", "provider"), contestants("network"), ids=str)
def test_network(compete, work, provider):
    compete(work, provider)
