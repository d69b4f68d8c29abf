"""The tail of a round against the same job operation by operation, and compiled: messages, sums, clipped sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from shapes import Workload
from torch import Tensor
from turns import Job, Variant

from fedkernels.kernels.round_tail import Draws, accumulate, encode_bf16, encode_int8, square_sums

CHUNK, CLIP = 256, 1.0
CHECKED = 100_096  # leading columns that are compared with float64, whole chunks
OPS = ("round_tail",)
PEAK_BYTES = 50  # per parameter that a job holds at most, temporaries of the slowest variant included
# The jobs, and their FLOP per parameter: counted in the equations, without what random numbers cost.
FLOPS = {"int8": 10, "bf16": 4, "sum": 2, "clip": 4}


class Problem:
    """The rows `[C, d]` and sums `[d]` of a round, on which all variants work in turns."""

    def __init__(self, clients: int, d: int, device: torch.device) -> None:
        self.y, self.residual, self.decoded = (torch.empty(clients, d, device=device) for _ in range(3))
        self.x, self.sums = torch.empty(d, device=device), torch.empty(d, dtype=torch.float64, device=device)
        self.payload = torch.empty(clients, d, dtype=torch.int8, device=device)
        self.scale = torch.empty(clients, -(-d // CHUNK), device=device)
        self.narrow = torch.empty(clients, d, dtype=torch.bfloat16, device=device)
        self.draws = Draws(torch.tensor(0xD1CE, device=device), torch.arange(clients, device=device), 0)
        self.weights = torch.arange(1, clients + 1, dtype=torch.float64, device=device)
        self.reset()

    def reset(self) -> None:
        generator = torch.Generator(self.y.device).manual_seed(0)
        for tensor in (self.y, self.residual, self.x):
            tensor.normal_(0, 1e-2, generator=generator)
        self.sums.zero_()
        self.decoded.fill_(torch.nan)


def unfused_int8(p: Problem, y: Tensor, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    v = (y - x) + residual
    chunks = torch.nn.functional.pad(v, (0, -v.shape[1] % CHUNK)).view(len(v), -1, CHUNK)
    limits = torch.finfo(torch.float32)
    scale = (chunks.abs().amax(2, keepdim=True) / 127).clamp(limits.tiny, limits.max / 128)
    q = (chunks / scale).add_(torch.rand_like(chunks)).floor_().clamp_(-127, 127).to(torch.int8)
    received = (q * scale).flatten(1)[:, : v.shape[1]]
    residual.copy_(v - received)
    return q.flatten(1)[:, : v.shape[1]], scale.flatten(1)


def unfused_bf16(y: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    v = (y - x) + residual
    narrow = v.bfloat16()
    residual.copy_(v - narrow.float())
    return narrow


def variants(p: Problem, job: str) -> list[Variant]:
    """Ways to do a job, ours first. Each returns what is checked."""
    C, size = len(p.y), p.y.numel()

    def with_compiled(
        fused: float, ours: Callable[[], Any], unfused: float, theirs: Callable[..., Any], *given: Any
    ) -> list[Variant]:
        # Without it the compiler leaves out roundings, and with them what error feedback is about.
        compiled = torch.compile(theirs, options={"emulate_precision_casts": True})
        return [
            Variant("fedkernels", ours, size * fused),
            Variant("operation by operation", lambda: theirs(*given), size * unfused),
            Variant("the same, torch.compile", lambda: compiled(*given), size * fused, foreign=True),
        ]

    if job == "int8":

        def int8() -> tuple[Tensor, Tensor]:
            encode_int8(p.y, draws=p.draws, chunk=CHUNK, x=p.x, residual=p.residual, payload=p.payload, scale=p.scale)
            return p.payload, p.scale

        return with_compiled(
            13 + 4 / C, int8, 102 + 4 / C, lambda y, x, e: unfused_int8(p, y, x, e), p.y, p.x, p.residual
        )
    if job == "bf16":

        def bf16() -> Tensor:
            encode_bf16(p.y, x=p.x, residual=p.residual, payload=p.narrow)
            return p.narrow

        return with_compiled(14 + 4 / C, bf16, 52 + 4 / C, unfused_bf16, p.y, p.x, p.residual)
    if job == "sum":

        def total() -> Tensor:
            accumulate(p.sums, p.y, p.weights)
            return p.sums

        def one_by_one(sums: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
            for row, weight in zip(rows, weights, strict=True):
                sums.add_(row * weight)
            return sums

        return with_compiled(4 + 16 / C, total, 8 + 20, one_by_one, p.sums, p.y, p.weights)

    def clip() -> Tensor:
        norms = square_sums(p.y).sqrt()
        accumulate(p.sums, p.y, (CLIP / norms).clamp(max=1))
        return p.sums

    def clip_one_by_one(sums: Tensor, rows: Tensor) -> Tensor:
        for row in rows:
            norm = torch.linalg.vector_norm(row, dtype=torch.float64)
            sums += row.double() * (CLIP / norm).clamp(max=1)
        return sums

    return with_compiled(8 + 16 / C, clip, 4 + 12 + 16 + 24, clip_one_by_one, p.sums, p.y)


def error(p: Problem, job: str, variant: Variant) -> float:
    """The largest error, as a share of what the scale of a chunk or rounding allows."""
    y, x, before = (tensor[..., :CHECKED].double().clone() for tensor in (p.y, p.x, p.residual))
    found = variant.run()
    if job in ("int8", "bf16"):
        v, lost = (y - x) + before, p.residual[:, :CHECKED].double()
        if job == "int8":
            q, scale = found
            unit = scale[:, : y.shape[1] // CHUNK + 1].double().repeat_interleave(CHUNK, 1)[:, : y.shape[1]]
            received, allowed = q[:, : y.shape[1]].double() * unit, 1.001
        else:
            unit, received, allowed = v.abs() + 1e-3, found[:, : y.shape[1]].double(), 2.0**-8
        # Nothing is lost but what the residual keeps, and that is below the unit.
        balance, largest = ((v - received - lost) / unit).abs().max().item(), (lost / unit).abs().max().item()
        # On average stochastic rounding loses nothing: a step's share has a standard deviation of half at most, and of
        # the mean of n six of them are a chance of 2·10⁻⁹.
        mean = (lost / unit).mean().abs().item() / (6 * 0.5 / lost.numel() ** 0.5) if job == "int8" else 0.0
        return max(balance / 1e-3, largest / allowed, mean)
    factors = p.weights if job == "sum" else (CLIP / p.y.double().norm(dim=1)).clamp(max=1)
    expected = (factors[:, None] * y).sum(0)
    return ((found[: len(expected)] - expected).abs().max() / expected.abs().max()).item() / 1e-6


def jobs(op: str, work: Workload, dtype: torch.dtype, device: torch.device) -> Iterator[Job]:
    """Messages of both codecs, sums, clipped sums; all in float32."""
    p = Problem(work.clients, work.d, device)
    size = work.clients * work.d
    for job, flops in FLOPS.items():
        ways = variants(p, job)
        yield Job(
            facts={"op": f"{op} {job}", "shape": work.name, "dtype": "float32"},
            variants=ways,
            errors=lambda variant, job=job: {"what is allowed": error(p, job, variant)},
            flops=flops * size,
            bytes=ways[0].bytes,
            ceiling=lambda: p.decoded.copy_(p.y),
            ceiling_work=8 * size,
            limit="memory",
            prepare=p.reset,
        )
