"""Every fault that a run is built to survive: what notices it, how fast, whom it names, and what is lost.

A case is run with its fault, then resumed; the end must be that of a run that nothing happened to. What was found goes
to the table at the end of the test session.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults.jobs import CONFIG, ERROR, Job, Record, digest, placed_on


@dataclass(frozen=True)
class Case:
    """A fault and what is to come of it.

    Args:
        fault: in the words of `FEDKERNELS_FAULT`; of two the second ends the run, and the first is met on resuming.
        says: pattern of the line that says what went wrong, with a group for whoever is named there; without one it is
            the rank that prints it.
        names: who is at fault.
        within_s: bound on the time from the fault to that line, and to the end of the last rank that is not at fault.
        statuses: of the ranks; None where it does not matter, as of one that is stopped.
        resumed: number of the round that the run goes on after.
        silent_s: in place of `watch.SILENT_S`.
        stays: ranks that do not end by themselves.
        on_resume: whether the line is of the run that goes on; the time is then that since its start.
    """

    fault: str
    says: str
    names: str
    within_s: float
    statuses: tuple[int | None, ...]
    resumed: int
    ranks: int = 2
    overrides: tuple[str, ...] = ()
    silent_s: float | None = None
    stays: tuple[int, ...] = ()
    on_resume: bool = False


def first_client(rank: int, round: int, ranks: int) -> str:
    return f"client {placed_on(rank, round, ranks)[0]}"


GROUPS = ("--sharding=fsdp2", "--shard_size=2")
DIED = r"(?P<who>.+) died or cannot be reached: rank 1 \(host .+\) was last seen in "
LATE = r" within \d+ s: rank 1 \(host .+\) was last seen in 'train' of round 3"
DAMAGED = r"checkpoint .*/(?P<who>round-\d+) is damaged \(server.safetensors does not match its checksum\)"
NOT_JOINED = r"(?P<who>.+) did not join the others of the client group in 'train' of round 3" + LATE
# Naming who is silent takes five seconds; what else is added is room for a machine that is busy with other things.
CASES = {
    "exception in a client": Case(
        "raise rank=1 round=3 stage=train",
        # The one that fails shows where; nobody else says a word.
        r".*InjectedError: injected in 'train' of round 3", "rank 1",
        30, (1, 1), 2,
    ),
    "SIGKILL of a rank": Case(
        "kill rank=1 round=3 stage=reduce", ERROR + DIED + "'reduce' of round 3", "rank 1", 40, (1, -9, 1), 2, ranks=3
    ),
    "SIGKILL of the rank with the store": Case(
        "kill rank=0 round=3 stage=train",
        ERROR + r"(?P<who>rank \d), which held the store of the job, died or cannot be reached: "
        r"rank 1 \(host .+\) was in .+ of round 3",
        "rank 0", 40, (-9, 1), 2,
    ),
    "SIGKILL in a client group": Case(
        "kill rank=1 round=3 stage=train", ERROR + DIED + "'train' of round 3", "rank 1", 40, (1, -9), 2,
        overrides=GROUPS,
    ),
    "hang": Case(
        "hang rank=1 round=3 stage=train", ERROR + r"(?P<who>.+) did not reach 'reduce' of round 3" + LATE, "rank 1",
        60, (1, 1), 2, overrides=("--timeout_s=8",),
    ),
    "hang in a client group, fsdp2": Case(
        "hang rank=1 round=3 stage=train", ERROR + NOT_JOINED, "rank 1",
        60, (1, 1), 2, overrides=(*GROUPS, "--timeout_s=6"),
    ),
    "hang in a client group, ddp": Case(
        "hang rank=1 round=3 stage=train", ERROR + NOT_JOINED, "rank 1",
        60, (1, 1), 2, overrides=("--sharding=ddp", "--shard_size=2", "--timeout_s=6"),
    ),
    "hang in one of two client groups": Case(
        # The other group may be the first to say so: it waits for both.
        "hang rank=1 round=3 stage=train",
        ERROR + r"(?P<who>.+) did not (join the others of the client group in 'train'|reach 'reduce') of round 3"
        + LATE,
        "rank 1", 60, (1, 1, 1, 1), 2, ranks=4, overrides=(*GROUPS, "--timeout_s=6"),
    ),
    "machine cut off": Case(
        "stop rank=1 round=3 stage=move", ERROR + DIED + "'move' of round 3", "rank 1",
        60, (1, None), 2, silent_s=5, stays=(1,),
    ),
    "NaN from a client": Case(
        "nan rank=1 round=3 stage=train", ERROR + r"(?P<who>.+) sent NaN or infinity in round 3",
        first_client(1, 3, 2), 30, (1, 1), 2,
    ),
    "disk full": Case(
        "full rank=1 round=3 stage=checkpoint",
        ERROR + r"(?P<who>.+) cannot write checkpoint .*round-000003: .*No space left on device; earlier checkpoints "
        "are untouched",
        "rank 1", 30, (1, 1), 2,
    ),
    "SIGTERM of a rank": Case(
        "term rank=1 round=3 stage=server", r"stopped by (?P<who>\w+) after round 4; .*", "SIGTERM", 30, (143, 143), 4
    ),
    "truncated checkpoint": Case(
        "truncate rank=0 round=3 stage=saved; kill rank=1 round=4 stage=train",
        DAMAGED, "round-000003", 60, (1, -9), 2, on_resume=True,
    ),
    "bit flipped in a checkpoint": Case(
        "flip rank=0 round=3 stage=saved; kill rank=1 round=4 stage=train",
        DAMAGED, "round-000003", 60, (1, -9), 2, on_resume=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], str]:
    """Ends of runs that nothing happens to: sums are exact, so one client group stands for all."""
    found: dict[tuple[str, ...], str] = {}

    def end(case: Case) -> str:
        keys = tuple(key for key in case.overrides if key.startswith("--shard"))
        if keys not in found:
            job = Job(tmp_path_factory.mktemp("whole") / "run", 2 if keys else 1, "--reduction=exact", *keys)
            assert set(job.wait().values()) == {0}, job.said.text()
            found[keys] = digest(job.folder)
        return found[keys]

    return end


@pytest.mark.parametrize("name", CASES)
def test_fault(name: str, tmp_path: Path, expected: Callable[[Case], str], record_property: Record) -> None:
    case = CASES[name]
    keys = ("--reduction=exact", *case.overrides)
    row: dict[str, Any] = {"fault": name}
    record_property("fault", row)
    job = Job(tmp_path / "run", case.ranks, *keys, fault=case.fault, silent_s=case.silent_s)
    statuses = job.wait(but=case.stays)
    fired = job.fired_at(case.fault.count(";"))
    row["fired"] = "yes"
    last = max(end for rank, end in job.ended_at.items() if statuses[rank] != -9 and rank not in case.stays)
    assert last - fired < case.within_s
    assert tuple(None if s is None else statuses[rank] for rank, s in enumerate(case.statuses)) == case.statuses
    told = [line for line in job.said.errors() if "hangs in" not in line]
    assert len(told) == (name not in ("exception in a client", "SIGTERM of a rank")), job.said.text()
    begun = max(len(job.rows()), int(re.findall(r"round=(\d)", case.fault)[-1]))

    again = Job(tmp_path / "run", case.ranks, *keys, "--resume", fault=case.fault)
    assert again.wait() == dict.fromkeys(range(case.ranks), 0), again.said.text()
    since, teller = (again.started_at, again) if case.on_resume else (fired, job)
    at, rank, line = teller.said.first(case.says)
    row["detected_s"] = at - since
    assert 0 < row["detected_s"] < case.within_s
    row["culprit"] = line.groupdict().get("who", f"rank {rank}")
    assert row["culprit"] == case.names
    resumed = int(again.said.first(r"resumed after round (\d) of 6")[2][1])
    row["rounds_lost"] = begun - resumed
    assert resumed == case.resumed
    assert digest(tmp_path / "run") == expected(case)
    row["recovered"] = "yes"


def test_a_rank_that_never_starts(tmp_path: Path, record_property: Record) -> None:
    row: dict[str, Any] = {"fault": "rank missing at the start"}
    record_property("fault", row)
    job = Job(tmp_path / "run", 3, "--timeout_s=2", absent=(1,))
    assert job.wait() == {0: 1, 2: 1}
    row["fired"] = "yes"
    assert len(job.said.errors()) == 1
    at, _, line = job.said.first(ERROR + "(.+) did not start within 2 s")
    row["detected_s"] = at - job.started_at
    assert 2 < row["detected_s"] < 30
    row["culprit"] = line[1]
    assert row["culprit"] == "rank 1"
    # Nothing was begun, so nothing is lost.
    row["rounds_lost"] = len(job.rows())
    assert not job.folder.exists()
    again = Job(tmp_path / "run", 3)
    assert set(again.wait().values()) == {0}
    row["recovered"] = "yes"


def test_a_client_that_sends_nan_may_be_left_out(tmp_path: Path, record_property: Record) -> None:
    row: dict[str, Any] = {"fault": "NaN from a client, left out"}
    record_property("fault", row)
    job = Job(tmp_path / "run", 2, "--on_nonfinite=drop_client", fault="nan rank=1 round=3 stage=train")
    assert job.wait() == {0: 0, 1: 0}
    fired = job.fired_at()
    row["fired"] = "yes"
    at, _, line = job.said.first(r"(?P<who>client \d+) sent NaN or infinity in round 3: left out")
    row["detected_s"] = at - fired
    assert 0 < row["detected_s"] < 30
    row["culprit"] = line["who"]
    assert row["culprit"] == first_client(1, 3, 2)
    assert [found["dropped"] for found in job.rows()] == [0, 0, 1, 0, 0, 0]
    assert [found["cohort"] for found in job.rows()] == [4, 4, 3, 4, 4, 4]
    row["rounds_lost"] = CONFIG["rounds"] - len(job.rows())
    row["recovered"] = "yes"


def test_a_slow_rank_is_waited_for(tmp_path: Path) -> None:
    fault = "slow rank=1 round=2 stage=train seconds=1.5"
    job = Job(tmp_path / "run", 2, "--rounds=2", fault=fault)
    assert job.wait() == {0: 0, 1: 0}
    assert job.rows()[1]["round_s"] > 1.5 > job.rows()[0]["round_s"]
