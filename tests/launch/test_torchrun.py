"""`launch/torchrun.sh` on one node: options, restarts, stops, and what the run folder says of the launch."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from cli.small_runs import Runs
from launch.machine import ROOT, free_port

SCRIPT = ROOT / "launch" / "torchrun.sh"


def start(*arguments: str, cwd: Path | None = None, script: Path = SCRIPT) -> subprocess.Popen[str]:
    command = ["bash", str(script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    said = process.communicate(timeout=120)[0]
    assert process.returncode == status, said
    return said


def launches(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "launches.jsonl").read_text().splitlines()]


def test_two_ranks_and_the_same_again_by_the_script_in_the_run_folder(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN; it's quoted")
    # Options of both kinds in any order, with either spelling, and paths of the caller's folder.
    arguments = [
        "--rounds=3",
        "--nproc_per_node",
        "2",
        "--config",
        "config.yaml",
        "--max-restarts=0",
        "--run_dir",
        "two",
    ]
    said = finish(start(*arguments, cwd=runs.folder))
    assert "2 ranks on cpu" in said
    assert runs.train("whole", "--rounds", "3") == 0
    runs.assert_same("whole", "two", ranks=True)
    (launch,) = launches(runs / "two")
    assert launch["launcher"] == f"bash {SCRIPT} --nproc-per-node 2 --max-restarts 0"
    script = (runs / "two" / "resubmit.sh").read_text()
    assert "export NCCL_DEBUG='WARN; it'\"'\"'s quoted'\n" in script
    finish(start("--run_dir", "again", cwd=Path("/"), script=runs / "two" / "resubmit.sh"))
    runs.assert_same("two", "again")
    said = finish(start(script=runs / "two" / "resubmit.sh"))
    assert "resumed after round 3 of 3" in said


def test_ranks_that_are_started_again_go_on_from_the_newest_checkpoint(runs: Runs) -> None:
    keys = ["--rounds", "150", "--checkpoint_every", "10"]
    process = start("--nproc-per-node=2", "--max-restarts=1", *runs.arguments("killed", *keys)[1:])
    runs.wait_for_rounds("killed", 20)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    said = finish(process)
    assert re.search(r"\nresumed after round \d+0 of 150\n2 ranks on cpu", said)
    assert runs.train("whole", *keys) == 0
    runs.assert_same("whole", "killed", ranks=True)


def test_ranks_that_are_started_again_do_not_take_over_the_run_of_another_job(runs: Runs) -> None:
    assert runs.train("mine", "--rounds", "2") == 0
    before = (runs / "mine" / "metrics.jsonl").read_bytes()
    said = finish(start("--max-restarts=1", *runs.arguments("mine", "--rounds", "4")[1:]), 1)
    assert said.count("already holds a run; continue it with --resume") == 2
    assert (runs / "mine" / "metrics.jsonl").read_bytes() == before


def test_sigusr1_to_the_launcher_stops_the_ranks_and_they_are_not_started_again(runs: Runs) -> None:
    keys = ["--rounds", "100000", "--checkpoint_every", "100000"]
    process = start("--nproc-per-node=2", "--max-restarts=3", *runs.arguments("stopped", *keys)[1:])
    runs.wait_for_rounds("stopped", 2)
    process.send_signal(signal.SIGUSR1)
    said = finish(process, 1)
    (last,) = re.findall(r"stopped by SIGUSR1 after round (\d+); continue with --resume", said)
    assert runs.checkpoints("stopped") == [f"round-{int(last):06d}"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nproc-per-node", "0"], "--nproc-per-node: 0, expected a number of ranks, or gpu, cpu or auto"),
        (["--nproc-per-node", "--config"], "--nproc-per-node: expected a value after it"),
        (["--nnodes=2:x"], "--nnodes: 2:x, expected a number of nodes, or MIN:MAX"),
        (["--nnodes=3:2"], "--nnodes: 3:2, expected MIN:MAX with MIN at most MAX"),
        (["--nnodes=2"], "--rdzv-endpoint: missing; 2 nodes need HOST:PORT of the first one"),
        (["--nnodes=1:2"], "--rdzv-endpoint: missing; 1:2 nodes need HOST:PORT of the first one"),
        (["--rdzv-endpoint=head"], "--rdzv-endpoint: head, expected HOST:PORT"),
        (
            ["--rdzv-endpoint=head:70000", "--rdzv-id=a"],
            "--rdzv-endpoint: head:70000, expected a port of at most 65535",
        ),
        (["--rdzv-endpoint=head:29500"], "--rdzv-id: missing; give this job a name"),
        (["--node-rank=0"], "--rdzv-endpoint: missing; --rdzv-id, --rdzv-conf, --node-rank and"),
        (
            ["--nnodes=2", "--rdzv-endpoint=head:1", "--rdzv-id=a", "--node-rank=2"],
            "--node-rank: 2, expected less than --nnodes 2",
        ),
        (["--max-restarts=-1"], "--max-restarts: -1, expected a number from 0"),
    ],
)
def test_bad_options_start_nothing(runs: Runs, arguments: list[str], said: str) -> None:
    (line,) = finish(start(*arguments, "--lr", "1"), 2).splitlines()
    assert line.startswith(f"error: {said}")


def test_without_options_of_train_nothing_starts(runs: Runs) -> None:
    assert "nothing to train; give --config FILE" in finish(start("--nproc-per-node", "2"), 2)


def test_an_environment_without_torch_is_named_and_left_as_it_is(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    python = runs / "empty" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    (python.parent / "activate").write_text(f"PATH={python.parent}:$PATH\n")
    monkeypatch.setenv("VENV", str(runs / "empty"))
    assert f"error: {python} has no torch; install it there" in finish(start("--lr", "1"), 2)


def test_help_is_what_the_script_says_at_its_top(runs: Runs) -> None:
    said = finish(start("--help"))
    assert said.startswith("Train on the ranks of one node or of many.")
    assert "--rdzv-endpoint H:P" in said
    assert "source" not in said


def start_nodes(sizes: tuple[int, int], *arguments: str) -> list[subprocess.Popen[str]]:
    """Two of torchrun's agents on this host, each a node with ranks of its own."""
    port = free_port()
    nodes = ("--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=levels", "--local-addr=127.0.0.1")
    return [
        start(f"--nproc-per-node={ranks}", f"--node-rank={node}", "--max-restarts=0", *nodes, *arguments)
        for node, ranks in enumerate(sizes)
    ]


def test_sums_in_nodes_and_across(runs: Runs) -> None:
    keys = ["--rounds=3", "--checkpoint_every=3", "--reduction=exact", "--clients_per_batch=1"]
    agents = start_nodes((2, 2), *runs.arguments("levels", *keys, "--all_reduce=hierarchical")[1:])
    said = "".join(finish(agent) for agent in agents)
    assert said.count("all-reduce in 2 nodes of 2, then across\n") == 1
    assert runs.train("whole", *keys) == 0
    runs.assert_same("whole", "levels", ranks=True)
    sums = [row["link_bytes"] for row in runs.rows("levels")]
    finish(start("--nproc-per-node=4", *runs.arguments("flat", *keys)[1:]))
    assert sums == [row["link_bytes"] for row in runs.rows("flat")]
    # A continuation may sum in another way.
    again = runs.arguments("flat", *keys, "--resume", "--all_reduce=hierarchical")
    said = finish(start("--nproc-per-node=2", *again[1:]))
    assert "all-reduce flat: there is one node, or one rank on each\n" in said


def test_uneven_nodes_end_before_the_first_round(runs: Runs) -> None:
    agents = start_nodes((2, 1), *runs.arguments("uneven", "--all_reduce=hierarchical")[1:])
    said = "".join(finish(agent, 1) for agent in agents)
    (line,) = re.findall("fedkernels: error: (.+)", said)
    assert re.fullmatch(
        r"all_reduce: hierarchical needs as many ranks on every node, found ranks 2 on .+ \(node 0\), 1 on .+ "
        r"\(node 1\); start as many on each, or use all_reduce: flat",
        line,
    )
    assert not (runs / "uneven").exists()
