"""What a run folder says of its launches: job, launcher, environment and code, each against what was really there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedkernels import __version__, launch_record
from fedkernels.launch_record import begun_by_this_job, record_launch

IDENTITY = ["-c", "user.name=a", "-c", "user.email=a@b"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout that stands in for that of the package, and an environment without launchers."""
    for name in ("TORCHELASTIC_RUN_ID", "FEDKERNELS_LAUNCHER", "WORLD_SIZE", "SLURM_JOB_ID", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "checkout"
    (root / "fedkernels").mkdir(parents=True)
    (root / "csrc").mkdir()
    monkeypatch.setattr(launch_record, "SOURCE", root)
    (root / "fedkernels" / "a.py").write_text("a = 1\n")
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, *IDENTITY, "commit", "--quiet", "--message", "a")
    return root


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout


def launches(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "launches.jsonl").read_text().splitlines()]


def last_line(run_dir: Path) -> str:
    return (run_dir / "resubmit.sh").read_text().splitlines()[-1]


def test_a_clean_checkout_is_its_commit(checkout: Path, run_dir: Path) -> None:
    record_launch(run_dir)
    head = git(checkout, "rev-parse", "HEAD").strip()
    assert launches(run_dir)[0]["code"] == {"version": __version__, "commit": head, "diff": None, "untracked": []}
    assert list(run_dir.glob("*.diff")) == []
    assert f"# Code: fedkernels {__version__}, {head}\n" in (run_dir / "resubmit.sh").read_text()


def test_changed_code_can_be_restored_from_commit_and_diff(checkout: Path, run_dir: Path) -> None:
    (checkout / "fedkernels" / "a.py").write_text("a = 2\n")
    (checkout / "fedkernels" / "new.py").write_text("b = 1\n")
    record_launch(run_dir)
    code = launches(run_dir)[0]["code"]
    assert code["untracked"] == ["fedkernels/new.py"]
    git(checkout, "checkout", "--quiet", code["commit"], "--", ".")
    git(checkout, "apply", str(run_dir / code["diff"]))
    assert (checkout / "fedkernels" / "a.py").read_text() == "a = 2\n"


def test_code_outside_a_checkout_is_its_version(
    checkout: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Within a checkout of something else, whose commit says nothing of this package.
    monkeypatch.setattr(launch_record, "SOURCE", checkout / "fedkernels")
    record_launch(run_dir)
    assert launches(run_dir)[0]["code"] == {"version": __version__, "commit": None, "diff": None, "untracked": []}


def test_launches_that_differ_are_kept(checkout: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_launch(run_dir)
    record_launch(run_dir)
    assert len(launches(run_dir)) == 1
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("UNRELATED_TOKEN", "secret")
    record_launch(run_dir)
    assert len(launches(run_dir)) == 2
    assert launches(run_dir)[1]["environment"]["NCCL_DEBUG"] == "INFO"
    assert all(b"secret" not in path.read_bytes() for path in run_dir.iterdir())


def test_only_the_job_of_the_newest_launch_is_started_again(
    checkout: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not begun_by_this_job(run_dir)
    record_launch(run_dir)
    assert not begun_by_this_job(run_dir)
    for number in ("1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", number)
        assert not begun_by_this_job(run_dir)
        record_launch(run_dir)
        assert begun_by_this_job(run_dir)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert not begun_by_this_job(run_dir)


def test_a_rendezvous_without_an_id_is_no_job(checkout: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    record_launch(run_dir)
    assert launches(run_dir)[0]["job"] is None
    assert not begun_by_this_job(run_dir)


def test_a_single_process_is_started_as_itself(checkout: Path, run_dir: Path) -> None:
    record_launch(run_dir)
    config = run_dir / "config.yaml"
    assert last_line(run_dir) == f'exec {sys.executable} -m fedkernels train --config {config} --resume "$@"'


def test_torchrun_is_asked_what_it_was_called_with(
    checkout: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = [sys.executable, "-c", "import time; time.sleep(60)", "--rdzv-id", "a job", "-m", "fedkernels", "train"]
    with subprocess.Popen([*called, "--lr", "1"]) as agent:
        while b"train" not in Path(f"/proc/{agent.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a job")
        monkeypatch.setattr(launch_record.os, "getppid", lambda: agent.pid)
        record_launch(run_dir)
        agent.kill()
    expected = f"exec {sys.executable} -c 'import time; time.sleep(60)' --rdzv-id 'a job' -m fedkernels train --config "
    assert last_line(run_dir).startswith(expected)


def test_ranks_that_were_started_one_by_one_are_said_to_be(
    checkout: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    record_launch(run_dir)
    assert launches(run_dir)[0]["launcher"] is None
    assert "# Was one of 3 ranks; start it once for each" in (run_dir / "resubmit.sh").read_text()


@pytest.mark.parametrize("by", ["SLURM_JOB_ID", "CROSS_RANK"])
def test_gpus_that_a_launcher_gave_out_are_not_asked_for_again(
    checkout: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    record_launch(run_dir)
    monkeypatch.setenv(by, "7")
    record_launch(run_dir)
    assert ["CUDA_VISIBLE_DEVICES" in launch["environment"] for launch in launches(run_dir)] == [True, False]
