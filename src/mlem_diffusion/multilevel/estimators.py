"""Multilevel estimators: random telescopes of level differences (ML-EM), and fixed quadratures of them.
ML-EM (arXiv:2603.24594) is F = sum_k (B_k / p_k) (f^k - f^{k-1}) with f^0 = 0. Coin B_k is 1 ("fires") with
probability p_k, else 0; level 1 always fires (p_1 = 1). Collecting the terms of each network gives F = sum_k w_k f^k
with w_k = B_k / p_k - B_{k+1} / p_{k+1}. Only networks with w_k != 0 are evaluated."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from ..diffusion.brownian import coin_uniforms
from ..diffusion.level import Level, check_family
from ..diffusion.sampler import Estimator
from ..errors import UserError

COINS = ("independent", "systematic", "nested")
_PATTERNS = 1 << 63  # first seed of shared patterns, beyond those of samples


def constant_probabilities(flops: Sequence[float], gamma: float, c: float, unit: float | None = None) -> np.ndarray:
    """p_k = min(1, C (T_k / T_1)^-(1/2 + 1/gamma)) [K], with p_1 = 1, for costs T_k; C trades cost against error.
    unit: replaces T_1, so that C means the same for a level 1 that the power law does not describe.
    This is the square-root law p_k ~ sqrt(V_k / T_k), V_k = E|f^k - f^{k-1}|^2, if the error of level k is proportional
    to T_k^(-1/gamma). Raises UserError unless gamma and c are positive and the costs increase."""
    costs = np.asarray(flops, dtype=np.float64)
    if not (gamma > 0 and c > 0):
        raise UserError(f"Constant probabilities need positive gamma and c, not gamma = {gamma}, C = {c}.")
    if len(costs) == 0 or np.any(costs <= 0) or np.any(np.diff(costs) <= 0):
        raise UserError("The levels of a family must be ordered by cost, from cheap to expensive, all above zero.")
    p = np.minimum(1.0, c * (costs / (unit or costs[0])) ** -(0.5 + 1.0 / gamma))
    return np.concatenate([[1.0], p[1:]])


def measured_probabilities(squares: np.ndarray, flops: np.ndarray, c: float) -> np.ndarray:
    """p_k = min(1, C sqrt(V_k / T_k) / sqrt(V_2 / T_2)) [K], with p_1 = 1, from measured V_k = E|f^k - f^{k-1}|^2.
    squares: V [K]; V_1 is not used. Raises UserError unless c and V_2, ..., V_K are positive."""
    if not (c > 0 and np.all(squares[1:] > 0)):
        raise UserError("Measured probabilities need a positive c and differences between all neighbouring levels.")
    root = np.sqrt(squares[1:] / flops[1:])
    return np.concatenate([[1.0], np.minimum(1.0, c * root / root[:1])])


def draw_coins(p: np.ndarray, seeds: Sequence[int], coins: str) -> np.ndarray:
    """Coins in {0, 1} [n, B, K] for probabilities p [n, K] and B seeds; each coin is 1 with its probability in p.
    "independent": coins are independent over steps and levels.
    "systematic": a level fires at the steps where the running sum of its p, plus one random offset, crosses an integer
    (Madow 1949). Its firings are thus evenly spread over the steps. Levels are independent of each other.
    "nested": one uniform number per step decides for all levels: level k fires if the number is below p_k. Steps are
    independent. If p decreases with k, level k fires only if all levels below it fire."""
    if coins not in COINS:
        raise UserError(f"coins = {coins!r} is unknown; expected one of {', '.join(COINS)}.")
    n, levels = p.shape
    out = np.empty((n, len(seeds), levels), dtype=bool)
    if coins == "nested":
        return p[:, None, :] > coin_uniforms(seeds, 0, n).T[:, :, None]
    for k in range(levels):
        if np.all(p[:, k] == 1):
            out[:, :, k] = True
        elif coins == "independent":
            out[:, :, k] = p[:, k, None] > coin_uniforms(seeds, k, n).T
        else:
            running = np.cumsum(np.concatenate([[0.0], p[:, k]]))
            crossed = np.floor(running[:, None] + coin_uniforms(seeds, k, 1).T)
            # a rounding error in the running sum must not skip a coin with p = 1
            out[:, :, k] = (np.diff(crossed, axis=0) > 0) | (p[:, k, None] == 1)
    return out


def following(values: np.ndarray) -> np.ndarray:
    """The value of the next level for each level [..., K]; 0 for the last one."""
    return np.concatenate([values[..., 1:], np.zeros_like(values[..., :1])], axis=-1)


def telescope_weights(p: np.ndarray, coins: np.ndarray) -> np.ndarray:
    """Weights w [n, B, K] of the networks for probabilities p [n, K] and coins [n, B, K]; E[w] = (0, ..., 0, 1)."""
    ratio = np.where(coins, 1.0 / p[:, None, :], 0.0)
    return ratio - following(ratio)


def evaluation_probabilities(p: np.ndarray, nested: bool = False) -> np.ndarray:
    """P(w_k != 0) [n, K] for nested coins, or coins that are independent between levels.
    Network k runs if coin k or k+1 fires, unless both fire and p_k = p_{k+1}: then the two terms of w_k cancel."""
    above = following(p)
    both = np.minimum(p, above) if nested else p * above
    return p + above - both - np.where(p == above, both, 0.0)


def measured_for_cost(squares: np.ndarray, flops: np.ndarray, evaluations: int, wanted: float) -> np.ndarray | None:
    """The measured probabilities [K] with expected cost `wanted` per image of `evaluations`, by bisection, or None."""
    table = partial(measured_probabilities, squares, flops)

    def cost(c: float) -> float:
        return float(evaluation_probabilities(table(c)[None])[0] @ flops) * evaluations

    low, high = 1e-9, 1.0
    while high < 1e9 and np.any(table(high) < 1) and cost(high) < wanted:
        high *= 2
    if not cost(low) < wanted < cost(high):
        return None
    for _ in range(60):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if cost(middle) < wanted else (low, middle)
    return table(high)


class _Tabled(Estimator):
    """Levels with a table [K], or [n, K] with one row per network evaluation, which is 1 for the first level."""

    def __init__(self, family: Sequence[Level], table: np.ndarray):
        check_family(family)
        self.levels, self.table = list(family), np.asarray(table, dtype=np.float64)
        if self.table.shape[-1:] != (len(family),):
            raise UserError(f"A table {list(self.table.shape)} does not fit {len(family)} levels.")
        if not np.isfinite(self.table).all() or np.any(self.table[..., 0] != 1):
            raise UserError("Probabilities and weights must be finite, and 1 for the first level.")

    def rows(self, evaluations: int) -> np.ndarray:
        """The table [n, K] of a run."""
        if self.table.ndim == 2 and len(self.table) != evaluations:
            raise UserError(f"A table for {len(self.table)} evaluations does not fit a run of {evaluations}.")
        return np.broadcast_to(self.table, (evaluations, len(self.levels)))


class Multilevel(_Tabled):
    """The ML-EM estimate sum_k (B_k / p_k) (f^k - f^{k-1}), unbiased for the largest level at every evaluation.
    p: [K], or [n, K] with one row per network evaluation; p_1 = 1. coins: see `draw_coins`.
    pattern: number of one draw of coins that all samples share; then the estimate is random only between patterns."""

    def __init__(
        self, family: Sequence[Level], p: np.ndarray, coins: str = "independent", pattern: int | None = None
    ):  # fmt: skip
        super().__init__(family, p)
        self.p, self.coins, self.pattern = self.table, coins, pattern
        if not np.all((self.p > 0) & (self.p <= 1)):
            raise UserError("Inclusion probabilities must lie in (0, 1].")

    def weights(self, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
        p = self.rows(evaluations)
        if self.pattern is None:
            return telescope_weights(p, draw_coins(p, seeds, self.coins))
        shared = telescope_weights(p, draw_coins(p, [_PATTERNS + self.pattern], self.coins))
        return np.broadcast_to(shared, (evaluations, len(seeds), p.shape[1]))

    def expected_evaluations(self, evaluations: int) -> np.ndarray:
        if self.pattern is not None:
            return super().expected_evaluations(evaluations)
        return evaluation_probabilities(self.rows(evaluations), nested=self.coins == "nested").sum(axis=0)


class Quadrature(_Tabled):
    """The estimate f^1 + sum_{k>1} W_k (f^k - f^{k-1}) with a table of fixed weights W; most are zero.
    A difference that is evaluated at one step also stands for the neighbouring steps. The estimate is biased."""

    def weights(self, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
        # sum_k W_k (f^k - f^{k-1}) = sum_k (W_k - W_{k+1}) f^k
        table = self.rows(evaluations)
        networks = table - following(table)
        return np.broadcast_to(networks[:, None], (evaluations, len(seeds), networks.shape[1]))
