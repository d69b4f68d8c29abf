"""An audit: whoever must tell from a release whether a client took part does no better than ε allows.

The game: a canary sends the same large update, or is not there; all else is equal, and the adversary sees the aggregate
along the canary's direction. From how often each of some thresholds tells the two worlds apart follows a lower bound on
ε, `log((TPR − δ)/FPR)`, of high confidence by Clopper and Pearson. It must stay under the accountant's upper bound, and
must not where the mechanism is broken.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fedkernels.federated.aggregate import Aggregator
from fedkernels.federated.collectives import Collectives
from fedkernels.layout import Layout
from fedkernels.privacy.accountant import Accountant
from fedkernels.privacy.mechanism import GaussianMechanism, Privacy
from fedkernels.wire import Wire

SIGMA, CLIP, DELTA, DRAWS = 1.0, 0.5, 0.05, 12000
THRESHOLDS = np.linspace(-1, 4, 26)
MISTAKE = 1e-6  # probability that any of the bounds does not hold
LAYOUT = Layout.of(nn.Linear(3, 2))


def releases(rate: float, canary: bool) -> np.ndarray:
    """The aggregate along the canary's direction in units of C, once per draw of the noise and of the canary's coin."""
    privacy = Privacy(noise_multiplier=SIGMA, clip=CLIP, delta=DELTA, noise_seed=int(canary))
    mechanism = GaussianMechanism(privacy, divisor=5.0)
    like = torch.zeros(LAYOUT.d, dtype=torch.float64)
    aggregator = Aggregator({"delta": Wire(private=True)}, LAYOUT, like, torch.float64, 5, mechanism)
    direction = torch.ones_like(like) / like.numel() ** 0.5
    other = torch.linspace(-1, 2, LAYOUT.d, dtype=torch.float64)
    other -= (other @ direction) * direction
    coins = np.random.default_rng(2).random(DRAWS) < rate
    seen = np.empty(DRAWS)
    for r in range(DRAWS):
        aggregator.reset(2)
        aggregator.add({"delta": other[None]}, [1.0], [None], [0])
        if canary and coins[r]:
            aggregator.add({"delta": 10 * CLIP * direction[None]}, [1.0], [None], [1])
        aggregator.add_noise(r)
        seen[r] = aggregator.reduce(Collectives(), []).delta @ direction * 5.0 / CLIP
    return seen


def lower_bound(rate: float) -> float:
    """On ε of one release, wrong with probability `MISTAKE` at most."""
    present, absent = releases(rate, canary=True), releases(rate, canary=False)
    level = MISTAKE / (2 * len(THRESHOLDS))
    bounds = []
    for threshold in THRESHOLDS:
        hits, alarms = (present > threshold).sum(), (absent > threshold).sum()
        least_hits = stats.beta.ppf(level, hits, DRAWS - hits + 1) if hits else 0.0
        most_alarms = stats.beta.ppf(1 - level, alarms + 1, DRAWS - alarms) if alarms < DRAWS else 1.0
        bounds.append(np.log(max(least_hits - DELTA, 1e-12) / most_alarms))
    return max(bounds)


def half_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = GaussianMechanism.noise
    monkeypatch.setattr(GaussianMechanism, "noise", lambda self, r, size: noise(self, r, size) / 2)


def no_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GaussianMechanism, "clip_factor", lambda self, norm: torch.ones_like(norm))


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_the_audit_stays_under_epsilon_and_catches_a_broken_mechanism(
    rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    epsilon = Accountant(SIGMA, rate, DELTA).epsilon(1)
    assert 0.4 * epsilon < lower_bound(rate) < epsilon
    for broken in (half_the_noise, no_clip):
        with monkeypatch.context() as patch:
            broken(patch)
            assert lower_bound(rate) > 1.2 * epsilon, broken.__name__
