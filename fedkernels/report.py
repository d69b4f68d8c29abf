"""One run, or several side by side: a self-contained HTML page, or a plain-text table for the terminal."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .comparison import (
    BEST_ACCURACY,
    FINAL_ACCURACY,
    TEST_LOSS,
    TIME,
    Comparison,
    Group,
    Statistic,
    format_percent,
    name_of,
    read_groups,
    total,
)
from .figures import DASHES, SERIES, Curve, class_color, line_chart, partition_chart
from .metrics import format_bytes, is_number

# Keys with panels or columns of their own; the others of a row become small curves.
_SHOWN = {"round", "time_s", "train_loss", "test_loss", "test_accuracy"}
# Worth a small curve only when they change.
_STEADY = {"cohort", "dropped", "protocol_up_bytes", "protocol_down_bytes", "link_bytes"}
_MAX_NAMED_CLASSES = 24
_TIME_UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
_BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def comparison_table(run_dirs: Sequence[Path]) -> str:
    """The comparison as aligned plain text, one line per configuration, for a terminal.

    Raises:
        ValueError: no folder given, or a damaged file.
        FileNotFoundError: a folder that is not a run.
    """
    up_mb = Statistic("up MB", "", partial(total, key="protocol_up_bytes"), _megabytes)
    columns = (FINAL_ACCURACY, BEST_ACCURACY, TEST_LOSS, up_mb, TIME)
    lines = [["run", "algorithm", "rounds", "final acc", "best acc", "test loss", "up MB", "time"]]
    for group in read_groups(run_dirs):
        seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
        rounds = dict.fromkeys(f"{run.last_round}/{run.planned_rounds}" for run in group.runs)
        numbers = [f"{cell.text} {cell.detail}".rstrip() for cell in (column.cell(group) for column in columns)]
        lines.append([group.folder + seeds, group.algorithm, ", ".join(rounds), *numbers])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    template = "  ".join(f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(template.format(*line) for line in lines)


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write one HTML file about one run or a comparison of several; it loads nothing from anywhere.

    Runs whose configurations are equal apart from `seed` and `run_dir` are shown as mean ± standard error.

    Raises:
        ValueError: no folder given, or a damaged file.
        FileNotFoundError: a folder that is not a run.
    """
    comparison = Comparison(read_groups(run_dirs))
    groups = comparison.groups
    title = f"{_list(dict.fromkeys(group.algorithm for group in groups))} on {_names(groups, 'data')}"
    sections = [
        _header(title, comparison),
        _section("Comparison" if len(groups) > 1 else "Summary", _table(comparison)),
        _section("Curves", _legend(groups) + _curves(groups)),
        _section("Also recorded", _small_curves(groups)),
        _section("Data on the clients", _partitions(groups)),
        _section("Configuration", _configurations(groups)),
        _section("Environment", _environments(groups)),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_PAGE.format(title=_e(title), css=_css(), body="\n".join(sections)), encoding="utf-8")
    return out


def _e(text: object) -> str:
    return html.escape(str(text))


def _list(items: Iterable[str]) -> str:
    *head, last = items
    return f"{', '.join(head)} and {last}" if head else last


def _names(groups: Sequence[Group], key: str) -> str:
    return _list(dict.fromkeys(name_of(group.runs[0].config, key) for group in groups))


def _megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.3f}".rstrip("0").rstrip(".")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>\n{body}\n</section>" if body else ""


def _header(title: str, comparison: Comparison) -> str:
    groups = comparison.groups
    config = groups[0].runs[0].config
    setting = [_names(groups, "model")]
    if "clients" in config:
        setting.append(f"{config.get('cohort', 'all')} of {config['clients']} clients a round")
    if "partition" in config:
        setting.append(_describe(config["partition"]))
    stopped = [f"{group.label}: {where}" for group in groups for where in group.stopped]
    notes = "".join(f'<p class="note">{_e(note)}</p>' for note in stopped)
    tiles = _tiles(comparison) if len(groups) == 1 else ""
    return (
        f'<header><p class="kicker">{_e(" · ".join(setting))}</p><h1>{_e(title)}</h1>'
        f'<p class="claim">{_e(_claim(comparison))}</p>{notes}{tiles}</header>'
    )


def _describe(part: Any) -> str:
    """`dirichlet (alpha 0.3)` of a configured part."""
    if not isinstance(part, Mapping):
        return str(part)
    options = ", ".join(f"{key} {value}" for key, value in part.items() if key != "name")
    return f"{part.get('name', 'partition')} ({options})" if options else str(part.get("name"))


def _claim(comparison: Comparison) -> str:
    groups = comparison.groups
    if len(groups) == 1:
        cells = [(s, s.cell(groups[0])) for s in (FINAL_ACCURACY, TEST_LOSS)]
        known = [f"{cell.text} {cell.detail}".strip() + f" {s.title}" for s, cell in cells if cell.mean is not None]
        reached = f"reached {_list(known)} on the test set" if known else "has not been evaluated yet"
        up = Statistic("", "", partial(total, key="protocol_up_bytes"), format_bytes).cell(groups[0])
        cost = [f"{max(run.last_round for run in groups[0].runs)} rounds", f"{TIME.cell(groups[0]).text} of training"]
        cost += [f"{up.text} sent by the clients"] if up.mean is not None else []
        return f"{groups[0].label} {reached}: {_list(cost)}."
    at = Statistic("", "", comparison.accuracy_at_equal_rounds, format_percent)
    ranked = sorted(((at.cell(group), group.label) for group in groups), key=lambda pair: -(pair[0].mean or 0))
    known = [f"{label} {cell.text} {cell.detail}".strip() for cell, label in ranked if cell.mean is not None]
    if not known:
        return f"{len(groups)} configurations, none evaluated yet."
    more = f" ({len(known) - 4} more below)" if len(known) > 4 else ""
    return f"Test accuracy at round {comparison.equal_round}: {_list(known[:4])}{more}."


def _tiles(comparison: Comparison) -> str:
    shown = ("final accuracy", "best accuracy", "rounds", "uplink", "time", "clients/s")
    tiles = []
    for statistic in comparison.statistics:
        cell = statistic.cell(comparison.groups[0])
        name = f"{statistic.note} {statistic.title}" if statistic.note in ("final", "best") else statistic.title
        if cell.mean is not None and name in shown:
            tiles.append(f"<div><b>{_e(cell.text)}</b><small>{_e(cell.detail)}</small><span>{_e(name)}</span></div>")
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _table(comparison: Comparison) -> str:
    head = [f"{_e(statistic.title)}<small>{_e(statistic.note)}</small>" for statistic in comparison.statistics]
    leaders = [comparison.leaders(statistic) for statistic in comparison.statistics]
    rows = []
    for index, group in enumerate(comparison.groups):
        cells = [statistic.cell(group) for statistic in comparison.statistics]
        marks = [' class="best"' if index in leading else "" for leading in leaders]
        numbers = "".join(
            f"<td{mark}>{_e(cell.text)}<small>{_e(cell.detail)}</small></td>"
            for cell, mark in zip(cells, marks, strict=True)
        )
        seeds = f"<small>{len(group.runs)} seeds</small>" if len(group.runs) > 1 else ""
        rows.append(f"<tr><th>{_swatch(index)}{_e(group.label)}{seeds}</th>{numbers}</tr>")
    return _scrolling_table(head, rows)


def _scrolling_table(head: Sequence[str], rows: Sequence[str]) -> str:
    titles = "".join(f"<th>{cell}</th>" for cell in ("", *head))
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _swatch(index: int) -> str:
    style = ("solid", "dashed", "dotted")[index // len(SERIES) % len(DASHES)]
    return f'<i class="line" style="border-top: 3px {style} var(--s{index % len(SERIES)})"></i>'


def _legend(groups: Sequence[Group]) -> str:
    items = [f"<span>{_swatch(i)}{_e(group.label)}</span>" for i, group in enumerate(groups)] if len(groups) > 1 else []
    if any(len(group.runs) > 1 for group in groups):
        items.append('<span class="quiet">bands: mean ± standard error over seeds</span>')
    return f'<p class="legend">{"".join(items)}</p>' if items else ""


def _lines(groups: Sequence[Group], key: str, by: str) -> list[Curve]:
    drawn = [(style, *group.curve(key, by)) for style, group in enumerate(groups)]
    return [Curve(*curve) for curve in drawn if len(curve[1])]


def _curves(groups: Sequence[Group]) -> str:
    panels = []
    for key, title in (("test_accuracy", "Test accuracy, %"), ("test_loss", "Test loss"), ("train_loss", "Train loss")):
        for by in ("round", "protocol_up_bytes", "time_s"):
            curves = _lines(groups, key, by)
            if not curves:
                continue
            widest = max(float(curve.x.max()) for curve in curves)
            unit, label = _unit(by, widest)
            factor = 100 if key == "test_accuracy" else 1
            scaled = [Curve(c.style, c.x / unit, c.y * factor, c.se * factor) for c in curves]
            panels.append(f"<figure>{line_chart(title, label, scaled, log=key != 'test_accuracy')}</figure>")
    return f'<div class="grid">{"".join(panels)}</div>' if panels else '<p class="note">No round has finished yet.</p>'


def _unit(by: str, widest: float) -> tuple[float, str]:
    """The factor and axis label that keep ticks short."""
    if by == "round":
        return 1.0, "round"
    units = _TIME_UNITS if by == "time_s" else _BYTE_UNITS
    size, name = next((unit for unit in units if widest >= 2 * unit[0]), units[-1])
    return size, f"training time, {name}" if by == "time_s" else f"uplink of all clients, {name}"


def _small_curves(groups: Sequence[Group]) -> str:
    rows = [row for group in groups for run in group.runs for row in run.rows]
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if key not in _SHOWN and is_number(value))
    panels = []
    for key in keys:
        if key in _STEADY and len({row[key] for row in rows if is_number(row.get(key))}) < 2:
            continue
        if curves := _lines(groups, key, "round"):
            panels.append(f"<figure>{line_chart(key, 'round', curves, small=True)}</figure>")
    return f'<div class="grid small">{"".join(panels)}</div>' if panels else ""


def _partitions(groups: Sequence[Group]) -> str:
    pictures: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for group in groups:
        partition = group.runs[0].partition
        if partition.get("histogram"):
            pictures.setdefault(json.dumps(partition["histogram"]), (partition, []))[1].append(group.label)
    several = len(pictures) > 1
    return "".join(_partition(partition, labels if several else []) for partition, labels in pictures.values())


def _partition(partition: Mapping[str, Any], labels: Sequence[str]) -> str:
    histogram = np.array(partition["histogram"], dtype=np.int64)
    n_clients, n_classes = partition.get("clients", len(histogram)), histogram.shape[1]
    sizes = np.array(partition.get("sizes") or histogram.sum(axis=1))
    facts = [
        *([_list(labels)] if labels else []),
        f"{n_clients} clients hold {partition.get('samples', sizes.sum())} samples",
        f"{sizes.min()} to {sizes.max()} each, median {np.median(sizes):g}",
        f"{(histogram > 0).sum(axis=1).mean():.1f} of {n_classes} classes on an average client",
        *([f"first {len(histogram)} clients shown"] if len(histogram) < n_clients else []),
    ]
    names = partition.get("class_names") or [f"class {index}" for index in range(n_classes)]
    shown = range(n_classes) if n_classes <= _MAX_NAMED_CLASSES else (0, n_classes // 2, n_classes - 1)
    keys = "".join(
        f'<span><i class="box" style="background: {class_color(index, n_classes)}"></i>{_e(names[index])}</span>'
        for index in shown
    )
    return (
        f'<figure class="wide">{partition_chart(histogram)}<p class="legend">{keys}</p>'
        f"<figcaption>{_e('; '.join(facts))}.</figcaption></figure>"
    )


def _configurations(groups: Sequence[Group]) -> str:
    parts = []
    if len(groups) > 1:
        flat = [[_flatten(run.config) for run in group.runs] for group in groups]
        # A group's seeds share one cell; what the groups share is in the folded files.
        values = {
            key: [", ".join(dict.fromkeys(config.get(key, "-") for config in configs)) for configs in flat]
            for key in dict.fromkeys(
                key for configs in flat for config in configs for key in config if key != "run_dir"
            )
        }
        differ = {key: cells for key, cells in values.items() if len(set(cells)) > 1}
        rows = [
            f"<tr><th>{_e(key)}</th>{''.join(f'<td>{_e(cell)}</td>' for cell in cells)}</tr>"
            for key, cells in differ.items()
        ]
        parts.append(_scrolling_table([_e(group.label) for group in groups], rows))
    for group in groups:
        files = [run for run in group.runs if run.config]
        body = "".join(f"<pre>{_e(yaml.safe_dump(run.config, sort_keys=False))}</pre>" for run in files[:1])
        seeds = ", ".join(str(run.config.get("seed", "-")) for run in files)
        if body:
            parts.append(f"<details><summary>{_e(group.label)}, seed {_e(seeds)}</summary>{body}</details>")
    return "".join(parts)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _environments(groups: Sequence[Group]) -> str:
    distinct: dict[str, list[str]] = {}
    for group in groups:
        for run in group.runs:
            if run.environment:
                distinct.setdefault(json.dumps(run.environment), []).append(run.path.name)
    parts = []
    for text, folders in distinct.items():
        rows = "".join(
            f"<tr><th>{_e(key)}</th><td>{_e(_list(map(str, value)) if isinstance(value, list) else value)}</td></tr>"
            for key, value in json.loads(text).items()
            if value is not None
        )
        title = "all runs" if len(distinct) == 1 and sum(len(group.runs) for group in groups) > 1 else _list(folders)
        parts.append(f'<details><summary>{_e(title)}</summary><table class="plain">{rows}</table></details>')
    return "".join(parts)


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
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 10px; margin-top: 18px }
.tiles div { padding: 12px 14px; background: var(--card); border-radius: 8px }
.tiles b { display: block; font-size: 23px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums }
.tiles span { display: block; color: var(--quiet) }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { padding: 7px 9px; text-align: right; vertical-align: top; white-space: nowrap }
th { font-weight: 600 }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
thead th { background: var(--card) !important }
tbody tr + tr > * { border-top: 1px solid var(--line) }
td small, th small { display: block; font-weight: 400; font-size: 11.5px }
.best { font-weight: 700; color: var(--s2) }
.line { display: inline-block; width: 18px; margin-right: 7px; vertical-align: middle }
.box { display: inline-block; width: 11px; height: 11px; margin-right: 5px; border-radius: 2px }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 10px; font-size: 14px }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 18px 24px }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(min(250px, 100%), 1fr)) }
figure { margin: 0; min-width: 0 }
figure svg { display: block; width: 100%; height: auto }
.wide { overflow-x: auto; margin-bottom: 24px }
.wide svg { min-width: 720px }
.wide .legend { font-size: 13px; margin-top: 6px; gap: 2px 14px }
details { margin: 8px 0; border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px }
summary { cursor: pointer; overflow-wrap: anywhere }
pre { overflow-x: auto; font-size: 13px; line-height: 1.45 }
.plain th, .plain td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top }
.plain th { width: 11em }
@media print { body { max-width: none; padding: 0 } section { break-inside: avoid } }"""
