"""A rank that is slower than a round may take, in a job that does not wait for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from faults.jobs import CONFIG, Job, Record, placed_on


def test_a_job_goes_on_without_the_clients_of_a_slow_rank(tmp_path: Path, record_property: Record) -> None:
    row: dict[str, Any] = {"fault": "slow rank, not waited for"}
    record_property("fault", row)
    policy = ["--drop_slowest.over_sampling", "0", "--drop_slowest.deadline_s", "5"]
    job = Job(tmp_path / "run", 2, *policy, fault="slow rank=1 round=3 stage=train seconds=6")
    assert job.wait() == {0: 0, 1: 0}
    fired = job.fired_at()
    row["fired"] = "yes"
    at, _, line = job.said.first("round 3 closed at its deadline without (?P<who>clients .+)")
    row["detected_s"] = at - fired
    assert 4.9 < row["detected_s"] < 30
    row["culprit"] = line["who"]
    assert row["culprit"].startswith("clients ")
    assert sorted(map(int, re.findall(r"\d+", row["culprit"]))) == sorted(placed_on(1, 3, 2))
    rows = job.rows()
    row["rounds_lost"] = CONFIG["rounds"] - len(rows)
    assert [found["round"] for found in rows] == [1, 2, 3, 4, 5, 6]
    assert [found["late"] for found in rows] == [0, 0, 2, 0, 0, 0]
    assert [found["cohort"] for found in rows] == [4, 4, 2, 4, 4, 4]
    assert rows[2]["protocol_up_bytes"] * 2 == rows[1]["protocol_up_bytes"]
    assert rows[2]["protocol_down_bytes"] == rows[1]["protocol_down_bytes"]
    row["recovered"] = "yes"
