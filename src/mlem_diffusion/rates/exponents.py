"""Exponents of cost against error on the problem in problem.py, compared with the claimed ones: rates.json.
The error is sqrt(E |X(1) - exact|^2 / d), the RMS error to the solution with the *true* drift on the same Brownian
path. The cost is expected, in units of T_0 = 1: an evaluation of level k costs T_k = 2^(gamma k). It is counted, not
timed, because all levels are equally cheap to simulate. Settings are chosen on other replicates than measured: EM by
its measured frontier, the others by an error model, squared error = features @ constants."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from .. import parallel
from ..errors import UserError
from ..multilevel.estimators import evaluation_probabilities
from .problem import NOISE, Replicates, draw, euler, jump_process

METHODS = ("em", "ml_em", "poisson")
_FIRES = [round(2 ** (j / 2), 3) for j in range(-2, 15)]  # expected fires of the top level: 1/2, 0.7, 1, ... 128
MIN_POINTS = 4  # fewest points in the fit of an exponent
Measured = dict["RateSetting", np.ndarray]  # squared errors [replicates] by setting
Item = tuple[str, int, list["RateSetting"]]  # dynamics, seed, settings
Bar = Callable[[str, int, str], AbstractContextManager[Any]]
Stop = Callable[[], bool]


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
        return np.concatenate([[1.0], p[1:]])

    @cached_property
    def cost(self) -> float:
        """Expected cost: networks with nonzero weight are evaluated; an event of level k evaluates k and k - 1."""
        t = self.level_costs
        if self.method == "poisson":
            return float(self.rates @ (t + np.concatenate([[0.0], t[:-1]])))
        return float(self.steps * evaluation_probabilities(self.p[None])[0] @ t)

    @cached_property
    def features(self) -> np.ndarray:
        """Terms [4] of the squared error: 1 / n^2, the top level's 4^-K, the coins' variance of levels >= 2, of 1."""
        k = np.arange(2, self.levels + 1)
        size = 4.0**-k + 4.0 ** -(k - 1)  # E |f^k - f^{k-1}|^2 for independent errors 2^-k and 2^-(k-1)
        if self.method == "poisson":
            return np.array([0.0, 4.0**-self.levels, size @ (1 / self.rates[1:]), 1 / self.rates[0]])
        return np.array([self.steps**-2.0, 4.0**-self.levels, size @ (1 / self.p[1:] - 1) / self.steps, 0.0])

    @property
    def run(self) -> "RateSetting":
        """The setting to simulate; it has gamma = 0 for EM, which does not depend on gamma."""
        return replace(self, gamma=0.0) if self.method == "em" else self

    @property
    def key(self) -> tuple[int, ...]:
        """Seeds of its coins, independent of the other settings that are run."""
        return METHODS.index(self.method), round(1000 * self.gamma), self.levels, round(1000 * self.fires)


def predicted_exponent(method: str, gamma: float) -> float:
    """The exponent of cost against error as the error goes to 0; at gamma = 2 without the factor log^2 of ML-EM.
    Below 2, ML-EM is better than Monte Carlo's -2, since it always evaluates level 1; the jump process does not."""
    return -{"em": gamma + 1, "ml_em": max(gamma, 1 + gamma / 2), "poisson": max(gamma, 2.0)}[method]


def measure(item: Item, paths: int, levels: int, grid: int) -> Measured:
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


def step_size_curves() -> dict[str, list[RateSetting]]:
    """Curves over n = 64, ..., 4096 at gamma = 2.5: EM with a fine level, ML-EM with fires that do not depend on n."""
    counts = [2**j for j in range(6, 13)]
    curves = {f"ML-EM, {k} levels": [RateSetting("ml_em", 2.5, k, n, 4.0) for n in counts] for k in (4, 6, 8)}
    return {"EM, level 12": [RateSetting("em", 2.5, 12, n) for n in counts]} | curves


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


def verify(r: Any, workers: int, bar: Bar, should_stop: Stop) -> tuple[dict[str, Any], pd.DataFrame]:
    """The content of rates.json and of rates.csv for the settings r (configs: rates): choose settings on some seeds,
    simulate them on others, fit. bar(label, total, unit) is a context whose value is called with (done, total)."""
    if set(r.choose_seeds) & set(r.judge_seeds) or not (len(r.choose_seeds) and len(r.judge_seeds)):
        raise UserError("rates needs choose_seeds and judge_seeds, with no seed in common.")
    if r.paths < 2 or r.levels < 12 or r.grid % 4096:
        raise UserError("rates needs at least 2 paths, 12 levels, and a multiple of 4096 as grid.")
    run = partial(simulate, r, workers=workers, bar=bar, should_stop=should_stop)
    pilot = pilot_settings(r.grid, r.levels, r.poisson.events)
    piloted = run("choosing", [item for d in r.dynamics for item in _items(d, r.choose_seeds, pilot)])
    curves = step_size_curves()
    studied = [s for curve in curves.values() for s in curve]
    judge, items, constants, chosen = sorted(r.judge_seeds), [], {}, {}
    for d in r.dynamics:
        mse = np.array([piloted[d][s.run].mean() for s in pilot])
        constants[d] = calibrate(pilot, mse)
        chosen[d] = choose(r, mse, constants[d])
        settings = [s for found in chosen[d].values() for s in found]
        items += _items(d, judge, [*(s for s in settings if s.steps), *studied])
        items += _items(d, judge[: r.poisson.seeds], [s for s in settings if not s.steps])
    squared = run("measuring", items)
    result: dict[str, Any] = {d: {f"{gamma:g}": {} for gamma in r.gammas} for d in r.dynamics}
    result["step_size"], points = {}, []
    for d in r.dynamics:
        for (gamma, method), settings in chosen[d].items():
            result[d][f"{gamma:g}"][method] = exponent_entry(settings, squared[d], constants[d], r.bootstrap)
            points += [{"dynamics": d, **_point(s, squared[d])} for s in settings]
        rows = {name: {"rows": [_point(s, squared[d]) for s in curve]} for name, curve in curves.items()}
        result["step_size"][d] = {"curves": rows}
    return result, pd.DataFrame(points)


def _items(dynamics: str, seeds: Sequence[int], settings: Sequence[RateSetting]) -> list[Item]:
    """Parts of similar effort for the workers: many steps, jump processes, few steps."""
    parts: list[list[RateSetting]] = [[], [], []]
    for s in dict.fromkeys(s.run for s in settings):
        parts[0 if s.steps > 4096 else 1 if s.steps == 0 else 2].append(s)
    return [(dynamics, seed, part) for part in parts if part for seed in seeds]


def simulate(r: Any, label: str, items: list[Item], workers: int, bar: Bar, should_stop: Stop) -> dict[str, Measured]:
    """Run the items side by side: squared errors by dynamics, replicates in the order of the items."""
    function, results = partial(measure, paths=r.paths, levels=r.levels, grid=r.grid), {}
    with bar(label, len(items), "part") as progress:
        for index, measured in parallel.run(function, items, min(workers, len(items)), should_stop):
            results[index] = measured
            progress(len(results), len(items))
    found: dict[str, Measured] = {d: {} for d in r.dynamics}
    for index, (dynamics, _, _) in enumerate(items):
        for setting, squared in results[index].items():
            found[dynamics][setting] = np.append(found[dynamics].get(setting, []), squared)
    return found


def slope(errors: np.ndarray, costs: np.ndarray) -> tuple[float, float]:
    """The least-squares slope and intercept of log cost [points] on log error [points]."""
    x, y = np.log(errors), np.log(costs)
    centred = x - x.mean()
    found = float(centred @ y / (centred @ centred))
    return found, float(y.mean() - found * x.mean())


def fit_exponent(costs: np.ndarray, squared: np.ndarray, draws: int) -> dict[str, Any]:
    """Slope of log cost [points] against log error, from squared errors [points, replicates] of fresh replicates.
    The interval is a percentile bootstrap over replicates (by column, since all points share their families and paths)
    and points. It does not cover the bias of a finite range against the limit of small errors."""
    rng = np.random.default_rng(0)
    errors = np.sqrt(squared.mean(axis=1))
    found, intercept = slope(errors, costs)
    count, slopes = squared.shape[1], []
    while len(slopes) < draws:
        points = rng.integers(0, len(costs), len(costs))
        if len(np.unique(points)) < 3:
            continue
        weights = np.bincount(rng.integers(0, count, count), minlength=count) / count
        slopes.append(slope(np.sqrt(squared[points] @ weights), costs[points])[0])
    interval, ends = np.quantile(slopes, [0.025, 0.975]).tolist(), [float(errors.min()), float(errors.max())]
    return {"exponent": found, "interval": interval, "error_range": ends, "log_cost_at_one": intercept}


def exponent_entry(settings: list[RateSetting], squared: Measured, constants: np.ndarray, draws: int) -> dict[str, Any]:
    """The rates.json entry of one method at one gamma, over the replicates common to all its settings: the measured
    exponent, the predicted limit, and the exponent that the error model expects in this finite range of errors."""
    costs = np.array([s.cost for s in settings])
    count = min(len(squared[s.run]) for s in settings)
    entry = fit_exponent(costs, np.array([squared[s.run][:count] for s in settings]), draws)
    entry["predicted"] = predicted_exponent(settings[0].method, settings[0].gamma)
    entry["expected_in_range"] = slope(model_errors(settings, constants), costs)[0]
    return entry


def _point(s: RateSetting, squared: Measured) -> dict[str, Any]:
    """RMS error with its standard error, and cost."""
    own, error = squared[s.run], float(np.sqrt(squared[s.run].mean()))
    se = float(own.std(ddof=1) / np.sqrt(len(own)) / (2 * error))
    setting = {"gamma": s.gamma, "method": s.method, "levels": s.levels, "steps": s.steps, "top_fires": s.fires}
    return {**setting, "error": error, "error_se": se, "cost": s.cost}


def summary(result: Mapping[str, Any]) -> str:
    """The exponents of rates.json, measured, predicted in the limit, and expected in the range, as lines of text."""
    text = "{0}, gamma {1}, {2}: exponent {exponent:.2f} [{interval[0]:.2f}, {interval[1]:.2f}], "
    text += "limit {predicted:.2f}, model {expected_in_range:.2f}"
    by_gamma = [(d, gamma, entries) for d in result["step_size"] for gamma, entries in result[d].items()]
    return "\n".join(text.format(d, gamma, method, **e) for d, gamma, own in by_gamma for method, e in own.items())
