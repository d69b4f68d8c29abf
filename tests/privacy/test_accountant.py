"""The accountant: reference values, the library's own events composed apart, and the way back from ε to σ."""

from __future__ import annotations

import math
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedkernels.privacy.accountant import METHODS, Accountant, Method, noise_for


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
    pld = PLDAccountant().compose(event, rounds).get_epsilon(delta)
    assert pld - 1e-9 <= mine.epsilon(rounds) <= pld * 1.001
    assert mine.epsilon(rounds, "rdp") == pytest.approx(
        RdpAccountant().compose(event, rounds).get_epsilon(delta), rel=1e-9
    )
    assert mine.epsilon(rounds) < mine.epsilon(rounds, "rdp")


def test_one_gaussian_release_by_its_closed_form() -> None:
    """At q = 1 and T = 1, `δ = Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ)` (Balle and Wang, 2018)."""

    def phi(t: float) -> float:
        return math.erfc(-t / math.sqrt(2)) / 2

    for sigma, delta in ((1.0, 0.05), (2.0, 1e-4), (0.6, 0.01)):
        epsilon = Accountant(sigma, 1.0, delta).epsilon(1)
        a, b = 1 / (2 * sigma), epsilon * sigma
        assert phi(a - b) - math.exp(epsilon) * phi(-a - b) == pytest.approx(delta, rel=1e-4)


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
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.name == "absl"] == []
    # Without the filter it does: the test hears what it should.
    RdpAccountant().compose(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(0.8)))
    assert "failed to converge" in capfd.readouterr().err + caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0.1, 0.01), "sigma: 0.0, expected a number > 0"),
        ((math.nan, 0.1, 0.01), "sigma: nan, expected a number > 0"),
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
    with pytest.raises(ValueError, match=r"^target_epsilon: 0\.1 is out of reach of any noise at delta 1e-20$"):
        noise_for(0.1, 0.1, 10, 1e-20)
