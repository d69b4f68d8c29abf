"""torchrun's agents start ranks anew after some were killed, and they go on from the newest checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.jobs import Agents, Job, digest, fired_at


@pytest.mark.parametrize(
    ("nodes", "ranks", "fault", "restarts"),
    [
        (1, 2, "kill rank=1 round=4 stage=reduce", None),
        # The agent of the rank counts a failure, and the other one a node that came.
        (2, 1, "kill rank=1 round=3 stage=train; kill rank=1 round=5 stage=reduce", {0, 2}),
        # An agent whose rank was killed stops the one beside it.
        (2, 2, "kill rank=3 round=3 stage=train; kill rank=0 round=5 stage=reduce", None),
    ],
)
def test_ranks_of_agents_are_killed_and_started_again(
    nodes: int,
    ranks: int,
    fault: str,
    restarts: set[int] | None,
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    kills = [(int(rank), int(round)) for rank, round in re.findall(r"rank=(\d) round=(\d)", fault)]
    row: dict[str, Any] = {"fault": f"SIGKILL, {nodes} agent(s), {ranks} rank(s) each"}
    record_property("fault", row)
    whole = Job(tmp_path / "whole", nodes * ranks)
    assert set(whole.wait().values()) == {0}
    job = Agents(tmp_path / "run", nodes, ranks, fault=fault)
    assert set(job.wait()) == {0}, job.said.text()
    fired = [fired_at(tmp_path / "run", n) for n in range(len(kills))]
    row["fired"] = "yes"
    said = [job.said.first(rf".*rank {rank} died or cannot .* of round {round}")[0] for rank, round in kills]
    assert len(job.said.errors()) == len(kills), job.said.text()
    row["culprit"] = "yes"
    row["detected_s"] = max(at - when for at, when in zip(said, fired, strict=True))
    assert 0 < row["detected_s"] < 40
    resumed = [int(round) for round in re.findall(r"^resumed after round (\d) of 6$", job.said.text(), re.MULTILINE)]
    lost = [round - before for (_, round), before in zip(kills, resumed, strict=True)]
    row["rounds_lost"] = max(lost)
    assert lost == [1] * len(kills)
    counts = re.findall(r"restart_count=(\d)", job.said.text())[-nodes:]
    assert restarts is None or set(map(int, counts)) == restarts
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    row["recovered"] = "yes"
