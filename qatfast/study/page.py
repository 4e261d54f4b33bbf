"""HTML of the report: the page and its sections, tables, figures and lists. All functions escape their text."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from string import Template

from .plots import darkened
from .results import Table

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --muted: #5b6675; --lines: #d9dee5; --paper: #fdfdfe;
  --back: #f2f4f7; --accent: #1a6fb8; --warn: #8a3b00; --warn-back: #fdeede; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --muted: #a7b0bd; --lines: #39424f; --paper: #171c23; --back: #0f1318; --accent: #62b0f2;
    --warn: #ffc78c; --warn-back: #3b2510; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
main { max-width: 70rem; margin: 0 auto; padding: .8rem; }
section, header { background: var(--paper); border: 1px solid var(--lines); border-radius: .6rem;
  padding: .8rem 1.3rem; margin: 0 0 .8rem; }
h1 { font-size: 1rem; font-weight: 600; color: var(--muted); margin: 0; }
h2 { font-size: 1.15rem; margin: 0 0 .3rem; }
p, ul, dl { margin: .3rem 0 .5rem; max-width: 60rem; }
.headline { font-size: 1.6rem; line-height: 1.25; font-weight: 700; margin: .2rem 0 .6rem; }
ul { padding-left: 1.2rem; }
dl.verdict { display: grid; grid-template-columns: max-content 1fr; gap: .25rem .9rem; margin: 0 0 .6rem; }
.verdict dt { font-weight: 700; }
.verdict .best { color: var(--accent); font-weight: 600; }
.facts dt { font-weight: 600; float: left; clear: left; margin-right: .5rem; }
dd { margin: 0; }
.facts dd { margin-bottom: .25rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0; margin: .4rem 0 0; }
a, summary { color: var(--accent); }
.note, figcaption, footer { color: var(--muted); font-size: .9rem; }
.warning { background: var(--warn-back); color: var(--warn); border-radius: .4rem; padding: .6rem .8rem;
  font-weight: 600; }
pre { background: var(--back); border: 1px solid var(--lines); border-radius: .4rem; padding: .7rem .9rem;
  margin: .5rem 0;
  font: .88rem/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; white-space: pre-wrap; }
table { border-collapse: collapse; width: 100%; margin: .4rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--lines); text-align: right; vertical-align: baseline; }
th { font-weight: 600; }
thead th { color: var(--muted); font-size: .88rem; }
th[scope=row], thead th:first-child { padding-left: 0; }
th[scope=row], .words { text-align: left; }
td:last-child, th:last-child { padding-right: 0; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem; }
.beside > * { min-width: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)); gap: .8rem; }
figure { margin: .3rem 0; min-width: 0; max-width: 34rem; }
figure img { width: 100%; height: auto; display: block; }
summary { cursor: pointer; font-weight: 600; padding: .25rem 0; }
@media (max-width: 40rem) {
  main { padding: .5rem; }
  section, header { padding: .8rem; }
  .headline { font-size: 1.3rem; }
  dl.verdict { grid-template-columns: 1fr; gap: 0; }
  .verdict dd { margin-bottom: .5rem; }
  table, tbody, thead { display: block; }
  tr { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); column-gap: .2rem;
    border-bottom: 1px solid var(--lines); padding: .3rem 0; }
  th, td { border: 0; padding: 0; font-size: .75rem; }
  th[scope=row] { grid-column: 1 / -1; font-size: .9rem; }
  thead th:first-child { display: none; }
}
"""

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


def page(title: str, parts: Iterable[str]) -> str:
    """Returns a whole HTML document.

    Args:
        title: Title, as text.
        parts: Parts of the body, as HTML.
    """
    return PAGE.substitute(title=escape(title), style=STYLE, body="\n".join(parts))


def section(name: str, heading: str, *parts: str) -> str:
    """Returns a section with an anchor, a heading (text) and parts (HTML)."""
    return f'<section id="{escape(name)}">\n<h2>{escape(heading)}</h2>\n' + "\n".join(parts) + "\n</section>"


def contents(headings: dict[str, str]) -> str:
    """Returns a list of links to sections, whose headings are given by name."""
    links = (f'<li><a href="#{escape(name)}">{escape(text)}</a></li>' for name, text in headings.items())
    return f'<nav aria-label="contents"><ul>{"".join(links)}</ul></nav>'


def code(text: str) -> str:
    """Returns a block of code."""
    return f"<pre><code>{escape(text)}</code></pre>"


def beside(*parts: str) -> str:
    """Returns parts side by side, or one below the other if the page is narrow."""
    return '<div class="beside">\n' + "\n".join(f"<div>{part}</div>" for part in parts) + "\n</div>"


def paragraph(text: str, kind: str = "") -> str:
    """Returns a paragraph with ``kind`` as its CSS class."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(texts: Iterable[str]) -> str:
    """Returns a list with one text per item."""
    return "<ul>\n" + "\n".join(f"<li>{escape(text)}</li>" for text in texts) + "\n</ul>"


def definitions(texts: dict[str, str], kind: str = "facts", best: str = "") -> str:
    """Returns a list of terms and what they mean. The term ``best`` is highlighted."""
    items = (
        f"<dt{_best(term == best)}>{escape(term)}</dt><dd{_best(term == best)}>{escape(meaning)}</dd>"
        for term, meaning in texts.items()
    )
    return f'<dl class="{kind}">\n' + "\n".join(items) + "\n</dl>"


def _best(yes: bool) -> str:
    return ' class="best"' if yes else ""


def table(content: Table) -> str:
    """Returns a table below its explanation."""
    kinds = [
        ' class="words"' if column < content.text_columns else "" for column in range(len(content.header))
    ]
    head = (
        f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(content.header, kinds, strict=True)
    )
    return (
        f"{paragraph(content.explanation, 'note')}\n"
        f'<table style="--columns: {len(content.header) - 1}" aria-label="{escape(content.title)}">\n'
        f"<thead><tr>{''.join(head)}</tr></thead>\n<tbody>\n"
        + "\n".join(_row(row, kinds) for row in content.rows)
        + "\n</tbody>\n</table>"
    )


def _row(cells: tuple[str, ...], kinds: list[str]) -> str:
    first, *rest = (escape(cell) for cell in cells)
    others = (f"<td{kind}>{cell}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
    return f'<tr><th scope="row">{first}</th>{"".join(others)}</tr>'


def figure(svg: str, alt: str, caption: str) -> str:
    """Returns a figure that follows the reader's light or dark setting.

    Args:
        svg: SVG for light pages.
        alt: Description for readers who do not see the figure.
        caption: Caption below the figure.
    """
    return (
        "<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(darkened(svg))}">'
        f'<img src="{_data_uri(svg)}" alt="{escape(alt)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def figures(parts: Iterable[str]) -> str:
    """Returns figures side by side, or one below the other if the page is narrow."""
    return '<div class="figures">\n' + "\n".join(parts) + "\n</div>"


def details(summary: str, *parts: str) -> str:
    """Returns a part of the page that is folded until a reader opens it."""
    return f"<details><summary>{escape(summary)}</summary>\n" + "\n".join(parts) + "\n</details>"


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
