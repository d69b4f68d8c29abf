"""Newton–Schulz of all hidden matrices of a model against what PyTorch and other libraries offer.

Before anything is timed each variant orthogonalises matrices of four spectra, which are compared with the polynomial of
their singular values in float64.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from shapes import Workload
from torch import Tensor
from torch.optim import _muon
from turns import Job, Variant, graphed

from fedkernels.kernels.dispatch import MISSING
from fedkernels.kernels.newton_schulz import QUINTIC, newton_schulz_all, rules_of

OPS = ("newton_schulz",)
A, B, C = QUINTIC
STEPS, EPS = 5, 1e-7
SPECTRA = ("gaussian", "log3", "log7", "rank16")
LONGEST = (256, 1024)  # short and long side of the matrices of four spectra, at most
PEAK_BYTES = 24  # per element of all matrices that a job holds at most
# Largest relative errors: of ours and float32, and of products in 16 bits as others use them. Nothing at all has 1.
EXACT, INEXACT = 0.01, 0.5
SQUARE = {"cpu": 2048, "cuda": 8192}  # sides of the product that is the ceiling


def batched(u: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The polynomial in products that add what they are added to."""
    tall = u.shape[-2] > u.shape[-1]
    x = u.mT if tall else u
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)).to(dtype)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.mT if tall else x).to(u.dtype)


def loop(u: Tensor) -> list[Tensor]:
    """One matrix after the other, as optimizers are usually written."""
    results = []
    for matrix in u:
        tall = len(matrix) > matrix.shape[1]
        x = matrix.T if tall else matrix
        x = x / (x.norm() + EPS)
        for _ in range(STEPS):
            gram = x @ x.T
            x = A * x + (B * gram + C * gram @ gram) @ x
        results.append(x.T if tall else x)
    return results


def muon_of_torch(u: Tensor) -> list[Tensor]:
    return [_muon._zeropower_via_newtonschulz(matrix, QUINTIC, STEPS, EPS) for matrix in u]


@functools.cache
def _gram_newton_schulz() -> Callable[[Tensor], Tensor]:
    from gram_newton_schulz import GramNewtonSchulz

    return GramNewtonSchulz(ns_coefficients=[list(QUINTIC)] * STEPS)  # type: ignore[no-any-return]


def gram_newton_schulz(u: Tensor) -> Tensor:
    """Of gram-newton-schulz, with Muon's coefficients."""
    return _gram_newton_schulz()(u)


def quack(u: Tensor) -> Tensor:
    """The symmetric products of quack-kernels, in float16."""
    from quack.gemm_interface import gemm_add, gemm_symmetric

    tall = u.shape[-2] > u.shape[-1]
    x = u.mT if tall else u
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)).half().contiguous()
    for _ in range(STEPS):
        gram = gemm_symmetric(x, x.mT)
        x = gemm_add(gemm_symmetric(gram, gram, C=gram, alpha=C, beta=B), x, C=x, beta=A)
    return (x.mT if tall else x).to(u.dtype)


def emerging(u: Tensor) -> list[Tensor]:
    """Of emerging-optimizers, one matrix after the other, in bfloat16 as it is told to by torch's precision."""
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        return [newton_schulz(matrix, STEPS, "simple") for matrix in u]
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def amx_is(value: str) -> Iterator[None]:
    """FEDKERNELS_AMX has this value, as long as the block lasts."""
    before = os.environ.get("FEDKERNELS_AMX")
    os.environ["FEDKERNELS_AMX"] = value
    try:
        yield
    finally:
        os.environ.pop("FEDKERNELS_AMX")
        if before is not None:
            os.environ["FEDKERNELS_AMX"] = before


def ours(us: Sequence[Tensor], *, amx: str = "0", backend: str | None = None) -> list[Tensor]:
    """Of all batches; on a CPU with products of float32, or in AMX tiles of bfloat16."""
    with amx_is(amx):
        return newton_schulz_all(us, STEPS, backend=backend)


def has_amx() -> bool:
    if MISSING["cpp"] is not None:
        return False
    try:
        ours([torch.ones(32, 32)], amx="1")
    except RuntimeError:
        return False
    return True


LIBRARIES: dict[str, tuple[str, Callable[[Tensor], Tensor | Sequence[Tensor]]]] = {
    "gram_newton_schulz": ("gram-newton-schulz, float16", gram_newton_schulz),
    "quack": ("symmetric products of quack, float16", quack),
    "emerging_optimizers": ("emerging-optimizers, bfloat16", emerging),
}


def backends(shape: tuple[int, ...]) -> list[str]:
    """Of ours on a GPU, those that can run a shape."""
    rules = rules_of(STEPS, "cuda")
    names = ("cuda", "triton")
    return [name for name in names if (MISSING[name] or rules[name]("cuda", torch.float32, shape)) is None]


class Problem:
    """The batches of a model, and the one that a variant gets."""

    def __init__(self, work: Workload, device: torch.device) -> None:
        self.timed = [torch.empty(*shape, device=device) for shape in work.matrices]
        self.given = self.timed
        rows, cols = work.matrices[0][1:]
        self.sides = (min(rows, LONGEST[rows > cols]), min(cols, LONGEST[rows <= cols]))
        self.device = device

    def prepare(self) -> None:
        """Fresh matrices, in the same place, where a captured graph reads them."""
        self.given = self.timed
        for batch in self.timed:
            batch.normal_()

    def on_all(
        self, run: Callable[[Tensor], Tensor | Sequence[Tensor]]
    ) -> Callable[[], list[Tensor | Sequence[Tensor]]]:
        return lambda: [run(batch) for batch in self.given]

    def spectrum(self, name: str) -> Tensor:
        """A matrix in float64: Gaussian, of singular values over some decades, or of rank 16."""
        generator = torch.Generator().manual_seed(0)
        rows, cols = self.sides
        u = torch.randn(rows, cols, dtype=torch.float64, generator=generator)
        if name == "rank16":
            u = u[:, :16] @ torch.randn(min(16, cols), cols, dtype=torch.float64, generator=generator)
        elif name != "gaussian":
            left, s, right = torch.linalg.svd(u, full_matrices=False)
            u = left * torch.logspace(0, -int(name[3:]), len(s), dtype=s.dtype) @ right
        return u.to(self.device)

    @functools.cached_property
    def truth(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of every spectrum, a matrix and what its polynomial is, in float64."""
        pairs = {}
        for name in SPECTRA:
            u = self.spectrum(name)
            left, s, right = torch.linalg.svd(u, full_matrices=False)
            s = s / s.norm()
            for _ in range(STEPS):
                s = A * s + B * s**3 + C * s**5
            pairs[name] = u, left * s @ right
        return pairs

    def errors(self, variant: Variant) -> dict[str, float]:
        """Relative errors on the four spectra."""
        found = {}
        for name, (u, exact) in self.truth.items():
            self.given = [u.float()[None]]
            found[name] = ((variant.run()[0][0].double() - exact).norm() / exact.norm()).item()
        return found


def variants(p: Problem, work: Workload) -> list[Variant]:
    """Ours first."""
    compiled = torch.compile(batched, dynamic=False)
    ways = [Variant("fedkernels", lambda: ours(p.given), tolerance=EXACT)]
    if p.device.type == "cpu" and has_amx():
        ways += [Variant("fedkernels, FEDKERNELS_AMX=1", lambda: ours(p.given, amx="1"), tolerance=EXACT)]
    if p.device.type == "cuda":
        common = set.intersection(*(set(backends(shape)) for shape in work.matrices))
        ways += [
            Variant(f"fedkernels, {name}", lambda name=name: ours(p.given, backend=name), 0, EXACT)
            for name in sorted(common)
        ]
    ways += [
        Variant("loop over matrices", p.on_all(loop), tolerance=EXACT),
        Variant("batched by shape, baddbmm", p.on_all(batched), tolerance=EXACT),
        Variant("the same, torch.compile", p.on_all(compiled), tolerance=EXACT, foreign=True),
        Variant("torch.optim.Muon's, bfloat16", p.on_all(muon_of_torch), tolerance=INEXACT),
    ]
    if p.device.type == "cuda":
        in_half = p.on_all(lambda u: batched(u, torch.float16))
        ways += [
            Variant("batched, baddbmm, float16", in_half, tolerance=INEXACT),
            *(
                Variant(title, p.on_all(run), tolerance=INEXACT, foreign=True)
                for module, (title, run) in LIBRARIES.items()
                if find_spec(module)
            ),
        ]
    return ways


def in_graphs(p: Problem) -> list[Variant]:
    """What a GPU does when nobody has to launch it."""
    theirs = p.on_all(lambda u: batched(u, torch.float16))
    return [
        Variant("fedkernels, CUDA graph", _checked_and_captured(p, lambda: ours(p.given)), tolerance=EXACT),
        Variant("batched, float16, CUDA graph", _checked_and_captured(p, theirs), tolerance=INEXACT),
    ]


def _checked_and_captured(p: Problem, eager: Callable[[], Any]) -> Callable[[], Any]:
    """Captured for the matrices that are timed; those that are checked have other shapes."""
    replayed = graphed(eager)
    return lambda: replayed() if p.given is p.timed else graphed(eager)()


def flops(matrices: Sequence[tuple[int, int, int]]) -> float:
    """Of the standard form without use of symmetry: what rates are given in, whatever a variant really does."""
    total = 0.0
    for count, rows, cols in matrices:
        n, m = min(rows, cols), max(rows, cols)
        total += count * STEPS * (4 * n * n * m + 2 * n**3)
    return total


def square_product(device: torch.device) -> tuple[Callable[[], Tensor], float]:
    """The ceiling of matrices: the product of two large ones, of what kernels multiply there; and its FLOP."""
    side, dtype = SQUARE[device.type], torch.float16 if device.type == "cuda" else torch.float32
    a, b, c = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(3))
    for factor in (a, b):
        factor.normal_()
    return lambda: torch.mm(a, b, out=c), 2.0 * side**3


def jobs(op: str, work: Workload, dtype: torch.dtype, device: torch.device) -> Iterator[Job]:
    """The one job of this op, in float32."""
    p = Problem(work, device)
    ceiling, ceiling_work = square_product(device)
    yield Job(
        facts={"op": op, "shape": work.name, "dtype": "float32", "matrices": work.matrices},
        variants=[*variants(p, work), *(in_graphs(p) if device.type == "cuda" else [])],
        errors=p.errors,
        flops=flops(work.matrices),
        bytes=8.0 * sum(batch.numel() for batch in p.timed),
        ceiling=ceiling,
        ceiling_work=ceiling_work,
        limit="arithmetic",
        prepare=p.prepare,
    )
