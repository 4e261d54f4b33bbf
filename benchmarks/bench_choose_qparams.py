"""choose_qparams: every granularity."""

import pytest

from qatfast.bench import contestants


@pytest.mark.parametrize(("work", "provider"), contestants("choose_qparams"), ids=str)
def test_choose_qparams(compete, work, provider):
    compete(work, provider)
