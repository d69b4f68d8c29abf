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
from matplotlib.figure import Figure
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
    """A line with a ± band: `x`, `y` and `se` are `[points]`; `style` numbers its colour and dashes."""

    style: int
    x: np.ndarray
    y: np.ndarray
    se: np.ndarray


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
            axes.plot(x[-1:], y[-1:], "o", color=color, markersize=4.5)
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
