"""FedBCGD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedkernels.federated.schedule import assign_blocks

from .federation import Direction, Federation, minus
from .optimizers import sgd


def fedbcgd(
    f: Federation,
    rounds: int,
    *,
    blocks: Mapping[str, int],
    local: Callable[[Federation], Direction] = sgd,
    momentum: float = 0.45,
) -> dict[str, Any]:
    """`blocks` maps parameters to their block; those it leaves out are shared."""
    x, v = f.start(), f.zeros()
    for r in range(rounds):
        cohort = f.cohort(r)
        labels = assign_blocks(f.settings.seed, r, len(cohort), 1 + max(blocks.values()))
        assigned = dict(zip(cohort, labels.tolist(), strict=True))
        deltas = {}
        for i in cohort:
            y, direction = dict(x), local(f)
            for k, step in enumerate(f.steps(i, r), start=1):
                p = direction(y, f.gradient(y, step), k)
                y = {n: y[n] - f.lr(r) * p[n] for n in y}
            deltas[i] = minus(y, x)
        for n in x:
            senders = {i: {n: d[n]} for i, d in deltas.items() if n not in blocks or assigned[i] == blocks[n]}
            v[n] = momentum * v[n] + (f.mean(senders)[n] if senders else 0)
        x = {n: x[n] + v[n] for n in x}
    return {"x": x, "v": v}
