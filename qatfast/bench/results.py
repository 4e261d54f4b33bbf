"""The results of the benchmarks, their JSON and tables, and whether the targets are met.

The JSON is::

    machine    {name: text}
    versions   {package: version}
    date       ISO 8601
    device     device of the tensors
    results    [{work: name of the workload, timings: [{provider, rounds, error, memory}], skipped: {provider: reason}}]

``rounds`` holds the seconds of one call in each round, ``error`` the largest difference from the reference as a share
of the largest value, and ``memory`` the bytes that a call [allocates, keeps for its backward].
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from typing import Any, NamedTuple

from .machine import PEERS, machine, versions
from .workloads import KI, MI, OURS, SUBJECTS, TRIAD, Target, Workload, workloads_of

ABSENT = "–"
_BYTES = ("allocated", "kept")


class Memory(NamedTuple):
    """Bytes of one call.

    Args:
        allocated: All that it requested from torch's allocator, including what it freed within the call.
        kept: All storages that autograd saves for its backward, each counted once, without parameters. The input
            counts, because it is an intermediate result in a larger network.
    """

    allocated: int
    kept: int


class Spread(NamedTuple):
    """Median and quartiles of a figure over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """What was measured of one provider.

    Args:
        provider: Its name.
        rounds: Seconds of one call, in each round.
        error: Largest difference from the reference, as a share of the largest value. None if it is not compared.
        memory: Bytes of a call. None if they are not measured.
    """

    provider: str
    rounds: tuple[float, ...]
    error: float | None = None
    memory: Memory | None = None

    @property
    def seconds(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.rounds)


@dataclass(frozen=True)
class Result:
    """What was measured of a workload.

    Args:
        workload: What the providers ran.
        timings: One per provider, the baseline first.
        skipped: Why a provider did not take part, by its name.
    """

    workload: Workload
    timings: tuple[Timing, ...]
    skipped: dict[str, str]

    def timing(self, provider: str) -> Timing | None:
        """Returns the timing of a provider, or None if it did not take part."""
        return next((timing for timing in self.timings if timing.provider == provider), None)

    def ratio(self, provider: str, of: str | None = None) -> Spread | None:
        """Returns the ratio of a provider's time to that of another, taken round by round.

        Args:
            provider: Its name.
            of: Name of the other provider. None means the baseline.

        Returns:
            The ratio, or None if one of the two did not take part.
        """
        return self._spread(lambda time, base: time / base, provider, of)

    def above(self, provider: str) -> Spread | None:
        """Returns the seconds by which a provider exceeds the baseline, round by round, or None as :meth:`ratio`."""
        return self._spread(lambda time, base: time - base, provider, None)

    def _spread(
        self, figure: Callable[[float, float], float], provider: str, of: str | None
    ) -> Spread | None:
        timing, base = self.timing(provider), self.timing(of or self.workload.baseline)
        if timing is None or base is None:
            return None
        return spread([figure(*pair) for pair in zip(timing.rounds, base.rounds, strict=True)])


def spread(values: Sequence[float]) -> Spread:
    """Returns the median and the quartiles of one or more values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4)
    return Spread(median, low, high)


# JSON


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Returns the results, and what they were measured on, in the shape that the module's docstring describes."""
    return {
        "machine": machine(),
        "versions": versions(*PEERS),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": results[0].workload.device if results else "cpu",
        "results": [
            {
                "work": str(result.workload),
                "timings": [asdict(timing) for timing in result.timings],
                "skipped": result.skipped,
            }
            for result in results
        ],
    }


def from_json(record: dict[str, Any]) -> list[Result]:
    """Returns the results of which :func:`as_json` made ``record``.

    Raises:
        ValueError: ``record`` holds a workload that this version does not measure.
    """
    every = (workload for subject in SUBJECTS for workload in workloads_of(subject, device=record["device"]))
    known = {str(workload): workload for workload in every}
    results = []
    for entry in record["results"]:
        if entry["work"] not in known:
            raise ValueError(f"expected a workload that this version measures, got '{entry['work']}'")
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


# Targets


class Verdict(NamedTuple):
    """Whether a target is met.

    Args:
        target: The target in words.
        measured: The median and the quartiles in words.
        met: None if it could not be measured.
    """

    target: str
    measured: str
    met: bool | None


def verdicts(results: Iterable[Result]) -> list[Verdict]:
    """Returns the verdict of every target of these results."""
    return [_verdict(result, target) for result in results for target in result.workload.targets]


def _verdict(result: Result, target: Target) -> Verdict:
    provider = "" if target.provider == OURS else f", {target.provider}"
    words = f"{result.workload}{provider}: {_limit(result, target)}"
    figure = _figure(result, target)
    if figure is None:
        return Verdict(words, "not measured", None)
    as_text = ratio if target.figure in ("time", "kept") else duration
    median, low, high = map(as_text, figure)
    quartiles = "" if low == median == high else f" ({low} to {high})"
    return Verdict(words, median + quartiles, figure.median <= target.most)


def _limit(result: Result, target: Target) -> str:
    base = target.of or result.workload.baseline
    if target.figure == "seconds":
        return f"at most {duration(target.most)}"
    if target.figure == "above":
        return f"at most {duration(target.most)} above {base}"
    what = "the bytes that {} keeps" if target.figure == "kept" else "the time of {}"
    return f"at most {target.most:.2f}x {what.format(base)}"


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
    base = result.timing(result.workload.baseline)
    if base is None or base.memory is None or timing.memory is None:
        return None
    return spread([timing.memory.kept / base.memory.kept])


# Tables


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        title: Operator, pass, and the provider whose time is 1.0.
        header: One text per column. The first column names the providers.
        rows: As many texts per row.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def tables(results: Iterable[Result]) -> list[Table]:
    """Returns one table per operator and pass, with a row per provider and a column per size."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(_title(result.workload), []).append(result)
    return [_table(title, group) for title, group in grouped.items()]


def _table(title: str, results: list[Result]) -> Table:
    # The bytes of the largest size that most providers run.
    largest = max(reversed(results), key=lambda result: len(result.timings))
    lines = []
    for name in dict.fromkeys(timing.provider for result in results for timing in result.timings):
        timings = [timing for result in results if (timing := result.timing(name))]
        errors = [timing.error for timing in timings if timing.error is not None]
        error = share(max(errors, key=_nan_last)) if errors else ABSENT
        lines.append((name, *(_cell(result, name) for result in results), *_byte_cells(largest, name), error))
    if any(result.timing(TRIAD) for result in results):
        shares = [result.ratio(TRIAD, OURS) for result in results]
        cells = [f"{part.median:.0%}" if part else ABSENT for part in shares]
        lines.append(("qatfast's share of the bandwidth", *cells, *[ABSENT] * len(_BYTES), ABSENT))
    byte_columns = [f"{kind}, {largest.workload.column}" for kind in _BYTES]
    header = ("", *(result.workload.column for result in results), *byte_columns, "max error")
    return Table(title, header, lines)


def _byte_cells(result: Result, name: str) -> list[str]:
    timing = result.timing(name)
    memory = timing and timing.memory
    return [size(getattr(memory, kind)) if memory else ABSENT for kind in _BYTES]


def _cell(result: Result, name: str) -> str:
    """Returns a text such as ``1.43x (45.6 µs)``."""
    timing, part = result.timing(name), result.ratio(name)
    if timing is None or part is None:
        return ABSENT
    return f"{ratio(part.median)} ({duration(timing.seconds)})"


def _title(workload: Workload) -> str:
    device = "" if workload.device == "cpu" else f", {workload.device}"
    return f"{workload.title}{device} ({workload.baseline} = 1.0)"


def skipped(results: Iterable[Result]) -> list[str]:
    """Returns a line per provider that did not take part in a workload: its name, the reason, and the workloads."""
    where: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, reason in result.skipped.items():
            where.setdefault((name, reason), []).append(str(result.workload))
    return [
        f"{name}: {reason} ({found[0]}{f' and {len(found) - 1} more' if found[1:] else ''})"
        for (name, reason), found in where.items()
    ]


def show(table: Table) -> None:
    """Prints a table with rich if the output is a terminal and rich is installed, and as plain text otherwise."""
    if not sys.stdout.isatty() or find_spec("rich") is None:
        print(plain(table))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    view = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, text in enumerate(table.header):
        view.add_column(text, justify="right" if index else "left", no_wrap=not index)
    fits = max(map(len, plain(table).splitlines()[2:])) + 2 * len(table.header) <= console.width
    for row in table.rows:
        cells = row if fits else [cell.replace(" (", "\n(") for cell in row]
        view.add_row(*cells, style="bold" if row[0] == OURS else None)
    console.print(view)


def plain(table: Table) -> str:
    """Returns a table as plain text."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(table.header))]
    text = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(pairs)
        )
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([table.title, "", *text, ""])


def markdown(table: Table) -> str:
    """Returns a table as Markdown with a heading."""
    return "\n".join([f"### {table.title}", "", *markdown_lines(table.header, table.rows), ""])


def markdown_lines(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def ratio(value: float) -> str:
    """Returns a text such as ``1.43x`` or ``12x``."""
    return f"{value:.2f}x" if value < 9.995 else f"{value:.0f}x"


def duration(seconds: float) -> str:
    """Returns a text such as ``1.23 µs`` or ``45.6 ms``."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= 0.9995 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e9:.3g} ns"


def size(count: int) -> str:
    """Returns a text such as ``12 B``, ``1.5 KiB`` or ``16 MiB``."""
    for unit, name in ((KI * MI, "GiB"), (MI, "MiB"), (KI, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"


def share(value: float) -> str:
    """Returns a text such as ``0``, ``0.39 %`` or ``NaN``."""
    if math.isnan(value):
        return "NaN"
    return "0" if value == 0 else f"{100 * value:.2g} %"


def _nan_last(value: float) -> tuple[bool, float]:
    return math.isnan(value), value
