"""Inclusion probabilities learned by stochastic gradient descent, as functions of the noise level (arXiv:2603.24594).

The loss L = |X - X_ref|^2 / dim of the multilevel sample X with independent coins, against the sample X_ref of the
largest level on the same grid and path, is minimised over the log-odds of p at a fixed expected cost.

Let l(r) be the loss if the ratio B_c / p_c of one coin c is r and everything else is fixed. The score term with
baseline l(0) and the derivative through the weight B_c / p_c sum to an unbiased gradient, for any levels:

    dE[L]/dp_c = -E[D_c],    D_c = l(0) - l(1/p_c) + l'(1/p_c) / p_c = (|d|^2 - 2 <e, d - a / p_c>) / dim

e is the error if the coin fires, d the change of the final image by its firing, and a = dX/dr the tangent. Every draw
follows one random coin through three runs (fired, not fired, reference) and the tangent, all forward in time."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..diffusion.brownian import stream_seed
from ..diffusion.conditions import Conditions, ConditionsOf, bound, conditions_of, rows_of
from ..diffusion.level import Level, runs_base, shared_costs
from ..diffusion.process import TimeGrid, expand
from ..diffusion.sampler import WeightTable, advance
from ..diffusion.step_rules import Evaluation, StepRule
from ..errors import UserError
from .estimators import evaluation_probabilities, following, telescope_weights
from .plan import Progress

_LEARN = 4  # a random stream apart from those of diffusion/brownian.py, so that evaluation uses other numbers
_P_MIN, _CERTAIN = 1e-4, 0.99  # larger probabilities become 1: almost no extra cost, and no variance
# bounds of log-odds; the upper one is close enough to _CERTAIN that a coin can become uncertain again
_FLOOR, _CEILING = float(np.log(_P_MIN / (1 - _P_MIN))), 5.0
_COST_FLOOR = 0.01  # share of the mean knot's cost that is added to the cost of each knot
_KNOTS = 10  # evenly spaced in log-SNR
_EXPLORE = 0.2  # share of the draws that is uniform over all coins


def learn_probabilities(
    family: Sequence[Level], rule: StepRule, grid: TimeGrid, shape: tuple[int, ...], device: torch.device, *,
    costs: np.ndarray, wanted: float, start: np.ndarray, iterations: int, paths: int, draws: int,
    progress: Progress = lambda done, total: None, conditions: ConditionsOf = None,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Learned p [n, K] of independent coins with the expected cost `wanted` per image, and the FLOPs of learning.
    costs [K]: per evaluation, in FLOPs or seconds. start: p [K]. The log-odds of each level above the first are
    piecewise linear in log-SNR between knots. Adam follows the gradient within the surface of equal cost; then a common
    shift of all log-odds restores the cost. Every iteration follows `paths` new Brownian paths with `draws` coins each.
    conditions: of the paths, by their numbers 0, 1, ...
    Raises UserError if no probabilities have this cost, or if a level has no forward derivative."""
    program = rule.program(grid)
    for level in bound(family, conditions_of(conditions, [0, 1], device)):
        _check_forward_mode(level, shape, device)
    odds, networks = LogOdds([e.logsnr for e in program], costs, _KNOTS), Networks(family, program, shape, device)
    phi = odds.at_cost(odds.fit(start), wanted)
    parameter = torch.nn.Parameter(torch.as_tensor(phi))
    optimiser = torch.optim.Adam([parameter], lr=0.2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total_iters=max(1, iterations))
    for i in range(iterations):
        networks.conditions = conditions_of(conditions, list(range(i * paths, (i + 1) * paths)), device)
        gradient = gradient_estimate(networks, odds, phi, stream_seed(_LEARN, 0, i), paths, draws)
        parameter.grad = torch.as_tensor(odds.direction(phi, gradient))
        optimiser.step()
        schedule.step()
        phi = odds.at_cost(parameter.detach().numpy(), wanted)
        parameter.data.copy_(torch.as_tensor(phi))
        progress(i + 1, iterations)
    return odds.table(phi), networks.flops


class LogOdds:
    """Probabilities [n, K] from the log-odds phi [K-1, knots] of the levels above the first, and their cost."""

    def __init__(self, logsnr: Sequence[float], costs: np.ndarray, knots: int) -> None:
        places = np.linspace(min(logsnr), max(logsnr), knots)
        self.hats = np.stack([np.interp(logsnr, places, row) for row in np.eye(knots)], axis=1)  # [n, knots]
        self.costs = costs.astype(np.float64)  # [K] of one evaluation

    def fit(self, start: np.ndarray) -> np.ndarray:
        """The log-odds phi nearest to the probabilities `start`, [K] or [n, K]."""
        p = np.clip(np.broadcast_to(start, (len(self.hats), len(self.costs)))[:, 1:], _P_MIN, 0.995)
        return np.linalg.lstsq(self.hats, np.log(p / (1 - p)), rcond=None)[0].T

    def _odds(self, phi: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(self.hats @ np.clip(phi, _FLOOR, _CEILING).T)))

    def table(self, phi: np.ndarray) -> np.ndarray:
        """p [n, K] with p_1 = 1; probabilities of at least _CERTAIN become 1."""
        p = np.clip(self._odds(phi), _P_MIN, 1)
        return np.concatenate([np.ones((len(p), 1)), np.where(p >= _CERTAIN, 1.0, p)], axis=1)

    def slope(self, phi: np.ndarray) -> np.ndarray:
        """dp / d(log-odds) [n, K-1], for the probabilities before nearly certain ones become 1."""
        return self._odds(phi) * (1 - self._odds(phi))

    def cost(self, phi: np.ndarray) -> float:  # expected, per image
        return float(evaluation_probabilities(self.table(phi)).sum(axis=0) @ self.costs)

    def cost_slope(self, phi: np.ndarray) -> np.ndarray:
        """d(cost) / d(log-odds) [n, K-1] of each coin, for the cost sum_k T_k (p_k + p_{k+1} - p_k p_{k+1})."""
        p = self.table(phi)
        return self.slope(phi) * (self.costs[1:] * (1 - following(p)[:, 1:]) + self.costs[:-1] * (1 - p[:, :-1]))

    def direction(self, phi: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Ascent direction [K-1, knots] of the loss within the surface of equal cost, relative to each knot's cost."""
        cost = self.cost_slope(phi).T @ self.hats
        metric = 1 / (cost + _COST_FLOOR * cost.mean())
        price = -(metric * cost * gradient).sum() / (metric * cost**2).sum()
        if not price > 0:  # in this batch firing did more harm than good: no information
            return np.zeros_like(phi)
        return metric * (gradient / price + cost)

    def at_cost(self, phi: np.ndarray, wanted: float) -> np.ndarray:
        """phi plus the smallest common shift that gives the expected cost `wanted`.
        Several may: the cost falls again when a level becomes certain and lower levels no longer run."""
        shifts = np.linspace(_FLOOR - phi.max(), _CEILING - phi.min(), 200)
        costs = np.array([self.cost(phi + s) for s in shifts])
        crossings = np.flatnonzero((costs[:-1] <= wanted) & (costs[1:] >= wanted))
        if len(crossings) == 0:
            reach = f"{costs.min():g} to {costs.max():g}"
            raise UserError(f"Learned probabilities can cost {reach} per image, not {wanted:g}.")
        low, high = shifts[crossings[0]], shifts[crossings[0] + 1]
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.cost(phi + middle) < wanted else (low, middle)
        return np.clip(phi + low, _FLOOR, _CEILING)


def gradient_estimate(
    networks: "Networks", odds: LogOdds, phi: np.ndarray, seed: int, paths: int, draws: int
) -> np.ndarray:
    """An unbiased estimate of the gradient of E[L] by phi [K-1, knots], not projected on equal cost.
    Coins are drawn by systematic sampling, mostly in proportion to the derivative of the cost by their log-odds, to
    which the derivative of the error is proportional at the optimum."""
    normals, uniforms = torch.Generator(networks.device).manual_seed(seed), np.random.default_rng(seed)

    def images(j: int = 0) -> Tensor:
        return torch.randn(paths, *networks.shape, generator=normals, device=networks.device)

    p, slope, count, chances = odds.table(phi), odds.slope(phi), paths * draws, odds.cost_slope(phi)
    chances = (1 - _EXPLORE) * chances / chances.sum() + _EXPLORE / chances.size
    running = np.cumsum(chances.ravel())
    places = (np.arange(count) + uniforms.random()) / count
    chosen = np.minimum(np.searchsorted(running, places * running[-1], side="right"), chances.size - 1)
    step, level = np.unravel_index(uniforms.permutation(chosen), chances.shape)

    def coins(j: int) -> np.ndarray:
        return uniforms.random((count, p.shape[1])) < p[j]

    divergence, gradient = follow_coins(networks, p, step, level + 1, images(), images, coins), np.zeros_like(phi)
    each = -divergence * slope[step, level] / (count * chances[step, level])
    np.add.at(gradient, level, each[:, None] * odds.hats[step])
    return gradient


@torch.no_grad()
def follow_coins(
    networks: "Networks", p: np.ndarray, step: np.ndarray, level: np.ndarray,
    x: Tensor, noise: Callable[[int], Tensor], coins: Callable[[int], np.ndarray],
) -> np.ndarray:  # fmt: skip
    """D_c [R]: run each row r with coin (step[r], level[r]) fired and not, all else equal, and its path's reference.
    step, level: [R]; level 0 is the first level, which has no coin. Rows are ordered by path, with equally many per
    path. x: starts [paths, ...]. noise(j): increments of evaluation j [paths, ...]. coins(j): its coins [R, K]."""
    each, levels, program = len(step) // len(x), p.shape[1], networks.program
    empty = [None] * (len(program[0].update) - 1)
    reference: list[Any] = [x, *empty]
    fired: list[Any] = [x.repeat_interleave(each, 0), *empty]
    unfired: list[Any] = list(fired)
    tangent: list[Any] = [torch.zeros_like(fired[0]), *empty]
    path = np.arange(len(step)) // each  # of every row
    chance = expand(torch.as_tensor(p[step, level], dtype=x.dtype, device=x.device), x)
    top = np.eye(levels)[-1:].repeat(len(x), axis=0)
    own = np.eye(levels)[level] - np.eye(levels)[level - 1]  # weights of the coin's level difference
    for j, evaluation in enumerate(program):
        until, at, after = np.flatnonzero(step >= j), np.flatnonzero(step == j), np.flatnonzero(step < j)
        tossed = coins(j) | (np.arange(levels) == 0)
        tossed[at, level[at]] = True
        w, s = telescope_weights(p[None, j], tossed[None])[0], evaluation.logsnr
        # both runs agree before the coin's step; at it, their estimates differ by r * difference with r = 1 / p
        weights = np.concatenate([w[until], w[after], own[at], top])
        states = [fired[0][until], unfired[0][after], fired[0][at], reference[0]]
        of_path = np.concatenate([path[until], path[after], path[at], np.arange(len(x))])
        plain = networks.estimate(weights, torch.cat(states), s, of_path)
        both, other, difference, best = plain.split([len(state) for state in states])
        if_fired, if_not, slope = (torch.zeros_like(fired[0]) for _ in range(3))
        if_fired[until], if_not[until], if_not[after] = both, both, other
        if_not[at] -= difference / chance[at]
        slope[at] = difference
        if len(after):
            moved = networks.derivative(w[after], fired[0][after], tangent[0][after], s, path[after])
            if_fired[after], slope[after] = moved
        z = None if evaluation.noise is None else noise(j)
        zs = None if z is None else z.repeat_interleave(each, 0)
        reference = advance(evaluation, reference, best, z)
        fired = advance(evaluation, fired, if_fired, zs)
        unfired = advance(evaluation, unfired, if_not, zs)
        tangent = advance(evaluation, tangent, slope, None)
    error, change = (fired[0] - reference[0].repeat_interleave(each, 0)).double(), (fired[0] - unfired[0]).double()
    bent = change - tangent[0].double() / chance.double()
    return (change**2 - 2 * error * bent).flatten(1).mean(dim=1).cpu().numpy()


@dataclass
class Networks:
    """A family's weighted estimates in a program, and their forward-mode derivatives; counts the FLOPs spent.
    conditions: of the paths; each row of an estimate is of one path."""

    family: Sequence[Level]
    program: Sequence[Evaluation]
    shape: tuple[int, ...]
    device: torch.device
    flops: float = 0.0
    conditions: Conditions = field(default_factory=dict)

    def _count(self, weights: np.ndarray, logsnr: float) -> None:
        flops, base = shared_costs(self.family)
        self.flops += float((weights != 0).sum(axis=0) @ flops) + len(weights) * base * runs_base(self.family, logsnr)

    def estimate(self, weights: np.ndarray, x: Tensor, logsnr: float, path: np.ndarray) -> Tensor:
        """sum_k w_k f^k(x) for weights [B, K], path [B]."""
        self._count(weights, logsnr)
        # without conditions nothing is moved to the device
        own = rows_of(self.conditions, torch.from_numpy(path).to(x.device)) if self.conditions else {}
        return WeightTable(self.family, weights[None], own)(0, x, logsnr)

    def derivative(
        self, weights: np.ndarray, x: Tensor, v: Tensor, logsnr: float, path: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """The estimate and its derivative along v [B, ...], for each row; it costs two estimates."""
        self._count(weights, logsnr)
        # the fused attention kernels have no forward derivative
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            dual = forward_ad.unpack_dual(self.estimate(weights, forward_ad.make_dual(x, v), logsnr, path))
        return dual.primal, torch.zeros_like(x) if dual.tangent is None else dual.tangent


@torch.no_grad()
def _check_forward_mode(level: Level, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise UserError unless a forward derivative on noise agrees with a central difference within 10%."""
    x, v = torch.randn(2, 2, *shape, generator=torch.Generator(device).manual_seed(0), device=device)
    u, found = torch.zeros((), device=device), torch.zeros_like(x)
    with contextlib.suppress(NotImplementedError, RuntimeError):
        found = Networks([level], [], shape, device).derivative(np.ones((2, 1)), x, v, 0.0, np.arange(2))[1]
    expected = (level.denoise(x + 0.01 * v, u) - level.denoise(x - 0.01 * v, u)) / 0.02
    if not (found - expected).norm() <= 0.1 * expected.norm():
        raise UserError(f"{level.name} has no forward derivative by x (does it leave torch, or run under no_grad?).")
