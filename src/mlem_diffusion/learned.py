"""Inclusion probabilities learned by stochastic gradient descent, as functions of the noise level (arXiv:2603.24594).

Minimised: L = |X - X_ref|^2 / dim, X the multilevel sample under independent coins per sample and X_ref the largest
level's on the same grid, start and Brownian path, over the log-odds of p, at a fixed expected cost.

Gradient. Single out one coin c and let l(r) be the loss when its ratio B_c / p_c is r, everything else fixed. The score
(B_c - p_c) / (p_c (1 - p_c)), with l(0) as its baseline (the loss had the coin not fired, which does not depend on B_c and
is the best such baseline), and the derivative through the weight B_c / p_c sum to

    (B_c / p_c) [l(1/p_c) - l(0) - l'(1/p_c) / p_c],    whose mean over B_c gives    dE[L]/dp_c = -E[D_c],
    D_c = l(0) - l(1/p_c) + l'(1/p_c) / p_c = |d|^2 - 2 <e, d - a / p_c>

(both products over dim): e is the error with the coin fired, d the change of the final image by its firing, a = dX/dr the
forward-mode tangent. Where X is linear in r, D_c is |a|^2 / p_c^2: all noise that the other coins put into score and
weight apart has cancelled. No approximation is made: the estimate is unbiased for any levels.

Every draw follows one random coin: three runs side by side (fired, not fired, reference) and the tangent, all forward in
time, so memory does not grow with the number of steps. Coins are drawn with chances in proportion to what their log-odds
change the cost by, which is what they change the error by at the optimum (there the two gradients are parallel).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cost import Ledger
from .drift import weighted_estimate
from .errors import UserError
from .levels import Level, check_family
from .noise import stream_seed
from .probabilities import evaluation_probabilities, telescope_weights
from .process import Grid
from .samplers import _combine
from .step_rules import Evaluation, step_rule_of

_LEARN = 4  # a random stream of its own beside those of noise.py: whatever is judged later uses other numbers
_CERTAIN = 0.99  # probabilities from here on are 1: next to no saving, and no variance left
_CEILING = 5.0  # log-odds stay below, near enough to _CERTAIN to come back
_EXPLORE = 0.2  # share of the draws that is spread evenly over all coins
_RELATIVE_STEP = 1e-2  # of finite differences, relative to the image's norm


@dataclass(frozen=True)
class LearnedProbabilities:
    """p: [n, K], n evaluations per run, p_1 = 1. The histories are of the probabilities before each update: loss with its
    standard error (over paths), expected cost in FLOPs per image. flops: spent on learning, in all; a tangent counts as
    one further evaluation. seconds: wall-clock."""

    p: np.ndarray
    loss: np.ndarray
    loss_se: np.ndarray
    cost: np.ndarray
    flops: float
    seconds: float


def learn_probabilities(
    family: Sequence[Level],
    grid: Grid,
    dynamics: str,
    step_rule: str,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    *,
    expected_flops: float,
    start: np.ndarray,
    iterations: int = 150,
    paths: int = 8,
    draws: int = 8,
    rate: float = 0.15,
    knots: int = 7,
    p_min: float = 1e-4,
    first_seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LearnedProbabilities:
    """Learn p [n, K] for independent coins at a wanted expected cost in FLOPs per image, from `start` ([K] or [n, K]).

    The log-odds of each level above the first are piecewise linear in log-SNR between `knots` evenly spread values. Adam
    steps along the gradient within the surface of equal cost; a shift common to all log-odds then restores the cost
    exactly. `rate` is Adam's, falling to a tenth. Every iteration follows `paths` new Brownian paths with `draws` coin draws
    each. Raises UserError where no probabilities between p_min and 1 have the wanted cost, or `start` does not fit.
    """
    check_family(family)
    began, device = time.perf_counter(), torch.device(device)
    program = step_rule_of(dynamics, step_rule).program(grid)
    odds = LogOdds([e.logsnr for e in program], [level.flops for level in family], knots, p_min)
    phi = odds.at_cost(odds.fit(start), expected_flops)
    parameter = torch.nn.Parameter(torch.as_tensor(phi))
    optimiser = torch.optim.Adam([parameter], lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total_iters=max(1, iterations))
    tangent = tangent_method(family, shape, device)
    history, flops = [], 0.0
    for i in range(iterations):
        randomness = _Randomness(stream_seed(_LEARN, first_seed, i), shape, device)
        batch = gradient_estimate(family, program, odds, phi, randomness, paths, draws, tangent)
        history.append((batch.loss, batch.loss_se, odds.cost(phi)))
        flops += batch.flops
        parameter.grad = torch.as_tensor(odds.within_cost(phi, batch.gradient))
        optimiser.step()
        schedule.step()
        phi = odds.at_cost(parameter.detach().numpy(), expected_flops)
        with torch.no_grad():
            parameter.copy_(torch.as_tensor(phi))
        if progress is not None:
            progress(i + 1, iterations)
    loss, loss_se, cost = np.array(history).reshape(-1, 3).T
    return LearnedProbabilities(odds.table(phi), loss, loss_se, cost, flops, time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------- parametrisation


class LogOdds:
    """Probabilities [n, K] from the log-odds phi [K-1, knots] of the levels above the first, and what they cost."""

    def __init__(self, logsnr: Sequence[float], flops: Sequence[float], knots: int, p_min: float) -> None:
        if knots < 2 or not 0 < p_min < _CERTAIN:
            raise UserError(f"Learning probabilities needs at least 2 knots and p_min in (0, 1), not {knots} and {p_min}.")
        places = np.linspace(min(logsnr), max(logsnr), knots)
        self.hats = np.stack([np.interp(logsnr, places, row) for row in np.eye(knots)], axis=1)  # [n, knots]
        self.flops, self.p_min = np.asarray(flops, dtype=np.float64), p_min
        self.floor = float(np.log(p_min / (1 - p_min)))

    def fit(self, start: np.ndarray) -> np.ndarray:
        """The log-odds nearest to given probabilities [K] or [n, K]."""
        p = np.asarray(start, dtype=np.float64)
        n, levels = len(self.hats), len(self.flops)
        if p.shape not in ((levels,), (n, levels)) or not np.all((p > 0) & (p <= 1)):
            raise UserError(f"Probabilities to start from must be [{levels}] or [{n}, {levels}] in (0, 1].")
        p = np.clip(np.broadcast_to(p, (n, levels))[:, 1:], self.p_min, 0.995)
        return np.linalg.lstsq(self.hats, np.log(p / (1 - p)), rcond=None)[0].T

    def _odds(self, phi: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(self.hats @ np.clip(phi, self.floor, _CEILING).T)))

    def table(self, phi: np.ndarray) -> np.ndarray:
        """p [n, K] with p_1 = 1; nearly certain coins are made certain."""
        p = np.clip(self._odds(phi), self.p_min, 1)
        return np.concatenate([np.ones((len(p), 1)), np.where(p >= _CERTAIN, 1.0, p)], axis=1)

    def slope(self, phi: np.ndarray) -> np.ndarray:
        """dp / d(log-odds) [n, K-1], of the probabilities before nearly certain ones are made certain."""
        p = self._odds(phi)
        return p * (1 - p)

    def cost(self, phi: np.ndarray) -> float:
        """Exact expected FLOPs per image."""
        return float(evaluation_probabilities(self.table(phi)).sum(axis=0) @ self.flops)

    def cost_slope(self, phi: np.ndarray) -> np.ndarray:
        """d(cost) / d(log-odds) [n, K-1] of each coin, for cost sum_k T_k (p_k + p_{k+1} - p_k p_{k+1})."""
        p = self.table(phi)
        above = np.concatenate([p[:, 2:], np.zeros((len(p), 1))], axis=1)
        below = p[:, :-1]
        return self.slope(phi) * (self.flops[1:] * (1 - above) + self.flops[:-1] * (1 - below))

    def within_cost(self, phi: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """The gradient [K-1, knots] of the loss as it is after the common shift has restored the cost."""
        cost = self.cost_slope(phi).T @ self.hats
        return gradient - cost * gradient.sum() / max(cost.sum(), np.finfo(float).tiny)

    def at_cost(self, phi: np.ndarray, wanted: float) -> np.ndarray:
        """phi, shifted by one number to the wanted expected cost: its first crossing, since the cost falls again where
        levels become certain and the ones below them are left out."""
        shifts = np.linspace(self.floor - phi.max(), _CEILING - phi.min(), 200)
        costs = np.array([self.cost(phi + s) for s in shifts])
        crossings = np.flatnonzero((costs[:-1] <= wanted) & (costs[1:] >= wanted))
        if len(crossings) == 0:
            raise UserError(
                f"No probabilities from {self.p_min:g} to 1 cost {wanted:g} FLOPs per image; "
                f"from here they reach {costs.min():g} to {costs.max():g}."
            )
        low, high = shifts[crossings[0]], shifts[crossings[0] + 1]
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.cost(phi + middle) < wanted else (low, middle)
        return np.clip(phi + low, self.floor, _CEILING)


# ------------------------------------------------------------------------------------------------------- gradient


class _Randomness:
    """Start, Brownian increments and coins of one iteration, drawn as they are needed."""

    def __init__(self, seed: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.normals = torch.Generator(device=device).manual_seed(seed)
        self.uniforms = np.random.default_rng(seed)

    def images(self, count: int) -> Tensor:
        return torch.randn(count, *self.shape, generator=self.normals, device=self.device)

    def coins(self, p: np.ndarray, rows: int) -> np.ndarray:
        return self.uniforms.random((rows, len(p))) < p

    def choose(self, chances: np.ndarray, count: int) -> np.ndarray:
        """`count` flat indices, each with these chances, spread evenly (systematic sampling) and shuffled."""
        places = (np.arange(count) + self.uniforms.random()) / count
        running = np.cumsum(chances.ravel())
        chosen = np.searchsorted(running, places * running[-1], side="right")
        return self.uniforms.permutation(np.minimum(chosen, chances.size - 1))


@dataclass(frozen=True)
class GradientEstimate:
    """gradient: of E[L] by phi [K-1, knots]. loss: estimate of E[L], loss_se over paths. flops: spent, in all."""

    gradient: np.ndarray
    loss: float
    loss_se: float
    flops: float


def gradient_estimate(
    family: Sequence[Level],
    program: Sequence[Evaluation],
    odds: LogOdds,
    phi: np.ndarray,
    randomness: _Randomness,
    paths: int,
    draws: int,
    tangent: Tangent,
) -> GradientEstimate:
    """An unbiased estimate of the gradient (not yet within equal cost) and of the loss, from paths * draws coins."""
    p, slope, count = odds.table(phi), odds.slope(phi), paths * draws
    chances = odds.cost_slope(phi)
    chances = (1 - _EXPLORE) * chances / chances.sum() + _EXPLORE / chances.size
    step, level = np.unravel_index(randomness.choose(chances, count), chances.shape)
    outcome = compare_outcomes(
        family,
        program,
        p,
        level + 1,
        step,
        randomness.images(paths),
        lambda _: randomness.images(paths),
        lambda i: randomness.coins(p[i], count),
        tangent,
    )
    chance = p[step, level + 1]
    loss = (chance * outcome.fired + (1 - chance) * outcome.unfired).reshape(paths, draws).mean(axis=1)
    gradient = np.zeros_like(phi)
    each = -outcome.divergence * slope[step, level] / (count * chances[step, level])
    np.add.at(gradient, level, each[:, None] * odds.hats[step])
    se = float(loss.std(ddof=1) / paths**0.5) if paths > 1 else float("nan")
    return GradientEstimate(gradient, float(loss.mean()), se, outcome.flops)


@dataclass(frozen=True)
class Outcomes:
    """One coin followed in each row, [R] each: the loss if it fires and if not, and D_c = -(the part of the gradient).
    flops: spent, all rows together."""

    fired: np.ndarray
    unfired: np.ndarray
    divergence: np.ndarray
    flops: float


@torch.no_grad()
def compare_outcomes(
    family: Sequence[Level],
    program: Sequence[Evaluation],
    p: np.ndarray,
    level: np.ndarray,
    step: np.ndarray,
    x: Tensor,
    noise: Callable[[int], Tensor],
    coins: Callable[[int], np.ndarray],
    tangent: Tangent,
) -> Outcomes:
    """Run row r with coin (step[r], level[r]) fired and not fired, all else equal, beside the reference of its path.

    level, step: [R], level >= 1 counted from 0. x: starts [paths, ...], R a multiple of their number, rows ordered by path.
    noise(i): the standardised increment of evaluation i [paths, ...]. coins(i): all coins of evaluation i [R, K].
    """
    rows, each = len(step), len(step) // len(x)
    ledger = Ledger([f.flops for f in family], rows)
    extra = 0.0
    empty: list[Tensor | None] = [None] * (len(program[0].update) - 1)
    reference, fired = [x, *empty], [x.repeat_interleave(each, 0), *empty]
    unfired, slope = list(fired), [torch.zeros_like(fired[0]), *empty]
    chance = torch.as_tensor(p[step, level], dtype=x.dtype, device=x.device).reshape(-1, *([1] * (x.ndim - 1)))
    for i, evaluation in enumerate(program):
        before, at, after = np.flatnonzero(step > i), np.flatnonzero(step == i), np.flatnonzero(step < i)
        B = coins(i).copy()
        B[:, 0] = True
        B[at, level[at]] = True
        w = telescope_weights(p[None, i], B[None])[0]
        fired[0] 
    raise NotImplementedError
