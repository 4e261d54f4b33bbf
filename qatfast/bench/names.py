"""The names of the providers that others speak of."""

from __future__ import annotations

OURS = "qatfast"
CACHED = "qatfast, cached weights"
REFERENCE = "reference"
COMPILED = "reference, compiled"
TUTORIAL = "tutorial formula"
TUTORIAL_LAYER = "tutorial layer"
TRIAD = "triad"
INTEGER_PRODUCT = "integer product alone"

ONE_THREAD = ", 1 thread"
"""Behind the name of a provider: the same, while torch has one thread."""

EXACT = (OURS, CACHED)
"""They have to give the reference's bits."""

BOUNDS = (TRIAD, INTEGER_PRODUCT)
"""They do only a part of the work: what it is bound by. Their results are not compared."""
