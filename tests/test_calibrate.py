"""Calibration in one call: it returns the numbers of its parts, and its plans have the predicted errors and costs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mlem_diffusion.diffusion.estimator import SingleLevel
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.diffusion.sampler import sample
from mlem_diffusion.errors import UserError
from mlem_diffusion.models.analytic import analytic_family
from mlem_diffusion.multilevel.calibrate import Calibration, calibrate
from mlem_diffusion.multilevel.plan import choose

SHAPE, FAMILY = (1, 4, 4), analytic_family(levels=4)
PROCESS, STEPS = Process(LinearSchedule(), base_steps=129), (9, 17, 33)
LARGEST = FAMILY[-1].flops


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(
        FAMILY,
        PROCESS,
        "sde",
        "ddpm",
        SHAPE,
        steps=STEPS,
        seeds=range(1000, 1064),
        calibrate_steps=33,
        reference_steps=129,
    )


def measured_error(plan, seeds=range(256)) -> tuple[float, float, float]:
    """The squared error, its standard error over seeds, and the FLOPs per image."""
    reference = sample(SingleLevel(FAMILY[-1]), PROCESS.grid(129), "sde", "ddpm", seeds, SHAPE)[0]
    images, ledger = sample(plan.build(FAMILY), PROCESS.grid(plan.steps), "sde", "ddpm", seeds, SHAPE)
    errors = ((images - reference) ** 2).mean(dim=(1, 2, 3)).numpy()
    return float(errors.mean()), float(errors.std() / np.sqrt(len(errors))), ledger.flops_per_image


@pytest.mark.parametrize("method", ["independent", "nested", "systematic", "quadrature"])
def test_plan_within_a_cost(calibration: Calibration, method: str) -> None:
    """Mean cost within 5% over 256 samples; error within 35% plus 3 standard errors of its prediction (64 seeds)."""
    plan = calibration.plan(method, cost=3 * LARGEST)
    error, se, flops = measured_error(plan)
    assert plan.cost <= 3 * LARGEST and flops == pytest.approx(plan.cost, rel=0.05)
    assert plan.predicted is not None and abs(error - plan.predicted) < 0.35 * plan.predicted + 3 * se


@pytest.mark.parametrize("method", ["independent", "systematic", "quadrature"])
def test_more_cost_never_hurts(calibration: Calibration, method: str) -> None:
    """Over a factor of 16, plans match their cost and predicted errors fall, also between plans of the frontier."""
    costs = [0.5 * LARGEST * 2**i for i in range(5)]
    found = [calibration.plan(method, cost=cost) for cost in costs]
    errors = [plan.predicted for plan in found]
    assert all(plan.cost <= cost for plan, cost in zip(found, costs, strict=True))
    assert all(b is not None and a is not None and b <= a for a, b in pairwise(errors))
    between = 0.5 * sum(sorted(p.cost for p in calibration.plans(method) if len(p.levels) > 1)[2:4])
    frontier = choose(calibration.plans(method), cost=between)
    made = calibration.plan(method, cost=between)
    assert made.predicted is not None and frontier.predicted is not None and made.predicted <= frontier.predicted


def test_plan_within_an_error_is_the_cheapest(calibration: Calibration) -> None:
    plans = calibration.plans("quadrature")
    wanted = float(np.median([p.predicted for p in plans if p.predicted is not None]))
    plan = calibration.plan("quadrature", error=wanted)
    assert plan.predicted is not None and plan.predicted <= wanted
    assert all(p.cost >= plan.cost for p in plans if p.predicted is not None and p.predicted <= wanted)


def test_single_levels_are_plans_too(calibration: Calibration) -> None:
    """If EM is best, EM is chosen: the cheapest plan is the smallest level on the coarsest grid."""
    cheapest = min(calibration.plans("independent"), key=lambda p: p.cost)
    assert cheapest.levels == ("f1",) and cheapest.steps == 9
    assert cheapest.predicted == pytest.approx(calibration.own_errors[0, 9])


def test_costs_in_seconds_change_the_choice(calibration: Calibration) -> None:
    """If all levels take the same time, plans run the largest level only."""
    plan = calibration.plan("independent", cost=33.0, costs=[1.0, 1.0, 1.0, 1.0])
    assert plan.levels == ("f4",) and plan.steps == 33


def test_impossible_targets_are_refused(calibration: Calibration) -> None:
    with pytest.raises(UserError, match="cheapest costs"):
        calibration.plan("independent", cost=1.0)
    with pytest.raises(UserError, match="best is"):
        calibration.plan("independent", error=1e-12)
    with pytest.raises(UserError, match="either"):
        calibration.plan("independent")


def test_a_calibration_without_information_is_refused() -> None:
    with pytest.raises(UserError, match=r"reference_steps = 33 must be more than .* 33"):
        calibrate(FAMILY, PROCESS, "sde", "ddpm", SHAPE, steps=(9, 33), reference_steps=33)
    with pytest.raises(UserError, match="two seeds"):
        calibrate(FAMILY, PROCESS, "sde", "ddpm", SHAPE, seeds=range(1))
