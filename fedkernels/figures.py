"""The report's figures: inline SVG that takes its colours and font from the page, hence follows light and dark mode."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .data.plot import draw_clients

# (on white, on black), told apart under the common colour-vision deficiencies (after Okabe and Ito).
SERIES = (
    ("#0072b2", "#4aa8e0"),
    ("#d55e00", "#f5893d"),
    ("#009e73", "#2cc79a"),
    ("#b8578f", "#e09ac2"),
    ("#c98a00", "#f0b93a"),
    ("#3f9fd4", "#8fd0f5"),
    ("#5b5b5b", "#b4b4b4"),
)
DASHES: tuple[str | tuple[float, tuple[float, ...]], ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))
# Stand-ins for colours of the page, replaced in the SVG.
_INK, _GRID, _PAPER = "#010203", "#040506", "#070809"
# `Any` keys: matplotlib's stubs want every name to be a literal.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.linewidth": 1.9,
}
_MAX_POINTS = 300


@dataclass(frozen=True)
class Curve:
    """A line with a ± band: `x`, `y` and `se` are `[points]`; `style` numbers its colour and dashes.

    `marked` is the point with a dot, the last one by default.
    """

    style: int
    x: np.ndarray
    y: np.ndarray
    se: np.ndarray
    marked: int = -1


@dataclass(frozen=True)
class Bar:
    """A named value."""

    name: str
    value: float


def line_chart(title: str, x_label: str, curves: Sequence[Curve], *, small: bool = False, log: bool = False) -> str:
    """One panel of curves with standard-error bands; `log` where a positive range spans more than 1.5 decades."""
    description = f"{title} by {x_label}"
    with mpl.rc_context({**_STYLE, "svg.hashsalt": description}):
        figure = Figure(figsize=(3.7, 2.3) if small else (4.9, 3.35), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            keep = np.unique(np.linspace(0, len(curve.x) - 1, min(len(curve.x), _MAX_POINTS)).round().astype(int))
            x, y, se = curve.x[keep], curve.y[keep], curve.se[keep]
            color = SERIES[curve.style % len(SERIES)][0]
            axes.plot(x, y, color=color, linestyle=DASHES[curve.style // len(SERIES) % len(DASHES)])
            axes.plot(curve.x[[curve.marked]], curve.y[[curve.marked]], "o", color=color, markersize=4.5)
            if se.any():
                axes.fill_between(x, y - se, y + se, color=color, alpha=0.2, linewidth=0)
        ticks, steps = 5 if small else 6, [1, 2, 2.5, 5, 10]
        values = np.concatenate([curve.y for curve in curves])
        if log and values.min() > 0 and values.max() > 30 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(ticks, steps=steps))
        axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=steps, integer=x_label == "round"))
        axes.set_title(title)
        axes.set_xlabel(x_label)
        return _svg(figure, description)


def bar_chart(title: str, bars: Sequence[Bar], reference: tuple[str, float] | None = None) -> str:
    """A bar per name with its value written beside it, from the top; `reference` is a named dashed line."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(4.9, max(3.35, 0.75 + 0.2 * len(bars))), layout="constrained")
        axes = figure.add_subplot()
        values = np.array([bar.value for bar in bars])
        places = np.arange(len(bars))
        axes.barh(places, values, height=0.66, color=SERIES[0][0], alpha=0.8)
        for place, value in zip(places, values, strict=True):
            offset = (4 if value >= 0 else -4, 0)
            side: Any = "left" if value >= 0 else "right"
            axes.annotate(
                f"{value:.3g}",
                (value, place),
                offset,
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=8.5,
                bbox={"facecolor": _PAPER, "linewidth": 0, "pad": 0.8},  # a reference line may pass behind it
            )
        if reference is not None:
            name, at = reference
            axes.axvline(at, color=SERIES[1][0], linestyle=DASHES[1], linewidth=1.6, label=f"{name}: {at:.3g}")
            axes.legend(loc="lower left", bbox_to_anchor=(0, -0.24), frameon=False, fontsize=9.5, borderpad=0)
        axes.margins(x=0.14)
        axes.set_yticks(places, [bar.name if len(bar.name) <= 26 else f"…{bar.name[-25:]}" for bar in bars], fontsize=9)
        axes.set_ylim(max(len(bars), 8) - 0.5, -0.5)  # few bars do not grow fat
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_title(title)
        return _svg(figure, title)


def contour_chart(title: str, label: str, offsets: np.ndarray, z: np.ndarray) -> str:
    """Level sets of `z [n, n]` over a square, of stronger colour where it is higher, with a dot in the middle.

    Levels are evenly spaced in log z where z is positive and spans more than a decade.
    """
    description = f"{title}, contours"
    with mpl.rc_context({**_STYLE, "svg.hashsalt": description}):
        figure = Figure(figsize=(4.9, 4.5), layout="constrained")
        axes = figure.add_subplot(aspect="equal")
        z = np.where(np.isfinite(z), z, np.nan)
        low, high = float(np.nanmin(z)), float(np.nanmax(z))
        spaced = np.geomspace if low > 0 and high > 10 * low else np.linspace
        levels = np.unique(spaced(low, high if high > low else low + 1, 13))
        colors = [(*to_rgb(SERIES[0][0]), alpha) for alpha in np.linspace(0.04, 0.85, len(levels) - 1)]
        axes.contourf(offsets, offsets, z, levels=levels, colors=colors)
        lines: Any = axes.contour(offsets, offsets, z, levels=levels[1:-1], colors=[_PAPER], linewidths=0.8)
        axes.clabel(lines, levels=lines.levels[::2], fmt=lambda level: f"{level:.3g}", fontsize=8.5, colors=[_INK])
        axes.plot(0, 0, "o", color=SERIES[1][0], markersize=5)
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(title)
        axes.set_xlabel(label)
        return _svg(figure, description)


def matrix_chart(title: str, names: Sequence[str], values: np.ndarray) -> str:
    """A cell per pair of values from −1 to 1: one colour above 0, another below, as strong as they are."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        n = len(names)
        figure = Figure(figsize=(4.9, 4.5), layout="constrained")
        axes = figure.add_subplot(aspect="equal")
        for i in range(n):
            for j in range(n):
                color, value = SERIES[int(values[i, j] < 0)][0], float(values[i, j])
                face = (*to_rgb(color), 0.65 * min(1, abs(value)))  # never so strong that the number is hard to read
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=face, edgecolor=_PAPER))
                if n <= 12:
                    axes.text(j, i, f"{value:.2f}".replace("0.", "."), ha="center", va="center", fontsize=8)
        axes.set_xlim(-0.5, n - 0.5)
        axes.set_ylim(n - 0.5, -0.5)
        axes.set_xticks(range(n), names, fontsize=9)
        axes.set_yticks(range(n), names, fontsize=9)
        axes.grid(visible=False)
        axes.set_title(title)
        axes.set_xlabel("client")
        return _svg(figure, title)


def partition_chart(counts: np.ndarray, description: str) -> str:
    """A stacked bar per client from samples `[clients, classes]`."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": description}):
        figure = Figure(figsize=(14.6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        draw_clients(axes, counts, background=_PAPER)
        axes.grid(visible=False)
        axes.set_title("Samples of each client, by class")
        axes.set_xlabel("client")
        return _svg(figure, description)


def _svg(figure: Figure, description: str) -> str:
    """The figure as an element for inlining: without metadata, a fixed size or fixed colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root, body = buffer.getvalue().split("<svg ", 1)[1].split(">", 1)
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    # Names of groups repeat from figure to figure; those of markers and clips carry the hash salt.
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)
    body = body.replace("'DejaVu Sans'", "system-ui, sans-serif")
    body = body.replace(_INK, "currentColor").replace(_GRID, "var(--line)").replace(_PAPER, "var(--paper)")
    for index, (light, _) in enumerate(SERIES):
        body = body.replace(light, f"var(--s{index})")
    view_box = re.search(r'viewBox="[^"]*"', root)
    assert view_box is not None
    return f'<svg {view_box[0]} role="img" aria-label="{html.escape(description)}">' + re.sub(r"\n\s*", "\n", body)
