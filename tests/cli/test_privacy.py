"""Private runs: what they write and print, resuming with the ledger, the end at a target ε; the `privacy` command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli.small_runs import PRIVATE, Runs
from torch import nn

from fedkernels.cli import main
from fedkernels.federated.engine import Engine
from fedkernels.formats import format_epsilon
from fedkernels.models.vision import Mlp
from fedkernels.privacy.accountant import METHODS, Accountant

pytestmark = pytest.mark.usefixtures("no_report")
KEYS = ["--algorithm", "dp_fedpgn", *PRIVATE]
UNSEEDED = [key for key in KEYS if "noise_seed" not in key]


def ledger(runs: Runs, name: str) -> dict[str, float]:
    folder = runs / name / "checkpoints" / runs.checkpoints(name)[-1]
    return json.loads((folder / "manifest.json").read_text())["privacy"]


def dies_in_round(r: int) -> Callable[[Engine], object]:
    run_round = Engine.run_round

    def dying(engine: Engine) -> object:
        if engine.round + 1 == r:
            raise KeyboardInterrupt
        return run_round(engine)

    return dying


def test_rows_and_progress_tell_epsilon(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.train("a", *KEYS) == 0
    accountant = Accountant(1.0, 0.5, 0.01)
    for row in runs.rows("a"):
        assert row["epsilon"] == accountant.epsilon(row["round"])
        assert row["epsilon_rdp"] == accountant.epsilon(row["round"], "rdp")
        for key in ("clipped_fraction", "update_norm_p10", "update_norm_p50", "update_norm_p90", "noise_to_signal"):
            assert row[key] >= 0
    out = capsys.readouterr().out
    total = format_epsilon(accountant.epsilon(4))
    assert f"privacy: ε = {total} at δ = 0.01 after round 4, by PLD, with σ = 1 and q = 0.5" in out
    for round in range(1, 5):
        line = next(line for line in out.splitlines() if line.startswith(f"round {round}/4"))
        assert f"  ε {format_epsilon(accountant.epsilon(round))}  " in line
    kept = ledger(runs, "a")
    assert kept.pop("seed") > 2**64
    assert kept == {"noise_multiplier": 1, "sampling_rate": 0.5, "delta": 0.01, "rounds": 4}


def test_other_runs_tell_nothing_of_privacy(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.train("a") == 0
    assert "ε" not in capsys.readouterr().out
    assert "epsilon" not in runs.rows("a")[0]
    assert ledger(runs, "a") is None


def test_a_noise_seed_of_the_runs_own_is_kept_for_a_resume(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs draw two seeds; a resumed one goes on with its own, to the last bit."""
    seeds: Iterator[int] = iter([11, 12, 13])
    monkeypatch.setattr("fedkernels.privacy.mechanism.secrets.randbits", lambda bits: next(seeds) << (bits - 9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "run_round", dies_in_round(4))
        assert runs.train("died", *UNSEEDED) == 130
    assert ledger(runs, "died")["rounds"] == 2
    assert runs.train("died", *UNSEEDED, "--resume") == 0
    seeds = iter([11])
    assert runs.train("whole", *UNSEEDED) == 0
    runs.assert_same("died", "whole")
    assert ledger(runs, "died") == ledger(runs, "whole")
    seeds = iter([12])
    assert runs.train("other", *UNSEEDED) == 0
    assert not torch.equal(runs.weights("other")["head.weight"], runs.weights("died")["head.weight"])


def test_secure_noise_is_not_repeated(runs: Runs) -> None:
    for name in ("a", "b"):
        assert runs.train(name, *UNSEEDED, "--privacy.noise=secure", "--rounds", "1") == 0
    assert not torch.equal(runs.weights("a")["head.weight"], runs.weights("b")["head.weight"])


def test_runs_that_differ_share_no_noise(runs: Runs) -> None:
    """Or whoever has the two models subtracts it; how a run is computed makes no other run of it."""
    keys = [*KEYS, "--rounds=1"]
    seeds = {}
    for name, *changed in (
        ["same"], ["how", "--evaluator=batched", "--clients_per_batch=3", "--threads=2"], ["seed", "--seed=4"],
        ["lr", "--lr=0.2"], ["data", "--partition.alpha=0.4"], ["noise", "--privacy.noise_multiplier=2"],
    ):  # fmt: skip
        assert runs.train(name, *keys, *changed) == 0
        seeds[name] = ledger(runs, name)["seed"]
    assert seeds["same"] == seeds["how"]
    assert len(set(seeds.values())) == 5


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_a_run_that_dies_before_its_first_checkpoint_goes_on_with_its_secrets(runs: Runs, noise: str) -> None:
    keys = [*UNSEEDED, f"--privacy.noise={noise}", "--checkpoint_every=10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "run_round", dies_in_round(3))
        assert runs.train("a", *keys) == 130
    assert runs.checkpoints("a") == ["round-000000"]
    before = ledger(runs, "a")
    cohorts = [row["cohort"] for row in runs.rows("a")]
    losses = [row["test_loss"] for row in runs.rows("a")]
    assert runs.train("a", *keys, "--resume") == 0
    assert ledger(runs, "a") == before | {"rounds": 4 if noise == "seeded" else 6}
    assert [row["cohort"] for row in runs.rows("a")][:2] == cohorts
    # The same rounds come out the same, or are counted twice.
    assert ([row["test_loss"] for row in runs.rows("a")][:2] == losses) == (noise == "seeded")


def test_rounds_that_secure_noise_releases_twice_count_twice(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [*UNSEEDED, "--privacy.noise=secure", "--rounds=9", "--checkpoint_every=2", "--privacy.target_epsilon=4.5"]
    accountant = Accountant(1.0, 0.5, 0.01)
    affordable = accountant.affordable(4.5, 9)
    assert affordable > 5
    for times in (1, 2):
        # Round 4 is whole, its checkpoint is not.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "run_round", dies_in_round(4))
            assert runs.train("a", *keys, *(["--resume"] if times > 1 else [])) == 130
        assert [row["round"] for row in runs.rows("a")] == [1, 2, 3]
        assert runs.rows("a")[-1]["epsilon"] == accountant.epsilon(2 + times)
    capsys.readouterr()
    assert runs.train("a", *keys, "--resume") == 0
    rows = runs.rows("a")
    assert len(rows) == affordable - 2
    assert rows[-1]["epsilon"] == accountant.epsilon(affordable) <= 4.5
    assert ledger(runs, "a")["rounds"] == affordable
    out = capsys.readouterr().out
    assert "privacy: rounds 3 to 3 are run again with other noise; ε counts them twice" in out
    assert f"privacy: ε = {format_epsilon(accountant.epsilon(affordable))} at" in out
    assert f"ended after round {affordable - 2} of 9" in out
    # Nothing is left to spend.
    assert runs.train("a", *keys, "--resume") == 0
    assert len(runs.rows("a")) == affordable - 2


@pytest.mark.parametrize("method", ["pld", "rdp"])
def test_a_run_ends_before_its_target_is_exceeded(runs: Runs, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    target = 4.5
    keys = [*KEYS, "--rounds=9", "--privacy.target_epsilon=4.5", f"--privacy.accountant={method}", "--eval_every=5"]
    assert runs.train("a", *keys) == 0
    rows = runs.rows("a")
    last, key = len(rows), "epsilon" if method == "pld" else "epsilon_rdp"
    assert 1 < last < 9
    assert rows[-1][key] <= target < Accountant(1.0, 0.5, 0.01).epsilon(last + 1, method)  # type: ignore[arg-type]
    assert rows[-1]["test_loss"] is not None
    assert runs.checkpoints("a")[-1] == f"round-{last:06d}"
    assert runs.weights("a")
    assert f"ended after round {last} of 9: another would exceed ε = 4.5" in capsys.readouterr().out
    assert runs.train("a", *keys, "--resume") == 0
    assert len(runs.rows("a")) == last


def test_two_ranks_end_together(runs: Runs) -> None:
    keys = [*KEYS, "--rounds=9", "--privacy.target_epsilon=3"]
    assert runs.train("one", *keys) == 0
    processes = runs.start("two", *keys, ranks=2)
    assert [process.wait(60) for process in processes] == [0, 0]
    assert len(runs.rows("two")) < 9
    runs.assert_same("one", "two", ranks=True)


def test_a_delta_that_promises_nothing_is_noted(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.train("a", *KEYS, "--rounds=1", "--privacy.delta=0.125") == 0
    assert "privacy.delta: 0.125 is not below 1/8, one over the number of clients" in capsys.readouterr().out
    assert runs.train("b", *KEYS, "--rounds=1", "--privacy.delta=0.124") == 0
    assert "privacy.delta" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["--algorithm=dp_fedavg", "--sampling=poisson"], "privacy: missing; DpFedAvg sends 'delta'"),
        (PRIVATE, "privacy: Scaffold sends 'delta', 'delta_c' un-noised, so no ε would hold"),
        ([*KEYS, "--sampling=uniform", "--cohort=8"], "sampling: 'uniform'; privacy needs poisson"),
        ([*KEYS, "--weighting=samples"], "weighting: 'samples'; privacy needs uniform"),
        ([*KEYS, "--on_nonfinite=error"], "on_nonfinite: 'error'; privacy needs drop_client"),
        ([*KEYS, "--privacy.noise_multiplier=1e300"], "privacy.noise_multiplier: '1e300', expected float > 0 and < 1"),
        ([*KEYS, "--privacy.noise_multiplier=0"], "privacy.noise_multiplier: 0, expected float > 0"),
        (
            [*KEYS, "--privacy.clip=median"],
            "privacy.clip: 'median', expected float > 0 and < inf (Value error, C is one",
        ),
        ([*KEYS, "--privacy.noise=secure"], "privacy.noise_seed: 5 has no effect on secure noise"),
        ([*KEYS, "--privacy.target_epsilon=0.1"], "privacy.target_epsilon: 0.1 is out of reach: the first round alone"),
        ([*KEYS, "--local_steps=null", "--local_epochs=1"], "local_steps: missing; under privacy K is a public number"),
    ],
)
def test_what_is_refused_before_anything_is_trained(
    runs: Runs, keys: list[str], message: str, error_line: Callable[[], str]
) -> None:
    assert runs.train("a", *keys) == 2
    assert error_line().startswith(message)
    assert not (runs / "a").exists()


def test_running_statistics_are_refused(
    runs: Runs, error_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would leave clients un-noised."""

    def with_batch_norm(*arguments: object) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))

    monkeypatch.setattr(Mlp, "build", with_batch_norm)
    assert runs.train("a", *KEYS) == 2
    assert error_line() == "1.running_mean: running statistics would not be aggregated; use GroupNorm or LayerNorm"


# The command

SPEC = ["--sampling_rate", "0.1", "--rounds", "301", "--delta", "0.002"]


def test_epsilon_of_a_noise_multiplier_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["privacy", "--sigma", "0.8", *SPEC]) == 0
    assert capsys.readouterr() == ("epsilon by PLD  13.4881\nepsilon by RDP  15.9329\n", "")
    assert main(["privacy", "--target_epsilon", "15.94", *SPEC]) == 0
    pld, rdp = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (pld[:3], rdp[:3]) == (["sigma", "by", "PLD"], ["sigma", "by", "RDP"])
    # Reference: 15.93 at 0.8 by RDP; by PLD less noise is enough.
    assert float(pld[3]) < 0.79 < float(rdp[3]) < 0.8


def test_a_bound_is_rounded_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["privacy", "--sigma", "1e4", "--sampling_rate=1", "--rounds=1", "--delta=1e-5"]) == 0
    for line, method in zip(capsys.readouterr().out.splitlines(), METHODS, strict=True):
        exact = Accountant(1e4, 1, 1e-5).epsilon(1, method)
        assert exact <= float(line.split()[-1]) <= exact * 1.00001


def test_a_target_that_one_accountant_reaches(capsys: pytest.CaptureFixture[str]) -> None:
    """This δ is below the rounding of convolutions."""
    assert main(["privacy", *SPEC, "--delta=1e-20", "--target_epsilon=0.1"]) == 0
    assert capsys.readouterr().out == "sigma by PLD  out of reach\nsigma by RDP  157.0275\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sigma", "0", *SPEC], "sigma: 0.0, expected a number > 0 and <= 1000000"),
        (["--sigma", "1e300", *SPEC], "sigma: 1e+300, expected a number > 0 and <= 1000000"),
        (
            ["--target_epsilon", "0.001", *SPEC, "--delta=1e-20"],
            "target_epsilon: 0.001 is out of reach of noise up to 1000000 at delta 1e-20",
        ),
        (["--target_epsilon", "-1", *SPEC], "target_epsilon: -1.0, expected a number > 0"),
        (["--sigma", "1", *SPEC, "--sampling_rate", "2"], "sampling_rate: 2.0, expected a number > 0 and <= 1"),
        (["--sigma", "1", *SPEC, "--rounds", "-1"], "rounds: -1, expected a number >= 0"),
        (["--sigma", "1", *SPEC, "--delta", "0"], "delta: 0.0, expected a number > 0 and < 1"),
    ],
)
def test_numbers_without_a_meaning_exit_with_2(
    arguments: list[str], message: str, error_line: Callable[[], str], tmp_path: Path
) -> None:
    assert main(["privacy", *arguments]) == 2
    assert error_line() == message
