"""The import of qatfast, after torch, in a fresh process."""

import pytest

from qatfast.bench import contestants


@pytest.mark.parametrize(("work", "provider"), contestants("import"), ids=str)
def test_import(compete, work, provider):
    compete(work, provider)
