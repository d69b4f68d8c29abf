"""Which backend runs an op, and why: `cuda` and `triton` on GPUs, `cpp` on CPUs, `reference` everywhere."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

Backend = Literal["cuda", "triton", "cpp", "reference"]
KernelsName = Literal["auto", "reference", "cpp", "triton"]
BACKENDS: tuple[Backend, ...] = ("cuda", "triton", "cpp", "reference")  # in order of preference

# Every environment variable that the kernels read.
VARIABLES = {
    "FEDKERNELS_BACKEND": "reference, cpp, triton or cuda: every op runs on it, or raises where it cannot",
    "FEDKERNELS_AMX": "1: newton_schulz and muon_step multiply float32 in AMX tiles of bfloat16 on the CPU, within 1 % "
    "in half the time, or raise where there are none; emulated: the same bits without them, slowly, to test it",
    "TRITON_INTERPRET": "1 runs Triton kernels on CPU tensors, slowly, to test them; read when fedkernels is imported",
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# What the extension defines: one that was built before the newest of these is refused as a whole.
COMPILED = (
    "accumulate", "encode_bf16", "encode_int8", "exact_add", "exact_value", "fused_adamw", "fused_sam", "fused_sgd",
    "muon_step", "newton_schulz", "row_norm", "square_sums",
)  # fmt: skip


def _load_extension() -> str | None:
    """Load the compiled C++ kernels; why they are not there, or None."""
    folder = Path(__file__).resolve().parent.parent
    found = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_C{suffix}").is_file()]
    if not found:
        return "extension not built: install with a C++ compiler and torch present, by pip install --no-build-isolation"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"extension does not load, reinstall to build it for torch {torch.__version__}: {error}"
    if absent := [op for op in COMPILED if not hasattr(torch.ops.fedkernels, f"{op}_cpp")]:
        return f"extension is older than this package, reinstall to build it again: it lacks {', '.join(absent)}"
    return None


def _find_cuda() -> str | None:
    """Why the kernels in CUDA C++ are not there, or None; they are part of the extension."""
    if MISSING["cpp"] is not None:
        return MISSING["cpp"]
    if not hasattr(torch.ops.fedkernels, "newton_schulz_cuda"):
        return "extension built without CUDA: install with nvcc and a CUDA build of torch present"
    return None


# Why a backend cannot run here at all, whatever the op; None where it can.
MISSING: dict[Backend, str | None] = {
    "triton": None if importlib.util.find_spec("triton") else "triton is not installed",
    "cpp": _load_extension(),
    "reference": None,
}
MISSING["cuda"] = _find_cuda()


class BackendError(RuntimeError):
    """A backend was asked for that cannot run an op here."""


@dataclass(frozen=True)
class Choice:
    """The backend that runs an op, why, and why those preferred to it do not."""

    backend: Backend
    why: str
    refused: Mapping[Backend, str]


@dataclass
class Kernels:
    """What the ops of one run are asked to run on, and what they ran on.

    Args:
        backend: of every op, `auto` for the fastest that can run. FEDKERNELS_BACKEND is stronger, and a backend that a
            call names stronger still.
        chosen: by op, the choice of its last call.

    Example:
        >>> kernels = Kernels("reference")
        >>> with kernels.use():
        ...     choose("fused_sgd", ON_ROWS, "cpu", torch.float32, (2, 10)).backend
        'reference'
        >>> kernels.summary()
        'kernels reference: fused_sgd on reference (asked for by kernels)'
    """

    backend: KernelsName = "auto"
    chosen: dict[str, Choice] = field(default_factory=dict)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Ops that are called inside belong to the run."""
        _RUNS.append(self)
        try:
            yield
        finally:
            _RUNS.pop()

    def check(self, device: str, dtype: torch.dtype, d: int, further: Mapping[str, Mapping[Backend, Rule]]) -> None:
        """Look whether the steps over flat rows, which every run takes, can run as asked.

        Args:
            further: rules of other ops over flat rows that the run needs, by op.

        Raises:
            ValueError, BackendError: as `choose`.
        """
        with Kernels(self.backend).use():
            for op, rules in {"fused_sgd": ON_ROWS, **further}.items():
                choose(op, rules, device, dtype, (1, d))

    def summary(self) -> str:
        """Which backend each op ran on, and why."""
        ran = (f"{op} on {choice.backend} ({choice.why})" for op, choice in sorted(self.chosen.items()))
        return f"kernels {self.backend}: {', '.join(ran) or 'none ran'}"


# Innermost last. A list, because torch.compile traces no context variable; runs of several threads would mix.
_RUNS: list[Kernels] = []


class Rule(Protocol):
    """Why a backend that is here cannot, or should not, run an op on such tensors; None where it should."""

    def __call__(self, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None: ...


def triton_on_rows(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """The limits of Triton kernels over flat rows `[C, d]`."""
    if device != ("cpu" if INTERPRETED else "cuda"):
        return f"runs on {'cpu tensors under TRITON_INTERPRET=1' if INTERPRETED else 'cuda'}, not on {device}"
    return None if dtype == torch.float32 else f"computes in float32, not in {_name(dtype)}"


def cpp_on_rows(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """The limits of C++ kernels over flat rows `[C, d]`."""
    if device != "cpu":
        return f"runs on cpu, not on {device}"
    known = dtype in (torch.float32, torch.float64)
    return None if known else f"computes in float32 and float64, not in {_name(dtype)}"


ON_ROWS: dict[Backend, Rule] = {"triton": triton_on_rows, "cpp": cpp_on_rows}


def choose(
    op: str,
    rules: Mapping[Backend, Rule],
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    backend: str | None = None,
) -> Choice:
    """Settle which backend runs an op.

    Args:
        rules: of the backends the op has besides its reference.
        device: type of the device, such as `cuda`.
        dtype: what is computed in, that of the parameters.
        shape: of the main argument.
        backend: run this one, as FEDKERNELS_BACKEND does for every op and `Kernels` for those of a run.

    Raises:
        ValueError: a backend of this name does not exist.
        BackendError: the backend asked for cannot run this op here.

    Example:
        >>> choose("fused_adamw", ON_ROWS, "meta", torch.float32, (2, 10)).backend
        'reference'
    """
    run = _RUNS[-1] if _RUNS else None
    choice = _choose(op, rules, device, dtype, shape, backend, run)
    if run is not None:
        run.chosen[op] = choice
    return choice


def _choose(
    op: str,
    rules: Mapping[Backend, Rule],
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    backend: str | None,
    run: Kernels | None,
) -> Choice:
    of_run = None if run is None or run.backend == "auto" else run.backend
    wishes = {"backend": backend, "FEDKERNELS_BACKEND": os.environ.get("FEDKERNELS_BACKEND"), "kernels": of_run}
    for by, asked in wishes.items():
        if not asked:
            continue
        named = next((known for known in BACKENDS if known == asked), None)
        if named is None:
            raise ValueError(f"{by}={asked}: unknown backend, expected one of {', '.join(BACKENDS)}")
        if (reason := _refusal(named, rules, device, dtype, shape)) is not None:
            raise BackendError(f"{by}={asked} cannot run {op}: {reason}")
        return Choice(named, f"asked for by {by}", {})
    refused: dict[Backend, str] = {}
    for candidate in BACKENDS:
        if candidate != "reference" and candidate not in rules:
            continue
        if (reason := _refusal(candidate, rules, device, dtype, shape)) is None:
            why = "no other can" if candidate == "reference" else f"the fastest on {device}"
            return Choice(candidate, why, refused)
        refused[candidate] = reason
    raise AssertionError("the reference runs everywhere")


def _refusal(
    backend: Backend, rules: Mapping[Backend, Rule], device: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> str | None:
    if backend == "reference":
        return None
    if backend not in rules:
        return "not written for this op"
    if (reason := MISSING[backend]) is not None:
        return reason
    return rules[backend](device, dtype, shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require(name: str, tensor: Tensor | None, like: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Check one argument of a kernel, which would read and write out of bounds otherwise.

    Raises:
        ValueError: it is on another device than `like`, not contiguous, or not of that shape and one of the dtypes.
    """
    if tensor is None:
        return
    _require(name, tensor, like, shape, dtypes)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: strides {list(tensor.stride())} of shape {list(shape)}")


def require_rows(
    name: str, tensor: Tensor | None, like: Tensor, shape: tuple[int, int], *dtypes: torch.dtype, written: bool = False
) -> None:
    """Check one argument `[C, d]` of a kernel over rows: each is contiguous, wherever the next one begins.

    Args:
        written: whether the kernel writes to it, so that rows may not share memory.

    Raises:
        ValueError: it is on another device than `like`, not of that shape and one of the dtypes, or has rows that are
            not contiguous, or that overlap and are written to.
    """
    if tensor is None:
        return
    _require(name, tensor, like, shape, dtypes)
    (clients, d), (step, within) = shape, tensor.stride()
    if d > 1 and within != 1:
        raise ValueError(f"{name} has rows that are not contiguous: strides [{step}, {within}] of shape {list(shape)}")
    if written and clients > 1 and step < d:
        raise ValueError(f"{name} has rows that overlap: strides [{step}, {within}] of shape {list(shape)}")


def _require(name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if dtypes and tensor.dtype not in dtypes:
        expected = " or ".join(_name(dtype) for dtype in dtypes)
        raise ValueError(f"{name} is {_name(tensor.dtype)}, expected {expected}")


def require_apart(name: str, tensor: Tensor | None, other_name: str, other: Tensor | None) -> None:
    """Check that rows `[C, d]` which a kernel writes share no memory with others that it reads or writes.

    Raises:
        ValueError: a row of one and a row of the other overlap.
    """
    # What is being compiled has no addresses yet.
    if tensor is None or other is None or torch.compiler.is_compiling():
        return
    (begins, size), (other_begins, other_size) = _row_addresses(tensor), _row_addresses(other)
    if begins[-1] + size <= other_begins[0] or other_begins[-1] + other_size <= begins[0]:
        return
    if any(a < b + other_size and b < a + size for a in begins for b in other_begins):
        raise ValueError(f"{name} shares memory with {other_name}, expected memory of its own")


def _row_addresses(rows: Tensor) -> tuple[range, int]:
    """Where the rows of `[C, d]` or `[d]` begin, in ascending order, and the bytes of one."""
    clients, d = (1, *rows.shape)[-2:]
    step = rows.stride(0) * rows.element_size() if clients > 1 else 0
    begin = rows.data_ptr()
    return range(begin, begin + clients * step, step) if step else range(begin, begin + 1), d * rows.element_size()


def require_scalars(name: str, tensor: Tensor | None, like: Tensor, clients: int) -> None:
    """Check a scalar of an op, which is a tensor on the device so that graphs replay with its current value.

    Raises:
        ValueError: it is on another device than `like`, or holds neither one value nor one for each client.
    """
    if tensor is None:
        return
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device}")
    if tensor.numel() not in (1, clients) or not tensor.is_contiguous():
        expected = f"one value or one for each of {clients} clients"
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {expected}")
