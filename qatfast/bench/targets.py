"""Whether the figures are met that qatfast is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from .contest import Result, Spread, spread
from .names import OURS
from .table import duration, ratio
from .works import Target


class Verdict(NamedTuple):
    """Of one target.

    Args:
        target: in words.
        measured: the median and the quartiles, in words.
        met: None: it could not be measured.
    """

    target: str
    measured: str
    met: bool | None


def verdicts(results: Iterable[Result]) -> list[Verdict]:
    """Of every target of these results."""
    return [_verdict(result, target) for result in results for target in result.work.targets]


def _verdict(result: Result, target: Target) -> Verdict:
    who = "" if target.provider == OURS else f", {target.provider}"
    limit, figure = _limit(result, target), _figure(result, target)
    words = f"{result.work}{who}: {limit}"
    if figure is None:
        return Verdict(words, "not measured", None)
    median, low, high = map(_text(target), figure)
    spread = "" if low == median == high else f" ({low} to {high})"
    return Verdict(words, median + spread, figure.median <= target.most)


def _limit(result: Result, target: Target) -> str:
    other = target.of or result.work.baseline
    if target.figure == "seconds":
        return f"at most {duration(target.most)}"
    if target.figure == "above":
        return f"at most {duration(target.most)} above {other}"
    what = "the bytes that {} keeps" if target.figure == "kept" else "the time of {}"
    return f"at most {target.most:.2f}x {what.format(other)}"


def _figure(result: Result, target: Target) -> Spread | None:
    timing = result.timing(target.provider)
    if timing is None:
        return None
    if target.figure == "time":
        return result.ratio(target.provider, target.of)
    if target.figure == "above":
        return result.above(target.provider)
    if target.figure == "seconds":
        return spread(timing.rounds)
    base = result.timing(result.work.baseline)
    if base is None or base.memory is None or timing.memory is None:
        return None
    return Spread(*[timing.memory.kept / base.memory.kept] * 3)


def _text(target: Target) -> Callable[[float], str]:
    return ratio if target.figure in ("time", "kept") else duration
