"""Results as tables: one an operator and pass, a row a provider, a column a size; for a terminal or in Markdown."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from .contest import Result
from .names import OURS, TRIAD
from .works import KI, MI, Work

ABSENT = "–"
_BYTES = ("allocated", "kept")


@dataclass(frozen=True)
class Table:
    """Texts only.

    Args:
        title: operator, pass, and what is 1.0.
        header: one text a column; the first column names the providers.
        rows: as many texts each.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def tables(results: Iterable[Result]) -> list[Table]:
    """The results, those that belong together in one table."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(_title(result.work), []).append(result)
    return [_table(title, group) for title, group in grouped.items()]


def _table(title: str, results: list[Result]) -> Table:
    whole = max(reversed(results), key=lambda result: len(result.timings))
    lines = []
    for name in dict.fromkeys(timing.provider for result in results for timing in result.timings):
        timings = [timing for result in results if (timing := result.timing(name))]
        errors = [timing.error for timing in timings if timing.error is not None]
        largest = share(max(errors, key=_nan_last)) if errors else ABSENT
        lines.append((name, *(_cell(result, name) for result in results), *_bytes(whole, name), largest))
    if any(result.timing(TRIAD) for result in results):
        shares = [result.ratio(TRIAD, OURS) for result in results]
        cells = [f"{part.median:.0%}" if part else ABSENT for part in shares]
        lines.append(("qatfast's share of the bandwidth", *cells, *[ABSENT] * len(_BYTES), ABSENT))
    bytes_ = [f"{what}, {whole.work.column}" for what in _BYTES]
    header = ("", *(result.work.column for result in results), *bytes_, "max error")
    return Table(title, header, lines)


def _bytes(result: Result, name: str) -> list[str]:
    timing = result.timing(name)
    memory = timing and timing.memory
    return [size(getattr(memory, what)) if memory else ABSENT for what in _BYTES]


def _cell(result: Result, name: str) -> str:
    """``1.43x (45.6 µs)``."""
    timing, part = result.timing(name), result.ratio(name)
    if timing is None or part is None:
        return ABSENT
    return f"{ratio(part.median)} ({duration(timing.seconds)})"


def _title(work: Work) -> str:
    place = "" if work.device == "cpu" else f", {work.device}"
    return f"{work.title}{place} ({work.baseline} = 1.0)"


def skipped(results: Iterable[Result]) -> list[str]:
    """A line for each provider that took no part in something: its name, where, and why."""
    where: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, reason in result.skipped.items():
            where.setdefault((name, reason), []).append(str(result.work))
    return [
        f"{name}: {reason} ({works[0]}{f' and {len(works) - 1} more' if works[1:] else ''})"
        for (name, reason), works in where.items()
    ]


def show(table: Table) -> None:
    """Prints it: with rich on a terminal, if that is installed, else as plain text."""
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
    broad = max(map(len, plain(table).splitlines()[2:])) + 2 * len(table.header) <= console.width
    for row in table.rows:
        cells = row if broad else [cell.replace(" (", "\n(") for cell in row]
        view.add_row(*cells, style="bold" if row[0] == OURS else None)
    console.print(view)


def plain(table: Table) -> str:
    """As plain text."""
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
    """As a Markdown table with a heading."""
    return "\n".join([f"### {table.title}", "", *rows(table.header, table.rows), ""])


def rows(header: tuple[str, ...], cells: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *cells]
    return [f"| {' | '.join(line)} |" for line in lines]


def ratio(value: float) -> str:
    """``1.43x``, ``12x``."""
    return f"{value:.2f}x" if value < 9.995 else f"{value:.0f}x"


def duration(seconds: float) -> str:
    """``1.23 µs``, ``45.6 ms``."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= 0.9995 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e9:.3g} ns"


def size(count: int) -> str:
    """``12 B``, ``1.5 KiB``, ``16 MiB``."""
    for unit, name in ((KI * MI, "GiB"), (MI, "MiB"), (KI, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"


def share(value: float) -> str:
    """``0``, ``0.39 %``, ``NaN``."""
    if math.isnan(value):
        return "NaN"
    return "0" if value == 0 else f"{100 * value:.2g} %"


def _nan_last(value: float) -> tuple[bool, float]:
    return math.isnan(value), value
