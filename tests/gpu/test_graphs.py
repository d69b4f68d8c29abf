"""Captured graphs replay fused steps with the current values of their scalars."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_rows import row, rows
from torch import Tensor

from fedkernels.kernels.fused_adamw import fused_adamw
from fedkernels.kernels.fused_sam import fused_sam
from fedkernels.kernels.fused_sgd import fused_sgd

CLIENTS, D, STEPS = 3, 9001, 4
Step = Callable[[dict[str, Tensor]], None]


def adamw(t: dict[str, Tensor]) -> None:
    fused_adamw(
        t["y"], t["m"], t["v"], t["g"], lr=t["lr"], step=t["step"], v_steps=t["v_steps"], beta1=0.9, beta2=0.999,
        eps=1e-8, weight_decay=0.01, alpha=0.5, G=t["G"], active=t["active"],
    )  # fmt: skip


def sgd(t: dict[str, Tensor]) -> None:
    fused_sgd(t["y"], t["m"], t["g"], lr=t["lr"], momentum=0.9, weight_decay=0.01, active=t["active"])


def sam(t: dict[str, Tensor]) -> None:
    """Perturb, then restore and step: what lies between, a gradient, is not the kernel's."""
    fused_sam(t["y"], t["g"], rho=0.05, saved=t["saved"])
    fused_sgd(t["y"], t["m"], t["g"], lr=t["lr"], momentum=0.9, weight_decay=0.0, source=t["saved"])


def tensors() -> dict[str, Tensor]:
    y = rows(CLIENTS, D, 0)
    device = y.device
    return {
        "y": y, "m": rows(CLIENTS, D, 1), "v": rows(CLIENTS, D, 2).square(), "g": rows(CLIENTS, D, 3), "G": row(D, 4),
        "saved": torch.empty_like(y), "lr": torch.tensor(0.1, device=device), "step": torch.tensor(1, device=device),
        "v_steps": torch.full((CLIENTS, 1), 7.0, dtype=torch.float64, device=device),
        "active": torch.tensor([True, False, True], device=device),
    }  # fmt: skip


def advance(t: dict[str, Tensor], k: int) -> None:
    """What changes between local steps, written where the graph reads it."""
    t["step"].fill_(k)
    t["lr"].fill_(0.1 / k)
    t["g"].copy_(rows(CLIENTS, D, 10 + k))
    t["active"].copy_(torch.tensor([True, k % 2 == 0, k < STEPS]))


@pytest.mark.parametrize("step", [adamw, sgd, sam])
def test_replays_are_the_steps_themselves(step: Step) -> None:
    """Bit for bit: a graph that had baked in a learning rate, a count or a mask would differ from the second on."""
    eager, captured = tensors(), tensors()
    warm = tensors()
    step(warm)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured)
    for k in range(1, STEPS + 1):
        for t in (eager, captured):
            advance(t, k)
        step(eager)
        graph.replay()
        for name, value in eager.items():
            assert torch.equal(captured[name], value), f"{name} at step {k}"
