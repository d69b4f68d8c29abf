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
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, MaxNLocator

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
CLASSES = ("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499", "#bbbbbb")
_INK, _GRID = "#010203", "#040506"
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
_MAX_POINTS = 600


@dataclass(frozen=True)
class Curve:
    """A line with a ± band: `x`, `y` and `se` are `[points]`; `style` numbers its colour and dashes."""

    style: int
    x: np.ndarray
    y: np.ndarray
    se: np.ndarray


def class_color(index: int, n_classes: int) -> str:
    """The fill of one class in the partition picture: distinct up to ten classes, a ramp beyond."""
    if n_classes <= len(CLASSES):
        return CLASSES[index]
    return mpl.colors.to_hex(mpl.colormaps["viridis"](index / (n_classes - 1)))


def line_chart(title: str, x_label: str, curves: Sequence[Curve], *, small: bool = False, log: bool = False) -> str:
    """One panel of curves with standard-error bands; `log` where a positive range spans more than 1.5 decades."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title + x_label}):
        figure = Figure(figsize=(3.7, 2.3) if small else (4.9, 3.35), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            keep = np.unique(np.linspace(0, len(curve.x) - 1, min(len(curve.x), _MAX_POINTS)).round().astype(int))
            x, y, se = curve.x[keep], curve.y[keep], curve.se[keep]
            color = SERIES[curve.style % len(SERIES)][0]
            dashes = DASHES[curve.style // len(SERIES) % len(DASHES)]
            axes.plot(x, y, color=color, linestyle=dashes)
            axes.plot(x[-1:], y[-1:], "o", color=color, markersize=4.5)
            if se.any():
                axes.fill_between(x, y - se, y + se, color=color, alpha=0.2, linewidth=0)
        values = np.concatenate([curve.y for curve in curves])
        if log and values.min() > 0 and values.max() > 30 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4 if small else 6))
        axes.xaxis.set_major_locator(MaxNLocator(4 if small else 6, integer=x_label == "round"))
        axes.set_title(title)
        axes.set_xlabel(x_label)
        return _svg(figure, f"{title} by {x_label}")


def partition_chart(histogram: np.ndarray) -> str:
    """A stacked bar per client from class counts `[clients, classes]`."""
    n_clients, n_classes = histogram.shape
    tops = histogram.cumsum(axis=1)
    width = 0.86 if n_clients <= 100 else 1.0
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "partition"}):
        figure = Figure(figsize=(14.6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for index in range(n_classes):
            held = np.flatnonzero(histogram[:, index])
            if not len(held):
                continue
            left, high = held - width / 2, tops[held, index]
            low = high - histogram[held, index]
            corners = [(left, low), (left + width, low), (left + width, high), (left, high), (left, low)]
            # One outline for all bars of a class: thousands of single rectangles would make the page heavy.
            vertices = np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1).reshape(-1, 2)
            codes = np.tile([Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY], len(held))
            axes.add_patch(PathPatch(Outline(vertices, codes), color=class_color(index, n_classes), linewidth=0))
        axes.set_xlim(-0.5 - 0.01 * n_clients, n_clients - 0.5 + 0.01 * n_clients)
        axes.set_ylim(0, max(1, tops[:, -1].max()) * 1.04)
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_title("Samples of each client, by class")
        axes.set_xlabel("client")
        return _svg(figure, "Samples of each client, by class")


def _svg(figure: Figure, description: str) -> str:
    """The figure as an element for inlining: without ids that repeat, metadata, a fixed size or fixed colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root, body = buffer.getvalue().split("<svg ", 1)[1].split(">", 1)
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)
    body = body.replace("'DejaVu Sans'", "system-ui, sans-serif")
    body = body.replace(_INK, "currentColor").replace(_GRID, "var(--line)")
    for index, (light, _) in enumerate(SERIES):
        body = body.replace(light, f"var(--s{index})")
    view_box = re.search(r'viewBox="[^"]*"', root)
    assert view_box is not None
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    label = html.escape(description)
    return f'<svg {namespaces} {view_box[0]} role="img" aria-label="{label}">' + re.sub(r"\n\s*", "\n", body)
