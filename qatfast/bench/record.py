"""Results as JSON and back.

    machine    {name: text}
    versions   {package: version}
    date       ISO 8601
    results    [{work: {op, table, column, shape, backward, dtype, device}, baseline,
                 timings: [{provider, seconds, ratio, quartiles, error}], skipped: {provider: reason}}]

``seconds`` is the median time of a call, ``ratio`` its median ratio to the baseline in the same round, ``quartiles``
those of this ratio, ``error`` the largest difference from the reference as a share of the largest value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..checks import dtype_name
from . import machine
from .contest import Result, Timing
from .works import Work


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    return {
        "machine": machine.machine(),
        "versions": machine.versions(),
        "date": machine.date(),
        "results": [
            {
                "work": _work_as_json(result.work),
                "baseline": result.work.baseline,
                "timings": [asdict(timing) for timing in result.timings],
                "skipped": result.skipped,
            }
            for result in results
        ],
    }


def from_json(record: dict[str, Any]) -> list[Result]:
    """The results in what ``as_json`` gave; granularities are in words only, in ``work.column``."""
    return [
        Result(
            Work(
                **{
                    **entry["work"],
                    "shape": tuple(entry["work"]["shape"]),
                    "dtype": getattr(torch, entry["work"]["dtype"]),
                }
            ),
            tuple(
                Timing(**{**timing, "quartiles": tuple(timing["quartiles"])}) for timing in entry["timings"]
            ),
            entry["skipped"],
        )
        for entry in record["results"]
    ]


def _work_as_json(work: Work) -> dict[str, Any]:
    names = ("op", "table", "column", "shape", "backward", "device")
    return {**{name: getattr(work, name) for name in names}, "dtype": dtype_name(work.dtype)}
