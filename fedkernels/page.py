"""Pieces of a self-contained HTML page: text, tables, legends, and the sheet they share."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from .figures import DASHES, SERIES, Curve
from .runs import Group


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page that loads nothing from anywhere; empty sections are left out."""
    return _PAGE.format(title=esc(title), css=_css(), body="\n".join(filter(None, sections)))


def esc(text: object) -> str:
    """Any text, safe in HTML."""
    return html.escape(str(text))


def listed(items: Iterable[str]) -> str:
    """`a, b and c`."""
    *head, last = items
    return f"{', '.join(head)} and {last}" if head else last


def section(title: str, body: str) -> str:
    """A headed section; nothing where there is no body."""
    return f"<section><h2>{title}</h2>\n{body}\n</section>" if body else ""


def scrolling_table(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table of rows of HTML cells, the first of which stays in view; `head` leaves out the corner."""
    titles = "".join(f"<th>{cell}</th>" for cell in ("", *head))
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def swatch(index: int) -> str:
    """The line that curves of that style are drawn with."""
    style = ("solid", "dashed", "dotted")[index // len(SERIES) % len(DASHES)]
    return f'<i class="line" style="border-top: 3px {style} var(--s{index % len(SERIES)})"></i>'


def legend(groups: Sequence[Group]) -> str:
    """Names of the curves, where there is more than one."""
    items = [f"<span>{swatch(i)}{esc(group.label)}</span>" for i, group in enumerate(groups)] if len(groups) > 1 else []
    if any(len(group.runs) > 1 for group in groups):
        items.append('<span class="quiet">bands: mean ± standard error over seeds</span>')
    return f'<p class="legend">{"".join(items)}</p>' if items else ""


def lines_of(groups: Sequence[Group], key: str, by: str) -> list[Curve]:
    """A curve for every group that has the key, styled by its place."""
    drawn = [(style, *group.curve(key, by)) for style, group in enumerate(groups)]
    return [Curve(*curve) for curve in drawn if len(curve[1])]


def fold(title: str, body: str, *, open: bool) -> str:
    """A body that can be folded away."""
    return f"<details{' open' * open}><summary>{esc(title)}</summary>{body}</details>"


def _css() -> str:
    light, dark = ("".join(f"--s{i}: {pair[mode]}; " for i, pair in enumerate(SERIES)) for mode in (0, 1))
    return (
        f":root {{ color-scheme: light dark; --ink: #1b1f24; --quiet: #5c6570; --paper: #fff; --card: #f6f7f9; "
        f"--line: #d5dae0; {light}}}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e9ee; --quiet: #9aa5b1; --paper: #14171b; "
        f"--card: #1d2126; --line: #3a424b; {dark}}} }}\n{_RULES}"
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{css}
</style>
</head>
<body>
{body}
</body>
</html>
"""

_RULES = """* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 24px clamp(14px, 3vw, 40px) 60px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { margin: 2px 0 6px; font-size: clamp(24px, 4vw, 34px); line-height: 1.15; overflow-wrap: anywhere }
h2 { margin: 40px 0 12px; font-size: 19px }
p { margin: 6px 0 }
.kicker, .quiet, figcaption, small { color: var(--quiet) }
.claim { font-size: 17px; max-width: 60em; overflow-wrap: anywhere }
.note { padding: 6px 12px; border-left: 3px solid var(--s1); background: var(--card) }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin-top: 18px }
.tiles div { padding: 12px 14px; background: var(--card); border-radius: 8px }
.tiles b { font-size: 22px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums }
.tiles span, .tiles span small { display: block; color: var(--quiet) }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { padding: 7px 9px; text-align: right; vertical-align: top; white-space: nowrap }
th { font-weight: 600 }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
thead th { background: var(--card) !important; white-space: normal; min-width: 84px }
tbody tr + tr > * { border-top: 1px solid var(--line) }
td small, th small { display: block; font-weight: 400; font-size: 11.5px }
.best { font-weight: 700; color: var(--s2) }
.line { display: inline-block; width: 18px; margin-right: 7px; vertical-align: middle }
.box { display: inline-block; width: 11px; height: 11px; margin-right: 5px; border-radius: 2px }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 10px; font-size: 14px }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 18px 24px }
.scroll + .legend, .quiet + .scroll { margin-top: 14px }
.scroll + .grid, .grid + .grid { margin-top: 22px }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(min(250px, 100%), 1fr)) }
figure { margin: 0; min-width: 0 }
.small figure { max-width: 330px }
figure svg { display: block; width: 100%; height: auto }
.wide { overflow-x: auto }
.wide svg { min-width: 720px }
.wide .legend { font-size: 13px; margin-top: 6px; gap: 2px 14px }
details { margin: 8px 0; border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px }
summary { cursor: pointer; overflow-wrap: anywhere }
pre { columns: 3 250px; overflow-x: auto; font-size: 13px; line-height: 1.45 }
.plain th, .plain td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top }
.plain th { width: 11em }
@media print { body { max-width: none; padding: 0 } section { break-inside: avoid } }"""
