"""Groups and statistics of hand-made runs against the standard library and brute force."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedkernels.cli import main
from fedkernels.comparison import Cell, Comparison, Statistic, comparison_table, rounds_to
from fedkernels.runs import read_groups

Rows = Callable[..., list[dict[str, Any]]]
WriteRun = Callable[..., Path]

ACCURACY = ([0.1, 0.4, 0.7, 0.8], [0.2, 0.5, 0.6, 0.9], [0.1, 0.3, 0.9, 0.7])
UP_BYTES = ([100, 200, 300, 400], [150, 250, 350, 450], [100, 100, 100, 100])
TIME_S = ([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0], [1.0, 3.0, 5.0, 7.0])


@pytest.fixture
def seeds(write_run: WriteRun, rows: Rows) -> list[Path]:
    """Three seeds of one configuration."""
    return [
        write_run(f"fedavg-s{i}", rows(ACCURACY[i], protocol_up_bytes=UP_BYTES[i], time_s=TIME_S[i]), seed=i)
        for i in range(3)
    ]


def column(comparison: Comparison, title: str, note: str | None = None) -> Statistic:
    (found,) = (s for s in comparison.statistics if s.title == title and note in (None, s.note))
    return found


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def test_statistics_are_the_mean_and_standard_error_over_seeds(seeds: list[Path]) -> None:
    comparison = Comparison(read_groups(seeds))
    (group,) = comparison.groups
    for title, note, values in [
        ("accuracy", "final", [0.8, 0.9, 0.7]),
        ("accuracy", "best", [0.8, 0.9, 0.9]),
        ("test loss", "final", [2.2, 2.1, 2.3]),
        ("uplink", None, [1000, 1200, 400]),
        ("downlink", None, [12000] * 3),
        ("time", None, [4.0, 8.0, 7.0]),
        ("clients/s", None, [4 * 6 / 4.0, 4 * 6 / 8.0, 4 * 6 / 7.0]),
        ("rounds", None, [4, 4, 4]),
    ]:
        statistic = column(comparison, title, note)
        cell = statistic.cell(group)
        assert [statistic.value(run) for run in group.runs] == pytest.approx(values)
        assert cell.mean == pytest.approx(statistics.mean(values))
        assert cell.text == statistic.format(statistics.mean(values))
        spread = standard_error(values)
        assert cell.detail == (f"± {statistic.format(spread)}" if spread else "")


@pytest.mark.parametrize("by", ["round", "protocol_up_bytes", "time_s"])
def test_curves_average_the_seeds_round_by_round(seeds: list[Path], by: str) -> None:
    (group,) = read_groups(seeds)
    x, y, se = group.curve("test_accuracy", by)
    axes = {"round": [[1, 2, 3, 4]] * 3, "protocol_up_bytes": np.cumsum(UP_BYTES, axis=1), "time_s": TIME_S}
    for i in range(4):
        assert x[i] == pytest.approx(statistics.mean(float(axis[i]) for axis in axes[by]))
        assert y[i] == pytest.approx(statistics.mean(accuracy[i] for accuracy in ACCURACY))
        assert se[i] == pytest.approx(standard_error([accuracy[i] for accuracy in ACCURACY]))


def test_curves_stop_where_a_seed_is_short_and_skip_what_it_lacks(write_run: WriteRun, rows: Rows) -> None:
    runs = [write_run("a-0", rows([0.1, None, 0.3, 0.4]), seed=0), write_run("a-1", rows([0.3, 0.2, 0.5]), rounds=4)]
    (group,) = read_groups(runs)
    x, y, se = group.curve("test_accuracy", "protocol_up_bytes")
    assert x.tolist() == [1000, 3000]
    assert y == pytest.approx([0.2, 0.4])
    assert se == pytest.approx([0.1, 0.1])
    assert [len(axis) for axis in group.curve("unknown", "round")] == [0, 0, 0]


def test_a_single_run_has_no_spread(write_run: WriteRun, rows: Rows) -> None:
    comparison = Comparison(read_groups([write_run("a", rows([0.25, 0.5]))]))
    cell = column(comparison, "accuracy", "final").cell(comparison.groups[0])
    assert (cell.mean, cell.text, cell.detail) == (0.5, "50.0%", "")
    assert comparison.groups[0].curve("test_accuracy", "round")[2].tolist() == [0, 0]


def test_costs_to_the_target_accuracy(seeds: list[Path], write_run: WriteRun, rows: Rows) -> None:
    slow = write_run("slow", rows([0.1, 0.2, 0.3, 0.4]), algorithm="scaffold")
    comparison = Comparison(read_groups([*seeds, slow]))
    target = 0.9 * 0.9
    assert comparison.target == pytest.approx(target)
    reached = [next((r for r in range(4) if accuracy[r] >= target), None) for accuracy in ACCURACY]
    assert reached == [None, 3, 2]
    costs = {"rounds": [4, 3], "uplink": [150 + 250 + 350 + 450, 300], "time": [8.0, 5.0]}
    for what, values in costs.items():
        statistic = column(comparison, f"{what} to 81.0%")
        assert statistic.note == "90% of best"
        cell = statistic.cell(comparison.groups[0])
        assert cell.mean == pytest.approx(statistics.mean(values))
        assert cell.detail == f"± {statistic.format(standard_error(values))}, 2 of 3 runs"
        assert statistic.cell(comparison.groups[1]) == Cell(None, "-", "")
        # Nobody leads: one group reached the target in some runs only, the other in none.
        assert comparison.leaders(statistic) == []


@pytest.mark.parametrize(
    ("target", "expected"), [(0.0, 1), (0.25, 2), (0.2501, 4), (0.5, 4), (0.75, 5), (0.7501, None)]
)
def test_the_target_counts_as_reached_when_met_exactly(
    write_run: WriteRun, rows: Rows, target: float, expected: int | None
) -> None:
    (group,) = read_groups([write_run("a", rows([0.1, 0.25, None, 0.5, 0.75, 0.5]))])
    assert rounds_to(group.runs[0], target) == expected


def test_accuracy_is_compared_at_the_last_round_that_all_were_evaluated_in(write_run: WriteRun, rows: Rows) -> None:
    runs = [
        write_run("a", rows([0.1, 0.2, 0.3, 0.9, 0.95])),
        write_run("b", rows([0.2, None, 0.6, None]), algorithm="scaffold", rounds=9),
    ]
    comparison = Comparison(read_groups(runs))
    assert comparison.equal_round == 3
    statistic = column(comparison, "accuracy", "round 3")
    assert [statistic.cell(group).mean for group in comparison.groups] == [0.3, 0.6]
    assert comparison.leaders(statistic) == [1]
    assert comparison.leaders(column(comparison, "accuracy", "final")) == [0]
    assert comparison.groups[0].runs[0].remarks == []
    assert comparison.groups[1].runs[0].remarks == ["stopped at round 4 of 9"]


def test_leaders_are_the_best_means(write_run: WriteRun, rows: Rows) -> None:
    finals = [0.5, 0.8, 0.8]
    groups = read_groups([write_run(f"g{i}", rows([a]), algorithm=f"algorithm{i}") for i, a in enumerate(finals)])
    comparison = Comparison(groups)
    assert comparison.leaders(column(comparison, "accuracy", "final")) == [1, 2]
    assert comparison.leaders(column(comparison, "test loss")) == [1, 2]
    assert comparison.leaders(column(comparison, "uplink")) == []  # less is not better by itself
    assert Comparison(groups[1:]).leaders(column(comparison, "accuracy", "final")) == []  # a tie
    assert Comparison(groups[:1]).leaders(column(comparison, "accuracy", "final")) == []  # no rival


def test_columns_nobody_can_fill_are_left_out(write_run: WriteRun, rows: Rows) -> None:
    bare = write_run("a", rows([None, None]))
    shown = [statistic.title for statistic in Comparison(read_groups([bare])).statistics]
    assert shown == ["rounds", "uplink", "downlink", "time", "clients/s"]
    ranks = write_run("b", rows([0.5, 0.5], link_bytes=[70, 70], rank_idle=[0.0, 0.5]))
    comparison = Comparison(read_groups([ranks]))
    assert column(comparison, "link").cell(comparison.groups[0]).text == "140 B"
    assert column(comparison, "rank idle").cell(comparison.groups[0]).text == "25.0%"
    assert "-" not in [statistic.cell(comparison.groups[0]).text for statistic in comparison.statistics]


def test_seeds_are_grouped_and_configurations_kept_apart(write_run: WriteRun, rows: Rows) -> None:
    made = rows([0.5])
    runs = [
        write_run("sweep/low-seed1", made, seed=1, lr=0.1),
        write_run("sweep/high-seed1", made, seed=1, lr=0.2),
        write_run("sweep/low-seed2", made, seed=2, lr=0.1),
        write_run("other", made, seed=1, algorithm={"name": "scaffold"}),
    ]
    groups = read_groups([*runs, runs[0]])
    assert [[run.path for run in group.runs] for group in groups] == [[runs[0], runs[2]], [runs[1]], [runs[3]]]
    assert [group.label for group in groups] == ["fedavg · sweep/low", "fedavg · sweep/high-seed1", "scaffold"]


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["fedavg-s0", "fedavg-s1"], "fedavg"),
        (["fedavg_seed-10", "fedavg_seed-11"], "fedavg"),
        (["digits/a/seed0", "digits/a/seed1"], "a"),
        (["muon3-0", "muon3-1"], "muon3"),
        (["digits/b/0", "digits/b/1"], "b"),
        (["alone-s3"], "alone-s3"),
    ],
)
def test_a_group_is_named_by_what_its_paths_share(
    write_run: WriteRun, rows: Rows, names: list[str], folder: str
) -> None:
    (group,) = read_groups([write_run(name, rows([0.5]), seed=i) for i, name in enumerate(names)])
    assert group.folder == folder


def test_labels_are_distinct_where_folders_are_alike(write_run: WriteRun, rows: Rows) -> None:
    runs = [write_run(f"a-s{i}", rows([0.5]), seed=i % 2, lr=[0.1, 0.1, 0.2, 0.2][i]) for i in range(4)]
    assert [group.label for group in read_groups(runs)] == ["fedavg · a", "fedavg · a (2)"]


def test_runs_without_a_configuration_stay_apart(write_run: WriteRun, rows: Rows) -> None:
    runs = [write_run(name, rows([0.5])) for name in ("a", "b")]
    for run in runs:
        (run / "config.yaml").unlink()
    assert [group.label for group in read_groups(runs)] == ["unknown · a", "unknown · b"]


@pytest.mark.parametrize(
    ("name", "content"), [("config.yaml", "a: [1"), ("environment.json", "{"), ("partition.json", "[1, 2]")]
)
def test_a_damaged_file_is_named(write_run: WriteRun, rows: Rows, name: str, content: str) -> None:
    run = write_run("a", rows([0.5]))
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(run / name))):
        read_groups([run])


def test_the_table_for_the_terminal(seeds: list[Path], write_run: WriteRun, rows: Rows) -> None:
    stopped = write_run("scaffold", rows([None, 0.5, None]), algorithm="scaffold", rounds=5)
    lines = comparison_table([*seeds, stopped]).splitlines()
    cells = [re.split(r" {2,}", line.strip()) for line in lines]
    assert cells[0] == ["run", "algorithm", "rounds", "final acc", "best acc", "test loss", "uplink", "time"]
    accuracy, best = standard_error([80, 90, 70]), standard_error([80, 90, 90])
    assert cells[1][:5] == ["fedavg (3 seeds)", "fedavg", "4/4", f"80.0% ± {accuracy:.1f}%", f"86.7% ± {best:.1f}%"]
    assert cells[2] == ["scaffold", "scaffold", "3/5", "50.0%", "50.0%", "2.5000", "3.0 kB", "4.5 s"]
    assert len({len(line) for line in lines}) == 1


def test_the_command_prints_the_table_and_the_page(seeds: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *map(str, seeds)]) == 0
    page = seeds[0].parent / "report.html"
    assert capsys.readouterr().out == f"{comparison_table(seeds)}\nreport: {page}\n"
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_the_command_names_what_is_wrong(seeds: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    missing = seeds[0].parent / "missing"
    assert main(["report", str(missing)]) == 2
    assert f"{missing} is not a run folder" in capsys.readouterr().err
    path = seeds[1] / "metrics.jsonl"
    path.write_text('{"round": 1}\n{"round":\n{"round": 3}\n')
    assert main(["report", *map(str, seeds)]) == 2
    assert f"{path}, line 2: not a metrics row" in capsys.readouterr().err
