"""Speed-up of ML-EM over every baseline at equal error or distance, with one-sided 95% lower bounds.

For a baseline setting b that no other baseline beats in both cost and error, with error e_b,

    speed-up(b) = (cheapest baseline cost with error <= e_b) / (cheapest ML-EM cost with error <= e_b).

The targets are the errors of the baseline frontier itself, so a coarse baseline grid cannot favour ML-EM. The
bound is the 5th percentile over paired bootstrap resamples of the seeds, at the same b: each resample
recomputes e_b and the error of each setting. A resample in which ML-EM does not reach e_b counts as 0. The
largest of several noisy speed-ups is biased upwards. The bound does not correct for this selection, so the
full curve is returned too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .frechet import FeatureMoments, fast_frechet
from .table import BASELINES, method_of, trusted

COSTS = {"flops": "gflops_realised", "seconds": "seconds"}
_SLACK = 1e-9  # relative: rounding must not separate two settings that are the same sampler
_NAMING = ("step_rule", "estimator", "levels", "probabilities", "coins", "c", "switch", "steps", "plan")


@dataclass(frozen=True)
class Measurement:
    """One sampler setting: its compare.csv row (numeric costs per image) and its measurements per image.

    `errors` [n]: squared error of each seed, same seeds and order in all settings. `clusters` [n]: id of
    the coin draw of each seed, if coins are shared. `features` [m, D]: features of the samples, for distances.
    """

    row: dict[str, Any]
    errors: np.ndarray
    clusters: np.ndarray | None = None
    features: np.ndarray | None = None


def speedups(
    settings: Sequence[Measurement],
    *,
    reference: FeatureMoments | None = None,
    paper: Callable[[dict[str, Any]], bool] | None = None,
    replicates: int = 200,
    distance_replicates: int = 50,
    seed: int = 0,
) -> dict[str, Any]:
    """The content of speedup.json: one entry per dynamics; settings are compared within their dynamics only.

    {dynamics: {"paper" | "any": {"error" | "distance": {"flops" | "seconds": entry}}, "left_out": count}},
    where entry is {"max", "lower95", "at", "baseline", "ours", "curve"} and, for errors,
    "error_ratio_at_equal_cost". Costs are GFLOPs and seconds per image. "curve" lists {"at", "speedup",
    "lower95"} over the baseline frontier, from cheap to expensive. Unknown or unreached values are None, and so
    are all bounds if all seeds share one coin draw; no value is NaN.

    "any" compares all multilevel rows, "paper" the rows with `paper(row)` true (default: independent coins, as
    in `table.method_of`). "distance" is present if `reference` is given and any setting has features. ML-EM rows
    that evaluated the top level too rarely (`table.trusted`), and rows with errors that are not finite, are left
    out and counted. Raises UserError for settings of unequal length.
    """
    is_paper = paper or (lambda row: method_of(row) == "paper")
    result: dict[str, Any] = {}
    for dynamics in dict.fromkeys(str(s.row["dynamics"]) for s in settings):
        present = [s for s in settings if s.row["dynamics"] == dynamics]
        usable = [s for s in present if trusted(s.row) and bool(np.isfinite(s.errors).all())]
        base = [s for s in usable if s.row["estimator"] in BASELINES]
        multilevel = [s for s in usable if s.row["estimator"] not in BASELINES]
        memo: dict[Any, np.ndarray] = {}
        entry: dict[str, Any] = {}
        for method, ours in (("paper", [s for s in multilevel if is_paper(s.row)]), ("any", multilevel)):
            entry[method] = {"error": _compare(*_errors(base, ours, replicates, seed), kind="error")}
            if reference is not None and any(s.features is not None for s in base + multilevel):
                theirs, mine = ([s for s in group if s.features is not None] for group in (base, ours))
                measured = _distances(theirs, mine, reference, distance_replicates, seed, memo)
                entry[method]["distance"] = _compare(*measured, kind="distance")
        entry["left_out"] = len(present) - len(usable)
        result[dynamics] = entry
    return result


def resampled_errors(settings: Sequence[Measurement], replicates: int = 200, seed: int = 0) -> np.ndarray:
    """Mean squared errors [S, 1 + R]: first on all seeds, then on each paired bootstrap resample of them."""
    return np.stack([m.values for m in _errors(list(settings), [], replicates, seed)[0]])


def equal_error(
    base: list[Measurement],
    ours: list[Measurement],
    *,
    replicates: int = 200,
    seed: int = 0,
    cost: str = "gflops_expected",
) -> dict[str, Any]:
    """One entry as in `speedups` at equal error, for any two groups of settings.

    `cost` is the column of costs: expected FLOPs or "seconds". "errors_at_cost" lists {"gflops" (or "seconds"),
    "ratio", "lower95"} over the frontier of `ours`. "ratio" is the lowest error of `base` within that cost, divided by
    the error of the frontier point."""
    base_measured, our_measured = _errors(base, ours, replicates, seed)
    theirs, mine = (_sorted(group, cost) for group in (base_measured, our_measured))
    entry = _entry(theirs, mine, "error", "flops")
    points = []
    for i in mine.frontier():
        # the slack of 0.1%: plans of equal expected cost differ by the rounding of their probabilities
        ratios = theirs.lowest_within(1.001 * float(mine.costs[i])) / mine.values[i]
        known = bool(np.isfinite(ratios[0]))
        points.append({
            cost.removesuffix("_expected"): float(mine.costs[i]),
            "ratio": float(ratios[0]) if known else None,
            "lower95": _lower(ratios[1:]) if known else None,
        })  # fmt: skip
    return {**entry, "errors_at_cost": points}


# --------------------------------------------------------------------------------------- resampled values


@dataclass(frozen=True)
class _Measured:
    """A setting with its values [1 + R]: mean error or distance, first on all seeds, then on each resample."""

    setting: Measurement
    values: np.ndarray


def _errors(
    base: list[Measurement], ours: list[Measurement], replicates: int, seed: int
) -> tuple[list[_Measured], list[_Measured]]:
    settings = base + ours
    if not settings:
        return [], []
    counts = _resamples(_units(settings, [len(s.errors) for s in settings], "errors"), replicates, seed)
    matrix = np.stack([np.asarray(s.errors, dtype=np.float64) for s in settings])
    values = matrix @ counts / counts.sum(0)
    measured = [_Measured(s, v) for s, v in zip(settings, values, strict=True)]
    return measured[: len(base)], measured[len(base) :]


def _distances(
    base: list[Measurement],
    ours: list[Measurement],
    reference: FeatureMoments,
    replicates: int,
    seed: int,
    memo: dict[Any, np.ndarray],
) -> tuple[list[_Measured], list[_Measured]]:
    settings = base + ours
    if not settings:
        return [], []
    features = [np.asarray(s.features, dtype=np.float64) for s in settings]
    counts = _resamples(_units(settings, [len(f) for f in features], "features"), replicates, seed)
    tag = counts.tobytes()
    measured = []
    for setting, x in zip(settings, features, strict=True):
        key = id(setting), tag  # "paper" and "any" share the resamples unless only one has shared coins
        if key not in memo:
            projected = x @ reference.root
            memo[key] = np.array([fast_frechet(x, reference, c, projected) for c in counts.T])
        measured.append(_Measured(setting, memo[key]))
    return measured[: len(base)], measured[len(base) :]


def _units(settings: list[Measurement], lengths: list[int], what: str) -> np.ndarray:
    """The resampling unit of each seed [n]: seeds that share a coin draw in any setting form one unit."""
    if len(set(lengths)) != 1 or lengths[0] < 2:
        raise UserError(
            f"All settings need {what} of the same seeds, at least 2, but there are {sorted(set(lengths))}."
        )
    n = lengths[0]
    labels = np.arange(n)
    clusters = [np.unique(s.clusters[:n], return_inverse=True)[1].ravel() for s in settings if s.clusters is not None]
    if any(len(c) != n for c in clusters):
        raise UserError(f"Each of the {n} seeds of a setting needs the id of its coin draw.")
    changed = True
    while changed:  # spread the smallest label over each cluster until nothing changes: connected components
        before = labels.copy()
        for c in clusters:
            smallest = np.full(n, n)
            np.minimum.at(smallest, c, labels)
            labels = smallest[c]
        changed = not np.array_equal(before, labels)
    return np.unique(labels, return_inverse=True)[1].ravel()


def _resamples(units: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """How often each seed is drawn, float64 [n, 1 + R]: once each in the first column, then resampled by unit.

    A single unit gives no information about the spread, so R = 0."""
    groups = int(units.max()) + 1
    replicates = replicates if groups > 1 else 0
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=replicates).T
    return np.concatenate([np.ones((len(units), 1)), drawn[units].astype(np.float64)], axis=1)


# ------------------------------------------------------------------------------------------- comparison


def _compare(base: list[_Measured], ours: list[_Measured], kind: str) -> dict[str, Any]:
    return {name: _entry(_sorted(base, column), _sorted(ours, column), kind, column) for name, column in COSTS.items()}


@dataclass(frozen=True)
class _Table:
    """Settings sorted by one cost: costs [S] and values [S, 1 + R]."""

    settings: list[Measurement]
    costs: np.ndarray
    values: np.ndarray

    def frontier(self) -> list[int]:
        """Indices of the settings whose value no cheaper or equally cheap setting reaches, cheap to expensive."""
        chosen, lowest = [], math.inf
        for i, value in enumerate(self.values[:, 0]):
            if value < lowest:
                chosen.append(i)
                lowest = value
        return chosen

    def cheapest(self, target: np.ndarray) -> np.ndarray:
        """Index of the cheapest setting with value <= target, per column [1 + R]; S if no setting reaches it."""
        if not self.settings:
            return np.zeros(len(target), dtype=int)
        reached = self.values <= target + _SLACK * np.abs(target)
        return np.where(reached.any(0), reached.argmax(0), len(self.settings))

    def lowest_within(self, cost: float) -> np.ndarray:
        """Smallest value among settings of at most this cost, per column [1 + R]; infinite if there are none."""
        affordable = self.values[self.costs <= cost * (1 + _SLACK)]
        return affordable.min(0, initial=math.inf)


def _sorted(measured: list[_Measured], column: str) -> _Table:
    priced = [(_number(m.setting.row.get(column)), m) for m in measured]
    usable = [(cost, m) for cost, m in priced if cost is not None and cost > 0]
    usable.sort(key=lambda pair: (pair[0], pair[1].values[0]))
    values = np.stack([m.values for _, m in usable]) if usable else np.zeros((0, 1))
    return _Table([m.setting for _, m in usable], np.array([cost for cost, _ in usable], dtype=np.float64), values)


def _entry(base: _Table, ours: _Table, kind: str, column: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "max": None,
        "lower95": None,
        "at": None,
        "baseline": None,
        "ours": None,
        "curve": [],
    }
    top = -math.inf
    for b in base.frontier():
        target = base.values[b]
        theirs, mine = base.cheapest(target), ours.cheapest(target)
        ratios = base.costs[theirs] / np.append(ours.costs, math.inf)[mine]
        reached = bool(ratios[0] > 0)
        point = {
            "at": _number(target[0]),
            "speedup": float(ratios[0]) if reached else None,
            "lower95": _lower(ratios[1:]) if reached else None,
        }
        entry["curve"].append(point)
        if reached and ratios[0] > top:
            top = ratios[0]
            entry.update(max=point["speedup"], lower95=point["lower95"], at=point["at"])
            entry["baseline"] = _describe(base, int(theirs[0]), kind)
            entry["ours"] = _describe(ours, int(mine[0]), kind)
    if kind == "error":
        entry["error_ratio_at_equal_cost"] = _error_ratio(base, ours)
    return entry


def _error_ratio(base: _Table, ours: _Table) -> dict[str, Any]:
    """The largest (baseline error) / (lowest ML-EM error within the same cost), at the costs of the baseline frontier.

    Costs between two frontier points are not used, because a coarse grid of baselines would favour ML-EM."""
    found: dict[str, Any] = {"max": None, "lower95": None, "at": None}
    for i in base.frontier():
        cost = float(base.costs[i])
        theirs, mine = base.lowest_within(cost), ours.lowest_within(cost)
        if not np.isfinite(mine[0]) or mine.min() <= 0:
            continue  # no ML-EM setting is that cheap, or its error is exactly zero and the ratio is undefined
        ratios = theirs / mine
        if found["max"] is None or ratios[0] > found["max"]:
            found = {"max": float(ratios[0]), "lower95": _lower(ratios[1:]), "at": cost}
    return found


def _lower(ratios: np.ndarray) -> float | None:
    return float(np.quantile(ratios, 0.05, method="lower")) if len(ratios) else None


def _describe(table: _Table, index: int, kind: str) -> dict[str, Any]:
    """The identifying fields and the measured values of a setting, ready for JSON."""
    row = table.settings[index].row
    named = {key: _plain_value(row.get(key)) for key in _NAMING}
    measured = {key: _number(row.get(key)) for key in ("error", "distance", *COSTS.values())}
    return {**named, **measured, kind: _number(table.values[index, 0])}


def _number(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value) if math.isfinite(float(value)) else None


def _plain_value(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
