"""The report's section on diagnostics: measures side by side, slices, clients, and what changes over rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..comparison import Statistic
from ..figures import Bar, Curve, bar_chart, contour_chart, line_chart, matrix_chart
from ..formats import format_number
from ..page import esc, legend, lines_of, scrolling_table, swatch
from ..runs import Group, Run
from .table import TITLES, number, spread

# Columns of `metrics.jsonl` with a place here rather than among what is also recorded.
ROUND_WISE = {
    "epsilon": "Privacy spent, ε",
    "preconditioner_drift": "Preconditioner drift",
    "clipped_fraction": "Clipped fraction of updates",
    "noise_to_signal": "Noise to signal",
}
COMPARED = ("lambda_max", "trace", "sharpness_one_step", "sharpness_ascent")
MAX_CLIENTS = 24


def diagnostics(groups: Sequence[Group]) -> str:
    """HTML about the groups that have been diagnosed or have such columns; empty where none has."""
    diagnosed = [(style, group) for style, group in enumerate(groups) if _first(group)]
    parts = [_round_wise(groups)]
    if len(groups) == 1 and diagnosed:
        parts = [_of_one(diagnosed[0][1]), *parts]
    elif diagnosed:
        parts = [_side_by_side(diagnosed, groups), *parts]
    return "".join(parts)


def _first(group: Group) -> Mapping[str, Any]:
    """The diagnosis of the group's first diagnosed seed, for what has no mean."""
    return next((run.diagnosis for run in group.runs if run.diagnosis), {})


def _grid(charts: Sequence[str]) -> str:
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts)
    return f'<div class="grid">{figures}</div>' if charts else ""


def _round_wise(groups: Sequence[Group]) -> str:
    charts = []
    for key, title in ROUND_WISE.items():
        if curves := lines_of(groups, key, "round"):
            charts.append(line_chart(title, "round", curves, log=key != "clipped_fraction"))
    return _grid(charts)


def _of_one(group: Group) -> str:
    found = _first(group)
    return (
        f'<p class="quiet">{esc(_setting(found))}</p>'
        f"{_measures(found)}{_grid([_line_slice([(0, group)]), _square(found), *_updates(found)])}"
        f"{_grid([*_clients(found), *_drift(found)])}"
    )


def _setting(found: Mapping[str, Any]) -> str:
    settings = found["settings"]
    return (
        f"At round {found['round']}: the global loss f at the server's model x over {found['global_samples']:,} "
        f"training samples, and each f_i of a cohort of {len(found['updates']['clients'])} at the y_i where one round "
        f"of local training with learning rate {settings['lr']:g} ends. Sharpness is the rise of the loss within ρ = "
        f"{settings['rho']:g}, by one SAM step and by {settings['ascent_steps']} steps of projected ascent; the trace "
        f"is from {settings['probes']} probes, ± a standard error; eigenvalues are by Lanczos, ± their residual."
    )


def _measures(found: Mapping[str, Any]) -> str:
    rows = []
    for name, record in found["measures"].items():
        gap, at_x = record["discrepancy"], record["global"]
        cells = [f"{number(at_x['value'])}<small>{esc(spread(at_x))}</small>"]
        cells += [
            f"{number(gap['local_mean'])}<small>{number(gap['local_min'])} to {number(gap['local_max'])}</small>",
            number(gap["difference"]),
            number(gap["ratio"]),
        ]
        rows.append(f"<tr><th>{esc(TITLES[name])}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = [
        "global<small>f at x</small>",
        "local<small>mean of f_i at y_i, range</small>",
        "difference<small>local − global</small>",
        "ratio<small>local / global</small>",
    ]
    return scrolling_table(head, rows)


def _side_by_side(diagnosed: Sequence[tuple[int, Group]], groups: Sequence[Group]) -> str:
    statistics = [
        Statistic(TITLES[name], note, _value(name, *path), format_number)
        for name in COMPARED
        for note, path in (
            ("global, at x", ("global", "value")),
            ("local − global", ("discrepancy", "difference")),
        )
    ]
    rows = []
    for style, group in diagnosed:
        cells = [statistic.cell(group) for statistic in statistics]
        numbers = "".join(f"<td>{esc(cell.text)}<small>{esc(cell.detail)}</small></td>" for cell in cells)
        note = f"<small>round {_first(group)['round']}</small>"
        rows.append(f"<tr><th>{swatch(style)}{esc(group.label)}{note}</th>{numbers}</tr>")
    head = [f"{esc(statistic.title)}<small>{esc(statistic.note)}</small>" for statistic in statistics]
    squares = [_square(_first(group), group.label) for _, group in diagnosed]
    return f"{scrolling_table(head, rows)}{legend(groups)}{_grid([_line_slice(diagnosed), *squares])}"


def _value(name: str, *path: str) -> Any:
    def value(run: Run) -> float | None:
        node = run.diagnosis.get("measures", {}).get(name, {})
        for key in path:
            node = node.get(key, {})
        return node if isinstance(node, (int, float)) else None

    return value


def _line_slice(diagnosed: Sequence[tuple[int, Group]]) -> str:
    curves = []
    for style, group in diagnosed:
        line = _first(group)["slices"]["line"]
        loss = np.array(line["loss"], dtype=float)
        curves.append(Curve(style, np.array(line["offsets"]), loss, np.zeros_like(loss), marked=len(loss) // 2))
    return line_chart("Loss along a random direction", "filter-normalised offset from x", curves, log=True)


def _square(found: Mapping[str, Any], label: str = "") -> str:
    square = found["slices"]["square"]
    title = f"Loss over two directions, {label}" if label else "Loss over two random directions"
    offsets, loss = np.array(square["offsets"]), np.array(square["loss"], dtype=float)
    return contour_chart(title, "filter-normalised offsets from x", offsets, loss)


def _updates(found: Mapping[str, Any]) -> list[str]:
    updates = found["updates"]
    names = [str(client) for client in updates["clients"][:MAX_CLIENTS]]
    cosine = np.array(updates["cosine"])[: len(names), : len(names)]
    return [matrix_chart("Cosine between updates", names, cosine)] if len(names) > 1 else []


def _clients(found: Mapping[str, Any]) -> list[str]:
    updates, measures = found["updates"], found["measures"]

    def bars(values: Sequence[float | None]) -> list[Bar]:
        named = zip(updates["clients"], values, strict=True)
        return [Bar(f"client {i}", value) for i, value in named if value is not None][:MAX_CLIENTS]

    def local(name: str) -> list[Bar]:
        return bars([point["value"] for point in measures[name]["local"]])

    def at_x(name: str) -> tuple[str, float]:
        return "f at x", measures[name]["global"]["value"]

    return [
        bar_chart("λ_max of the Hessian of f_i at y_i", local("lambda_max"), at_x("lambda_max")),
        bar_chart("Trace of the Hessian of f_i at y_i", local("trace"), at_x("trace")),
        bar_chart("Sharpness of f_i at y_i, by ascent", local("sharpness_ascent"), at_x("sharpness_ascent")),
        bar_chart("Norm of the update y_i − x", bars(updates["norm"]), ("of the mean", updates["norm_of_mean"])),
        bar_chart("Cosine of the update to the mean", bars(updates["cosine_to_mean"])),
    ]


def _drift(found: Mapping[str, Any]) -> list[str]:
    charts = []
    for name, state in found["preconditioner_drift"].items():
        bars = [Bar("all", state["relative"] or 0.0)]
        bars += [Bar(layer, part["relative"] or 0.0) for layer, part in list(state["by_layer"].items())[:MAX_CLIENTS]]
        charts.append(bar_chart(f"Relative drift of {name}", bars))
    return charts
