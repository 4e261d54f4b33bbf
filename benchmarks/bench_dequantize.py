"""dequantize from 8 bits: every granularity; next to the clone of the float tensor that it makes."""

import pytest

from qatfast.bench import contestants


@pytest.mark.parametrize(("work", "provider"), contestants("dequantize"), ids=str)
def test_dequantize(compete, work, provider):
    compete(work, provider)
