"""The page against an HTML parser and the hand-made runs it is about."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedkernels.report import write_report

Rows = Callable[..., list[dict[str, Any]]]
WriteRun = Callable[..., Path]

VOID = {"meta", "br", "hr", "img", "input", "link"}
ACCURACY = [0.125, 0.25, 0.5, 0.625]


class Page(HTMLParser):
    """A parsed page: its elements, texts and references; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"repeated attribute in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def content(self, tag: str) -> list[str]:
        return [text for parent, text in self.texts if parent == tag]

    @property
    def charts(self) -> list[str | None]:
        return [svg["aria-label"] for svg in self.all("svg")]

    @property
    def words(self) -> str:
        return " ".join(text for parent, text in self.texts if parent != "style")


def page_of(runs: Sequence[Path]) -> Page:
    return Page(write_report(runs, runs[0].parent / "pages" / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def three(write_run: WriteRun, rows: Rows) -> list[Path]:
    """Two seeds of FedAvg and a run of SCAFFOLD."""
    return [
        write_run("fedavg-s0", rows(ACCURACY), seed=0),
        write_run("fedavg-s1", rows([0.1, 0.2, 0.3, 0.425], protocol_up_bytes=[3000] * 4), seed=1),
        write_run("scaffold", rows([0.2, 0.3, 0.3, 0.3], link_bytes=[5] * 4), algorithm={"name": "scaffold"}),
    ]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_page_is_well_formed_and_loads_nothing(three: list[Path], count: int) -> None:
    page = page_of(three[:count])
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not {"script", "link", "img", "iframe", "object", "image"} & {tag for tag, _ in page.elements}
    references = [v or "" for _, attributes in page.elements for k, v in attributes.items() if k in ("href", "src")]
    references += re.findall(r"url\(([^)]*)\)", page.text)
    assert references
    assert {reference.removeprefix("#") for reference in references} <= set(ids)
    assert "http" not in page.text
    assert "@import" not in page.text
    assert not [k for _, attributes in page.elements for k in attributes if k.startswith("on")]


def test_the_page_is_the_same_every_time(three: list[Path]) -> None:
    first, second = (write_report(three, three[0].parent / name) for name in ("a/b/first.html", "second.html"))
    assert first.read_bytes() == second.read_bytes()


def test_one_run_shows_its_numbers(three: list[Path]) -> None:
    page = page_of(three[:1])
    assert page.content("title") == page.content("h1") == ["fedavg on digits"]
    assert "lenet · 2 of 3 clients a round · dirichlet (alpha 0.3)" in page.words
    claim = "fedavg reached 62.5% accuracy and 2.3750 test loss on the test set: 4 rounds, 6.0 s of training and 4.0 kB"
    assert claim in page.words
    assert page.content("b") == [
        "4",
        "62.5%",
        "62.5%",
        "2.3750",
        "4",
        "4.0 kB",
        "6.0 s",
        "4.0 kB",
        "12.0 kB",
        "6.0 s",
        "4",
    ]
    assert "3 clients hold 19 samples. A client has 6 to 7, median 6, and on average 2.0 of 3 classes." in page.words
    (configuration,) = page.content("pre")
    assert "server_lr: 1.0" in configuration
    assert "python 3.11.0 devices cpu" in page.words
    assert "cuda" not in page.words


def test_a_comparison_shows_every_group(three: list[Path]) -> None:
    page = page_of(three)
    assert page.content("h1") == ["fedavg and scaffold on digits"]
    mean, spread = np.mean([62.5, 42.5]), abs(62.5 - 42.5) / 2  # of two values: |a - b| / sqrt 2 / sqrt 2
    assert f"Test accuracy at round 4: fedavg {mean:.1f}% ± {spread:.1f}% and scaffold 30.0%." in page.words
    assert "fedavg 2 seeds 4 52.5% ± 10.0% 52.5% ± 10.0% 2.4750 ± 0.1000" in page.words
    assert "scaffold 4 30.0% 30.0% 2.7000 - - - 4.0 kB 12.0 kB 20 B 6.0 s" in page.words
    # What differs, side by side; what all share is left to the folded configurations.
    table = page.words.split("Configuration fedavg scaffold ")[1].split(" fedavg, seeds 0 and 1")[0]
    assert table == "algorithm.name fedavg scaffold algorithm.server_lr 1.0 - seed 0, 1 0"
    assert "all runs" in page.content("summary")


@pytest.mark.parametrize("count", [1, 3])
def test_curves_are_drawn_against_rounds_bytes_and_time(three: list[Path], count: int) -> None:
    charts = page_of(three[:count]).charts
    for title in ("Test accuracy, %", "Test loss", "Train loss"):
        assert [c for c in charts if c and c.startswith(f"{title} by ")] == [
            f"{title} by round",
            f"{title} by uplink of all clients, kB",
            f"{title} by training time, seconds",
        ]
    # The learning rate is the only other column that changes from round to round.
    assert charts[9:] == ["lr by round", "Partition"]


def test_the_curve_is_the_data(three: list[Path]) -> None:
    """The drawn points are an affine image of (round, accuracy)."""
    page = page_of(three[:1])
    chart = page.text.split('aria-label="Test accuracy, % by round"')[1].split("</svg>")[0]
    (line,) = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--s0\)', chart)
    points = np.array([[float(x), float(y)] for x, y in re.findall(r"([\d.]+) ([\d.]+)", line)])
    assert len(points) == 4
    for drawn, data, rising in ((points[:, 0], [1, 2, 3, 4], 1), (points[:, 1], ACCURACY, -1)):
        slope, offset = np.polyfit(data, drawn, 1)
        assert np.sign(slope) == rising
        np.testing.assert_allclose(slope * np.array(data) + offset, drawn, atol=0.02)


@pytest.mark.parametrize(
    ("chart", "largest"),
    [
        ("Test accuracy, % by round", 62.5),
        ("Test loss by round", 4),  # of the rounds, which pass the losses
        ("Train loss by uplink of all clients, kB", 4),
        ("Train loss by training time, seconds", 6),
    ],
)
def test_the_axes_carry_the_units(three: list[Path], chart: str, largest: float) -> None:
    text = page_of(three[:1]).text.split(f'aria-label="{chart}"')[1].split("</svg>")[0]
    ticks = [float(label) for label in re.findall(r">([\d.]+)</text>", text)]
    assert 0.6 * largest < max(ticks) <= largest


def test_the_partition_bars_are_the_counts(three: list[Path]) -> None:
    """Class 1 of the histogram is [0, 7, 2]: its outline is as high as its counts, on the same scale as class 0."""
    page = page_of(three[:1])
    chart = page.text.split('aria-label="Partition"')[1].split("</svg>")[0]
    heights = []
    for color in ("#1f77b4", "#ff7f0e", "#2ca02c"):
        (outline,) = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: {color}', chart)
        corners = np.array([[float(x), float(y)] for x, y in re.findall(r"([\d.]+) ([\d.]+)", outline)])
        edges = np.unique(corners[:, 0])
        middle = (edges[:-1] + edges[1:]) / 2
        heights.append([enclosed_height(corners, x) for x in middle])
    counts = np.array([[5, 0, 2], [0, 7, 2], [1, 0, 2]])
    drawn = np.array(heights)
    scale = drawn[1, 1] / 7
    np.testing.assert_allclose(drawn, scale * counts, atol=0.05)


def enclosed_height(corners: np.ndarray, x: float) -> float:
    """The height of a rectilinear outline `[corners, 2]` over x."""
    closed = np.vstack([corners, corners[:1]])
    crossed = [a[1] for a, b in pairwise(closed) if min(a[0], b[0]) < x < max(a[0], b[0])]
    return max(crossed, default=0.0) - min(crossed, default=0.0)


def test_names_are_escaped(write_run: WriteRun, rows: Rows) -> None:
    nasty = '</pre></style><script>alert("1")</script> & <b>'
    runs = [
        write_run("a <i> & 'b'", rows([0.1, 0.2], **{nasty: [1, 2]}), algorithm={"name": nasty}, note=nasty, rounds=9),
        write_run("b", rows([0.1]), algorithm={"name": nasty}, data=nasty, model={"name": nasty, nasty: nasty}),
    ]
    for chosen in (runs[:1], runs):
        page = page_of(chosen)
        assert "script" not in {tag for tag, _ in page.elements}
        assert nasty in page.content("h1")[0]
        assert nasty in " ".join(page.content("pre"))
        assert f"{nasty} by round" in page.charts
    assert f"{nasty} · a <i> & 'b'" in page.content("th")


def test_the_seed_of_the_noise_is_not_shown(write_run: WriteRun, rows: Rows) -> None:
    """Reports are passed on, and whoever has it subtracts the noise."""
    privacy = {"noise_multiplier": 0.8, "clip": 0.25}
    runs = [
        write_run(name, rows([0.5]), privacy=privacy | {"noise_seed": seed})
        for name, seed in (("a", 918273645), ("b", 546372819), ("c", None))
    ]
    page = page_of(runs)
    for seed in ("918273645", "546372819"):
        assert seed not in page.words
    assert "(secret)" in page.words
    assert "0.25" in page.words


def test_a_run_stopped_halfway_says_so(write_run: WriteRun, rows: Rows) -> None:
    page = page_of([write_run("a", rows([0.1, None, 0.3]), rounds=8)])
    assert "fedavg: stopped at round 3 of 8" in page.content("p")
    assert len(page.charts) == 9 + 2


def test_a_run_without_evaluations(write_run: WriteRun, rows: Rows) -> None:
    page = page_of([write_run("a", rows([None] * 3))])
    assert "fedavg has not been evaluated yet: 3 rounds" in page.words
    assert [c for c in page.charts if c and "oss" in c] == [
        f"Train loss by {by}" for by in ("round", "uplink of all clients, kB", "training time, seconds")
    ]


def test_a_run_of_one_round(write_run: WriteRun, rows: Rows) -> None:
    page = page_of([write_run("a", rows([0.5]))])
    assert "fedavg reached 50.0% accuracy" in page.words
    assert len(page.charts) == 9 + 1


def test_a_run_that_has_not_finished_a_round(write_run: WriteRun, rows: Rows) -> None:
    page = page_of([write_run("a", [], rounds=5), write_run("b", [], rounds=5, lr=2.0)])
    assert "fedavg · a: stopped at round 0 of 5" in page.content("p")
    assert "2 configurations, none evaluated yet." in page.content("p")
    assert "No curve to show yet." in page.content("p")
    assert page.charts == ["Partition"]


def test_a_loss_that_was_not_finite(write_run: WriteRun, rows: Rows) -> None:
    made = rows([0.1, 0.2, 0.3, 0.4], train_loss=[1.0, None, 2.0, math.nan], test_loss=[None] * 4)
    page = page_of([write_run("a", made)])
    assert "fedavg: train loss not finite in 2 rounds, first in round 2" in page.content("p")
    assert not [c for c in page.charts if c and c.startswith("Test loss")]
    chart = page.text.split('aria-label="Train loss by round"')[1].split("</svg>")[0]
    (line,) = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--s0\)', chart)
    assert len(re.findall(r"[ML]", line)) == 2


def test_only_metrics_or_only_a_configuration_is_enough(write_run: WriteRun, rows: Rows) -> None:
    run = write_run("a", rows([0.5, 0.75]))
    for name in ("environment.json", "partition.json", "config.yaml"):
        (run / name).unlink()
    page = page_of([run])
    assert page.content("h1") == ["unknown on unknown"]
    assert "75.0%" in page.content("b")
    assert page.content("h2") == ["Curves", "Also recorded"]


def test_only_drawn_clients_are_described(write_run: WriteRun, rows: Rows) -> None:
    run = write_run("a", rows([0.5]))
    (run / "partition.json").write_text('{"clients": 1000, "samples": 12345, "histogram": [[1, 2], [4, 0]]}')
    words = page_of([run]).words
    assert "1,000 clients hold 12,345 samples. Each of the first 2, drawn here, has 3 to 4, median 3.5," in words


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run folder given"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(FileNotFoundError, match="missing is not a run folder"):
        write_report([tmp_path / "missing"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
