"""`launch/deepspeed.sh` on one host, and on two hosts of a hostfile without ssh."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cli.small_runs import Runs
from launch.machine import ROOT, free_port

from fedkernels.launch_record import PREFIXES

SCRIPT = ROOT / "launch" / "deepspeed.sh"


def start(*arguments: str) -> subprocess.Popen[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    said = process.communicate(timeout=120)[0]
    assert process.returncode == status, said
    return said


def test_two_hosts_of_two_ranks_in_all(runs: Runs, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# as in launch/hostfile.example\nlocalhost slots=1\n127.0.0.2 slots=1\n")
    common = [f"--hostfile={hosts}", "--master-addr", "127.0.0.1", "--master_port", str(free_port())]
    nodes = [start(*common, "--node-rank", rank, *runs.arguments("two")[1:]) for rank in "01"]
    assert runs.train("whole") == 0
    said = [finish(node) for node in nodes]
    assert "2 ranks on cpu" in said[0]
    runs.assert_same("whole", "two", ranks=True)
    script = (runs / "two" / "resubmit.sh").read_text()
    assert f"exec bash {SCRIPT} --hostfile {hosts} --master-addr 127.0.0.1 --master-port" in script


def test_this_machine_alone_and_a_run_that_fails(runs: Runs) -> None:
    said = finish(start("--nproc-per-node", "2", *runs.arguments("one", "--cohrt", "3")[1:]), 2)
    assert "fedkernels: error: cohrt: unknown key; did you mean 'cohort'?" in said
    assert not (runs / "one").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--hostfile", "nowhere", "--lr", "1"],
            "--hostfile: nowhere is not there, expected a file of lines HOST slots=",
        ),
        (["--nnodes", "2", "--lr", "1"], "--hostfile: missing; --nnodes, --master-addr and --node-rank need one"),
        (["--hostfile", str(ROOT / "launch/hostfile.example"), "--node-rank=0", "--lr=1"], "--master-addr: missing"),
        (["--nproc-per-node", "two", "--lr", "1"], "--nproc-per-node: two, expected a number from 1"),
        (["--nproc-per-node", "2"], "nothing to train; give --config FILE"),
    ],
)
def test_bad_options_start_nothing(runs: Runs, arguments: list[str], said: str) -> None:
    (line,) = finish(start(*arguments), 2).splitlines()
    assert line.startswith(f"error: {said}")


def test_hosts_get_every_variable_that_the_run_folder_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Runs
) -> None:
    """A python that stands in for DeepSpeed's launcher keeps the file from which it would take them."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ -z "$DS_ENV_FILE" ] || cp "$DS_ENV_FILE" {tmp_path / "passed"}\n')
    python.chmod(0o755)
    (python.parent / "activate").write_text(f"PATH={python.parent}:$PATH\n")
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    kept = {f"{prefix}TEST" if prefix.endswith("_") else prefix: f"a = {prefix}" for prefix in PREFIXES}
    for name, value in {**kept, "VENV": str(tmp_path / "venv"), "HOME": str(tmp_path), "TOKEN": "secret"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    finish(start("--hostfile", str(tmp_path / "hosts"), "--config", "c.yaml"))
    passed = dict(line.split("=", 1) for line in (tmp_path / "passed").read_text().splitlines())
    assert kept.items() <= passed.items()
    assert not {"CUDA_VISIBLE_DEVICES", "TOKEN"} & passed.keys()
