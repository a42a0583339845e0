"""Speed-ups at equal error of one group of settings over another, with one-sided 95% lower bounds.

For a baseline setting b that no other baseline beats in both cost and error, with squared error e_b,

    speed-up(b) = (least cost of the baselines at error e_b) / (least cost of ours at error e_b).

Both sides may *mix* two settings: chance decides for every image, so mean cost and mean squared error are averages of
theirs, and least cost against error is a convex curve with corners at the best settings. So neither side gains or loses
by the gaps between its step counts. Between two neighbouring points b the baselines' curve is straight and ours is on
or below its chord, and a quotient of averages is at least the smaller of the two quotients. So what holds at
neighbouring points holds everywhere between them. Windows may therefore end between two points b.

The bound is the 5th percentile over replicates, at the same b: each resamples the seeds, paired over all settings, and
draws all timings anew; it recomputes e_b and both curves, and counts as 0 if ours does not reach e_b."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from ..statistics import frontier, lower_hull
from .settings import Measurement, Row

Measurements = Sequence[Measurement]
SPAN = 2.0  # factor in rms error over which a headline must hold
_PARTS = 8  # errors at which a window may end, between two neighbouring baselines
_SLACK = 1e-9  # relative: rounding must not separate two settings that are the same sampler
_DESCRIBED = ("step_rule", "estimator", "levels", "probabilities", "coins", "c", "switch", "steps", "plan", "error")
_DESCRIBED += ("gflops_realised", "seconds")


def errors_of(settings: Measurements, replicates: int, seed: int) -> np.ndarray:
    """Mean squared errors [S, 1 + R]: first on all seeds, then on each paired bootstrap resample; R = 0 with one.
    Of several shared patterns the mean; the resamples draw anew from them, too."""
    if not settings:
        return np.zeros((0, 1))
    rng, patterns = np.random.default_rng(seed), np.random.default_rng(seed + 2)
    n = max(m.errors.shape[-1] for m in settings)
    count = replicates if n > 1 else 0
    counts, found = _resamples(rng, n, count), []
    for m in settings:
        own = counts[: m.errors.shape[-1]]  # shared patterns may run on the first seeds only
        means = np.atleast_2d(m.errors) @ own / np.maximum(own.sum(axis=0), 1)
        found.append((means * _resamples(patterns, len(means), count)).mean(axis=0) if len(means) > 1 else means[0])
    return np.stack(found)


def _resamples(rng: np.random.Generator, n: int, replicates: int) -> np.ndarray:
    """How often each of n things is drawn [n, 1 + R]: first once each, then with replacement."""
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=replicates).T
    return np.concatenate([np.ones((n, 1)), drawn.astype(np.float64)], axis=1)


@dataclass(frozen=True, eq=False)
class Group:
    """Settings: rows, costs per image [S, 1 + R] and squared errors [S, 1 + R]. The first column is the measured one,
    the others are replicates, drawn together with those of the other group."""

    rows: list[Row]
    costs: np.ndarray
    errors: np.ndarray

    @property
    def turned(self) -> "Group":
        """The same settings with costs and errors exchanged: `compare` then finds ratios of errors at equal cost."""
        return Group(self.rows, self.errors, self.costs)

    def frontier(self) -> list[int]:
        """Indices of the settings whose error no cheaper or equally cheap setting reaches, cheap to expensive."""
        points = zip(self.costs[:, 0].tolist(), self.errors[:, 0].tolist(), strict=True)
        rows = [{"index": i, "cost": cost, "error": error} for i, (cost, error) in enumerate(points)]
        return [row["index"] for row in frontier(rows, "cost", "error")]

    def least_costs(self, targets: np.ndarray) -> np.ndarray:
        """Least cost [P, 1 + R] at squared errors [P, 1 + R], mixtures included; infinite if it is not reached."""
        found = np.full(targets.shape, math.inf)
        for r, (error, cost) in enumerate(self._curves if self.rows else []):
            found[:, r] = np.interp(targets[:, r] * (1 + _SLACK), error, cost, left=math.inf)
        return found

    @cached_property
    def _curves(self) -> list[tuple[list[float], list[float]]]:
        """The `lower_hull` of every replicate."""
        order = np.lexsort((self.errors, self.costs), axis=0)
        errors, costs = (np.take_along_axis(values, order, 0) for values in (self.errors, self.costs))
        better = errors < np.minimum.accumulate(np.pad(errors, ((1, 0), (0, 0)), constant_values=math.inf)[:-1])
        points = [np.stack([e[b], c[b]], axis=1) for e, c, b in zip(errors.T, costs.T, better.T, strict=True)]
        return [lower_hull(found[::-1].tolist()) for found in points]

    def described(self, target: float) -> Row | None:
        """What the files say about the cheapest setting that reaches this squared error alone."""
        reached = np.flatnonzero(self.errors[:, 0] <= target * (1 + _SLACK))
        if not len(reached):
            return None
        i = reached[self.costs[reached, 0].argmin()]
        return {key: self.rows[i].get(key) for key in _DESCRIBED} | {"error": float(self.errors[i, 0])}


def compare(base: Group, ours: Group, coarsest: float = math.inf) -> dict[str, Any]:
    """{"window": `headline`, "max", "curve"} of two groups, at squared errors <= coarsest.
    "curve" lists {"at": squared error, "speedup", "lower95"} at the points of the baselines' frontier, coarse to fine;
    the window is found on _PARTS times as many. "max" is the curve's largest point, with the cheapest settings that
    reach it alone as "baseline" and "ours"; mixtures may cost less than these. Unreached values are None, and so are
    bounds without replicates."""
    roots = np.sqrt(base.errors[base.frontier()])
    between = np.linspace(roots[:-1], roots[1:], _PARTS, endpoint=False, axis=1).reshape(-1, roots.shape[1])
    targets = np.concatenate([between, roots[-1:]]) ** 2
    targets = targets[targets[:, 0] <= coarsest * (1 + _SLACK)]
    ratios, fine = base.least_costs(targets) / ours.least_costs(targets), []
    for target, ratio in zip(targets[:, 0].tolist(), ratios, strict=True):
        speed, low = (float(ratio[0]), lower(ratio)) if ratio[0] > 0 else (None, None)
        fine.append({"at": target, "speedup": speed, "lower95": low})
    curve = fine[::-_PARTS][::-1]  # the baselines themselves: counted from the end, since `coarsest` cuts the start
    best = max((p for p in curve if p["speedup"] is not None), key=lambda p: p["speedup"], default=None)
    best = best and best | {"baseline": base.described(best["at"]), "ours": ours.described(best["at"])}
    return {"window": headline(fine), "max": best, "curve": curve}


def lower(ratios: np.ndarray) -> float | None:
    """The 5th percentile over the replicates of [1 + R]."""
    return float(np.quantile(ratios[1:], 0.05, method="lower")) if len(ratios) > 1 else None


def window(curve: Sequence[dict[str, Any]], least: float) -> dict[str, Any] | None:
    """The widest contiguous range of errors in which the lower 95% bound of the speed-up is at least `least`.
    curve: as in `compare`. "factor": of the rms errors at its ends. None if no point qualifies."""
    runs = [list(run) for holds, run in groupby(curve, lambda point: (point["lower95"] or 0.0) >= least) if holds]
    ends = [(run[0]["at"], run[-1]["at"]) for run in runs]
    if not ends:
        return None
    high, low = max(reversed(ends), key=lambda pair: pair[0] / pair[1])
    return {"least": least, "factor": math.sqrt(high / low), "rms_error": [math.sqrt(high), math.sqrt(low)]}


def headline(curve: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """{"lower95": x, "rms_error": [from, to]}: the largest x that the lower bound keeps throughout a factor SPAN in rms
    error, and the widest range in which it does; None if there is none above 0, or if the curve spans less."""
    for x in sorted({point["lower95"] for point in curve if point["lower95"]}, reverse=True):
        found = window(curve, x)
        if found is not None and found["factor"] >= SPAN * (1 - _SLACK):
            return {"lower95": x, "rms_error": found["rms_error"]}
    return None
