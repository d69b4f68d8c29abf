"""Client state: pages in memory and in mapped files against a dictionary."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkernels.federated import store as store_module
from fedkernels.federated.store import ClientStore

D, NAMES = 5, ("a", "b")
ROWS_PER_PAGE = 3


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PAGE_BYTES", ROWS_PER_PAGE * len(NAMES) * D * 8)


def make(directory: Path, pages_in_memory: float = float("1e6")) -> ClientStore:
    return ClientStore(NAMES, D, torch.float64, directory, pages_in_memory * ROWS_PER_PAGE * len(NAMES) * D * 8)


def vectors(*clients: int, generation: int = 0) -> dict[str, Tensor]:
    rows = torch.tensor([[1000.0 * generation + client] for client in clients], dtype=torch.float64)
    return {name: rows + (n + 1) / 10 + torch.arange(D) / 100 for n, name in enumerate(NAMES)}


def assert_holds(store: ClientStore, clients: list[int], expected: dict[str, Tensor]) -> None:
    found = store.get(clients)
    assert list(found) == list(NAMES)
    for name in NAMES:
        assert torch.equal(found[name], expected[name])


# All in memory, all in files, and one page of memory before the files.
pages_in_memory = pytest.mark.parametrize("in_memory", [1e6, 0, 1])


@pages_in_memory
def test_a_random_history_equals_a_dictionary(in_memory: float, tmp_path: Path) -> None:
    store, expected = make(tmp_path / "state", in_memory), {}
    rng = np.random.default_rng(0)
    for generation in range(60):
        clients = rng.choice(25, 4, replace=False).tolist()
        if generation % 3 == 2:
            for client in clients:
                if client in expected:
                    store.drop(client)
                    del expected[client]
        else:
            new = vectors(*clients, generation=generation)
            store.put(clients, new)
            expected |= {client: {name: new[name][c] for name in NAMES} for c, client in enumerate(clients)}
        assert set(store.ids) == set(expected)
        zeros = dict.fromkeys(NAMES, torch.zeros(D, dtype=torch.float64))
        everyone = [expected.get(client, zeros) for client in range(25)]
        assert_holds(store, list(range(25)), {n: torch.stack([named[n] for named in everyone]) for n in NAMES})
    paged = {int(i): row for page in store.pages() for i, row in zip(page["ids"], page["rows"], strict=True)}
    assert set(paged) == set(expected)
    for client, row in paged.items():
        assert torch.equal(row, torch.cat([expected[client][name] for name in NAMES]))


@pages_in_memory
def test_what_is_read_is_a_copy(in_memory: float, tmp_path: Path) -> None:
    store = make(tmp_path / "state", in_memory)
    store.put([3, 4], vectors(3, 4))
    store.get([3])["a"].fill_(7)
    assert_holds(store, [4, 3], vectors(4, 3))


def test_a_row_is_the_memory_itself(tmp_path: Path) -> None:
    store, other = make(tmp_path / "state"), make(tmp_path / "other", 0)
    store.put([3], vectors(3))
    other.put_row(8, store.row(3))
    assert_holds(other, [8], vectors(3))
    store.row(3).zero_()
    assert not store.get([3])["b"].any()
    assert_holds(other, [8], vectors(3))


def test_memory_follows_the_clients_seen_not_their_ids(tmp_path: Path) -> None:
    store = make(tmp_path / "state")
    clients = [10**9, 5, 10**8, 7]
    store.put(clients, vectors(*clients))
    assert len(store._pages) == 2
    assert_holds(store, [*clients, 6], {n: torch.cat([v, torch.zeros(1, D)]) for n, v in vectors(*clients).items()})


def test_slots_are_used_again(tmp_path: Path) -> None:
    store = make(tmp_path / "state")
    for client in range(100):
        store.put([client], vectors(client))
        if client >= ROWS_PER_PAGE:
            store.drop(client - ROWS_PER_PAGE)
    assert len(store._pages) == 2
    assert_holds(store, [97, 98, 99], vectors(97, 98, 99))


def test_a_client_that_comes_back_does_not_see_its_old_state(tmp_path: Path) -> None:
    store = make(tmp_path / "state")
    store.put([1], vectors(1))
    store.drop(1)
    assert store.ids == []
    assert not store.get([1])["a"].any()


def test_pages_in_memory_touch_no_file(tmp_path: Path) -> None:
    store = make(tmp_path / "state")
    store.put(range(20), vectors(*range(20)))
    assert list(tmp_path.iterdir()) == []


def test_mapped_pages_leave_no_file_behind(tmp_path: Path) -> None:
    store = make(tmp_path / "state", 1)
    store.put(range(8), vectors(*range(8)))
    assert list((tmp_path / "state").iterdir()) == []
    mapped = Path(f"/proc/{os.getpid()}/maps").read_text()
    assert mapped.count(str(tmp_path / "state" / "page-")) == 2
    assert_holds(store, list(range(8)), vectors(*range(8)))


def test_dtype_and_width(tmp_path: Path) -> None:
    store = ClientStore(("c",), 4, torch.float32, tmp_path)
    store.put([0], {"c": torch.full((1, 4), 0.1, dtype=torch.float64)})
    assert store.width == 4
    assert store.get([0])["c"].dtype == torch.float32
    assert torch.equal(store.get([0])["c"][0], torch.full((4,), 0.1))


def test_a_page_that_the_disk_does_not_hold_is_an_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = make(tmp_path, pages_in_memory=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.put([1], vectors(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.put([1], vectors(1))
    assert_holds(store, [1], vectors(1))
