"""The accountant: reference values, the library's own events composed apart, and the way back from ε to σ."""

from __future__ import annotations

import math
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from fedkernels.privacy.accountant import METHODS, MOST_NOISE, Accountant, Method, OutOfReachError, noise_for


@pytest.mark.parametrize(("sigma", "pld", "rdp"), [(0.8, 13.49, 15.93), (0.95, 9.39, 10.86)])
def test_reference_values(sigma: float, pld: float, rdp: float) -> None:
    accountant = Accountant(sigma, 0.1, delta=1 / 500)
    assert round(accountant.epsilon(301), 2) == pld
    assert round(accountant.epsilon(301, "rdp"), 2) == rdp


@pytest.mark.parametrize(
    ("sigma", "rate", "rounds", "delta"),
    [(1.3, 0.2, 40, 1e-3), (4.0, 0.05, 500, 1e-5), (0.7, 0.5, 3, 0.01), (2.0, 1.0, 9, 1e-4)],
)
def test_events_composed_by_the_library(sigma: float, rate: float, rounds: int, delta: float) -> None:
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    mine = Accountant(sigma, rate, delta)
    theirs = PLDAccountant().compose(event, rounds).get_epsilon(delta)
    assert theirs - 1e-9 <= mine.epsilon(rounds) <= theirs * 1.001
    assert mine.epsilon(rounds, "rdp") == pytest.approx(
        RdpAccountant().compose(event, rounds).get_epsilon(delta), rel=1e-9
    )
    assert mine.epsilon(rounds) < mine.epsilon(rounds, "rdp")


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε where `δ = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ)` (Balle and Wang, 2018)."""

    def excess(epsilon: float) -> float:
        a, b = norm.logcdf(mu / 2 - epsilon / mu), epsilon + norm.logcdf(-mu / 2 - epsilon / mu)
        return float(a + math.log(-math.expm1(b - a)) - math.log(delta))

    return float(brentq(excess, 1e-12, mu**2 / 2 + 40 * mu, xtol=1e-13))


@pytest.mark.parametrize(
    ("sigma", "rounds", "delta", "most"),
    [
        (1.0, 1, 0.05, 1e-4), (2.0, 1, 1e-4, 1e-4), (0.6, 1, 0.01, 1e-4), (50.0, 10**4, 1e-6, 1e-4),
        # Here rounding in a float64 convolution is no longer small against δ.
        (300.0, 10**4, 3e-11, 1e-2), (50.0, 10**5, 1e-8, 1e-2), (300.0, 10**5, 1e-9, 1e-2), (50.0, 10**5, 1e-10, 0.5),
    ],
)  # fmt: skip
def test_gaussian_releases_by_their_closed_form(sigma: float, rounds: int, delta: float, most: float) -> None:
    """At q = 1, T releases with σ are one with σ/√T: a bound lies above it, and close."""
    exact = gaussian_epsilon(math.sqrt(rounds) / sigma, delta)
    assert exact <= Accountant(sigma, 1.0, delta).epsilon(rounds) <= exact + most


def test_a_delta_below_rounding_has_no_bound() -> None:
    assert Accountant(1.0, 0.1, 1e-14).epsilon(100) == math.inf
    assert Accountant(1.0, 0.1, 1e-14).epsilon(10) < math.inf


@pytest.mark.parametrize(("rate", "rounds", "delta"), [(1e-4, 1000, 1e-6), (1e-3, 10_000, 1e-7)])
def test_few_clients_of_many_on_a_fine_grid(rate: float, rounds: int, delta: float) -> None:
    fine = pld.from_gaussian_mechanism(1.0, sampling_prob=rate, value_discretization_interval=2e-5)
    exact = fine.self_compose(rounds).get_epsilon_for_delta(delta)
    assert exact <= Accountant(1.0, rate, delta).epsilon(rounds) <= exact * 1.025


def test_more_rounds_less_noise_and_more_clients_cost_more() -> None:
    base = Accountant(1.0, 0.1, 1e-3).epsilon(50)
    assert Accountant(1.0, 0.1, 1e-3).epsilon(51) > base
    assert Accountant(0.99, 0.1, 1e-3).epsilon(50) > base
    assert Accountant(1.0, 0.101, 1e-3).epsilon(50) > base
    assert Accountant(1.0, 0.1, 0.9e-3).epsilon(50) > base


def test_nothing_released_costs_nothing_and_hardly_any_noise_everything() -> None:
    for method in METHODS:
        assert Accountant(1.0, 0.1, 1e-3).epsilon(0, method) == 0
        assert Accountant(1e-30, 0.1, 1e-3).epsilon(1, method) == math.inf


@pytest.mark.parametrize("method", METHODS)
def test_affordable_rounds(method: Method) -> None:
    accountant = Accountant(0.8, 0.1, 1 / 500)
    rounds = accountant.affordable(8.0, 301, method)
    assert accountant.epsilon(rounds, method) <= 8 < accountant.epsilon(rounds + 1, method)
    assert accountant.affordable(1e9, 301, method) == 301
    assert accountant.affordable(1e-9, 301, method) == 0


@pytest.mark.parametrize("method", METHODS)
def test_sigma_from_epsilon_is_the_inverse(method: Method) -> None:
    sigma = noise_for(5.0, 0.1, 301, 1 / 500, method)
    assert Accountant(sigma, 0.1, 1 / 500).epsilon(301, method) <= 5
    assert Accountant(sigma - 1e-4, 0.1, 1 / 500).epsilon(301, method) > 5


def test_the_library_does_not_speak_to_the_user(capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    Accountant(0.8, 0.1, 1 / 500).epsilon(301, "rdp")
    Accountant(1e5, 1e-3, 1e-9).epsilon(10, "rdp")
    noise_for(1e-3, 0.1, 10, 0.01)
    Accountant(0.02, 0.1, 1 / 500).epsilon(301, "rdp")
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.name == "absl"] == []
    # Without the filter it does: the test hears what it should.
    RdpAccountant().compose(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(0.8)))
    assert "failed to converge" in capfd.readouterr().err + caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0.1, 0.01), "sigma: 0.0, expected a number > 0 and <= 1000000"),
        ((math.nan, 0.1, 0.01), "sigma: nan, expected a number > 0 and <= 1000000"),
        ((1.1e6, 0.1, 0.01), "sigma: 1100000.0, expected a number > 0 and <= 1000000"),
        ((1e300, 0.1, 0.01), r"sigma: 1e\+300, expected a number > 0 and <= 1000000"),
        ((1.0, 0.0, 0.01), "sampling_rate: 0.0, expected a number > 0 and <= 1"),
        ((1.0, 1.5, 0.01), "sampling_rate: 1.5, expected a number > 0 and <= 1"),
        ((1.0, 0.1, 0.0), "delta: 0.0, expected a number > 0 and < 1"),
        ((1.0, 0.1, 1.0), "delta: 1.0, expected a number > 0 and < 1"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments: tuple[float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Accountant(*arguments)


def test_a_target_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^target_epsilon: 0\.0, expected a number > 0$"):
        noise_for(0.0, 0.1, 10, 0.01)
    message = r"^target_epsilon: 0\.1 is out of reach of noise up to 1000000 at delta 1e-20$"
    with pytest.raises(OutOfReachError, match=message):
        noise_for(0.1, 0.1, 10, 1e-20)


def test_all_noise_is_tried_before_a_target_is_out_of_reach() -> None:
    rounds, delta = 10**9, 1e-3
    # Just within reach: more noise than the last power of two times the first one tried.
    target = Accountant(0.95 * MOST_NOISE, 1.0, delta).epsilon(rounds, "rdp")
    assert noise_for(target, 1.0, rounds, delta, "rdp") == pytest.approx(0.95 * MOST_NOISE)


def test_rounding_costs_more_rather_than_nothing() -> None:
    """Divergences of tiny releases come out negative in float64, where the library speaks of an ε of zero."""
    assert Accountant(1e6, 1e-3, 1e-12).epsilon(10, "rdp") > gaussian_epsilon(math.sqrt(10) * 1e-9, 1e-12) > 0
