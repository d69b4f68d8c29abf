"""The tail of a round: what clients send, packed in one pass, and the sum of it over clients in another.

A message is int8 or bfloat16 of `(y − x) + e`, for any spans of a row; what packing lost becomes the new `e` in the
same pass. With int8 and error feedback a parameter costs 17 bytes: 4 each for y, x, e and the new e, 1 for the payload.

The random numbers of stochastic rounding are Philox4x32-10, a function of (key, client, wire, position in the message):
the same bits on every backend, for any number of clients, threads or blocks of work. It is no cryptographic generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..dispatch import MISSING, ON_ROWS, choose, require, require_rows, require_scalars
from .reference import (
    accumulate_reference,
    encode_bf16_reference,
    encode_int8_reference,
    square_sums_reference,
)

if MISSING["cpp"] is None:
    for _op in ("encode_int8", "encode_bf16", "accumulate"):
        torch.library.register_fake(f"fedkernels::{_op}_cpp", lambda *arguments, **options: None)
    torch.library.register_fake(
        "fedkernels::square_sums_cpp", lambda rows: rows.new_empty(len(rows), dtype=torch.float64)
    )


@dataclass(frozen=True)
class Spans:
    """Which parts of its row each client sends, side by side.

    Args:
        begins: `[C, spans]` int64, where a part begins in the row.
        ends: `[C, spans]` int64, where it ends in the message; the last is the size of the message.
        size: of the longest message.
        stop: where the last part of any row ends.

    Example:
        >>> Spans.of([[slice(4, 6), slice(0, 3)], [slice(0, 3)]]).ends.tolist()
        [[2, 5], [3, 3]]
    """

    begins: Tensor
    ends: Tensor
    size: int
    stop: int

    @classmethod
    def of(cls, slices: Sequence[Sequence[slice]], device: torch.device | None = None) -> Spans:
        """The table for the slices of each client, which lie within its row.

        Raises:
            ValueError: slices of a client overlap, or one is not `0 ≤ start ≤ stop`.
        """
        stop = 0
        for c, mine in enumerate(slices):
            for part in mine:
                if not 0 <= part.start <= part.stop:
                    raise ValueError(f"client {c} sends {part.start} to {part.stop}, expected 0 ≤ start ≤ stop")
            # What a program keeps of a value that is sent twice would be chance.
            filled = sorted((part.start, part.stop) for part in mine if part.start < part.stop)
            for (first, end), (begin, last) in pairwise(filled):
                if begin < end:
                    raise ValueError(f"client {c} sends {first} to {end} and {begin} to {last}, which overlap")
            if filled:
                stop = max(stop, filled[-1][1])
        most = max(1, *map(len, slices))
        table = torch.zeros(2, len(slices), most, dtype=torch.int64)
        for c, mine in enumerate(slices):
            sizes = [s.stop - s.start for s in mine] + [0] * (most - len(mine))
            table[0, c, : len(mine)] = torch.tensor([s.start for s in mine])
            table[1, c] = torch.tensor(sizes).cumsum(0)
        size = int(table[1, :, -1].max())
        begins, ends = table.to(device or table.device)
        return cls(begins, ends, size, stop)


@dataclass(frozen=True)
class Draws:
    """What the random numbers of messages follow from.

    Args:
        key: 63 bits, one int64 on the device: of the seed and the round.
        clients: `[C]` int64 on the device, below 2³².
        wire: number of the wire.
    """

    key: Tensor
    clients: Tensor
    wire: int


def encode_int8(
    values: Tensor,
    *,
    draws: Draws,
    chunk: int,
    spans: Spans | None = None,
    x: Tensor | None = None,
    residual: Tensor | None = None,
    payload: Tensor | None = None,
    scale: Tensor | None = None,
    decoded: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Round what `C` clients send to 8 bits, stochastically, with a scale for each chunk of a message.

    `v = (values − x) + residual`, `s = max|v|/127` of a chunk, `q = ⌊v/s⌋ + [u < v/s − ⌊v/s⌋]` with u uniform, decoded
    as `s q`; `residual ← v − s q`. Each of `spans` is sent, what lies outside is neither read nor written. A scale lies
    within the normal numbers of float32, where larger values saturate; that of a chunk with NaN or infinity is NaN, and
    so is all that is decoded of it.

    Args:
        values: `[C, d]`, float32; float64 without Triton. Rows of this and the tensors below may be strided.
        draws: what u follows from.
        chunk: values that share a scale, fewer than 2³¹.
        spans: the parts of each row that are sent, in their order; None sends whole rows.
        x: `[d]`, subtracted from all rows.
        residual: `[C, d]`, what each client keeps, in place.
        payload: `[C, size]` int8, receives q.
        scale: `[C, ⌈size/chunk⌉]` float32, receives s.
        decoded: `[C, d]`, receives `s q`.
        backend: `reference`, `cpp` or `triton`; by default the fastest that can run.

    Raises:
        ValueError: a tensor is on another device, of another shape or dtype than above, `chunk` is not from 1 to
            2³¹ − 1, or `spans` end beyond a row.
        BackendError: the backend asked for cannot run here.

    Example:
        >>> decoded = torch.empty(1, 3)
        >>> draws = Draws(torch.tensor(0), torch.tensor([7]), 0)
        >>> encode_int8(torch.tensor([[127.0, -3.0, 0.0]]), draws=draws, chunk=256, decoded=decoded)
        >>> decoded.tolist()
        [[127.0, -3.0, 0.0]]

    Reference: Alistarh et al., QSGD: Communication-efficient SGD via gradient quantization and encoding, 2017
    (arXiv 1610.02132).
    """
    if not 1 <= chunk < 2**31:
        raise ValueError(f"chunk is {chunk}, expected 1 to {2**31 - 1}")
    size = _check(values, spans, x, residual, decoded)
    clients = len(values)
    require("key", draws.key, values, tuple(draws.key.shape), torch.int64)
    require_scalars("key", draws.key, values, 1)
    require("clients", draws.clients, values, (clients,), torch.int64)
    require_rows("payload", payload, values, (len(values), size), torch.int8, written=True)
    require_rows("scale", scale, values, (len(values), -(-size // chunk)), torch.float32, written=True)
    begins, ends = (None, None) if spans is None else (spans.begins, spans.ends)
    chosen = choose("encode_int8", ON_ROWS, values.device.type, values.dtype, tuple(values.shape), backend).backend
    arguments = (
        values, x, residual, begins, ends, chunk, draws.key, draws.clients, draws.wire, payload, scale, decoded,
    )  # fmt: skip
    if chosen == "triton":
        from .triton import encode_int8_triton

        encode_int8_triton(*arguments)
    elif chosen == "cpp":
        torch.ops.fedkernels.encode_int8_cpp(*arguments)
    else:
        encode_int8_reference(*arguments)


def encode_bf16(
    values: Tensor,
    *,
    spans: Spans | None = None,
    x: Tensor | None = None,
    residual: Tensor | None = None,
    payload: Tensor | None = None,
    decoded: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Round what `C` clients send to the nearest bfloat16, ties to even, as torch does.

    `v = (values − x) + residual`, `residual ← v − bf16(v)`. Arguments are those of `encode_int8`.

    Args:
        payload: `[C, size]` bfloat16, receives `bf16(v)`.
        decoded: `[C, d]`, receives it in the dtype of `values`.

    Raises:
        ValueError: a tensor is on another device, or of another shape or dtype than above.
        BackendError: the backend asked for cannot run here.

    Example:
        >>> decoded = torch.empty(1, 2)
        >>> encode_bf16(torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8]]), decoded=decoded)
        >>> decoded.tolist()
        [[1.0, 1.015625]]
    """
    size = _check(values, spans, x, residual, decoded)
    require_rows("payload", payload, values, (len(values), size), torch.bfloat16, written=True)
    begins, ends = (None, None) if spans is None else (spans.begins, spans.ends)
    chosen = choose("encode_bf16", ON_ROWS, values.device.type, values.dtype, tuple(values.shape), backend).backend
    arguments = (values, x, residual, begins, ends, payload, decoded)
    if chosen == "triton":
        from .triton import encode_bf16_triton

        encode_bf16_triton(*arguments)
    elif chosen == "cpp":
        torch.ops.fedkernels.encode_bf16_cpp(*arguments)
    else:
        encode_bf16_reference(*arguments)


def accumulate(sums: Tensor, rows: Tensor, weights: Tensor, *, backend: str | None = None) -> None:
    """`sums ← sums + w_c r_c`, in the order of clients: the bits of adding one row after another, in one pass over the
    sums.

    Args:
        sums: `[d]`, float32 or float64: what is computed in.
        rows: `[C, d]`, float32; float64 without Triton. Rows may be strided.
        weights: w, one or `[C]`; rows of weight 0 are not read, whatever is in them.
        backend: `reference`, `cpp` or `triton`; by default the fastest that can run.

    Raises:
        ValueError: a tensor is on another device, or of another shape or dtype than above.
        BackendError: the backend asked for cannot run here.

    Example:
        >>> sums = torch.ones(2)
        >>> accumulate(sums, torch.tensor([[1.0, 2.0], [torch.nan, 0.0]]), torch.tensor([0.5, 0.0]))
        >>> sums.tolist()
        [1.5, 2.0]
    """
    if rows.dim() != 2:
        raise ValueError(f"rows has shape {list(rows.shape)}, expected [C, d]")
    require_rows("rows", rows, rows, (len(rows), rows.shape[1]), torch.float32, torch.float64)
    require("sums", sums, rows, (rows.shape[1],), torch.float32, torch.float64)
    require_scalars("weights", weights, rows, len(rows))
    weights = weights.view(-1)
    chosen = choose("accumulate", ON_ROWS, rows.device.type, rows.dtype, tuple(rows.shape), backend).backend
    if chosen == "triton":
        from .triton import accumulate_triton

        accumulate_triton(sums, rows, weights)
    elif chosen == "cpp":
        torch.ops.fedkernels.accumulate_cpp(sums, rows, weights)
    else:
        accumulate_reference(sums, rows, weights)


def square_sums(rows: Tensor, *, backend: str | None = None) -> Tensor:
    """`Σ r²` of every row, `[C]` float64; not finite where a row is not.

    In Triton and C++ in an order that depends on `d` alone.

    Args:
        rows: `[C, d]`, float32; float64 without Triton. Rows may be strided.
        backend: `reference`, `cpp` or `triton`; by default the fastest that can run.

    Raises:
        ValueError: `rows` has another shape or dtype.
        BackendError: the backend asked for cannot run here.

    Example:
        >>> square_sums(torch.tensor([[3.0, 4.0], [1.0, 0.0]])).tolist()
        [25.0, 1.0]
    """
    if rows.dim() != 2:
        raise ValueError(f"rows has shape {list(rows.shape)}, expected [C, d]")
    require_rows("rows", rows, rows, (len(rows), rows.shape[1]), torch.float32, torch.float64)
    chosen = choose("square_sums", ON_ROWS, rows.device.type, rows.dtype, tuple(rows.shape), backend).backend
    if chosen == "triton":
        from .triton import square_sums_triton

        return square_sums_triton(rows)
    if chosen == "cpp":
        totals: Tensor = torch.ops.fedkernels.square_sums_cpp(rows)
        return totals
    return square_sums_reference(rows)


def _check(
    values: Tensor, spans: Spans | None, x: Tensor | None, residual: Tensor | None, decoded: Tensor | None
) -> int:
    """Refuse what a kernel cannot take; the size of the longest message."""
    if values.dim() != 2:
        raise ValueError(f"values has shape {list(values.shape)}, expected [C, d]")
    clients, d = values.shape
    require_rows("values", values, values, (clients, d), torch.float32, torch.float64)
    require("x", x, values, (d,), values.dtype)
    require_rows("residual", residual, values, (clients, d), values.dtype, written=True)
    require_rows("decoded", decoded, values, (clients, d), values.dtype, written=True)
    if spans is None:
        return d
    table = (clients, *spans.ends.shape[1:])
    require("spans.begins", spans.begins, values, table, torch.int64)
    require("spans.ends", spans.ends, values, table, torch.int64)
    if spans.stop > d:
        raise ValueError(f"spans end at {spans.stop}, expected within a row of {d}")
    return spans.size
