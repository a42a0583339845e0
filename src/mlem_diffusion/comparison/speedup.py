"""Speed-up of ML-EM over every baseline at equal error or distance, with one-sided 95% lower bounds.

For a baseline setting b that no other baseline beats in both cost and error, with error e_b,

    speed-up(b) = (cheapest baseline cost with error <= e_b) / (cheapest ML-EM cost with error <= e_b).

So a coarse baseline grid cannot favour ML-EM. The bound is the 5th percentile over paired bootstrap resamples of the
seeds, at the same b; each resample recomputes e_b and all errors, and counts as 0 if ML-EM does not reach e_b. The
largest of several noisy speed-ups is biased upwards, which the bound does not correct: see the full curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .frechet import FeatureMoments, fast_frechet
from .settings import Measurement, Row
from .table import BASELINES, method_of, trusted

COSTS = {"flops": "gflops_realised", "seconds": "seconds"}
_SLACK = 1e-9  # relative: rounding must not separate two settings that are the same sampler
_DESCRIBED = ("step_rule", "estimator", "levels", "probabilities", "coins", "c", "switch", "steps", "plan")
_DESCRIBED += ("error", "distance", *COSTS.values())


def speedups(
    settings: Sequence[Measurement], reference: FeatureMoments | None = None, replicates: int = 200,
    distance_replicates: int = 50, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The content of speedup.json: {dynamics: {"paper" | "any": {"error" | "distance": {"flops" | "seconds": entry}}}}.

    An entry is {"max", "lower95", "at", "baseline", "ours", "curve"} and, for errors, "error_ratio_at_equal_cost".
    "curve" lists {"at", "speedup", "lower95"} over the baseline frontier. Unreached values are None, and so are bounds
    if all seeds share one coin draw. "any" compares all multilevel rows, "paper" those with independent coins.
    """
    result: dict[str, Any] = {}
    for dynamics in dict.fromkeys(m.row["dynamics"] for m in settings):
        usable = [m for m in settings if m.row["dynamics"] == dynamics and trusted(m.row)]
        base = [m for m in usable if m.row["estimator"] in BASELINES]
        multilevel = [m for m in usable if m.row["estimator"] not in BASELINES]
        memo: dict[Any, np.ndarray] = {}
        result[dynamics] = {"paper": {}, "any": {}}
        paper = [m for m in multilevel if method_of(m.row) == "paper"]
        for method, ours in (("paper", paper), ("any", multilevel)):
            values = {"error": errors_of([*base, *ours], replicates, seed)}
            if reference is not None:
                values["distance"] = _distances([*base, *ours], reference, distance_replicates, seed, memo)
            for kind, value in values.items():
                result[dynamics][method][kind] = {
                    name: _compare(base, ours, value, column, kind) for name, column in COSTS.items()
                }
    return result


def equal_error(base: Sequence[Measurement], ours: Sequence[Measurement], cost: str, seed: int = 0) -> dict[str, Any]:
    """The "max", "lower95", ... of `speedups` at equal error, for two groups of settings and a column of costs."""
    entry = _compare(base, ours, errors_of([*base, *ours], 200, seed), cost, "error")
    del entry["error_ratio_at_equal_cost"]
    return entry


def summary(result: dict[str, Any]) -> str:
    """One line per speed-up in FLOPs."""
    lines = []
    for dynamics, method, measure in ((d, m, e) for d in result for m in result[d] for e in result[d][m]):
        found, low = (result[dynamics][method][measure]["flops"][key] for key in ("max", "lower95"))
        text = "never reaches a baseline" if found is None else f"{found:.3g}x (95% lower bound {low or 0:.3g}x)"
        lines.append(f"{dynamics}, {method}, FLOPs at equal {measure}: {text}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- resampled values


def errors_of(settings: Sequence[Measurement], replicates: int, seed: int) -> np.ndarray:
    """Mean squared errors [S, 1 + R]: first on all seeds, then on each paired bootstrap resample of them."""
    if not settings:
        return np.zeros((0, 1))
    counts = _resamples(settings, len(settings[0].errors), replicates, seed)
    return np.stack([m.errors for m in settings]) @ counts / counts.sum(0)


def _distances(
    settings: Sequence[Measurement], reference: FeatureMoments, replicates: int, seed: int, memo: dict[Any, np.ndarray]
) -> np.ndarray:
    """Distances [S, 1 + R] to the reference, in the manner of `errors_of`."""
    if not settings:
        return np.zeros((0, 1))
    features = [np.asarray(m.features, dtype=np.float64) for m in settings]
    counts = _resamples(settings, len(features[0]), replicates, seed)
    keys = [(id(m), counts.tobytes()) for m in settings]  # "paper" and "any" mostly share their resamples
    for key, x in zip(keys, features, strict=True):
        if key not in memo:
            projected = x @ reference.root
            memo[key] = np.array([fast_frechet(x, reference, c, projected) for c in counts.T])
    return np.stack([memo[key] for key in keys])


def _resamples(settings: Sequence[Measurement], n: int, replicates: int, seed: int) -> np.ndarray:
    """How often each seed is drawn, float64 [n, 1 + R]: once each in the first column, then resampled by unit.

    Seeds that share a coin draw in any setting form one unit. A single unit gives no information, so R = 0."""
    clusters = [np.unique(m.clusters[:n], return_inverse=True)[1].ravel() for m in settings if m.clusters is not None]
    labels, before = np.arange(n), np.empty(0)
    while not np.array_equal(labels, before):  # connected components: spread the smallest label over each cluster
        before = labels
        for c in clusters:
            smallest = np.full(n, n)
            np.minimum.at(smallest, c, labels)
            labels = smallest[c]
    units = np.unique(labels, return_inverse=True)[1].ravel()
    groups = int(units.max()) + 1
    replicates = replicates if groups > 1 else 0
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=replicates).T
    return np.concatenate([np.ones((n, 1)), drawn[units].astype(np.float64)], axis=1)


# ------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class _Group:
    """Settings with a positive cost, sorted by it: rows, costs [S] and values [S, 1 + R]."""

    rows: list[Row]
    costs: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, settings: Sequence[Measurement], values: np.ndarray, column: str) -> _Group:
        costs = np.array([m.row[column] for m in settings])
        usable = [i for i in np.lexsort((values[:, 0], costs)) if costs[i] > 0]
        return cls([settings[i].row for i in usable], costs[usable], values[usable])

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


def _compare(
    left: Sequence[Measurement], right: Sequence[Measurement], values: np.ndarray, column: str, kind: str
) -> dict[str, Any]:
    """The entry for baselines and our settings. values: theirs, then ours."""
    base, ours = _Group.of(left, values[: len(left)], column), _Group.of(right, values[len(left) :], column)
    entry: dict[str, Any] = dict.fromkeys(("max", "lower95", "at", "baseline", "ours")) | {"curve": []}
    for b in base.frontier():
        target = base.values[b]
        theirs, mine = base.cheapest(target), ours.cheapest(target)
        ratios = base.costs[theirs] / np.append(ours.costs, math.inf)[mine]
        speed, low = (float(ratios[0]), _lower(ratios)) if ratios[0] > 0 else (None, None)
        entry["curve"].append({"at": float(target[0]), "speedup": speed, "lower95": low})
        if speed is not None and speed > (entry["max"] or 0):
            entry |= {"max": speed, "lower95": low, "at": float(target[0])}
            for side, group, best in (("baseline", base, theirs[0]), ("ours", ours, mine[0])):
                described = {key: group.rows[best].get(key) for key in _DESCRIBED}
                entry[side] = described | {kind: float(group.values[best, 0])}
    if kind == "error":
        entry["error_ratio_at_equal_cost"] = _error_ratio(base, ours)
    return entry


def _error_ratio(base: _Group, ours: _Group) -> dict[str, Any]:
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
