"""What the tests of kernels over flat rows share: which backends are here, random rows, comparisons with float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedkernels.kernels.dispatch import INTERPRETED

# Without a GPU Triton's kernels are tested by a second run of these tests, under its interpreter: test_interpreted.py.
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
BACKENDS = ["triton"] if INTERPRETED else ["reference", "triton" if DEVICE.type == "cuda" else "cpp"]
WIDE = ["reference"] if INTERPRETED else [backend for backend in BACKENDS if backend != "triton"]  # know float64
COMPILED = [backend for backend in BACKENDS if backend != "reference"]
# One element, odd sizes around a tile and a chunk of every backend, and several of them; the interpreter is slow.
SIZES = [1, 257, 4097] if INTERPRETED else [1, 255, 257, 1023, 9001, 32_769]
CLIENTS = [1, 2, 5]


def rows(clients: int, d: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[C, d]`, normal."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(clients, d, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)


def row(d: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return rows(1, d, seed, dtype=dtype)[0]


def poison(clients: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output whose unwritten elements show."""
    return torch.full((clients, d), math.nan, dtype=dtype, device=DEVICE)


def apart(tensor: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
    """The same rows, as a slice of longer ones, and those longer ones, poisoned elsewhere."""
    clients, d = tensor.shape
    whole = poison(clients, before + d + after, tensor.dtype)
    view = whole[:, before : before + d]
    view.copy_(tensor)
    return view, whole


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def assert_near(found: Tensor, expected: Tensor, ulps: float = 8.0) -> None:
    """Equal to some units in the last place, of each element or of the largest where cancellation may act."""
    limits = torch.finfo(found.dtype)
    # What is smaller than the smallest normal number may have become zero.
    atol = ulps * limits.eps * expected.abs().max().item() + limits.tiny
    torch.testing.assert_close(found.double(), expected.double(), rtol=ulps * limits.eps, atol=atol)
