"""The whole verification: choose settings on some seeds, simulate them on others, fit and compare the exponents."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from .. import parallel
from ..errors import UserError
from . import settings as rates
from .exponents import MIN_POINTS, bars, exponent_entry, point, step_size_entry, towards_limit
from .settings import Measured, RateSetting

Bar = Callable[[str, int, str], AbstractContextManager[Any]]
Choice = dict[tuple[float, str], list[RateSetting]]  # settings by gamma and method
Work = tuple[str, Sequence[int], Sequence[RateSetting]]  # dynamics, seeds, settings


def verify(
    r: Any,
    workers: int | None = None,
    bar: Bar = lambda *_: nullcontext(lambda *_: None),
    should_stop: Callable[[], bool] = parallel.never,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """The content of rates.json and of rates.csv for the settings r (configs: rates).

    workers: processes, by default one per core. bar(label, total, unit) is a context whose value is called with
    (done, total)."""
    check(r)
    run = partial(simulate, r, workers=workers or os.cpu_count() or 1, bar=bar, should_stop=should_stop)
    pilot = rates.pilot_settings(r.grid, r.levels, r.poisson.events)
    piloted = run("choosing", [(d, r.choose_seeds, pilot) for d in r.dynamics])
    constants, chosen = {}, {}
    for d in r.dynamics:
        mse = np.array([piloted[d][s.run].mean() for s in pilot])
        constants[d] = rates.calibrate(pilot, mse)
        chosen[d] = choose(r, pilot, mse, constants[d])
    jumps, curves = rates.limit_settings(r.grid)
    studied = [*jumps, *(s for curve in curves.values() for s in curve)]
    judge, work = sorted(r.judge_seeds), []
    for d in r.dynamics:
        settings = [s for found in chosen[d].values() for s in found]
        work.append((d, judge, [*(s for s in settings if s.steps), *studied]))
        work.append((d, judge[: r.poisson.seeds], [s for s in settings if not s.steps and s not in jumps]))
    squared = run("measuring", work)
    rows = [point(s, squared[d], d) for d in r.dynamics for found in chosen[d].values() for s in found]
    return summarise(r, chosen, constants, squared, jumps, curves), pd.DataFrame(rows)


def check(r: Any) -> None:
    """UserError for settings that cannot be run."""
    if set(r.choose_seeds) & set(r.judge_seeds):
        raise UserError("rates.choose_seeds and rates.judge_seeds must have no seed in common.")
    if not (len(r.choose_seeds) and len(r.judge_seeds)):
        raise UserError("rates needs at least one seed to choose and one to judge on.")
    if not 0 < len(r.dynamics) == len({"sde", "ode"} & set(r.dynamics)) or min(r.gammas, default=0) <= 0:
        raise UserError("rates needs dynamics of sde and ode, and gammas above 0.")
    if r.paths < 2 or r.levels < 12 or r.poisson.seeds < 1 or r.grid % 4096:
        raise UserError("rates needs at least 2 paths, 12 levels, 1 poisson.seeds, and a multiple of 4096 as grid.")


def simulate(
    r: Any, label: str, work: Sequence[Work], workers: int, bar: Bar, should_stop: Callable[[], bool]
) -> dict[str, Measured]:
    """Run the work in parts, side by side: squared errors by dynamics, replicates in the order of the seeds."""
    items = []
    for dynamics, seeds, settings in work:
        unique = list(dict.fromkeys(s.run for s in settings))
        parts = [[s for s in unique if s.steps > 4096], [s for s in unique if s.steps == 0]]
        parts.append([s for s in unique if 0 < s.steps <= 4096])
        items += [(dynamics, seed, part) for part in parts if part for seed in seeds]
    function = partial(rates.measure, paths=r.paths, levels=r.levels, grid=r.grid)
    efforts, results = [sum(_effort(s) for s in part) for _, _, part in items], {}
    with bar(label, sum(efforts), "step") as progress:
        for index, measured in parallel.run(function, items, min(workers, len(items)), should_stop):
            results[index] = measured
            progress(sum(efforts[i] for i in results), sum(efforts))
    by_seed: dict[str, dict[RateSetting, list[np.ndarray]]] = {}
    for index in sorted(results, key=lambda i: items[i][1]):
        for setting, squared in results[index].items():
            by_seed.setdefault(items[index][0], {}).setdefault(setting, []).append(squared)
    return {d: {s: np.concatenate(parts) for s, parts in found.items()} for d, found in by_seed.items()}


def _effort(setting: RateSetting) -> int:
    """Rough effort of a run, in EM steps on one replicate: an event counts as five, an ML-EM step as three."""
    if setting.method == "poisson":
        return int(5 * setting.rates.sum())
    return setting.steps * (1 if setting.method == "em" else 3)


def choose(r: Any, pilot: Sequence[RateSetting], mse: np.ndarray, constants: np.ndarray) -> Choice:
    """The settings to measure: EM by the pilot's mean squared errors [S], the others by the error model."""
    em = [i for i, s in enumerate(pilot) if s.method == "em"]
    targets = rates.target_errors(r.targets.coarsest, r.targets.finest, r.targets.per_octave)
    chosen = {}
    for gamma in r.gammas:
        own = [replace(pilot[i], gamma=gamma) for i in em]
        chosen[gamma, "em"] = rates.cheapest(own, np.sqrt(mse[em]), targets)
        options = rates.ml_em_settings(gamma, r.grid, r.levels)
        chosen[gamma, "ml_em"] = rates.cheapest(options, rates.model_errors(options, constants), targets)
        options = rates.poisson_settings(gamma, r.levels, r.poisson.events)
        errors = rates.model_errors(options, constants)
        reached = rates.target_errors(r.poisson.coarsest, errors.min(), r.poisson.per_octave)
        chosen[gamma, "poisson"] = rates.cheapest(options, errors, reached * (1 + 1e-9))
    for (gamma, method), settings in chosen.items():
        if len(settings) < MIN_POINTS:
            found = f"gamma = {gamma:g}, {method}: only {len(settings)} settings to fit"
            raise UserError(f"{found}; widen rates.targets or rates.poisson.")
    return chosen


def summarise(
    r: Any,
    chosen: Mapping[str, Choice],
    constants: Mapping[str, np.ndarray],
    squared: Mapping[str, Measured],
    jumps: Sequence[RateSetting],
    curves: Mapping[str, Sequence[RateSetting]],
) -> dict[str, Any]:
    """The content of rates.json."""
    result: dict[str, Any] = {d: {f"{gamma:g}": {} for gamma in r.gammas} for d in r.dynamics}
    for d in r.dynamics:
        for (gamma, method), settings in chosen[d].items():
            result[d][f"{gamma:g}"][method] = exponent_entry(settings, squared[d], constants[d], r.bootstrap)
    terms = ("1/n^2", "4^-K", "coins", "coins_level_1")
    return result | {
        "step_size": {d: step_size_entry(curves, jumps, squared[d]) for d in r.dynamics},
        "bars": {d: {g: bars(e) for g, e in result[d].items() if float(g) > 2} for d in r.dynamics},
        "model": {d: dict(zip(terms, constants[d].tolist(), strict=True)) for d in r.dynamics},
        "towards_limit": {d: {f"{g:g}": towards_limit(g, constants[d]) for g in r.gammas} for d in r.dynamics},
        "reference_difference": {d: rates.reference_error(d, r.judge_seeds[0], r.paths, r.grid) for d in r.dynamics},
        "interval": "95% percentile bootstrap over replicates and points",
    }


def summary(result: Mapping[str, Any]) -> str:
    """The exponents, the step-size study and the checks of rates.json, as lines of text."""
    lines = []
    for d in result["model"]:
        for gamma, entries in result[d].items():
            for method, e in entries.items():
                low, high = e["interval"]
                text = f"{d}, gamma {gamma}, {method}: exponent {e['exponent']:.2f} [{low:.2f}, {high:.2f}]"
                lines.append(f"{text}, limit {e['predicted']:.2f}, in this range {e['expected_in_range']:.2f}")
        for name, curve in result["step_size"][d]["curves"].items():
            lines.append(f"{d}: {name}: error ~ steps^{curve['order']:.2f}")
        for e in result["step_size"][d]["agreement"]:
            text = f"{d}: jump process / ML-EM with {e['steps']} steps, {e['levels']} levels"
            lines.append(f"{text}: error ratio {e['error_ratio']:.3f}, cost ratio {e['cost_ratio']:.3f}")
        for gamma, checks in result["bars"][d].items():
            missed = [name for name, fine in checks.items() if not fine and name != "met"]
            lines.append(f"{d}: gamma {gamma}: rates as claimed: {'no: ' + ', '.join(missed) if missed else 'yes'}")
    return "\n".join(lines)
