"""Jobs of several ranks that faults happen to: real processes, forked from one that has imported everything, or started
by agents of torchrun; and what they print, when."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from fedkernels.federated.schedule import place, sample_cohort

Record = Callable[[str, Any], None]  # of a property of a test: rows of the fault matrix
CONFIG: dict[str, Any] = {
    "algorithm": "scaffold",
    "model": {"name": "mlp", "hidden": [8]},
    "data": "digits",
    "partition": {"name": "dirichlet", "alpha": 0.5},
    "seed": 3,
    "rounds": 6,
    "clients": 8,
    "cohort": 4,
    "local_steps": 2,
    "batch_size": 8,
    "lr": 0.1,
    "schedule": "constant",
    "evaluator": "loop",
    "clients_per_batch": 1,
    "eval_every": 3,
    "checkpoint_every": 1,
    "device": "cpu",
    "timeout_s": 120,
}
TESTS = Path(__file__).parents[1]
LIMIT_S = 120
ERROR = "fedkernels: error: "


class Output:
    """Lines of files that grow, each with the number of its file and the time at which it was first seen."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._offsets = [0] * len(files)
        self.lines: list[tuple[float, int, str]] = []

    def read(self) -> None:
        """Take in what has been written since; a line waits until it is complete."""
        for n, file in enumerate(self._files):
            if file.exists() and file.stat().st_size > self._offsets[n]:
                new, end, _ = file.read_bytes()[self._offsets[n] :].rpartition(b"\n")
                self._offsets[n] += len(new) + len(end)
                self.lines += [(time.time(), n, line) for line in new.decode().splitlines()]

    def first(self, pattern: str) -> tuple[float, int, re.Match[str]]:
        """When, where and what was the first line that is as a whole of this pattern."""
        for at, n, line in self.lines:
            if found := re.fullmatch(pattern, line):
                return at, n, found
        raise AssertionError(f"no line {pattern!r} in\n{self.text()}")

    def text(self) -> str:
        return "\n".join(line for _, _, line in self.lines)

    def errors(self) -> list[str]:
        return [line.removeprefix(ERROR) for _, _, line in self.lines if line.startswith(ERROR)]


class Job:
    """Ranks of one run, started together.

    Args:
        folder: of the run and of what its ranks print.
        fault: in the words of `fedkernels.faults.parse`.
        overrides: arguments of `fedkernels train`.
        absent: ranks that are not started.
        silent_s: how long a rank may be silent, in place of `watch.SILENT_S`.
    """

    def __init__(
        self,
        folder: Path,
        ranks: int,
        *overrides: str,
        fault: str = "",
        absent: tuple[int, ...] = (),
        silent_s: float | None = None,
    ) -> None:
        self.folder = folder
        config = folder.parent / f"{folder.name}.yaml"
        config.write_text(yaml.safe_dump(CONFIG))
        arguments = ["train", "--config", str(config), "--run_dir", str(folder), *overrides]
        env = {"FEDKERNELS_FAULT": fault, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["faults.preload"])
        self.ended_at: dict[int, float] = {}
        self.ranks: dict[int, BaseProcess] = {}
        # Of this job: a folder may have several.
        self.name = f"{folder.name}-{time.monotonic_ns()}"
        files = [folder.parent / f"{self.name}.{rank}" for rank in range(ranks)]
        self.said = Output(files)
        self.started_at = time.time()
        for rank in set(range(ranks)) - set(absent):
            mine = env | {"RANK": str(rank)}
            process = context.Process(target=run_rank, args=(arguments, mine, files[rank], silent_s))
            process.start()
            self.ranks[rank] = process

    def wait(self, limit_s: float = LIMIT_S, but: tuple[int, ...] = ()) -> dict[int, int | None]:
        """Exit statuses once all ranks have ended, except some that are killed then."""
        deadline = time.monotonic() + limit_s
        while waiting := [r for r, p in self.ranks.items() if p.is_alive() and r not in but]:
            assert time.monotonic() < deadline, f"ranks {waiting} did not end in {limit_s} s:\n{self.said.text()}"
            time.sleep(0.02)
            self._look()
        self._look()
        self.kill()
        return {rank: process.exitcode for rank, process in self.ranks.items()}

    def _look(self) -> None:
        self.said.read()
        for rank, process in self.ranks.items():
            if not process.is_alive():
                self.ended_at.setdefault(rank, time.time())

    def kill(self) -> None:
        for process in self.ranks.values():
            if process.is_alive():
                process.kill()
            process.join()

    def fired_at(self, n: int = 0) -> float:
        """When fault number n happened."""
        return fired_at(self.folder, n)

    def rows(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Agents:
    """torchrun's agents of one run, on this machine as on nodes of their own, that start their ranks again on failure.

    Args:
        folder: of the run and of what it prints.
        fault: in the words of `fedkernels.faults.parse`.
    """

    def __init__(self, folder: Path, nodes: int, ranks: int, *, fault: str) -> None:
        config = folder.parent / f"{folder.name}.yaml"
        config.write_text(yaml.safe_dump(CONFIG))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
        files = [folder.parent / f"{folder.name}.{node}" for node in range(nodes)]
        self.said = Output(files)
        self._agents = []
        for node, file in enumerate(files):
            command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks}"]
            command += ["--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=job"]
            command += ["--local-addr=127.0.0.1", f"--rdzv-conf=is_host={int(node == 0)}", "-m", "fedkernels", "train"]
            with file.open("wb") as out:
                agent = subprocess.Popen(
                    [*command, f"--config={config}", f"--run_dir={folder}"],
                    env=os.environ | {"FEDKERNELS_FAULT": fault, "OMP_NUM_THREADS": "1", "LOGLEVEL": "INFO"},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            self._agents.append(agent)

    def wait(self, limit_s: float = 2 * LIMIT_S) -> list[int]:
        """Exit statuses once all agents have ended."""
        deadline = time.monotonic() + limit_s
        try:
            while any(agent.poll() is None for agent in self._agents):
                assert time.monotonic() < deadline, f"agents did not end in {limit_s} s:\n{self.said.text()}"
                time.sleep(0.02)
                self.said.read()
        finally:
            for agent in self._agents:
                agent.terminate()  # and with it its ranks
        self.said.read()
        return [agent.wait() for agent in self._agents]


def fired_at(folder: Path, n: int = 0) -> float:
    """When fault number n of a run happened."""
    return float((folder / f".fault-{n}").read_text())


def digest(folder: Path) -> str:
    """Of the final parameters and of the server state."""
    newest = max((folder / "checkpoints").glob("round-*"))
    files = (folder / "model.safetensors", *sorted(newest.glob("server*")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def placed_on(rank: int, round: int, ranks: int) -> list[int]:
    """Whom a rank trains in a round, in order, by the equations of cohorts and placement; clients cost the same."""
    seed, clients, cohort = (CONFIG[key] for key in ("seed", "clients", "cohort"))
    owners: dict[int, int] = {}
    for r in range(round):
        ids = sample_cohort("uniform", seed, r, clients, cohort).tolist()
        placed = place(ids, [1.0] * cohort, owners, [1.0] * ranks)
        owners |= {ids[position]: rank for rank, positions in enumerate(placed) for position in positions}
    return [ids[position] for position in placed[rank]]


def run_rank(arguments: list[str], env: dict[str, str], said: Path, silent_s: float | None) -> None:
    """One rank's process."""
    os.environ.update(env)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    import fedkernels.report
    from fedkernels.cli import main
    from fedkernels.federated import watch

    if silent_s is not None:
        watch.SILENT_S = silent_s
    # The drawing takes longer than these runs.
    fedkernels.report.write_report = lambda run_dirs, out: out
    sys.exit(main(arguments))
