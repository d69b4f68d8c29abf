"""Exact sums against sums of fractions, in any order and grouping."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fedkernels.kernels.dispatch import INTERPRETED
from fedkernels.kernels.exact_sum import MAX_TERMS, exact_add, limit, value

BACKENDS = ["reference"] if INTERPRETED else ["reference", "cpp"]
GRID = Fraction(1, 2**69)


def rows(clients: int, d: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of all magnitudes, of both signs."""
    g = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-15, 5, (clients, d), generator=g).double()
    return (torch.randn(clients, d, generator=g, dtype=torch.float64) * scale).to(dtype)


def weights(clients: int) -> Tensor:
    return torch.rand(clients, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 0.1


def total(terms: Tensor, w: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(2, terms.shape[1], dtype=torch.int64)
    largest = torch.zeros(1, dtype=torch.float64)
    exact_add(sums, terms, w, largest, backend=backend)
    return sums, largest


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("clients", "d"), [(1, 1), (3, 257), (9, 1023)])
def test_the_sum_is_right_to_its_bound(backend: str, dtype: torch.dtype, clients: int, d: int) -> None:
    terms, w = rows(clients, d, dtype), weights(clients)
    sums, largest = total(terms, w, backend)
    products = w.unsqueeze(1) * terms.double()
    assert largest.item() == products.abs().max().item()
    for found, column in zip(value(sums, backend=backend).tolist(), products.T.tolist(), strict=True):
        expected = sum(map(Fraction, column))
        # Half a step of the grid a term, and two roundings of the result.
        assert abs(Fraction(found) - expected) <= clients * GRID / 2 + abs(expected) * Fraction(1, 2**52)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_order_and_grouping_gives_the_same_bits(backend: str) -> None:
    terms, w = rows(40, 300, torch.float64), weights(40)
    expected, _ = total(terms, w, backend)
    for seed in range(5):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        parts = [total(terms[part], w[part], backend)[0] for part in order.split(7)]
        assert torch.equal(value(sum(parts[1:], parts[0])), value(expected))
    floats = [(w[order].unsqueeze(1) * terms[order]).cumsum(0)[-1] for order in (torch.arange(40), order)]
    assert not torch.equal(*floats)  # what the test would not notice otherwise


def test_backends_agree() -> None:
    if "cpp" not in BACKENDS:
        pytest.skip("one backend")
    terms, w = rows(5, 20_000, torch.float32), weights(5)
    for one, other in zip(total(terms, w, "cpp"), total(terms, w, "reference"), strict=True):
        assert torch.equal(one, other)
    g = torch.Generator().manual_seed(0)
    sums = torch.randint(-(2**62), 2**62, (2, 20_000), generator=g) >> torch.randint(0, 62, (2, 20_000), generator=g)
    assert torch.equal(value(sums, backend="cpp"), value(sums, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("small", [2.0**-60, -(2.0**-60), -(2.0**-30), -1.0, 2.0**-69])
def test_small_sums_keep_their_precision(backend: str, small: float) -> None:
    """Of a negative number the coarse part is −1 and the fine one nearly 1: neither may eat the other's bits."""
    terms = torch.tensor([[3.0], [small * 1.5], [-3.0]], dtype=torch.float64)
    sums, _ = total(terms, torch.ones(1, dtype=torch.float64), backend)
    assert value(sums, backend=backend).item() == round(Fraction(small * 1.5) / GRID) * GRID


@pytest.mark.parametrize("backend", BACKENDS)
def test_clients_of_weight_zero_are_not_read(backend: str) -> None:
    terms = torch.tensor([[1.0, 2.0], [math.nan, math.inf]])
    sums, largest = total(terms, torch.tensor([2.0, 0.0], dtype=torch.float64), backend)
    assert value(sums).tolist() == [2.0, 4.0]
    assert largest.item() == 4.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**40])
def test_what_does_not_fit_shows(backend: str, bad: float) -> None:
    _, largest = total(torch.tensor([[1.0, bad]]), torch.ones(1, dtype=torch.float64), backend)
    assert not largest.item() < limit(1)


def test_as_many_terms_as_can_be_do_not_overflow() -> None:
    """All fine parts, and all coarse parts, at their largest."""
    fine, coarse = Fraction(1, 2), Fraction(limit(MAX_TERMS))
    assert MAX_TERMS * fine * 2**43 < 2**63
    assert MAX_TERMS * (coarse * 2**26 + 1) + MAX_TERMS < 2**63
    with pytest.raises(ValueError, match=f"{MAX_TERMS + 1} terms"):
        limit(MAX_TERMS + 1)


def test_columns_of_wider_sums() -> None:
    wide = torch.zeros(2, 3, 8, dtype=torch.int64)
    largest = torch.zeros(1, dtype=torch.float64)
    exact_add(wide[:, 1], torch.ones(2, 16)[:, 4:12], torch.ones(2, dtype=torch.float64), largest)
    assert value(wide).tolist() == [[0.0] * 8, [2.0] * 8, [0.0] * 8]


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the operators are those of C++")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    sums = torch.zeros(2, 3, 8, dtype=torch.int64)[:, 1]
    arguments = (sums, rows(3, 16, dtype)[:, 4:12], weights(3), torch.zeros(1, dtype=torch.float64))
    torch.library.opcheck(torch.ops.fedkernels.exact_add_cpp.default, arguments)
    torch.library.opcheck(torch.ops.fedkernels.exact_value_cpp.default, (sums,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend: str) -> None:
    """With the same bits: what a compiler does to sums of floats changes nothing here."""

    def step(terms: Tensor, w: Tensor, sums: Tensor, largest: Tensor) -> Tensor:
        exact_add(sums, 3 * terms, w, largest, backend=backend)
        return value(sums, backend=backend)

    def given() -> tuple[Tensor, ...]:
        sums = torch.zeros(2, 257, dtype=torch.int64)
        return rows(3, 257, torch.float64), weights(3), sums, torch.zeros(1, dtype=torch.float64)

    found, expected = given(), given()
    assert torch.equal(torch.compile(step, fullgraph=True)(*found), step(*expected))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1, 1), (3, 1)])
def test_weights_of_any_shape(backend: str, shape: tuple[int, ...]) -> None:
    terms, w = rows(3, 50, torch.float32), weights(3)[: max(shape, default=1)]
    found, expected = total(terms, w.view(shape), backend), total(terms, w.expand(3).contiguous(), backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_arguments_that_do_not_fit() -> None:
    terms, one, largest = torch.ones(2, 3), torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"sums has shape \[2, 4\]"):
        exact_add(torch.zeros(2, 4, dtype=torch.int64), terms, one, largest)
    with pytest.raises(ValueError, match="sums is float64, expected int64"):
        exact_add(torch.zeros(2, 3, dtype=torch.float64), terms, one, largest)
    with pytest.raises(ValueError, match="weights is float32, expected float64"):
        exact_add(torch.zeros(2, 3, dtype=torch.int64), terms, one.float(), largest)
