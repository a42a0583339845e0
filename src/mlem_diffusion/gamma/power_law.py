"""Error against FLOPs: the exponent gamma of a family of denoisers, with intervals.

gamma is defined by cost(eps) ~ eps^-gamma, where eps is the root-mean-square error of the drift. A mean squared error
therefore falls as T^-s with s = 2 / gamma, where T is the FLOPs of one evaluation. Three fits estimate gamma:

* `fit_loss`:        L_k = L_inf + a T_k^-s  (L_inf >= 0 unknown: three parameters, often weak)
* `fit_differences`: E|f^k - f^(k-1)|^2 = a (T_(k-1)^-s - T_k^-s)  (nested levels; no L_inf)
* `fit_to_largest`:  E|f^k - f^K|^2 = a (T_k^-s - T_K^-s)  (nested levels; no L_inf)

The last two are fitted as written. A straight line through log E|f^k - f^K|^2 is biased towards small gamma, because
its points bend down as T_k approaches T_K.

Method. Only s enters non-linearly, so the other parameters are eliminated in closed form. The residual sum of squares
is profiled over a dense grid of s and then refined. Every grid point is a start, so the fit cannot stop at a local
minimum. Residuals are relative (logarithms for the last two). FLOPs are first divided by their geometric mean. A
constant factor, such as MACs instead of FLOPs, does not change gamma.

Coverage. The intervals are 95% intervals for the exponent of *these* trained levels. They assume the law above, with
scatter that is independent between levels. They include the scatter of the levels about the law and the finite number
of held-out images. Each level is a separate run, so the scatter includes its training noise. A few points may be closer
to the law, by chance, than repeated training would be. If levels were trained from several seeds, their spread
(`between`) is therefore the least scatter that an interval assumes. The intervals do not include what all levels share:
a second family, trained from other seeds, on other data or for longer, may give a gamma outside them. They do not
include the bending of a law either (levels that have not converged), which is not scatter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .intervals import (
    CONFIDENCE,
    S_EDGE,
    S_MAX,
    S_MIN,
    Interval,
    bootstrap_interval,
    grid_minimum,
    hull,
    minimise,
    profile_interval,
)

# Dense near s = 0, where gamma is large. Negative s (differences that grow) keeps the t interval valid at the boundary.
_GRID = 0.05 * np.sinh(np.linspace(np.arcsinh(-2.0 / 0.05), np.arcsinh(S_MAX / 0.05), 800))
_POSITIVE_GRID = 0.05 * np.sinh(np.linspace(np.arcsinh(S_MIN / 0.05 / 4), np.arcsinh(S_MAX / 0.05), 500))


@dataclass(frozen=True)
class Fit:
    """One estimate of gamma. Intervals are (low, high); high is None if the data give no upper bound.

    `interval` is the hull of the two others. The profile interval (residual scatter with a t quantile, exact only for a
    linear model) ignores the measurement errors, which matter if a few residuals happen to be small. The parametric
    bootstrap includes both, but it is a percentile interval. The hull is rather too wide.
    """

    gamma: float | None  # None if the best fit is at an edge of the law's range; `note` gives the reason
    interval: Interval
    profile_interval: Interval
    bootstrap_interval: Interval | None  # None without repeats or degrees of freedom
    amplitude: float | None  # a, for T in GFLOP
    floor: float | None  # L_inf; None for the fits without it
    degrees_of_freedom: int
    rms_residual: float | None  # relative
    fitted: np.ndarray | None  # values of the fitted law at the data points
    falls: bool  # False: no decrease with FLOPs
    note: str


def fit_loss(
    flops: np.ndarray,
    loss: np.ndarray,
    *,
    covariance: np.ndarray | None = None,
    between: float = 0.0,
    bootstrap: int = 0,
    seed: int = 0,
) -> Fit:
    """Fit L_k = L_inf + a T_k^(-2/gamma) with L_inf >= 0 and a >= 0 to the losses of K levels (equation (a)).

    flops [K] per evaluation, loss [K]. covariance [K, K]: of the measured losses over held-out images (optional).
    between: the variance of each value's logarithm between training seeds, if measured (training_seeds.py). Residuals
    are relative; the interval uses t(K-3). gamma is None if the losses do not fall measurably (see `_falls`).
    """
    t, y = _checked(flops, loss)
    dof = len(y) - 3
    if dof < 0:
        return _unfitted(dof, "Three unknowns need at least three levels.")
    log_tau, rel = np.log(t) - np.log(t).mean(), 1.0 / y

    def rss_of(s: np.ndarray, values: np.ndarray = y) -> np.ndarray:
        return _floor_and_amplitude(s, log_tau, values, rel)[2]

    def rss_of_constant(values: np.ndarray) -> float:
        mean = (values * rel**2).sum() / (rel**2).sum()
        return float((((values - mean) * rel) ** 2).sum())

    def refit(values: np.ndarray) -> float:
        best = grid_minimum(rss_of(_POSITIVE_GRID, values), _POSITIVE_GRID)
        better = rss_of(np.array([best]), values)[0] < rss_of_constant(values) * (1 - 1e-9)
        return best if better else float("nan")

    s, rss = minimise(rss_of, _POSITIVE_GRID)
    floor, a = (float(v[0]) for v in _floor_and_amplitude(np.array([s]), log_tau, y, rel)[:2])
    fitted = floor + a * np.exp(-s * log_tau)
    profile = profile_interval(rss_of, _POSITIVE_GRID, s, rss, dof, between)
    booted = bootstrap_interval(refit, y, fitted, rss, dof, covariance, bootstrap, seed, between)
    rss_flat = rss_of_constant(y)
    note, falls = "", a > 0 and rss < rss_flat * (1 - 1e-9) and _falls(log_tau, y, rss, rss_flat)
    if not falls:
        note = "The loss does not fall measurably with FLOPs: a constant explains it as well."
        profile = (0.0, None)
    elif s >= S_EDGE:
        note = "The loss drops to its floor at once; the exponent is at the lower edge of the search."
    elif s <= S_MIN:
        note = "The loss falls so slowly that gamma is above 100: no finite exponent."
    elif floor == 0:
        note = "L_inf is at its bound of zero: a pure power law fits best."
    return _result(s, a, floor, t, falls, note, profile, booted, dof, rss, fitted)


def _floor_and_amplitude(
    s: np.ndarray, log_tau: np.ndarray, values: np.ndarray, rel: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best L_inf >= 0 and a >= 0 for each s [G], and their RSS with residuals times rel [K]; each is [G]."""
    w = rel**2
    # (tau^-s - 1)/s instead of tau^-s keeps the two columns distinct as s -> 0.
    basis = np.expm1(-s[:, None] * log_tau) / s[:, None]
    mean_b, mean_y = (basis * w).sum(-1) / w.sum(), (values * w).sum() / w.sum()
    centred = basis - mean_b[:, None]
    slope = ((values * w) @ centred.T) / (centred**2 * w).sum(-1)
    amplitude = slope / s
    floor = mean_y - slope * mean_b - amplitude
    power = np.exp(-s[:, None] * log_tau)
    no_floor = ((values * w) @ power.T) / (power**2 * w).sum(-1)
    flat, zero = np.full_like(s, mean_y), np.zeros_like(s)

    def rss(floor_: np.ndarray, amplitude_: np.ndarray) -> np.ndarray:
        model = floor_[:, None] + amplitude_[:, None] * power
        return (((values - model) * rel) ** 2).sum(-1)

    # If the free optimum violates a bound, the best point is on one of the two edges.
    free = (floor >= 0) & (amplitude > 0)
    rss_edge, rss_flat = rss(zero, no_floor), rss(flat, zero)
    on_edge = rss_edge < rss_flat
    return (
        np.where(free, floor, np.where(on_edge, zero, flat)),
        np.where(free, amplitude, np.where(on_edge, no_floor, zero)),
        np.where(free, rss(floor, amplitude), np.minimum(rss_edge, rss_flat)),
    )


def fit_differences(
    flops: np.ndarray,
    values: np.ndarray,
    *,
    covariance: np.ndarray | None = None,
    between: float = 0.0,
    bootstrap: int = 0,
    seed: int = 0,
) -> Fit:
    """Fit E|f^k - f^(k-1)|^2 = a (T_(k-1)^(-2/gamma) - T_k^(-2/gamma)), k = 2..K (equation (b)).

    The fit is on a log scale. flops [K] per evaluation, values [K-1]. covariance [K-1, K-1]: of the values over
    held-out images (optional). between: as in `fit_loss`. The interval uses t(K-3) (K-1 points, two unknowns).
    """
    t = np.asarray(flops, dtype=np.float64)
    return _fit_between(t, t[1:], values, covariance, between, bootstrap, seed)


def fit_to_largest(
    flops: np.ndarray,
    values: np.ndarray,
    *,
    covariance: np.ndarray | None = None,
    between: float = 0.0,
    bootstrap: int = 0,
    seed: int = 0,
) -> Fit:
    """Fit E|f^k - f^K|^2 = a (T_k^(-2/gamma) - T_K^(-2/gamma)), k = 1..K-1 (equation (c)), on a log scale.

    Arguments and interval are as in `fit_differences`. All points share f^K, so their errors are correlated. The
    profile interval ignores this correlation, which is weaker in `fit_differences`.
    """
    t = np.asarray(flops, dtype=np.float64)
    return _fit_between(t, t[-1:], values, covariance, between, bootstrap, seed)


def _fit_between(
    flops: np.ndarray,
    upper: np.ndarray,
    values: np.ndarray,
    covariance: np.ndarray | None,
    between: float,
    bootstrap: int,
    seed: int,
) -> Fit:
    """Fit log values = log a + log(T_k^-s - upper^-s), k = 1..K-1, with s of either sign; upper [K-1] or [1]."""
    t, y = _checked(flops, values, missing=1)
    dof = len(y) - 2
    if dof < 0:
        return _unfitted(dof, "Two unknowns need at least three levels.")
    if (y <= 0).any():
        return _unfitted(dof, "Two levels do not differ at all: the logarithm of their difference does not exist.")
    log_scale = np.log(t).mean()
    log_upper, log_ratio = np.log(upper) - log_scale, np.log(upper / t[:-1])

    def log_shape(s: np.ndarray) -> np.ndarray:
        """log((T_k^-s - upper^-s) / s), smooth through s = 0: [G] -> [G, n]."""
        s = np.where(np.abs(s) < 1e-9, 1e-9, s)[:, None]
        return -s * log_upper + np.log(np.expm1(s * log_ratio) / s)

    shape = log_shape(_GRID)
    centred_grid = shape - shape.mean(-1, keepdims=True)

    def rss_of(s: np.ndarray) -> np.ndarray:
        residual = np.log(y) - log_shape(s)
        return ((residual - residual.mean(-1, keepdims=True)) ** 2).sum(-1)

    def refit(resampled: np.ndarray) -> float:
        z = np.log(resampled)
        return grid_minimum(((z - z.mean() - centred_grid) ** 2).sum(-1), _GRID)

    s, rss = minimise(rss_of, _GRID)
    log_model = log_shape(np.array([s]))[0]
    log_b = float((np.log(y) - log_model).mean())  # log of a s, in units of the geometric mean FLOPs
    fitted = np.exp(log_b + log_model)
    profile = profile_interval(rss_of, _GRID, s, rss, dof, between)
    booted = bootstrap_interval(refit, y, fitted, rss, dof, covariance, bootstrap, seed, between)
    note, falls = "", s > S_MIN
    if not falls:
        note = "The differences between levels do not fall with FLOPs: no finite exponent."
    elif s >= S_EDGE:
        note = "The differences vanish at once; the exponent is at the lower edge of the search."
    a = float(np.exp(log_b)) / max(s, S_MIN)  # dropped by _result if s <= S_MIN
    return _result(s, a, None, t, falls, note, profile, booted, dof, rss, fitted)


def _falls(log_flops: np.ndarray, loss: np.ndarray, rss: float, rss_flat: float) -> bool:
    """Whether the loss falls, given its scatter: by its slope in log FLOPs (t test) or by the law (F test)."""
    from scipy.stats import f as f_distribution
    from scipy.stats import linregress

    line: Any = linregress(log_flops, loss)
    dof = len(loss) - 3
    if line.slope < 0 and line.pvalue < 1 - CONFIDENCE:
        return True
    return dof > 0 and (rss_flat - rss) / 2 > float(f_distribution.ppf(CONFIDENCE, 2, dof)) * rss / dof


def _checked(flops: np.ndarray, values: np.ndarray, missing: int = 0) -> tuple[np.ndarray, np.ndarray]:
    t, y = np.asarray(flops, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if t.ndim != 1 or y.shape != (len(t) - missing,):
        raise UserError(f"A fit over {t.size} levels needs {t.size - missing} values, got shape {y.shape}.")
    if not (np.isfinite(t).all() and np.isfinite(y).all() and (np.diff(t) > 0).all() and (t > 0).all()):
        raise UserError("A fit needs finite values and positive, ascending FLOPs.")
    if (y < 0).any() or (missing == 0 and (y <= 0).any()):
        raise UserError("A fit needs squared errors, which are not negative, and losses above zero.")
    return t, y


def _result(
    s: float,
    amplitude: float,
    floor: float | None,
    flops: np.ndarray,
    falls: bool,
    note: str,
    profile: Interval,
    booted: Interval | None,
    dof: int,
    rss: float,
    fitted: np.ndarray,
) -> Fit:
    proper = falls and S_MIN < s < S_EDGE
    if not proper and dof > 0:  # the interval of a best fit at an edge includes that edge
        profile = (profile[0], None) if s <= S_MIN or not falls else (0.0, profile[1])
    if dof < 1:
        note = f"{note} Too few levels for an interval.".strip()
    interval = hull(profile, booted)
    if proper and dof > 0 and interval == (0.0, None):
        note = f"{note} The points scatter too much to bound gamma on either side.".strip()
    to_gflop = float(np.exp(s * (np.log(flops).mean() - np.log(1e9))))  # from units of the geometric mean
    return Fit(
        gamma=2 / s if proper else None,
        interval=interval,
        profile_interval=profile,
        bootstrap_interval=booted,
        amplitude=amplitude * to_gflop if proper else None,
        floor=floor,
        degrees_of_freedom=dof,
        rms_residual=float(np.sqrt(rss / len(fitted))),
        fitted=fitted,
        falls=falls,
        note=note,
    )


def _unfitted(dof: int, note: str) -> Fit:
    return Fit(None, (0.0, None), (0.0, None), None, None, None, max(dof, 0), None, None, False, note)


FITS = {"loss_fit": fit_loss, "differences": fit_differences, "to_largest": fit_to_largest}
