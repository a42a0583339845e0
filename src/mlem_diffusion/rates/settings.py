"""Settings of EM, ML-EM and its Poisson limit on the problem in problem.py: costs, simulated errors, and choice.

The error is sqrt(E |X(1) - exact|^2 / d), the RMS error to the solution with the *true* drift on the same Brownian
path. The cost is expected, in units of T_0 = 1: an evaluation of level k costs T_k = 2^(gamma k). It is counted, not
timed, because all levels are equally cheap to simulate. Settings are chosen on other replicates than measured: EM by
its measured frontier, the others by an error model, squared error = features @ constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import nnls

from ..errors import UserError
from ..multilevel.estimators import evaluation_probabilities
from .problem import NOISE, Replicates, draw, euler, jump_process

METHODS = ("em", "ml_em", "poisson")
_OVER_BASE = "ml_em_over_base"  # ML-EM over f^0, with a random level 1 too; its limit is the jump process
_FIRES = [round(2 ** (j / 2), 3) for j in range(-2, 15)]  # expected fires of the top level: 1/2, 0.7, 1, ... 128
MIN_POINTS = 4  # fewest points in the fit of an exponent
Measured = dict["RateSetting", np.ndarray]  # squared errors [replicates] by setting


@dataclass(frozen=True)
class RateSetting:
    """One run of a method with levels 1..K; EM evaluates only level K."""

    method: str
    gamma: float
    levels: int
    steps: int = 0  # n; 0 for the jump process
    fires: float = 0.0  # of the top level over [0, 1]; the square-root law gives the rates of the other levels

    @cached_property
    def level_costs(self) -> np.ndarray:  # T_k [K]
        return 2.0 ** (self.gamma * np.arange(1, self.levels + 1))

    @cached_property
    def rates(self) -> np.ndarray:
        """Target fires lambda_k [K] over [0, 1], proportional to T_k^-(1/2 + 1/gamma)."""
        return self.fires * (self.level_costs / self.level_costs[-1]) ** -(0.5 + 1 / self.gamma)

    @cached_property
    def p(self) -> np.ndarray:
        """Inclusion probabilities p_k [K] = min(1, lambda_k h), with p_1 = 1."""
        p = np.ones(self.levels) if self.method == "em" else np.minimum(1.0, self.rates / self.steps)
        return p if self.method == _OVER_BASE else np.concatenate([[1.0], p[1:]])

    @cached_property
    def cost(self) -> float:
        """Expected cost: networks with nonzero weight are evaluated; an event of level k evaluates k and k - 1."""
        t = self.level_costs
        if self.method == "poisson":
            return float(self.rates @ (t + np.concatenate([[0.0], t[:-1]])))
        return float(self.steps * evaluation_probabilities(self.p[None])[0] @ t)

    @cached_property
    def features(self) -> np.ndarray:
        """Terms [4] of the squared error: discretisation 1 / n^2, the top level's error 4^-K, the coins' variance of
        levels >= 2, and that of level 1 if it is random."""
        k = np.arange(2, self.levels + 1)
        size = 4.0**-k + 4.0 ** -(k - 1)  # E |f^k - f^{k-1}|^2 for independent errors 2^-k and 2^-(k-1)
        if self.method == "poisson":
            return np.array([0.0, 4.0**-self.levels, size @ (1 / self.rates[1:]), 1 / self.rates[0]])
        return np.array([self.steps**-2.0, 4.0**-self.levels, size @ (1 / self.p[1:] - 1) / self.steps, 0.0])

    @property
    def run(self) -> RateSetting:
        """The setting to simulate; it has gamma = 0 for EM, which does not depend on gamma."""
        return replace(self, gamma=0.0) if self.method == "em" else self

    @property
    def key(self) -> tuple[int, ...]:
        """Seeds of its coins, independent of the other settings that are run."""
        method = (*METHODS, _OVER_BASE).index(self.method)
        return method, round(1000 * self.gamma), self.levels, round(1000 * self.fires)


def predicted_exponent(method: str, gamma: float) -> float:
    """The exponent of cost against error as the error goes to 0; at gamma = 2 without the factor log^2 of ML-EM.

    Below 2, ML-EM is better than Monte Carlo's -2 because it always evaluates the first level (p_1 = 1, 1/h times). The
    jump process has -2, since all its levels are random."""
    if method == "em":
        return -(gamma + 1)
    return -max(gamma, 2.0) if method == "poisson" else -max(gamma, 1 + gamma / 2)


def measure(item: tuple[str, int, Sequence[RateSetting]], paths: int, levels: int, grid: int) -> Measured:
    """The `squared_errors` of settings on the `paths` replicates of one seed; item: dynamics, seed, settings."""
    dynamics, seed, settings = item
    return squared_errors(draw((seed,), paths, levels, grid, NOISE[dynamics]), settings)


def squared_errors(replicates: Replicates, settings: Sequence[RateSetting]) -> Measured:
    """The squared error [P] of each setting on each replicate, averaged over components."""
    found = {}
    for n in {s.steps for s in settings}:
        group = [s for s in settings if s.steps == n]
        if n:
            end = euler(replicates, n, [((1.0, *s.p), s.key) for s in group])
        else:
            end = jump_process(replicates, [(s.rates, s.key) for s in group])
        found.update(zip(group, ((end - replicates.end) ** 2).mean(axis=1), strict=True))
    return found


def candidates(method: str, gamma: float, grid: int, top: int) -> list[RateSetting]:
    """A method's settings over steps (2^j and 3 2^j from 4 up that divide the grid of the path), levels and fires."""
    both = {factor * 2**j for factor in (1, 3) for j in range(31)}
    steps = [0] if method == "poisson" else sorted(n for n in both if n >= 4 and grid % n == 0)
    levels, fires = range(2 if method == "ml_em" else 1, top + 1), [0.0] if method == "em" else _FIRES
    return [RateSetting(method, gamma, k, n, f) for n in steps for k in levels for f in fires]


def pilot_settings(grid: int, top: int, events: float) -> list[RateSetting]:
    """The settings that measure EM's frontier (they come first) and the constants of the error model."""
    ml_em = [RateSetting("ml_em", 2.5, k, 4 * 2**k, f) for k in range(3, 11) for f in (4.0, 16.0)]
    jumps = [s for s in candidates("poisson", 2.5, grid, 6) if s.fires in (2.0, 8.0) and s.rates.sum() <= events / 4]
    return [*candidates("em", 1.0, grid, top), *ml_em, *jumps]


def step_size_settings() -> tuple[list[RateSetting], dict[str, list[RateSetting]]]:
    """The settings of the step-size study at gamma = 2.5: jump processes, and curves over n = 64, 128, ..., 4096.

    EM with a fine level, ML-EM with expected fires that do not depend on n, and ML-EM over f^0 with a random level 1
    and the rates of the jump processes."""
    counts = [2**j for j in range(6, 13)]
    curves = {"EM, level 12": [RateSetting("em", 2.5, 12, n) for n in counts]}
    for method, name, levels in (("ml_em", "ML-EM", (4, 6, 8)), (_OVER_BASE, "ML-EM over the base", (4, 5))):
        curves |= {f"{name}, {k} levels": [RateSetting(method, 2.5, k, n, 4.0) for n in counts] for k in levels}
    return [RateSetting("poisson", 2.5, k, 0, 4.0) for k in (4, 5)], curves


def calibrate(settings: Sequence[RateSetting], mse: np.ndarray) -> np.ndarray:
    """The constants [4] >= 0 of the error model that fit mean squared errors [S], by relative residuals."""
    fine = np.array([s.steps == 0 or s.steps >= 16 for s in settings])  # the model is asymptotic
    rows = np.array([s.features for s in settings])[fine] / mse[fine, None]
    return nnls(rows, np.ones(len(rows)))[0]


def model_errors(settings: Sequence[RateSetting], constants: np.ndarray) -> np.ndarray:
    """The RMS errors [S] that the error model predicts."""
    return np.sqrt(np.array([s.features for s in settings]) @ constants)


def target_errors(coarsest: float, finest: float, per_octave: int) -> np.ndarray:
    """Errors from coarsest down to finest, evenly spaced in the logarithm."""
    return np.geomspace(coarsest, finest, max(2, 1 + round(per_octave * np.log2(coarsest / finest))))


def cheapest(settings: Sequence[RateSetting], errors: np.ndarray, targets: np.ndarray) -> list[RateSetting]:
    """For each target the cheapest setting with an error [S] of at most the target, if there is one; each once."""
    costs = np.array([s.cost for s in settings])
    able = [np.flatnonzero(errors <= target) for target in targets]
    return list(dict.fromkeys(settings[i[np.argmin(costs[i])]] for i in able if len(i)))


def choose(r: Any, mse: np.ndarray, constants: np.ndarray) -> dict[tuple[float, str], list[RateSetting]]:
    """The settings to measure by gamma and method, given the mean squared errors [S] of the pilot settings."""
    chosen = {}
    for gamma, method in product(r.gammas, METHODS):
        options = candidates(method, gamma, r.grid, r.levels)
        targets = target_errors(r.targets.coarsest, r.targets.finest, r.targets.per_octave)
        if method == "poisson":
            options = [s for s in options if s.rates.sum() <= r.poisson.events]
            finest = model_errors(options, constants).min()
            targets = target_errors(r.poisson.coarsest, finest, r.poisson.per_octave) * (1 + 1e-9)
        errors = np.sqrt(mse[: len(options)]) if method == "em" else model_errors(options, constants)
        chosen[gamma, method] = cheapest(options, errors, targets)
    if min(len(settings) for settings in chosen.values()) < MIN_POINTS:
        raise UserError(f"A fit needs {MIN_POINTS} settings: widen rates.targets or rates.poisson.")
    return chosen
