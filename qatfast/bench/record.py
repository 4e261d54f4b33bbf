"""Results as JSON and back.

    machine    {name: text}
    versions   {package: version}
    date       ISO 8601
    device     where the tensors were
    results    [{work: its name, timings: [{provider, rounds, error, memory}], skipped: {provider: reason}}]

``rounds`` are the seconds of one call in each round, ``error`` is the largest difference from the reference as a share
of the largest value, ``memory`` the bytes that a call [allocates, keeps for its backward].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from . import machine
from .contest import Result, Timing
from .memory import Memory
from .works import SUBJECTS, works


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    return {
        "machine": machine.machine(),
        "versions": machine.versions(),
        "date": machine.date(),
        "device": results[0].work.device if results else "cpu",
        "results": [
            {
                "work": str(result.work),
                "timings": [asdict(timing) for timing in result.timings],
                "skipped": result.skipped,
            }
            for result in results
        ],
    }


def from_json(record: dict[str, Any]) -> list[Result]:
    """The results in what ``as_json`` gave.

    Raises:
        ValueError: this version does not measure such a work.
    """
    known = {str(work): work for subject in SUBJECTS for work in works(subject, device=record["device"])}
    results = []
    for entry in record["results"]:
        if entry["work"] not in known:
            raise ValueError(f"expected a work that this version measures, got '{entry['work']}'")
        timings = [
            Timing(
                timing["provider"],
                tuple(timing["rounds"]),
                timing["error"],
                timing["memory"] and Memory(*timing["memory"]),
            )
            for timing in entry["timings"]
        ]
        results.append(Result(known[entry["work"]], tuple(timings), entry["skipped"]))
    return results
