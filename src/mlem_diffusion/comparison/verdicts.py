"""Conclusions of a comparison: windows of speed-up, method against method, predicted against measured error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .speedup import Measurement, equal_error, resampled_errors
from .table import BASELINES, MIN_FIRES, Row, method_of


def window(curve: Sequence[dict[str, Any]], least: float) -> dict[str, Any] | None:
    """The widest contiguous range of errors in which the lower 95% bound of the speed-up is at least `least`.

    curve: {"at": mean squared error, "lower95"} along the baseline frontier (speedup.py). "factor" is the ratio of the
    root mean squared errors at its ends. None if no point qualifies.
    """
    best: tuple[float, int, int] | None = None
    start = None
    for i, point in enumerate([*curve, {"lower95": None}]):
        good = point["lower95"] is not None and point["lower95"] >= least
        if good and start is None:
            start = i
        if not good and start is not None:
            factor = math.sqrt(curve[start]["at"] / curve[i - 1]["at"])
            best = max(best or (0.0, 0, 0), (factor, start, i - 1))
            start = None
    if best is None:
        return None
    factor, first, last = best
    return {
        "least": least, "factor": factor,
        "rms_error": [math.sqrt(curve[first]["at"]), math.sqrt(curve[last]["at"])],
        "lower95": [point["lower95"] for point in curve[first : last + 1]],
    }  # fmt: skip


def not_worse(
    ours: Sequence[Measurement], theirs: Sequence[Measurement], seed: int = 0, cost: str = "gflops_expected"
) -> dict[str, Any]:
    """Whether `ours` is nowhere above the frontier of `theirs`, in expected FLOPs or seconds (`cost` names the column).

    At each frontier point, "ratio" is the lowest squared error of `ours` within the same cost, divided by the point's
    squared error. "worst" is the point with the largest ratio. `ours` counts as above if the one-sided 95% lower bound
    of the ratio exceeds 1. Points cheaper than the cheapest setting of `ours` are counted, but not judged."""
    entry = equal_error(list(ours), list(theirs), seed=seed, cost=cost)
    points = [p for p in entry["errors_at_cost"] if p["ratio"] is not None]
    worst = max(points, key=lambda p: p["ratio"], default=None)
    return {
        "never_above": all(p["lower95"] is None or p["lower95"] <= 1 for p in points) if points else None,
        "worst": worst, "points": len(points), "not_judged": len(entry["errors_at_cost"]) - len(points),
    }  # fmt: skip


def chosen_blindly(
    ours: Sequence[Measurement], theirs: Sequence[Measurement], seed: int = 0, cost: str = "gflops_expected"
) -> dict[str, Any]:
    """Whether an optimiser's choices are nowhere above the frontier of `theirs`.

    At the cost of each frontier point, the optimiser chooses within that cost the setting of `ours` with the lowest
    error on the selection seeds ("selected_error" of its row). "ratio" is the squared error of this choice on the
    seeds of the comparison, divided by the point's. It counts as above if the one-sided 95% lower bound exceeds 1.
    cost: the column of costs, expected GFLOPs or "seconds".
    """
    known = [s for s in ours if s.row.get("selected_error") is not None]
    values = resampled_errors([*known, *theirs], seed=seed) if theirs else np.zeros((0, 1))
    mine, others = values[: len(known)], values[len(known) :]
    costs = np.array([s.row[cost] for s in known])
    selected = np.array([s.row["selected_error"] for s in known])
    points, lowest, unserved = [], math.inf, 0
    for i in sorted(range(len(theirs)), key=lambda i: (theirs[i].row[cost], others[i, 0])):
        if others[i, 0] >= lowest:
            continue  # not on the frontier
        lowest = others[i, 0]
        within = np.flatnonzero(costs <= 1.001 * theirs[i].row[cost])
        if len(within) == 0:
            unserved += 1
            continue
        pick = within[np.argmin(selected[within])]
        ratios = mine[pick] / others[i]
        points.append(
            {
                cost.removesuffix("_expected"): theirs[i].row[cost],
                "ratio": float(ratios[0]),
                "lower95": float(np.quantile(ratios[1:], 0.05)),
            }
        )
    worst = max(points, key=lambda p: p["lower95"], default=None)
    never = all(p["lower95"] <= 1 for p in points) if points else None
    return {"never_above": never, "worst": worst, "points": len(points), "unserved": unserved}


def prediction(rows: Sequence[Row], tolerance: float = 0.25) -> dict[str, Any]:
    """How far measured errors are from predicted ones: {kind of coins: {"rows", "within", "largest_effect", ...}}.

    A setting agrees if its squared error is within the tolerance of the prediction, up to two standard errors of the
    measurement. "largest_effect" is the largest effect in the comparison, "largest_effect_up_to_which_all_agree" the
    largest one such that all settings up to it agree.
    """
    out = {}
    for kind in sorted({_kind(row) for row in rows if row.get("predicted") is not None}):
        mine = sorted(
            (r for r in rows if r.get("predicted") is not None and _kind(r) == kind), key=lambda r: r["largest_effect"]
        )
        good = [_agrees(row, tolerance) for row in mine]
        small = good.index(False) if False in good else len(good)
        ratios = [row["error"] / row["predicted"] for row in mine]
        out[kind] = {
            "rows": len(mine), "within": sum(good), "largest_effect": mine[-1]["largest_effect"],
            "largest_effect_up_to_which_all_agree": mine[small - 1]["largest_effect"] if small else None,
            "rows_up_to_it": small,
            "measured_over_predicted": [min(ratios), float(np.median(ratios)), max(ratios)],
        }  # fmt: skip
    return out


def _agrees(row: Row, tolerance: float) -> bool:
    slack = 2 * (row.get("error_se") or 0.0)
    return (
        row["error"] - slack <= (1 + tolerance) * row["predicted"]
        and row["error"] + slack >= (1 - tolerance) * row["predicted"]
    )


def _kind(row: Row) -> str:
    return row.get("coins") or row["estimator"]


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
    rules = dict.fromkeys((s.row["dynamics"], s.row["step_rule"]) for s in settings if s.row.get("plan"))
    for dynamics, rule in rules:
        here = [s for s in settings if s.row["dynamics"] == dynamics and np.isfinite(s.errors).all()]
        base = [s for s in here if s.row["estimator"] in BASELINES]
        first_order = [s for s in base if s.row["step_rule"] in ("em", "ddpm", "ddim")]
        planned = [s for s in _planned(here) if s.row["step_rule"] == rule]

        def pick(test: Callable[[Row], bool], among: Sequence[Measurement] = planned) -> list[Measurement]:
            return [s for s in among if test(s.row)]

        entry: dict[str, Any] = {"unit": unit, "against_em": {}, "against_all_baselines": {}}
        methods = {
            "independent, constant p": pick(lambda r: method_of(r) == "paper" and r["probabilities"] == "constant"),
            "independent, measured p": pick(lambda r: method_of(r) == "paper" and r["probabilities"] == "measured"),
            "independent, optimal p": pick(lambda r: method_of(r) == "paper" and r["probabilities"] == "optimal"),
            "independent, learned p": pick(lambda r: method_of(r) == "paper" and r["probabilities"] == "learned"),
            "nested, optimal p": pick(lambda r: r["coins"] == "nested" and r["probabilities"] == "optimal"),
            "systematic, constant p": pick(lambda r: r["coins"] == "systematic" and r["probabilities"] == "constant"),
            "systematic, optimal p": pick(lambda r: r["coins"] == "systematic" and r["probabilities"] == "optimal"),
            "quadrature": pick(lambda r: r["estimator"] == "quadrature"),
            "any": planned,
        }
        methods = {name: found for name, found in methods.items() if found}
        for name, found in methods.items():
            for against, those in (("against_em", first_order), ("against_all_baselines", base)):
                if those:
                    entry[against][name] = _speed(those, found, calibration_flops, seed, cost)
        entry["optimiser_against_em"] = chosen_blindly([*base, *_planned(here)], first_order, seed, cost)
        learned = methods.get("independent, learned p", [])
        methods["measured p, alike"] = [
            s
            for s in methods.get("independent, measured p", [])
            if any(_alike(s.row, other.row, cost) for other in learned)
        ]
        for name, ours, theirs in (
            ("systematic_over_independent", "systematic, optimal p", "independent, optimal p"),
            ("optimal_over_measured", "independent, optimal p", "independent, measured p"),
            ("learned_over_measured", "independent, learned p", "measured p, alike"),
        ):
            if methods.get(ours) and methods.get(theirs):
                entry[name] = _speed(methods[theirs], methods[ours], None, seed, cost)
                # the optimiser may also choose a single level
                alone = [s for s in base if s.row["step_rule"] == rule] if name == "optimal_over_measured" else []
                entry[name]["error_at_equal_cost"] = not_worse([*methods[ours], *alone], methods[theirs], seed, cost)
        entry["predicted_error"] = prediction([s.row for s in planned])
        out[f"{dynamics}/{rule}"] = entry
    return out


def _alike(one: Row, other: Row, cost: str) -> bool:
    """Whether steps are equal and costs agree to 1%, or to 10% for seconds, which vary more for the same plan."""
    tolerance = 0.01 if cost == "gflops_expected" else 0.1
    return one["steps"] == other["steps"] and abs(one[cost] / other[cost] - 1) < tolerance


def _planned(settings: Sequence[Measurement]) -> list[Measurement]:
    return [s for s in settings if s.row["estimator"] not in BASELINES and _fired(s.row)]


def _fired(row: Row) -> bool:
    return row.get("top_evaluations") is None or row["top_evaluations"] >= MIN_FIRES


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
