"""A federation as the equations see it: named tensors, clients, their steps and gradients, in float64 loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkernels.federated.batches import Batches
from fedkernels.federated.schedule import sample_cohort
from fedkernels.federated.settings import EngineSettings

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
        normal: standard normal tensors of a round, the same ones that the engine adds.
        cohort_seed: that the engine draws cohorts from.
    """

    module: nn.Module
    batches: Batches
    settings: EngineSettings
    hidden: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    heads: Mapping[str, int] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    normal: Callable[[int], Named] | None = None
    cohort_seed: int = 0

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
        return sample_cohort(s.sampling, self.cohort_seed, r, self.population, s.cohort).tolist()

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

    def full_gradient(self, y: Named, client: int) -> Named:
        """Over all samples of a client at once."""
        own = torch.from_numpy(self.batches.partition[client])
        inputs, targets = self.batches.objective.train_batch(own[None], None)
        return self.gradient(y, (inputs[0], targets[0], torch.ones(len(own), dtype=torch.float64)))

    def mean(self, sent: Mapping[int, Named]) -> Named:
        """The cohort's mean, weighted as the settings say."""
        weights = self.weights(sent)
        out = {n: torch.zeros_like(t) for n, t in next(iter(sent.values())).items()}
        for i, named in sent.items():
            for n in out:
                out[n] = out[n] + weights[i] * named[n]
        return out

    def mean_steps(self, clients: Iterable[int], r: int) -> float:
        """K of the equations that divide a mean update: the mean of what the clients did, weighted as the updates."""
        return sum(weight * len(list(self.steps(i, r))) for i, weight in self.weights(clients).items())

    def weights(self, clients: Iterable[int]) -> dict[int, float]:
        """As the settings say, and 1 together."""
        sizes = self.batches.partition.sizes
        own = {i: float(sizes[i]) if self.settings.weighting == "samples" else 1.0 for i in clients}
        return {i: weight / sum(own.values()) for i, weight in own.items()}

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
