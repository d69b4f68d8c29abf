"""Every fault that a run is built to survive: what notices it, how fast, whom it names, and what is lost.

A case is run with its fault, then resumed; the end must be that of a run that nothing happened to. What was found goes
to the table at the end of the test session.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from faults.jobs import Job, digest

Record = Callable[[str, Any], None]


@dataclass(frozen=True)
class Case:
    """A fault and what is to come of it.

    Args:
        fault: in the words of `FEDKERNELS_FAULT`.
        says: pattern of the one line that says what went wrong.
        within_s: bound on the time from the fault to the end of the last rank that is not at fault.
        statuses: of the ranks; None where it does not matter, as of one that is stopped.
        resumed: number of the round that the run goes on after.
        silent_s: in place of `watch.SILENT_S`.
    """

    fault: str
    says: str
    within_s: float
    statuses: tuple[int | None, ...]
    resumed: int
    ranks: int = 2
    overrides: tuple[str, ...] = ()
    silent_s: float | None = None
    stays: tuple[int, ...] = ()
    notes: str = field(default="")


# Naming who is silent takes five seconds; what else is added is room for a machine that is busy with other things.
CASES = {
    "exception in a client": Case(
        "raise rank=1 round=3 stage=train",
        r"(.* )?rank 1 \(host .+\) failed in 'train' of round 3: InjectedError: injected in 'train' of round 3",
        30, (1, 1), 2,
    ),
    "SIGKILL of a rank": Case(
        "kill rank=1 round=3 stage=reduce",
        r"rank 1 died or cannot be reached: rank 1 \(host .+\) was last seen in 'reduce' of round 3",
        40, (1, -9, 1), 2, ranks=3,
    ),
    "SIGKILL of the rank with the store": Case(
        "kill rank=0 round=3 stage=train",
        r"rank 0, which held the store of the job, died or cannot be reached: rank 1 \(host .+\) was in .+ of round 3",
        40, (-9, 1), 2,
    ),
    "hang": Case(
        "hang rank=1 round=3 stage=train",
        r"rank 1 did not reach 'reduce' of round 3 within \d s: rank 1 \(host .+\) was last seen in 'train' of round 3",
        60, (1, 1), 2, overrides=("--timeout_s=3",),
    ),
    "machine cut off": Case(
        "stop rank=1 round=3 stage=move",
        r"rank 1 died or cannot be reached: rank 1 \(host .+\) was last seen in 'move' of round 3",
        60, (1, None), 2, silent_s=5, stays=(1,),
    ),
    "NaN from a client": Case(
        "nan rank=1 round=3 stage=train", r"client \d sent NaN or infinity in round 3", 30, (1, 1), 2
    ),
    "disk full": Case(
        "full rank=1 round=3 stage=checkpoint",
        r"rank 1 cannot write checkpoint .*round-000003: .*No space left on device; earlier checkpoints are untouched",
        30, (1, 1), 2,
    ),
    "SIGTERM of a rank": Case("term rank=1 round=3 stage=server", "", 30, (143, 143), 4),
    "truncated checkpoint": Case(
        "truncate rank=0 round=3 stage=saved; kill rank=1 round=4 stage=train", "rank 1 died .*", 40, (1, -9), 2,
        notes="round-000003 is damaged (server.safetensors does not match its checksum)",
    ),
    "bit flipped in a checkpoint": Case(
        "flip rank=0 round=3 stage=saved; kill rank=1 round=4 stage=train", "rank 1 died .*", 40, (1, -9), 2,
        notes="round-000003 is damaged (server.safetensors does not match its checksum)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a run that nothing happens to, on one rank: sums are exact."""
    job = Job(tmp_path_factory.mktemp("whole") / "run", 1, "--reduction=exact")
    assert job.wait() == {0: 0}
    return digest(job.folder)


@pytest.mark.parametrize("name", CASES)
def test_fault(name: str, tmp_path: Path, expected: str, record_property: Record) -> None:
    case = CASES[name]
    keys = ("--reduction=exact", *case.overrides)
    row: dict[str, Any] = dict.fromkeys(("fired", "detected_s", "culprit", "rounds_lost", "recovered"), "no")
    row["fault"] = name
    record_property("fault", row)
    job = Job(tmp_path / "run", case.ranks, *keys, fault=case.fault, silent_s=case.silent_s)
    statuses = job.wait(but=case.stays)
    # Where there are two faults, the run notices the second, and the resume the first.
    fired = job.fired_at(case.fault.count(";"))
    assert fired is not None, job.said()
    row["fired"] = "yes"
    at_fault = int(re.findall(r"rank=(\d)", case.fault)[-1])
    row["detected_s"] = max(end for rank, end in job.ended_at.items() if rank != at_fault) - fired
    assert row["detected_s"] < case.within_s
    assert tuple(None if s is None else statuses[rank] for rank, s in enumerate(case.statuses)) == case.statuses
    told = [line for line in job.errors() if "hangs in" not in line]
    if name == "exception in a client":
        # The one that fails shows where; nobody else says a word.
        assert told == []
        assert job.said().count("InjectedError: injected in 'train' of round 3") == 1
    elif case.says:
        assert len(told) == 1, job.said()
        assert re.fullmatch(case.says, told[0]), told[0]
    row["culprit"] = "yes"
    begun = len(job.rows()) + (0 if statuses[0] == 143 else 1)

    again = Job(tmp_path / "run", case.ranks, *keys, "--resume", fault=case.fault)
    assert again.wait() == dict.fromkeys(range(case.ranks), 0), again.said()
    assert f"resumed after round {case.resumed} of 6" in again.notes()
    assert case.notes in again.notes()
    row["rounds_lost"] = min(begun, 6) - case.resumed
    assert digest(tmp_path / "run") == expected
    row["recovered"] = "yes"


def test_a_rank_that_never_starts(tmp_path: Path, record_property: Record) -> None:
    row = {"fault": "rank missing at the start", "fired": "yes", "culprit": "no", "rounds_lost": 0, "recovered": "—"}
    record_property("fault", row)
    job = Job(tmp_path / "run", 3, "--timeout_s=2", absent=(1,))
    assert set(job.wait().values()) == {1}
    assert job.errors() == ["rank 1 did not start within 2 s"]
    row |= {"culprit": "yes", "detected_s": 2.0}
    assert not (tmp_path / "run").exists()


def test_a_client_that_sends_nan_may_be_left_out(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", 2, "--on_nonfinite=drop_client", fault="nan rank=1 round=3 stage=train")
    assert job.wait() == {0: 0, 1: 0}
    assert [row["dropped"] for row in job.rows()] == [0, 0, 1, 0, 0, 0]


def test_a_slow_rank_is_waited_for(tmp_path: Path) -> None:
    fault = "slow rank=1 round=2 stage=train seconds=1.5"
    job = Job(tmp_path / "run", 2, "--rounds=2", fault=fault)
    assert job.wait() == {0: 0, 1: 0}
    assert job.rows()[1]["round_s"] > 1.5 > job.rows()[0]["round_s"]
