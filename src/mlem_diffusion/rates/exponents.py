"""The content of rates.json: exponents with intervals, the step-size study, and checks of the claimed rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..multilevel.probabilities import evaluation_probabilities
from .settings import Measured, RateSetting, model_errors, predicted_exponent

TOLERANCE = 0.35  # largest deviation of an exponent from its prediction
GAP = 0.5  # smallest difference between the exponents of EM and ML-EM
DECADES = 2.0  # fewest decades of error in both fits
AGREEMENT = 0.1  # largest relative difference between the jump process and ML-EM with a small step
MIN_POINTS = 4  # fewest points in a fit


def slope(errors: np.ndarray, costs: np.ndarray) -> tuple[float, float]:
    """The least-squares slope and intercept of log cost [points] on log error [points]."""
    x, y = np.log(errors), np.log(costs)
    centred = x - x.mean()
    found = float(centred @ y / (centred @ centred))
    return found, float(y.mean() - found * x.mean())


def fit_exponent(costs: np.ndarray, squared: np.ndarray, draws: int, seed: int) -> dict[str, Any]:
    """Slope of log cost [points] against log error, from squared errors [points, replicates] of fresh replicates.

    The interval is a percentile bootstrap. Each draw resamples the replicates (by column, since all points share their
    families and paths) and the points. It covers sampling noise and the unevenness of a frontier over integer levels,
    but not the bias of a finite range against the limit of small errors."""
    if len(costs) < MIN_POINTS:
        raise UserError(f"An exponent needs at least {MIN_POINTS} points; widen the range of target errors.")
    rng = np.random.default_rng(seed)
    errors = np.sqrt(squared.mean(axis=1))
    found, intercept = slope(errors, costs)
    count, slopes = squared.shape[1], []
    while len(slopes) < draws:
        points = rng.integers(0, len(costs), len(costs))
        if len(np.unique(points)) < 3:
            continue
        weights = np.bincount(rng.integers(0, count, count), minlength=count) / count
        slopes.append(slope(np.sqrt(squared[points] @ weights), costs[points])[0])
    order, middle = np.argsort(-errors), len(errors) // 2
    coarse, fine = order[: middle + 1], order[middle - 1 :]
    return {
        "exponent": found,
        "interval": np.quantile(slopes, [0.025, 0.975]).tolist(),
        "decades": float(np.log10(errors.max() / errors.min())),
        "error_range": [float(errors.min()), float(errors.max())],
        "coarse_half": slope(errors[coarse], costs[coarse])[0],
        "fine_half": slope(errors[fine], costs[fine])[0],
        "log_cost_at_one": intercept,
        "points": len(costs),
        "replicates": count,
    }


def exponent_entry(
    settings: Sequence[RateSetting], squared: Measured, constants: np.ndarray, draws: int, seed: int = 0
) -> dict[str, Any]:
    """The rates.json entry of one method at one gamma, over the replicates common to all its settings: the measured
    exponent, the predicted limit, and the exponent that the error model expects in this finite range of errors."""
    method, gamma = settings[0].method, settings[0].gamma
    costs = np.array([s.cost for s in settings])
    count = min(len(squared[s.run]) for s in settings)
    errors = np.array([squared[s.run][:count] for s in settings])
    entry = fit_exponent(costs, errors, draws, seed)
    entry["predicted"] = predicted_exponent(method, gamma)
    entry["expected_in_range"] = slope(model_errors(settings, constants), costs)[0]
    if gamma == 2 and method != "em":  # cost ~ error^-2 log^2 error, fitted by a line over the same errors
        found = np.sqrt(errors.mean(axis=1))
        entry["predicted_with_log"] = slope(found, (np.log(found) / found) ** 2)[0]
    return entry


def towards_limit(gamma: float, constants: np.ndarray) -> list[dict[str, Any]]:
    """The exponents of ML-EM that the error model expects over seven octaves of error each, down to 2^-25.

    They show how far the simulations are from the limit. Steps, top levels and fires are on fine grids."""
    out = []
    for coarsest in (-4, -11, -18):
        octaves = np.arange(coarsest, coarsest - 7.1, -0.5)
        costs = np.array([_least_cost(gamma, constants, octave) for octave in octaves])
        found = slope(2.0**octaves, costs)[0]
        out.append({"error_range": [2.0 ** octaves[-1], 2.0 ** octaves[0]], "exponent": found})
    return out


def _least_cost(gamma: float, constants: np.ndarray, octave: float) -> float:
    """The least expected cost of ML-EM with an error of at most 2^octave in the error model."""
    best, fires = np.inf, 2.0 ** np.arange(-2, 12, 0.5)
    for n in 2.0 ** np.arange(-octave + 1, -octave + 6, 0.5):
        for top in range(max(2, int(-octave) - 1), int(-octave) + 6):
            k = np.arange(1, top + 1)
            p = np.minimum(1, fires[:, None] * 2.0 ** ((1 + gamma / 2) * (top - k)) / n)
            p[:, 0] = 1
            coins = (1 / p[:, 1:] - 1) @ (5 * 4.0 ** -k[1:]) / n
            squared = constants[0] / n**2 + constants[1] * 4.0**-top + constants[2] * coins
            cost = n * (evaluation_probabilities(p) @ 2.0 ** (gamma * k))
            best = min(best, np.min(cost, where=squared <= 4.0**octave, initial=np.inf))
    return best


def bars(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Check at one gamma > 2 that EM and ML-EM have the claimed exponents, over enough decades and with a large gap."""
    em, ml_em = entries["em"], entries["ml_em"]
    checks = {
        "em": abs(em["exponent"] - em["predicted"]) <= TOLERANCE,
        "ml_em": abs(ml_em["exponent"] - ml_em["predicted"]) <= TOLERANCE,
        "gap": ml_em["exponent"] - em["exponent"] >= GAP,
        "decades": min(em["decades"], ml_em["decades"]) >= DECADES,
    }
    return {**checks, "met": all(checks.values())}


def step_size_entry(
    curves: Mapping[str, Sequence[RateSetting]], jumps: Sequence[RateSetting], squared: Measured
) -> dict[str, Any]:
    """Error and cost against the number of steps at fixed expected fires, and `agreement` of each jump process.

    `order`, the slope of log error against log n over n >= 1024, is -1 for a method that needs h ~ error."""
    out: dict[str, Any] = {"gamma": 2.5, "curves": {}, "agreement": []}
    for name, settings in curves.items():
        rows = [_row(s, squared) for s in settings]
        fine = [(r["steps"], r["error"]) for r in rows if r["steps"] >= 1024] or [
            (r["steps"], r["error"]) for r in rows
        ]
        out["curves"][name] = {"order": slope(*np.array(fine, float).T)[0], "rows": rows}
    for jump in jumps:
        near = next(s for n, c in curves.items() for s in c[-1:] if "base" in n and s.levels == jump.levels)
        out["agreement"].append(agreement(jump, near, squared))
    return out


def agreement(jump: RateSetting, near: RateSetting, squared: Measured) -> dict[str, Any]:
    """The ratios of RMS error, with 95% interval, and of cost: jump process / ML-EM over f^0, smallest step."""
    count = min(len(squared[jump.run]), len(squared[near.run]))
    first, second = squared[jump.run][:count], squared[near.run][:count]
    ratio = float(np.sqrt(first.mean() / second.mean()))
    # delta method for half the logarithm of a ratio of means over the same replicates
    se = float(np.std(first / first.mean() - second / second.mean(), ddof=1) / np.sqrt(count) / 2)
    return {
        "levels": jump.levels,
        "steps": near.steps,
        "poisson": _row(jump, squared),
        "ml_em": _row(near, squared),
        "error_ratio": ratio,
        "interval": [ratio * float(np.exp(-1.96 * se)), ratio * float(np.exp(1.96 * se))],
        "cost_ratio": jump.cost / near.cost,
        "within_tolerance": abs(ratio - 1) <= AGREEMENT and abs(jump.cost / near.cost - 1) <= AGREEMENT,
    }


def _row(setting: RateSetting, squared: Measured) -> dict[str, Any]:
    error, se = rms(squared[setting.run])
    return {"steps": setting.steps, "error": error, "error_se": se, "cost": setting.cost}


def rms(squared: np.ndarray) -> tuple[float, float]:
    """The RMS error and its standard error from squared errors [replicates], at least two."""
    error = float(np.sqrt(squared.mean()))
    return error, float(squared.std(ddof=1) / np.sqrt(len(squared)) / (2 * error))


def point(setting: RateSetting, squared: Measured, dynamics: str) -> dict[str, Any]:
    """One line of rates.csv."""
    error, se = rms(squared[setting.run])
    return {
        "dynamics": dynamics,
        "gamma": setting.gamma,
        "method": setting.method,
        "levels": setting.levels,
        "steps": setting.steps or None,
        "c": setting.c,
        "top_fires": setting.fires if setting.method != "em" else None,
        "error": error,
        "error_se": se,
        "cost": setting.cost,
        "replicates": len(squared[setting.run]),
    }
