"""FedBCGD and FedBCGD+."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fedkernels.algorithms import FedBcgd, FedBcgdPlus
from fedkernels.federated.schedule import assign_blocks

from .averaging import ORACLE_SGD, SGD
from .comparison import Case
from .federation import Direction, Federation, Named, minus
from .optimizers import sgd

SHARED = -1


def labels(f: Federation, blocks: Mapping[str, int | Sequence[int]]) -> Named:
    """The block of every coordinate, from the block of a parameter or of each of its rows; others are shared."""
    out = {}
    for n, p in f.start().items():
        of_rows = torch.as_tensor(blocks.get(n, SHARED)).view(-1, *[1] * (p.dim() - 1))
        out[n] = of_rows.expand(p.shape)
    return out


def rows_between(f: Federation, names: Sequence[str], cuts: Sequence[int]) -> dict[str, list[int]]:
    """The block of every row of `names`, laid out one after another and cut at these numbers of parameters."""
    out, at = {}, 0
    for n in names:
        p = f.start()[n]
        out[n] = []
        for _ in range(p.shape[0]):
            out[n].append(sum(cut <= at for cut in cuts))
            at += p[0].numel()
    return out


def by_sender(
    label: Named,
    assigned: Mapping[int, int],
    sent: Mapping[int, Named],
    combine: Callable[[Mapping[int, Named]], Named],
) -> Named:
    """Every coordinate combined over the clients that sent it, 0 where there are none."""
    out = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in label.items()}
    for b in {int(b) for t in label.values() for b in t.unique()}:
        if senders := {i: named for i, named in sent.items() if b in (SHARED, assigned[i])}:
            combined = combine(senders)
            out = {n: torch.where(label[n] == b, combined[n], out[n]) for n in out}
    return out


def total(sent: Mapping[int, Named]) -> Named:
    return {n: torch.stack([named[n] for named in sent.values()]).sum(0) for n in next(iter(sent.values()))}


def fedbcgd(
    f: Federation,
    rounds: int,
    *,
    blocks: Mapping[str, int | Sequence[int]],
    local: Callable[[Federation], Direction] = sgd,
    momentum: float = 0.45,
    control: str | None = None,
    rho_c: float = 0.1,
    svrg: bool = False,
) -> dict[str, Any]:
    """`blocks` maps parameters, or each of their rows, to their block; `control` makes it FedBCGD+."""
    x, v, c = f.start(), f.zeros(), f.zeros()
    kept: dict[int, Named] = {}
    label = labels(f, blocks)
    n_blocks = 1 + max(int(t.max()) for t in label.values())
    for r in range(rounds):
        cohort = f.cohort(r)
        drawn = assign_blocks(f.settings.seed, r, len(cohort), n_blocks).tolist()
        assigned = dict(zip(cohort, drawn, strict=True))
        deltas, changes = {}, {}
        for i in cohort:
            y, direction, c_i = dict(x), local(f), kept.get(i, f.zeros())
            full, taken = f.full_gradient(x, i) if svrg else {}, 0
            for k, step in enumerate(f.steps(i, r), start=1):
                g = f.gradient(y, step)
                if svrg:
                    at_x = f.gradient(x, step)
                    g = {n: g[n] - at_x[n] + full[n] for n in g}
                if control:
                    g = {n: g[n] + c[n] - c_i[n] for n in g}
                p = direction(y, g, k)
                y = {n: y[n] - f.lr(r) * p[n] for n in y}
                taken = k
            deltas[i] = minus(y, x)
            new = {n: c_i[n] - c[n] + (x[n] - y[n]) / (taken * f.lr(r)) for n in x}
            if control == "exact":
                changes[i] = minus(new, c_i)
                sent = {n: (label[n] == SHARED) | (label[n] == assigned[i]) for n in x}
                kept[i] = {n: torch.where(sent[n], new[n], c_i[n]) for n in x}
            elif control == "ema":
                changes[i], kept[i] = minus(new, c), new
        delta = by_sender(label, assigned, deltas, f.mean)
        v = {n: momentum * v[n] + delta[n] for n in v}
        x = {n: x[n] + v[n] for n in x}
        if control == "exact":
            change = by_sender(label, assigned, changes, total)
            c = {n: c[n] + change[n] / f.population for n in c}
        elif control == "ema":
            change = by_sender(label, assigned, changes, f.mean)
            c = {n: torch.where(c[n] == 0, change[n], c[n] + rho_c * change[n]) for n in c}
    out: dict[str, Any] = {"x": x, "v": v}
    return out | {"c": c, "kept": {"c_i": kept}} if control else out


# Where three blocks of even length are cut, at ends of rows, by the size of the model.
CUTS = {332: (96, 200), 403: (99, 192), 1004: (320, 648), 2992: (984, 1976)}


def in_three(f: Federation, rounds: int, **options: Any) -> dict[str, Any]:
    """All but the head, which comes last in every model: a weight and a bias, and of GPT-2 a weight alone."""
    start = f.start()
    cuts = CUTS[sum(p.numel() for p in start.values())]
    own = list(start)[: -2 if list(start)[-1].endswith("bias") else -1]
    return fedbcgd(f, rounds, blocks=rows_between(f, own, cuts), **options)


CASES: dict[str, Case] = {
    "fedbcgd": Case(FedBcgd(blocks=3), in_three, {"lr": 0.3}),
    "fedbcgd-options": Case(
        FedBcgd(blocks=3, momentum=0.0, local=SGD),
        partial(in_three, momentum=0.0, local=ORACLE_SGD),
        {"lr": 0.05, "weighting": "samples"},
    ),
    "fedbcgd_plus": Case(FedBcgdPlus(blocks=3), partial(in_three, control="exact"), {"lr": 0.3}),
    "fedbcgd_plus-options": Case(
        FedBcgdPlus(blocks=3, momentum=0.7, local=SGD),
        partial(in_three, control="exact", momentum=0.7, local=ORACLE_SGD),
        {"lr": 0.05, "weighting": "samples"},
    ),
    "fedbcgd_plus-empty": Case(
        FedBcgdPlus(blocks=3), partial(in_three, control="exact"), {"lr": 0.5, "cohort": 2, "weighting": "samples"}
    ),
    "fedbcgd_plus-svrg": Case(
        FedBcgdPlus(blocks=3, svrg=True), partial(in_three, control="exact", svrg=True), {"lr": 1.0, "clip_norm": 0.2}
    ),
    "fedbcgd_plus-ema": Case(FedBcgdPlus(blocks=3, control="ema"), partial(in_three, control="ema"), {"lr": 0.3}),
    "fedbcgd_plus-ema-options": Case(
        FedBcgdPlus(blocks=3, control="ema", rho_c=0.4, momentum=0.0, svrg=True),
        partial(in_three, control="ema", rho_c=0.4, momentum=0.0, svrg=True),
        {"lr": 0.3, "weighting": "samples"},
    ),
    "fedbcgd_plus-ema-empty": Case(
        FedBcgdPlus(blocks=3, control="ema"), partial(in_three, control="ema"), {"lr": 0.5, "cohort": 2}
    ),
}
