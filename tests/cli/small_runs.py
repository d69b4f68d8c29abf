"""Small digits runs through the command line, in this process or in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.torch import load_file
from torch import Tensor

from fedkernels.cli import main

CONFIG = {
    "algorithm": "scaffold",
    "model": {"name": "mlp", "hidden": [8]},
    "data": "digits",
    "partition": {"name": "dirichlet", "alpha": 0.5},
    "seed": 3,
    "rounds": 4,
    "clients": 8,
    "cohort": 4,
    "local_steps": 3,
    "batch_size": 8,
    "lr": 0.1,
    "schedule": "constant",
    "evaluator": "loop",
    "checkpoint_every": 2,
    "device": "cpu",
}
# Overrides for an algorithm with private wires.
PRIVATE = [
    "--sampling=poisson", "--on_nonfinite=drop_client", "--privacy.noise_multiplier=1", "--privacy.clip=0.5",
    "--privacy.delta=0.01", "--privacy.noise_seed=5",
]  # fmt: skip
# What a row says about the machine rather than about the training.
TIMED = {"time_s", "round_s", "clients_per_s", "rank_idle"}
TIMEOUT_S = 60


class Runs:
    """Runs of one small configuration, as folders by name below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self.write_config(CONFIG)
        self._processes: list[subprocess.Popen[str]] = []

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def write_config(self, config: Any) -> Path:
        """Write a configuration, or any text in its place."""
        path = self.folder / "config.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        return path

    def arguments(self, name: str, *overrides: str) -> list[str]:
        return ["train", "--config", str(self.config), "--run_dir", str(self / name), *overrides]

    def train(self, name: str, *overrides: str) -> int:
        """Train in this process; the exit status."""
        return main(self.arguments(name, *overrides))

    def start(self, name: str, *overrides: str, ranks: int = 1) -> list[subprocess.Popen[str]]:
        """Train in processes of their own, one per rank."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        started = []
        for rank in range(ranks):
            env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "RANK": str(rank)}
            started.append(self._start(self.arguments(name, *overrides), env if ranks > 1 else {}))
        return started

    def start_torchrun(self, name: str, *overrides: str) -> subprocess.Popen[str]:
        """Train on two ranks that torchrun starts."""
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fedkernels"]
        return self._start(self.arguments(name, *overrides), {}, launcher)

    def _start(
        self, arguments: list[str], env: dict[str, str], module: list[str] | None = None
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", *(module or ["fedkernels"]), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    def wait_for_rounds(self, name: str, rounds: int) -> None:
        """Return when the run has written that many rows."""
        path, deadline = self / name / "metrics.jsonl", time.monotonic() + TIMEOUT_S
        while not path.exists() or path.read_bytes().count(b"\n") < rounds:
            assert time.monotonic() < deadline, f"{name} did not reach round {rounds}"
            assert all(process.poll() is None for process in self._processes), f"{name} ended early"
            time.sleep(0.02)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self / name / "metrics.jsonl").read_text().splitlines()]

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self / name / "model.safetensors")

    def checkpoints(self, name: str) -> list[str]:
        """Everything in the run's folder of checkpoints, unfinished ones included."""
        return sorted(path.name for path in (self / name / "checkpoints").iterdir())

    def assert_same(self, one: str, other: str, *, ranks: bool = False) -> None:
        """Equal to the last bit in parameters and server state, and in every row but for time.

        Args:
            ranks: the two ran on different numbers of ranks, so that links and the sums of an evaluation differ.
        """
        for file in ("model.safetensors", f"checkpoints/{self.checkpoints(one)[-1]}/server.safetensors"):
            assert (self / one / file).read_bytes() == (self / other / file).read_bytes(), file
        untold = TIMED | ({"link_bytes", "test_loss", "train_loss"} if ranks else set())
        told = [[{k: v for k, v in row.items() if k not in untold} for row in self.rows(n)] for n in (one, other)]
        assert told[0] == told[1]
        for key, rtol in (("test_loss", 1e-6), ("train_loss", 1e-12)):
            a, b = (np.array([row[key] for row in self.rows(name)], dtype=float) for name in (one, other))
            np.testing.assert_allclose(a, b, rtol=rtol, atol=0, err_msg=key)

    def end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
