"""Gains: the adjoint sweep against finite differences and real changes of images; calibration in one call."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import gaussian_level, smooth_effects

from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.diffusion.sampler import SingleLevel, sample
from mlem_diffusion.diffusion.step_rules import STEP_RULES
from mlem_diffusion.errors import UserError
from mlem_diffusion.models.analytic import analytic_family
from mlem_diffusion.multilevel import outlook
from mlem_diffusion.multilevel.gains import Effects, measure_effects
from mlem_diffusion.multilevel.planner import Calibration, calibrate

SHAPE, PROCESS, FAMILY = (1, 4, 4), Process(LinearSchedule(), base_steps=65), analytic_family(levels=3)


def effects(steps: int = 9, key: str = "sde/ddpm", seeds: int = 6, **options) -> Effects:
    path = BrownianPath(range(seeds), SHAPE)
    return measure_effects(FAMILY, STEP_RULES[key], PROCESS.grid(steps), path, **options)


def gains_by_difference(key: str, k: int, at: int, h: float = 1e-2) -> np.ndarray:
    """Gains [2] of level k's difference at one evaluation: central differences of final images, for seeds 0 and 1."""

    def images(size: float) -> torch.Tensor:
        calls = iter(range(1000))

        def denoise(x: torch.Tensor, logsnr: torch.Tensor) -> torch.Tensor:
            out = FAMILY[-1].denoise(x, logsnr)
            if next(calls) == at:
                below = FAMILY[k - 1].denoise(x, logsnr) if k else 0.0
                out = out + size * (FAMILY[k].denoise(x, logsnr) - below)
            return out

        estimator = SingleLevel(Level("moved", denoise, 1.0))
        return sample(estimator, STEP_RULES[key], PROCESS.grid(5), BrownianPath(range(2), SHAPE))[0].double()

    return (((images(h) - images(-h)) / (2 * h)) ** 2).mean(dim=(1, 2, 3)).numpy()


@pytest.mark.parametrize("key", STEP_RULES)
def test_adjoint_agrees_with_finite_differences(key: str) -> None:
    """The mean over 200 directions is within 5 of its standard errors and 1% for first, middle and last pairs."""
    measured = effects(5, key, 2, probes=200).values.astype(np.float64) ** 2
    for k, j in [(0, 0), (1, 2), (2, 1), (2, measured.shape[-1] - 1)]:
        exact, per_direction = gains_by_difference(key, k, j), measured[:, :, k, j]
        error = per_direction.std(axis=1) / 200**0.5
        assert np.all(np.abs(per_direction.mean(axis=1) - exact) < 5 * error + 1e-2 * exact)


@pytest.mark.parametrize("key", STEP_RULES)
def test_the_summed_effects_predict_the_change_by_a_smaller_level(key: str) -> None:
    """For close levels f^2 and f^3, the images' mean squared difference over 32 seeds agrees to 25%.
    The 25% cover the sampling error and the terms of second order."""
    family, path, grid = analytic_family(levels=3, amplitude=0.02), BrownianPath(range(32), SHAPE), PROCESS.grid(9)
    predicted = measure_effects(family, STEP_RULES[key], grid, path, probes=16).difference(1, 2).sum(axis=1)
    images = [sample(SingleLevel(level), STEP_RULES[key], grid, path)[0] for level in family]
    assert (predicted**2).mean() == pytest.approx(float(((images[2] - images[1]) ** 2).mean()), rel=0.25)


def test_levels_merge_and_seeds_do_not_depend_on_the_batch() -> None:
    one, other = effects(batch=4), effects(batch=6)
    assert np.allclose(one.values, other.values, rtol=1e-4, atol=1e-7)
    assert np.allclose(one.difference(-1, 0) + one.difference(0, 2), one.difference(-1, 2), rtol=1e-6)
    assert one.between()[[0, 1], [1, 2]] == pytest.approx(one.gains()[0][1:].sum(axis=1)) and one.between()[2, 0] == 0
    gains, error = one.gains()
    assert gains.shape == error.shape == (3, 9) and np.all(gains[1:, 1:-1] > 0)


def test_the_density_of_gains_of_a_linear_sampler_is_known() -> None:
    """DDIM with f = g x moves the image by M_j = b_j prod_{i>j} (a_i + b_i g_i) per unit of F_j: density (M_j / h_j)^2.
    For one pixel the projections are exact, to float32, whatever the lower level is."""
    top, grid, rule = gaussian_level(0.8, 4.0), PROCESS.grid(9), STEP_RULES["ode/ddim"]
    low = Level("low", lambda x, u: 0.3 * top.denoise(x, u) + u.sigmoid() * x**2, 1.0)
    keep, given = np.stack([e.update[0, :2] for e in rule.program(grid)], axis=1)
    gain = keep + given * [float(top.denoise(torch.ones(1, 1, 1, 1), torch.tensor([u]))) for u in grid.logsnr]
    moved = given[:-1] * np.cumprod(gain[:0:-1])[::-1]
    expected = np.log((moved / np.diff(grid.logsnr)) ** 2)
    measured = measure_effects([low, top], rule, grid, BrownianPath(range(3), (1, 1, 1)))
    where, density = measured.density()
    assert np.array_equal(where, grid.logsnr[:-1])  # without the final denoising
    np.testing.assert_allclose(np.log(density[[0, -1]]), expected[[0, -1]], atol=1e-3)
    np.testing.assert_allclose(np.log(density[1:-1]), np.convolve(expected, [1 / 3] * 3, "valid"), atol=1e-3)
    same = measure_effects([low, Level("same", low.denoise, 2.0)], rule, grid, BrownianPath([1, 2], (1, 1, 1)))
    assert np.array_equal(same.density()[1], [1.0])


def test_effects_transfer_to_other_grids() -> None:
    """From 33 to 65 points, the summed effect of a difference agrees to 15%, each gain to 30% of the largest."""
    coarse, fine = (effects(steps, seeds=16, probes=4) for steps in (33, 65))
    moved = coarse.on(fine.logsnr)
    for k in (1, 2):
        sums = [np.sqrt((e.difference(k - 1, k).sum(axis=1) ** 2).mean()) for e in (moved, fine)]
        assert sums[0] == pytest.approx(sums[1], rel=0.15)
        a, b = moved.gains()[0][k], fine.gains()[0][k]
        assert np.abs(a - b).max() < 0.3 * b.max()
    with pytest.raises(UserError):
        effects(9, "ode/heun").on(fine.logsnr)


def test_effects_round_trip_through_files(tmp_path: Path) -> None:
    one = effects()
    one.save(tmp_path / "effects.npz")
    again = Effects.load(tmp_path / "effects.npz")
    assert again.names == one.names and again.flops_spent == one.flops_spent
    assert np.array_equal(again.values, one.values) and np.array_equal(again.squares, one.squares)


def test_a_level_without_derivatives_is_refused() -> None:
    dead = Level("dead", torch.no_grad()(FAMILY[0].denoise), 1.0)
    with pytest.raises(UserError, match="no derivative"):
        measure_effects([dead], STEP_RULES["ode/ddim"], PROCESS.grid(5), BrownianPath(range(2), SHAPE))


# ------------------------------------------------------------------------------------------------------- calibration

FOUR, RULE, FINE = analytic_family(levels=4), STEP_RULES["sde/ddpm"], Process(LinearSchedule(), base_steps=257)
STEPS, LARGEST = (9, 17, 33), FOUR[-1].flops


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(FOUR, FINE, RULE, SHAPE, steps=STEPS, seeds=range(1000, 1064), calibrate_steps=[33])


def test_plan_within_a_cost(calibration: Calibration) -> None:
    """Mean cost within 5% over 200 samples; error within 35% plus 3 standard errors of its prediction (64 seeds)."""
    plan, path = calibration.plan("nested", cost=3 * LARGEST), BrownianPath(range(200), SHAPE)
    reference = sample(SingleLevel(FOUR[-1]), RULE, FINE.grid(257), path)[0]
    images, ledger = sample(plan.build(FOUR), RULE, FINE.grid(plan.steps), path)
    errors = ((images - reference) ** 2).mean(dim=(1, 2, 3)).numpy()
    assert plan.cost <= 3 * LARGEST and ledger.flops_per_image == pytest.approx(plan.cost, rel=0.05)
    slack = 3 * errors.std() / np.sqrt(len(errors))
    assert plan.predicted is not None and abs(errors.mean() - plan.predicted) < 0.35 * plan.predicted + slack


def test_plan_within_an_error_is_the_cheapest_and_single_levels_are_plans_too(calibration: Calibration) -> None:
    plans = calibration.plans("quadrature")
    wanted = float(np.median([p.predicted for p in plans if p.predicted is not None]))
    plan = calibration.plan("quadrature", error=wanted)
    assert plan.predicted is not None and plan.predicted <= wanted
    assert all(p.cost >= plan.cost for p in plans if p.predicted is not None and p.predicted <= wanted)
    cheapest = min(calibration.plans("independent"), key=lambda p: p.cost)
    assert cheapest.levels == ("f1",) and cheapest.steps == 9
    assert cheapest.predicted == pytest.approx(calibration.own_errors[0, 9])
    # in seconds: if all levels take the same time, plans run the largest level only
    plan = replace(calibration, costs=np.ones(4)).plan("independent", cost=33.0)
    assert plan.levels == ("f4",) and plan.steps == 33


def test_impossible_targets_and_calibrations_without_information_are_refused(calibration: Calibration) -> None:
    for target, message in (
        ({"cost": 1.0}, "cost per image of 1 or less; the least is"), ({}, "either the cost or the error"),
        ({"error": 1e-12}, "squared error of 1e-12 or less; the least is"), ({"cost": 1.0, "error": 1.0}, "either"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            calibration.plan("independent", **target)
    with pytest.raises(UserError, match=r"needs process\.base_steps = 513 or more, .* not 257"):
        calibrate(FOUR, FINE, RULE, SHAPE, steps=(9, 65))
    with pytest.raises(UserError, match="two seeds"):
        calibrate(FOUR, FINE, RULE, SHAPE, steps=STEPS, seeds=range(1))


def test_the_outlook_is_what_the_best_coins_add_and_names_what_fourfold_needs() -> None:
    """S is added error times cost of the planner's own independent coins; D and q those of an exact power law."""
    errors = {n: 8.0 / n**2 for n in (8, 16, 32, 64)}
    inputs = replace(smooth_effects([1.0, 0.5, 0.3], [0.01, 0.1, 1.0], {64: 1e-6}), base=0.005)
    found = outlook.outlook(inputs.effects, inputs.costs, inputs.base, errors)
    assert (found["D"], found["q"]) == (pytest.approx(8), pytest.approx(2))
    levels, unit = [list(inputs.effects.names).index(name) for name in found["chain"]], inputs.costs[-1] + inputs.base
    for cost in (1.5, 2.0):
        planner = inputs.planners("independent")[0]
        plans = [planner.plan(2, price, levels[0], levels) for price in planner.prices(1.1)]
        plan = min(plans, key=lambda p: abs(p.cost - cost))
        assert plan.predicted is not None and len(plan.levels) == len(levels) and plan.table[:, 1:].max() < 1
        certain = sum(inputs.effects.gain(a, b).sum() for a, b in pairwise(levels))
        added = plan.predicted - inputs.own_errors[2, 64] + certain
        spent = plan.cost - 64 * (inputs.costs[levels[0]] + inputs.base)
        assert added * spent / unit == pytest.approx(found["S"], rel=0.02)
    far, near = found["window"]["rms_error"]
    assert far / near == pytest.approx(2, rel=0.1) and found["window"]["speedup"] < 4
    gain, _ = outlook.speedup(np.geomspace(far, near, 25) ** 2, found["S_for_4"], 8.0, 2.0, 0.015 / unit)
    assert gain.min() == pytest.approx(4, rel=0.02) and found["S_for_4"] < found["S"]
    assert f"Fourfold there needs S = {found['S_for_4']:.2g}" in outlook.sentence(found)
    assert outlook.outlook(inputs.effects, inputs.costs, 0.0, {8: 1.0, 16: 0.9})["window"] is None
