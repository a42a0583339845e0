"""gamma from the drops in loss between neighbouring levels: the law of the loss without its unknown limit L_inf."""

from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import f as f_distribution

from .power_law import CONFIDENCE, S_EDGE, S_MIN, DifferencesLaw, Fit, minimise, profile_interval, to_gflop


class DropsLaw:
    """L_(k-1) - L_k = a (tau_(k-1)^-s - tau_k^-s) for FLOPs [K] and losses [K], with s of either sign.

    Drops may be negative. Neighbouring drops share the noise of one level, so the fit is by generalised least squares:
    the covariance of the drops is D (covariance + scatter diag(L^2)) D^T, where D takes differences, `covariance`
    [K, K] is that of the losses over images, and `scatter` is the variance of each level's loss, relative to its
    square, that comes from training."""

    unknowns, grid = 3, DifferencesLaw.grid  # L_inf counts, since K losses give only K - 1 drops

    def __init__(self, flops: np.ndarray, loss: np.ndarray, covariance: np.ndarray | None = None):
        self.drops, self.loss = -np.diff(loss), loss
        self.covariance = np.zeros((len(loss), len(loss))) if covariance is None else covariance
        self.of_drops = -np.diff(np.eye(len(loss)), axis=0)  # D
        self.law = DifferencesLaw(flops, np.ones(len(loss) - 1))
        self.on_grid = np.exp(self.law.log_shape(self.grid))

    def set_scatter(self, scatter: float) -> None:
        total = self.of_drops @ (self.covariance + scatter * np.diag(self.loss**2)) @ self.of_drops.T
        self.weights = np.linalg.inv(total)

    def solve(self, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best a s >= 0 and the weighted sum of squares, each [G]."""
        shape = self.on_grid if s is self.grid else np.exp(self.law.log_shape(s))
        weighted = shape @ self.weights
        slope = np.maximum(weighted @ self.drops, 0.0) / (weighted * shape).sum(-1)
        return slope, self.rss_of_none - slope**2 * (weighted * shape).sum(-1)

    @property
    def rss_of_none(self) -> float:
        """The weighted sum of squares of the drops, if the loss does not fall."""
        return float(self.drops @ self.weights @ self.drops)

    def rss(self, s: np.ndarray) -> np.ndarray:
        return self.solve(s)[1]


def fit_drops(
    flops: np.ndarray, loss: np.ndarray, covariance: np.ndarray | None = None, between: float = 0.0
) -> tuple[Fit, float]:
    """Fit the drops of losses [K] at FLOPs [K]: the estimate, with a profile interval, and the scatter.

    The scatter makes the residuals as large as expected of them, and is at least `between`, the variance of the
    logarithm of a level's loss between training seeds, where measured."""
    if (loss <= 0).any():
        return Fit(note="A law needs values above zero."), 0.0
    law, dof = DropsLaw(flops, loss, covariance), len(loss) - DropsLaw.unknowns
    least, most = 1e-14, 1e4

    def excess(log_scatter: float) -> float:
        law.set_scatter(np.exp(log_scatter))
        return float(law.rss(law.grid).min()) - dof

    scatter = least
    if dof > 0 and excess(np.log(least)) > 0:
        root: Any = brentq(excess, np.log(least), np.log(most), xtol=1e-3)
        scatter = float(np.exp(root))
    scatter = max(scatter, between)
    law.set_scatter(scatter)
    s, rss = minimise(law.rss, law.grid)
    limit = 2 * float(f_distribution.ppf(CONFIDENCE, 2, dof)) if dof > 0 else 0.0
    if law.rss_of_none - rss <= limit:
        return Fit(note="The loss does not fall measurably with FLOPs."), scatter
    # the weights hold the variance of the residuals, so in this sum of squares it is 1
    interval = profile_interval(law.rss, law.grid, s, rss, dof, 1.0)
    if S_MIN < s < S_EDGE:
        amplitude = float(law.solve(np.array([s]))[0][0]) / s * to_gflop(flops, s)
        return Fit(2 / s, interval, interval, None, amplitude, falls=True), scatter
    slow = s <= S_MIN  # the interval of a best fit at an edge includes that edge
    interval = (interval[0], None) if slow else (0.0, interval[1])
    note = "The drops in loss do not fall with FLOPs" if slow else "The drops in loss vanish at once"
    return Fit(None, interval, interval, note=f"{note}: no finite exponent.", falls=True), scatter
