"""Newton–Schulz of all hidden matrices of a model against what PyTorch offers: seconds, FLOP/s, errors.

Every variant gets the same fresh matrices and takes turns with the others; a ratio is between neighbours in time.
Before anything is timed, each variant orthogonalises matrices of four spectra, which are compared with the polynomial
in float64; one that is further off than it may be stops the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import arguments, report, spread
from kernels import seconds
from torch import Tensor
from torch.optim import _muon

from fedkernels.kernels.newton_schulz import QUINTIC, newton_schulz
from fedkernels.kernels.overview import MATRICES

A, B, C = QUINTIC
STEPS, ROWS, COLS = 5, 256, 1024  # the shape of the matrices of four spectra
SPECTRA = ("gaussian", "log3", "log7", "rank16")


@dataclass(frozen=True)
class Variant:
    """A way to orthogonalise a batch `[n, rows, cols]`, and the largest relative error it may have."""

    name: str
    run: Callable[[Tensor], Any]
    tolerance: float = 0.01


def batched(u: Tensor) -> Tensor:
    """The polynomial in products that add what they are added to."""
    tall = u.shape[-2] > u.shape[-1]
    x = u.mT if tall else u
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


def loop(u: Tensor) -> list[Tensor]:
    """One matrix after the other, as optimizers are usually written."""
    results = []
    for matrix in u:
        tall = len(matrix) > matrix.shape[1]
        x = matrix.T if tall else matrix
        x = x / (x.norm() + 1e-7)
        for _ in range(STEPS):
            gram = x @ x.T
            x = A * x + (B * gram + C * gram @ gram) @ x
        results.append(x.T if tall else x)
    return results


def muon_of_torch(u: Tensor) -> list[Tensor]:
    return [_muon._zeropower_via_newtonschulz(matrix, QUINTIC, STEPS, 1e-7) for matrix in u]


def variants() -> list[Variant]:
    """Ours first."""
    return [
        Variant("fedkernels", lambda u: newton_schulz(u, STEPS)),
        Variant("loop over matrices", loop),
        Variant("batched by shape, baddbmm", batched),
        Variant("the same, torch.compile", torch.compile(batched, dynamic=False)),
        Variant("torch.optim.Muon's, bfloat16", muon_of_torch, tolerance=1.0),
    ]


def spectrum(name: str, device: torch.device) -> Tensor:
    """A matrix in float64: Gaussian, of singular values over some decades, or of rank 16."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(ROWS, COLS, dtype=torch.float64, generator=generator)
    if name == "rank16":
        u = u[:, :16] @ torch.randn(16, COLS, dtype=torch.float64, generator=generator)
    elif name != "gaussian":
        left, s, right = torch.linalg.svd(u, full_matrices=False)
        u = left * torch.logspace(0, -int(name[3:]), len(s), dtype=s.dtype) @ right
    return u.to(device)


def errors(variant: Variant, device: torch.device) -> dict[str, float]:
    """Relative errors on the four spectra.

    Raises:
        SystemExit: one is too large; the variant does not compute the same.
    """
    found = {}
    for name in SPECTRA:
        u = spectrum(name, device)
        left, s, right = torch.linalg.svd(u, full_matrices=False)
        s = s / s.norm()
        for _ in range(STEPS):
            s = A * s + B * s**3 + C * s**5
        exact = left * s @ right
        error = ((variant.run(u.float()[None])[0].double() - exact).norm() / exact.norm()).item()
        if not error <= variant.tolerance:
            raise SystemExit(f"{variant.name}: error {error:.2g} on {name}, expected at most {variant.tolerance}")
        found[name] = error
    return found


def flops(shapes: Sequence[tuple[int, int, int]]) -> float:
    """Of the standard form without use of symmetry: what rates are given in, whatever a variant really does."""
    total = 0.0
    for count, rows, cols in shapes:
        n, m = min(rows, cols), max(rows, cols)
        total += count * STEPS * (4 * n * n * m + 2 * n**3)
    return total


@torch.no_grad()
def measure(name: str, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Times of all variants of one model, the first being ours."""
    shapes, everything = MATRICES[name], variants()
    wrong = [errors(variant, device) for variant in everything]
    times: list[list[float]] = [[] for _ in everything]
    for r in range(repeats + 1):
        batches = [torch.randn(*shape, device=device) for shape in shapes]
        for i in range(len(everything))[:: 1 if r % 2 == 0 else -1]:
            run = everything[i].run
            elapsed = seconds(lambda run=run, batches=batches: [run(batch) for batch in batches], device)
            if r > 0:  # the first turn warms up
                times[i].append(elapsed)
    return [
        {
            "op": "newton_schulz", "shape": name, "matrices": shapes, "device": device.type,
            "threads": torch.get_num_threads(), "variant": variant.name, "errors": error, "times_s": taken,
            "time_s": spread(taken), "gflop_per_s": spread([flops(shapes) / t / 1e9 for t in taken]),
            "ours_is_faster": spread([t / ours for t, ours in zip(taken, times[0], strict=True)]),
        }
        for variant, taken, error in zip(everything, times, wrong, strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", nargs="+", choices=list(MATRICES), default=["vit_tiny"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="of the CPU, one table part each")
    parser.add_argument("--repeats", type=int, default=9, help="timed turns of every variant")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows, details = [], []
    for name in options.shape:
        for threads in options.threads if device.type == "cpu" else [1]:
            torch.set_num_threads(threads)
            for result in measure(name, device, options.repeats):
                ratio = result["ours_is_faster"]
                rows.append([
                    name, threads, result["variant"], f"{1e3 * result['time_s']['median']:.1f}",
                    f"{result['gflop_per_s']['median']:.0f}",
                    f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
                    " / ".join(f"{100 * result['errors'][spectrum]:.2g}" for spectrum in SPECTRA),
                ])  # fmt: skip
                print(*rows[-1], sep="  ", flush=True)
                details.append(result)
    errors_of = "error %, " + " / ".join(SPECTRA)
    columns = ["matrices of", "threads", "variant", "ms", "GFLOP/s of the standard form", "time / ours", errors_of]
    report(f"newton-schulz-{device.type}", {"columns": columns, "rows": rows}, {"runs": details}, options.out)


if __name__ == "__main__":
    main()
