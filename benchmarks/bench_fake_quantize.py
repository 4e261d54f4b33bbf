"""fake_quantize, dynamic range: sizes per tensor, forward and forward + backward; the other granularities."""

import pytest

from qatfast.bench import contestants


@pytest.mark.parametrize(("work", "provider"), contestants("fake_quantize"), ids=str)
def test_fake_quantize(compete, work, provider):
    compete(work, provider)
