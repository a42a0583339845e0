"""Estimators, and one sampling loop for all of them and all step rules (step_rules.py).
An estimator combines the levels of a family into one denoised estimate for each evaluation, by a table of weights
[n, B, K]: of each of K levels in each of n estimates, for each sample. A single level, a stitched schedule and the
multilevel estimator (ML-EM) differ only in this table. ML-EM is no sampler, so every step rule can use it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .brownian import BrownianPath, now
from .conditions import Conditions, taken
from .level import Ledger, Level, base_evaluations, base_of, check_family, runs_base, shared_costs
from .process import TimeGrid, expand
from .step_rules import Evaluation, StepRule


class Estimator(ABC):
    """An estimator of the denoised image. `evaluations` is n, the length of the sampler's program."""

    levels: list[Level]

    @abstractmethod
    def weights(self, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
        """Weights [n, B, K] of the levels in each estimate, for the samples with these seeds."""

    def expected_evaluations(self, evaluations: int) -> np.ndarray:
        """Expected evaluations of each level [K] per image, exact; here for weights that are equal for all seeds."""
        return np.count_nonzero(self.weights(evaluations, [0])[:, 0], axis=0).astype(np.float64)

    def expected_flops(self, evaluations: int, logsnr: Sequence[float] | None = None) -> float:
        """FLOPs per image. logsnr [n] of the evaluations: without them a guide counts in all, though it may rest."""
        flops, base = shared_costs(self.levels)
        runs = evaluations if logsnr is None else base_evaluations(self.levels, logsnr)
        return float(self.expected_evaluations(evaluations) @ flops) + runs * base


class SingleLevel(Estimator):
    """One network for all evaluations: EM, DDPM, DDIM, ... with this level."""

    def __init__(self, level: Level):
        self.levels = [level]

    def weights(self, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
        return np.ones((evaluations, len(seeds), 1))


class Stitched(Estimator):
    """T-Stitch (Pan et al. 2024): one level after another, from high noise to low; `order` need not rise in cost.
    switches: the fractions of the evaluations after which the next level takes over, ascending."""

    def __init__(self, order: Sequence[Level], switches: Sequence[float]):
        self.levels, self.switches = sorted(dict.fromkeys(order), key=lambda level: level.flops), list(switches)
        check_family(self.levels)
        self.order = [self.levels.index(level) for level in order]
        if len(self.switches) != len(order) - 1 or not np.all(np.diff([0, *self.switches, 1]) >= 0):
            raise UserError(f"stitched: {len(order)} levels need ascending switches in 0..1, not {self.switches}.")

    def weights(self, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
        firsts = [round(switch * evaluations) for switch in self.switches]
        stages = np.searchsorted(firsts, np.arange(evaluations), side="right")
        table = np.eye(len(self.levels))[np.take(self.order, stages)]
        return np.broadcast_to(table[:, None], (evaluations, len(seeds), len(self.levels)))


class WeightTable:
    """The estimates sum_k w_k f^k(x) of one run, for weights w [n, B, K] and the samples' conditions; `evaluations`
    [B, K] and `base_runs`, those of the base that the levels share, count as it runs.
    Each network is evaluated only on the samples with a nonzero weight. The table and these selections are on the
    device before the first estimate, so the loop never waits for a transfer."""

    def __init__(self, levels: Sequence[Level], weights: np.ndarray, conditions: Conditions | None = None):
        self.levels, self.evaluations = levels, np.zeros(weights.shape[1:], dtype=np.int64)
        self.conditions, self.base_runs = conditions or {}, 0
        self.weights = np.ascontiguousarray(np.moveaxis(weights, 2, 1))  # [n, K, B]
        used = self.weights != 0
        self.counts = used.sum(axis=2)
        partial = used & (self.counts < weights.shape[1])[:, :, None]
        self.start = np.concatenate([[0], np.cumsum(partial.sum(axis=2))])  # where (j, k) starts in `positions`
        self.positions = np.nonzero(partial)[2]
        self.same = (self.weights == self.weights[:, :, :1]).all(axis=2)
        self.on_device: tuple[Tensor, Tensor] | None = None
        self.base = base_of(levels)

    def __call__(self, j: int, x: Tensor, logsnr: float) -> Tensor:
        """The j-th estimate at x [B, ...]. All samples share the log-SNR, so each level gets a scalar."""
        if self.on_device is None:
            # a copy, because the weights may be read-only
            table = torch.tensor(self.weights, dtype=x.dtype, device="cpu").to(x.device)
            self.on_device = table, torch.from_numpy(self.positions).to(x.device)
        table, positions = self.on_device
        estimate, noise_level = None, torch.full((), logsnr, dtype=torch.float32, device=x.device)
        common = None
        if self.base is not None and runs_base(self.levels, logsnr):
            common, self.base_runs = self._run(self.base, x, noise_level, None), self.base_runs + 1
        for k, level in enumerate(self.levels):
            count = int(self.counts[j, k])
            if count == 0:
                continue
            self.evaluations[:, k] += self.weights[j, k] != 0
            if count == len(x):
                output = self._output(level, x, noise_level, common, None)
                w = float(self.weights[j, k, 0]) if self.same[j, k] else expand(table[j, k], x)
                estimate = w * output if estimate is None else estimate.add_(w * output)
            else:
                first = self.start[j * len(self.levels) + k]
                rows = positions[first : first + count]
                output = self._output(level, x[rows], noise_level, None if common is None else common[rows], rows)
                estimate = torch.zeros_like(x) if estimate is None else estimate
                estimate.index_add_(0, rows, expand(table[j, k][rows], x) * output)
        return torch.zeros_like(x) if estimate is None else estimate

    def _output(self, level: Level, x: Tensor, logsnr: Tensor, common: Tensor | None, rows: Tensor | None) -> Tensor:
        """The level's output on these rows of the batch (None: all); common: the base's, which may be the level."""
        if self.base is not None and level.name == self.base.name and common is not None:
            return common
        return self._run(level, x, logsnr, rows, *([] if level.base is None else [common]))

    def _run(self, level: Level, x: Tensor, logsnr: Tensor, rows: Tensor | None, *common: Tensor | None) -> Tensor:
        return _checked(level, x, logsnr, *common, **taken(level, self.conditions, rows))


def _checked(level: Level, x: Tensor, logsnr: Tensor, *common: Tensor | None, **conditions: Any) -> Tensor:
    """The level's output, in the type of x; UserError if it has another shape, or if x, the sampler's own, is changed.
    The value of logsnr is not looked at, so the device is not waited for."""
    before = None if x.is_inference() else x._version
    output = level.denoise(x, logsnr, *common, **conditions)
    if before is not None and x._version != before:
        raise UserError(f"{level.name} writes into its input: give the network a copy (x.clone()).")
    if output.shape != x.shape:
        raise UserError(f"{level.name} returned the shape {list(output.shape)} for images of {list(x.shape)}.")
    return output.to(x.dtype)


@torch.no_grad()
def sample(
    estimator: Estimator, rule: StepRule, grid: TimeGrid, path: BrownianPath,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Ledger]:  # fmt: skip
    """Sample one batch: unclipped images [B, *shape] with pixels on the scale [-1, 1], and the ledger of evaluations,
    whose seconds are those of the loop with its noise. path: seeds, conditions, starting points and increments, on one
    device. decode: turns latents into images (models/latents.py); without it latents are returned."""
    program = rule.program(grid)
    state: list[Any] = [path.initial()] + [None] * (len(program[0].update) - 1)
    estimate = WeightTable(estimator.levels, estimator.weights(len(program), path.seeds), path.conditions)
    start = now(path.device)
    for j, evaluation in enumerate(program):
        denoised, z = estimate(j, state[0], evaluation.logsnr), None
        if evaluation.noise is not None and rule.clock is not None:
            z = path.increment(grid, rule.clock, evaluation.noise)
        state = advance(evaluation, state, denoised, z)
    seconds = now(path.device) - start
    flops, base = shared_costs(estimator.levels)
    ledger = Ledger(flops.tolist(), estimate.evaluations, seconds, estimate.base_runs * base)
    return state[0] if decode is None else decode(state[0]), ledger


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
