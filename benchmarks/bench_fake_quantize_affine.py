"""fake_quantize_affine, given range: every granularity; per tensor also forward + backward."""

import pytest

from qatfast.bench import contestants


@pytest.mark.parametrize(("work", "provider"), contestants("fake_quantize_affine"), ids=str)
def test_fake_quantize_affine(compete, work, provider):
    compete(work, provider)
