"""A rank that is slower than a round may take, in a job that does not wait for it."""

from __future__ import annotations

from pathlib import Path

from faults.jobs import Job


def test_a_job_goes_on_without_the_clients_of_a_slow_rank(tmp_path: Path) -> None:
    policy = ["--drop_slowest.over_sampling", "0", "--drop_slowest.deadline_s", "5"]
    job = Job(tmp_path / "run", 2, *policy, fault="slow rank=1 round=3 stage=train seconds=6")
    assert job.wait() == {0: 0, 1: 0}
    rows = job.rows()
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["late"] for row in rows] == [0, 0, 2, 0, 0, 0]
    assert [row["cohort"] for row in rows] == [4, 4, 2, 4, 4, 4]
    assert rows[2]["protocol_up_bytes"] * 2 == rows[1]["protocol_up_bytes"]
    assert rows[2]["protocol_down_bytes"] == rows[1]["protocol_down_bytes"]
    assert "round 3 closed at its deadline without clients" in job.said.text()
