"""gamma is recovered from synthetic laws in all four forms, without noise and with it."""

import numpy as np
import pytest
from laws import AMPLITUDE, FLOOR, FORMS, contains, flops_of, law

from mlem_diffusion.errors import UserError
from mlem_diffusion.gamma import drops
from mlem_diffusion.gamma.drops import fit_drops
from mlem_diffusion.gamma.power_law import fit


@pytest.mark.parametrize("gamma", [1.5, 5.0, 15.0])
@pytest.mark.parametrize("form", [*FORMS, "drops"])
@pytest.mark.parametrize("levels", [5, 8])
def test_exact_laws_give_their_gamma(form, gamma, levels):
    flops = flops_of(levels)
    exact, rel = law(flops, gamma), 0.02 if form == "drops" else 1e-4  # the scatter of drops is found on a grid
    found = fit_drops(flops, exact["loss_fit"])[0] if form == "drops" else fit(form, flops, exact[form])
    assert found.gamma == pytest.approx(gamma, rel=1e-5)
    assert found.amplitude == pytest.approx(AMPLITUDE, rel=1e-5)
    assert found.floor == (pytest.approx(FLOOR, rel=1e-5) if form == "loss_fit" else None)
    assert found.interval == pytest.approx((gamma, gamma), rel=rel)  # no scatter
    assert found.note == ""


def test_neighbouring_drops_share_noise_and_may_be_negative(monkeypatch):
    """Generalised least squares has a tenth less spread than weights that ignore the shared noise, and covers."""
    flops, rng, gamma = flops_of(7), np.random.default_rng(0), 2.5
    loss = law(flops, gamma)["loss_fit"]
    losses = loss * np.exp(0.06 * rng.standard_normal((100, 7)))
    assert (np.diff(losses) > 0).any(1).mean() > 0.2
    right, whole = [fit_drops(flops, y)[0] for y in losses], drops.DropsLaw.set_scatter

    def uncorrelated(law, scatter):
        whole(law, scatter)
        law.weights = np.diag(1 / np.diag(np.linalg.inv(law.weights)))

    monkeypatch.setattr(drops.DropsLaw, "set_scatter", uncorrelated)
    wrong = [fit_drops(flops, y)[0] for y in losses]
    covered = [np.mean([contains(found.interval, gamma) for found in fits]) for fits in (right, wrong)]
    spread = [np.std([2 / (found.gamma or np.inf) for found in fits]) for fits in (right, wrong)]
    assert covered[0] >= 0.9 and abs(covered[0] - 0.95) <= abs(covered[1] - 0.95) and spread[0] < 0.93 * spread[1]
    monkeypatch.undo()
    # an error that all levels share is in no drop; the spread between seeds widens the interval
    assert fit_drops(flops, loss, np.full((7, 7), 1e-6))[0].interval == pytest.approx((gamma, gamma), rel=0.02)
    assert fit_drops(flops, loss, between=0.02**2)[0].interval[0] < 0.98 * gamma


def test_power_law_without_floor_and_bound_on_the_floor():
    flops = flops_of(6)
    found = fit("loss_fit", flops, (flops / 1e9) ** -0.1)
    assert found.gamma == pytest.approx(20, rel=1e-4) and found.floor == pytest.approx(0, abs=1e-6)
    # steeper at the end than a power law: only a negative L_inf would follow it
    bent = fit("loss_fit", flops, 2.0 - 0.1 * np.log(flops / flops[0]) ** 1.2)
    assert bent.floor == 0 and bent.amplitude > 0


def test_measurement_errors_widen_the_bootstrap_only():
    flops = flops_of(7)
    values = law(flops, 5.0)["differences"]
    exact = fit("differences", flops, values, bootstrap=200)
    measured = fit("differences", flops, values, covariance=np.diag((0.1 * values) ** 2), bootstrap=200)
    shared = fit("differences", flops, values, covariance=np.outer(values, values) * 0.01, bootstrap=200)
    assert measured.profile_interval == exact.profile_interval
    assert measured.interval[0] < 4.8 and measured.interval[1] > 5.2
    # an error that all points share changes the amplitude, not gamma
    assert shared.interval == pytest.approx((5.0, 5.0), rel=1e-3)


def test_three_levels_give_no_interval_and_wrong_values_an_error():
    flops = flops_of(3)
    found = fit("differences", flops, law(flops, 2.5)["differences"])
    assert found.gamma == pytest.approx(2.5, rel=1e-6) and found.interval == (0.0, None)
    with pytest.raises(UserError):
        fit("loss_fit", flops, np.array([1.0, 2.0, np.nan]))
    with pytest.raises(UserError):
        fit("loss_fit", flops[::-1], np.ones(3))


@pytest.mark.parametrize("form", ["differences", "to_largest"])
def test_differences_that_do_not_fall_have_no_finite_gamma(form):
    flops, rng = flops_of(7), np.random.default_rng(3)
    found = fit(form, flops, law(flops, 2.5)[form][::-1] * 10, bootstrap=50)
    assert found.gamma is None and found.amplitude is None and not found.falls
    assert found.interval[0] > 2 and found.interval[1] is None
    equal = fit(form, flops, np.zeros(6))
    assert equal.gamma is None and equal.interval == (0.0, None)
    # a slow and rough fall leaves gamma unbounded above
    slow = fit(form, flops, law(flops, 20.0)[form] * np.exp(0.5 * rng.standard_normal(6)), bootstrap=100)
    assert slow.interval[1] is None and contains(slow.interval, 20.0)


@pytest.mark.parametrize("sd", [0.0, 0.01])
def test_flat_losses_have_no_finite_gamma(sd):
    loss = 0.02 * np.exp(sd * np.random.default_rng(4).standard_normal(7))
    found = fit("loss_fit", flops_of(7), loss, bootstrap=50)
    for one in (found, fit_drops(flops_of(7), loss)[0]):
        assert one.gamma is None and one.interval == (0.0, None) and "does not fall" in one.note
