"""Every algorithm over rounds: a resume gives the same bits, and a second round compiles nothing anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, WORK, state
from torch._dynamo.testing import CompileCounter

from fedkernels import checkpoint
from fedkernels.federated.engine import Engine


def engine_of(name: str, **options: object) -> Engine:
    return CASES[name].engine(**({"rounds": 10, "clip_norm": 0.5, "work": WORK} | options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_a_resume_gives_the_same_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    uninterrupted = engine_of(name, dtype=dtype)
    for _ in range(4):
        uninterrupted.run_round()
    first = engine_of(name, dtype=dtype)
    for _ in range(2):
        first.run_round()
    checkpoint.save(tmp_path, first, {}, {}, 1)
    second = engine_of(name, dtype=dtype)
    assert checkpoint.restore(tmp_path, second, {}) is not None
    for _ in range(2):
        second.run_round()
    found, expected = state(second), state(uninterrupted)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not np.array_equal(found[key], expected[key])] == []


@pytest.mark.parametrize("name", CASES)
def test_a_second_round_compiles_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning rate, bias corrections and shared state change from round to round; no graph may depend on them."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile_(module, backend=counter))
    engine = engine_of(name, evaluator="compiled")
    engine.run_round()
    after_one = counter.frame_count
    assert after_one > 0
    for _ in range(2):
        engine.run_round()
    assert counter.frame_count == after_one
