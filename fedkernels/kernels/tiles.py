"""What the Triton kernels over flat rows `[C, d]` share.

A program owns one tile of one client's row. Programs of the same tile of different clients are neighbours, so that what
clients share is read from memory once. Offsets are int64: `C·d` may exceed 2³¹. Kernels branch on whether a tile is
whole, since a mask of unknown length would keep the compiler from 16-byte accesses. Every tensor has its own stride
between rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
# Fused multiply-adds are off, so that results do not depend on where the compiler finds them.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def grid(y: Tensor, size: int = TILE) -> tuple[int]:
    """One dimension for tiles and clients, since grids of two end at 65,535."""
    return (y.shape[0] * triton.cdiv(y.shape[1], size),)


def stride(tensor: Tensor | None) -> int:
    """Elements between rows; 0 where there is no tensor, or one row for all clients."""
    return 0 if tensor is None or tensor.dim() == 1 else tensor.stride(0)


def per_client(tensor: Tensor | None) -> bool:
    """Whether a scalar argument has a value for each client."""
    return tensor is not None and tensor.numel() > 1


@triton.jit
def place(clients, SIZE: tl.constexpr):
    """This program's client, its columns and the end of its tile."""
    pid = tl.program_id(0)
    first = (pid // clients).to(tl.int64) * SIZE
    return pid % clients, first + tl.arange(0, SIZE), first + SIZE


@triton.jit
def row(ptr, client, stride):
    """Where a client's row begins."""
    if ptr is None:
        return None
    else:
        return ptr + client.to(tl.int64) * stride


@triton.jit
def scalar(ptr, client, PER_CLIENT: tl.constexpr):
    """A scalar argument in float32: one value, or one for each client."""
    return tl.load(ptr + client if PER_CLIENT else ptr).to(tl.float32)


@triton.jit
def is_active(active_ptr, client):
    if active_ptr is None:
        return True
    else:  # without it Triton compiles what follows for a pointer that is None
        return tl.load(active_ptr + client) != 0


@triton.jit
def moved(start, p, G_ptr, cols, inside, lr, share, alpha):
    """`start − η (share · p + α G)`."""
    p = share * p
    if G_ptr is not None:
        p += alpha * tl.load(G_ptr + cols, inside)
    return start - lr * p


@triton.jit
def store_parameters(y, y_ptr, x_ptr, delta_ptr, cols, inside):
    """Store `y`, and `delta ← y − x`."""
    tl.store(y_ptr + cols, y, inside)
    if delta_ptr is not None:
        tl.store(delta_ptr + cols, y - tl.load(x_ptr + cols, inside), inside)
