"""Speed-up of ML-EM over every baseline at equal error or distance, with one-sided 95% lower bounds.

For a baseline setting b that no other baseline beats in both cost and error, with error e_b,

    speed-up(b) = (cheapest baseline cost with error <= e_b) / (cheapest ML-EM cost with error <= e_b).

The targets are the errors of the baseline frontier itself, so a coarse baseline grid cannot favour ML-EM. The bound is
the 5th percentile over paired bootstrap resamples of the seeds, at the same b: each resample recomputes e_b and the
error of each setting. A resample in which ML-EM does not reach e_b counts as 0. The largest of several noisy speed-ups
is biased upwards; the bound does not correct for this selection, so the full curve is returned too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .frechet import FeatureMoments, fast_frechet
from .settings import Measurement, Row
from .table import BASELINES, method_of, trusted

COSTS = {"flops": "gflops_realised", "seconds": "seconds"}
_SLACK = 1e-9  # relative: rounding must not separate two settings that are the same sampler
_DESCRIBED = ("step_rule", "estimator", "levels", "probabilities", "coins", "c", "switch", "steps", "plan")
_DESCRIBED += ("error", "distance", *COSTS.values())


def speedups(
    settings: Sequence[Measurement],
    reference: FeatureMoments | None = None,
    replicates: int = 200,
    distance_replicates: int = 50,
    seed: int = 0,
) -> dict[str, Any]:
    """The content of speedup.json: one entry per dynamics; settings are compared within their dynamics only.

    {dynamics: {"paper" | "any": {"error" | "distance": {"flops" | "seconds": entry}}, "left_out": count}},
    where entry is {"max", "lower95", "at", "baseline", "ours", "curve"} and, for errors,
    "error_ratio_at_equal_cost". "curve" lists {"at", "speedup", "lower95"} over the baseline frontier, from cheap to
    expensive. Unknown or unreached values are None, and so are all bounds if all seeds share one coin draw.

    "any" compares all multilevel rows, "paper" those with independent coins (`table.method_of`). "distance" is
    present if `reference` is given and any setting has features. ML-EM rows that evaluated the top level too rarely
    (`table.trusted`), and errors that are not finite, are left out and counted. Raises UserError for unequal lengths.
    """
    result: dict[str, Any] = {}
    for dynamics in dict.fromkeys(m.row["dynamics"] for m in settings):
        present = [m for m in settings if m.row["dynamics"] == dynamics]
        usable = [m for m in present if trusted(m.row) and bool(np.isfinite(m.errors).all())]
        base = [m for m in usable if m.row["estimator"] in BASELINES]
        multilevel = [m for m in usable if m.row["estimator"] not in BASELINES]
        memo: dict[Any, np.ndarray] = {}
        entry: dict[str, Any] = {}
        paper = [m for m in multilevel if method_of(m.row) == "paper"]
        for method, ours in (("paper", paper), ("any", multilevel)):
            errors = resampled_errors([*base, *ours], replicates, seed)
            entry[method] = {"error": _compare(base, ours, errors, "error")}
            if reference is not None and any(m.features is not None for m in usable):
                theirs, mine = ([m for m in group if m.features is not None] for group in (base, ours))
                distances = _resampled_distances([*theirs, *mine], reference, distance_replicates, seed, memo)
                entry[method]["distance"] = _compare(theirs, mine, distances, "distance")
        result[dynamics] = entry | {"left_out": len(present) - len(usable)}
    return result


def equal_error(
    base: Sequence[Measurement], ours: Sequence[Measurement], *, seed: int = 0, cost: str = "gflops_expected"
) -> dict[str, Any]:
    """One entry as in `speedups` at equal error, for any two groups of settings.

    `cost` is the column of costs: expected FLOPs or "seconds". "errors_at_cost" lists {"gflops" (or "seconds"),
    "ratio", "lower95"} over the frontier of `ours`. "ratio" is the lowest error of `base` within that cost, divided by
    the error of the frontier point."""
    values = resampled_errors([*base, *ours], seed=seed)
    theirs, mine = _Group.of(base, values[: len(base)], cost), _Group.of(ours, values[len(base) :], cost)
    points = []
    for i in mine.frontier():
        # the slack of 0.1%: plans of equal expected cost differ by the rounding of their probabilities
        ratios = theirs.lowest_within(1.001 * float(mine.costs[i])) / mine.values[i]
        known = bool(np.isfinite(ratios[0]))
        point = {"ratio": float(ratios[0]), "lower95": _lower(ratios[1:])} if known else dict(ratio=None, lower95=None)
        points.append({cost.removesuffix("_expected"): float(mine.costs[i]), **point})
    return {**_entry(theirs, mine, "error"), "errors_at_cost": points}


def summary(result: dict[str, Any]) -> str:
    """One line per speed-up in FLOPs."""
    lines = []
    for dynamics, method, measure in ((d, m, e) for d in result for m in ("paper", "any") for e in result[d][m]):
        found, low = (result[dynamics][method][measure]["flops"][key] for key in ("max", "lower95"))
        bound = "unknown" if low is None else f"{low:.2f}x"
        text = "never reaches a baseline" if found is None else f"{found:.2f}x (95% lower bound {bound})"
        lines.append(f"{dynamics}, {method}, FLOPs at equal {measure}: {text}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- resampled values


def resampled_errors(settings: Sequence[Measurement], replicates: int = 200, seed: int = 0) -> np.ndarray:
    """Mean squared errors [S, 1 + R]: first on all seeds, then on each paired bootstrap resample of them."""
    if not settings:
        return np.zeros((0, 1))
    counts = _resamples(_units(settings, [len(m.errors) for m in settings], "errors"), replicates, seed)
    return np.stack([np.asarray(m.errors, dtype=np.float64) for m in settings]) @ counts / counts.sum(0)


def _resampled_distances(
    settings: Sequence[Measurement], reference: FeatureMoments, replicates: int, seed: int, memo: dict[Any, np.ndarray]
) -> np.ndarray:
    """Distances [S, 1 + R] to the reference, in the manner of `resampled_errors`."""
    if not settings:
        return np.zeros((0, 1))
    features = [np.asarray(m.features, dtype=np.float64) for m in settings]
    counts = _resamples(_units(settings, [len(x) for x in features], "features"), replicates, seed)
    keys = [(id(m), counts.tobytes()) for m in settings]  # "paper" and "any" mostly share their resamples
    for key, x in zip(keys, features, strict=True):
        if key not in memo:
            projected = x @ reference.root
            memo[key] = np.array([fast_frechet(x, reference, c, projected) for c in counts.T])
    return np.stack([memo[key] for key in keys])


def _units(settings: Sequence[Measurement], lengths: list[int], what: str) -> np.ndarray:
    """The resampling unit of each seed [n]: seeds that share a coin draw in any setting form one unit."""
    if len(set(lengths)) != 1 or lengths[0] < 2:
        found = sorted(set(lengths))
        raise UserError(f"All settings need {what} of the same seeds, at least 2, but there are {found}.")
    n = lengths[0]
    clusters = [np.unique(m.clusters[:n], return_inverse=True)[1].ravel() for m in settings if m.clusters is not None]
    if any(len(c) != n for c in clusters):
        raise UserError(f"Each of the {n} seeds of a setting needs the id of its coin draw.")
    labels, before = np.arange(n), np.empty(0)
    while not np.array_equal(labels, before):  # connected components: spread the smallest label over each cluster
        before = labels
        for c in clusters:
            smallest = np.full(n, n)
            np.minimum.at(smallest, c, labels)
            labels = smallest[c]
    return np.unique(labels, return_inverse=True)[1].ravel()


def _resamples(units: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """How often each seed is drawn, float64 [n, 1 + R]: once each in the first column, then resampled by unit.

    A single unit gives no information about the spread, so R = 0."""
    groups = int(units.max()) + 1
    replicates = replicates if groups > 1 else 0
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=replicates).T
    return np.concatenate([np.ones((len(units), 1)), drawn[units].astype(np.float64)], axis=1)


# ------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class _Group:
    """Settings sorted by one cost: rows, costs [S] and values [S, 1 + R]."""

    rows: list[Row]
    costs: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, settings: Sequence[Measurement], values: np.ndarray, column: str) -> _Group:
        """The settings with a positive cost in this column."""
        costs = [m.row.get(column) or 0.0 for m in settings]
        usable = sorted((i for i in range(len(costs)) if costs[i] > 0), key=lambda i: (costs[i], values[i, 0]))
        return cls([settings[i].row for i in usable], np.array([costs[i] for i in usable]), values[usable])

    def frontier(self) -> list[int]:
        """Indices of the settings whose value no cheaper or equally cheap setting reaches, cheap to expensive."""
        first = self.values[:, 0]
        return [i for i in range(len(first)) if first[i] < first[:i].min(initial=math.inf)]

    def cheapest(self, target: np.ndarray) -> np.ndarray:
        """Index of the cheapest setting with value <= target, per column [1 + R]; S if no setting reaches it."""
        if not self.rows:
            return np.zeros(len(target), dtype=int)
        reached = self.values <= target + _SLACK * np.abs(target)
        return np.where(reached.any(0), reached.argmax(0), len(self.rows))

    def lowest_within(self, cost: float) -> np.ndarray:
        """Smallest value among settings of at most this cost, per column [1 + R]; infinite if there are none."""
        return self.values[self.costs <= cost * (1 + _SLACK)].min(0, initial=math.inf)

    def describe(self, index: int, kind: str) -> dict[str, Any]:
        """The identifying fields and the measured values of a setting."""
        row = self.rows[index]
        return {key: row.get(key) for key in _DESCRIBED} | {kind: float(self.values[index, 0])}


def _compare(base: list[Measurement], ours: list[Measurement], values: np.ndarray, kind: str) -> dict[str, Any]:
    """An entry for each kind of cost. values: of the settings of `base`, then of `ours`."""
    entries, n = {}, len(base)
    for name, column in COSTS.items():
        entries[name] = _entry(_Group.of(base, values[:n], column), _Group.of(ours, values[n:], column), kind)
    return entries


def _entry(base: _Group, ours: _Group, kind: str) -> dict[str, Any]:
    entry: dict[str, Any] = dict.fromkeys(("max", "lower95", "at", "baseline", "ours")) | {"curve": []}
    for b in base.frontier():
        target = base.values[b]
        theirs, mine = base.cheapest(target), ours.cheapest(target)
        ratios = base.costs[theirs] / np.append(ours.costs, math.inf)[mine]
        reached = bool(ratios[0] > 0)
        speed, low = (float(ratios[0]), _lower(ratios[1:])) if reached else (None, None)
        entry["curve"].append({"at": float(target[0]), "speedup": speed, "lower95": low})
        if speed is not None and speed > (entry["max"] or 0):
            entry |= {"max": speed, "lower95": low, "at": float(target[0])}
            entry["baseline"], entry["ours"] = base.describe(theirs[0], kind), ours.describe(mine[0], kind)
    if kind == "error":
        entry["error_ratio_at_equal_cost"] = _error_ratio(base, ours)
    return entry


def _error_ratio(base: _Group, ours: _Group) -> dict[str, Any]:
    """The largest (baseline error) / (lowest ML-EM error within the same cost), at the costs of the baseline frontier.

    Costs between two frontier points are not used, because a coarse grid of baselines would favour ML-EM."""
    found: dict[str, Any] = {"max": None, "lower95": None, "at": None}
    for cost in map(float, base.costs[base.frontier()]):
        theirs, mine = base.lowest_within(cost), ours.lowest_within(cost)
        # unless no ML-EM setting is that cheap, or its error is exactly zero
        if np.isfinite(mine[0]) and mine.min() > 0 and theirs[0] / mine[0] > (found["max"] or 0):
            ratios = theirs / mine
            found = {"max": float(ratios[0]), "lower95": _lower(ratios[1:]), "at": cost}
    return found


def _lower(ratios: np.ndarray) -> float | None:
    return float(np.quantile(ratios, 0.05, method="lower")) if len(ratios) else None
