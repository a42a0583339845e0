"""Exponents of cost against error with intervals, compared with the claimed ones: the content of rates.json."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from .. import parallel
from ..errors import UserError
from . import settings as rates
from .settings import Measured, RateSetting

Item = tuple[str, int, list[RateSetting]]  # dynamics, seed, settings
Bar = Callable[[str, int, str], AbstractContextManager[Any]]


def verify(r: Any, workers: int, bar: Bar, should_stop: Callable[[], bool]) -> tuple[dict[str, Any], pd.DataFrame]:
    """The content of rates.json and of rates.csv for the settings r (configs: rates): choose settings on some seeds,
    simulate them on others, fit. bar(label, total, unit) is a context whose value is called with (done, total)."""
    if set(r.choose_seeds) & set(r.judge_seeds) or not (len(r.choose_seeds) and len(r.judge_seeds)):
        raise UserError("rates needs choose_seeds and judge_seeds, with no seed in common.")
    if not {"sde", "ode"}.issuperset(r.dynamics) or min(r.gammas, default=0) <= 0:
        raise UserError("rates needs dynamics of sde and ode, and gammas above 0.")
    if r.paths < 2 or r.levels < 12 or r.poisson.seeds < 1 or r.grid % 4096:
        raise UserError("rates needs at least 2 paths, 12 levels, 1 poisson.seeds, and a multiple of 4096 as grid.")
    run = partial(simulate, r, workers=workers, bar=bar, should_stop=should_stop)
    pilot = rates.pilot_settings(r.grid, r.levels, r.poisson.events)
    piloted = run("choosing", [item for d in r.dynamics for item in _items(d, r.choose_seeds, pilot)])
    jumps, curves = rates.step_size_settings()
    studied = [*jumps, *(s for curve in curves.values() for s in curve)]
    judge, items, constants, chosen = sorted(r.judge_seeds), [], {}, {}
    for d in r.dynamics:
        mse = np.array([piloted[d][s.run].mean() for s in pilot])
        constants[d] = rates.calibrate(pilot, mse)
        chosen[d] = rates.choose(r, mse, constants[d])
        settings = [s for found in chosen[d].values() for s in found]
        items += _items(d, judge, [*(s for s in settings if s.steps), *studied])
        items += _items(d, judge[: r.poisson.seeds], [s for s in settings if not s.steps and s not in jumps])
    squared = run("measuring", items)
    result: dict[str, Any] = {d: {f"{gamma:g}": {} for gamma in r.gammas} for d in r.dynamics}
    result["step_size"], points = {}, []
    for d in r.dynamics:
        for (gamma, method), settings in chosen[d].items():
            result[d][f"{gamma:g}"][method] = exponent_entry(settings, squared[d], constants[d], r.bootstrap)
            points += [{"dynamics": d, **_point(s, squared[d])} for s in settings]
        result["step_size"][d] = {
            "curves": {name: {"rows": [_point(s, squared[d]) for s in curve]} for name, curve in curves.items()},
            "agreement": [{"levels": s.levels, "poisson": _point(s, squared[d])} for s in jumps],
        }
    return result, pd.DataFrame(points)


def _items(dynamics: str, seeds: Sequence[int], settings: Sequence[RateSetting]) -> list[Item]:
    """Parts of similar effort for the workers: many steps, jump processes, few steps."""
    parts: list[list[RateSetting]] = [[], [], []]
    for s in dict.fromkeys(s.run for s in settings):
        parts[0 if s.steps > 4096 else 1 if s.steps == 0 else 2].append(s)
    return [(dynamics, seed, part) for part in parts if part for seed in seeds]


def simulate(
    r: Any, label: str, items: Sequence[Item], workers: int, bar: Bar, should_stop: Callable[[], bool]
) -> dict[str, Measured]:
    """Run the items side by side: squared errors by dynamics, replicates in the order of the items."""
    function, results = partial(rates.measure, paths=r.paths, levels=r.levels, grid=r.grid), {}
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

    The interval is a percentile bootstrap. Each draw resamples the replicates (by column, since all points share their
    families and paths) and the points. It covers sampling noise and the unevenness of a frontier over integer levels,
    but not the bias of a finite range against the limit of small errors."""
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
    return {
        "exponent": found,
        "interval": np.quantile(slopes, [0.025, 0.975]).tolist(),
        "error_range": [float(errors.min()), float(errors.max())],
        "log_cost_at_one": intercept,
    }


def exponent_entry(
    settings: Sequence[RateSetting], squared: Measured, constants: np.ndarray, draws: int
) -> dict[str, Any]:
    """The rates.json entry of one method at one gamma, over the replicates common to all its settings: the measured
    exponent, the predicted limit, and the exponent that the error model expects in this finite range of errors."""
    costs = np.array([s.cost for s in settings])
    count = min(len(squared[s.run]) for s in settings)
    entry = fit_exponent(costs, np.array([squared[s.run][:count] for s in settings]), draws)
    entry["predicted"] = rates.predicted_exponent(settings[0].method, settings[0].gamma)
    entry["expected_in_range"] = slope(rates.model_errors(settings, constants), costs)[0]
    return entry


def _point(s: RateSetting, squared: Measured) -> dict[str, Any]:
    """RMS error with its standard error, and cost."""
    own = squared[s.run]
    error = float(np.sqrt(own.mean()))
    se = float(own.std(ddof=1) / np.sqrt(len(own)) / (2 * error))
    setting = {"gamma": s.gamma, "method": s.method, "levels": s.levels, "steps": s.steps, "top_fires": s.fires}
    return {**setting, "error": error, "error_se": se, "cost": s.cost}


def summary(result: Mapping[str, Any]) -> str:
    """The exponents of rates.json, measured, predicted in the limit, and expected in the range, as lines of text."""
    lines = []
    for d in result["step_size"]:
        for gamma, entries in result[d].items():
            for method, e in entries.items():
                low, high = e["interval"]
                text = f"{d}, gamma {gamma}, {method}: exponent {e['exponent']:.2f} [{low:.2f}, {high:.2f}]"
                lines.append(f"{text}, limit {e['predicted']:.2f}, model {e['expected_in_range']:.2f}")
    return "\n".join(lines)
