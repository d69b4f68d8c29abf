"""A picture and a summary of a partition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .partition import Ints, Partition

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_BARS = 100
_MAX_LEGEND = 20


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


def partition_figure(partition: Partition, labels: np.ndarray, classes: int, title: str = "") -> Figure:
    """Bars of every client's samples stacked by class, beside the histogram of client sizes.

    More than 100 clients are shown by 100 evenly spaced ones of the clients sorted by size.

    Args:
        labels: int `[n]`, the label of every training sample, below `classes`.

    Returns:
        A figure without a window: `figure.savefig("partition.png")`.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    sizes, shown = partition.sizes, np.arange(len(partition))
    if len(partition) > _MAX_BARS:
        ranks = np.linspace(0, len(partition) - 1, _MAX_BARS).round().astype(np.int64)
        shown = np.argsort(sizes, kind="stable")[ranks]
    counts = _counts(partition, labels, classes, shown)

    if classes <= _MAX_LEGEND:
        colors = colormaps["tab10" if classes <= 10 else "tab20"](np.arange(classes))
    else:
        colors = colormaps["Spectral_r"](np.linspace(0, 1, classes))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    bars, histogram = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))

    edges, tops = np.arange(len(shown) + 1) - 0.5, np.cumsum(counts, axis=1)
    for c in range(classes):
        bars.stairs(tops[:, c], edges, baseline=tops[:, c] - counts[:, c], fill=True, color=colors[c], label=str(c))
    # One outline per class is far fewer artists than one bar per client and class; white lines part the clients.
    bars.vlines(edges[1:-1], 0, sizes.max() * 1.05, color="white", linewidth=min(6.0, 80 / len(shown)))
    bars.set_xlim(edges[0], edges[-1])
    bars.set_ylim(0, sizes.max() * 1.05)
    bars.set_ylabel("samples")
    if len(partition) > _MAX_BARS:
        bars.set_xlabel(f"{_MAX_BARS} of {len(partition):,} clients, sorted by size")
        bars.set_xticks([])
    else:
        bars.set_xlabel("client")
        bars.xaxis.set_major_locator(MaxNLocator(integer=True))

    bin_width = -(-int(sizes.max()) // 24)
    bins = np.arange(0, sizes.max() + bin_width + 1, bin_width) - 0.5
    histogram.hist(sizes, bins=bins, orientation="horizontal", color="0.55")
    histogram.axhline(np.median(sizes), color="black", linewidth=1, linestyle="--")
    histogram.set_xlabel("clients")
    histogram.set_title("sizes (dashed: median)", fontsize="small")
    bars.yaxis.set_major_locator(MaxNLocator(integer=True))
    histogram.xaxis.set_major_locator(MaxNLocator(2, integer=True))
    for axes in (bars, histogram):
        axes.spines[["top", "right"]].set_visible(False)

    if classes <= _MAX_LEGEND:
        handles, names = bars.get_legend_handles_labels()
        figure.legend(
            handles[::-1],
            names[::-1],
            title="class",
            loc="outside right center",
            frameon=False,
            fontsize="small" if classes <= 10 else "x-small",
            handlelength=1,
        )
    else:
        norm = BoundaryNorm(np.arange(classes + 1) - 0.5, classes)
        ticks = np.linspace(0, classes - 1, 6).round()
        scale = figure.colorbar(ScalarMappable(norm, ListedColormap(colors)), ax=histogram, label="class", ticks=ticks)
        scale.minorticks_off()
    facts = partition_summary(partition, labels, classes)
    subtitle = (
        f"{len(partition):,} clients, {len(partition.indices):,} samples, sizes {facts['size_min']:,.0f} to "
        f"{facts['size_max']:,.0f}, {facts['effective_classes']:.1f} effective classes per client"
    )
    bars.set_title(f"{title}\n{subtitle}" if title else subtitle, loc="left", fontsize="medium")
    return figure


def _counts(partition: Partition, labels: np.ndarray, classes: int, shown: Ints) -> Ints:
    """Samples per class of the clients shown, `[len(shown), classes]`."""
    return np.stack([np.bincount(labels[partition[int(i)]], minlength=classes) for i in shown])
