"""Verdicts on an optimiser's plans: what each method gains, and whether its choices and predictions hold."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..multilevel.timing import Timing
from .curves import Measurements, compare, lower, window
from .settings import Row, is_multilevel
from .speedup import Choice, Field

TOLERANCE = 0.25  # relative: measured squared errors this close to the prediction agree with it
_COST = {"flops": "gflops", "seconds": "seconds"}


def verdicts(
    settings: Measurements, calibration_flops: float, seed: int = 0, unit: str = "flops", timing: Timing | None = None
) -> dict[str, Any]:
    """{"dynamics/rule": entry} for each dynamics and step rule for which an optimiser's plans were run.
    An entry compares each method ("<coins>, <probabilities> p", "quadrature", and "any" of them) with EM, DDPM and DDIM
    on any level and with all baselines of the same dynamics, and judges the optimiser's foresight. Speed-ups are those
    of `curves.compare`, in expected FLOPs, or in seconds if the plans were made for seconds (`unit`) and there is a
    timing; "windows" lists the ranges in which the lower bound is at least 1, 2, 4 and 8."""
    unit = unit if timing is not None else "flops"
    out: dict[str, Any] = {}
    for dynamics, rule in dict.fromkeys((m.row["dynamics"], m.row["step_rule"]) for m in settings if m.row.get("plan")):
        field = Field.of(settings, dynamics, 200, seed, timing, "gflops_expected")
        planned = [row for row in field.rows if is_multilevel(row) and row["step_rule"] == rule]
        entry: dict[str, Any] = {"unit": unit, "against_em": {}, "against_all_baselines": {}}
        for key, against in (("against_em", "em_any"), ("against_all_baselines", "all")):
            theirs = field.against(against)
            for name, ours in _methods(planned, rule).items() if any(map(theirs, field.rows)) else ():
                found = compare(field.group(theirs, unit), field.group(ours, unit), field.coarsest)
                entry[key][name] = _judged(found, calibration_flops)
        entry["optimiser_against_em"] = chosen_blindly(field, field.against("em_any"), unit)
        entry["predicted_error"] = prediction(planned)
        out[f"{dynamics}/{rule}"] = entry
    return out


def _methods(planned: list[Row], rule: str) -> dict[str, Choice]:
    """Which rows are settings of each method with this step rule, and of any."""

    def name_of(row: Row) -> str:
        return "{coins}, {probabilities} p".format(**row) if row["coins"] else row["estimator"]

    def choice(name: str) -> Choice:
        return lambda row: is_multilevel(row) and row["step_rule"] == rule and name in ("any", name_of(row))

    return {name: choice(name) for name in dict.fromkeys([*map(name_of, planned), "any"])} if planned else {}


def _judged(found: dict[str, Any], calibration_flops: float) -> dict[str, Any]:
    """An entry with its windows, and after how many images the calibration is paid for at its largest point."""
    windows, best = [window(found["curve"], least) for least in (1, 2, 4, 8)], found["max"]
    found["windows"] = [w for w in windows if w is not None]
    if best is not None and best["speedup"] > 1:
        saved = (best["baseline"]["gflops_realised"] - best["ours"]["gflops_realised"]) * 1e9
        found |= {"images_to_repay_calibration": calibration_flops / saved} if saved > 0 else {}
    return found


def chosen_blindly(field: Field, theirs: Choice, unit: str = "flops") -> dict[str, Any]:
    """Whether an optimiser's choices among multilevel settings are nowhere above the frontier of `theirs`.
    At the cost of each frontier point, the optimiser chooses within that cost the setting with the lowest error on the
    selection seeds ("selected_error" of its row), if there is one. "ratio" is the squared error of this choice on the
    seeds of the comparison, divided by the point's; above if its one-sided 95% lower bound exceeds 1."""
    known = field.group(lambda row: is_multilevel(row) and row.get("selected_error") is not None, unit)
    base, points = field.group(theirs, unit), []
    for b in base.frontier():
        cost = float(base.costs[b, 0])
        within = np.flatnonzero(known.costs[:, 0] <= 1.001 * cost)
        if len(within):
            ratios = known.errors[min(within, key=lambda j: known.rows[j]["selected_error"])] / base.errors[b]
            points.append({_COST[unit]: cost, "ratio": float(ratios[0]), "lower95": lower(ratios) or 0.0})
    worst = max(points, key=lambda p: p["lower95"], default=None)
    return {"never_above": worst and worst["lower95"] <= 1, "worst": worst, "points": len(points)}


def prediction(rows: Iterable[Row]) -> dict[str, Any]:
    """How far measured errors are from predicted ones: {kind of coins: {"rows", "within", "measured_over_predicted"}}.
    Within: the squared errors agree up to TOLERANCE and two standard errors. Ratios: least, median and largest."""
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
