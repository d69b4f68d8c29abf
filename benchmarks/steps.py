"""Steps over flat rows `[C, d]`, federated AdamW and SAM, against what PyTorch offers for the same job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from shapes import Workload
from torch import Tensor
from turns import Job, Variant

from fedkernels.kernels.fused_adamw import fused_adamw
from fedkernels.kernels.fused_sam import fused_sam
from fedkernels.kernels.fused_sgd import fused_sgd

OPS = ("adamw", "sam_adamw", "sam_sgd")
PEAK_BYTES = 44  # per parameter that a job holds at most, temporaries of the slowest variant included
# Per parameter, counted in the equations.
FLOPS = {"adamw": 16, "sam_adamw": 18, "sam_sgd": 10}
LR, BETA1, BETA2, EPS, DECAY, ALPHA, MOMENTUM, RHO = 1e-3, 0.9, 0.999, 1e-8, 0.01, 0.5, 0.9, 0.05
STEP, SEEN = 3, 20  # k of m, and how many steps v had seen before
CHECKED = 100_000  # leading columns of every row that are compared with float64
TOLERANCE = 1e-4  # largest error, as a share of the largest distance that the step moves
LIBRARY_NORM = {"perturbation": 0.05}  # torch's norm, in float32: of 124 million elements 1.5 % too small on a CPU


class Problem:
    """The tensors `[C, d]` of a step, on which all variants work in turns."""

    def __init__(self, clients: int, d: int, gradient: torch.dtype, device: torch.device) -> None:
        self.y, self.m, self.v, self.buffer = (torch.empty(clients, d, device=device) for _ in range(4))
        self.g = torch.empty(clients, d, dtype=gradient, device=device)
        # What peers need: gradients in float32.
        self.wide_g = self.g if gradient == torch.float32 else torch.empty(clients, d, device=device)
        self.G = torch.empty(d, device=device)
        self.lr, self.step = torch.tensor(LR, device=device), torch.tensor(STEP, device=device)
        self.v_steps = torch.full((clients,), SEEN, device=device)
        # Called with the rows of perturbed parameters, which are gone when a step of SAM is done.
        self.look: Callable[[Sequence[Tensor] | Tensor], None] = lambda rows: None
        self.reset()

    def reset(self) -> None:
        generator = torch.Generator(self.y.device).manual_seed(0)
        for tensor in (self.y, self.m, self.v, self.g, self.G):
            tensor.normal_(0, 1e-2, generator=generator)
        self.v.square_()
        self.buffer.fill_(torch.nan)

    def widen(self) -> Tensor:
        return self.g if self.wide_g is self.g else self.wide_g.copy_(self.g)

    def optimizer(self, kind: type[torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
        """One of torch's optimizers over the rows, its state in this memory."""
        rows = [row.requires_grad_() for row in self.y.unbind()]
        optimizer = kind(rows, lr=LR, weight_decay=DECAY, fused=True, **options)
        for row, g, m, v in zip(rows, self.wide_g, self.m, self.v, strict=True):
            row.grad = g
            state = {"step": torch.tensor(0.0, device=row.device), "exp_avg": m, "exp_avg_sq": v}
            optimizer.state[row] = {"momentum_buffer": m} if kind is torch.optim.SGD else state
        return optimizer


def true_step(p: Problem, seen: int, alpha: float, *, sgd: bool) -> tuple[Tensor, Tensor]:
    """Old and new parameters by the equations, in float64, of the columns that are checked."""
    y, m, v, g, G = (tensor[..., :CHECKED].double() for tensor in (p.y, p.m, p.v, p.g, p.G))
    if sgd:
        return y, y - LR * (MOMENTUM * m + g + DECAY * y)
    m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
    local = (m / (1 - BETA1**STEP)) / ((v / (1 - BETA2 ** (seen + STEP))).sqrt() + EPS) + DECAY * y
    return y, y - LR * (local + alpha * G)


def true_perturbation(p: Problem) -> Tensor:
    """`ρ g/‖g‖` in float64, of the columns that are checked."""
    norms = torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in p.g])
    return RHO * p.g[:, :CHECKED].double() / norms.view(-1, 1)


def leading(rows: Sequence[Tensor] | Tensor) -> Tensor:
    """The columns that are checked, in float64."""
    return torch.stack([row[:CHECKED].double() for row in rows])


def adamw(p: Problem) -> list[Variant]:
    """Federated AdamW: a second moment with a longer past than the first, and a global direction."""

    def fused() -> Tensor:
        fused_adamw(
            p.y, p.m, p.v, p.g, lr=p.lr, step=p.step, v_steps=p.v_steps, beta1=BETA1, beta2=BETA2, eps=EPS,
            weight_decay=DECAY, alpha=ALPHA, G=p.G,
        )  # fmt: skip
        return p.y

    def by_hand(y: Tensor, m: Tensor, v: Tensor, g: Tensor, G: Tensor) -> Tensor:
        g = g.to(y.dtype)
        m.mul_(BETA1).add_(g, alpha=1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        denominator = (v / (1 - BETA2 ** (SEEN + STEP))).sqrt_().add_(EPS)
        y.mul_(1 - LR * DECAY)
        y.addcdiv_(m, denominator, value=-LR / (1 - BETA1**STEP))
        return y.add_(G, alpha=-LR * ALPHA)

    compiled = torch.compile(by_hand)
    optimizer = p.optimizer(torch.optim.AdamW, betas=(BETA1, BETA2), eps=EPS)
    group = optimizer.param_groups[0]
    # Torch's AdamW has one counter, here that of v; the learning rate makes up for the correction of m.
    group["lr"] = LR * (1 - BETA1 ** (SEEN + STEP)) / (1 - BETA1**STEP)
    group["weight_decay"] = DECAY * LR / group["lr"]
    counts = [optimizer.state[row]["step"] for row in group["params"]]

    def library() -> Sequence[Tensor]:
        p.widen()
        torch._foreach_zero_(counts)
        torch._foreach_add_(counts, SEEN + STEP - 1)
        optimizer.step()
        torch._foreach_add_(group["params"], [p.G] * len(counts), alpha=-LR * ALPHA)
        return group["params"]

    size, b, shared = p.y.numel(), p.g.element_size(), 4 / len(p.y)
    widened = 0 if b == 4 else b + 4
    return [
        Variant("fedkernels", fused, size * (24 + b + shared), TOLERANCE),
        Variant("AdamW(fused=True), then _foreach_add_", library, size * (28 + widened + 8 + shared), TOLERANCE),
        Variant(
            "operation by operation", lambda: by_hand(p.y, p.m, p.v, p.g, p.G), size * (88 + 2 * b + shared), TOLERANCE
        ),
        Variant(
            "the same, torch.compile",
            lambda: compiled(p.y, p.m, p.v, p.g, p.G),
            size * (24 + b + shared),
            TOLERANCE,
            True,
        ),
    ]


def sam(p: Problem, *, sgd: bool) -> list[Variant]:
    """A step of SAM without its gradients: perturb, restore, step. Both gradients are the same here."""
    none_seen = torch.zeros_like(p.v_steps)

    def finish(source: Tensor | None) -> Tensor:
        if sgd:
            fused_sgd(p.y, p.m, p.g, lr=p.lr, momentum=MOMENTUM, weight_decay=DECAY, source=source)
        else:
            fused_adamw(
                p.y, p.m, p.v, p.g, lr=p.lr, step=p.step, v_steps=none_seen, beta1=BETA1, beta2=BETA2, eps=EPS,
                weight_decay=DECAY, source=source,
            )  # fmt: skip
        return p.y

    def in_place() -> Tensor:
        fused_sam(p.y, p.g, rho=RHO, saved=p.buffer)
        p.look(p.y)
        return finish(p.buffer)

    def own_buffer() -> Tensor:
        fused_sam(p.y, p.g, rho=RHO, out=p.buffer)
        p.look(p.buffer)
        return finish(None)

    options = {"momentum": MOMENTUM} if sgd else {"betas": (BETA1, BETA2), "eps": EPS}
    base = p.optimizer(torch.optim.SGD if sgd else torch.optim.AdamW, **options)
    rows: list[Tensor] = base.param_groups[0]["params"]

    def base_step() -> None:
        if not sgd:
            for row in rows:
                base.state[row]["step"].fill_(STEP - 1)
        base.step()

    def usual() -> Sequence[Tensor]:
        """As SAM's most used implementation writes it."""
        p.widen()
        norm = torch.stack([torch.stack([(1.0 * row.grad).norm(p=2)]).norm(p=2) for row in rows])
        old = []
        for row, length in zip(rows, norm, strict=True):
            old.append(row.data.clone())
            row.add_(1.0 * row.grad * (RHO / (length + 1e-12)))
        p.look(rows)
        for row, kept in zip(rows, old, strict=True):
            row.data = kept
        base_step()
        new = [row.data for row in rows]
        for row, home in zip(rows, p.y.unbind(), strict=True):  # for the next turn of the others
            row.data = home
        return new

    def careful() -> Sequence[Tensor]:
        """The same with one buffer made beforehand and no temporary."""
        p.widen()
        for row, kept in zip(rows, p.buffer, strict=True):
            kept.copy_(row)
            row.addcmul_(row.grad, RHO / (row.grad.norm() + 1e-12))
        p.look(rows)
        for row, kept in zip(rows, p.buffer, strict=True):
            row.copy_(kept)
        base_step()
        return rows

    size, b, step = p.y.numel(), p.g.element_size(), 16 if sgd else 24
    widened = 0 if b == 4 else b + 4
    return [
        Variant("fedkernels, in place", in_place, size * (b + (12 + b) + (step + b)), TOLERANCE),
        Variant("fedkernels, buffer of its own", own_buffer, size * (b + (8 + b) + (step + b)), TOLERANCE),
        Variant(
            "usual: norm, clone, add, swap, fused step",
            usual,
            size * (48 + step + 4 + widened),
            TOLERANCE,
            tolerances=LIBRARY_NORM,
        ),
        Variant(
            "careful: copies to a buffer, fused step",
            careful,
            size * (32 + step + 4 + widened),
            TOLERANCE,
            tolerances=LIBRARY_NORM,
        ),
    ]


def jobs(op: str, work: Workload, dtype: torch.dtype, device: torch.device) -> Iterator[Job]:
    """The one job of an op.

    Args:
        dtype: of gradients.
    """
    p = Problem(work.clients, work.d, dtype, device)
    federated, sgd = op == "adamw", op == "sam_sgd"

    def errors(variant: Variant) -> dict[str, float]:
        old, expected = true_step(p, SEEN if federated else 0, ALPHA if federated else 0.0, sgd=sgd)
        away, perturbed = true_perturbation(p), []
        p.look = lambda rows: perturbed.append(leading(rows))
        found = leading(variant.run())
        p.look = lambda rows: None
        moved = {"distance moved": ((found - expected).abs().max() / (expected - old).abs().max()).item()}
        if federated:
            return moved
        (w,) = perturbed
        # What parameters lose when they are stored is no error of a perturbation, which may be as small.
        off = (w - (old + away)).abs() - torch.finfo(torch.float32).eps * w.abs()
        return moved | {"perturbation": (off.clamp(min=0).max() / away.abs().max()).item()}

    size = work.clients * work.d
    variants = adamw(p) if federated else sam(p, sgd=sgd)
    yield Job(
        facts={"op": op, "shape": work.name, "dtype": str(dtype).removeprefix("torch.")},
        variants=variants,
        errors=errors,
        flops=FLOPS[op] * size,
        bytes=variants[0].bytes,
        ceiling=lambda: p.buffer.copy_(p.y),
        ceiling_work=8 * size,
        limit="memory",
        prepare=p.reset,
    )
