"""One sampling loop for all step rules (step_rules.py) and all estimators (estimator.py)."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .brownian import BrownianPath
from .estimator import Estimator
from .ledger import Ledger
from .process import TimeGrid
from .step_rules import Evaluation, StepRule


@torch.no_grad()
def sample(estimator: Estimator, rule: StepRule, grid: TimeGrid, path: BrownianPath) -> tuple[Tensor, Ledger]:
    """Sample one batch: unclipped images [B, *shape] with pixels on the scale [-1, 1], and the ledger of evaluations.

    path: the seeds of the samples with their starting points, Brownian increments and coins, on one device.
    ledger.seconds is the time of the loop without the drawing of noise. On a GPU the loop only queues work: it waits
    for the device at its start, at its end and when it draws a window of noise.
    """
    program, device = rule.program(grid), path.device
    x = path.initial()
    if rule.clock is not None:
        path.increment(grid, rule.clock, 0)  # before the clock starts; a GPU draws it while the CPU draws the coins
    ledger = Ledger([level.flops for level in estimator.levels], images=len(path.seeds))
    estimate = estimator.weight_table(len(program), path, ledger)
    start, drawing = _now(device), 0.0
    state: list[Tensor | None] = [x] + [None] * (len(program[0].update) - 1)
    for j, evaluation in enumerate(program):
        assert state[0] is not None
        denoised = estimate(j, state[0], evaluation.logsnr)
        z = None
        if evaluation.noise is not None and rule.clock is not None:
            if not path.holds(grid, rule.clock, evaluation.noise):
                drawing -= _now(device)
                path.increment(grid, rule.clock, evaluation.noise)
                drawing += _now(device)
            z = path.increment(grid, rule.clock, evaluation.noise)
        state = advance(evaluation, state, denoised, z)
    ledger.seconds = _now(device) - start - drawing
    assert state[0] is not None
    return state[0], ledger


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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
