"""Messages of clients and sums over clients in plain PyTorch: what the kernels must equal, bit for bit.

They are operators of their own, since torch.compile would leave out a rounding to bfloat16 and add in another order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: Tensor) -> tuple[Tensor, ...]:
    """The four words of Philox4x32-10, as int64.

    Args:
        counter: four words, int64.
        key: 64 bits, one int64.

    Reference: Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    a, b, c, d = counter
    low, high = key & WORD, (key >> 32) & WORD
    for _ in range(10):
        # Products of 64 bits: their sign is of no consequence once they are cut into words.
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = ((q >> 32) & WORD) ^ b ^ low, q & WORD, ((p >> 32) & WORD) ^ d ^ high, p & WORD
        low, high = (low + 0x9E3779B9) & WORD, (high + 0xBB67AE85) & WORD
    return a, b, c, d


def uniform(size: int, key: Tensor, client: Tensor, wire: int) -> Tensor:
    """u in (0, 1) for every position of a message, `[size]` float32: odd multiples of 2⁻²⁴."""
    i = torch.arange(-(-size // 4), device=key.device)
    words = philox((i & WORD, i >> 32, client.expand_as(i), torch.full_like(i, wire)), key)
    return ((torch.stack(words, 1).flatten()[:size] >> 8) | 1).float() * 2.0**-24


def int8_levels(values: Tensor, u: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """`q [size]` and the scales of its chunks: `s = max|v|/127`, `q = ⌊v/s⌋`, and one more where `u < v/s − ⌊v/s⌋`."""
    chunks = torch.nn.functional.pad(values, (0, -len(values) % chunk)).view(-1, chunk)
    limits, largest = torch.finfo(torch.float32), chunks.abs().amax(1)
    # From the smallest normal number on: a chunk of zeros divides by something, and tinier values stay unbiased.
    scale = (largest / 127).clamp(limits.tiny, limits.max / 128).float()
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    t = (chunks / scale.to(values.dtype).view(-1, 1)).flatten()[: len(values)]
    q = t.floor() + (u.to(t.dtype) < t - t.floor()).to(t.dtype)
    return q.clamp(-127, 127).nan_to_num(0).to(torch.int8), scale


def int8_values(q: Tensor, scale: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """`s q`, what the server makes of a message."""
    return q.to(dtype) * scale.to(dtype).repeat_interleave(chunk)[: len(q)]


def parts(values: Tensor, begins: Tensor | None, ends: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Every client with the columns of its row that it sends, in the order they are sent."""
    for c in range(len(values)):
        if begins is None or ends is None:
            yield c, torch.arange(values.shape[1], device=values.device)
        else:
            sizes = ends[c].diff(prepend=ends.new_zeros(1))
            shifts = (begins[c] - (ends[c] - sizes)).repeat_interleave(sizes)
            yield c, torch.arange(len(shifts), device=values.device) + shifts


def _meant(values: Tensor, x: Tensor | None, residual: Tensor | None, c: int, at: Tensor) -> Tensor:
    v = values[c, at]
    if x is not None:
        v = v - x[at]
    return v if residual is None else v + residual[c, at]


def _receive(received: Tensor, v: Tensor, residual: Tensor | None, decoded: Tensor | None, c: int, at: Tensor) -> None:
    if decoded is not None:
        decoded[c, at] = received
    if residual is not None:
        residual[c, at] = v - received


@torch.library.custom_op("fedkernels::encode_int8_reference", mutates_args=("residual", "payload", "scale", "decoded"))
def encode_int8_reference(
    values: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    begins: Tensor | None,
    ends: Tensor | None,
    chunk: int,
    key: Tensor,
    clients: Tensor,
    wire: int,
    payload: Tensor | None,
    scale: Tensor | None,
    decoded: Tensor | None,
) -> None:
    for c, at in parts(values, begins, ends):
        v = _meant(values, x, residual, c, at)
        q, s = int8_levels(v, uniform(len(v), key, clients[c], wire), chunk)
        if payload is not None:
            payload[c, : len(q)] = q
        if scale is not None:
            scale[c, : len(s)] = s
        _receive(int8_values(q, s, chunk, v.dtype), v, residual, decoded, c, at)


@torch.library.custom_op("fedkernels::encode_bf16_reference", mutates_args=("residual", "payload", "decoded"))
def encode_bf16_reference(
    values: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    begins: Tensor | None,
    ends: Tensor | None,
    payload: Tensor | None,
    decoded: Tensor | None,
) -> None:
    for c, at in parts(values, begins, ends):
        v = _meant(values, x, residual, c, at)
        rounded = v.bfloat16()
        if payload is not None:
            payload[c, : len(rounded)] = rounded
        _receive(rounded.to(v.dtype), v, residual, decoded, c, at)


@torch.library.custom_op("fedkernels::accumulate_reference", mutates_args=("sums",))
def accumulate_reference(sums: Tensor, rows: Tensor, weights: Tensor) -> None:
    for row, weight in zip(rows, weights.to(sums.dtype).expand(len(rows)), strict=True):
        # Not a product with zero: what a client of weight 0 sent may be NaN.
        sums.copy_(torch.where(weight == 0, sums, sums + weight * row.to(sums.dtype)))


@torch.library.custom_op("fedkernels::square_sums_reference", mutates_args=())
def square_sums_reference(rows: Tensor) -> Tensor:
    sums = rows.new_empty(len(rows), dtype=torch.float64)
    for c, row in enumerate(rows):  # one by one: how a reduction adds depends on the shape of all
        sums[c] = row.double().square().sum()
    return sums


for _operator in (encode_int8_reference, encode_bf16_reference, accumulate_reference):
    _operator.register_fake(lambda *arguments: None)


@square_sums_reference.register_fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty(len(rows), dtype=torch.float64)
