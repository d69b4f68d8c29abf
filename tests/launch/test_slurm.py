"""The batch file that is shipped, on a real SLURM cluster of two nodes: requeued, it ends as if nothing was."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from cli.small_runs import Runs
from launch.machine import ROOT
from launch.slurm import ENDED, Cluster

pytestmark = pytest.mark.cluster

# Without a checkpoint but the one that a signal asks for.
LONG = ["--rounds", "100", "--checkpoint_every", "100000"]
# A run waits in this round, once, so that it cannot end before something happens to it.
HELD = 30
HOLD = {"FEDKERNELS_FAULT": f"slow rank=0 round={HELD} stage=train seconds=20"}


def submit(
    cluster: Cluster,
    runs: Runs,
    options: Sequence[str],
    arguments: Sequence[str],
    env: Mapping[str, str] | None = None,
) -> str:
    own = ["--output", str(runs / "%x-%j.out"), "--job-name", "test", "--time", "10"]
    return cluster.submit(*own, *options, "launch/slurm.sbatch", *arguments, cwd=ROOT, env=env)


def output(runs: Runs, job: str) -> str:
    return (runs / f"test-{job}.out").read_text()


def launches(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "launches.jsonl").read_text().splitlines()]


def finish(cluster: Cluster, runs: Runs, job: str) -> str:
    """Wait for the end of a job that must not fail; what it printed."""
    state = cluster.wait_for(job)
    assert state == "COMPLETED", output(runs, job)
    return output(runs, job)


def test_a_stopped_job_is_queued_again_and_ends_as_if_nothing_had_happened(cluster: Cluster, runs: Runs) -> None:
    job = submit(cluster, runs, ["--nodes=2"], runs.arguments("stopped", *LONG)[1:], HOLD)
    runs.wait_for_rounds("stopped", HELD - 1)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert runs.train("whole", *LONG) == 0
    said = finish(cluster, runs, job)
    assert cluster.fields(job)["Restarts"] == "1"
    assert re.findall(r"stopped by SIGUSR1 after round (\d+); continue", said) == [str(HELD)]
    assert f"job {job}: stopped on request, queued again\n" in said
    assert f"\nresumed after round {HELD} of 100\n2 ranks on cpu" in said
    runs.assert_same("whole", "stopped", ranks=True)
    (launch,) = launches(runs / "stopped")
    assert launch["job"] == f"slurm-{job}"


def test_a_job_that_loses_a_node_goes_on_from_its_newest_checkpoint(cluster: Cluster, runs: Runs) -> None:
    keys = ["--rounds", "100", "--checkpoint_every", "7"]
    job = submit(cluster, runs, ["--nodes=2"], runs.arguments("lost", *keys)[1:], HOLD)
    runs.wait_for_rounds("lost", HELD - 1)
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert runs.train("whole", *keys) == 0
    said = finish(cluster, runs, job)
    assert cluster.fields(job)["Restarts"] == "1"
    assert re.search(r"\nresumed after round \d+ of 100\n2 ranks on cpu", said)
    runs.assert_same("whole", "lost", ranks=True)


def test_a_job_that_is_stopped_before_it_starts_ranks_is_queued_again(cluster: Cluster, runs: Runs) -> None:
    program, looked = runs / "bin" / "scontrol", runs / "looked"
    program.parent.mkdir()
    first = f"[ -e {looked} ] || {{ touch {looked}; sleep 5; }}"
    program.write_text(f'#!/bin/sh\n{first}\nexec {shutil.which("scontrol")} "$@"\n')
    program.chmod(0o755)
    path = {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    job = submit(cluster, runs, ["--nodes=1"], runs.arguments("early", "--rounds", "2")[1:], path)
    while not looked.exists():
        assert cluster.fields(job)["JobState"] not in ENDED, output(runs, job)
        time.sleep(0.02)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    said = finish(cluster, runs, job)
    assert cluster.fields(job)["Restarts"] == "1"
    assert said.count("\n1 rank on cpu") == 1
    assert said.index(f"job {job}: stopped on request, queued again\n") < said.index("\n1 rank on cpu")


def test_a_run_that_fails_while_it_stops_is_not_queued_again(cluster: Cluster, runs: Runs) -> None:
    fault = HOLD["FEDKERNELS_FAULT"] + f"; raise rank=0 round={HELD} stage=reduce"
    job = submit(cluster, runs, ["--nodes=1"], runs.arguments("bad", *LONG)[1:], {"FEDKERNELS_FAULT": fault})
    runs.wait_for_rounds("bad", HELD - 1)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert cluster.wait_for(job) == "FAILED"
    assert cluster.fields(job)["Restarts"] == "0"
    assert f"injected in 'reduce' of round {HELD}" in output(runs, job)


def test_an_array_of_seeds_of_which_one_is_stopped_and_one_submitted_again(cluster: Cluster, runs: Runs) -> None:
    array = submit(cluster, runs, ["--nodes=1", "--array=4-5"], runs.arguments("seeds", *LONG)[1:], HOLD)
    for seed in (4, 5):
        runs.wait_for_rounds(f"seeds/seed-{seed}", HELD - 1)
    jobs = {seed: cluster.fields(f"{array}_{seed}")["JobId"] for seed in (4, 5)}
    # The task that shares its number with the array: what is done to it must not be done to all.
    stopped = next(seed for seed, job in jobs.items() if job == array)
    cluster.run("scancel", "--signal=USR1", "--batch", f"{array}_{stopped}")
    for seed, job in jobs.items():
        assert runs.train(f"whole-{seed}", *LONG, "--seed", str(seed)) == 0
        assert cluster.wait_for(f"{array}_{seed}") == "COMPLETED"
        assert cluster.fields(f"{array}_{seed}")["Restarts"] == str(int(seed == stopped))
        said = output(runs, job)
        assert f"job {array}_{seed}, attempt 1: 1 x 1 ranks on n" in said
        assert f", rendezvous at 127.0.0.1:{10000 + int(job) % 20000}\n" in said
        assert launches(runs / "seeds" / f"seed-{seed}")[0]["job"] == f"slurm-{job}"
        runs.assert_same(f"whole-{seed}", f"seeds/seed-{seed}")
    assert (runs / "whole-4/model.safetensors").read_bytes() != (runs / "whole-5/model.safetensors").read_bytes()
    script = runs / "seeds" / "seed-5" / "resubmit.sh"
    out = f"SBATCH_OUTPUT={runs / 'again.out'}"
    said = cluster.run("env", out, "bash", str(script), "--run_dir", str(runs / "again"), cwd=runs.folder)
    job = said.removeprefix("Submitted batch job ").strip()
    assert cluster.wait_for(job) == "COMPLETED"
    runs.assert_same("whole-5", "again")


# Fields of a job that say what it asked for.
ASKED = (
    "NumNodes", "CPUs/Task", "TresPerNode", "TresPerJob", "CpusPerTres", "MinMemoryNode", "MinMemoryCPU", "MemPerTres",
    "MinTmpDiskNode", "Features", "ReqNodeList", "ExcNodeList", "Reservation", "Licenses", "OverSubscribe", "TimeLimit",
    "Partition",
)  # fmt: skip


def asked(cluster: Cluster, job: str) -> dict[str, str]:
    fields = cluster.fields(job)
    return {key: value for key in ASKED if (value := fields.get(key, "(null)")) != "(null)"}


def submit_again(cluster: Cluster, runs: Runs, run: str) -> str:
    """By the script in a run folder; the job."""
    output = f"SBATCH_OUTPUT={runs / 'test-%j.out'}"
    said = cluster.run("env", output, "bash", str(runs / run / "resubmit.sh"), cwd=runs.folder)
    return said.removeprefix("Submitted batch job ").strip()


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (
            "--nodes=1 --mem=300 '--constraint=fast&local' --exclude=n2 --gres=disk:2,gpu:1 --tmp=5 --licenses=seat:1",
            {"MinMemoryNode": "300M", "Features": "fast&local", "ExcNodeList": "n2", "Licenses": "seat:1"},
        ),
        (
            # With text that looks like fields.
            "--nodes=2 --mem-per-cpu=100 --nodelist=n1,n2 --gpus-per-node=1 --gres=disk:1 --exclusive --cpus-per-task=2"
            " '--comment=x Features=slow ExcNodeList=n1' --nproc-per-node=1",
            {"MinMemoryCPU": "100M", "ReqNodeList": "n[1-2]", "OverSubscribe": "NO", "CPUs/Task": "2"},
        ),
        ("--nodes=1 --gpus=1 --mem=0 --reservation=kept", {"Reservation": "kept", "MinMemoryNode": "0"}),
        ("--nodes=1 --gpus=1 --mem-per-gpu=100 --cpus-per-gpu=1", {"MemPerTres": "gres:gpu:100"}),
        ("--nodes=1 --array=7 --mem=250 --exclude=n1", {"MinMemoryNode": "250M", "ExcNodeList": "n1"}),
    ],
)
def test_a_job_is_submitted_again_with_all_that_it_asked_for(
    cluster: Cluster, runs: Runs, options: str, fields: dict[str, str]
) -> None:
    words = shlex.split(options)
    own = [word for word in words if word.startswith("--nproc")]
    reserve = ["ReservationName=kept", "Users=root", "StartTime=now", "Duration=5", "NodeCnt=1"]
    if "--reservation=kept" in options:
        cluster.run("scontrol", "create", *reserve)
    try:
        arguments = [*runs.arguments("a", "--rounds", "1")[1:], *own]
        job = submit(cluster, runs, [word for word in words if word not in own], arguments)
        assert cluster.wait_for(job) == "COMPLETED"
        first = asked(cluster, job)
        assert fields.items() <= first.items()
        again = submit_again(cluster, runs, "a/seed-7" if "--array=7" in options else "a")
        assert cluster.wait_for(again) == "COMPLETED"
        assert asked(cluster, again) == first
    finally:
        if "--reservation=kept" in options:
            cluster.run("scancel", "--user=root")
            cluster.run("scontrol", "delete", reserve[0])
    assert "ArrayTaskId" not in cluster.fields(again)
    assert "resumed after round 1 of 1" in output(runs, again)


@pytest.mark.parametrize(
    ("options", "arguments", "said"),
    [
        ([], ["--nnodes", "3"], "error: --nnodes: comes from the allocation"),
        ([], [], "error: nothing to train; give --config FILE"),
        ([], ["--nproc-per-node"], "error: --nproc-per-node: expected a value after it"),
        (["--array=4"], ["--seed=3", "--run_dir=a", "--lr=1"], "error: --seed: 3, expected none: tasks of an array"),
        (["--array=4"], ["--lr", "1"], "error: --run_dir: missing; an array needs a folder"),
        (["--chdir=/"], ["--lr", "1"], "error: no launch/environment.sh in /; submit from"),
    ],
)
def test_a_job_that_cannot_start_says_why_and_is_not_queued_again(
    cluster: Cluster, runs: Runs, options: list[str], arguments: list[str], said: str
) -> None:
    job = submit(cluster, runs, options, arguments)
    assert cluster.wait_for(job) == "FAILED"
    fields = cluster.fields(job)
    assert (fields["ExitCode"], fields["Restarts"]) == ("2:0", "0")
    assert said in output(runs, fields["JobId"])


def test_a_run_that_fails_is_not_queued_again(cluster: Cluster, runs: Runs) -> None:
    arguments = [*runs.arguments("bad", "--cohrt", "3")[1:], "--max-restarts", "0"]
    job = submit(cluster, runs, ["--nodes=1"], arguments)
    assert cluster.wait_for(job) == "FAILED"
    assert cluster.fields(job)["Restarts"] == "0"
    assert "fedkernels: error: cohrt: unknown key; did you mean 'cohort'?" in output(runs, job)
