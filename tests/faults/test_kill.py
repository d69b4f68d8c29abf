"""kill −9 of a rank at any point: the run goes on from its checkpoint to the same end, on any number of ranks."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from faults.jobs import Job, digest

RANKS = 4
STAGES = ("move", "train", "reduce", "server", "checkpoint", "saved")
KEYS = {"exact": ("--reduction=exact",), "fast": ("--reduction=fast",)}


def points(count: int) -> list[str]:
    """Where somebody dies: a rank, a round and a stage, the same in every session."""
    draw = random.Random(20)
    return [
        f"kill rank={draw.randrange(RANKS)} round={draw.randint(2, 5)} stage={draw.choice(STAGES)}"
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Ends of runs that nothing happens to: exact on one rank, fast on all."""
    folder = tmp_path_factory.mktemp("whole")
    ends = {}
    for reduction, ranks in (("exact", 1), ("fast", RANKS)):
        job = Job(folder / reduction, ranks, *KEYS[reduction])
        assert set(job.wait().values()) == {0}
        ends[reduction] = digest(job.folder)
    return ends


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


@pytest.mark.parametrize("fault", points(2))
def test_fast_runs_end_alike_on_the_same_number(fault: str, tmp_path: Path, whole: dict[str, str]) -> None:
    left = killed(tmp_path, "fast", fault)
    job = Job(left, RANKS, *KEYS["fast"], "--resume")
    assert set(job.wait().values()) == {0}, job.said.text()
    assert digest(left) == whole["fast"]
