"""gamma is recovered from synthetic laws in all three forms, with intervals of the stated coverage."""

from __future__ import annotations

import numpy as np
import pytest
from laws import AMPLITUDE, FLOOR, FORMS, contains, flops_of, law

from mlem_diffusion.errors import UserError
from mlem_diffusion.gamma.power_law import fit_differences, fit_loss, fit_to_largest


@pytest.mark.parametrize("gamma", [1.5, 2.5, 5.0, 15.0])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("levels", [5, 8])
def test_exact_laws_give_their_gamma(name: str, gamma: float, levels: int) -> None:
    flops = flops_of(levels)
    fit = FORMS[name](flops, law(flops, gamma)[name])
    assert fit.gamma == pytest.approx(gamma, rel=1e-5)
    assert fit.amplitude == pytest.approx(AMPLITUDE, rel=1e-5)
    assert fit.floor == (pytest.approx(FLOOR, rel=1e-5) if name == "loss_fit" else None)
    assert fit.interval == pytest.approx((gamma, gamma), rel=1e-4)  # no scatter
    assert fit.note == ""


@pytest.mark.parametrize("gamma", [2.5, 5.0])
@pytest.mark.parametrize("name", FORMS)
def test_noisy_laws_give_gamma_on_average(name: str, gamma: float) -> None:
    """The median of 60 repeats is within 5%; one repeat scatters by 3 to 8%."""
    rng = np.random.default_rng(1)
    flops = flops_of(7)
    noise = 0.01 if name == "loss_fit" else 0.1
    values = law(flops, gamma)[name]
    found = [FORMS[name](flops, values * np.exp(noise * rng.standard_normal(len(values)))) for _ in range(60)]
    gammas = np.array([fit.gamma for fit in found], dtype=float)
    assert np.median(gammas) == pytest.approx(gamma, rel=0.05)


def test_power_law_without_floor_and_bound_on_the_floor() -> None:
    flops = flops_of(6)
    fit = fit_loss(flops, (flops / 1e9) ** -0.1)
    assert fit.gamma == pytest.approx(20, rel=1e-4)
    assert fit.floor == pytest.approx(0, abs=1e-6)
    # Steeper at the end than a power law: only a negative L_inf would follow it.
    bent = fit_loss(flops, 2.0 - 0.1 * np.log(flops / flops[0]) ** 1.2)
    assert bent.floor == 0
    assert bent.amplitude is not None and bent.amplitude > 0


def test_difference_form_has_no_bias_where_a_straight_line_has() -> None:
    """For five widths with fourfold FLOPs, a log-log slope gives 2.25 for 2.5 and 3.5 for 5."""
    flops = 0.233e9 * 4.0 ** np.arange(5)
    for gamma, naive in ((2.5, 2.25), (5.0, 3.5)):
        values = law(flops, gamma)["to_largest"]
        slope = np.polyfit(np.log(flops[:-1]), np.log(values), 1)[0]
        assert -2 / slope == pytest.approx(naive, abs=0.2)
        assert fit_to_largest(flops, values).gamma == pytest.approx(gamma, rel=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_intervals_cover(name: str) -> None:
    """The coverage of 95% intervals over 200 repeats is within [0.90, 0.99].

    Calibrated intervals fail once in a few hundred such tests.
    """
    rng = np.random.default_rng(2)
    flops, gamma, repeats = flops_of(6), 2.5, 200
    values = law(flops, gamma)[name]
    noise = 0.01 if name == "loss_fit" else 0.1
    profile = hull = bootstrap = 0
    for repeat in range(repeats):
        y = values * np.exp(noise * rng.standard_normal(len(values)))
        fit = FORMS[name](flops, y, bootstrap=40 if name == "loss_fit" else 100, seed=repeat)
        profile += contains(fit.profile_interval, gamma)
        hull += contains(fit.interval, gamma)
        assert fit.bootstrap_interval is not None
        bootstrap += contains(fit.bootstrap_interval, gamma)
    assert 0.90 <= profile / repeats <= 0.99
    assert 0.85 <= bootstrap / repeats <= 0.995
    assert profile <= hull < repeats


def test_measurement_errors_widen_the_bootstrap_only() -> None:
    flops = flops_of(7)
    values = law(flops, 5.0)["differences"]
    exact = fit_differences(flops, values, bootstrap=200)
    measured = fit_differences(flops, values, covariance=np.diag((0.1 * values) ** 2), bootstrap=200)
    shared = fit_differences(flops, values, covariance=np.outer(values, values) * 0.01, bootstrap=200)
    assert measured.profile_interval == exact.profile_interval
    assert measured.interval[0] < 4.8 and measured.interval[1] is not None and measured.interval[1] > 5.2
    # An error that all points share changes the amplitude, not gamma.
    assert shared.interval == pytest.approx((5.0, 5.0), rel=1e-3)


def test_few_levels_give_a_note() -> None:
    flops = flops_of(3)
    fit = fit_differences(flops, law(flops, 2.5)["differences"])
    assert fit.gamma == pytest.approx(2.5, rel=1e-6)
    assert fit.interval == (0.0, None)
    assert "Too few levels" in fit.note
    with pytest.raises(UserError):
        fit_loss(flops, np.array([1.0, 2.0]))


@pytest.mark.parametrize("name", ["differences", "to_largest"])
def test_differences_that_do_not_fall_have_no_finite_gamma(name: str) -> None:
    flops = flops_of(7)
    rising = law(flops, 2.5)[name][::-1] * 10
    fit = FORMS[name](flops, rising, bootstrap=50)
    assert fit.gamma is None and fit.amplitude is None
    assert fit.interval[0] > 2 and fit.interval[1] is None
    assert "do not fall" in fit.note
    equal = FORMS[name](flops, np.zeros(6))
    assert equal.gamma is None and equal.interval == (0.0, None)


def test_slow_fall_leaves_gamma_unbounded_above() -> None:
    rng = np.random.default_rng(3)
    flops = flops_of(6)
    values = law(flops, 20.0)["differences"] * np.exp(0.3 * rng.standard_normal(5))
    fit = fit_differences(flops, values, bootstrap=100)
    assert fit.interval[1] is None
    assert contains(fit.interval, 20.0)


def test_flat_losses_have_no_finite_gamma() -> None:
    flops = flops_of(7)
    rng = np.random.default_rng(4)
    for loss in (np.full(7, 0.02), 0.02 * np.exp(0.01 * rng.standard_normal(7))):
        fit = fit_loss(flops, loss, bootstrap=50)
        assert fit.gamma is None and fit.interval == (0.0, None)
        assert "does not fall" in fit.note
