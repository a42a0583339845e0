"""Calibration in one call: its plans have the predicted errors and costs."""

from dataclasses import replace

import numpy as np
import pytest

from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.diffusion.sampler import SingleLevel, sample
from mlem_diffusion.diffusion.step_rules import step_rule
from mlem_diffusion.errors import UserError
from mlem_diffusion.models.analytic import analytic_family
from mlem_diffusion.multilevel.planner import Calibration, calibrate

SHAPE, FAMILY, RULE = (1, 4, 4), analytic_family(levels=4), step_rule("sde/ddpm")
PROCESS, STEPS, LARGEST = Process(LinearSchedule(), base_steps=257), (9, 17, 33), FAMILY[-1].flops


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(FAMILY, PROCESS, RULE, SHAPE, steps=STEPS, seeds=range(1000, 1064), calibrate_steps=33)


@pytest.mark.parametrize("method", ["nested", "quadrature"])
def test_plan_within_a_cost(calibration: Calibration, method: str) -> None:
    """Mean cost within 5% over 200 samples; error within 35% plus 3 standard errors of its prediction (64 seeds)."""
    plan, path = calibration.plan(method, cost=3 * LARGEST), BrownianPath(range(200), SHAPE)
    reference = sample(SingleLevel(FAMILY[-1]), RULE, PROCESS.grid(257), path)[0]
    images, ledger = sample(plan.build(FAMILY), RULE, PROCESS.grid(plan.steps), path)
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
    with pytest.raises(UserError, match=r"needs reference_steps = 257 or more, .* not 256"):
        calibrate(FAMILY, PROCESS, RULE, SHAPE, steps=(9, 33), reference_steps=256)
    with pytest.raises(UserError, match="two seeds"):
        calibrate(FAMILY, PROCESS, RULE, SHAPE, steps=STEPS, seeds=range(1))
