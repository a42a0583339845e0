"""Ways to estimate level differences: the best probabilities or weights for a price or a number of firings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .estimators import evaluation_probabilities

LEAST = 1e-12  # smallest probability: for a difference with zero gain, between two levels with the same output
_SHRINKAGE = (0.001, 0.03, 0.3, 3.0)  # of quadrature weights towards equal masses; the predicted error decides
_OFFSETS = 32  # evenly spaced offsets that stand for the one random offset of systematic coins


@dataclass(frozen=True)
class Option:
    """One way to estimate one level difference: p or W [n], expected number of firings, and added squared error."""

    table: np.ndarray
    fires: float
    added: float
    certain: bool = False  # weight 1 at every firing, so that a lower level that is the base does not run


def uncancelled(gain: np.ndarray, p: np.ndarray) -> float:
    """The error sum A (1/p - 1) that independent coins of these probabilities add, for gains A of the same shape."""
    return float((gain * (1 / p - 1)).sum())


def fill(density: np.ndarray, total: float) -> np.ndarray:
    """p = min(1, c density) [n] with c such that sum(p) = total, for a positive density."""
    sorted_ = density[np.argsort(-density)]
    rest = np.cumsum(sorted_[::-1])[::-1]
    for capped in range(len(sorted_)):
        c = (total - capped) / rest[capped]
        if c * sorted_[capped] <= 1:
            return np.minimum(1.0, np.maximum(c, 1e-12) * density)
    return np.ones_like(density)


def densities(effects: np.ndarray) -> list[np.ndarray]:
    """Candidate densities of firings [n] for the effects [R, n] of one difference, smoothed and bounded away from zero.
    Uniform; the rms effect (optimal for independent coins); its square root; and the square root of its rate of change
    (optimal for jittered quadrature of a smooth function). The predicted error decides."""
    gain = _smooth(np.sqrt((effects**2).mean(axis=0)))
    change = _smooth(np.sqrt((np.gradient(effects, axis=1) ** 2).mean(axis=0)))
    return [np.ones(effects.shape[1]), gain, np.sqrt(gain), np.sqrt(change)]


def _smooth(values: np.ndarray) -> np.ndarray:
    width = max(1, len(values) // 32)
    padded = np.pad(values, width, mode="edge")
    out = np.convolve(padded, np.full(2 * width + 1, 1 / (2 * width + 1)), mode="valid")
    return np.maximum(out, 1e-3 * out.max() + 1e-300)


def systematic_options(effects: np.ndarray, counts: Sequence[int], drift: float = 0.0) -> list[Option]:
    """The best candidate density for each number of firings, by the error averaged over the offset of the coins.
    drift: the share of the error of independent coins that remains (planner.py)."""
    out, total, shapes, gain = [], effects.sum(axis=1), densities(effects), (effects**2).mean(axis=0)
    for count in counts:
        tables = [fill(shape, count) for shape in shapes]
        added = [_systematic_error(effects, total, p) + drift * uncancelled(gain, p) for p in tables]
        best = int(np.argmin(added))
        out.append(Option(tables[best], float(tables[best].sum()), added[best]))
    return out


def _systematic_error(effects: np.ndarray, total: np.ndarray, p: np.ndarray) -> float:
    running, error = np.concatenate([[0.0], np.cumsum(p)]), 0.0
    for offset in (np.arange(_OFFSETS) + 0.5) / _OFFSETS:
        fires = np.flatnonzero((np.diff(np.floor(running + offset)) > 0) | (p == 1))
        error += float(((effects[:, fires] @ (1 / p[fires]) - total) ** 2).mean())
    return error / _OFFSETS


def quadrature_options(effects: np.ndarray, counts: Sequence[int], groups: int, drift: float = 0.0) -> list[Option]:
    """Fixed evaluations with least-squares weights, and tails: weight 1 at each evaluation from some point on.
    The evaluations are the midpoints of equal parts of a candidate density. The weights are shrunk towards those with
    which each stands for its part, the more the smaller the predicted error gets. The error is cross-validated over two
    halves of the seeds. groups: number of seeds; rows are ordered by seed. drift: as in `systematic_options`."""
    n, total, out, gain = effects.shape[1], effects.sum(axis=1), [], (effects**2).mean(axis=0)
    half = np.repeat(np.arange(groups) % 2 == 0, len(effects) // groups)
    masses = [np.cumsum(shape) / shape.sum() for shape in densities(effects)]
    for count in counts:
        middles, found = (np.arange(count) + 0.5) / count, []
        for mass in masses:
            nodes = np.unique(np.searchsorted(mass, middles))
            chosen, equal = effects[:, nodes], _equal_masses(mass, nodes)
            for shrinkage in _SHRINKAGE:
                weights = _least_squares(chosen, total, equal, shrinkage)
                added = 0.5 * sum(_residual(chosen, total, fit, equal, shrinkage) for fit in (half, ~half))
                loose = float((gain[nodes] * np.maximum(weights**2 - weights, 0)).sum())
                found.append((added + drift * loose, nodes, weights))
        added, nodes, weights = min(found, key=lambda one: one[0])
        table = np.zeros(n)
        table[nodes] = weights
        out.append(Option(table, float(len(nodes)), added))
    for first in np.unique(np.linspace(0, n - 1, 17).astype(int)):
        table = (np.arange(n) >= first).astype(np.float64)
        missed = float((effects[:, :first].sum(axis=1) ** 2).mean())
        out.append(Option(table, float(n - first), missed, certain=True))
    return out


def _equal_masses(mass: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The weights [M] with which each node stands for an equal part of the density whose running sum is `mass` [n]."""
    return 1 / np.maximum(len(nodes) * np.diff(mass, prepend=0)[nodes], 1 / len(mass))


def _least_squares(chosen: np.ndarray, total: np.ndarray, equal: np.ndarray, shrinkage: float) -> np.ndarray:
    """Least-squares weights [M] with a penalty of `shrinkage` times the mean squares for their distance to `equal`."""
    gram = chosen.T @ chosen / len(chosen)
    penalty = shrinkage * np.diag(gram) + 1e-30
    gram[np.diag_indices_from(gram)] += penalty
    return np.linalg.solve(gram, chosen.T @ total / len(chosen) + penalty * equal)


def _residual(chosen: np.ndarray, total: np.ndarray, fit: np.ndarray, equal: np.ndarray, shrinkage: float) -> float:
    """Mean squared error, on the rows outside `fit`, of weights fitted on the rows in `fit`."""
    weights = _least_squares(chosen[fit], total[fit], equal, shrinkage)
    return float(((total - chosen @ weights)[~fit] ** 2).mean())


def independent_probabilities(gains: np.ndarray, costs: np.ndarray, price: float) -> np.ndarray:
    """p [n, K] that minimise sum_kj A_kj (1/p_kj - 1) + price * expected cost, with p_1 = 1; A [K, n], costs T [K].

    If coins k and k+1 both fire, they share network k, so p_k depends on its neighbours:

        p_k = min(1, sqrt(A_k / (price [T_k (1 - p_{k+1}) + T_{k-1} (1 - p_{k-1})])))

    This is iterated from several starts, in which the levels up to some m always fire, so that of these only f^m runs;
    each evaluation takes the best fixed point."""
    levels, n = gains.shape
    # a measured gain of zero is not trusted, since few seeds may miss a small gain
    gains = np.maximum(gains, 1e-3 * gains.mean(axis=1, keepdims=True))
    best, lowest = np.ones((n, levels)), np.full(n, np.inf)
    for certain in range(1, levels + 1):
        p = np.ones((n, levels))
        for k in range(certain, levels):
            p[:, k] = np.clip(np.sqrt(gains[k] / (price * (costs[k] + costs[k - 1]))), LEAST, 1)
        for _ in range(40):
            for k in range(certain, levels):
                above = p[:, k + 1] if k + 1 < levels else 0.0
                marginal = costs[k] * (1 - above) + costs[k - 1] * (1 - p[:, k - 1])
                p[:, k] = np.clip(np.sqrt(gains[k] / (price * np.maximum(marginal, 1e-12 * costs[k]))), LEAST, 1)
        objective = (gains.T * (1 / p - 1)).sum(axis=1) + price * evaluation_probabilities(p) @ costs
        better = objective < lowest
        best[better], lowest[better] = p[better], objective[better]
    return best


def nested_probabilities(squares: np.ndarray, costs: np.ndarray, price: float) -> np.ndarray:
    """p [n, K] of nested coins that minimise sum_k (1/p_k - 1/p_{k-1}) D_k + price * sum_k p_k T_k, decreasing from 1.
    squares: D [K, n], the gain of f^K - f^{k-1}; D_1 is not used. The square-root law with isotonic regression."""
    levels, n = squares.shape
    drop = squares - np.concatenate([squares[1:], np.zeros((1, n))])
    drop, out = np.maximum(drop, 1e-4 * squares.max(axis=1, keepdims=True)), np.ones((n, levels))
    ratios = [np.cumsum(drop[i:], axis=0) / np.cumsum(costs[i:])[:, None] for i in range(1, levels)]  # sums from i on
    for k in range(1, levels):
        pooled = np.min([ratio[k - i :].max(axis=0) for i, ratio in enumerate(ratios[:k], 1)], axis=0)
        out[:, k] = np.clip(np.sqrt(pooled / price), LEAST, 1)
    return out
