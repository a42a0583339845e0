"""Calibration of any family in one call: measure gains and the error of each level alone, then compute plans.

    calibration = calibrate(family, process, "sde", "ddpm", shape)
    plan = calibration.plan("quadrature", cost=10 * family[-1].flops)
    images, ledger = sample(plan.build(family), process.grid(plan.steps), "sde", "ddpm", seeds, shape)

Calibrate on other seeds than those of the evaluation. A plan's predicted error is first order in the effect of a single
firing (Plan.largest_effect). So run a plan before you rely on it; the experiment scripts run all candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..diffusion.estimator import SingleLevel
from ..diffusion.level import Level
from ..diffusion.process import Process
from ..diffusion.sampler import sample
from ..diffusion.step_rules import REFERENCE_RULE
from ..errors import UserError
from ..statistics import squared_errors
from .gains import Effects, measure_effects
from .plan import Plan, choose
from .planner import plan_for_cost, plans

SEEDS = range(10**6, 10**6 + 32)


@dataclass(frozen=True)
class Calibration:
    """Measured effects of a family's level differences, and the squared error of each level alone.

    own_errors: {(level, steps): error}, against the largest level with reference_steps. flops_spent: of the
    calibration."""

    effects: Effects
    own_errors: dict[tuple[int, int], float]
    process: Process
    flops_spent: float

    def plans(self, method: str, costs: Sequence[float] | None = None) -> list[Plan]:
        """The predicted frontier of a method (planner.METHODS), from cheap to expensive.

        costs: cost per evaluation of each level, for example in seconds, in place of FLOPs; Plan.cost has the same
        unit."""
        return plans(self.effects, method, self._grids(), self.own_errors, _array(costs))

    def plan(
        self,
        method: str,
        *,
        cost: float | None = None,
        error: float | None = None,
        costs: Sequence[float] | None = None,
    ) -> Plan:
        """The plan of smallest predicted error within a cost per image, or the cheapest within a squared error.

        Raises UserError if no plan qualifies, and unless exactly one of cost and error is given.
        """
        found = self.plans(method, costs)
        if cost is not None and error is None:
            exact = plan_for_cost(self.effects, method, self._grids(), self.own_errors, cost, _array(costs))
            found += [exact] if exact is not None else []
        return choose(found, cost=cost, error=error)

    def _grids(self) -> dict[int, np.ndarray]:
        return {steps: self.process.grid(steps).logsnr for steps in sorted({steps for _, steps in self.own_errors})}


def _array(costs: Sequence[float] | None) -> np.ndarray | None:
    return None if costs is None else np.asarray(costs, dtype=np.float64)


def check_reference(finest: int, steps: Iterable[int], name: str = "reference_steps") -> None:
    """Raise UserError unless the reference is finer than every grid: on its own the largest level has no error."""
    if finest <= (most := max(steps, default=0)):
        raise UserError(f"{name} = {finest} must be more than the most steps of a plan, {most}.")


def calibrate(
    family: Sequence[Level],
    process: Process,
    dynamics: str,
    step_rule: str,
    shape: tuple[int, ...],
    *,
    steps: Sequence[int] = (8, 16, 32, 64, 128),
    seeds: Sequence[int] = SEEDS,
    calibrate_steps: int = 64,
    reference_steps: int = 256,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure a family, for plans with one of these numbers of steps.

    Cost per seed: about 4 calibrate_steps + reference_steps + sum(steps) evaluations of the largest level, and
    calibrate_steps + sum(steps) of each other level; see `Calibration.flops_spent`. Raises UserError if the family is
    not ordered by cost, if the largest level cannot be differentiated, or if the reference is no finer than the plans.
    """
    check_reference(reference_steps, steps)
    if len(seeds) < 2:
        raise UserError("calibrate: at least two seeds are needed, better 32 or more.")
    effects = measure_effects(family, process.grid(calibrate_steps), dynamics, step_rule, seeds, shape, device)
    reference, ledger = sample(
        SingleLevel(family[-1]), process.grid(reference_steps), dynamics, REFERENCE_RULE[dynamics], seeds, shape, device
    )
    own, spent = {}, effects.flops_spent + float(np.dot(ledger.evaluations, ledger.flops))
    for done, (k, level) in enumerate(enumerate(family)):
        for count in steps:
            images, ledger = sample(SingleLevel(level), process.grid(count), dynamics, step_rule, seeds, shape, device)
            own[k, count] = float(squared_errors(images.cpu(), reference.cpu()).mean())
            spent += float(np.dot(ledger.evaluations, ledger.flops))
        if progress:
            progress(done + 1, len(family))
    return Calibration(effects, own, process, spent)
