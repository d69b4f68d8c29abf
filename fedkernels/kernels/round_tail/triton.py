"""The tail of a round in Triton: a launch for the messages of all clients, and one for their sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fused_sam.triton import PARTS, partial_sums, total_of
from ..tiles import OPTIONS, TILE

# Four elements a thread: random numbers need registers.
INT8_TILE = 512
# Scales are normal numbers of float32, of which 128 are one too.
LEAST = tl.constexpr(torch.finfo(torch.float32).tiny)
MOST = tl.constexpr(torch.finfo(torch.float32).max / 128)


@triton.jit
def locate(begins_ptr, ends_ptr, spans, p, first, end):
    """The columns of a row where positions `p`, all in `[first, end)`, of its message lie."""
    low, high = 0, spans - 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(ends_ptr + middle) <= first:
            low = middle + 1
        else:
            high = middle
    before = tl.load(ends_ptr + low - 1, low > 0, other=0)
    cols = p + (tl.load(begins_ptr + low) - before)
    while low < spans - 1:
        before = tl.load(ends_ptr + low)
        low = tl.where(before < end, low + 1, spans)  # no further span begins in this tile
        if low < spans:
            cols = tl.where(p >= before, p + (tl.load(begins_ptr + low) - before), cols)
    return cols


@triton.jit
def place_message(clients, begins_ptr, ends_ptr, spans, d, SIZE: tl.constexpr):
    """This program's client, the first position of its part of the message, the size of the message, its spans."""
    pid = tl.program_id(0)
    client = (pid % clients).to(tl.int64)
    first = (pid // clients).to(tl.int64) * SIZE
    if ends_ptr is None:
        return client, first, d, begins_ptr, ends_ptr
    else:
        begins_ptr += client * spans
        ends_ptr += client * spans
        return client, first, tl.load(ends_ptr + spans - 1), begins_ptr, ends_ptr


@triton.jit
def meant(values_ptr, x_ptr, residual_ptr, cols, inside):
    """`(values − x) + residual`, and 0 outside."""
    v = tl.load(values_ptr + cols, inside)
    if x_ptr is not None:
        v -= tl.load(x_ptr + cols, inside)
    if residual_ptr is not None:
        v += tl.load(residual_ptr + cols, inside)
    return v if inside is None else tl.where(inside, v, 0.0)


@triton.jit
def receive(received, v, residual_ptr, decoded_ptr, cols, inside):
    """Store what the server makes of values `v`, and what it lost of them."""
    if decoded_ptr is not None:
        tl.store(decoded_ptr + cols, received, inside)
    if residual_ptr is not None:
        tl.store(residual_ptr + cols, v - received, inside)


@triton.jit
def words(key, counter, client, wire):
    low = counter.to(tl.uint32)
    zero = low * 0
    return tl.philox(key, low, (counter >> 32).to(tl.uint32), zero + client.to(tl.uint32), zero + wire.to(tl.uint32))


@triton.jit
def uniform(key, client, wire, first, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """u in (0, 1) of positions `first + chunk · CHUNK + column`, `[CHUNKS, WIDTH]`: odd multiples of 2⁻²⁴."""
    starts = first + tl.arange(0, CHUNKS)[:, None] * CHUNK
    if CHUNK % 4 == 0:  # the four words of a counter are for neighbours in a chunk
        a, b, c, d = words(key, starts // 4 + tl.arange(0, WIDTH // 4)[None, :], client, wire)
        bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (CHUNKS, WIDTH))
    else:
        p = starts + tl.arange(0, WIDTH)[None, :]
        a, b, c, d = words(key, p // 4, client, wire)
        word = p % 4
        bits = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
    return ((bits.to(tl.uint32, bitcast=True) >> 8) | 1).to(tl.int32).to(tl.float32) * (1.0 / 16777216)


@triton.jit
def largest(v):
    """The largest magnitude of every row, as an integer: so compared, NaN is larger than any number."""
    return tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)


@triton.jit
def scale_of(bits):
    """`max|v|/127` within the normal numbers; NaN where a value is not finite."""
    scale = tl.minimum(tl.maximum(tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0), LEAST), MOST)
    return tl.where(bits < 0x7F800000, scale, float("nan"))


@triton.jit
def store_levels(v, u, scale, residual_ptr, decoded_ptr, payload_ptr, cols, p, inside):
    known = scale == scale
    t = tl.where(known, tl.div_rn(v, tl.where(known, scale, 1.0)), 0.0)
    low = tl.floor(t)
    q = tl.minimum(tl.maximum(low + tl.where(u < t - low, 1.0, 0.0), -127.0), 127.0).to(tl.int32)
    if payload_ptr is not None:
        tl.store(payload_ptr + p, q.to(tl.int8), inside)
    receive(q.to(tl.float32) * scale, v, residual_ptr, decoded_ptr, cols, inside)


@triton.jit
def int8_tile(
    values_ptr, x_ptr, residual_ptr, decoded_ptr, payload_ptr, scale_ptr, key, client, wire, first, p, cols, inside,
    size, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Whole chunks, a row each."""
    v = meant(values_ptr, x_ptr, residual_ptr, cols, inside)
    scale = scale_of(largest(v))
    if scale_ptr is not None:
        starts = first + tl.arange(0, CHUNKS) * CHUNK
        tl.store(scale_ptr + starts // CHUNK, scale, starts < size)
    u = uniform(key, client, wire, first, CHUNK, CHUNKS, WIDTH)
    scales = tl.broadcast_to(scale[:, None], v.shape)
    store_levels(v, u, scales, residual_ptr, decoded_ptr, payload_ptr, cols, p, inside)


@triton.jit(do_not_specialize=["wire"])
def int8_kernel(
    values_ptr, x_ptr, residual_ptr, begins_ptr, ends_ptr, key_ptr, clients_ptr, payload_ptr, scale_ptr, decoded_ptr,
    clients, d, spans, wire, values_stride, residual_stride, payload_stride, scale_stride, decoded_stride,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    client, first, size, begins_ptr, ends_ptr = place_message(clients, begins_ptr, ends_ptr, spans, d, CHUNKS * CHUNK)
    if first >= size:
        return
    values_ptr += client * values_stride
    if residual_ptr is not None:
        residual_ptr += client * residual_stride
    if payload_ptr is not None:
        payload_ptr += client * payload_stride
    if scale_ptr is not None:
        scale_ptr += client * scale_stride
    if decoded_ptr is not None:
        decoded_ptr += client * decoded_stride
    key, of = tl.load(key_ptr), tl.load(clients_ptr + client)
    column = tl.arange(0, WIDTH)[None, :]
    p = first + tl.arange(0, CHUNKS)[:, None] * CHUNK + column
    if CHUNK <= WIDTH:
        cols = p
        if ends_ptr is not None:
            cols = locate(begins_ptr, ends_ptr, spans, p, first, first + CHUNKS * CHUNK)
        if (CHUNK == WIDTH) & (first + CHUNKS * CHUNK <= size):
            int8_tile(
                values_ptr, x_ptr, residual_ptr, decoded_ptr, payload_ptr, scale_ptr, key, of, wire, first, p, cols,
                None, size, CHUNK, CHUNKS, WIDTH,
            )  # fmt: skip
        else:
            inside = (column < CHUNK) & (p < size)
            int8_tile(
                values_ptr, x_ptr, residual_ptr, decoded_ptr, payload_ptr, scale_ptr, key, of, wire, first, p, cols,
                inside, size, CHUNK, CHUNKS, WIDTH,
            )  # fmt: skip
    else:  # one long chunk, read twice
        end = tl.minimum(first + CHUNK, size)
        most = tl.zeros((1,), tl.int32)
        for k in range(0, CHUNK, WIDTH):
            cols = p + k
            if ends_ptr is not None:
                cols = locate(begins_ptr, ends_ptr, spans, p + k, first + k, first + k + WIDTH)
            most = tl.maximum(most, largest(meant(values_ptr, x_ptr, residual_ptr, cols, p + k < end)))
        scale = scale_of(most)
        if scale_ptr is not None:
            tl.store(scale_ptr + first // CHUNK + tl.arange(0, 1), scale)
        for k in range(0, CHUNK, WIDTH):
            cols = p + k
            if ends_ptr is not None:
                cols = locate(begins_ptr, ends_ptr, spans, p + k, first + k, first + k + WIDTH)
            v = meant(values_ptr, x_ptr, residual_ptr, cols, p + k < end)
            # In steps of 4: a long chunk may begin within the words of a counter.
            u = uniform(key, of, wire, first + k, 4 if CHUNK % 4 == 0 else 1, 1, WIDTH)
            store_levels(
                v, u, tl.broadcast_to(scale[:, None], v.shape), residual_ptr, decoded_ptr, payload_ptr, cols, p + k,
                p + k < end,
            )  # fmt: skip


@triton.jit
def bf16_bits(v):
    """To the nearest, ties to even; every NaN becomes the one that torch writes."""
    bits = v.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)


@triton.jit
def bf16_tile(values_ptr, x_ptr, residual_ptr, decoded_ptr, payload_ptr, p, cols, inside):
    v = meant(values_ptr, x_ptr, residual_ptr, cols, inside)
    bits = bf16_bits(v)
    if payload_ptr is not None:
        tl.store(payload_ptr + p, bits.to(tl.uint16).to(tl.int16, bitcast=True), inside)
    receive((bits << 16).to(tl.float32, bitcast=True), v, residual_ptr, decoded_ptr, cols, inside)


@triton.jit
def bf16_kernel(
    values_ptr, x_ptr, residual_ptr, begins_ptr, ends_ptr, payload_ptr, decoded_ptr,
    clients, d, spans, values_stride, residual_stride, payload_stride, decoded_stride, SIZE: tl.constexpr,
):  # fmt: skip
    client, first, size, begins_ptr, ends_ptr = place_message(clients, begins_ptr, ends_ptr, spans, d, SIZE)
    if first >= size:
        return
    values_ptr += client * values_stride
    if residual_ptr is not None:
        residual_ptr += client * residual_stride
    if payload_ptr is not None:
        payload_ptr += client * payload_stride
    if decoded_ptr is not None:
        decoded_ptr += client * decoded_stride
    p = first + tl.arange(0, SIZE)
    cols = p
    if ends_ptr is not None:
        cols = locate(begins_ptr, ends_ptr, spans, p, first, first + SIZE)
    if first + SIZE <= size:
        bf16_tile(values_ptr, x_ptr, residual_ptr, decoded_ptr, payload_ptr, p, cols, None)
    else:
        bf16_tile(values_ptr, x_ptr, residual_ptr, decoded_ptr, payload_ptr, p, cols, p < size)


@triton.jit
def sums_tile(sums_ptr, rows_ptr, weights_ptr, cols, inside, clients, rows_stride):
    sums = tl.load(sums_ptr + cols, inside)
    row_ptr = rows_ptr + cols
    for client in range(clients):
        weight = tl.load(weights_ptr + client).to(sums.dtype)
        if weight != 0:
            sums += weight * tl.load(row_ptr, inside).to(sums.dtype)
        row_ptr += rows_stride  # an offset of all rows before would need 64 bits
    tl.store(sums_ptr + cols, sums, inside)


@triton.jit
def accumulate_kernel(sums_ptr, rows_ptr, weights_ptr, clients, d, rows_stride, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * SIZE
    cols = first + tl.arange(0, SIZE)
    if first + SIZE <= d:
        sums_tile(sums_ptr, rows_ptr, weights_ptr, cols, None, clients, rows_stride)
    else:
        sums_tile(sums_ptr, rows_ptr, weights_ptr, cols, cols < d, clients, rows_stride)


@triton.jit
def total_kernel(partial_ptr, total_ptr, parts, PARTS: tl.constexpr):
    client = tl.program_id(0)
    tl.store(total_ptr + client, total_of(partial_ptr, client, parts, PARTS))


def stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def tile_of(chunk: int) -> tuple[int, int]:
    """Chunks of a program, and columns of a tile: together `INT8_TILE` elements."""
    width = min(INT8_TILE, max(4, triton.next_power_of_2(chunk)))
    return INT8_TILE // width, width


@torch.library.custom_op("fedkernels::encode_int8_triton", mutates_args=("residual", "payload", "scale", "decoded"))
def encode_int8_triton(
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
    rows, d = values.shape
    chunks, width = tile_of(chunk)
    int8_kernel[(rows * triton.cdiv(d, chunks * chunk),)](
        values, x, residual, begins, ends, key, clients, payload, scale, decoded,
        rows, d, 0 if ends is None else ends.shape[1], wire,
        stride(values), stride(residual), stride(payload), stride(scale), stride(decoded),
        chunk, chunks, width, **OPTIONS,
    )  # fmt: skip


@torch.library.custom_op("fedkernels::encode_bf16_triton", mutates_args=("residual", "payload", "decoded"))
def encode_bf16_triton(
    values: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    begins: Tensor | None,
    ends: Tensor | None,
    payload: Tensor | None,
    decoded: Tensor | None,
) -> None:
    rows, d = values.shape
    bits = None if payload is None else payload.view(torch.int16)
    bf16_kernel[(rows * triton.cdiv(d, TILE),)](
        values, x, residual, begins, ends, bits, decoded, rows, d, 0 if ends is None else ends.shape[1],
        stride(values), stride(residual), stride(payload), stride(decoded), TILE, **OPTIONS,
    )  # fmt: skip


@torch.library.custom_op("fedkernels::accumulate_triton", mutates_args=("sums",))
def accumulate_triton(sums: Tensor, rows: Tensor, weights: Tensor) -> None:
    clients, d = rows.shape
    # One weight for all would be a second kernel, for which ptxas takes a stack where rows are not aligned.
    weights = weights.expand(clients).contiguous()
    accumulate_kernel[(triton.cdiv(d, TILE),)](sums, rows, weights, clients, d, rows.stride(0), TILE, **OPTIONS)


@torch.library.custom_op("fedkernels::square_sums_triton", mutates_args=())
def square_sums_triton(rows: Tensor) -> Tensor:
    partial = partial_sums(rows.contiguous())
    total = rows.new_empty(len(rows), dtype=torch.float64)
    total_kernel[(len(rows),)](partial, total, partial.shape[1], PARTS, **OPTIONS)
    return total


for _operator in (encode_int8_triton, encode_bf16_triton, accumulate_triton):
    _operator.register_fake(lambda *arguments: None)


@square_sums_triton.register_fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty(len(rows), dtype=torch.float64)
