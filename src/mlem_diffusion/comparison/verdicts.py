"""Verdicts on the optimiser's plans: speed-ups by method, blind choices, and predicted against measured errors."""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from .settings import Measurement, Row
from .speedup import Group, equal_error, errors_of
from .table import BASELINES, MIN_FIRES

FIRST_ORDER = ("em", "ddpm", "ddim")
TOLERANCE = 0.25  # relative: measured squared errors this close to the prediction agree with it


def verdicts(
    settings: Sequence[Measurement], calibration_flops: float, seed: int = 0, unit: str = "flops"
) -> dict[str, Any]:
    """{"dynamics/rule": entry} for each dynamics and step rule for which an optimiser's plans were run.

    An entry compares each method ("<coins>, <probabilities> p", "quadrature", and "any" of them) with the first-order
    baselines of the same dynamics and with all of them, and judges the optimiser's foresight. Speed-ups are at equal
    squared error, in expected FLOPs, or in measured seconds if the plans were made for seconds (`unit`)."""
    cost = {"flops": "gflops_expected", "seconds": "seconds"}[unit]
    out: dict[str, Any] = {}
    for dynamics, rule in dict.fromkeys((m.row["dynamics"], m.row["step_rule"]) for m in settings if m.row.get("plan")):
        here = [m for m in settings if m.row["dynamics"] == dynamics]
        base = [m for m in here if m.row["estimator"] in BASELINES]
        ours = [m for m in here if m.row["estimator"] not in BASELINES and m.row["top_evaluations"] >= MIN_FIRES]
        planned = [m for m in ours if m.row["step_rule"] == rule]
        first_order = [m for m in base if m.row["step_rule"] in FIRST_ORDER]
        entry: dict[str, Any] = {"unit": unit, "against_em": {}, "against_all_baselines": {}}
        for against, theirs in (("against_em", first_order), ("against_all_baselines", base)):
            for name, mine in _by_method(planned).items() if theirs else ():
                found = equal_error(theirs, mine, cost, seed)
                windows = [window(found["curve"], least) for least in (1, 2, 4, 8)]
                found["windows"] = [w for w in windows if w is not None]
                if found["max"] is not None and found["max"] > 1:
                    saved = (found["baseline"]["gflops_realised"] - found["ours"]["gflops_realised"]) * 1e9
                    found["images_to_repay_calibration"] = calibration_flops / saved
                entry[against][name] = found
        entry["optimiser_against_em"] = chosen_blindly([*base, *ours], first_order, cost, seed)
        entry["predicted_error"] = prediction(m.row for m in planned)
        out[f"{dynamics}/{rule}"] = entry
    return out


def _by_method(planned: Sequence[Measurement]) -> dict[str, Sequence[Measurement]]:
    """The settings of each method, and of any."""
    found: dict[str, Any] = {}
    for m in planned:
        name = "{coins}, {probabilities} p".format(**m.row) if m.row["coins"] else m.row["estimator"]
        found.setdefault(name, []).append(m)
    return found | {"any": planned} if planned else {}


def window(curve: Sequence[dict[str, Any]], least: float) -> dict[str, Any] | None:
    """The widest contiguous range of errors in which the lower 95% bound of the speed-up is at least `least`.

    curve: {"at": mean squared error, "lower95"} along the baseline frontier (speedup.py). "factor" is the ratio of the
    root mean squared errors at its ends. None if no point qualifies."""
    runs = [list(run) for holds, run in groupby(curve, lambda point: (point["lower95"] or 0) >= least) if holds]
    ends = [(run[0]["at"], run[-1]["at"]) for run in runs]
    if not ends:
        return None
    high, low = max(reversed(ends), key=lambda pair: pair[0] / pair[1])
    return {"least": least, "factor": math.sqrt(high / low), "rms_error": [math.sqrt(high), math.sqrt(low)]}


def chosen_blindly(
    ours: Sequence[Measurement], theirs: Sequence[Measurement], cost: str = "gflops_expected", seed: int = 0
) -> dict[str, Any]:
    """Whether an optimiser's choices are nowhere above the frontier of `theirs`.

    At the cost of each frontier point, the optimiser chooses within that cost the setting of `ours` with the lowest
    error on the selection seeds ("selected_error" of its row). "ratio" is the squared error of this choice on the
    seeds of the comparison, divided by the point's. It counts as above if the one-sided 95% lower bound exceeds 1."""
    known = [m for m in ours if m.row.get("selected_error") is not None]
    values = errors_of([*known, *theirs], 200, seed)
    base, points = Group.of(theirs, values[len(known) :], cost), []
    for point in base.frontier():
        within = [j for j, m in enumerate(known) if m.row[cost] <= 1.001 * base.costs[point]]
        if within:
            ratios = values[min(within, key=lambda j: known[j].row["selected_error"])] / base.values[point]
            lower = float(np.quantile(ratios[1:], 0.05)) if len(ratios) > 1 else 0.0
            place = {cost.removesuffix("_expected"): float(base.costs[point])}
            points.append({**place, "ratio": float(ratios[0]), "lower95": lower})
    worst = max(points, key=lambda p: p["lower95"], default=None)
    never = None if worst is None else worst["lower95"] <= 1
    return {"never_above": never, "worst": worst, "points": len(points)}


def prediction(rows: Iterable[Row]) -> dict[str, Any]:
    """How far measured errors are from predicted ones: {kind of coins: {"rows", "within", "measured_over_predicted"}}.

    A setting is within if its squared error agrees with the prediction up to TOLERANCE and two standard errors. The
    ratios are the least, the median and the largest."""
    known: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        if row.get("predicted") is not None:
            numbers = row["error"], row["predicted"], row["error_se"] or 0.0
            known.setdefault(row["coins"] or row["estimator"], []).append(numbers)
    out = {}
    for kind, numbers in sorted(known.items()):
        error, predicted, se = np.array(numbers).T
        low, high = (1 - TOLERANCE) * predicted, (1 + TOLERANCE) * predicted
        within, ratios = (error - 2 * se <= high) & (error + 2 * se >= low), error / predicted
        spread = [float(f(ratios)) for f in (np.min, np.median, np.max)]
        out[kind] = {"rows": len(numbers), "within": int(within.sum()), "measured_over_predicted": spread}
    return out
