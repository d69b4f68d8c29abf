"""CUDA sources compiled by g++ and run on the CPU, and Newton–Schulz through the launcher that they export."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from fedkernels.kernels.newton_schulz import Orthogonalization
from fedkernels.kernels.newton_schulz.reference import schedule

TESTS = Path(__file__).parent
CUDA = TESTS.parent / "csrc" / "cuda"
SHARED_BYTES = {80: 166_912, 90: 232_448}  # what a block may have
# Fortified, glibc refuses to jump between stacks.
COMPILER = ["g++", "-O2", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", f"-I{CUDA}"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def compile_source(source: Path, folder: Path, *flags: str) -> ctypes.CDLL:
    library = folder / f"{source.stem}.so"
    command = [*COMPILER, *WARNINGS, "-x", "c++", "-std=c++17", *flags, str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def compile_operator(folder: Path, *flags: str) -> Path:
    """The operator: torch's binding, and the kernel on the emulator, for a device that `cuda_stubs` stands in for."""
    import triton

    stubs, library = TESTS / "cuda_stubs", folder / "operator.so"
    # Headers of CUDA itself come with Triton.
    headers = ["-I", str(stubs), "-I", str(Path(triton.__file__).parent / "backends" / "nvidia" / "include")]
    headers += [f"-isystem{path}" for path in include_paths()]
    sources = [CUDA.parent / "bindings" / "cuda" / "newton_schulz.cpp", stubs / "device.cpp", CUDA / "newton_schulz.cu"]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [*COMPILER, *WARNINGS, "-x", "c++", "-std=c++20", *headers, *flags, *map(str, sources), "-x", "none"]
    command += [*libraries, "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def run_operator(library: Path, us: Sequence[Tensor], shared_limit: int, folder: Path) -> list[Tensor]:
    """Its results of five steps, as the dispatcher gets them for tensors on a GPU.

    In a process of its own, since the extension may define an operator of this name.
    """
    program = """
import sys, torch
torch.ops.load_library(sys.argv[1])
operator, cuda = torch.ops.fedkernels.newton_schulz_cuda.default, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
torch.save(operator.redispatch(cuda, *torch.load(sys.argv[2])), sys.argv[2])
"""
    torch.save((list(us), *schedule("newton_schulz", 5)), folder / "tensors.pt")
    command = [sys.executable, "-c", program, str(library), str(folder / "tensors.pt")]
    subprocess.run(command, check=True, env=os.environ | {"FEDKERNELS_STUB_SHARED": str(shared_limit)})
    found: list[Tensor] = torch.load(folder / "tensors.pt")
    return found


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
