"""The guide to adding an algorithm does what it says: its Python blocks run in order, and their assertions bite."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedkernels.algorithms import ALGORITHMS

GUIDE = Path(__file__).parents[1] / "docs" / "add_an_algorithm.md"
TEXT = GUIDE.read_text()
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _table_as_it_was() -> Iterator[None]:
    before = dict(ALGORITHMS)
    yield
    ALGORITHMS.clear()
    ALGORITHMS.update(before)


def follow(text: str) -> dict[str, Any]:
    """Run the Python blocks of a page one after another in one namespace; errors name the line of the page."""
    namespace: dict[str, Any] = {"__name__": "guide"}
    for block in BLOCK.finditer(text):
        lines_before = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(lines_before + block[1], str(GUIDE), "exec", dont_inherit=True), namespace)
    return namespace


def test_the_guide_runs() -> None:
    assert len(BLOCK.findall(TEXT)) == len(re.findall("^```python", TEXT, re.MULTILINE)) > 1
    namespace = follow(TEXT)
    assert ALGORITHMS["fedexp"] is namespace["FedExp"]


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("agg.square / (2 * (", "agg.square / (1 * ("),
        ("{name: x[name] + step * mean[name]", "{name: x[name] + mean[name]"),
        ("delta.square().sum(1, keepdim=True)}", "delta.abs().sum(1, keepdim=True)}"),
        ('"square": Wire("scalar")', '"square": Wire("scalar", diagnostic=True)'),
        ("COHORT * (d + 1) * float64_bytes", "COHORT * d * float64_bytes"),
        ("ratio.clamp(min=1)", "ratio.clamp(min=0)"),
    ],
)
def test_a_mistake_in_the_guide_is_noticed(said: str, wrong: str) -> None:
    assert said in TEXT
    with pytest.raises(AssertionError):
        follow(TEXT.replace(said, wrong))
