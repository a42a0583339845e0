"""Calibration of any family in one call: measure gains and the error of each level alone, then compute plans.

    rule = step_rule("sde/ddpm")
    calibration = calibrate(family, process, rule, shape)
    plan = calibration.plan("quadrature", cost=10 * family[-1].flops)
    images, ledger = sample(plan.build(family), rule, process.grid(plan.steps), BrownianPath(seeds, shape))

Calibrate on other seeds than those of the evaluation, and run a plan before you rely on its predicted error.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..diffusion.brownian import BrownianPath
from ..diffusion.estimator import SingleLevel
from ..diffusion.level import Level
from ..diffusion.process import Process
from ..diffusion.sampler import sample
from ..diffusion.step_rules import REFERENCE_RULE, StepRule
from ..errors import UserError
from ..statistics import squared_errors
from .gains import measure_effects
from .plan import Plan
from .planner import RuleInputs, plan_for_cost, plans


@dataclass(frozen=True)
class Calibration:
    """What plans need to know of a family: measured effects of its level differences, and errors of levels alone."""

    inputs: RuleInputs

    def plans(self, method: str) -> list[Plan]:
        """The predicted frontier of a method (planner.METHODS), from cheap to expensive."""
        return plans(self.inputs, method)

    def plan(self, method: str, *, cost: float | None = None, error: float | None = None) -> Plan:
        """The plan of smallest predicted error within a cost per image, or the cheapest within a squared error.

        Raises UserError if no plan qualifies, and unless exactly one of cost and error is given."""
        if (cost is None) == (error is None):
            raise UserError("Give either the cost or the error that a plan may have.")
        found, words = self.plans(method), "cost per image" if error is None else "predicted squared error"
        limited, wanted, limit = ("cost", "predicted", cost) if error is None else ("predicted", "cost", error)
        if cost is not None and (exact := plan_for_cost(self.inputs, method, cost)) is not None:
            found.append(exact)
        within = [plan for plan in found if getattr(plan, limited) <= limit]
        if not within:
            least = min((getattr(plan, limited) for plan in found), default=float("nan"))
            raise UserError(f"No plan has a {words} of {limit:.4g} or less; the least is {least:.4g}.")
        return min(within, key=lambda plan: getattr(plan, wanted))


def check_reference(finest: int, steps: Iterable[int], name: str = "reference_steps") -> None:
    """Raise UserError unless the reference is finer than every grid: on its own the largest level has no error."""
    if finest <= (most := max(steps, default=0)):
        raise UserError(f"{name} = {finest} must be more than the most steps of a plan, {most}.")


def calibrate(
    family: Sequence[Level],
    process: Process,
    rule: StepRule,
    shape: tuple[int, ...],
    *,
    steps: Sequence[int] = (8, 16, 32, 64, 128),
    seeds: Sequence[int] = range(10**6, 10**6 + 32),
    calibrate_steps: int = 64,
    reference_steps: int = 256,
    device: torch.device | str = "cpu",
) -> Calibration:
    """Measure a family, for plans with one of these numbers of steps.

    Raises UserError if the family is not ordered by cost, if the largest level cannot be differentiated, or if the
    reference is no finer than the plans."""
    check_reference(reference_steps, steps)
    if len(seeds) < 2:
        raise UserError("calibrate: at least two seeds are needed, better 32 or more.")
    path = BrownianPath(seeds, shape, device)
    effects = measure_effects(family, rule, process.grid(calibrate_steps), path)

    def run(level: Level, by: StepRule, count: int) -> torch.Tensor:
        return sample(SingleLevel(level), by, process.grid(count), path)[0].cpu()

    reference, own = run(family[-1], REFERENCE_RULE[rule.dynamics], reference_steps), {}
    for k, level in enumerate(family):
        for count in steps:
            own[k, count] = float(squared_errors(run(level, rule, count), reference).mean())
    grids = {count: process.grid(count).logsnr for count in sorted(steps)}
    return Calibration(RuleInputs(effects, grids, own, effects.flops))
