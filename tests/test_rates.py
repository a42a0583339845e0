"""The problem with a known solution: its integrators, the expected costs, the choice of settings and the exponents."""

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mlem_diffusion.errors import UserError
from mlem_diffusion.multilevel.estimators import draw_coins, evaluation_probabilities, telescope_weights
from mlem_diffusion.rates import exponents, problem
from mlem_diffusion.rates.exponents import RateSetting, exponent_entry, fit_exponent
from mlem_diffusion.rates.problem import fire, jump_process, linear_response

GRID = 768
MODEL = np.array([12.0, 0.38, 0.6, 0.45])  # constants of the error model


@pytest.fixture(scope="module", params=["sde", "ode"])
def replicates(request) -> problem.Replicates:
    return problem.draw((7,), 60, 10, GRID, problem.NOISE[request.param])


def level_drift(replicates: problem.Replicates, k: int, x: np.ndarray, t: float) -> np.ndarray:
    """The drift f^k, written out from the definition."""
    time, phase, *rest = replicates.parameters[:, :, k * replicates.count : (k + 1) * replicates.count]
    wave = np.cos(time * t + phase + rest[0] * x[0] + rest[1] * x[1])
    return problem.true_drift(x, t) + 0.5**k * np.stack([(a * wave).sum(axis=0) for a in rest[2:]])


def test_levels_have_errors_of_the_stated_size_and_are_independent():
    many = problem.draw((1,), 4000, 3, 2, 3.0)
    g = [2.0**k * (level_drift(many, k, many.start, 0.3) - problem.true_drift(many.start, 0.3)) for k in (1, 2, 3)]
    for wave in g:  # 4000 replicates, 2 components: five standard errors of the rms are below 0.06
        assert np.sqrt(np.mean(wave**2)) == pytest.approx(1.0, abs=0.06)
    assert abs(np.mean(g[0] * g[1])) < 0.06 and abs(np.mean(g[1] * g[2])) < 0.06


def coarsen(dw, area):
    """The increments and areas of the same path on a grid with half as many steps."""
    return dw[::2] + dw[1::2], area[::2] + area[1::2] + 1 / len(dw) * dw[::2]


def test_the_reference_is_of_order_one_and_a_half_and_negligible():
    def error(grid, paths):
        fine = problem.draw((3,), paths, 1, grid, problem.NOISE["sde"])
        coarse = problem.solve(fine.start, *coarsen(fine.dw, fine.area), fine.noise)
        return np.sqrt(np.mean((coarse - fine.end) ** 2))

    assert 1.3 < np.log(error(256, 100) / error(1024, 100)) / np.log(4) < 2.1
    # a hundredth of the finest target error on the grid of 12288 steps, and so 4^1.5 of that on this one
    assert error(3072, 20) < 4**1.5 * 0.01 * 2**-11


def test_certain_coins_are_euler_maruyama(replicates):
    n, k = 12, 3
    x, dw = replicates.start, replicates.dw.reshape(n, -1, 2, 60).sum(axis=1)
    for i in range(n):
        x = x + level_drift(replicates, k, x, i / n) / n + replicates.noise * dw[i]
    assert np.allclose(problem.euler(replicates, n, [((1.0,) * (k + 1), ())])[0], x, atol=1e-12)


@pytest.mark.parametrize("p", [(1.0, 1.0, 0.4, 0.1), (1.0, 0.5, 0.3, 0.3)], ids=["first level certain", "all random"])
def test_the_estimator_is_unbiased_for_the_top_level(replicates, p):
    parameters = replicates.parameters.reshape(6, -1, 11, 60)[:, :, :4, :4].reshape(6, -1, 16)
    few = replace(replicates, parameters=parameters, start=replicates.start[:, :4], dw=replicates.dw[:, :, :4])
    ends = problem.euler(few, 1, [(p, (j,)) for j in range(4000)])
    exact = problem.euler(few, 1, [((1.0,) * 4, ())])[0]
    z = (ends.mean(axis=0) - exact) / (ends.std(axis=0) / np.sqrt(len(ends)))
    assert np.abs(z).max() < 4  # standard errors; 8 comparisons


def test_a_setting_does_not_depend_on_the_others(replicates):
    a, b = (RateSetting("ml_em", 2.5, k, 48, 4.0) for k in (5, 4))
    c, d = (RateSetting("poisson", 2.5, k, 0, 4.0) for k in (3, 2))
    together = exponents.squared_errors(replicates, [b, a, d, c])
    assert all(np.array_equal(exponents.squared_errors(replicates, [s])[s], together[s]) for s in (a, c))


def test_expected_costs_and_probabilities():
    setting = RateSetting("ml_em", 2.0, 4, 40, 3.0)
    p = np.tile(setting.p, (setting.steps, 1))
    weights = telescope_weights(p, draw_coins(p, range(4000), "independent"))
    counted = (weights != 0).sum(axis=0) @ setting.level_costs  # per run
    assert counted.mean() == pytest.approx(setting.cost, abs=4 * counted.std() / np.sqrt(len(counted)))
    assert RateSetting("ml_em", 2.0, 4, 40, 1e9).cost == RateSetting("em", 2.0, 4, 40).cost == 40 * 2.0**8
    law = 3 / 40 * (setting.level_costs / setting.level_costs[-1]) ** -(0.5 + 1 / 2.0)
    assert np.allclose(setting.p, [1, *np.minimum(1, law[1:])])
    poisson = RateSetting("poisson", 2.0, 2, 0, 5.0)
    assert poisson.cost == pytest.approx(poisson.rates @ [4, 4 + 16])


def test_between_events_the_path_follows_the_brownian_motion():
    fine = problem.draw((5,), 50, 1, 1024, 3.0)
    dw, area = fine.dw, fine.area
    for _ in range(4):
        dw, area = coarsen(dw, area)
    coarse = replace(fine, dw=dw, area=area)
    known = linear_response(coarse)
    assert np.abs(known - linear_response(fine)[::16]).max() < 2e-3  # 0.02 and more without the areas
    # Two events in cell 25 of 64, one in cell 40. Bridges without noise are straight lines from the last known point.
    state = [np.zeros(50, complex), np.zeros(50, complex), np.zeros(50)]
    still, level = np.zeros(50), np.ones(50, int)
    for wait, end, share, start in ((25.25, 26, 0.25, known[25]), (0.5, 26, 2 / 3, None), (14.5, 41, 0.25, known[40])):
        before = state[1].copy() if start is None else start
        fire(coarse, known, state, np.arange(50), (still + wait / 64, level, still, still))
        assert np.allclose(state[1], before + share * (known[end] - before))
    assert np.allclose(state[2], 40.25 / 64)


@pytest.mark.parametrize("dynamics", ["sde", "ode"])
def test_the_jump_process_is_the_limit_of_small_steps(dynamics):
    block = problem.draw((5,), 100, 3, 768, problem.NOISE[dynamics])
    setting = RateSetting("poisson", 2.5, 3, 0, 4.0)
    p = np.minimum(1.0, setting.rates / 768)  # of ML-EM over f^0, with a random level 1 too
    stepped = problem.euler(block, 768, [((1.0, *p), (j,)) for j in range(12)])
    jumped = jump_process(block, [(setting.rates, (j,)) for j in range(12)])
    errors = [np.sqrt(np.mean((end - block.end) ** 2)) for end in (stepped, jumped)]
    assert errors[1] == pytest.approx(errors[0], rel=0.08)  # 1200 runs each: standard error of the ratio 3%
    assert setting.cost == pytest.approx(768 * evaluation_probabilities(p[None])[0] @ setting.level_costs, rel=0.05)


def test_the_fit_recovers_an_exact_exponent():
    costs = np.geomspace(1, 1e6, 15)
    squared = np.tile((costs ** (-1 / 2.5))[:, None] ** 2, (1, 30))
    found = fit_exponent(costs, squared, 50)
    assert found["exponent"] == pytest.approx(-2.5) and found["interval"] == pytest.approx([-2.5, -2.5])
    assert found["error_range"] == pytest.approx([10 ** (-6 / 2.5), 1])
    low, high = fit_exponent(costs, squared * np.random.default_rng(0).chisquare(1, squared.shape), 400)["interval"]
    assert low < -2.5 < high and 0.1 < high - low < 1


def test_settings_are_chosen_by_the_error_model():
    settings = exponents.pilot_settings(4096, 12, 20000.0)
    assert np.allclose(exponents.calibrate(settings, exponents.model_errors(settings, MODEL) ** 2), MODEL)
    settings = [RateSetting("em", 1, k, n) for k in (1, 2, 3) for n in (4, 8)]
    errors = np.array([0.5, 0.4, 0.3, 0.2, 0.25, 0.1])
    chosen = exponents.cheapest(settings, errors, [0.45, 0.3, 0.28, 0.1, 0.01])
    assert [(s.levels, s.steps) for s in chosen] == [(1, 8), (2, 4), (2, 8), (3, 8)]


def test_predictions_are_those_of_the_theory():
    found = {g: [exponents.predicted_exponent(m, g) for m in exponents.METHODS] for g in (1, 2, 2.5, 4)}
    assert found == {1: [-2, -1.5, -2], 2: [-3, -2, -2], 2.5: [-3.5, -2.5, -2.5], 4: [-5, -4, -4]}


def test_a_small_run_has_the_exponents():
    """EM and ML-EM at gamma = 3 over two octaves and a half of error, chosen by an error model with known constants."""
    targets = exponents.target_errors(2**-3.5, 2**-6, 2)
    chosen = {}
    for method in ("em", "ml_em"):
        settings = exponents.candidates(method, 3.0, GRID, 10)
        chosen[method] = exponents.cheapest(settings, exponents.model_errors(settings, MODEL), targets)
    squared = exponents.measure(("sde", 1, [s.run for found in chosen.values() for s in found]), 200, 10, GRID)
    entries = {m: exponent_entry(s, squared, MODEL, 100) for m, s in chosen.items()}
    assert entries["em"]["exponent"] == pytest.approx(-4, abs=0.4)
    assert entries["ml_em"]["exponent"] == pytest.approx(-3.3, abs=0.4)  # a coarse range: above the limit of -3
    for e in entries.values():
        assert e["interval"][0] < e["exponent"] < e["interval"][1]
        assert e["exponent"] == pytest.approx(e["expected_in_range"], abs=0.25)
    for settings in chosen.values():  # the error model is right to a fifth
        measured = [np.sqrt(squared[s.run].mean()) for s in settings]
        assert np.allclose(measured, exponents.model_errors(settings, MODEL), rtol=0.2)


def test_the_study_from_settings_to_results(monkeypatch):
    """With errors drawn from the error model instead of simulated, on made-up seeds."""

    def measure(item, paths, levels, grid):
        _, seed, settings = item
        scale = np.random.default_rng(seed).chisquare(2, paths) / 2
        return {s: exponents.model_errors([s], MODEL)[0] ** 2 * scale * (1 + seed) for s in settings}

    monkeypatch.setattr(exponents, "measure", measure)
    targets, poisson = {"coarsest": 1 / 16, "finest": 1 / 256}, {"coarsest": 0.18, "events": 9000, "seeds": 1}
    r = SimpleNamespace(dynamics=["sde"], gammas=[3], choose_seeds=[0], judge_seeds=[9, 4], paths=20, levels=12)
    r.grid, r.bootstrap = 4096, 20
    r.targets, r.poisson = SimpleNamespace(**targets, per_octave=3), SimpleNamespace(**poisson, per_octave=2)
    others = (1, lambda *_: nullcontext(lambda *_: None), lambda: False)
    result, frame = exponents.verify(r, *others)
    json.dumps(result, allow_nan=False)
    assert set(result["sde"]["3"]) == set(frame.method) == {"em", "ml_em", "poisson"}
    assert len(result["step_size"]["sde"]["curves"]) == 4 and "sde, gamma 3, em" in exponents.summary(result)
    r.judge_seeds = [0, 1]
    with pytest.raises(UserError, match="no seed in common"):
        exponents.verify(r, *others)
