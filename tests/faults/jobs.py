"""Jobs of several ranks that faults happen to: real processes, forked from one that has imported everything."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

CONFIG = {
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
        self._errors = {rank: folder.parent / f"{folder.name}.{rank}.err" for rank in range(ranks)}
        for rank in set(range(ranks)) - set(absent):
            mine = env | {"RANK": str(rank)}
            process = context.Process(target=run_rank, args=(arguments, mine, self._errors[rank], silent_s))
            process.start()
            self.ranks[rank] = process

    def wait(self, limit_s: float = LIMIT_S, but: tuple[int, ...] = ()) -> dict[int, int | None]:
        """Exit statuses once all ranks have ended, except some that are killed then."""
        deadline = time.monotonic() + limit_s
        while waiting := [r for r, p in self.ranks.items() if p.is_alive() and r not in but]:
            assert time.monotonic() < deadline, f"ranks {waiting} did not end in {limit_s} s:\n{self.said()}"
            time.sleep(0.02)
            self._note_ends()
        self._note_ends()
        self.kill()
        return {rank: process.exitcode for rank, process in self.ranks.items()}

    def _note_ends(self) -> None:
        for rank, process in self.ranks.items():
            if not process.is_alive():
                self.ended_at.setdefault(rank, time.time())

    def kill(self) -> None:
        for process in self.ranks.values():
            if process.is_alive():
                process.kill()
            process.join()

    def said(self) -> str:
        """What all ranks printed to standard error."""
        return "".join(path.read_text() for path in self._errors.values() if path.exists())

    def errors(self) -> list[str]:
        start = "fedkernels: error: "
        return [line.removeprefix(start) for line in self.said().splitlines() if line.startswith(start)]

    def fired_at(self, n: int = 0) -> float | None:
        """When fault number n happened, if it did."""
        mark = self.folder / f".fault-{n}"
        return float(mark.read_text()) if mark.exists() else None

    def rows(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def notes(self) -> str:
        return (self.folder.parent / f"{self.folder.name}.0.out").read_text()


def digest(folder: Path) -> str:
    """Of the final parameters and of the server state."""
    newest = max((folder / "checkpoints").glob("round-*"))
    files = (folder / "model.safetensors", newest / "server.safetensors")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def run_rank(arguments: list[str], env: dict[str, str], errors: Path, silent_s: float | None) -> None:
    """One rank's process."""
    os.environ.update(env)
    for stream, path in ((1, errors.with_suffix(".out")), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    import fedkernels.report
    from fedkernels.cli import main
    from fedkernels.federated import watch

    if silent_s is not None:
        watch.SILENT_S = silent_s
    # The drawing takes longer than these runs.
    fedkernels.report.write_report = lambda run_dirs, out: out
    sys.exit(main(arguments))
