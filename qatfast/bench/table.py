"""Results as tables: one an operator and pass, a row a provider, a column a size; for a terminal or in Markdown."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from ..checks import dtype_name
from .contest import Result
from .providers import OURS
from .works import Work

ABSENT = "–"


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
    return [_table(group) for group in grouped.values()]


def _table(results: list[Result]) -> Table:
    work = results[0].work
    columns = [{timing.provider: timing for timing in result.timings} for result in results]
    providers = dict.fromkeys(name for column in columns for name in column)
    rows = []
    for name in providers:
        cells = [
            f"{ratio(column[name].ratio)} ({duration(column[name].seconds)})" if name in column else ABSENT
            for column in columns
        ]
        error = max(column[name].error for column in columns if name in column)
        rows.append((name, *cells, ABSENT if name == work.baseline else share(error)))
    header = ("", *(result.work.column for result in results), "max error")
    return Table(_title(work), header, rows)


def _title(work: Work) -> str:
    place = "" if work.device == "cpu" else f", {work.device}"
    return f"{work.op}, {work.table}, {dtype_name(work.dtype)}{place} ({work.baseline} = 1.0)"


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
    lines = [table.header, ("---", *["---:"] * (len(table.header) - 1)), *table.rows]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"### {table.title}", "", *text, ""])


def ratio(value: float) -> str:
    """``1.43x``, ``12x``."""
    return f"{value:.2f}x" if value < 9.995 else f"{value:.0f}x"


def duration(seconds: float) -> str:
    """``1.23 µs``, ``45.6 ms``."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e9:.3g} ns"


def share(value: float) -> str:
    """``0``, ``0.39 %``."""
    return "0" if value == 0 else f"{100 * value:.2g} %"
