"""The problem with a known solution: its integrators, the expected costs, the choice of settings and the exponents."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mlem_diffusion.errors import UserError
from mlem_diffusion.figures.rates import plot_rates
from mlem_diffusion.multilevel.probabilities import draw_coins, telescope_weights
from mlem_diffusion.rates import poisson_limit as jumps
from mlem_diffusion.rates import problem as synthetic
from mlem_diffusion.rates import settings as rates
from mlem_diffusion.rates.exponents import (
    agreement,
    bars,
    exponent_entry,
    fit_exponent,
    point,
    rms,
    slope,
    step_size_entry,
    towards_limit,
)
from mlem_diffusion.rates.poisson_limit import Rates, jump_process
from mlem_diffusion.rates.problem import Coins
from mlem_diffusion.rates.settings import RateSetting

GRID = 1536


@pytest.fixture(scope="module", params=["sde", "ode"])
def replicates(request) -> synthetic.Replicates:
    return synthetic.draw((7,), 60, 10, GRID, synthetic.NOISE[request.param])


def level_drift(replicates: synthetic.Replicates, k: int, x: np.ndarray, t: float) -> np.ndarray:
    """The drift f^k, written out from the definition."""
    time, phase, *rest = replicates.parameters[:, :, k * replicates.count : (k + 1) * replicates.count]
    wave = np.cos(time * t + phase + rest[0] * x[0] + rest[1] * x[1])
    return synthetic.true_drift(x, t) + 0.5**k * np.stack([(a * wave).sum(axis=0) for a in rest[2:]])


# ---- the problem and its exact solution ----------------------------------------------------------------------


def test_levels_have_errors_of_the_stated_size_and_are_independent():
    many = synthetic.draw((1,), 4000, 3, 2, 3.0)
    g = [2.0**k * (level_drift(many, k, many.start, 0.3) - synthetic.true_drift(many.start, 0.3)) for k in (1, 2, 3)]
    for wave in g:  # 4000 replicates, 2 components: five standard errors of the rms are below 0.06
        assert np.sqrt(np.mean(wave**2)) == pytest.approx(1.0, abs=0.06)
    assert abs(np.mean(g[0] * g[1])) < 0.06 and abs(np.mean(g[1] * g[2])) < 0.06


def test_the_reference_is_of_order_one_and_a_half_and_negligible():
    errors = [rates.reference_error("sde", 3, 100, n) for n in (256, 1024)]
    assert 1.3 < np.log(errors[0] / errors[1]) / np.log(4) < 2.1
    assert rates.reference_error("sde", 3, 20, 12288) < 0.01 * 2**-11  # against the finest target error


def test_coarser_increments_are_of_the_same_path():
    rng = np.random.default_rng(0)
    dw, area = rng.normal(size=(8, 2, 3)), rng.normal(size=(8, 2, 3))
    once, twice = synthetic.coarsen(dw, area), synthetic.coarsen(*synthetic.coarsen(dw, area))
    assert np.allclose(twice[0].sum(axis=0), dw.sum(axis=0)) and once[0].shape == (4, 2, 3)
    path = np.cumsum(dw, axis=0) - dw  # W at the left ends
    assert np.allclose(synthetic.coarsen(*twice)[1][0], (area + path / 8).sum(axis=0))


# ---- EM and ML-EM --------------------------------------------------------------------------------------------


def test_certain_coins_are_euler_maruyama(replicates):
    n, k = 12, 3
    x, dw = replicates.start, replicates.increments(n)
    for i in range(n):
        x = x + level_drift(replicates, k, x, i / n) / n + replicates.noise * dw[i]
    assert np.allclose(synthetic.euler(replicates, n, [Coins((1.0,) * (k + 1))])[0], x, atol=1e-12)


def test_em_is_of_first_order(replicates):
    counts = [48, 96, 192, 384]
    mse = rates.squared_errors(replicates, [RateSetting("em", 1, 10, n) for n in counts]).mean(axis=1)
    assert slope(np.array(counts, float), np.sqrt(mse))[0] == pytest.approx(-1, abs=0.1)


@pytest.mark.parametrize("p", [(1.0, 1.0, 0.4, 0.1), (1.0, 0.5, 0.3, 0.3)], ids=["first level certain", "all random"])
def test_the_estimator_is_unbiased_for_the_top_level(replicates, p):
    few = replace(
        replicates,
        parameters=replicates.parameters.reshape(6, -1, 11, 60)[:, :, :4, :4].reshape(6, -1, 16),
        start=replicates.start[:, :4],
        dw=replicates.dw[:, :, :4],
    )
    ends = synthetic.euler(few, 1, [Coins(p, (j,)) for j in range(4000)])
    exact = synthetic.euler(few, 1, [Coins((1.0,) * 4)])[0]
    z = (ends.mean(axis=0) - exact) / (ends.std(axis=0) / np.sqrt(len(ends)))
    assert np.abs(z).max() < 4  # standard errors; 8 comparisons


def test_a_setting_does_not_depend_on_the_others(replicates):
    a, b = RateSetting("ml_em", 2.5, 5, 48, 4.0), RateSetting("ml_em", 2.5, 4, 48, 4.0)
    c, d = RateSetting("poisson", 2.5, 3, 0, 4.0), RateSetting("poisson", 2.5, 2, 0, 4.0)
    alone = [rates.squared_errors(replicates, [s])[0] for s in (a, c)]
    together = rates.squared_errors(replicates, [b, a, d, c])
    assert np.array_equal(alone[0], together[1]) and np.array_equal(alone[1], together[3])


def test_steps_that_are_not_nested_are_refused(replicates):
    with pytest.raises(UserError, match="not nested"):
        synthetic.euler(replicates, 7, [Coins((1.0, 1.0))])


# ---- costs ---------------------------------------------------------------------------------------------------


def test_expected_cost_matches_the_evaluations():
    setting = RateSetting("ml_em", 2.0, 4, 40, 3.0)
    p = np.tile(setting.p, (setting.steps, 1))
    weights = telescope_weights(p, draw_coins(p, range(4000), "independent"))
    counted = (weights != 0).sum(axis=0) @ setting.level_costs  # per run
    assert counted.mean() == pytest.approx(setting.cost, abs=4 * counted.std() / np.sqrt(len(counted)))
    assert RateSetting("ml_em", 2.0, 4, 40, 1e9).cost == RateSetting("em", 2.0, 4, 40).cost == 40 * 2.0**8


def test_probabilities_follow_the_law_with_c():
    setting = RateSetting("ml_em", 2.5, 6, 512, 4.0)
    c = setting.c
    assert c is not None and setting.p[0] == 1
    law = np.minimum(1, c * setting.level_costs ** -(0.5 + 1 / 2.5))
    assert np.allclose(setting.p[1:], law[1:]) and setting.p[-1] * setting.steps == pytest.approx(4.0)


def test_events_come_at_their_rates():
    rng, setting = np.random.default_rng(0), Rates((30.0, 10.0))
    wait, level, move, _ = (
        np.concatenate(c) for c in zip(*(jumps._draw_events(rng, setting, 200) for _ in range(2)), strict=True)
    )
    before = np.cumsum(wait, axis=0) < 1
    for k, rate in ((1, 30.0), (2, 10.0)):
        fires = (before & (level == k)).sum(axis=0)  # Poisson: variance = mean
        assert fires.mean() == pytest.approx(rate, abs=4 * np.sqrt(rate / 200))
        assert fires.var() == pytest.approx(rate, rel=0.5) and np.all(move[level == k] == 1 / rate)
    poisson = RateSetting("poisson", 2.0, 2, 0, 5.0)
    assert poisson.cost == pytest.approx(poisson.rates @ [4, 4 + 16])


# ---- the jump process ----------------------------------------------------------------------------------------


def test_between_events_the_path_follows_the_brownian_motion():
    fine = synthetic.draw((5,), 50, 1, 1024, 3.0)
    dw, area = fine.dw, fine.area
    for _ in range(4):
        dw, area = synthetic.coarsen(dw, area)
    coarse = replace(fine, dw=dw, area=area)
    known = jumps._linear_response(coarse)
    assert np.abs(known - jumps._linear_response(fine)[::16]).max() < 2e-3  # 0.02 and more without the areas
    # Two events in cell 25 of 64, one in cell 40. Bridges without noise are straight lines from the last known point.
    state = [np.zeros(50, complex), np.zeros(50, complex), np.zeros(50)]
    still, level = np.zeros(50), np.ones(50, int)
    for wait, end, share, start in ((25.25, 26, 0.25, known[25]), (0.5, 26, 2 / 3, None), (14.5, 41, 0.25, known[40])):
        before = state[1].copy() if start is None else start
        jumps._fire(coarse, known, state, np.arange(50), still + wait / 64, level, still, still)
        assert np.allclose(state[1], before + share * (known[end] - before))
    assert np.allclose(state[2], 40.25 / 64)


@pytest.mark.parametrize("dynamics", ["sde", "ode"])
def test_the_jump_process_is_the_limit_of_small_steps(dynamics):
    block = synthetic.draw((5,), 100, 3, 768, synthetic.NOISE[dynamics])
    setting = RateSetting("ml_em_over_base", 2.5, 3, 768, 4.0)
    ends = [
        synthetic.euler(block, 768, [Coins((1.0, *setting.p), (j,)) for j in range(16)]),
        jump_process(block, [Rates(tuple(setting.rates), (j,)) for j in range(16)]),
    ]
    errors = [np.sqrt(np.mean((end - block.end) ** 2)) for end in ends]
    assert errors[1] == pytest.approx(errors[0], rel=0.08)  # 1600 runs each: standard error of the ratio 3%
    assert replace(setting, method="poisson", steps=0).cost == pytest.approx(setting.cost, rel=0.05)


def test_the_jump_process_does_not_depend_on_the_step():
    coarse, fine = (synthetic.draw((5,), 20, 2, grid, 0.0) for grid in (4, 64))
    settings = [Rates((20.0, 5.0))]
    assert np.array_equal(jump_process(coarse, settings), jump_process(fine, settings))


def test_many_small_jumps_follow_the_level(replicates):
    end = jump_process(replicates, [Rates((4000.0,))])[0]
    level_1 = synthetic.euler(replicates, GRID, [Coins((1.0, 1.0))])[0]
    # coins leave sqrt(E |f^1 - f^0|^2 / 4000) = 0.014 at most, the step 0.003
    assert np.sqrt(np.mean((end - level_1) ** 2)) < 0.02 < 0.1 < np.sqrt(np.mean((end - replicates.end) ** 2))


# ---- choosing and fitting ------------------------------------------------------------------------------------


def test_the_fit_recovers_an_exact_exponent():
    costs = np.geomspace(1, 1e6, 15)
    squared = np.tile((costs ** (-1 / 2.5))[:, None] ** 2, (1, 30))
    found = fit_exponent(costs, squared, 50, 0)
    assert found.exponent == pytest.approx(-2.5) and found.interval == pytest.approx((-2.5, -2.5))
    assert found.decades == pytest.approx(6 / 2.5) and found.halves == pytest.approx((-2.5, -2.5))
    noisy = squared * np.random.default_rng(0).chisquare(1, squared.shape)
    wide = fit_exponent(costs, noisy, 400, 0)
    assert wide.interval[0] < -2.5 < wide.interval[1] and 0.1 < wide.interval[1] - wide.interval[0] < 1
    with pytest.raises(UserError, match="at least 4 points"):
        fit_exponent(costs[:3], squared[:3], 10, 0)


def test_the_error_model_recovers_its_constants():
    settings = rates.pilot_settings(4096, 12, 20000.0)
    truth = np.array([9.0, 0.4, 0.6, 0.5])
    assert np.allclose(rates.calibrate(settings, rates.model_errors(settings, truth) ** 2), truth)


def test_the_cheapest_setting_below_each_target():
    settings = [RateSetting("em", 1, k, n) for k in (1, 2, 3) for n in (4, 8)]
    errors = np.array([0.5, 0.4, 0.3, 0.2, 0.25, 0.1])
    chosen = rates.cheapest(settings, errors, [0.45, 0.3, 0.28, 0.1, 0.01])
    assert [(s.levels, s.steps) for s in chosen] == [(1, 8), (2, 4), (2, 8), (3, 8)]


def test_predictions_are_those_of_the_theory():
    found = {g: [rates.predicted_exponent(m, g) for m in rates.METHODS] for g in (1, 2, 2.5, 4)}
    assert found == {1: [-2, -1.5, -2], 2: [-3, -2, -2], 2.5: [-3.5, -2.5, -2.5], 4: [-5, -4, -4]}


@pytest.fixture(scope="module")
def small_run():
    """EM and ML-EM at gamma = 3 over two octaves and a half of error, chosen by an error model with known constants."""
    constants, gamma = np.array([12.0, 0.38, 0.6, 0.45]), 3.0
    targets = rates.target_errors(2**-3.5, 2**-6, 2)
    families = {
        "em": rates.em_settings(gamma, GRID, 10),
        "ml_em": rates.ml_em_settings(gamma, GRID, 10),
        "poisson": rates.poisson_settings(gamma, 4, 600.0),
    }
    chosen = {m: rates.cheapest(s, rates.model_errors(s, constants), targets) for m, s in families.items()}
    coarse = rates.target_errors(0.3, 0.11, 4)
    chosen["poisson"] = rates.cheapest(families["poisson"], rates.model_errors(families["poisson"], constants), coarse)
    runs = [s.run for found in chosen.values() for s in found]
    return constants, chosen, rates.measure("sde", 1, 200, 10, GRID, runs)


def test_a_small_run_has_the_exponents(small_run):
    constants, chosen, squared = small_run
    entries = {m: exponent_entry(s, squared, constants, 100, 0) for m, s in chosen.items()}
    assert entries["em"]["exponent"] == pytest.approx(-4, abs=0.4)
    assert entries["ml_em"]["exponent"] == pytest.approx(-3.3, abs=0.4)  # a coarse range: above the limit of -3
    assert entries["ml_em"]["exponent"] - entries["em"]["exponent"] > 0.25
    for method in ("em", "ml_em"):
        e = entries[method]
        assert e["interval"][0] < e["exponent"] < e["interval"][1]
        assert e["exponent"] == pytest.approx(e["expected_in_range"], abs=0.25)
    for method, settings in chosen.items():  # the error model is right to a fifth
        measured = [rms(squared[s.run])[0] for s in settings]
        assert np.allclose(measured, rates.model_errors(settings, constants), rtol=0.2), method


def test_the_model_approaches_the_limit():
    constants = np.array([12.0, 0.38, 0.6, 0.45])
    for gamma, far in ((1.0, 0.03), (2.5, 0.05), (4.0, 0.03)):
        windows = towards_limit(gamma, constants)
        gaps = [abs(w["exponent"] - rates.predicted_exponent("ml_em", gamma)) for w in windows]
        assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < far


def test_bars_need_every_condition():
    good = {m: {"exponent": e, "predicted": e, "decades": 2.1} for m, e in (("em", -3.5), ("ml_em", -2.5))}
    assert bars(good)["met"]
    for method, change in (("em", {"exponent": -3.9}), ("ml_em", {"exponent": -2.9}), ("em", {"decades": 1.9})):
        assert not bars({**good, method: {**good[method], **change}})["met"]
    close = {"em": {**good["em"], "exponent": -3.2}, "ml_em": {**good["ml_em"], "exponent": -2.8}}
    assert not bars(close)["gap"] and not bars(close)["met"]


def test_results_are_json_and_a_figure(small_run, tmp_path):
    constants, chosen, squared = small_run
    events, curves = rates.limit_settings(GRID)
    assert all(s.steps <= 512 for c in curves.values() for s in c)
    rng = np.random.default_rng(0)
    made_up = {
        s.run: rng.chisquare(2, 50) / (s.steps or 1e4) for s in [*events, *(s for c in curves.values() for s in c)]
    }
    study = step_size_entry(curves, events, made_up)
    assert len(study["agreement"]) == 2 and not study["agreement"][0]["within_tolerance"]
    same = {s: np.ones(20) for s in made_up}
    near = next(iter(curves.values()))[-1]
    assert agreement(events[0], near, same)["error_ratio"] == 1
    result = {"sde": {"3": {m: exponent_entry(s, squared, constants, 20, 0) for m, s in chosen.items()}}}
    result["step_size"] = {"sde": study}
    rows = [point(s, squared, "sde") for found in chosen.values() for s in found]
    json.dumps(result, allow_nan=False)
    plot_rates(result, rows, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes()[:4] == b"\x89PNG"
