"""The rules that decide whether a claim holds, on made-up runs, and the suites' configurations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import claims
import pytest
import reproduce
from claims import CLAIMS, Claim, Outcome, compared


def outcome(name: str, *curves: list[float], up_bytes: int = 10, sharpness: list[float] | None = None) -> Outcome:
    """Runs with these accuracies, %, a curve for every seed, and as many bytes in every round."""
    runs = [
        [{"test_accuracy": a / 100, "protocol_up_bytes": up_bytes, "time_s": r + 1.0} for r, a in enumerate(curve)]
        for curve in curves
    ]
    return Outcome(name, 0.1, runs, sharpness or [])


def test_accuracy_is_the_mean_of_the_last_rounds() -> None:
    assert outcome("a", [0, 10, 20, 30, 40, 50, 60]).accuracy == pytest.approx([40])
    assert outcome("a", [10, 20]).smoothed_accuracy(0) == pytest.approx([10, 15])


def test_bytes_are_counted_until_the_smoothed_accuracy_is_there() -> None:
    run = outcome("a", [0, 100, 0, 50, 100, 100])  # smoothed: 0, 50, 33, 37.5, 50, 70
    assert run.up_bytes_to(0, 50) == 20
    assert run.up_bytes_to(0, 51) == 60
    assert run.up_bytes_to(0, 71) == math.inf


@pytest.mark.parametrize(
    ("better", "worse", "more", "at_least"),
    [
        ([11, 12, 13], [10, 10, 10], True, True),
        ([10, 10, 10], [10, 10, 10], False, True),
        ([12, 10, 8.5], [10, 10, 10], False, True),  # a mean of 0.17 within its standard error of 1.01
        ([11, 10, 8.5], [10, 10, 10], False, True),  # a mean of -0.17 within its standard error of 0.73
        ([9, 8, 7], [10, 10, 10], False, False),
    ],
)
def test_a_difference_counts_beyond_its_standard_error(
    better: list[float], worse: list[float], more: bool, at_least: bool
) -> None:
    assert compared(better, worse, "a − b", strictly=True).holds is more
    assert compared(better, worse, "a − b", strictly=False).holds is at_least


def test_differences_are_taken_seed_by_seed() -> None:
    """Seeds differ by far more than the methods do."""
    assert compared([10.5, 50.4, 90.6], [10, 50, 90], "a − b", strictly=True).text == "a − b: +0.5 ± 0.1"


def test_a_baseline_that_is_never_reached_counts_as_nothing_saved() -> None:
    base = outcome("base", [50] * 6, [50] * 6, up_bytes=40)
    cheap = outcome("cheap", [50] * 6, [49] * 6)
    (finding,) = claims.fewer_bytes("cheap", "base", 3)({"base": base, "cheap": cheap})
    assert not finding.holds
    assert "2.0 ± 2.0; 1 of 2 seeds never reach it" in finding.text
    (finding,) = claims.fewer_bytes("cheap", "base", 3)({"base": base, "cheap": outcome("cheap", [50] * 6, [50] * 6)})
    assert finding.holds


def test_flatter_means_less_sharp() -> None:
    flat, sharp = outcome("flat", [1], [1], sharpness=[0.1, 0.2]), outcome("sharp", [1], [1], sharpness=[0.3, 0.5])
    both = {"flat": flat, "sharp": sharp}
    assert claims.flatter("flat", "sharp")(both)[0].holds
    assert not claims.flatter("sharp", "flat")(both)[0].holds


@pytest.mark.parametrize("suite", ["digits", "cifar100"])
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.key)
def test_every_claim_has_its_configurations(claim: Claim, suite: str) -> None:
    """They differ in nothing but the algorithm and the learning rate."""
    alike = set()
    for name in claim.names:
        config = reproduce.configuration(suite, name, {})
        alike.add((config.rounds, config.clients, config.cohort, config.local_steps, config.batch_size, config.model))
        assert suite == "cifar100" or config.lr in [point["lr"] for point in reproduce.grid(name)]
    assert len(alike) == 1
    assert len(claim.names) <= 10  # colours of a figure


def test_what_was_tuned_replaces_the_values_of_the_configurations(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps({"details": {"tried": {"fedavg": [[{"lr": 0.1}, 50.0], [{"lr": 0.3}, 60.0]]}}}))
    assert reproduce.tuned(file) == {"fedavg": {"lr": 0.3}}


def test_a_run_that_diverges_has_learnt_nothing() -> None:
    rows, sharpness = reproduce.run("digits", "fedavg", {"lr": 1e30, "rounds": 7, "clip_norm": math.inf}, True)
    run = Outcome("fedavg", 1e30, [rows])
    assert len(rows) == 7
    assert run.accuracy == [0.0]
    assert sharpness == math.inf


def test_a_small_reproduction_from_runs_to_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--claims", "fedmuon", "--seeds", "2", "--rounds", "2", "--jobs", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["reproduce.py", *options])
    reproduce.main()
    page = (tmp_path / "reproduction-digits.md").read_text()
    assert "| fedmuon | 0.001 | 2 |" in page
    assert page.count("does not hold here") + page.count("holds |") >= 1
    assert (tmp_path / "reproduction-digits" / "fedmuon.png").stat().st_size > 10_000
    assert len(list(tmp_path.glob("*-reproduction-digits-*.json"))) == 1
