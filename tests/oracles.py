"""Independent oracles: every algorithm in float64 loops over named tensors, straight from its equations.

No flat vector, no engine, no optimizer of the package. Only what must coincide is shared: which clients, which samples
and which blocks a round draws.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkernels.federated.batches import Batches
from fedkernels.federated.engine import EngineSettings
from fedkernels.federated.schedule import assign_blocks, sample_cohort

Named = dict[str, Tensor]
Direction = Callable[[Named, Named, int], Named]
"""`P(g)` from parameters y, gradients g and the local step k, from 1."""


@dataclass
class Federation:
    """A model and its clients, with what an equation needs to know about the parameters.

    Args:
        hidden: parameters that Muon orthogonalises.
        transposed: parameters stored as `(in, out)`.
        heads: query and key weights to their number of heads; a fused `(in, 3·dim)` weight holds both, then values.
        tokens: parameters `(1, tokens, dim)`.
    """

    module: nn.Module
    batches: Batches
    settings: EngineSettings
    hidden: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    heads: Mapping[str, int] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # The engine binds the module's parameters to its own memory.
        self.module = copy.deepcopy(self.module)

    def start(self) -> Named:
        return {n: p.detach().clone() for n, p in self.module.named_parameters() if p.requires_grad}

    def zeros(self) -> Named:
        return {n: torch.zeros_like(p) for n, p in self.start().items()}

    @property
    def population(self) -> int:
        return len(self.batches.partition)

    @property
    def nominal_steps(self) -> int:
        work = self.batches.work
        assert work.local_steps is not None
        longest = math.inf if work.local_epochs is None else work.local_epochs * max(
            math.ceil(n / work.batch_size) for n in self.batches.partition.sizes.tolist()
        )  # fmt: skip
        return int(min(work.local_steps, longest))

    def cohort(self, r: int) -> list[int]:
        s = self.settings
        return sample_cohort(s.sampling, s.seed, r, self.population, s.cohort).tolist()

    def lr(self, r: int) -> float:
        s = self.settings
        assert s.schedule == "cosine"
        return 0.5 * s.lr * (1 + math.cos(math.pi * r / s.rounds))

    def steps(self, client: int, r: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Inputs `[b, ...]`, targets `[b]` and sample weights `[b]` of a client's local steps."""
        for batch in self.batches.draw([client], r):
            weights = torch.ones(batch.targets.shape[1]) if batch.weights is None else batch.weights[0]
            yield batch.inputs[0], batch.targets[0], weights.double()

    def gradient(self, y: Named, step: tuple[Tensor, Tensor, Tensor]) -> Named:
        inputs, targets, weights = step
        leaves = {n: p.detach().requires_grad_() for n, p in y.items()}
        logits = functional_call(self.module, leaves, (inputs,))
        losses = logits.logsumexp(1) - logits[torch.arange(len(targets)), targets]
        grads = torch.autograd.grad((losses * weights).sum() / weights.sum(), list(leaves.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        scale = self.settings.clip_norm / norm if norm > self.settings.clip_norm else 1.0
        return {n: g * scale for n, g in zip(leaves, grads, strict=True)}

    def mean(self, sent: Mapping[int, Named]) -> Named:
        """The cohort's mean, weighted as the settings say."""
        sizes = self.batches.partition.sizes
        weights = {i: float(sizes[i]) if self.settings.weighting == "samples" else 1.0 for i in sent}
        total = sum(weights.values())
        out = {n: torch.zeros_like(t) for n, t in next(iter(sent.values())).items()}
        for i, named in sent.items():
            for n in out:
                out[n] = out[n] + weights[i] / total * named[n]
        return out

    def curvature(self, name: str, rule: str) -> Tensor:
        """The curvature block of every coordinate of a tensor, as integers of its shape."""
        p = self.module.get_parameter(name)
        owner = self.module.get_submodule(name.rpartition(".")[0])
        each = torch.arange(p.numel()).view(p.shape)
        if rule == "full":
            return each
        if rule == "tensor" or isinstance(owner, (nn.LayerNorm, nn.GroupNorm)):
            return torch.zeros_like(each)
        if p.dim() == 1:
            return each
        if name in self.tokens:
            return torch.arange(p.shape[1])[None, :, None].expand(p.shape)
        out_dim = p.shape[1] if name in self.transposed else p.shape[0]
        units = torch.arange(out_dim)
        if name in self.heads:
            if name in self.transposed:
                head_dim = out_dim // 3 // self.heads[name]
                qk = 2 * out_dim // 3
                units = torch.where(units < qk, units // head_dim, units - qk + 2 * self.heads[name])
            else:
                units = units // (out_dim // self.heads[name])
        if name in self.transposed:
            return units[None, :].expand(p.shape)
        return units.view(-1, *[1] * (p.dim() - 1)).expand(p.shape)

    def block_mean(self, v: Named, rule: str) -> Named:
        """Every coordinate of `v` replaced by the mean over its curvature block."""
        out = {}
        for n, t in v.items():
            labels = self.curvature(n, rule)
            out[n] = t.clone()
            for label in labels.unique():
                out[n][labels == label] = t[labels == label].mean()
        return out

    def curvature_blocks(self, rule: str) -> int:
        return sum(len(self.curvature(n, rule).unique()) for n in self.start())


def minus(a: Named, b: Named) -> Named:
    return {n: a[n] - b[n] for n in a}


def newton_schulz(u: Tensor, steps: int = 5) -> Tensor:
    """Quintic steps on one matrix."""
    if u.shape[0] > u.shape[1]:
        return newton_schulz(u.T, steps).T
    o = u / (u.square().sum().sqrt() + 1e-7)
    for _ in range(steps):
        a = o @ o.T
        o = 3.4445 * o - 4.7750 * a @ o + 2.0315 * a @ a @ o
    return o


def orthogonalised(f: Federation, name: str, u: Tensor) -> Tensor:
    """`NS₅(u)·√max(1, out/in)` of one parameter as a matrix `(out, in)`."""
    if name in f.transposed:
        matrix = u.T
    elif name in f.tokens:
        matrix = u[0]
    else:
        matrix = u.flatten(1)
    o = newton_schulz(matrix) * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))
    return (o.T if name in f.transposed else o).reshape(u.shape)


def sgd(f: Federation, *, momentum: float = 0.0, decay: float = 0.0) -> Direction:
    m = f.zeros()

    def direction(y: Named, g: Named, k: int) -> Named:
        for n in y:
            m[n] = momentum * m[n] + g[n] + decay * y[n]
        return dict(m)

    return direction


def adamw(
    f: Federation,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decay: float = 0.01,
    v: Named | None = None,
    seen: int = 0,
) -> Direction:
    """`v` is updated in place; it has seen that many steps."""
    m = f.zeros()
    v = f.zeros() if v is None else v

    def direction(y: Named, g: Named, k: int) -> Named:
        p = {}
        for n in y:
            m[n] = betas[0] * m[n] + (1 - betas[0]) * g[n]
            v[n] = betas[1] * v[n] + (1 - betas[1]) * g[n] ** 2
            m_hat, v_hat = m[n] / (1 - betas[0] ** k), v[n] / (1 - betas[1] ** (seen + k))
            p[n] = m_hat / (v_hat.sqrt() + eps) + decay * y[n]
        return p

    return direction


def muon(
    f: Federation, *, beta: float = 0.98, decay: float = 0.01, multiplier: float = 1.0, M: Named | None = None
) -> Direction:
    """`M` is updated in place."""
    M = f.zeros() if M is None else M
    other = adamw(f, betas=(0.9, 0.95), eps=1e-10, decay=decay)

    def direction(y: Named, g: Named, k: int) -> Named:
        p = other(y, g, k)
        for n in f.hidden:
            M[n] = beta * M[n] + (1 - beta) * g[n]
            u = (1 - beta) * g[n] + beta * M[n]
            p[n] = multiplier * orthogonalised(f, n, u) + decay * y[n]
        return p

    return direction


def fedavg(
    f: Federation,
    rounds: int,
    *,
    local: Callable[[Federation], Direction] = sgd,
    server_lr: float = 1.0,
    prox_mu: float = 0.0,
    server_momentum: float = 0.0,
) -> dict[str, Any]:
    x, v = f.start(), f.zeros()
    for r in range(rounds):
        deltas = {}
        for i in f.cohort(r):
            y, direction = dict(x), local(f)
            for k, step in enumerate(f.steps(i, r), start=1):
                g = f.gradient(y, step)
                p = direction(y, {n: g[n] + prox_mu * (y[n] - x[n]) for n in y}, k)
                y = {n: y[n] - f.lr(r) * p[n] for n in y}
            deltas[i] = minus(y, x)
        delta = f.mean(deltas)
        v = {n: server_momentum * v[n] + delta[n] for n in v}
        x = {n: x[n] + server_lr * v[n] for n in x}
    return {"x": x, "v": v}


def scaffold(
    f: Federation, rounds: int, *, local: Callable[[Federation], Direction] = sgd, server_lr: float = 1.0
) -> dict[str, Any]:
    x, c = f.start(), f.zeros()
    kept: dict[int, Named] = {}
    for r in range(rounds):
        deltas, changes = {}, {}
        for i in f.cohort(r):
            c_i = kept.get(i, f.zeros())
            y, direction, taken = dict(x), local(f), 0
            for k, step in enumerate(f.steps(i, r), start=1):
                g = f.gradient(y, step)
                p = direction(y, {n: g[n] - c_i[n] + c[n] for n in y}, k)
                y = {n: y[n] - f.lr(r) * p[n] for n in y}
                taken = k
            new = {n: c_i[n] - c[n] + (x[n] - y[n]) / (taken * f.lr(r)) for n in x}
            deltas[i], changes[i], kept[i] = minus(y, x), minus(new, c_i), new
        delta, change = f.mean(deltas), f.mean(changes)
        x = {n: x[n] + server_lr * delta[n] for n in x}
        c = {n: c[n] + len(deltas) / f.population * change[n] for n in c}
    return {"x": x, "c": c, "c_i": kept}


def local_adamw(f: Federation, rounds: int, **options: Any) -> dict[str, Any]:
    return {"x": fedavg(f, rounds, local=partial(adamw, **options))["x"]}


def local_muon(f: Federation, rounds: int, **options: Any) -> dict[str, Any]:
    return {"x": fedavg(f, rounds, local=partial(muon, **options))["x"]}


def fedadamw(
    f: Federation, rounds: int, *, second_moment: str = "hessian", alpha: float = 0.5, **options: Any
) -> dict[str, Any]:
    """`v_bar` is returned expanded, every coordinate with the value of its block, unless nothing of v travels."""
    x, G, v_bar = f.start(), f.zeros(), f.zeros()
    K = f.nominal_steps
    for r in range(rounds):
        deltas, moments = {}, {}
        for i in f.cohort(r):
            y, v = dict(x), dict(v_bar)
            direction = adamw(f, v=v, seen=0 if second_moment == "none" else r * K, **options)
            for k, step in enumerate(f.steps(i, r), start=1):
                p = direction(y, f.gradient(y, step), k)
                y = {n: y[n] - f.lr(r) * (p[n] + alpha * G[n]) for n in y}
            deltas[i], moments[i] = minus(y, x), v
        delta = f.mean(deltas)
        x = {n: x[n] + delta[n] for n in x}
        G = {n: -delta[n] / (K * f.lr(r)) for n in x}
        if second_moment != "none":
            v_bar = f.block_mean(f.mean(moments), second_moment)
    return {"x": x, "G": G} | ({} if second_moment == "none" else {"v_bar": v_bar})


def fedmuon(
    f: Federation, rounds: int, *, alpha: float = 0.5, share_momentum: bool = True, **options: Any
) -> dict[str, Any]:
    """`M_bar` holds the hidden matrices only, and is not there where momentum is not shared."""
    x, G = f.start(), f.zeros()
    M_bar = {n: torch.zeros_like(x[n]) for n in f.hidden}
    K = f.nominal_steps
    for r in range(rounds):
        deltas, momenta = {}, {}
        for i in f.cohort(r):
            y, M = dict(x), dict(M_bar)
            direction = muon(f, M=M, **options)
            for k, step in enumerate(f.steps(i, r), start=1):
                p = direction(y, f.gradient(y, step), k)
                y = {n: y[n] - f.lr(r) * ((1 - alpha) * p[n] + alpha * G[n]) for n in y}
            deltas[i], momenta[i] = minus(y, x), M
        delta = f.mean(deltas)
        x = {n: x[n] + delta[n] for n in x}
        G = {n: -delta[n] / (K * f.lr(r)) for n in x}
        if share_momentum:
            M_bar = f.mean(momenta)
    return {"x": x, "G": G, "M_bar": M_bar} if share_momentum else {"x": x, "G": G}


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
