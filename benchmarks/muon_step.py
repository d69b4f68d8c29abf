"""A step of Muon on all hidden matrices of a model: momentum, Newton–Schulz, decay, move."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from newton_schulz import EPS, EXACT, STEPS, A, B, C, batched, flops, square_product
from shapes import Workload
from torch import Tensor
from turns import Job, Variant, graphed

from fedkernels.kernels.muon_step import muon_step

OPS = ("muon_step",)
LR, MOMENTUM, DECAY = 0.02, 0.95, 0.1
PEAK_BYTES = 44  # per element of all matrices that a job holds at most
COARSE = 0.1  # largest relative error of a step on Gaussian matrices with products in bfloat16
Batch = tuple[Tensor, Tensor, Tensor]


class Problem:
    """Parameters, momenta and gradients `[1, count, rows, cols]` of every shape."""

    def __init__(self, work: Workload, device: torch.device) -> None:
        self.batches: list[Batch] = [
            tuple(torch.empty(1, *shape, device=device) for _ in range(3)) for shape in work.matrices
        ]
        self.lr = torch.tensor(LR, device=device)
        self.reset()

    def reset(self) -> None:
        generator = torch.Generator(self.lr.device).manual_seed(0)
        for batch in self.batches:
            for tensor in batch:
                tensor.normal_(generator=generator)

    def updates(self) -> list[Tensor]:
        """What the step has to move the first matrix of every batch by, in float64."""
        moves = []
        for batch in self.batches:
            y, M, g = (tensor[0, 0].double() for tensor in batch)
            u = torch.lerp(g, torch.lerp(M, g, 1 - MOMENTUM), MOMENTUM)
            x = u.T if len(u) > u.shape[1] else u
            x = x / (x.norm() + EPS)
            for _ in range(STEPS):
                gram = x @ x.T
                x = A * x + (B * gram + C * gram @ gram) @ x
            o = x.T if len(u) > u.shape[1] else x
            moves.append(-LR * (scale_of(y) * o + DECAY * y))
        return moves

    def errors(self, variant: Variant) -> dict[str, float]:
        expected, old = self.updates(), [y[0, 0].double() for y, _, _ in self.batches]
        variant.run()
        moved = [y[0, 0].double() - before for (y, _, _), before in zip(self.batches, old, strict=True)]
        relative = [((a - b).norm() / b.norm()).item() for a, b in zip(moved, expected, strict=True)]
        return {"the move": max(relative)}


def scale_of(y: Tensor) -> float:
    return max(1.0, y.shape[-2] / y.shape[-1]) ** 0.5


def variants(p: Problem) -> list[Variant]:
    """Ours first."""

    def ours() -> None:
        for y, M, g in p.batches:
            muon_step(y, M, g, lr=p.lr, momentum=MOMENTUM, weight_decay=DECAY, scale=scale_of(y))

    def by_hand(y: Tensor, M: Tensor, g: Tensor) -> None:
        M.lerp_(g, 1 - MOMENTUM)
        o = batched(torch.lerp(g, M, MOMENTUM)[0])
        y.mul_(1 - LR * DECAY)
        y[0].add_(o, alpha=-LR * scale_of(y))

    compiled = torch.compile(by_hand, dynamic=False)
    rows = [row.requires_grad_() for y, _, _ in p.batches for row in y[0].unbind()]
    library = torch.optim.Muon(rows, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    momenta, gradients = ([row for batch in p.batches for row in batch[k][0].unbind()] for k in (1, 2))
    for row, M, g in zip(rows, momenta, gradients, strict=True):
        row.grad, library.state[row]["momentum_buffer"] = g, M

    ways = [
        Variant("fedkernels", ours, tolerance=EXACT),
        Variant("batched by shape, baddbmm", lambda: [by_hand(*batch) for batch in p.batches], tolerance=EXACT),
        Variant(
            "the same, torch.compile", lambda: [compiled(*batch) for batch in p.batches], tolerance=EXACT, foreign=True
        ),
        Variant("torch.optim.Muon, bfloat16", library.step, tolerance=COARSE),
    ]
    if p.lr.is_cuda:
        ways.append(Variant("fedkernels, CUDA graph", graphed(ours, p.reset), tolerance=EXACT))
    return ways


def jobs(op: str, work: Workload, dtype: torch.dtype, device: torch.device) -> Iterator[Job]:
    """The one job of this op, in float32."""
    p = Problem(work, device)
    ceiling, ceiling_work = square_product(device)
    yield Job(
        facts={"op": op, "shape": work.name, "dtype": "float32", "matrices": work.matrices},
        variants=variants(p),
        errors=p.errors,
        flops=flops(work.matrices),
        bytes=20.0 * sum(y.numel() for y, _, _ in p.batches),
        ceiling=ceiling,
        ceiling_work=ceiling_work,
        limit="arithmetic",
        prepare=p.reset,
    )
