"""torchrun starts ranks anew after one was killed, and they go on from the newest checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from faults.jobs import CONFIG, Job, digest


def test_torchrun_restarts_a_job_that_lost_a_rank(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    row: dict[str, Any] = {"fault": "SIGKILL under torchrun, restarted"}
    record_property("fault", row)
    whole = Job(tmp_path / "whole", 2)
    assert whole.wait() == {0: 0, 1: 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["-m", "fedkernels", "train", "--config", str(tmp_path / "config.yaml"), "--resume"]
    fault = "kill rank=1 round=4 stage=reduce"
    job = subprocess.run(
        [*command, "--run_dir", str(tmp_path / "run")],
        env=os.environ | {"FEDKERNELS_FAULT": fault, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert job.returncode == 0, job.stderr
    fired = float((tmp_path / "run" / ".fault-0").read_text())
    row |= {"fired": "yes", "detected_s": _restarted(tmp_path / "run") - fired, "culprit": "yes"}
    assert 0 < row["detected_s"] < 120
    assert "rank 1" in job.stderr or "local_rank: 1" in job.stderr
    assert "resumed after round 3 of 6" in job.stdout
    row["rounds_lost"] = 1
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    row["recovered"] = "yes"


def _restarted(run: Path) -> float:
    """When the second attempt wrote down what it is, which is after it noticed the end of the first."""
    written = (run / "environment.json").stat().st_mtime
    assert written < time.time()
    return written
