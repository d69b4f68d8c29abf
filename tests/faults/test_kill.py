"""kill −9 of a rank at any point: the run goes on from its checkpoint to the same end, on any number of ranks."""

from __future__ import annotations

import random
import shutil
import time
from itertools import product
from pathlib import Path

import pytest
from faults.jobs import LIMIT_S, Job, digest

RANKS = 4
STAGES = ("move", "train", "reduce", "server", "checkpoint", "saved")
KEYS = {"exact": ("--reduction=exact",), "fast": ("--reduction=fast",)}
# A longer run, for a kill that keeps to no stage; what is to be killed waits in its last round.
LONG, HELD = "--rounds=40", "slow rank=0 round=40 stage=train seconds=60"


def points(count: int) -> list[str]:
    """Where somebody dies: a rank, a round and a stage, the same in every session."""
    drawn = random.Random(20).sample(list(product(range(RANKS), range(2, 6), STAGES)), count)
    return [f"kill rank={rank} round={round} stage={stage}" for rank, round, stage in drawn]


def moments(count: int) -> list[tuple[int, float]]:
    """Who is killed from outside, and how many seconds after the second round; the same in every session."""
    draw = random.Random(21)
    return [(draw.randrange(RANKS), round(draw.uniform(0, 0.8), 3)) for _ in range(count)]


def rounds_of(job: Job) -> int:
    """Rows that it has written to their ends."""
    path = job.folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def whole_runs(folder: Path, *keys: str) -> dict[str, str]:
    """Ends of runs that nothing happens to: exact on one rank, fast on all."""
    ends = {}
    for reduction, ranks in (("exact", 1), ("fast", RANKS)):
        job = Job(folder / reduction, ranks, *KEYS[reduction], *keys)
        assert set(job.wait().values()) == {0}
        ends[reduction] = digest(job.folder)
    return ends


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return whole_runs(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole_long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return whole_runs(tmp_path_factory.mktemp("whole-long"), LONG)


def killed(folder: Path, reduction: str, fault: str) -> Path:
    """A run that lost a rank, and with it, as on a cluster, all others."""
    job = Job(folder / "killed", RANKS, *KEYS[reduction], fault=fault)
    victim = int(fault.split("rank=")[1][0])
    job.wait(but=tuple(set(range(RANKS)) - {victim}))
    assert job.ranks[victim].exitcode == -9
    return job.folder


@pytest.mark.parametrize("fault", points(10))
def test_exact_runs_end_alike_on_any_number_of_ranks(fault: str, tmp_path: Path, whole: dict[str, str]) -> None:
    left = killed(tmp_path, "exact", fault)
    for ranks in (1, 2, 4):
        shutil.copytree(left, tmp_path / f"on{ranks}")
        job = Job(tmp_path / f"on{ranks}", ranks, *KEYS["exact"], "--resume")
        assert set(job.wait().values()) == {0}, job.said.text()
        assert "resumed after round" in job.said.text()
        assert digest(job.folder) == whole["exact"]


@pytest.mark.parametrize("fault", points(10))
def test_fast_runs_end_alike_on_the_same_number(fault: str, tmp_path: Path, whole: dict[str, str]) -> None:
    left = killed(tmp_path, "fast", fault)
    job = Job(left, RANKS, *KEYS["fast"], "--resume")
    assert set(job.wait().values()) == {0}, job.said.text()
    assert digest(left) == whole["fast"]


@pytest.mark.parametrize(("reduction", "ranks"), [("exact", 2), ("fast", RANKS)])
@pytest.mark.parametrize(("victim", "delay_s"), moments(2))
def test_runs_that_are_killed_at_any_moment_end_alike(
    victim: int, delay_s: float, reduction: str, ranks: int, tmp_path: Path, whole_long: dict[str, str]
) -> None:
    keys = (*KEYS[reduction], LONG)
    job = Job(tmp_path / "killed", RANKS, *keys, fault=HELD)
    deadline = time.monotonic() + LIMIT_S
    while rounds_of(job) < 2:
        assert time.monotonic() < deadline, job.said.text()
        time.sleep(0.01)
    time.sleep(delay_s)
    job.ranks[victim].kill()
    assert job.wait(but=tuple(set(range(RANKS)) - {victim}))[victim] == -9
    begun = rounds_of(job)
    assert begun < 40
    job = Job(job.folder, ranks, *keys, "--resume")
    assert set(job.wait().values()) == {0}, job.said.text()
    resumed = int(job.said.first(r"resumed after round (\d+) of 40")[2][1])
    assert begun - 1 <= resumed <= begun
    assert digest(job.folder) == whole_long[reduction]
