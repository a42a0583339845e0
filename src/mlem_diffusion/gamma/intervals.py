"""Least squares in one exponent s: the minimum of the residual sum of squares (RSS), and 95% intervals.

An RSS is a function from s [G] to values [G]; a grid is ascending [G]. Intervals (low, high) are for gamma = 2 / s;
high is None without an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import t as t_distribution

S_MIN, S_MAX = 0.02, 8.0  # gamma above 2 / S_MIN = 100 counts as unbounded, below 2 / S_MAX = 0.25 as zero
S_EDGE = 0.999 * S_MAX  # an s from this value on counts as the end of the search
CONFIDENCE = 0.95

Interval = tuple[float, float | None]
RSS = Callable[[np.ndarray], np.ndarray]


def s_grid(low: float, points: int) -> np.ndarray:
    """Values of s from low to S_MAX, dense near s = 0, where gamma is large."""
    return 0.05 * np.sinh(np.linspace(np.arcsinh(low / 0.05), np.arcsinh(S_MAX / 0.05), points))


def minimise(rss: RSS, grid: np.ndarray) -> tuple[float, float]:
    """The s with the smallest RSS, and that RSS: the best grid point, refined between its neighbours."""
    values = rss(grid)
    i = int(np.argmin(values))
    bounds = (grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)])
    options = {"xatol": 1e-10}
    found: Any = minimize_scalar(lambda s: rss(np.array([s]))[0], bounds=bounds, method="bounded", options=options)
    return (float(found.x), float(found.fun)) if found.fun < values[i] else (float(grid[i]), float(values[i]))


def grid_minimum(values: np.ndarray, grid: np.ndarray) -> float:
    """Position of the minimum of values [G], by a parabola through the best grid point and its neighbours."""
    i = int(np.argmin(values))
    if i in (0, len(grid) - 1):
        return float(grid[i])
    x, y = grid[i - 1 : i + 2] - grid[i], values[i - 1 : i + 2] - values[i]
    curvature = (y[0] / x[0] - y[2] / x[2]) / (x[0] - x[2])
    slope = y[0] / x[0] - curvature * x[0]
    if curvature <= 0:
        return float(grid[i])
    return float(grid[i]) + float(np.clip(-slope / (2 * curvature), x[0], x[2]))


def profile_interval(rss: RSS, grid: np.ndarray, best: float, rss_min: float, dof: int, between: float) -> Interval:
    """All s with RSS(s) <= RSS_min + t^2 v, converted to gamma; (0, None) without a degree of freedom.

    v is the variance of the residuals, RSS_min / dof, but at least `between`, the variance between training seeds."""
    if dof < 1:
        return (0.0, None)
    t_squared = float(t_distribution.ppf((1 + CONFIDENCE) / 2, dof)) ** 2
    limit = rss_min * (1 + t_squared / dof) if between * dof <= rss_min else rss_min + t_squared * between
    inside = np.append(grid[rss(grid) <= limit], best)

    def excess(s: float) -> float:
        return float(rss(np.array([s]))[0]) - limit

    def end(inner: float, beyond: np.ndarray) -> float:
        if len(beyond) == 0 or not excess(inner) < 0 < excess(beyond[0]):
            return inner
        return brentq(excess, inner, beyond[0])  # type: ignore[return-value]

    low, high = inside.min(), inside.max()
    return _to_gamma(float(end(low, grid[grid < low][::-1])), float(end(high, grid[grid > high])))


def _to_gamma(s_low: float, s_high: float) -> Interval:
    low = 0.0 if s_high >= S_EDGE else 2 / max(s_high, S_MIN)
    return (low, None if s_low <= S_MIN else 2 / s_low)


def bootstrap_interval(
    refit: Callable[[np.ndarray], float],
    observed: np.ndarray,
    fitted: np.ndarray,
    variance: np.ndarray,
    rng: np.random.Generator,
    covariance: np.ndarray | None,
    between: float,
) -> Interval:
    """Percentile interval of refits to the fitted values [n] with new scatter, drawn as relative normal errors.

    `refit` maps values [n] to s, or to NaN if any s fits. variance [draws]: of the scatter. The measurement covariance
    [n, n] and the variance `between` training seeds are added, so their uncorrelated part counts twice."""
    shape = len(variance), len(observed)
    noise = np.minimum(np.sqrt(variance), 2.0)[:, None] * rng.standard_normal(shape)
    if covariance is not None:
        relative, zero = covariance / np.outer(observed, observed), np.zeros(len(observed))
        noise += rng.multivariate_normal(zero, relative, len(variance), method="eigh", check_valid="ignore")
    if between > 0:
        noise += np.sqrt(between) * rng.standard_normal(shape)
    found = np.array([refit(values) for values in fitted * np.exp(noise)])
    # NaN: the resampled values are flat, so any exponent fits. Such a draw counts at both ends.
    tail = (1 - CONFIDENCE) / 2
    s_low = np.quantile(np.where(np.isnan(found), 0.0, found), tail)
    s_high = np.quantile(np.where(np.isnan(found), S_MAX, found), 1 - tail)
    return _to_gamma(float(s_low), float(s_high))
