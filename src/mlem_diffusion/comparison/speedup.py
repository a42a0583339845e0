"""Speed-up of ML-EM over every baseline at equal error or distance, with one-sided 95% lower bounds; verdicts on plans.

For a baseline setting b that no other baseline beats in both cost and error, with error e_b,

    speed-up(b) = (cheapest baseline cost with error <= e_b) / (cheapest ML-EM cost with error <= e_b).

So a coarse baseline grid cannot favour ML-EM. The bound is the 5th percentile over paired bootstrap resamples of the
seeds, at the same b; each resample recomputes e_b and all errors, and counts as 0 if ML-EM does not reach e_b. The
largest of several noisy speed-ups is biased upwards, which the bound does not correct: see the full curve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

import numpy as np

from .features import FeatureMoments, fast_frechet
from .settings import BASELINES, MIN_FIRES, Measurement, Row, method_of, trusted

Measurements = Sequence[Measurement]
COSTS = {"flops": "gflops_realised", "seconds": "seconds"}
FIRST_ORDER = ("em", "ddpm", "ddim")
TOLERANCE = 0.25  # relative: measured squared errors this close to the prediction agree with it
_SLACK = 1e-9  # relative: rounding must not separate two settings that are the same sampler
_DESCRIBED = ("step_rule", "estimator", "levels", "probabilities", "coins", "c", "switch", "steps", "plan")
_DESCRIBED += ("error", "distance", *COSTS.values())


def speedups(
    settings: Measurements, reference: FeatureMoments | None = None, replicates: int = 200,
    distance_replicates: int = 50, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The content of speedup.json: {dynamics: {"paper" | "any": {"error" | "distance": {"flops" | "seconds": entry}}}}.

    An entry is {"max", "lower95", "at", "baseline", "ours", "curve"} and, for errors, "error_ratio_at_equal_cost".
    "curve" lists {"at", "speedup", "lower95"} over the baseline frontier. Unreached values are None, and so are bounds
    with a single seed. "any" compares all multilevel rows, "paper" those with independent coins."""
    result: dict[str, Any] = {}
    for dynamics in dict.fromkeys(m.row["dynamics"] for m in settings):
        usable = [m for m in settings if m.row["dynamics"] == dynamics and trusted(m.row)]
        base = [m for m in usable if m.row["estimator"] in BASELINES]
        multilevel = [m for m in usable if m.row["estimator"] not in BASELINES]
        paper = [m for m in multilevel if method_of(m.row) == "paper"]
        distances = {} if reference is None else _distances(usable, reference, distance_replicates, seed)
        result[dynamics] = {"paper": {}, "any": {}}
        for method, ours in (("paper", paper), ("any", multilevel)):
            values = {"error": errors_of([*base, *ours], replicates, seed)}
            if reference is not None:
                values["distance"] = np.array([distances[id(m)] for m in (*base, *ours)])
            for (measure, value), (unit, column) in product(values.items(), COSTS.items()):
                groups = _groups(base, ours, value, column)
                entry = _compare(*groups, measure)
                if measure == "error":
                    entry["error_ratio_at_equal_cost"] = _error_ratio(*groups)
                result[dynamics][method].setdefault(measure, {})[unit] = entry
    return result


def equal_error(base: Measurements, ours: Measurements, cost: str, seed: int = 0) -> dict[str, Any]:
    """The "max", "lower95", ... of `speedups` at equal error, for two groups of settings and a column of costs."""
    return _compare(*_groups(base, ours, errors_of([*base, *ours], 200, seed), cost), "error")


def summary(result: dict[str, Any]) -> str:
    """One line per speed-up in FLOPs."""
    lines = []
    for dynamics, methods in result.items():
        for method, measure in product(methods, methods["any"]):
            found, low = (methods[method][measure]["flops"][key] for key in ("max", "lower95"))
            text = "never reaches a baseline" if found is None else f"{found:.3g}x (95% lower bound {low or 0:.3g}x)"
            lines.append(f"{dynamics}, {method}, FLOPs at equal {measure}: {text}")
    return "\n".join(lines)


def errors_of(settings: Measurements, replicates: int, seed: int) -> np.ndarray:
    """Mean squared errors [S, 1 + R]: first on all seeds, then on each paired bootstrap resample of them."""
    if not settings:
        return np.zeros((0, 1))
    counts = _resamples(len(settings[0].errors), replicates, seed)
    return np.stack([m.errors for m in settings]) @ counts / counts.sum(0)


def _distances(settings: Measurements, reference: FeatureMoments, replicates: int, seed: int) -> dict[int, list]:
    """Distances [1 + R] to the reference by the id of the measurement, resampled in the manner of `errors_of`."""
    out = {}
    for m in settings:
        x = np.asarray(m.features, dtype=np.float64)
        projected = x @ reference.root
        out[id(m)] = [fast_frechet(x, reference, c, projected) for c in _resamples(len(x), replicates, seed).T]
    return out


def _resamples(n: int, replicates: int, seed: int) -> np.ndarray:
    """How often each seed is drawn, float64 [n, 1 + R]: first once each, then resampled; R = 0 if n = 1."""
    replicates = replicates if n > 1 else 0
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=replicates).T
    return np.concatenate([np.ones((n, 1)), drawn.astype(np.float64)], axis=1)


@dataclass(frozen=True)
class Group:
    """Settings with a positive cost, sorted by it: rows, costs [S] and values [S, 1 + R]."""

    rows: list[Row]
    costs: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, settings: Measurements, values: np.ndarray, column: str) -> Group:
        costs = np.array([m.row[column] for m in settings])
        order = [i for i in np.lexsort((values[:, 0], costs)) if costs[i] > 0]
        return cls([settings[i].row for i in order], costs[order], values[order])

    def frontier(self) -> list[int]:
        """Indices of the settings whose value no cheaper or equally cheap setting reaches, cheap to expensive."""
        first = self.values[:, 0]
        return [i for i in range(len(first)) if first[i] < first[:i].min(initial=math.inf)]

    def cheapest(self, target: np.ndarray) -> np.ndarray:
        """Index of the cheapest setting with value <= target, per column [1 + R]; S if no setting reaches it."""
        reached = self.values <= target + _SLACK * np.abs(target)
        return np.where(reached.any(0), reached.argmax(0), len(self.rows)) if self.rows else np.zeros(len(target), int)

    def lowest_within(self, cost: float) -> np.ndarray:
        """Smallest value among settings of at most this cost, per column [1 + R]; infinite if there are none."""
        return self.values[self.costs <= cost * (1 + _SLACK)].min(0, initial=math.inf)

    def described(self, i: int, measure: str) -> Row:
        """What the files say about a setting."""
        return {key: self.rows[i].get(key) for key in _DESCRIBED} | {measure: float(self.values[i, 0])}


def _groups(base: Measurements, ours: Measurements, values: np.ndarray, column: str) -> tuple[Group, Group]:
    """Baselines and our settings with their values (first the baselines') and costs."""
    return Group.of(base, values[: len(base)], column), Group.of(ours, values[len(base) :], column)


def _compare(base: Group, ours: Group, measure: str) -> dict[str, Any]:
    """The entry of two groups."""
    entry: dict[str, Any] = dict.fromkeys(("max", "lower95", "at", "baseline", "ours")) | {"curve": []}
    for b in base.frontier():
        target = base.values[b]
        theirs, mine = base.cheapest(target), ours.cheapest(target)
        ratios = base.costs[theirs] / np.append(ours.costs, math.inf)[mine]
        speed, low = (float(ratios[0]), _lower(ratios)) if ratios[0] > 0 else (None, None)
        entry["curve"].append({"at": float(target[0]), "speedup": speed, "lower95": low})
        if speed is not None and speed > (entry["max"] or 0):
            entry |= {"max": speed, "lower95": low, "at": float(target[0])}
            entry |= {"baseline": base.described(theirs[0], measure), "ours": ours.described(mine[0], measure)}
    return entry


def _error_ratio(base: Group, ours: Group) -> dict[str, Any]:
    """The largest (baseline error) / (lowest ML-EM error within the same cost), at costs of the baseline frontier."""
    found: dict[str, Any] = {"max": None, "lower95": None, "at": None}
    for cost in map(float, base.costs[base.frontier()]):
        theirs, mine = base.lowest_within(cost), ours.lowest_within(cost)
        # unless no ML-EM setting is that cheap, or its error is exactly zero
        if np.isfinite(mine[0]) and mine.min() > 0 and theirs[0] / mine[0] > (found["max"] or 0):
            ratios = theirs / mine
            found = {"max": float(ratios[0]), "lower95": _lower(ratios), "at": cost}
    return found


def _lower(ratios: np.ndarray) -> float | None:
    """The 5th percentile over the resamples of [1 + R]."""
    return float(np.quantile(ratios[1:], 0.05, method="lower")) if len(ratios) > 1 else None


def verdicts(settings: Measurements, calibration_flops: float, seed: int = 0, unit: str = "flops") -> dict[str, Any]:
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
        methods, first_order = _by_method(planned), [m for m in base if m.row["step_rule"] in FIRST_ORDER]
        entry: dict[str, Any] = {"unit": unit, "against_em": {}, "against_all_baselines": {}}
        for against, theirs in (("against_em", first_order), ("against_all_baselines", base)):
            for name, mine in methods.items() if theirs else ():
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


def _by_method(planned: Measurements) -> dict[str, Measurements]:
    """The settings of each method, and of any."""
    found: dict[str, Any] = {}
    for m in planned:
        name = "{coins}, {probabilities} p".format(**m.row) if m.row["coins"] else m.row["estimator"]
        found.setdefault(name, []).append(m)
    return found | {"any": planned} if planned else {}


def window(curve: Sequence[dict[str, Any]], least: float) -> dict[str, Any] | None:
    """The widest contiguous range of errors in which the lower 95% bound of the speed-up is at least `least`.

    curve: as in `speedups`. "factor": of the root mean squared errors at its ends. None if no point qualifies."""
    runs = [list(run) for holds, run in groupby(curve, lambda point: (point["lower95"] or 0) >= least) if holds]
    ends = [(run[0]["at"], run[-1]["at"]) for run in runs]
    if not ends:
        return None
    high, low = max(reversed(ends), key=lambda pair: pair[0] / pair[1])
    return {"least": least, "factor": math.sqrt(high / low), "rms_error": [math.sqrt(high), math.sqrt(low)]}


def chosen_blindly(
    ours: Measurements, theirs: Measurements, cost: str = "gflops_expected", seed: int = 0
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
