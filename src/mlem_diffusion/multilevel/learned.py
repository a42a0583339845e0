"""Inclusion probabilities learned by stochastic gradient descent, as functions of the noise level (arXiv:2603.24594).

The loss is L = |X - X_ref|^2 / dim. X is the multilevel sample with independent coins per sample. X_ref is the sample
of the largest level on the same grid, start and Brownian path. L is minimised over the log-odds of p at a fixed
expected cost.

Gradient. Take one coin c, and let l(r) be the loss if its ratio B_c / p_c is r and everything else is fixed. The
gradient has two terms: the score (B_c - p_c) / (p_c (1 - p_c)) times (l - baseline), and the derivative through the
weight B_c / p_c. The baseline is l(0), the loss if the coin does not fire. It does not depend on B_c, and it is the
best baseline that does not. The two terms sum to

    (B_c / p_c) [l(1/p_c) - l(0) - l'(1/p_c) / p_c],    whose mean over B_c gives    dE[L]/dp_c = -E[D_c],
    D_c = l(0) - l(1/p_c) + l'(1/p_c) / p_c = |d|^2 - 2 <e, d - a / p_c>

(both products divided by dim). e is the error if the coin fires, d is the change of the final image by its firing, and
a = dX/dr is the forward-mode tangent. If X is linear in r, D_c is |a|^2 / p_c^2: the noise of the other coins, which
each of the two terms contains, cancels. There is no approximation: the estimate is unbiased for any levels.

Every draw follows one random coin through three runs (fired, not fired, reference) and the tangent. All run forward in
time, so memory does not grow with the number of steps. Coins are drawn in proportion to the derivative of the cost by
their log-odds. At the optimum the derivative of the error is proportional to it, since the two gradients are parallel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..diffusion.brownian import stream_seed
from ..diffusion.estimator import weighted_estimate
from ..diffusion.ledger import Ledger
from ..diffusion.level import Level, check_family
from ..diffusion.process import TimeGrid, expand
from ..diffusion.sampler import advance
from ..diffusion.step_rules import Evaluation, step_rule_of
from ..errors import UserError
from .probabilities import evaluation_probabilities, telescope_weights

_LEARN = 4  # a random stream apart from those of diffusion/brownian.py, so that evaluation uses other numbers
_CERTAIN = 0.99  # larger probabilities become 1: almost no extra cost, and no variance
_CEILING = 5.0  # upper bound of log-odds, close enough to _CERTAIN that a coin can become uncertain again
_COST_FLOOR = 0.01  # share of the mean knot's cost that is added to the cost of each knot
_EXPLORE = 0.2  # share of the draws that is uniform over all coins
_RELATIVE_STEP = 1e-2  # of finite differences, relative to the image's norm


@dataclass(frozen=True)
class LearnedProbabilities:
    """Learned probabilities p [n, K] for the n evaluations of a run (p_1 = 1), and the history of learning.

    loss, loss_se, cost: values before each update; the loss with its standard error over paths, and the expected cost
    in FLOPs per image. flops: total of learning; a tangent counts as one more evaluation. seconds: wall-clock time."""

    p: np.ndarray
    loss: np.ndarray
    loss_se: np.ndarray
    cost: np.ndarray
    flops: float
    seconds: float


def learn_probabilities(
    family: Sequence[Level],
    grid: TimeGrid,
    dynamics: str,
    step_rule: str,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    *,
    expected_flops: float,
    start: np.ndarray,
    iterations: int = 60,
    paths: int = 8,
    draws: int = 16,
    rate: float = 0.2,
    knots: int = 10,
    p_min: float = 1e-4,
    first_seed: int = 0,
    costs: Sequence[float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LearnedProbabilities:
    """Learn p [n, K] for independent coins at a given expected cost in FLOPs per image, from `start` ([K] or [n, K]).

    costs [K]: cost per evaluation in place of the levels' FLOPs, for example in seconds; then the unit of
    `expected_flops` too. The log-odds of each level above the first are piecewise linear in log-SNR between `knots`
    evenly spaced values. Adam follows the gradient within the surface of equal cost; then a common shift of all
    log-odds restores the cost exactly. rate: Adam's learning rate, which falls to a tenth. Every iteration follows
    `paths` new Brownian paths with `draws` coin draws each. Raises UserError if no probabilities between p_min and 1
    have this cost, if `start` does not fit, or if there is only one level.
    """
    check_family(family)
    if len(family) < 2:
        raise UserError("Learning probabilities needs at least two levels, since the first always runs.")
    began, device = time.perf_counter(), torch.device(device)
    program = step_rule_of(dynamics, step_rule).program(grid)
    odds = LogOdds(
        [e.logsnr for e in program], [level.flops for level in family] if costs is None else costs, knots, p_min
    )
    phi = odds.at_cost(odds.fit(start), expected_flops)
    parameter = torch.nn.Parameter(torch.as_tensor(phi))
    optimiser = torch.optim.Adam([parameter], lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total_iters=max(1, iterations))
    networks, history = Networks(family, shape, device), []
    for i in range(iterations):
        randomness = _Randomness(stream_seed(_LEARN, first_seed, i), shape, device)
        batch = gradient_estimate(networks, program, odds, phi, randomness, paths, draws)
        history.append((batch.loss, batch.loss_se, odds.cost(phi)))
        parameter.grad = torch.as_tensor(odds.direction(phi, batch.gradient))
        optimiser.step()
        schedule.step()
        phi = odds.at_cost(parameter.detach().numpy(), expected_flops)
        with torch.no_grad():
            parameter.copy_(torch.as_tensor(phi))
        if progress is not None:
            progress(i + 1, iterations)
    loss, loss_se, cost = np.array(history).reshape(-1, 3).T
    return LearnedProbabilities(odds.table(phi), loss, loss_se, cost, networks.flops, time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------- parametrisation


class LogOdds:
    """Probabilities [n, K] from the log-odds phi [K-1, knots] of the levels above the first, and their cost."""

    def __init__(self, logsnr: Sequence[float], flops: Sequence[float], knots: int, p_min: float) -> None:
        if knots < 2 or not 0 < p_min < _CERTAIN:
            raise UserError(
                f"Learning probabilities needs at least 2 knots and p_min in (0, 1), not {knots} and {p_min}."
            )
        places = np.linspace(min(logsnr), max(logsnr), knots)
        self.hats = np.stack([np.interp(logsnr, places, row) for row in np.eye(knots)], axis=1)  # [n, knots]
        self.flops, self.p_min = np.asarray(flops, dtype=np.float64), p_min
        self.floor = float(np.log(p_min / (1 - p_min)))

    def fit(self, start: np.ndarray) -> np.ndarray:
        """The log-odds phi nearest to the probabilities `start`, [K] or [n, K]."""
        p = np.asarray(start, dtype=np.float64)
        n, levels = len(self.hats), len(self.flops)
        if p.shape not in ((levels,), (n, levels)) or not np.all((p > 0) & (p <= 1)):
            raise UserError(
                f"Probabilities to start from must have shape [{levels}] or [{n}, {levels}], and values in (0, 1]."
            )
        p = np.clip(np.broadcast_to(p, (n, levels))[:, 1:], self.p_min, 0.995)
        return np.linalg.lstsq(self.hats, np.log(p / (1 - p)), rcond=None)[0].T

    def _odds(self, phi: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(self.hats @ np.clip(phi, self.floor, _CEILING).T)))

    def table(self, phi: np.ndarray) -> np.ndarray:
        """p [n, K] with p_1 = 1; probabilities of at least _CERTAIN become 1."""
        p = np.clip(self._odds(phi), self.p_min, 1)
        return np.concatenate([np.ones((len(p), 1)), np.where(p >= _CERTAIN, 1.0, p)], axis=1)

    def slope(self, phi: np.ndarray) -> np.ndarray:
        """dp / d(log-odds) [n, K-1], for the probabilities before nearly certain ones become 1."""
        p = self._odds(phi)
        return p * (1 - p)

    def cost(self, phi: np.ndarray) -> float:
        """Expected FLOPs per image, exact."""
        return float(evaluation_probabilities(self.table(phi)).sum(axis=0) @ self.flops)

    def cost_slope(self, phi: np.ndarray) -> np.ndarray:
        """d(cost) / d(log-odds) [n, K-1] of each coin, for the cost sum_k T_k (p_k + p_{k+1} - p_k p_{k+1})."""
        p = self.table(phi)
        above = np.concatenate([p[:, 2:], np.zeros((len(p), 1))], axis=1)
        below = p[:, :-1]
        return self.slope(phi) * (self.flops[1:] * (1 - above) + self.flops[:-1] * (1 - below))

    def direction(self, phi: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Ascent direction [K-1, knots] of the loss within the surface of equal cost.

        Every knot's gradient is divided by its share of the cost. The result is 1 - (gain per cost) / (common gain per
        cost); it is 1 for a knot that costs but gains nothing. It has no scale, the noise is equal at all knots, and a
        knot without gain keeps falling even if it costs little.
        """
        cost = self.cost_slope(phi).T @ self.hats
        metric = 1 / (cost + _COST_FLOOR * cost.mean())
        price = -(metric * cost * gradient).sum() / (metric * cost**2).sum()
        if not price > 0:  # in this batch firing did more harm than good: no information
            return np.zeros_like(phi)
        return metric * (gradient / price + cost)

    def at_cost(self, phi: np.ndarray, wanted: float) -> np.ndarray:
        """phi plus the smallest common shift that gives the expected cost `wanted`.

        Several shifts may give it, since the cost falls again when a level becomes certain and lower levels no longer
        run."""
        shifts = np.linspace(self.floor - phi.max(), _CEILING - phi.min(), 200)
        costs = np.array([self.cost(phi + s) for s in shifts])
        crossings = np.flatnonzero((costs[:-1] <= wanted) & (costs[1:] >= wanted))
        if len(crossings) == 0:
            raise UserError(
                f"No probabilities from {self.p_min:g} to 1 cost {wanted:g} FLOPs per image; "
                f"shifts of these probabilities reach {costs.min():g} to {costs.max():g}."
            )
        low, high = shifts[crossings[0]], shifts[crossings[0] + 1]
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.cost(phi + middle) < wanted else (low, middle)
        return np.clip(phi + low, self.floor, _CEILING)


# ------------------------------------------------------------------------------------------------------- gradient


class _Randomness:
    """Start, Brownian increments and coins of one iteration, drawn on demand."""

    def __init__(self, seed: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.normals = torch.Generator(device=device).manual_seed(seed)
        self.uniforms = np.random.default_rng(seed)

    def images(self, count: int) -> Tensor:
        return torch.randn(count, *self.shape, generator=self.normals, device=self.device)

    def coins(self, p: np.ndarray, rows: int) -> np.ndarray:
        return self.uniforms.random((rows, len(p))) < p

    def choose(self, chances: np.ndarray, count: int) -> np.ndarray:
        """`count` flat indices with probabilities in proportion to `chances`, by systematic sampling, shuffled."""
        places = (np.arange(count) + self.uniforms.random()) / count
        running = np.cumsum(chances.ravel())
        chosen = np.searchsorted(running, places * running[-1], side="right")
        return self.uniforms.permutation(np.minimum(chosen, chances.size - 1))


@dataclass(frozen=True)
class GradientEstimate:
    """Estimates of the gradient of E[L] by phi [K-1, knots], of E[L], and the loss's standard error over paths."""

    gradient: np.ndarray
    loss: float
    loss_se: float


def gradient_estimate(
    networks: Networks,
    program: Sequence[Evaluation],
    odds: LogOdds,
    phi: np.ndarray,
    randomness: _Randomness,
    paths: int,
    draws: int,
) -> GradientEstimate:
    """Unbiased estimates of the loss and of its gradient (not projected on equal cost), from paths * draws coins."""
    p, slope, count = odds.table(phi), odds.slope(phi), paths * draws
    chances = odds.cost_slope(phi)
    chances = (1 - _EXPLORE) * chances / chances.sum() + _EXPLORE / chances.size
    step, level = np.unravel_index(randomness.choose(chances, count), chances.shape)
    outcome = follow_coins(
        networks,
        program,
        p,
        step,
        level + 1,
        randomness.images(paths),
        lambda _: randomness.images(paths),
        lambda j: randomness.coins(p[j], count),
    )
    chance = p[step, level + 1]
    loss = (chance * outcome.fired + (1 - chance) * outcome.unfired).reshape(paths, draws).mean(axis=1)
    gradient = np.zeros_like(phi)
    each = -outcome.divergence * slope[step, level] / (count * chances[step, level])
    np.add.at(gradient, level, each[:, None] * odds.hats[step])
    se = float(loss.std(ddof=1) / paths**0.5) if paths > 1 else float("nan")
    return GradientEstimate(gradient, float(loss.mean()), se)


@dataclass(frozen=True)
class Outcomes:
    """The effect of one coin in each of R rows: the loss if it fires, the loss if not, and D_c, each [R]."""

    fired: np.ndarray
    unfired: np.ndarray
    divergence: np.ndarray


@torch.no_grad()
def follow_coins(
    networks: Networks,
    program: Sequence[Evaluation],
    p: np.ndarray,
    step: np.ndarray,
    level: np.ndarray,
    x: Tensor,
    noise: Callable[[int], Tensor],
    coins: Callable[[int], np.ndarray],
) -> Outcomes:
    """Run each row r with coin (step[r], level[r]) fired and not fired, all else equal, and the reference of its path.

    step, level: [R]; level 0 is the first level, which has no coin. Rows are ordered by path, with equally many per
    path. x: starts [paths, ...]. noise(j): standardised increments at evaluation j [paths, ...]. coins(j): coins of
    evaluation j [R, K].
    """
    each = len(step) // len(x)
    empty: list[Tensor | None] = [None] * (len(program[0].update) - 1)
    reference, fired = [x, *empty], [x.repeat_interleave(each, 0), *empty]
    unfired, tangent = list(fired), [torch.zeros_like(_at(fired)), *empty]
    chance = torch.as_tensor(p[step, level], dtype=x.dtype, device=x.device).reshape(-1, *([1] * (x.ndim - 1)))
    top = np.eye(p.shape[1])[-1:].repeat(len(x), axis=0)
    own = np.eye(p.shape[1])[level] - np.eye(p.shape[1])[level - 1]  # weights of the coin's level difference
    for j, evaluation in enumerate(program):
        until, at, after = np.flatnonzero(step >= j), np.flatnonzero(step == j), np.flatnonzero(step < j)
        tossed = coins(j) | (np.arange(p.shape[1]) == 0)
        tossed[at, level[at]] = True
        w, s = telescope_weights(p[None, j], tossed[None])[0], evaluation.logsnr
        # both runs agree before the coin's step; at it, their estimates differ by r * difference with r = 1 / p
        plain = networks.estimate(
            np.concatenate([w[until], w[after], own[at], top]),
            torch.cat([_at(fired)[until], _at(unfired)[after], _at(fired)[at], _at(reference)]),
            s,
        )
        both, other, difference, best = plain.split([len(until), len(after), len(at), len(x)])
        if_fired, if_not, slope = (torch.zeros_like(_at(fired)) for _ in range(3))
        if_fired[until], if_not[until], if_not[after] = both, both, other
        if_not[at] -= difference / chance[at]
        slope[at] = difference
        if len(after):
            if_fired[after], slope[after] = networks.derivative(w[after], _at(fired)[after], _at(tangent)[after], s)
        z = None if evaluation.noise is None else noise(j)
        zs = None if z is None else z.repeat_interleave(each, 0)
        reference = advance(evaluation, reference, best, z)
        fired = advance(evaluation, fired, if_fired, zs)
        unfired = advance(evaluation, unfired, if_not, zs)
        tangent = advance(evaluation, tangent, slope, None)
    error = (_at(fired) - _at(reference).repeat_interleave(each, 0)).double()
    jump = (_at(fired) - _at(unfired)).double()
    bent = jump - _at(tangent).double() / chance.double()
    return Outcomes(_mean(error**2), _mean((error - jump) ** 2), _mean(jump**2 - 2 * error * bent))


def _at(state: Sequence[Tensor | None]) -> Tensor:
    """The image at which the network is evaluated, or the final image."""
    assert state[0] is not None
    return state[0]


def _mean(x: Tensor) -> np.ndarray:
    return x.flatten(1).mean(dim=1).cpu().numpy()


class Networks:
    """A family's weighted estimates and their derivatives along an image; counts the FLOPs spent.

    Derivatives use forward mode if every level supports it, which is tested once on noise against finite differences,
    else central finite differences. A derivative counts as one more evaluation of each of its networks, or two.
    """

    def __init__(self, family: Sequence[Level], shape: tuple[int, ...], device: torch.device) -> None:
        self.family, self.flops = list(family), 0.0
        self.forward_mode = all(_has_forward_mode(level, shape, device) for level in family)

    def estimate(self, weights: np.ndarray, x: Tensor, logsnr: float) -> Tensor:
        """sum_k w_k f^k(x) for weights [B, K]."""
        ledger = Ledger([level.flops for level in self.family], len(x))
        out = weighted_estimate(self.family, weights, x, logsnr, ledger)
        self.flops += float((weights != 0).sum(axis=0) @ ledger.flops)
        return out

    def derivative(self, weights: np.ndarray, x: Tensor, v: Tensor, logsnr: float) -> tuple[Tensor, Tensor]:
        """The estimate and its derivative along v [B, ...], for each row."""
        if not self.forward_mode:
            h = _difference_step(x, v)
            ends = [self.estimate(weights, x + sign * h * v, logsnr) for sign in (1, -1)]
            return self.estimate(weights, x, logsnr), (ends[0] - ends[1]) / (2 * h)
        self.flops += float((weights != 0).sum(axis=0) @ [level.flops for level in self.family])
        with torch.autograd.forward_ad.dual_level():
            out = self.estimate(weights, torch.autograd.forward_ad.make_dual(x, v), logsnr)
            dual = torch.autograd.forward_ad.unpack_dual(out)
        return dual.primal, torch.zeros_like(x) if dual.tangent is None else dual.tangent


def _difference_step(x: Tensor, v: Tensor) -> Tensor:
    """Step of finite differences along v for each row, in proportion to the norm of the image."""
    x_norm, v_norm = (torch.linalg.vector_norm(t.flatten(1), dim=1).clamp_min(1e-12) for t in (x, v))
    return expand(_RELATIVE_STEP * x_norm / v_norm, x)


def _has_forward_mode(level: Level, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether forward-mode differentiation of a level runs and agrees with finite differences within 10%."""
    generator = torch.Generator(device=device).manual_seed(0)
    x, v = (torch.randn(2, *shape, generator=generator, device=device) for _ in range(2))
    noise_level = torch.zeros(2, device=device)
    with torch.no_grad():
        h = _difference_step(x, v)
        expected = (level.denoise(x + h * v, noise_level) - level.denoise(x - h * v, noise_level)) / (2 * h)
        try:
            found = torch.func.jvp(lambda y: level.denoise(y, noise_level), (x,), (v,))[1]
        except (NotImplementedError, RuntimeError):
            return False
        return bool((found - expected).norm() <= 0.1 * expected.norm())
