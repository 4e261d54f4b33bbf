"""quantize to 8 bits: every granularity."""

import pytest

from qatfast.bench import contestants


@pytest.mark.parametrize(("work", "provider"), contestants("quantize"), ids=str)
def test_quantize(compete, work, provider):
    compete(work, provider)
