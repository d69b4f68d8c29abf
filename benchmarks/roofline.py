"""Rates against arithmetic intensity, under the ceilings measured in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLOURS = plt.get_cmap("tab10").colors


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel for rows and one for matrices: a column of dots for each job, ours filled.

    Intensity is that of the job, FLOP of its equations to bytes of its inputs and outputs, so that variants of a job
    stand above one another and the height is their speed; jobs of nearly the same are moved apart. Of several numbers
    of threads the largest is shown.
    """
    threads = max(result["threads"] for result in results)
    shown = [result for result in results if result["threads"] == threads]
    panels = [limit for limit in ("memory", "arithmetic") if any(r["limit"] == limit for r in shown)]
    figure, axes = plt.subplots(len(panels), 1, figsize=(11, 6.2 * len(panels)), squeeze=False, layout="constrained")
    for axis, limit in zip(axes[:, 0], panels, strict=True):
        _panel(axis, [result for result in shown if result["limit"] == limit], limit)
    where = f"{threads} thread{'s' * (threads > 1)}" if shown[0]["device"] == "cpu" else "GPU"
    figure.suptitle(f"Kernels on {where}: ours filled, others hollow", fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Axes, results: Sequence[dict[str, Any]], limit: str) -> None:
    jobs = list(dict.fromkeys((r["op"], r["shape"], r["dtype"]) for r in results))
    variants = list(dict.fromkeys(r["variant"] for r in results))
    intensity = {job: next(r["flop_per_byte"] for r in results if _job(r) == job) for job in jobs}
    ceiling = max(r["ceiling"]["median"] for r in results)
    low, high = min(intensity.values()) / 1.6, max(intensity.values()) * 1.6
    if limit == "memory":
        title, roof = f"Steps over rows; copy: {ceiling / 1e9:.1f} GB/s", [low * ceiling / 1e9, high * ceiling / 1e9]
    else:
        title, roof = f"Matrices; square product: {ceiling / 1e9:,.0f} GFLOP/s", [ceiling / 1e9] * 2
    axis.plot([low, high], roof, color="black", linewidth=1, zorder=1)
    # Jobs of equal intensity would hide each other: they stand beside one another.
    ordered = sorted(jobs, key=lambda job: intensity[job])
    places = _apart([intensity[job] for job in ordered], low, high)
    for job, x in zip(ordered, places, strict=True):
        mine = [r for r in results if _job(r) == job]
        rates = [r["flop_per_s"]["median"] / 1e9 for r in mine]
        axis.plot([x, x], [min(rates), max(rates)], color="0.85", linewidth=1, zorder=0)
        for r, rate in zip(mine, rates, strict=True):
            index = variants.index(r["variant"])
            colour, ours = COLOURS[index % 10], r["variant"].startswith("fedkernels")
            marker = "osD^vP"[index // 10 % 6] if index >= 10 else "o"
            axis.plot(
                x, rate, marker, markersize=9 if ours else 7, markeredgecolor=colour, markeredgewidth=1.6,
                markerfacecolor=colour if ours else "none", linestyle="none",
            )  # fmt: skip
        dtype = "" if job[2] == "float32" else f", {job[2]}"
        axis.annotate(
            f"{job[0]}\n{job[1]}{dtype}", (x, min(rates)), (0, -12), textcoords="offset points", rotation=90,
            ha="center", va="top", fontsize=8,
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlim=(low, high), title=title)
    axis.set(xlabel="FLOP per byte of inputs and outputs", ylabel="GFLOP/s of the equations")
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom / (top / bottom) ** 0.35, top)  # room for names
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 5) if side is axis.xaxis else (1,)))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        side.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25)
    for index, name in enumerate(variants):
        colour, ours = COLOURS[index % 10], name.startswith("fedkernels")
        marker = "osD^vP"[index // 10 % 6] if index >= 10 else "o"
        axis.plot([], [], marker, color=colour, markerfacecolor=colour if ours else "none", label=name)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _job(result: dict[str, Any]) -> tuple[str, str, str]:
    return result["op"], result["shape"], result["dtype"]


def _apart(values: Sequence[float], low: float, high: float) -> list[float]:
    """Ascending places on a logarithmic axis, each as near its value as the labels' width allows."""
    factor = (high / low) ** 0.035
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] * factor) if places else value)
    return places
