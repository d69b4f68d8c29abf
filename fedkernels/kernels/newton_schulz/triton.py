"""Newton–Schulz in Triton: products of float16 added up in float32, around iterates that stay float32.

Short sides up to 128 run through all steps in one program a matrix, which keeps the products of the short side on chip.
Larger ones take three launches a step for the whole batch; the two with symmetric results compute the tiles on and
above the diagonal and write them twice. Tiles follow from the shape alone: nothing is tuned at run time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import normalised

SMALL, SMALL_COLS = 128, 4096  # the longest sides of a matrix that one program takes
# Operands are multiplied by this power of two: singular values are about 1 at most, and so entries far below it, where
# float16 would lose bits of the smallest; the largest coefficient, 24, times it is still far from 65,504.
OPERAND_SCALE = 256.0
SCALE = tl.constexpr(OPERAND_SCALE)


@dataclass(frozen=True)
class Tiles:
    """Sides of a tile of a product, and how it is launched."""

    side: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


TILES = {"medium": Tiles(64, 64, 4, 4), "large": Tiles(128, 64, 8, 3)}
ALIGNED = 16  # bytes of the widest access, and elements that sides and strides are divisible by


def tiles_of(short_side: int) -> Tiles:
    """Many small tiles where a matrix has few, large ones where it has enough of them."""
    return TILES["medium" if short_side <= 512 else "large"]


def small_tiles(side: int) -> Tiles:
    """Of a matrix that one program takes, whose columns it multiplies `depth` at a time."""
    return Tiles(side, 32 if side == 128 else 64, 8 if side == 128 else 4, 2)


@triton.jit
def operand(x):
    return (x * SCALE).to(tl.float16)


@triton.jit
def small_kernel(
    u_ptr, o_ptr, coefficients_ptr, count, outer_stride, inner_stride, n, m, short_stride, long_stride, steps, margin,
    SIDE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """All steps of one matrix; `o` is its iterate, which this program alone reads and writes."""
    matrix = tl.program_id(0).to(tl.int64)
    u_ptr += (matrix // count) * outer_stride + (matrix % count) * inner_stride
    o_ptr += matrix * n * m
    i = tl.arange(0, SIDE)[:, None].to(tl.int64)
    cols = tl.arange(0, COLS)[None, :].to(tl.int64)
    largest = tl.full((), 1.1754944e-38, tl.float32)
    for start in range(0, m, COLS):
        j = start + cols
        u = tl.load(u_ptr + i * short_stride + j * long_stride, (i < n) & (j < m), 0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(u)))
    # The exponent alone: the power of two that is not above it.
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    squares = 0.0
    for start in range(0, m, COLS):
        j = start + cols
        u = tl.load(u_ptr + i * short_stride + j * long_stride, (i < n) & (j < m), 0.0) / power
        squares += tl.sum(u * u)
    norm = tl.sqrt(squares) * margin + 1e-7 / power
    gram = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, m, COLS):
        j = start + cols
        at, inside = i * short_stride + j * long_stride, (i < n) & (j < m)
        x = tl.load(u_ptr + at, inside, 0.0) / power / norm
        tl.store(o_ptr + at, x, inside)
        h = operand(x)
        gram = tl.dot(h, tl.trans(h), gram)
    for step in range(steps):
        tl.debug_barrier()  # what other threads of this program have stored
        a = tl.load(coefficients_ptr + 3 * step)
        b = tl.load(coefficients_ptr + 3 * step + 1)
        c = tl.load(coefficients_ptr + 3 * step + 2)
        r = (gram / SCALE).to(tl.float16)
        p = (c / SCALE * tl.dot(r, r) + b * r.to(tl.float32)).to(tl.float16)
        gram = tl.zeros((SIDE, SIDE), tl.float32)
        for start in range(0, m, COLS):
            j = start + cols
            at, inside = i * short_stride + j * long_stride, (i < n) & (j < m)
            x = tl.load(o_ptr + at, inside, 0.0)
            x = a * x + tl.dot(p, operand(x)) / (SCALE * SCALE)
            tl.store(o_ptr + at, x, inside)
            h = operand(x)
            gram = tl.dot(h, tl.trans(h), gram)


@triton.jit
def symmetric_kernel(
    a_ptr, c_ptr, n, depth, alpha, beta, POLYNOMIAL: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr
):
    """A tile of `αAAᵀ`, and `+ βA` where A is the symmetric R of a POLYNOMIAL, stored in its place and mirrored."""
    across = tl.cdiv(n, SIDE)
    tiles = across * (across + 1) // 2
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    # Column `col` of the upper triangle begins at tile col(col+1)/2; the root may be off by one.
    col = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    col = tl.where(col * (col + 1) // 2 > tile, col - 1, col)
    col = tl.where((col + 1) * (col + 2) // 2 <= tile, col + 1, col)
    row = tile - col * (col + 1) // 2
    a_ptr += matrix * n * depth
    c_ptr += matrix * n * n
    i = (row * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    j = (col * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    product = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, depth, DEPTH):
        k = (start + tl.arange(0, DEPTH)).to(tl.int64)
        left = tl.load(a_ptr + i[:, None] * depth + k[None, :], (i[:, None] < n) & (k[None, :] < depth), 0.0)
        right = tl.load(a_ptr + j[:, None] * depth + k[None, :], (j[:, None] < n) & (k[None, :] < depth), 0.0)
        product = tl.dot(left, tl.trans(right), product)
    inside = (i[:, None] < n) & (j[None, :] < n)
    product *= alpha
    if POLYNOMIAL:
        product += beta * tl.load(a_ptr + i[:, None] * n + j[None, :], inside, 0.0).to(tl.float32)
    c = product.to(tl.float16)
    tl.store(c_ptr + i[:, None] * n + j[None, :], c, inside)
    if row != col:
        tl.store(c_ptr + j[:, None] * n + i[None, :], tl.trans(c), (j[:, None] < n) & (i[None, :] < n))


@triton.jit
def update_kernel(x_ptr, p_ptr, h_ptr, next_h_ptr, n, m, a, SIDE: tl.constexpr, DEPTH: tl.constexpr):
    """A tile of `X ← aX + PX`, in place, and of its operand, which other programs still read, elsewhere."""
    down, across = tl.cdiv(n, SIDE), tl.cdiv(m, SIDE)
    matrix = (tl.program_id(0) // (down * across)).to(tl.int64)
    tile = tl.program_id(0) % (down * across)
    x_ptr += matrix * n * m
    h_ptr += matrix * n * m
    next_h_ptr += matrix * n * m
    p_ptr += matrix * n * n
    i = (tile % down * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    j = (tile // down * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    product = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, n, DEPTH):
        k = (start + tl.arange(0, DEPTH)).to(tl.int64)
        p = tl.load(p_ptr + i[:, None] * n + k[None, :], (i[:, None] < n) & (k[None, :] < n), 0.0)
        h = tl.load(h_ptr + k[:, None] * m + j[None, :], (k[:, None] < n) & (j[None, :] < m), 0.0)
        product = tl.dot(p, h, product)
    at, inside = i[:, None] * m + j[None, :], (i[:, None] < n) & (j[None, :] < m)
    x = a * tl.load(x_ptr + at, inside, 0.0) + product / (SCALE * SCALE)
    tl.store(x_ptr + at, x, inside)
    tl.store(next_h_ptr + at, operand(x), inside)


@functools.cache
def _on_device(coefficients: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied once: what a captured graph reads must stay where it is."""
    return torch.tensor(coefficients, dtype=torch.float32, device=device)


def _aligned(u: Tensor) -> Tensor:
    """Matrices with sides divisible by 16 that start on such boundaries: where `u` is not so, a copy with zeros.

    Every access is then 16 bytes wide, and one compiled kernel fits all shapes. Rows and columns of zeros stay zero.
    """
    *lead, rows, cols = u.shape
    more_rows, more_cols = -rows % ALIGNED, -cols % ALIGNED
    if u.data_ptr() % ALIGNED == more_rows == more_cols == 0 and all(s % ALIGNED == 0 for s in u.stride()[:-1]):
        return u
    copy = u.new_zeros(*lead, rows + more_rows, cols + more_cols)
    copy[..., :rows, :cols] = u
    return copy


def _small(u: Tensor, coefficients: Sequence[float], margin: float) -> Tensor:
    rows, cols = u.shape[-2:]
    batch = u if u.dim() == 4 else u.reshape(1, -1, rows, cols)
    o = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    n, m = min(rows, cols), max(rows, cols)
    short_stride, long_stride = (cols, 1) if rows <= cols else (1, cols)
    tiles = small_tiles(triton.next_power_of_2(n))
    small_kernel[(batch.shape[0] * batch.shape[1],)](
        batch, o, _on_device(tuple(coefficients), u.device), batch.shape[1], batch.stride(0), batch.stride(1), n, m,
        short_stride, long_stride, len(coefficients) // 3, margin, tiles.side, tiles.depth, **tiles.options,
    )  # fmt: skip
    return o


def _tiled(u: Tensor, coefficients: Sequence[float], margin: float) -> Tensor:
    tall = u.shape[-2] > u.shape[-1]
    x = normalised(u.mT if tall else u, margin).contiguous()
    n, m = x.shape[-2:]
    count = x.numel() // (n * m)
    h = (x * OPERAND_SCALE).half()
    next_h = torch.empty_like(h)
    r, p = (torch.empty(count, n, n, dtype=torch.float16, device=u.device) for _ in range(2))
    tiles = tiles_of(n)
    down, across = triton.cdiv(n, tiles.side), triton.cdiv(m, tiles.side)
    triangle, whole = (count * down * (down + 1) // 2,), (count * down * across,)
    for a, b, c in zip(*[iter(coefficients)] * 3, strict=True):
        symmetric_kernel[triangle](h, r, n, m, 1 / OPERAND_SCALE, 0.0, False, tiles.side, tiles.depth, **tiles.options)
        symmetric_kernel[triangle](r, p, n, n, c / OPERAND_SCALE, b, True, tiles.side, tiles.depth, **tiles.options)
        update_kernel[whole](x, p, h, next_h, n, m, a, tiles.side, tiles.depth, **tiles.options)
        h, next_h = next_h, h
    return x.mT if tall else x


@torch.library.custom_op("fedkernels::newton_schulz_triton", mutates_args=())
def newton_schulz_triton(u: Tensor, coefficients: Sequence[float], margin: float) -> Tensor:
    rows, cols = u.shape[-2:]
    whole = _aligned(u)
    small = min(whole.shape[-2:]) <= SMALL and max(rows, cols) <= SMALL_COLS
    o = (_small if small else _tiled)(whole, coefficients, margin)
    return o[..., :rows, :cols].contiguous()


@newton_schulz_triton.register_fake
def _(u: Tensor, coefficients: Sequence[float], margin: float) -> Tensor:
    return u.new_empty(u.shape)
