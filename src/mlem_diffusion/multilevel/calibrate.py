"""Calibration of any family in one call: measure gains and the error of each level alone, then compute plans.

The README has an example. Calibrate on other seeds than those of the evaluation, and run a plan before you rely on its
predicted error.
"""

from collections.abc import Iterable, Sequence

import torch

from ..diffusion.brownian import BrownianPath
from ..diffusion.level import Level
from ..diffusion.process import Process
from ..diffusion.sampler import SingleLevel, sample
from ..diffusion.step_rules import REFERENCE_RULE, StepRule
from ..errors import UserError
from ..statistics import squared_errors
from .gains import measure_effects
from .planner import Calibration


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
    return Calibration(effects, grids, own, effects.flops)
