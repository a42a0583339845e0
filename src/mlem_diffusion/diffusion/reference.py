"""The reference that samplers are compared with: the largest level on a grid at least FINER times finer than theirs.
Both dynamics use DPM-Solver++(2M), the SDE on the same Brownian path. A reference by DDPM in 8 times the steps makes
the error of DDPM 20% too small and that of EM 17% too large, since their errors of first order in the step are
related; by this rule both are within 2%. For the ODE, Richardson extrapolation from that grid and half of it helps
further. The same on half of the grid tells how much a finer reference could still change an error."""

from collections.abc import Iterable
from itertools import pairwise

from torch import Tensor

from ..errors import UserError
from .brownian import BrownianPath
from .level import Level
from .process import Process
from .sampler import SingleLevel, sample
from .step_rules import REFERENCE_RULE

FINER = 8  # intervals of the reference over those of the finest grid compared, at least


def reference_steps(process: Process, steps: Iterable[int]) -> int:
    """Noise levels of the reference for grids with these numbers of steps: the base grid, or every second, fourth, ...
    of its points if they are enough: FINER times as many intervals as the finest has. UserError if none is."""
    finest, intervals = max(steps, default=2), process.base_steps - 1
    needed = FINER * (finest - 1)
    if intervals < needed:
        text = f"The reference of a grid of {finest} steps needs process.base_steps = {needed + 1} or more, {FINER} "
        raise UserError(f"{text}times as many intervals, not {process.base_steps}.")
    while intervals % 2 == 0 and intervals // 2 >= needed:
        intervals //= 2
    return intervals + 1


def _grids(dynamics: str, steps: int) -> list[int]:
    """Steps of the grids on which a reference and its check run: whole, half and, for extrapolation, a quarter."""
    return [(steps - 1) // part + 1 for part in ((1, 2, 4) if dynamics == "ode" else (1, 2))]


def reference_evaluations(dynamics: str, steps: int) -> int:
    """Network evaluations per image of `sample_reference`."""
    return sum(_grids(dynamics, steps))


def sample_reference(level: Level, dynamics: str, process: Process, steps: int, path: BrownianPath) -> list[Tensor]:
    """The reference on `steps` noise levels, and on half as many intervals: unclipped images [B, *shape] each."""
    one, rule = SingleLevel(level), REFERENCE_RULE[dynamics]
    found = [sample(one, rule, process.grid(count), path)[0] for count in _grids(dynamics, steps)]
    if dynamics == "ode":  # the leading error is proportional to the squared step
        found = [fine + (fine - coarse) / 3 for fine, coarse in pairwise(found)]
    return found
