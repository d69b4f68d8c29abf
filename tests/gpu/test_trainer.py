"""Whole runs on one GPU: NCCL at world size 1, the numbers of a CPU and of the references, batched clients, resume."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedkernels.config import load
from fedkernels.federated.collectives import Collectives
from fedkernels.train import build

ROOT = Path(__file__).parents[2]
ALGORITHMS = ["fedavg", "scaffold", "fedadamw", "fedmuon", "fednsam", "fedpac", "fedbcgd", "dp_fedavg"]


def launch(run_dir: Path, *options: str, config: str = "fedmuon") -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "fedkernels",
        "train", "--config", str(ROOT / f"configs/digits/{config}.yaml"), "--run_dir", str(run_dir),
        "--device", "cuda", *options,
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]


def digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "model.safetensors").read_bytes()).hexdigest()


def losses(name: str, device: str, precision: str = "fp32", **options: object) -> list[float]:
    overrides = {"run_dir": "unused", "device": device, "precision": precision, "rounds": 4, **options}
    engine, _, _ = build(load(ROOT / f"configs/digits/{name}.yaml", overrides), Collectives())
    return [float(engine.run_round()["train_loss"] or 0) for _ in range(4)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_nccl_trains(name: str, tmp_path: Path) -> None:
    launch(tmp_path / "run", "--rounds", "2", config=name)
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["fedavg", "fedadamw", "fedmuon", "fednsam"])
@pytest.mark.parametrize("evaluator", ["loop", "batched"])
def test_follows_the_cpu(name: str, evaluator: str) -> None:
    """The first rounds, before rounding has grown: convolutions may take TF32 unless told otherwise."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    on_cpu, on_gpu = (losses(name, device, evaluator=evaluator) for device in ("cpu", "cuda"))
    assert on_gpu == pytest.approx(on_cpu, rel=5e-3)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_kernels_follow_the_reference(name: str) -> None:
    reference, triton = (losses(name, "cuda", kernels=kernels) for kernels in ("reference", "triton"))
    assert triton == pytest.approx(reference, rel=5e-3)


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    """A run that lost its last two rounds: of a model without convolutions, whose gradients may be atomic sums."""
    often = ["--model", "mlp", "--rounds", "4", "--checkpoint_every", "1", "--keep_checkpoints", "4"]
    launch(tmp_path / "run", *often)
    expected = digest(tmp_path / "run")
    for newest in sorted((tmp_path / "run" / "checkpoints").iterdir())[-2:]:
        shutil.rmtree(newest)
    (tmp_path / "run" / "model.safetensors").unlink()
    launch(tmp_path / "run", *often, "--resume")
    assert digest(tmp_path / "run") == expected


@pytest.mark.parametrize("name", ["scaffold", "fedadamw", "fedbcgd"])
def test_uploads_taken_in_meanwhile_are_the_same(name: str) -> None:
    """Clients of the loop, one at a time, so that every round has several uploads."""
    one_by_one = {"model": "mlp", "evaluator": "loop", "clients_per_batch": 1, "codec": "int8"}
    plain, overlapped = (losses(name, "cuda", overlap=overlap, **one_by_one) for overlap in ("never", "always"))
    assert overlapped == plain


def test_bf16_learns() -> None:
    curve = losses("fedmuon", "cuda", "bf16")
    assert curve[-1] < curve[0]
