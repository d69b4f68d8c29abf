"""Sums over clients that are the same bits in any order and on any number of ranks: two 64-bit integers a number.

A term `t` (float64) is split onto two fixed grids, `t ≈ h 2⁻²⁶ + l 2⁻⁶⁹` with integers `h = ⌊t 2²⁶⌉` and
`l = ⌊(t 2²⁶ − h) 2⁴³⌉`, and integers add up exactly, in any order and grouping.

* The remainder `t 2²⁶ − h` is exact, being the difference of a float64 and the integer next to it. So the split loses
  at most half a step of the finer grid, 2⁻⁷⁰ ≈ 8·10⁻²², and nothing at all of a term whose last bit is worth 2⁻⁶⁹ or
  more: of any `|t| ≥ 2⁻¹⁷`, and of a float32 from 2⁻⁴⁶ on.
* `|l| ≤ 2⁴²`, so fewer than 2²¹ terms never overflow `Σ l`, and `Σ h` does not as long as `Σ |t| < 2³⁷ − 1`. Who adds N
  terms keeps to that by refusing a term of 2³⁶/N or more (`limit`); every partial sum is then within bounds too.
* `value` carries `⌊l 2⁻⁴³⌋` over to h, which makes the two a unique representation of the sum, and rounds its magnitude
  to float64 in two additions of numbers that are not negative: to within 2⁻⁵² of it, relatively.

Reference: Demmel and Nguyen, Parallel reproducible summation, IEEE Transactions on Computers 2015, which fits its grids
to the largest term; that would take a collective of its own here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..dispatch import MISSING, Backend, Rule, choose, cpp_on_rows, require, require_scalars
from .reference import exact_add_reference, exact_value_reference

MAX_TERMS = 2**21 - 1
RULES: Mapping[Backend, Rule] = {"cpp": cpp_on_rows}

if MISSING["cpp"] is None:
    torch.library.register_fake("fedkernels::exact_add_cpp", lambda *arguments: None)
    torch.library.register_fake(
        "fedkernels::exact_value_cpp", lambda sums: sums.new_empty(sums.shape[1], dtype=torch.float64)
    )


def limit(terms: int) -> float:
    """What every one of so many terms must stay below, `2³⁶/N`.

    Raises:
        ValueError: more terms than `MAX_TERMS`.

    Example:
        >>> limit(1024) == 2.0**26
        True
    """
    if terms > MAX_TERMS:
        raise ValueError(f"{terms} terms, expected at most {MAX_TERMS} in an exact sum")
    return 2.0**36 / max(terms, 1)


def exact_add(sums: Tensor, rows: Tensor, weights: Tensor, largest: Tensor, *, backend: str | None = None) -> None:
    """`sums ← sums + Σ_c split(w_c r_c)` and `largest ← max(largest, |w_c r_c|)`, with products in float64.

    Args:
        sums: `[2, d]` int64, h and l; rows of it may be strided.
        rows: `[C, d]`, float32 or float64; rows may be strided.
        weights: w, one or `[C]`, float64; rows of weight 0 are not read, whatever is in them.
        largest: one float64; not below `limit` once it is time to read the sums, they are worthless.
        backend: `reference` or `cpp`; by default the fastest that can run.

    Raises:
        ValueError: a tensor is on another device, or of another shape or dtype than above.
        BackendError: the backend asked for cannot run here.

    Example:
        >>> sums, largest = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
        >>> exact_add(sums, torch.tensor([[0.1], [0.2], [-0.3]]), torch.ones(1, dtype=torch.float64), largest)
        >>> value(sums).item() == sum(torch.tensor([0.1, 0.2, -0.3]).tolist())
        True
    """
    if rows.dim() != 2:
        raise ValueError(f"rows has shape {list(rows.shape)}, expected [C, d]")
    clients, d = rows.shape
    for name, tensor, count, dtypes in (
        ("rows", rows, clients, (torch.float32, torch.float64)),
        ("sums", sums, 2, (torch.int64,)),
    ):
        if tuple(tensor.shape) != (count, d) or (d > 1 and tensor.stride(1) != 1):
            shape, strides = list(tensor.shape), list(tensor.stride())
            raise ValueError(
                f"{name} has shape {shape}, strides {strides}; expected {[count, d]}, columns side by side"
            )
        require(name, tensor[:0], rows, (0, d), *dtypes)
    require_scalars("weights", weights, rows, clients)
    require("weights", weights, rows, tuple(weights.shape), torch.float64)
    require("largest", largest, rows, (1,), torch.float64)
    weights = weights.view(-1)
    chosen = choose("exact_add", RULES, rows.device.type, rows.dtype, tuple(rows.shape), backend).backend
    if chosen == "cpp":
        torch.ops.fedkernels.exact_add_cpp(sums, rows, weights, largest)
    else:
        exact_add_reference(sums, rows, weights, largest)


def value(sums: Tensor, *, backend: str | None = None) -> Tensor:
    """The numbers `[...]` float64 that sums `[2, ...]` int64 stand for.

    Args:
        backend: `reference` or `cpp`; by default the fastest that can run.
    """
    flat = sums.reshape(2, -1)
    chosen = choose("exact_add", RULES, sums.device.type, torch.float64, tuple(flat.shape), backend).backend
    found: Tensor = torch.ops.fedkernels.exact_value_cpp(flat) if chosen == "cpp" else exact_value_reference(flat)
    return found.view(sums.shape[1:])
