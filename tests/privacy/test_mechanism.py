"""The mechanism: what is clipped, what is added, what it is divided by, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from rank_checks import Silent, noise_on_ranks, secrets_on_ranks
from scipy import stats
from support import CLIENTS, on_ranks, tiny_engine
from torch import Tensor, nn

from fedkernels.algorithms import DpFedAvg, FedAvg, Scaffold
from fedkernels.contract import Algorithm, Round, Task, Vectors
from fedkernels.federated.aggregate import Aggregator
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.schedule import sample_cohort
from fedkernels.layout import Layout
from fedkernels.privacy.mechanism import GaussianMechanism, Privacy, secure_normal, seeded_normal
from fedkernels.rng import Purpose, stream
from fedkernels.wire import Wire

SEEDED = Privacy(noise_multiplier=0.7, clip=0.05, delta=0.01, noise_seed=7)
LAYOUT = Layout.of(nn.Linear(6, 4))
WIRES = {"delta": Wire(private=True), "extra": Wire(3, private=True)}


def private_engine(algorithm: Algorithm, privacy: Privacy | None = SEEDED, **options: Any) -> Any:
    settings = {"sampling": "poisson", "on_nonfinite": "drop_client", "privacy": privacy}
    return tiny_engine(algorithm, **(settings | options))


# Noise


@pytest.mark.parametrize("draw", [lambda n: seeded_normal(3, 5, n), secure_normal], ids=["seeded", "secure"])
def test_noise_is_standard_normal(draw: Any) -> None:
    z = draw(100_001)
    assert z.shape == (100_001,)
    assert z.dtype == np.float64
    # Bounds that a true standard normal sample leaves once in 10^9 runs.
    low, high = stats.chi2.ppf([5e-10, 1 - 5e-10], len(z))
    assert low < (z**2).sum() < high
    assert abs(z.mean()) * math.sqrt(len(z)) < 6.2
    assert stats.kstest(z, "norm").pvalue > 1e-9
    # Neighbours, and halves that Box and Muller make from the same radius, go their own ways.
    half = len(z) // 2
    for other in (z[1:], z[half : 2 * half]):
        n = min(len(z), len(other))
        assert abs(np.corrcoef(z[:n][: len(other)], other[:n])[0, 1]) * math.sqrt(n) < 6.2


def test_rounds_have_noise_of_their_own_and_the_same_round_the_same() -> None:
    z = [seeded_normal(7, r, 100_000) for r in range(4)]
    correlations = np.corrcoef(z)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() * math.sqrt(100_000) < 5.5
    assert np.array_equal(seeded_normal(7, 2, 100_000), z[2])
    assert not np.array_equal(seeded_normal(8, 2, 100_000), z[2])


def test_noise_does_not_follow_from_the_seed_of_the_run() -> None:
    for purpose in Purpose:
        same = np.array_equal(stream(7, purpose, 0).standard_normal(8), seeded_normal(7, 0, 8))
        assert same == (purpose is Purpose.NOISE)
    noises = {}
    for seed in (0, 1):
        for noise_seed in (7, 8, None):
            privacy = Privacy(noise_multiplier=1, clip=1, delta=0.01, noise_seed=noise_seed)
            noises[seed, noise_seed] = tuple(
                private_engine(Silent(), privacy, seed=seed).mechanism.noise(0, 5).tolist()
            )
    assert noises[0, 7] == noises[1, 7]
    assert len(set(noises.values())) == 4


def test_runs_of_one_noise_seed_share_neither_noise_nor_cohorts() -> None:
    one, again, other = (GaussianMechanism(SEEDED, 1, run) for run in (3, 3, 4))
    assert torch.equal(one.noise(0, 1000), again.noise(0, 1000))
    z = np.stack([mechanism.noise(0, 100_000).numpy() for mechanism in (one, other)])
    assert abs(np.corrcoef(z)[0, 1]) * math.sqrt(100_000) < 5.5
    cohorts = [
        [sample_cohort("poisson", mechanism.seed, r, 1000, 100).tolist() for r in range(3)]
        for mechanism in (one, again, other)
    ]
    assert cohorts[0] == cohorts[1]
    assert all(a != b for a, b in zip(cohorts[0], cohorts[2], strict=True))


@pytest.mark.parametrize(
    "privacy",
    [
        SEEDED,
        dataclasses.replace(SEEDED, noise_seed=None),
        dataclasses.replace(SEEDED, noise="secure", noise_seed=None),
    ],
)
def test_cohorts_do_not_follow_from_the_seed_of_the_run(privacy: Privacy) -> None:
    """Whoever knows the initial model knows that."""
    engine = private_engine(DpFedAvg(), privacy)
    assert engine.mechanism.seed.bit_length() > 90
    drawn = []
    for r in range(4):
        engine.round = r
        drawn.append(engine.draw_cohort()[0])
    assert drawn == [sample_cohort("poisson", engine.mechanism.seed, r, CLIENTS, 6).tolist() for r in range(4)]
    assert drawn != [sample_cohort("poisson", 0, r, CLIENTS, 6).tolist() for r in range(4)]


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_ranks_agree_on_a_secret_that_each_draws(noise: str) -> None:
    first, second = on_ranks(2, secrets_on_ranks, noise)
    assert first["drawn"] != second["drawn"]
    assert first["settled"] == second["settled"] == first["drawn"]
    np.testing.assert_array_equal(first["x"], second["x"])


def test_secure_noise_is_another_at_every_call() -> None:
    mechanism = GaussianMechanism(Privacy(noise_multiplier=2, clip=3, delta=0.1, noise="secure"), 1)
    assert mechanism.secure
    one, other = mechanism.noise(0, 20_000), mechanism.noise(0, 20_000)
    assert not torch.equal(one, other)
    assert float(one.std()) == pytest.approx(6, rel=0.05)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_noise_is_added_once_on_any_number_of_ranks(ranks: int) -> None:
    """Clients that send zeros leave noise alone, over the expected cohort."""
    seed = GaussianMechanism(SEEDED, 1).seed
    found = [noise_on_ranks(Collectives())] if ranks == 1 else on_ranks(ranks, noise_on_ranks)
    for steps in found:
        for r, step in enumerate(steps):
            np.testing.assert_allclose(step, 0.7 * 0.05 * seeded_normal(seed, r, len(step)) / 6, rtol=1e-12, atol=1e-14)


# Clip and divisor


def released(rows: list[dict[str, Tensor]], privacy: Privacy = SEEDED, divisor: float = 1.0, **options: Any) -> Tensor:
    """All wires of an aggregate in one vector, without its noise, times the divisor."""
    mechanism = GaussianMechanism(privacy, divisor)
    like = torch.zeros(LAYOUT.d, dtype=torch.float64)
    aggregator = Aggregator(WIRES, LAYOUT, like, torch.float64, 5, mechanism)
    aggregator.reset(len(rows))
    for position, row in enumerate(rows):
        aggregator.add({name: value[None] for name, value in row.items()}, [1.0], [None], [position])
    aggregator.add_noise(0)
    agg = aggregator.reduce(Collectives(), [])
    whole = torch.cat([agg.delta, agg.extra])
    return whole * divisor - mechanism.noise(0, len(whole))


def row(size: float, seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    whole = torch.from_numpy(rng.standard_normal(LAYOUT.d + 3))
    whole *= size / whole.norm()
    return {"delta": whole[: LAYOUT.d], "extra": whole[LAYOUT.d :]}


@pytest.mark.parametrize("size", [0.0, 0.03, 0.05, 0.0500001, 4.0, 1e100])
def test_one_clip_over_all_wires_of_a_client(size: float) -> None:
    sent = row(size, 0)
    whole = torch.cat(list(sent.values()))
    expected = whole * min(1, 0.05 / size) if size else whole
    torch.testing.assert_close(released([sent]), expected, rtol=1e-12, atol=1e-15)


def test_a_client_moves_the_sum_by_the_clip_at_most() -> None:
    sizes = [0.0, 0.01, 0.05, 1.0, 1e6, 1e-300, 1e200]  # the square of the last overflows
    everyone = [row(size, seed) for seed, size in enumerate(sizes)]
    whole = released(everyone)
    for absent in range(len(everyone)):
        rest = released(everyone[:absent] + everyone[absent + 1 :])
        assert float((whole - rest).norm()) <= 0.05 * (1 + 1e-12)


@pytest.mark.parametrize("divisor", [1.0, 6.0, 0.5])
def test_the_divisor_is_fixed(divisor: float) -> None:
    for clients in (0, 1, 3):
        sent = [row(0.02, seed) for seed in range(clients)]
        expected = sum((torch.cat(list(r.values())) for r in sent), torch.zeros(LAYOUT.d + 3, dtype=torch.float64))
        torch.testing.assert_close(released(sent, divisor=divisor), expected, rtol=1e-12, atol=1e-14)


class Ones(DpFedAvg):
    """Clients that send ones, but for `wrong`, which send NaN."""

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        for batch in task.batches():
            poisoned = torch.isnan(batch.inputs.flatten(1)).any(1)
        return {"delta": torch.where(poisoned[:, None], torch.nan, torch.ones(len(task.steps), len(s.x)).double())}


def test_whoever_comes_or_drops_out_is_divided_by_the_expected_cohort() -> None:
    from cases import poison

    engine = private_engine(Ones(), Privacy(noise_multiplier=1, clip=1, delta=0.01, noise_seed=7))
    seed = engine.mechanism.seed
    poison(engine, {r: {int(i) for i in sample_cohort("poisson", seed, r, CLIENTS, 6)[:1]} for r in (1, 2)})
    d = engine.layout.d
    sizes = []
    for r in range(4):
        before = engine.server.x.clone()
        metrics = engine.run_round()
        left = len(sample_cohort("poisson", seed, r, CLIENTS, 6)) - (r in (1, 2))
        assert (metrics["cohort"], metrics["dropped"]) == (left, int(r in (1, 2)))
        assert metrics["clipped_fraction"] == 1
        assert metrics["update_norm_p10"] == metrics["update_norm_p90"] == pytest.approx(math.sqrt(d))
        assert metrics["noise_to_signal"] == pytest.approx(math.sqrt(d) / left)
        noise = torch.from_numpy(seeded_normal(seed, r, d))
        expected = (left / math.sqrt(d) + noise) / 6
        torch.testing.assert_close(engine.server.x - before, expected, rtol=1e-11, atol=1e-13)
        sizes.append(left)
    assert len(set(sizes)) > 1


def test_nobody_is_told_how_many_came() -> None:
    seen: list[Round] = []

    class Spy(DpFedAvg):
        def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
            seen.append(task.round)
            return super().client(s, k, task)

        def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
            seen.append(r)
            return super().server(s, agg, r)

    engine = private_engine(Spy(), work=LocalWork(150, local_steps=40, local_epochs=1))
    rows = [engine.run_round() for _ in range(3)]
    assert len({row["cohort"] for row in rows}) > 1
    assert {(r.cohort, r.steps) for r in seen} == {(6, 40)}


def test_the_bucket_is_kept_while_cohorts_fit_and_sent_without_what_they_leave() -> None:
    aggregator = Aggregator(WIRES, LAYOUT, torch.zeros(LAYOUT.d), torch.float64, 5, GaussianMechanism(SEEDED, 1))
    places, sizes = [], []
    for cohort in (7, 3, 0, 7, 5, 8):
        aggregator.reset(cohort)
        places.append(aggregator.bucket.data_ptr())
        sizes.append(len(aggregator.bucket))
        assert not aggregator.bucket.any()
        aggregator.bucket.fill_(math.nan)
    assert len(set(places[:-1])) == 1
    assert sizes == [5 + 1 + LAYOUT.d + 3 + cohort for cohort in (7, 3, 0, 7, 5, 8)]


def test_what_is_told_of_a_round() -> None:
    engine = private_engine(DpFedAvg(), lr=0.5)
    row = engine.run_round()
    assert row["epsilon"] == engine.accountant.epsilon(1)
    assert row["epsilon_rdp"] == engine.accountant.epsilon(1, "rdp") > row["epsilon"]
    assert 0 <= row["clipped_fraction"] <= 1
    assert 0 < row["update_norm_p10"] < row["update_norm_p50"] < row["update_norm_p90"]
    empty = private_engine(DpFedAvg(), cohort=1)
    row = {"cohort": None}
    while row["cohort"] != 0:
        x = empty.server.x.clone()
        row = empty.run_round()
    assert row["epsilon"] == empty.accountant.epsilon(empty.round) > empty.accountant.epsilon(empty.round - 1)
    assert row["clipped_fraction"] is row["update_norm_p50"] is row["noise_to_signal"] is None
    assert not torch.equal(empty.server.x, x)


# Refusals


class Mixed(DpFedAvg):
    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire(private=True), "loss": Wire("scalar", diagnostic=True)}


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        (
            DpFedAvg(),
            {"privacy": None},
            "privacy: missing; DpFedAvg sends 'delta' through the private mechanism: set priv",
        ),
        (FedAvg(), {}, "privacy: FedAvg sends 'delta' un-noised, so no ε would hold"),
        (Scaffold(), {}, "privacy: Scaffold sends 'delta', 'delta_c' un-noised"),
        (Mixed(), {}, "privacy: Mixed sends 'loss' un-noised"),
        (DpFedAvg(), {"sampling": "uniform"}, "sampling: 'uniform'; privacy needs poisson"),
        (DpFedAvg(), {"sampling": "uniform", "cohort": CLIENTS}, "sampling: 'uniform'; privacy needs poisson"),
        (DpFedAvg(), {"weighting": "samples"}, "weighting: 'samples'; privacy needs uniform"),
        (
            DpFedAvg(),
            {"work": LocalWork(8, local_epochs=1)},
            "local_steps: missing; under privacy K is a public number",
        ),
        (DpFedAvg(), {"on_nonfinite": "error"}, "on_nonfinite: 'error'; privacy needs drop_client, since a stop would"),
    ],
)
def test_what_is_refused(algorithm: Algorithm, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        private_engine(algorithm, **options)


@pytest.mark.parametrize("wire", [Wire(private=True, reduce="sum"), Wire(private=True, only_block=True)])
def test_a_private_wire_is_sent_whole_and_averaged(wire: Wire) -> None:
    with pytest.raises(ValueError, match="wire 'part' is private, so it must be sent whole and reduced by mean"):
        Aggregator({"part": wire}, LAYOUT, torch.zeros(LAYOUT.d), torch.float64, 5, GaussianMechanism(SEEDED, 1))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"noise_multiplier": 0}, r"privacy.noise_multiplier: 0, expected a number > 0 and < 1e\+06"),
        ({"noise_multiplier": 1e300}, r"privacy.noise_multiplier: 1e\+300, expected a number > 0 and < 1e\+06"),
        ({"noise_multiplier": math.nan}, "privacy.noise_multiplier: nan, expected"),
        ({"clip": -1.0}, "privacy.clip: -1.0, expected"),
        ({"clip": math.inf}, "privacy.clip: inf, expected"),
        ({"clip": "median"}, "privacy.clip: 'median', expected"),
        ({"clip": True}, "privacy.clip: True, expected"),
        ({"target_epsilon": 0.0}, "privacy.target_epsilon: 0.0, expected a number > 0 and < inf"),
        ({"target_epsilon": math.nan}, "privacy.target_epsilon: nan, expected a number > 0 and < inf"),
        ({"accountant": "moments"}, "privacy.accountant: 'moments', expected pld or rdp"),
        ({"noise": "none"}, "privacy.noise: 'none', expected seeded or secure"),
        ({"delta": 1.0}, "privacy.delta: 1.0, expected a number > 0 and < 1"),
        ({"noise": "secure", "noise_seed": 3}, "privacy.noise_seed: 3 has no effect on secure noise"),
    ],
)
def test_settings_without_a_meaning_are_refused_in_programs_too(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Privacy(**({"noise_multiplier": 1.0, "clip": 1.0, "delta": 0.01} | keys))


def test_full_participation_is_poisson_sampling_at_rate_one() -> None:
    engine = private_engine(DpFedAvg(), cohort=CLIENTS)
    assert engine.run_round()["cohort"] == CLIENTS
    assert engine.accountant.sampling_rate == 1


def test_a_target_that_one_round_exceeds_is_refused() -> None:
    privacy = Privacy(noise_multiplier=0.7, clip=1, delta=0.01, target_epsilon=0.5)
    with pytest.raises(
        ValueError, match=r"^privacy.target_epsilon: 0.5 is out of reach: the first round .* ε = 2\.\d+"
    ):
        private_engine(DpFedAvg(), privacy)
