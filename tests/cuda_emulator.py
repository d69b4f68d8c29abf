"""CUDA sources compiled by g++ and run on the CPU, and Newton–Schulz through the launcher that they export."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedkernels.kernels.newton_schulz import Orthogonalization
from fedkernels.kernels.newton_schulz.reference import schedule

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
SHARED_BYTES = {80: 166_912, 90: 232_448}  # what a block may have


def compile_source(source: Path, folder: Path, *flags: str) -> ctypes.CDLL:
    library = folder / f"{source.stem}.so"
    # Fortified, glibc refuses to jump between stacks.
    command = ["g++", "-x", "c++", "-std=c++17", "-O2", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas",
               "-Wall", "-Wextra", "-Werror", f"-I{CUDA}", *flags, str(source), "-o", str(library)]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


class Batch(ctypes.Structure):
    """`Batch` of csrc/cuda/newton_schulz.h."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "inner", "short_side", "long_side")),
        *((f"in_{name}", ctypes.c_int64) for name in ("outer", "inner", "short", "long")),
        *((f"out_{name}", ctypes.c_int64) for name in ("outer", "inner", "short", "long")),
    )


class Plan(ctypes.Structure):
    """`Plan` of csrc/cuda/newton_schulz.h."""

    _fields_ = (
        ("cluster", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("clusters", ctypes.c_int64),
        ("workspace_floats", ctypes.c_int64),
    )


def batch_of(u: Tensor, o: Tensor) -> Batch:
    """Of `[outer, inner, rows, cols]`, with any strides."""
    outer, inner, rows, cols = u.shape

    def strides(t: Tensor) -> list[int]:
        return [t.stride(0), t.stride(1), *(t.stride()[2:] if rows <= cols else t.stride()[:1:-1])]

    sides = sorted((rows, cols))
    return Batch(u.data_ptr(), o.data_ptr(), outer * inner, inner, *sides, *strides(u), *strides(o))


class NewtonSchulz:
    """The emulated kernel."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.library = compile_source(CUDA / "newton_schulz.cu", folder, *flags)

    def plan(self, batches: Sequence[Batch], shared_limit: int, max_cluster: int) -> Plan:
        plan = Plan()
        table = (Batch * len(batches))(*batches)
        self.library.fedkernels_newton_schulz_plan(table, len(batches), shared_limit, max_cluster, ctypes.byref(plan))
        assert plan.shared_bytes <= shared_limit
        return plan

    def __call__(
        self,
        us: Sequence[Tensor],
        steps: int = 5,
        method: Orthogonalization = "newton_schulz",
        *,
        outs: Sequence[Tensor] | None = None,
        shared_limit: int = SHARED_BYTES[90],
        max_cluster: int = 8,
        order: int = 0,
    ) -> list[Tensor]:
        """Of batches `[outer, inner, rows, cols]`, float32, all of them in one launch."""
        outs = [torch.full(u.shape, torch.nan) for u in us] if outs is None else list(outs)
        batches = [batch_of(u, o) for u, o in zip(us, outs, strict=True)]
        plan = self.plan(batches, shared_limit, max_cluster)
        workspace = torch.full((plan.workspace_floats,), torch.nan)
        coefficients, margin = schedule(method, steps)
        self.library.fedkernels_emulator_order(order)
        error = self.library.fedkernels_newton_schulz(
            (Batch * len(batches))(*batches), len(batches), (ctypes.c_float * len(coefficients))(*coefficients), steps,
            ctypes.c_float(margin), shared_limit, max_cluster, ctypes.c_void_p(workspace.data_ptr()), None,
        )  # fmt: skip
        assert error == 0
        return outs
