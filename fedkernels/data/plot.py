"""A picture and a summary of a partition."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.ticker import MaxNLocator

from .partition import Partition

MAX_NAMED_CLASSES = 20
_MAX_BARS = 100


def partition_summary(partition: Partition, labels: np.ndarray, classes: int) -> dict[str, float]:
    """How large and how skewed the clients of a partition are.

    Effective classes of a client are `exp(H)` of its label distribution: 1 for one class, `classes` for all alike.

    Args:
        labels: int `[n]`, the label of every training sample.

    Returns:
        `clients`, `samples` (assigned, repeats counted), `used_fraction` of the training set, `size_min`,
        `size_median`, `size_max`, and `effective_classes`, the mean over clients.
    """
    sizes = partition.sizes
    owner = np.repeat(np.arange(len(partition)), sizes)
    # Most clients have few classes, so count the pairs that occur instead of a [clients, classes] table.
    pairs, counts = np.unique(owner * classes + labels[partition.indices], return_counts=True)
    client = pairs // classes
    share = counts / sizes[client]
    entropy = np.bincount(client, -share * np.log(share), minlength=len(partition))
    return {
        "clients": float(len(partition)),
        "samples": float(len(owner)),
        "used_fraction": len(np.unique(partition.indices)) / len(labels),
        "size_min": float(sizes.min()),
        "size_median": float(np.median(sizes)),
        "size_max": float(sizes.max()),
        "effective_classes": float(np.exp(entropy).mean()),
    }


def class_colors(classes: int) -> list[str]:
    """A colour per class: distinct up to twenty, a ramp beyond."""
    if classes <= MAX_NAMED_CLASSES:
        return [to_hex(color) for color in colormaps["tab10" if classes <= 10 else "tab20"](np.arange(classes))]
    return [to_hex(color) for color in colormaps["turbo"](np.linspace(0.05, 0.95, classes))]


def draw_clients(axes: Axes, counts: np.ndarray, background: str) -> None:
    """One bar per client, stacked by class.

    Args:
        counts: int `[clients, classes]`, samples.
        background: the colour of the gaps between bars.
    """
    clients, classes = counts.shape
    edges, tops = np.arange(clients + 1) - 0.5, np.cumsum(counts, axis=1)
    height = max(1, tops[:, -1].max()) * 1.05
    # One outline per class is far fewer artists than one bar per client and class; gaps are drawn over it.
    for c, color in enumerate(class_colors(classes)):
        low, high = tops[:, c] - counts[:, c], tops[:, c]
        axes.add_artist(StepPatch(high, edges, baseline=low, fill=True, color=color, linewidth=0, label=str(c)))
    axes.vlines(edges[1:-1], 0, height, color=background, linewidth=min(6.0, 80 / clients))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, height)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def partition_figure(partition: Partition, labels: np.ndarray, classes: int, title: str = "") -> Figure:
    """Bars of every client's samples stacked by class, beside the histogram of client sizes.

    More than 100 clients are shown by 100 evenly spaced ones of the clients sorted by size.

    Args:
        labels: int `[n]`, the label of every training sample, below `classes`.

    Returns:
        A figure without a window: `figure.savefig("partition.png")`.
    """
    sizes, shown = partition.sizes, np.arange(len(partition))
    if len(partition) > _MAX_BARS:
        ranks = np.linspace(0, len(partition) - 1, _MAX_BARS).round().astype(np.int64)
        shown = np.argsort(sizes, kind="stable")[ranks]
    counts = np.stack([np.bincount(labels[partition[i]], minlength=classes) for i in shown.tolist()])

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    bars, histogram = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    draw_clients(bars, counts, background="white")
    bars.set_ylabel("samples")
    if len(partition) > _MAX_BARS:
        bars.set_xlabel(f"{_MAX_BARS} of {len(partition):,} clients, sorted by size")
        bars.set_xticks([])
    else:
        bars.set_xlabel("client")

    bin_width = -(-int(sizes.max()) // 24)
    bins = np.arange(0, sizes.max() + bin_width + 1, bin_width) - 0.5
    histogram.hist(sizes, bins=bins, orientation="horizontal", color="0.55")
    histogram.axhline(np.median(sizes), color="black", linewidth=1, linestyle="--")
    histogram.set_xlabel("clients")
    histogram.set_title("sizes (dashed: median)", fontsize="small")
    histogram.xaxis.set_major_locator(MaxNLocator(2, integer=True))
    for axes in (bars, histogram):
        axes.spines[["top", "right"]].set_visible(False)

    if classes <= MAX_NAMED_CLASSES:
        figure.legend(
            *bars.get_legend_handles_labels(),
            title="class",
            loc="outside right center",
            reverse=True,
            frameon=False,
            fontsize="small" if classes <= 10 else "x-small",
            handlelength=1,
        )
    else:
        scale = ScalarMappable(
            BoundaryNorm(np.arange(classes + 1) - 0.5, classes), ListedColormap(class_colors(classes))
        )
        ticks = np.linspace(0, classes - 1, 6).round()
        figure.colorbar(scale, ax=histogram, label="class", ticks=ticks).minorticks_off()
    facts = partition_summary(partition, labels, classes)
    subtitle = (
        f"{len(partition):,} clients, {len(partition.indices):,} samples, sizes {facts['size_min']:,.0f} to "
        f"{facts['size_max']:,.0f}, {facts['effective_classes']:.1f} effective classes per client"
    )
    bars.set_title(f"{title}\n{subtitle}" if title else subtitle, loc="left", fontsize="medium")
    return figure
