"""The mutants apply to the current source.

``make mutants`` itself takes half an hour.
"""

from pathlib import Path

import pytest

from mutants import MUTANTS

CSRC = Path(__file__).parent.parent / "csrc"


@pytest.mark.skipif(not CSRC.is_dir(), reason="the sources are not beside the tests")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_source_has_the_place_once(mutant):
    assert (CSRC / mutant.file).read_text().count(mutant.old) == 1
