"""Conclusions of a comparison: windows of speed-up, method against method, predicted against measured error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .settings import Measurement, Row
from .speedup import equal_error, resampled_errors
from .table import BASELINES, MIN_FIRES

FIRST_ORDER = ("em", "ddpm", "ddim")
# names of methods in verdicts.json: "<coins>, <probabilities> p"
METHODS = [f"independent, {source} p" for source in ("constant", "measured", "optimal", "learned")]
METHODS += ["nested, optimal p", "systematic, constant p", "systematic, optimal p"]
BETWEEN = {  # name: ours, theirs
    "systematic_over_independent": ("systematic, optimal p", "independent, optimal p"),
    "optimal_over_measured": ("independent, optimal p", "independent, measured p"),
}


def verdicts(
    settings: Sequence[Measurement], calibration_flops: float | None = None, seed: int = 0, unit: str = "flops"
) -> dict[str, Any]:
    """{"dynamics/rule": entry} for each dynamics and step rule for which an optimiser's plans were run.

    An entry compares the plans with the baselines of the same dynamics, and methods with one another. Speed-ups are at
    equal squared error, in expected FLOPs, or in measured seconds if the plans were made for seconds (`unit`). Windows
    are given for speed-ups of 1, 2, 4 and 8.
    """
    cost = {"flops": "gflops_expected", "seconds": "seconds"}[unit]
    out: dict[str, Any] = {}
    for dynamics, rule in dict.fromkeys((m.row["dynamics"], m.row["step_rule"]) for m in settings if m.row.get("plan")):
        here = [m for m in settings if m.row["dynamics"] == dynamics]
        base = [m for m in here if m.row["estimator"] in BASELINES]
        multilevel = [m for m in here if m.row["estimator"] not in BASELINES]
        ours = [m for m in multilevel if m.row.get("top_evaluations", MIN_FIRES) >= MIN_FIRES]
        first_order = [m for m in base if m.row["step_rule"] in FIRST_ORDER]
        planned = [m for m in ours if m.row["step_rule"] == rule]
        methods = _by_method(planned)
        entry: dict[str, Any] = {"unit": unit, "against_em": {}, "against_all_baselines": {}}
        for against, theirs in (("against_em", first_order), ("against_all_baselines", base)):
            for name, mine in methods.items() if theirs else ():
                entry[against][name] = _speed(theirs, mine, calibration_flops, seed, cost)
        entry["optimiser_against_em"] = chosen_blindly([*base, *ours], first_order, cost, seed)
        for name, (mine, theirs) in BETWEEN.items():
            if mine in methods and theirs in methods:
                entry[name] = _speed(methods[theirs], methods[mine], None, seed, cost)
        entry["predicted_error"] = prediction(m.row for m in planned)
        out[f"{dynamics}/{rule}"] = entry
    return out


def _by_method(planned: list[Measurement]) -> dict[str, list[Measurement]]:
    """The settings of each method that has any."""
    found = {name: [m for m in planned if "{coins}, {probabilities} p".format(**m.row) == name] for name in METHODS}
    found["quadrature"] = [m for m in planned if m.row["estimator"] == "quadrature"]
    return {name: mine for name, mine in (found | {"any": planned}).items() if mine}


def _speed(
    base: list[Measurement], ours: list[Measurement], calibration: float | None, seed: int, cost: str
) -> dict[str, Any]:
    entry = equal_error(base, ours, cost, seed)
    del entry["error_ratio_at_equal_cost"]
    entry["windows"] = [w for least in (1, 2, 4, 8) if (w := window(entry["curve"], least)) is not None]
    if calibration is not None and entry["max"] is not None and entry["max"] > 1:
        saved = (entry["baseline"]["gflops_realised"] - entry["ours"]["gflops_realised"]) * 1e9
        entry["images_to_repay_calibration"] = calibration / saved
    return entry


def window(curve: Sequence[dict[str, Any]], least: float) -> dict[str, Any] | None:
    """The widest contiguous range of errors in which the lower 95% bound of the speed-up is at least `least`.

    curve: {"at": mean squared error, "lower95"} along the baseline frontier (speedup.py). "factor" is the ratio of the
    root mean squared errors at its ends. None if no point qualifies.
    """
    runs: list[list[dict[str, Any]]] = [[]]
    for point in curve:
        if point["lower95"] is not None and point["lower95"] >= least:
            runs[-1].append(point)
        else:
            runs.append([])
    factors = [(math.sqrt(run[0]["at"] / run[-1]["at"]), i) for i, run in enumerate(runs) if run]
    if not factors:
        return None
    factor, widest = max(factors)
    ends = [math.sqrt(runs[widest][i]["at"]) for i in (0, -1)]
    return {"least": least, "factor": factor, "rms_error": ends, "lower95": [p["lower95"] for p in runs[widest]]}


def chosen_blindly(
    ours: Sequence[Measurement], theirs: Sequence[Measurement], cost: str, seed: int = 0
) -> dict[str, Any]:
    """Whether an optimiser's choices are nowhere above the frontier of `theirs`.

    At the cost of each frontier point, the optimiser chooses within that cost the setting of `ours` with the lowest
    error on the selection seeds ("selected_error" of its row). "ratio" is the squared error of this choice on the
    seeds of the comparison, divided by the point's. It counts as above if the one-sided 95% lower bound exceeds 1.
    """
    known = [m for m in ours if m.row.get("selected_error") is not None]
    values = resampled_errors([*known, *theirs], seed=seed)
    points, lowest, unserved = [], math.inf, 0
    for m, errors in sorted(zip(theirs, values[len(known) :], strict=True), key=lambda x: (x[0].row[cost], x[1][0])):
        if errors[0] >= lowest:
            continue  # not on the frontier
        lowest, price = errors[0], m.row[cost]
        # the slack of 0.1%: plans of equal expected cost differ by the rounding of their probabilities
        within = [j for j, mine in enumerate(known) if mine.row[cost] <= 1.001 * price]
        if not within:
            unserved += 1
            continue
        ratios = values[min(within, key=lambda j: known[j].row["selected_error"])] / errors
        lower = float(np.quantile(ratios[1:], 0.05)) if len(ratios) > 1 else 0.0
        points.append({cost.removesuffix("_expected"): price, "ratio": float(ratios[0]), "lower95": lower})
    worst = max(points, key=lambda p: p["lower95"], default=None)
    never = all(p["lower95"] <= 1 for p in points) if points else None
    return {"never_above": never, "worst": worst, "points": len(points), "unserved": unserved}


def prediction(rows: Iterable[Row]) -> dict[str, Any]:
    """How far measured errors are from predicted ones: {kind of coins: {"rows", "within", "measured_over_predicted"}}.

    A setting is within if its squared error is within 25% of the prediction, up to two standard errors of the
    measurement. The ratios are the smallest, the median and the largest.
    """
    known: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("predicted") is not None:
            known.setdefault(row["coins"] or row["estimator"], []).append(row)
    out = {}
    for kind, mine in sorted(known.items()):
        beyond = [abs(row["error"] - row["predicted"]) - 2 * (row["error_se"] or 0.0) for row in mine]
        within = sum(excess <= 0.25 * row["predicted"] for excess, row in zip(beyond, mine, strict=True))
        ratios = [row["error"] / row["predicted"] for row in mine]
        spread = [min(ratios), float(np.median(ratios)), max(ratios)]
        out[kind] = {"rows": len(mine), "within": within, "measured_over_predicted": spread}
    return out
