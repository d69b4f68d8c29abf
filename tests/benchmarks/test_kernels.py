"""The kernel benchmarks on tiny shapes: every variant does the same job, and one that does not is not timed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import kernels
import newton_schulz
import pytest
import roofline
import steps
import torch
from kernels import FAMILIES, OPS
from shapes import Workload, shapes, workload
from turns import Job, Variant, check, measure

from fedkernels.kernels.fused_sam import fused_sam
from fedkernels.kernels.overview import SHAPES

TINY = Workload("tiny", 2, 1500, ((2, 24, 40), (1, 40, 24)))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Peers run uncompiled, the ceiling is a small product, and nothing has a gradient."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setitem(newton_schulz.SQUARE, "cpu", 64)
    threads = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def jobs(op: str, dtype: torch.dtype = torch.float32) -> Iterator[Job]:
    yield from OPS[op].jobs(op, TINY, dtype, CPU)


@pytest.mark.parametrize("op", OPS)
def test_every_variant_does_the_same(op: str) -> None:
    for job in jobs(op):
        errors, refused = check(job)
        assert list(errors) == [variant.name for variant in job.variants]
        assert len(errors) >= 3
        assert not refused


def test_gradients_in_bfloat16() -> None:
    for op in ("adamw", "sam_adamw", "sam_sgd"):
        (job,) = jobs(op, torch.bfloat16)
        assert len(check(job)[0]) == 4


def spoiled(variant: Variant) -> Variant:
    """The same with a result that is 3 % too large."""

    def run() -> Any:
        found = variant.run()
        for tensor in _tensors(found):
            tensor.add_(tensor * 0.03 if tensor.is_floating_point() else 1)
        return found

    return replace(variant, run=run)


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    else:
        for part in found:
            yield from _tensors(part)


@pytest.mark.parametrize("op", [op for op in OPS if op != "muon_step"])
def test_a_wrong_kernel_stops_the_benchmark(op: str) -> None:
    for job in jobs(op):
        first, *others = job.variants
        with pytest.raises(SystemExit, match=r"fedkernels.*: error .*, expected at most .*; nothing was timed"):
            measure(replace(job, variants=[spoiled(first), *others]), CPU, repeats=1)


def test_a_wrong_step_of_muon_stops_the_benchmark() -> None:
    """Its variants return nothing; one that does nothing is wrong."""
    (job,) = jobs("muon_step")
    with pytest.raises(SystemExit, match="error 1 of the move"):
        check(replace(job, variants=[Variant("nothing", lambda: None, tolerance=0.1)]))


@pytest.mark.parametrize("op", ["sam_adamw", "sam_sgd"])
def test_a_perturbation_of_the_wrong_length_stops_the_benchmark(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no trace in the parameters after the step, as both gradients are the same here."""

    def too_far(*rows: torch.Tensor, rho: float, **options: Any) -> None:
        fused_sam(*rows, rho=1.01 * rho, **options)

    monkeypatch.setattr(steps, "fused_sam", too_far)
    (job,) = jobs(op)
    with pytest.raises(SystemExit, match=r"fedkernels, in place: error 0.01 of perturbation, expected at most 0.0001"):
        check(job)


def test_zeros_are_no_polar_factor() -> None:
    (job,) = jobs("newton_schulz")
    ours, allowed = job.variants[0], newton_schulz.INEXACT
    zeros = replace(ours, run=lambda: [0 * o for o in ours.run()], tolerance=allowed)
    with pytest.raises(SystemExit, match=f"error 1 of gaussian, expected at most {allowed}"):
        check(replace(job, variants=[zeros]))


def test_rounding_that_is_always_down_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value is within a step of what it was, and what is lost is kept; but it is half a step on average."""
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    (job,) = (job for job in jobs("round_tail") if job.facts["op"] == "round_tail int8")
    with pytest.raises(SystemExit, match="operation by operation: error"):
        check(job)


def test_foreign_variants_are_named_and_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise RuntimeError("no such GPU")

    (job,) = jobs("newton_schulz")
    ours, peer = job.variants[:2]
    wrong = replace(spoiled(peer), name="wrong", foreign=True)
    absent = replace(peer, name="absent", run=broken, foreign=True)
    results = measure(replace(job, variants=[ours, wrong, absent]), CPU, repeats=2)
    assert [result["variant"] for result in results] == ["fedkernels"]
    assert set(results[0]["not_timed"]) == {"wrong", "absent"}
    assert "not timed: absent: RuntimeError: no such GPU" in capsys.readouterr().out


def test_rates_follow_from_times() -> None:
    for op in ("adamw", "newton_schulz"):
        (job,) = jobs(op)
        first, second = measure(job, CPU, repeats=3)[:2]
        work = first["bytes"] if op == "adamw" else job.flops
        rates = [work / t for t in first["times_s"]]
        assert first["rate"]["max"] == max(rates)
        assert first["flop_per_s"]["min"] == job.flops / max(first["times_s"])
        pairs = zip(rates, first["ceiling_times_s"], strict=True)
        assert first["of_ceiling"]["min"] == pytest.approx(min(rate * t / job.ceiling_work for rate, t in pairs))
        ratios = [a / b for a, b in zip(second["times_s"], first["times_s"], strict=True)]
        assert second["ours_is_faster"]["max"] == max(ratios)


def test_flops_of_one_step_counted_by_hand() -> None:
    """XXᵀ and PX are 2n²m each, the square of the Gram matrix 2n³."""
    n, m, steps = 3, 5, 5
    assert newton_schulz.flops([(7, m, n)]) == 7 * steps * (2 * n * m * n + 2 * n * n * n + 2 * n * n * m)


def test_the_command_writes_a_dated_table_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--op", "round_tail", "newton_schulz", "--shape", "roberta_base_lora_r16", "--threads", "1"]
    monkeypatch.setattr(kernels, "workload_named", lambda name: TINY)
    monkeypatch.setattr(
        sys, "argv", ["kernels.py", *options, "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]
    )
    kernels.main()
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert {row[0] for row in result["table"]["rows"]} == {
        "round_tail int8", "round_tail bf16", "round_tail sum", "round_tail clip", "newton_schulz",
    }  # fmt: skip
    assert all(len(row) == len(kernels.COLUMNS) for row in result["table"]["rows"])
    (plot,) = tmp_path.glob("*.png")
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_run_that_is_cut_off_leaves_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--op", "newton_schulz", "muon_step", "--shape", "vit_tiny", "--threads", "1", "--repeats", "1"]
    monkeypatch.setattr(kernels, "workload_named", lambda name: TINY)
    monkeypatch.setattr(sys, "argv", ["kernels.py", *options, "--device", "cpu", "--out", str(tmp_path)])

    def cut_off(job: Job, *given: Any) -> list[dict[str, Any]]:
        if job.facts["op"] == "muon_step":
            raise KeyboardInterrupt
        return measure(job, *given)

    monkeypatch.setattr(kernels, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        kernels.main()
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert {run["op"] for run in result["details"]["runs"]} == {"newton_schulz"}
    assert len(result["table"]["rows"]) == len(result["details"]["runs"])


def test_what_does_not_fit_is_said_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--op", "adamw", "--shape", "llama_1b", "--device", "cpu"])
    with pytest.raises(SystemExit):
        kernels.main()
    said = capsys.readouterr()
    assert "not run: adamw of llama_1b: needs 50.6 GiB, 0.0 are free" in said.out
    assert "nothing was run" in said.err


def test_labels_of_equal_jobs_stand_apart() -> None:
    places = roofline._apart([1.0, 1.0, 1.01, 50.0], 0.5, 100.0)
    assert places[0] == 1.0
    assert places[3] == 50.0
    assert all(later / earlier > 1.15 for earlier, later in pairwise(places))


def test_shapes_are_those_of_the_models() -> None:
    for name, (clients, d) in SHAPES.items():
        assert (workload(name).clients, workload(name).d) == (clients, d)
    assert workload("vit_tiny x 3").matrices[0][0] == 3 * shapes("vit_tiny").matrices[0][0]
    named = {name for family in FAMILIES for names in family.shapes.values() for name in names}
    assert all(workload(name).d for name in named)


@pytest.mark.parametrize("name", ["vit", "vit_b x 0", "vit_b x", "vit_b x two"])
def test_unknown_shapes_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"shape '{name}': expected MODEL"):
        workload(name)
