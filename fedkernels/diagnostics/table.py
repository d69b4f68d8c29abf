"""A diagnosis as plain text, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..formats import format_number, format_share

TITLES = {
    "loss": "loss",
    "gradient_norm": "gradient norm",
    "lambda_max": "Hessian λ_max",
    "trace": "Hessian trace",
    "sharpness_one_step": "sharpness, one step",
    "sharpness_ascent": "sharpness, ascent",
}


def number(value: float | None) -> str:
    """Four digits; `-` for what could not be measured."""
    return "-" if value is None else format_number(value)


def spread(at_x: Mapping[str, Any]) -> str:
    """The uncertainty of a measure at x, where it has one: a standard error or a residual."""
    error = at_x.get("standard_error", at_x.get("residual"))
    return "" if error is None else f"± {format_number(error)}"


def diagnosis_table(diagnosis: Mapping[str, Any]) -> str:
    """The measures in aligned columns, then a line each about updates, gradients and drift."""
    lines = [["", "global f at x", "", "mean of f_i at y_i", "least", "most", "local − global"]]
    for name, record in diagnosis["measures"].items():
        gap = record["discrepancy"]
        local = [number(gap[key]) for key in ("local_mean", "local_min", "local_max", "difference")]
        lines.append([TITLES[name], number(record["global"]["value"]), spread(record["global"]), *local])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    template = "  ".join(f"{{:{'<' if i in (0, 2) else '>'}{width}}}" for i, width in enumerate(widths))
    text = [template.format(*line).rstrip() for line in lines]
    updates, gradients = diagnosis["updates"], diagnosis["gradients"]
    text.append(
        f"updates of {len(updates['clients'])} clients: norm {number(min(updates['norm']))} to "
        f"{number(max(updates['norm']))}, of the mean {number(updates['norm_of_mean'])}, "
        f"mean pairwise cosine {number(updates['mean_pairwise_cosine'])}"
    )
    clip = "no clipping" if gradients["clip_norm"] is None else f"clip norm {gradients['clip_norm']:g}"
    text.append(
        f"mini-batch gradients: median norm {number(gradients['norm_p50'])}, "
        f"clipped {format_share(gradients['clipped_fraction'])} ({clip})"
    )
    for name, found in diagnosis["preconditioner_drift"].items():
        text.append(f"drift of {name}: {number(found['value'])}, relative {number(found['relative'])}")
    for column, found in diagnosis.get("recorded", {}).items():
        text.append(f"{column}: {number(found['last'])} in the last round, mean {number(found['mean'])}")
    return "\n".join(text)
