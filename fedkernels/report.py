"""One run, or several side by side, as a self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .comparison import FINAL_ACCURACY, TEST_LOSS, TIME, UPLINK, Comparison
from .data.plot import MAX_NAMED_CLASSES, class_colors
from .diagnostics.section import ROUND_WISE, diagnostics
from .figures import Curve, line_chart, partition_chart
from .metrics import is_number
from .page import esc, fold, legend, lines_of, listed, page, scrolling_table, section, swatch
from .runs import Group, name_of, read_groups

_CURVES = {
    "test_accuracy": "Test accuracy, %",
    "test_matthews": "Matthews correlation",
    "test_f1": "F1",
    "test_perplexity": "Perplexity",
    "test_loss": "Test loss",
    "train_loss": "Train loss",
}
_LINEAR = {"test_accuracy", "test_matthews", "test_f1"}
_TIME_UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
_BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write one HTML file about one run or a comparison of several; it loads nothing from anywhere.

    Runs whose configurations are equal apart from `seed` and `run_dir` are shown as mean ± standard error.

    Raises:
        ValueError: no folder given, or a damaged file.
        FileNotFoundError: a folder that is not a run.
    """
    comparison = Comparison(read_groups(run_dirs))
    groups = comparison.groups
    title = f"{listed(dict.fromkeys(group.algorithm for group in groups))} on {_names(groups, 'data')}"
    sections = [
        _header(title, comparison),
        section("Comparison", _table(comparison)) if len(groups) > 1 else _tiles(comparison),
        section("Curves", legend(groups) + _curves(groups)),
        section("Diagnostics", diagnostics(groups)),
        section("Also recorded", _small_curves(groups)),
        section("Data on the clients", _partitions(groups)),
        section("Configuration", _differences(groups) + _configurations(groups)),
        section("Environment", _environments(groups)),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(title, sections), encoding="utf-8")
    return out


def _names(groups: Sequence[Group], key: str) -> str:
    return listed(dict.fromkeys(name_of(group.runs[0].config, key) for group in groups))


def _header(title: str, comparison: Comparison) -> str:
    groups = comparison.groups
    config = groups[0].runs[0].config
    setting = [_names(groups, "model")]
    if "clients" in config:
        setting.append(f"{config.get('cohort', 'all')} of {config['clients']} clients a round")
    if "partition" in config:
        setting.append(listed(dict.fromkeys(_describe(group.runs[0].config.get("partition")) for group in groups)))
    claim = _claim_of_one(groups[0]) if len(groups) == 1 else _claim_of_several(comparison)
    remarks = [f"{group.label}: {remark}" for group in groups for run in group.runs for remark in run.remarks]
    notes = "".join(f'<p class="note">{esc(remark)}</p>' for remark in dict.fromkeys(remarks))
    return (
        f'<header><p class="kicker">{esc(" · ".join(setting))}</p><h1>{esc(title)}</h1>'
        f'<p class="claim">{esc(claim)}</p>{notes}</header>'
    )


def _describe(part: Any) -> str:
    """`dirichlet (alpha 0.3)` of a configured part."""
    if not isinstance(part, Mapping):
        return str(part)
    options = ", ".join(f"{key} {value}" for key, value in part.items() if key != "name")
    return f"{part.get('name')} ({options})" if options else str(part.get("name"))


def _claim_of_one(group: Group) -> str:
    cells = {statistic.title: statistic.cell(group) for statistic in (FINAL_ACCURACY, TEST_LOSS)}
    known = [f"{cell} {title}" for title, cell in cells.items() if cell.mean is not None]
    reached = f"reached {listed(known)} on the test set" if known else "has not been evaluated yet"
    time, uplink = TIME.cell(group), UPLINK.cell(group)
    costs = [f"{max(run.last_round for run in group.runs)} rounds"]
    costs += [f"{time.text} of training"] if time.mean is not None else []
    costs += [f"{uplink.text} sent by the clients"] if uplink.mean is not None else []
    return f"{group.label} {reached}: {listed(costs)}."


def _claim_of_several(comparison: Comparison) -> str:
    cells = {group.label: comparison.accuracy_at_equal_round.cell(group) for group in comparison.groups}
    ranked = sorted(cells, key=lambda label: -(cells[label].mean or 0))
    known = [f"{label} {cells[label]}" for label in ranked if cells[label].mean is not None]
    if not known:
        return f"{len(cells)} configurations, none evaluated yet."
    more = f" ({len(known) - 4} more below)" if len(known) > 4 else ""
    return f"Test accuracy at round {comparison.equal_round}: {listed(known[:4])}{more}."


def _tiles(comparison: Comparison) -> str:
    cells = [(statistic, statistic.cell(comparison.groups[0])) for statistic in comparison.statistics]
    tiles = "".join(
        f"<div><b>{esc(cell.text)}</b> <small>{esc(cell.detail)}</small>"
        f"<span>{esc(statistic.title)} <small>{esc(statistic.note)}</small></span></div>"
        for statistic, cell in cells
    )
    return f'<div class="tiles">{tiles}</div>'


def _table(comparison: Comparison) -> str:
    head = [f"{esc(statistic.title)}<small>{esc(statistic.note)}</small>" for statistic in comparison.statistics]
    leaders = [comparison.leaders(statistic) for statistic in comparison.statistics]
    rows = []
    for index, group in enumerate(comparison.groups):
        cells = [statistic.cell(group) for statistic in comparison.statistics]
        marks = [' class="best"' if index in leading else "" for leading in leaders]
        numbers = "".join(
            f"<td{mark}>{esc(cell.text)}<small>{esc(cell.detail)}</small></td>"
            for cell, mark in zip(cells, marks, strict=True)
        )
        seeds = f"<small>{len(group.runs)} seeds</small>" if len(group.runs) > 1 else ""
        rows.append(f"<tr><th>{swatch(index)}{esc(group.label)}{seeds}</th>{numbers}</tr>")
    return scrolling_table(head, rows)


def _curves(groups: Sequence[Group]) -> str:
    panels = []
    for key, title in _CURVES.items():
        for by in ("round", "protocol_up_bytes", "time_s"):
            if not (curves := lines_of(groups, key, by)):
                continue
            unit, label = _unit(by, max(float(curve.x.max()) for curve in curves))
            factor = 100 if key == "test_accuracy" else 1
            scaled = [Curve(c.style, c.x / unit, c.y * factor, c.se * factor) for c in curves]
            panels.append(f"<figure>{line_chart(title, label, scaled, log=key not in _LINEAR)}</figure>")
    return f'<div class="grid">{"".join(panels)}</div>' if panels else '<p class="note">No curve to show yet.</p>'


def _unit(by: str, widest: float) -> tuple[float, str]:
    """The factor and axis label that keep ticks short."""
    if by == "round":
        return 1.0, "round"
    units = _TIME_UNITS if by == "time_s" else _BYTE_UNITS
    size, name = next((unit for unit in units if widest >= 2 * unit[0]), units[-1])
    return size, f"training time, {name}" if by == "time_s" else f"uplink of all clients, {name}"


def _small_curves(groups: Sequence[Group]) -> str:
    """What else the rows hold, where it changes from round to round."""
    runs = [run for group in groups for run in group.runs]
    keys = dict.fromkeys(key for run in runs for row in run.rows for key, value in row.items() if is_number(value))
    panels = [
        f"<figure>{line_chart(key, 'round', lines_of(groups, key, 'round'), small=True)}</figure>"
        for key in keys
        if key not in ("round", "time_s", *_CURVES, *ROUND_WISE)
        and any(len(set(run.values(key).values())) > 1 for run in runs)
    ]
    return f'<div class="grid small">{"".join(panels)}</div>' if panels else ""


def _partitions(groups: Sequence[Group]) -> str:
    labels: dict[str, list[str]] = {}
    for group in groups:
        partitions = [json.dumps(run.partition) for run in group.runs if run.partition]
        # One seed's partition stands for those of a group.
        if partitions:
            labels.setdefault(partitions[0], []).append(group.label)
    pictures = [(json.loads(text), f"Partition of {listed(names)}") for text, names in labels.items()]
    return "".join(_partition(partition, title if len(pictures) > 1 else "Partition") for partition, title in pictures)


def _partition(partition: Mapping[str, Any], title: str) -> str:
    counts = np.array(partition["histogram"], dtype=np.int64)
    shown, n_classes = counts.shape
    sizes = counts.sum(axis=1)
    drawn = "A client" if shown == partition["clients"] else f"Each of the first {shown}, drawn here,"
    facts = (
        f"{title}: {partition['clients']:,} clients hold {partition['samples']:,} samples. {drawn} has "
        f"{sizes.min():,} to {sizes.max():,}, median {np.median(sizes):g}, and on average "
        f"{(counts > 0).sum(axis=1).mean():.1f} of {n_classes} classes."
    )
    colors = class_colors(n_classes)
    named = range(n_classes) if n_classes <= MAX_NAMED_CLASSES else (0, n_classes // 2, n_classes - 1)
    keys = "".join(f'<span><i class="box" style="background: {colors[c]}"></i>class {c}</span>' for c in named)
    return (
        f'<figure class="wide">{partition_chart(counts, title)}<p class="legend">{keys}</p></figure>'
        f'<p class="quiet">{esc(facts)}</p>'
    )


def _differences(groups: Sequence[Group]) -> str:
    """The keys in which the groups differ; a group's seeds share a cell."""
    if len(groups) < 2:
        return ""
    flat = [[_flatten(_shown(run.config)) for run in group.runs] for group in groups]
    keys = {key for configs in flat for config in configs for key in config} - {"run_dir"}
    rows = []
    for key in sorted(keys):
        cells = [", ".join(dict.fromkeys(config.get(key, "-") for config in configs)) for configs in flat]
        if len(set(cells)) > 1:
            rows.append(f"<tr><th>{esc(key)}</th>{''.join(f'<td>{esc(cell)}</td>' for cell in cells)}</tr>")
    return scrolling_table([esc(group.label) for group in groups], rows)


def _configurations(groups: Sequence[Group]) -> str:
    folds = []
    for group in groups:
        if config := _shown(group.runs[0].config):
            seeds = listed(str(run.config.get("seed")) for run in group.runs)
            title = f"{group.label}, seed{'s' * (len(group.runs) > 1)} {seeds}"
            text = f"<pre>{esc(yaml.safe_dump(config, sort_keys=False))}</pre>"
            folds.append(fold(title, text, open=len(groups) == 1))
    return "".join(folds)


def _shown(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the seed that would let a reader subtract the noise."""
    privacy = config.get("privacy")
    if not isinstance(privacy, Mapping) or privacy.get("noise_seed") is None:
        return dict(config)
    return {**config, "privacy": {**privacy, "noise_seed": "(secret)"}}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _environments(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs if run.environment]
    folders: dict[str, list[str]] = {}
    for run in runs:
        folders.setdefault(json.dumps(run.environment), []).append(run.path.name)
    folds = []
    for text, names in folders.items():
        known = {key: value for key, value in json.loads(text).items() if value is not None}
        rows = "".join(
            f"<tr><th>{esc(key)}</th><td>{esc(listed(map(str, value)) if isinstance(value, list) else value)}</td></tr>"
            for key, value in known.items()
        )
        title = "all runs" if len(names) == len(runs) > 1 else listed(names)
        folds.append(fold(title, f'<table class="plain">{rows}</table>', open=len(folders) == 1))
    return "".join(folds)
