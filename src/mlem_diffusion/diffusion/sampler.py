"""One sampling loop for all step rules (step_rules.py) and all estimators (estimator.py)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .brownian import BrownianPath, now
from .estimator import Estimator, WeightTable
from .level import Ledger
from .process import TimeGrid
from .step_rules import Evaluation, StepRule


@torch.no_grad()
def sample(estimator: Estimator, rule: StepRule, grid: TimeGrid, path: BrownianPath) -> tuple[Tensor, Ledger]:
    """Sample one batch: unclipped images [B, *shape] with pixels on the scale [-1, 1], and the ledger of evaluations.

    path: the seeds of the samples with their starting points, Brownian increments and coins, on one device.
    ledger.seconds is the time of the loop without the drawing of noise. On a GPU the loop only queues work: it waits
    for the device at its start, at its end and when it draws a window of noise.
    """
    program = rule.program(grid)
    state: list[Any] = [path.initial()] + [None] * (len(program[0].update) - 1)
    estimate = WeightTable(estimator.levels, estimator.weights(len(program), path.seeds))
    start, drawn = now(path.device), path.seconds
    for j, evaluation in enumerate(program):
        denoised, z = estimate(j, state[0], evaluation.logsnr), None
        if evaluation.noise is not None and rule.clock is not None:
            z = path.increment(grid, rule.clock, evaluation.noise)
        state = advance(evaluation, state, denoised, z)
    seconds = now(path.device) - start - (path.seconds - drawn)
    return state[0], Ledger([level.flops for level in estimator.levels], estimate.evaluations, seconds)


def advance(
    evaluation: Evaluation, state: Sequence[Tensor | None], estimate: Tensor | None, z: Tensor | None
) -> list[Tensor | None]:
    """The state of a program after one evaluation; None stands for zero."""
    return [combine(row, [*state, estimate, z]) for row in evaluation.update]


def combine(coefficients: np.ndarray, tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of coefficient * tensor; None stands for zero. The tensors are not changed."""
    terms = [(float(c), t) for c, t in zip(coefficients, tensors, strict=True) if c != 0 and t is not None]
    if not terms:
        return None
    (first, out), *others = terms
    if first != 1:
        out = first * out
    for i, (c, tensor) in enumerate(others):
        out = torch.add(out, tensor, alpha=c) if i == 0 and first == 1 else out.add_(tensor, alpha=c)
    return out
