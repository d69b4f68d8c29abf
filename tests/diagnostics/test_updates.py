"""Agreement and drift of hand-made and random vectors against loops over pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import tiny_model, tiny_roles

from fedkernels.algorithms import ALGORITHMS, FedAdamW, FedMuon
from fedkernels.contract import Algorithm
from fedkernels.diagnostics import updates as updates_module
from fedkernels.diagnostics.updates import agreement, aligned_wires, by_layer, drift
from fedkernels.layout import Layout
from fedkernels.wire import Wire


@pytest.mark.parametrize("chunk", [4, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_and_cosines_are_those_of_pairs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int) -> None:
    monkeypatch.setattr(updates_module, "CHUNK", chunk)
    updates = torch.randn(5, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = agreement(updates)
    rows = [row.double() for row in updates]
    mean = sum(rows, torch.zeros(13, dtype=torch.float64)) / 5
    for i, j in itertools.product(range(5), repeat=2):
        dot = math.fsum((rows[i] * rows[j]).tolist())
        norms = math.hypot(*rows[i].tolist()) * math.hypot(*rows[j].tolist())
        assert float(found.cosine[i, j]) == pytest.approx(dot / norms, abs=1e-12)
    for i in range(5):
        assert float(found.norms[i]) == pytest.approx(math.hypot(*rows[i].tolist()), rel=1e-12)
        dot = math.fsum((rows[i] * mean).tolist())
        assert float(found.to_mean[i]) == pytest.approx(dot / float(rows[i].norm() * mean.norm()), abs=1e-12)
    assert found.mean_norm == pytest.approx(float(mean.norm()), rel=1e-12)


def test_an_update_of_zero_has_no_direction() -> None:
    found = agreement(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    assert found.norms.tolist() == [0.0, 5.0]
    torch.testing.assert_close(found.cosine, torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(found.to_mean, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_drift_is_the_mean_squared_distance_to_the_mean() -> None:
    states = torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean = states.sum(0) / 4
    found = drift(states)
    expected = sum(float((row - mean).square().sum()) for row in states) / 4
    assert found.absolute == pytest.approx(expected, rel=1e-12)
    assert found.relative == pytest.approx(expected / float(mean.square().sum()), rel=1e-12)
    assert drift(torch.ones(3, 2)) == updates_module.Drift(0.0, 0.0)
    assert drift(torch.tensor([[1.0], [-1.0]])) == updates_module.Drift(1.0, None)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (FedMuon(), ["M"]),
        (FedMuon(share_momentum=False), []),
        (FedAdamW(), ["v"]),
        (FedAdamW(second_moment="full"), ["v"]),
        (ALGORITHMS["scaffold"](), []),
        (ALGORITHMS["fedbcgd"](blocks=2), []),
    ],
    ids=str,
)
def test_aligned_state_is_what_travels_beside_the_update(algorithm: Algorithm, expected: list[str]) -> None:
    module = tiny_model()
    assert aligned_wires(algorithm.up(algorithm.layout(module, tiny_roles(module)))) == expected


def test_updates_and_states_sent_by_block_are_not_compared() -> None:
    wires = {"theta_L": Wire(9, state=True), "delta": Wire(), "c": Wire(only_block=True, state=True)}
    assert aligned_wires(wires) == ["theta_L"]


def test_layers_of_matrix_wires_are_the_matrices() -> None:
    module = tiny_model()
    layout = FedMuon().layout(module, tiny_roles(module))
    x = torch.arange(float(layout.d)) * torch.tensor([[1.0], [2.0]])
    parts = by_layer(layout.matrices(x), Wire("matrices"), layout)
    assert sorted(parts) == ["1.weight", "4.weight", "6.weight"]
    for name, part in parts.items():
        assert torch.equal(part, layout.views(x)[name].flatten(1))


def test_layers_of_whole_wires_are_all_parameters() -> None:
    layout = Layout.of(tiny_model())
    x = torch.arange(float(layout.d)).expand(3, -1)
    parts = by_layer(x, Wire(), layout)
    assert {name: part.shape for name, part in parts.items()} == {
        entry.name: (3, entry.stop - entry.start) for entry in layout.entries
    }
    assert torch.equal(parts["4.weight"], layout.views(x)["4.weight"].flatten(1))
    assert by_layer(torch.zeros(3, 9), Wire(9), layout) == {}
