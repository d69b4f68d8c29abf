"""FedPAC with every optimizer, and the averages of SOAP, Sophia and Shampoo clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from fedkernels.algorithms import FedPac, LocalShampoo, LocalSoap, LocalSophia
from fedkernels.layout import Layout
from fedkernels.optim import AdamW, Muon, Shampoo, Soap, Sophia
from fedkernels.rng import Purpose, stream

from .comparison import Case
from .federation import Federation, Named, minus
from .optimizers import ADAMW_OPTIONS, ORACLE_ADAMW_OPTIONS, adamw, muon

Pair = tuple[Tensor, Tensor]
Factors = dict[str, Pair]


@dataclass
class Local:
    """A client's optimizer: its direction, its preconditioner Θ in named parts, and what it does before a step."""

    direction: Callable[[Named, Named, int], Named]
    theta: Callable[[], Named]
    before: Callable[[Named, tuple[Tensor, Tensor, Tensor], int], None] = field(default=lambda y, step, k: None)


Start = Callable[..., Local]
"""A client's optimizer from the federation, the round, the client, and the server's Θ with the steps it has seen."""


def joined(parts: Named) -> Tensor:
    return torch.cat([parts[name].flatten() for name in sorted(parts)])


def factors_of(layout: Layout, vector: Tensor) -> Tensor:
    """The engine's factors in the order of `joined`."""
    parts: Named = {}
    rest = vector
    for slab in layout.slabs:
        names = [entry.name for entry in layout.entries if slab.start <= entry.start < slab.stop]
        for side, n in (("L", slab.rows), ("R", slab.cols)):
            squares, rest = rest[: len(names) * n * n], rest[len(names) * n * n :]
            parts |= {f"{name} {side}": a for name, a in zip(names, squares.view(-1, n, n), strict=True)}
    assert not len(rest)
    return joined(parts)


def as_matrix(f: Federation, name: str, t: Tensor) -> Tensor:
    return t[0] if name in f.tokens else t if name in f.transposed else t.flatten(1)


def flat(pairs: Factors) -> Named:
    return {f"{n} {side}": a for n, pair in pairs.items() for side, a in zip("LR", pair, strict=True)}


def start_factors(f: Federation, theta: Named | None) -> Factors:
    shapes = {n: as_matrix(f, n, t).shape for n, t in f.start().items() if n in f.hidden}
    if theta is not None:
        return {n: (theta[f"{n} L"].clone(), theta[f"{n} R"].clone()) for n in shapes}
    return {n: (torch.zeros(r, r).double(), torch.zeros(c, c).double()) for n, (r, c) in shapes.items()}


def add_outer(pair: Pair, g: Tensor, beta: float) -> Pair:
    return beta * pair[0] + (1 - beta) * g @ g.T, beta * pair[1] + (1 - beta) * g.T @ g


def eigenvectors(a: Tensor) -> Tensor:
    """By falling eigenvalue; of the null space those of `diag(1, …, n)` restricted to it, by rising place."""
    values, vectors = torch.linalg.eigh(a)
    null = values < 1e-6 * a.trace()
    kernel = vectors[:, null] if a.any() else torch.eye(len(a)).double()
    places = torch.arange(1, len(a) + 1).double()
    _, turn = torch.linalg.eigh(kernel.T @ (places[:, None] * kernel))
    return torch.cat([vectors[:, ~null].flip(1), kernel @ turn], 1)[:, : len(a)]


def iterated(a: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.stack([c @ a @ c for c in q.T]).argsort(descending=True, stable=True)
    columns: list[Tensor] = []
    for c in q.T[order]:  # Gram–Schmidt, twice for orthogonality
        image = a @ c + 1e-6 * a.trace() * c
        for _ in range(2):
            image = image - sum((p @ image) * p for p in columns)
        columns.append(image / image.norm())
    return torch.stack(columns, 1), order


def soap(
    f: Federation,
    r: int,
    i: int,
    theta: Named | None = None,
    seen: float = 0,
    *,
    betas: tuple[float, float] = (0.95, 0.95),
    shampoo_beta: float = 0.95,
    eps: float = 1e-8,
    decay: float = 0.01,
    every: int = 10,
) -> Local:
    """m stays in the space of the parameters."""
    pairs = start_factors(f, theta)
    fresh = not any(a.any() for pair in pairs.values() for a in pair)
    bases = {} if fresh else {n: [eigenvectors(a) for a in pair] for n, pair in pairs.items()}
    m, v = f.zeros(), f.zeros()

    def direction(y: Named, g: Named, k: int) -> Named:
        if fresh and k == 1:
            for n in pairs:
                pairs[n] = add_outer(pairs[n], as_matrix(f, n, g[n]), shampoo_beta)
                bases[n] = [eigenvectors(a) for a in pairs[n]]
            p = f.zeros()
        else:
            p, t = {}, k - fresh
            for n in y:
                m[n] = betas[0] * m[n] + (1 - betas[0]) * g[n]
                turned = [m[n], g[n]]
                if n in bases:
                    left, right = bases[n]
                    turned = [(left.T @ as_matrix(f, n, x) @ right).reshape(x.shape) for x in turned]
                v[n] = betas[1] * v[n] + (1 - betas[1]) * turned[1] ** 2
                p[n] = turned[0] / (1 - betas[0] ** t) / ((v[n] / (1 - betas[1] ** t)).sqrt() + eps)
                if n in bases:
                    p[n] = (left @ as_matrix(f, n, p[n]) @ right.T).reshape(p[n].shape)
                    pairs[n] = add_outer(pairs[n], as_matrix(f, n, g[n]), shampoo_beta)
                p[n] = p[n] + decay * y[n]
        if k % every == 0:
            for n, pair in pairs.items():
                (left, rows), (right, cols) = (iterated(a, q) for a, q in zip(pair, bases[n], strict=True))
                bases[n] = [left, right]
                v[n] = as_matrix(f, n, v[n])[rows][:, cols].reshape(v[n].shape)
        return p

    return Local(direction, lambda: flat(pairs))


def shampoo(
    f: Federation,
    r: int,
    i: int,
    theta: Named | None = None,
    seen: float = 0,
    *,
    beta: float = 0.95,
    eps: float = 1e-4,
    root: int = 4,
    every: int = 10,
    decay: float = 0.01,
    multiplier: float = 1.0,
) -> Local:
    pairs, roots = start_factors(f, theta), {}
    other = adamw(f, betas=(0.9, 0.95), eps=1e-10, decay=decay)

    def direction(y: Named, g: Named, k: int) -> Named:
        p = other(y, g, k)
        for n in pairs:
            matrix = as_matrix(f, n, g[n])
            pairs[n] = add_outer(pairs[n], matrix, beta)
            if k % every == 1 % every:
                unbiased = [a / (1 - beta ** (seen + k)) + eps * torch.eye(len(a)).double() for a in pairs[n]]
                # The singular values of a symmetric positive definite matrix are its eigenvalues.
                roots[n] = [u @ torch.diag(s ** (-1 / root)) @ u.T for u, s, _ in map(torch.linalg.svd, unbiased)]
            p[n] = multiplier * (roots[n][0] @ matrix @ roots[n][1]).reshape(y[n].shape) + decay * y[n]
        return p

    return Local(direction, lambda: flat(pairs))


def sophia(
    f: Federation,
    r: int,
    i: int,
    theta: Named | None = None,
    seen: float = 0,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    rho: float = 0.01,
    decay: float = 0.1,
    every: int = 10,
) -> Local:
    m, h = f.zeros(), f.zeros() if theta is None else dict(theta)
    unclipped = replace(f, settings=replace(f.settings, clip_norm=float("inf")))

    def before(y: Named, step: tuple[Tensor, Tensor, Tensor], k: int) -> None:
        if k % every != 1 % every:
            return
        inputs, targets, weights = step
        draws = stream(f.settings.seed, Purpose.LABELS, r, i, k).random(targets.shape)
        with torch.no_grad():
            logits = functional_call(unclipped.module, y, (inputs,))
        sampled = targets.clone()
        for sample, draw in enumerate(draws.tolist()):
            masses = (logits[sample] - logits[sample].max()).exp()
            label, passed = 0, float(masses[0] / masses.sum())
            while passed <= draw:
                label += 1
                passed += float(masses[label] / masses.sum())
            sampled[sample] = label
        g_hat = unclipped.gradient(y, (inputs, sampled, weights))
        for n in h:
            h[n] = betas[1] * h[n] + (1 - betas[1]) * weights.sum() * g_hat[n] ** 2

    def direction(y: Named, g: Named, k: int) -> Named:
        p = {}
        for n in y:
            m[n] = betas[0] * m[n] + (1 - betas[0]) * g[n]
            p[n] = m[n].sign() * (m[n].abs() / (rho * h[n] + 1e-15)).clamp(max=1) + decay * y[n]
        return p

    return Local(direction, lambda: h, before)


def pac_adamw(f: Federation, r: int, i: int, theta: Named | None = None, seen: float = 0, **options: Any) -> Local:
    v = f.zeros() if theta is None else dict(theta)
    return Local(adamw(f, v=v, seen=seen, **options), lambda: v)


def pac_muon(f: Federation, r: int, i: int, theta: Named | None = None, seen: float = 0, **options: Any) -> Local:
    M = {n: torch.zeros_like(f.start()[n]) for n in f.hidden} if theta is None else dict(theta)
    return Local(muon(f, M=M, **options), lambda: M)


def fedpac(
    f: Federation,
    rounds: int,
    *,
    local: Start,
    name: str,
    beta: float = 0.5,
    align: bool = True,
    counted: bool = False,
    rule: str | None = None,
) -> dict[str, Any]:
    """`theta_H` is `joined`; with a `rule`, every coordinate of `theta_v` has the value of its block."""
    x, G, theta, t = f.start(), f.zeros(), None, 0.0
    for r in range(rounds):
        deltas, thetas = {}, {}
        for i in f.cohort(r):
            y = dict(x)
            client = local(f, r, i, theta, t) if align and theta is not None else local(f, r, i)
            for k, step in enumerate(f.steps(i, r), start=1):
                client.before(y, step, k)
                p = client.direction(y, f.gradient(y, step), k)
                y = {n: y[n] - f.lr(r) * ((1 - beta) * p[n] + beta * G[n]) for n in y}
            deltas[i], thetas[i] = minus(y, x), dict(client.theta())
        delta, theta = f.mean(deltas), f.mean(thetas)
        theta = f.block_mean(theta, rule) if rule else theta
        x = {n: x[n] + delta[n] for n in x}
        K = f.mean_steps(deltas, r)
        t += K
        G = {n: -delta[n] / (K * f.lr(r)) for n in x}
    assert theta is not None
    found: dict[str, Any] = {"x": x, "G": G}
    if align:
        found[f"theta_{name}"] = joined(theta) if name == "H" else theta
    return found | ({"t": torch.tensor([t], dtype=torch.float64)} if counted else {})


def average(f: Federation, rounds: int, **options: Any) -> dict[str, Any]:
    return {"x": fedpac(f, rounds, name="", beta=0.0, align=False, **options)["x"]}


# Options at which the function of the gradients is not so steep that rounding shows: of SOAP the eigenvectors of small
# eigenvalues turn with it, which a large ε makes harmless; Sophia divides by ρh.
SOAP, ORACLE_SOAP = Soap(eps=0.05), partial(soap, eps=0.05)
SOAP_OPTIONS = Soap(beta1=0.8, beta2=0.9, shampoo_beta=0.7, eps=0.1, weight_decay=0.3, refresh_every=1)
ORACLE_SOAP_OPTIONS = partial(soap, betas=(0.8, 0.9), shampoo_beta=0.7, eps=0.1, decay=0.3, every=1)
SOPHIA, ORACLE_SOPHIA = Sophia(rho=1000.0), partial(sophia, rho=1000.0)
SOPHIA_OPTIONS = Sophia(beta1=0.8, beta2=0.9, rho=100.0, weight_decay=0.3, hessian_every=2)
ORACLE_SOPHIA_OPTIONS = partial(sophia, betas=(0.8, 0.9), rho=100.0, decay=0.3, every=2)
SHAMPOO_OPTIONS = Shampoo(beta=0.7, eps=0.01, root=2, weight_decay=0.3, lr_multiplier=0.5, refresh_every=2)
ORACLE_SHAMPOO_OPTIONS = partial(shampoo, beta=0.7, eps=0.01, root=2, decay=0.3, multiplier=0.5, every=2)
SMALL = {"lr": 0.01}
H: dict[str, Any] = {"expand": {"theta_H": factors_of}}

CASES: dict[str, Case] = {
    "local_soap": Case(LocalSoap(local=SOAP), partial(average, local=ORACLE_SOAP)),
    "local_soap-options": Case(LocalSoap(local=SOAP_OPTIONS), partial(average, local=ORACLE_SOAP_OPTIONS)),
    "local_soap-all": Case(LocalSoap(local=replace(SOAP, route="all_matrices")), partial(average, local=ORACLE_SOAP)),
    "local_sophia": Case(LocalSophia(local=SOPHIA), partial(average, local=ORACLE_SOPHIA), SMALL),
    "local_sophia-options": Case(
        LocalSophia(local=SOPHIA_OPTIONS), partial(average, local=ORACLE_SOPHIA_OPTIONS), SMALL
    ),
    "local_shampoo": Case(LocalShampoo(), partial(average, local=shampoo)),
    "local_shampoo-options": Case(LocalShampoo(local=SHAMPOO_OPTIONS), partial(average, local=ORACLE_SHAMPOO_OPTIONS)),
    "fedpac-soap": Case(FedPac(local=SOAP), partial(fedpac, local=ORACLE_SOAP, name="H"), **H),
    "fedpac-soap-options": Case(
        FedPac(local=SOAP_OPTIONS, beta=0.8),
        partial(fedpac, local=ORACLE_SOAP_OPTIONS, name="H", beta=0.8),
        {"weighting": "samples"},
        **H,
    ),
    "fedpac-soap-unaligned": Case(
        FedPac(local=SOAP, align=False), partial(fedpac, local=ORACLE_SOAP, name="H", align=False)
    ),
    "fedpac-sophia": Case(FedPac(local=SOPHIA), partial(fedpac, local=ORACLE_SOPHIA, name="h"), SMALL),
    "fedpac-sophia-options": Case(
        FedPac(local=SOPHIA_OPTIONS, beta=0.3),
        partial(fedpac, local=ORACLE_SOPHIA_OPTIONS, name="h", beta=0.3),
        {"weighting": "samples", "clip_norm": 1.0, "lr": 0.05},
    ),
    "fedpac-shampoo": Case(FedPac(local=Shampoo()), partial(fedpac, local=shampoo, name="H", counted=True), **H),
    "fedpac-shampoo-options": Case(
        FedPac(local=SHAMPOO_OPTIONS, beta=0.2),
        partial(fedpac, local=ORACLE_SHAMPOO_OPTIONS, name="H", beta=0.2, counted=True),
        {"weighting": "samples"},
        **H,
    ),
    "fedpac-muon": Case(FedPac(local=Muon(momentum=0.9)), partial(fedpac, local=partial(pac_muon, beta=0.9), name="M")),
    "fedpac-adamw": Case(FedPac(local=AdamW()), partial(fedpac, local=pac_adamw, name="v", counted=True)),
    **{
        f"fedpac-adamw-{rule}": Case(
            FedPac(local=AdamW(**ADAMW_OPTIONS), second_moment=rule),
            partial(fedpac, local=partial(pac_adamw, **ORACLE_ADAMW_OPTIONS), name="v", counted=True, rule=rule),
            {"weighting": "samples"},
            expand={"theta_v": lambda layout, v, rule=rule: layout.curvature_blocks(rule).expand(v)},
        )
        for rule in ("hessian", "tensor")
    },
}
