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
# name, ours, theirs
BETWEEN = (
    ("systematic_over_independent", "systematic, optimal p", "independent, optimal p"),
    ("optimal_over_measured", "independent, optimal p", "independent, measured p"),
    ("learned_over_measured", "independent, learned p", "measured p, alike"),
)


def verdicts(
    settings: Sequence[Measurement], calibration_flops: float | None = None, seed: int = 0, unit: str = "flops"
) -> dict[str, Any]:
    """{"dynamics/rule": entry} for each dynamics and step rule for which an optimiser's plans were run.

    An entry compares the plans with the baselines of the same dynamics, one kind of coins with another, and one source
    of probabilities with another. Speed-ups are at equal squared error, in expected FLOPs, or in measured seconds if
    the plans were made for seconds (`unit`). Windows are given for speed-ups of 1, 2, 4 and 8.
    """
    cost = {"flops": "gflops_expected", "seconds": "seconds"}[unit]
    out: dict[str, Any] = {}
    for dynamics, rule in dict.fromkeys((m.row["dynamics"], m.row["step_rule"]) for m in settings if m.row.get("plan")):
        here = [m for m in settings if m.row["dynamics"] == dynamics and np.isfinite(m.errors).all()]
        base = [m for m in here if m.row["estimator"] in BASELINES]
        ours = [m for m in here if m.row["estimator"] not in BASELINES and _fired(m.row)]
        first_order = [m for m in base if m.row["step_rule"] in FIRST_ORDER]
        planned = [m for m in ours if m.row["step_rule"] == rule]
        methods = _by_method(planned)
        entry: dict[str, Any] = {"unit": unit, "against_em": {}, "against_all_baselines": {}}
        for against, theirs in (("against_em", first_order), ("against_all_baselines", base)):
            for name, mine in methods.items() if theirs else ():
                entry[against][name] = _speed(theirs, mine, calibration_flops, seed, cost)
        entry["optimiser_against_em"] = chosen_blindly([*base, *ours], first_order, seed, cost)
        measured, learned = (methods.get(f"independent, {source} p", []) for source in ("measured", "learned"))
        methods["measured p, alike"] = _alike(measured, learned, cost)
        for name, mine, theirs in BETWEEN:
            mine, theirs = methods.get(mine), methods.get(theirs)
            if mine and theirs:
                entry[name] = _speed(theirs, mine, None, seed, cost)
                # the optimiser may also choose a single level
                alone = [m for m in base if m.row["step_rule"] == rule] if name == "optimal_over_measured" else []
                entry[name]["error_at_equal_cost"] = not_worse([*mine, *alone], theirs, seed, cost)
        entry["predicted_error"] = prediction(m.row for m in planned)
        out[f"{dynamics}/{rule}"] = entry
    return out


def _fired(row: Row) -> bool:
    return row.get("top_evaluations") is None or row["top_evaluations"] >= MIN_FIRES


def _by_method(planned: list[Measurement]) -> dict[str, list[Measurement]]:
    """The settings of each method that has any."""
    found = {name: [m for m in planned if "{coins}, {probabilities} p".format(**m.row) == name] for name in METHODS}
    found["quadrature"] = [m for m in planned if m.row["estimator"] == "quadrature"]
    return {name: mine for name, mine in (found | {"any": planned}).items() if mine}


def _alike(measured: list[Measurement], learned: list[Measurement], cost: str) -> list[Measurement]:
    """Measured probabilities with the steps of learned ones, and with their costs to 1%, or to 10% for seconds."""
    tolerance = 0.01 if cost == "gflops_expected" else 0.1

    def alike(one: Row, other: Row) -> bool:
        return one["steps"] == other["steps"] and abs(one[cost] / other[cost] - 1) < tolerance

    return [m for m in measured if any(alike(m.row, other.row) for other in learned)]


def _speed(
    base: list[Measurement], ours: list[Measurement], calibration: float | None, seed: int, cost: str
) -> dict[str, Any]:
    entry = equal_error(base, ours, seed=seed, cost=cost)
    found = {key: entry[key] for key in ("max", "lower95", "at", "baseline", "ours", "curve")}
    found["windows"] = [w for least in (1, 2, 4, 8) if (w := window(entry["curve"], least)) is not None]
    if calibration is not None and entry["max"] is not None and entry["max"] > 1:
        saved = (entry["baseline"]["gflops_realised"] - entry["ours"]["gflops_realised"]) * 1e9
        found["images_to_repay_calibration"] = calibration / saved
    return found


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


def not_worse(
    ours: Sequence[Measurement], theirs: Sequence[Measurement], seed: int = 0, cost: str = "gflops_expected"
) -> dict[str, Any]:
    """Whether `ours` is nowhere above the frontier of `theirs`, in expected FLOPs or seconds (`cost` names the column).

    At each frontier point, "ratio" is the lowest squared error of `ours` within the same cost, divided by the point's
    squared error. "worst" is the point with the largest ratio. `ours` counts as above if the one-sided 95% lower bound
    of the ratio exceeds 1. Points cheaper than the cheapest setting of `ours` are counted, but not judged."""
    everywhere = equal_error(ours, theirs, seed=seed, cost=cost)["errors_at_cost"]
    points = [p for p in everywhere if p["ratio"] is not None]
    worst = max(points, key=lambda p: p["ratio"], default=None)
    never = all(p["lower95"] is None or p["lower95"] <= 1 for p in points) if points else None
    return {"never_above": never, "worst": worst, "points": len(points), "not_judged": len(everywhere) - len(points)}


def chosen_blindly(
    ours: Sequence[Measurement], theirs: Sequence[Measurement], seed: int = 0, cost: str = "gflops_expected"
) -> dict[str, Any]:
    """Whether an optimiser's choices are nowhere above the frontier of `theirs`.

    At the cost of each frontier point, the optimiser chooses within that cost the setting of `ours` with the lowest
    error on the selection seeds ("selected_error" of its row). "ratio" is the squared error of this choice on the
    seeds of the comparison, divided by the point's. It counts as above if the one-sided 95% lower bound exceeds 1.
    """
    known = [m for m in ours if m.row.get("selected_error") is not None]
    values = resampled_errors([*known, *theirs], seed=seed)
    mine, others = values[: len(known)], values[len(known) :]
    points, lowest, unserved = [], math.inf, 0
    for i in sorted(range(len(theirs)), key=lambda i: (theirs[i].row[cost], others[i, 0])):
        if others[i, 0] >= lowest:
            continue  # not on the frontier
        lowest = others[i, 0]
        within = [j for j, m in enumerate(known) if m.row[cost] <= 1.001 * theirs[i].row[cost]]
        if not within:
            unserved += 1
            continue
        ratios = mine[min(within, key=lambda j: known[j].row["selected_error"])] / others[i]
        lower = float(np.quantile(ratios[1:], 0.05)) if len(ratios) > 1 else 0.0
        points.append(
            {cost.removesuffix("_expected"): theirs[i].row[cost], "ratio": float(ratios[0]), "lower95": lower}
        )
    worst = max(points, key=lambda p: p["lower95"], default=None)
    never = all(p["lower95"] <= 1 for p in points) if points else None
    return {"never_above": never, "worst": worst, "points": len(points), "unserved": unserved}


def prediction(rows: Iterable[Row], tolerance: float = 0.25) -> dict[str, Any]:
    """How far measured errors are from predicted ones: {kind of coins: {"rows", "within", "largest_effect", ...}}.

    A setting agrees if its squared error is within the tolerance of the prediction, up to two standard errors of the
    measurement. "largest_effect" is the largest effect in the comparison, "largest_effect_up_to_which_all_agree" the
    largest one such that all settings up to it agree.
    """

    def agrees(row: Row) -> bool:
        slack = 2 * (row.get("error_se") or 0.0)
        low, high = (1 - tolerance) * row["predicted"], (1 + tolerance) * row["predicted"]
        return row["error"] - slack <= high and row["error"] + slack >= low

    known: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("predicted") is not None:
            known.setdefault(row.get("coins") or row["estimator"], []).append(row)
    out = {}
    for kind, mine in sorted(known.items()):
        mine.sort(key=lambda row: row["largest_effect"])
        good = [agrees(row) for row in mine]
        small = [*good, False].index(False)
        ratios = [row["error"] / row["predicted"] for row in mine]
        out[kind] = {
            "rows": len(mine), "within": sum(good), "largest_effect": mine[-1]["largest_effect"],
            "largest_effect_up_to_which_all_agree": mine[small - 1]["largest_effect"] if small else None,
            "rows_up_to_it": small,
            "measured_over_predicted": [min(ratios), float(np.median(ratios)), max(ratios)],
        }  # fmt: skip
    return out
