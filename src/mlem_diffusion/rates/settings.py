"""Exponents of cost against error for EM, ML-EM and its Poisson limit, on the problem of `synthetic`.

What is measured is sqrt(E |X(1) - exact|^2 / d), the RMS error to the solution with the *true* drift on the same Brownian
path, and the expected cost of the run in units of T_0 = 1, where level k costs T_k = 2^(gamma k) per evaluation. Nothing is
timed: all levels are equally cheap to simulate, their cost is counted.

Settings are chosen on one set of replicates and measured on another: EM by its measured frontier; ML-EM and the jump
process by an error model with three or four constants (`calibrate`), as the theory says how their error depends on the
number of steps, the top level and the firing rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..errors import UserError
from ..multilevel.probabilities import evaluation_probabilities
from .poisson_limit import Rates, jump_process
from .problem import NOISE, Coins, Replicates, coarsen, draw, euler, solve

METHODS = ("em", "ml_em", "poisson")
_OVER_BASE = "ml_em_over_base"  # ML-EM whose level 1 is random too, over f^0: what tends to the jump process


@dataclass(frozen=True)
class RateSetting:
    """One run of a method with levels 1..K. steps: n, 0 for the jump process. fires: expected fires of the top level over
    [0, 1]; the rates of the others follow from the square-root law. EM always evaluates level K alone."""

    method: str
    gamma: float
    levels: int
    steps: int = 0
    fires: float = 0.0

    @cached_property
    def level_costs(self) -> np.ndarray:
        """T_k [K]."""
        return 2.0 ** (self.gamma * np.arange(1, self.levels + 1))

    @cached_property
    def rates(self) -> np.ndarray:
        """Wanted fires lambda_k [K] over [0, 1], proportional to T_k^-(1/2 + 1/gamma)."""
        return self.fires * (self.level_costs / self.level_costs[-1]) ** -(0.5 + 1 / self.gamma)

    @cached_property
    def p(self) -> np.ndarray:
        """Inclusion probabilities p_k [K] = min(1, lambda_k h), with p_1 = 1."""
        if self.method == "em":
            return np.ones(self.levels)
        p = np.minimum(1.0, self.rates / self.steps)
        return p if self.method == _OVER_BASE else np.concatenate([[1.0], p[1:]])

    @property
    def c(self) -> float | None:
        """C of p_k = min(1, C T_k^-(1/2 + 1/gamma)); None for EM. For the jump process, of lambda_k instead of p_k."""
        if self.method == "em":
            return None
        return float(self.rates[0] * self.level_costs[0] ** (0.5 + 1 / self.gamma) / max(self.steps, 1))

    @cached_property
    def cost(self) -> float:
        """Expected cost: a network is paid for when its weight is not zero; an event of level k pays for k and k - 1."""
        t = self.level_costs
        if self.method == "poisson":
            return float(self.rates @ (t + np.concatenate([[0.0], t[:-1]])))
        return float(self.steps * evaluation_probabilities(self.p[None])[0] @ t)

    @cached_property
    def features(self) -> np.ndarray:
        """Terms [4] of the squared error in the model of `calibrate`: discretisation 1 / n^2, the top level's own error
        4^-K, the coins' variance of levels >= 2, and that of level 1 where it is random."""
        k = np.arange(2, self.levels + 1)
        size = 4.0**-k + 4.0 ** -(k - 1)  # E |f^k - f^{k-1}|^2 for independent errors 2^-k and 2^-(k-1)
        if self.method == "poisson":
            return np.array([0.0, 4.0**-self.levels, size @ (1 / self.rates[1:]), 1 / self.rates[0]])
        return np.array([self.steps**-2.0, 4.0**-self.levels, size @ (1 / self.p[1:] - 1) / self.steps, 0.0])

    @property
    def run(self) -> RateSetting:
        """The setting as it is simulated: EM does not know gamma."""
        return replace(self, gamma=0.0) if self.method == "em" else self

    @property
    def key(self) -> tuple[int, ...]:
        """Seeds of its coins: they do not depend on which other settings are run."""
        return (
            (*METHODS, _OVER_BASE).index(self.method),
            round(1000 * self.gamma),
            self.levels,
            round(1000 * self.fires),
        )


def predicted_exponent(method: str, gamma: float) -> float:
    """Exponent of cost against error as the error goes to 0; at gamma = 2 without the log^2 of ML-EM and the jump process.

    Below 2 the forced first level (p_1 = 1, 1/h of them) lets ML-EM do better than Monte Carlo's -2, which is what the
    jump process, all of whose levels are random, is left with.
    """
    if method == "em":
        return -(gamma + 1)
    return -max(gamma, 2.0) if method == "poisson" else -max(gamma, 1 + gamma / 2)


def measure(
    dynamics: str, seed: int, paths: int, levels: int, grid: int, settings: Sequence[RateSetting]
) -> dict[RateSetting, np.ndarray]:
    """`squared_errors` [P] of every setting on the `paths` replicates of one seed. dynamics: "sde" or "ode"."""
    replicates = draw((seed,), paths, levels, grid, NOISE[dynamics])
    return dict(zip(settings, squared_errors(replicates, settings), strict=True))


def squared_errors(replicates: Replicates, settings: Sequence[RateSetting]) -> np.ndarray:
    """Squared error, mean over the components, of every setting on every replicate [S, P]."""
    out = np.empty((len(settings), replicates.count))
    for n in sorted({s.steps for s in settings}):
        where = [i for i, s in enumerate(settings) if s.steps == n]
        group = [settings[i] for i in where]
        if n:
            end = euler(replicates, n, [Coins((1.0, *s.p), s.key) for s in group])
        else:
            end = jump_process(replicates, [Rates(tuple(s.rates), s.key) for s in group])
        out[where] = ((end - replicates.end) ** 2).mean(axis=1)
    return out


def reference_error(dynamics: str, seed: int, paths: int, grid: int) -> float:
    """RMS difference between the exact end points on the grid of N = `grid` steps and on one twice as coarse, same path:
    at order 1.5 or 2 the error that is left on the fine grid is about half of it or less."""
    fine = draw((seed,), paths, 1, grid, NOISE[dynamics])
    coarse = solve(fine.start, *coarsen(fine.dw, fine.area), fine.noise)
    return float(np.sqrt(np.mean((coarse - fine.end) ** 2)))


# ---- choosing settings ---------------------------------------------------------------------------------------


def step_counts(grid: int) -> list[int]:
    """4, 6, 8, 12, ... : all 2^j and 3 2^j from 4 on that divide the grid of the Brownian path."""
    both = {2**j for j in range(2, 31)} | {3 * 2**j for j in range(1, 31)}
    return sorted(n for n in both if n <= grid and grid % n == 0)


def em_settings(gamma: float, grid: int, top: int) -> list[RateSetting]:
    """Plain EM with every level 1..top and every number of steps."""
    return [RateSetting("em", gamma, k, n) for n in step_counts(grid) for k in range(1, top + 1)]


def ml_em_settings(gamma: float, grid: int, top: int) -> list[RateSetting]:
    """ML-EM over top levels, steps and expected top fires 1/2, 0.7, 1, ... 128."""
    fires = [round(2 ** (j / 2), 3) for j in range(-2, 15)]
    return [RateSetting("ml_em", gamma, k, n, f) for n in step_counts(grid) for k in range(2, top + 1) for f in fires]


def poisson_settings(gamma: float, top: int, events: float) -> list[RateSetting]:
    """The jump process over top levels and top fires, with at most `events` expected events per path."""
    fires = [round(2 ** (j / 2), 3) for j in range(-2, 15)]
    settings = [RateSetting("poisson", gamma, k, 0, f) for k in range(1, top + 1) for f in fires]
    return [s for s in settings if s.rates.sum() <= events]


def pilot_settings(grid: int, top: int, events: float) -> list[RateSetting]:
    """Runs from which EM's frontier and the constants of the error model are measured."""
    ml_em = [RateSetting("ml_em", 2.5, k, 4 * 2**k, f) for k in range(3, 11) for f in (4.0, 16.0)]
    jumps = [s for s in poisson_settings(2.5, 6, events / 4) if s.fires in (2.0, 8.0)]
    return [*em_settings(1.0, grid, top), *ml_em, *jumps]


def calibrate(settings: Sequence[RateSetting], mse: np.ndarray) -> np.ndarray:
    """Constants c [4] >= 0 of the error model: squared error = features @ c, by least squares of the relative residuals
    of the measured mean squared errors [S]; settings with fewer than 16 steps are left to themselves."""
    from scipy.optimize import nnls

    fine = np.array([s.steps == 0 or s.steps >= 16 for s in settings])
    rows = np.array([s.features for s in settings])[fine] / mse[fine, None]
    return nnls(rows, np.ones(len(rows)))[0]


def model_errors(settings: Sequence[RateSetting], constants: np.ndarray) -> np.ndarray:
    """RMS errors [S] that the error model predicts."""
    return np.sqrt(np.array([s.features for s in settings]) @ constants)


def target_errors(coarsest: float, finest: float, per_octave: int) -> np.ndarray:
    """Errors from coarsest down to finest, evenly spaced in the logarithm."""
    if not 0 < finest < coarsest:
        raise UserError("The target errors must fall: 0 < finest < coarsest.")
    return np.geomspace(coarsest, finest, max(2, 1 + round(per_octave * np.log2(coarsest / finest))))


def cheapest(settings: Sequence[RateSetting], errors: np.ndarray, targets: Iterable[float]) -> list[RateSetting]:
    """For every target the cheapest setting whose error (measured or predicted [S]) is not above it; targets that no
    setting reaches are left out, and each setting is named once."""
    costs = np.array([s.cost for s in settings])
    chosen: list[RateSetting] = []
    for target in targets:
        able = np.flatnonzero(errors <= target)
        if len(able) and (best := settings[able[np.argmin(costs[able])]]) not in chosen:
            chosen.append(best)
    return chosen


def limit_settings(grid: int) -> tuple[list[RateSetting], dict[str, list[RateSetting]]]:
    """The study of the step size at gamma = 2.5: jump processes, and curves over n = 64, 128, ..., 4096 (those that divide
    `grid`): EM with a fine level, ML-EM with expected fires that do not depend on n, and ML-EM over f^0, level 1
    random too, with the very rates of the jump processes."""
    counts = [2**j for j in range(6, 13) if grid % 2**j == 0]
    jumps = [RateSetting("poisson", 2.5, k, 0, 4.0) for k in (4, 5)]
    curves = {"EM, level 12": [RateSetting("em", 2.5, 12, n) for n in counts]}
    for k in (4, 6, 8):
        curves[f"ML-EM, {k} levels"] = [RateSetting("ml_em", 2.5, k, n, 4.0) for n in counts]
    for k in (4, 5):
        curves[f"ML-EM over the base, {k} levels"] = [RateSetting(_OVER_BASE, 2.5, k, n, 4.0) for n in counts]
    return jumps, curves
