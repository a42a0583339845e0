"""Error against FLOPs: the exponent gamma of a family of denoisers, with intervals.
gamma is defined by cost(eps) ~ eps^-gamma, where eps is the root-mean-square error of the drift. A mean squared error
therefore falls as T^-s with s = 2 / gamma, where T is the FLOPs of one evaluation. Only s enters the three laws
non-linearly, so the other parameters are eliminated in closed form. The 95% intervals are for *these* trained levels:
they assume the law, with independent scatter, and do not include what all levels share (data, training length)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import f as f_distribution
from scipy.stats import linregress
from scipy.stats import t as t_distribution

from ..errors import UserError

S_MIN, S_MAX = 0.02, 8.0  # gamma above 2 / S_MIN = 100 counts as unbounded, below 2 / S_MAX = 0.25 as zero
S_EDGE = 0.999 * S_MAX  # an s from this value on counts as the end of the search
CONFIDENCE = 0.95

Interval = tuple[float, float | None]  # of gamma; None: no upper bound
RSS = Callable[[np.ndarray], np.ndarray]  # the residual sum of squares of exponents s [G]: [G]


@dataclass(frozen=True)
class Fit:
    """One estimate of gamma; `interval` is the hull of the other two, so it is rather too wide."""

    gamma: float | None = None  # None if the best fit is at an edge of the law's range; `note` gives the reason
    interval: Interval = (0.0, None)
    profile_interval: Interval = (0.0, None)  # it ignores the measurement errors
    bootstrap_interval: Interval | None = None  # None without refits or degrees of freedom
    amplitude: float | None = None  # a, for T in GFLOP
    floor: float | None = None  # L_inf; None for the laws without it
    falls: bool = False  # with FLOPs
    note: str = ""


def s_grid(low: float, points: int) -> np.ndarray:
    """Values of s from low to S_MAX, dense near s = 0, where gamma is large."""
    return 0.05 * np.sinh(np.linspace(np.arcsinh(low / 0.05), np.arcsinh(S_MAX / 0.05), points))


class LossLaw:
    """L_k = L_inf + a tau_k^-s with L_inf, a >= 0, for FLOPs [K] and losses [K]; residuals are relative."""

    unknowns, grid = 3, s_grid(S_MIN / 4, 500)
    flat = "The loss does not fall measurably with FLOPs: a constant explains it as well."
    edge = "The loss falls too fast or too slowly for a finite exponent."

    def __init__(self, flops: np.ndarray, loss: np.ndarray):
        self.log_tau = np.log(flops) - np.log(flops).mean()
        self.loss, self.relative = loss, 1.0 / loss

    def best(self, s: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best a and L_inf for each s [G], and their RSS, each [G]."""
        w = self.relative**2
        # (tau^-s - 1)/s instead of tau^-s keeps the two columns distinct as s -> 0
        basis, power = np.expm1(-s[:, None] * self.log_tau) / s[:, None], np.exp(-s[:, None] * self.log_tau)
        mean_basis, mean_loss = (basis * w).sum(-1) / w.sum(), (loss * w).sum() / w.sum()
        centred = basis - mean_basis[:, None]
        slope = ((loss * w) @ centred.T) / (centred**2 * w).sum(-1)
        amplitude = slope / s
        floor = mean_loss - slope * mean_basis - amplitude
        # if this optimum violates a bound, the best point is on an edge: without a floor, or flat
        free = (floor >= 0) & (amplitude > 0)
        without_floor = ((loss * w) @ power.T) / (power**2 * w).sum(-1)
        a, constant = np.where(free, amplitude, without_floor), np.where(free, floor, 0.0)
        rss = (((loss - (constant[:, None] + a[:, None] * power)) * self.relative) ** 2).sum(-1)
        rss_flat = self.rss_of_constant(loss)
        flat = ~free & (rss >= rss_flat)
        return np.where(flat, 0.0, a), np.where(flat, mean_loss, constant), np.where(flat, rss_flat, rss)

    def rss(self, s: np.ndarray) -> np.ndarray:
        return self.best(s, self.loss)[2]

    def rss_of_constant(self, loss: np.ndarray) -> float:
        return float((((loss - np.average(loss, weights=self.relative**2)) * self.relative) ** 2).sum())

    def refit(self, loss: np.ndarray) -> float:
        """The best s for other losses [K]; NaN if a constant fits as well, so that any s does."""
        s = grid_minimum(self.best(self.grid, loss)[2], self.grid)
        return s if self.best(np.array([s]), loss)[2][0] < self.rss_of_constant(loss) * (1 - 1e-9) else float("nan")

    def solve(self, s: float) -> tuple[float, float | None, np.ndarray]:
        """Amplitude, L_inf and the law's values [K] at s."""
        a, floor = (float(v[0]) for v in self.best(np.array([s]), self.loss)[:2])
        return a, floor, floor + a * np.exp(-s * self.log_tau)

    def falls(self, s: float, rss: float) -> bool:
        """Whether the loss falls, given its scatter: by its slope in log FLOPs (t test) or by the law (F test)."""
        constant, dof = self.rss_of_constant(self.loss), len(self.loss) - 3
        if rss >= constant * (1 - 1e-9):
            return False
        line: Any = linregress(self.log_tau, self.loss)
        if line.slope < 0 and line.pvalue < 1 - CONFIDENCE:
            return True
        return dof > 0 and (constant - rss) / 2 > float(f_distribution.ppf(CONFIDENCE, 2, dof)) * rss / dof


class DifferencesLaw:
    """E|f^k - f^(k-1)|^2 = a (tau_(k-1)^-s - tau_k^-s), for FLOPs [K] and values [K-1], with s of either sign.
    Residuals are logarithms. Negative s (differences that grow) keeps the t interval valid at the boundary."""

    unknowns, grid = 2, s_grid(-2.0, 800)
    flat = "The differences between levels do not fall with FLOPs: no finite exponent."
    edge = "The differences vanish at once: no finite exponent."
    upper = slice(1, None)  # the levels with the smaller term, tau_k

    def __init__(self, flops: np.ndarray, values: np.ndarray):
        upper = flops[self.upper]
        self.log_upper, self.log_ratio = np.log(upper) - np.log(flops).mean(), np.log(upper / flops[:-1])
        self.log_values = np.log(values)
        shape = self.log_shape(self.grid)
        self.centred_grid = shape - shape.mean(-1, keepdims=True)

    def log_shape(self, s: np.ndarray) -> np.ndarray:
        """log((tau_(k-1)^-s - tau_k^-s) / s), smooth through s = 0: [G] -> [G, K-1]."""
        s = np.where(np.abs(s) < 1e-9, 1e-9, s)[:, None]
        return -s * self.log_upper + np.log(np.expm1(s * self.log_ratio) / s)

    def rss(self, s: np.ndarray) -> np.ndarray:
        residual = self.log_values - self.log_shape(s)
        return ((residual - residual.mean(-1, keepdims=True)) ** 2).sum(-1)

    def refit(self, values: np.ndarray) -> float:
        z = np.log(values)
        return grid_minimum(((z - z.mean() - self.centred_grid) ** 2).sum(-1), self.grid)

    def solve(self, s: float) -> tuple[float, float | None, np.ndarray]:
        """Amplitude, no L_inf, and the law's values [K-1] at s."""
        shape = self.log_shape(np.array([s]))[0]
        log_scale = float((self.log_values - shape).mean())  # log of a s
        return float(np.exp(log_scale)) / max(s, S_MIN), None, np.exp(log_scale + shape)

    def falls(self, s: float, rss: float) -> bool:
        return s > S_MIN


class ToLargestLaw(DifferencesLaw):
    """E|f^k - f^K|^2 = a (tau_k^-s - tau_K^-s). The profile interval ignores that all points share f^K."""

    upper = slice(-1, None)


LAWS = {"loss_fit": LossLaw, "differences": DifferencesLaw, "to_largest": ToLargestLaw}


def fit(
    form: str, flops: np.ndarray, values: np.ndarray, covariance: np.ndarray | None = None, between: float = 0.0,
    bootstrap: int = 0, seed: int = 0,
) -> Fit:  # fmt: skip
    """Fit one of the `LAWS` to FLOPs [K] per evaluation and values [n] (n = K for loss_fit, else K - 1).
    covariance [n, n]: of the values over held-out images. between: the variance of each value's logarithm between
    training seeds, if measured. bootstrap: the number of refits."""
    if not np.isfinite(values).all() or (np.diff(flops) <= 0).any():
        raise UserError("gamma needs levels of ascending FLOPs with finite errors.")
    if (values == 0).any():
        return Fit(note="A law needs values above zero.")
    law = LAWS[form](flops, values)
    dof = len(values) - law.unknowns
    s, rss = minimise(law.rss, law.grid)
    amplitude, floor, fitted = law.solve(s)
    falls = law.falls(s, rss)
    proper = falls and S_MIN < s < S_EDGE
    profile = profile_interval(law.rss, law.grid, s, rss, dof, between)
    if not falls and floor is not None:
        profile = (0.0, None)
    elif not proper:  # the interval of a best fit at an edge includes that edge
        profile = (profile[0], None) if s <= S_MIN else (0.0, profile[1])
    booted, interval = None, profile
    if bootstrap > 0 and dof > 0:
        scatter = relative_scatter(values, rss, dof, covariance, between, bootstrap, seed)
        refits, tail = [law.refit(drawn) for drawn in fitted * np.exp(scatter)], (1 - CONFIDENCE) / 2
        # NaN: any exponent fits; such a draw counts at both ends
        low = np.quantile(np.nan_to_num(refits, nan=0.0), tail)
        booted = _to_gamma(float(low), float(np.quantile(np.nan_to_num(refits, nan=S_MAX), 1 - tail)))
        high = None if profile[1] is None or booted[1] is None else max(profile[1], booted[1])
        interval = (min(profile[0], booted[0]), high)
    if not proper:
        return Fit(None, interval, profile, booted, None, floor, falls, law.edge if falls else law.flat)
    note = "L_inf is at its bound of zero: a pure power law fits best." if floor == 0 else ""
    return Fit(2 / s, interval, profile, booted, amplitude * to_gflop(flops, s), floor, falls, note)


def to_gflop(flops: np.ndarray, s: float) -> float:
    """The factor of an amplitude from units of the geometric mean of the FLOPs to GFLOP."""
    return float(np.exp(s * (np.log(flops).mean() - np.log(1e9))))


def minimise(rss: RSS, grid: np.ndarray) -> tuple[float, float]:
    """The s with the smallest RSS, and that RSS: the best grid point, refined between its neighbours."""
    values = rss(grid)
    i = int(np.argmin(values))
    search: Any = {"bounds": (grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]), "options": {"xatol": 1e-10}}
    found: Any = minimize_scalar(lambda s: rss(np.array([s]))[0], method="bounded", **search)
    return (float(found.x), float(found.fun)) if found.fun < values[i] else (float(grid[i]), float(values[i]))


def grid_minimum(values: np.ndarray, grid: np.ndarray) -> float:
    """Position of the minimum of values [G], by a parabola through the best grid point and its neighbours."""
    i = int(np.argmin(values))
    if i in (0, len(grid) - 1):
        return float(grid[i])
    x, y = grid[i - 1 : i + 2] - grid[i], values[i - 1 : i + 2] - values[i]
    curvature = (y[0] / x[0] - y[2] / x[2]) / (x[0] - x[2])
    slope = y[0] / x[0] - curvature * x[0]
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
    return 0.0 if s_high >= S_EDGE else 2 / max(s_high, S_MIN), None if s_low <= S_MIN else 2 / s_low


def relative_scatter(
    values: np.ndarray, rss: float, dof: int, covariance: np.ndarray | None, between: float, draws: int, seed: int
) -> np.ndarray:
    """Normal errors [draws, n] of the logarithms of the values [n]. The measurement covariance [n, n] and the variance
    `between` training seeds are added to the scatter, so their uncorrelated part counts twice."""
    rng, shape = np.random.default_rng(seed), (draws, len(values))
    variance = rss / rng.chisquare(dof, draws)  # drawn, because a few residuals determine it poorly
    noise = np.minimum(np.sqrt(variance), 2.0)[:, None] * rng.standard_normal(shape)
    if covariance is not None:
        relative, zero = covariance / np.outer(values, values), np.zeros(len(values))
        noise += rng.multivariate_normal(zero, relative, draws, method="eigh", check_valid="ignore")
    if between > 0:
        noise += np.sqrt(between) * rng.standard_normal(shape)
    return noise
