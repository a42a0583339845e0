"""Ablation of levels: how much more the same predicted error costs without each level.

The predicted frontier of all plans (planner.py) is compared with the frontier of the plans that do not use a level, in
FLOPs and in seconds. Plans may always skip a level, so a cost ratio is never below 1. If several levels can replace
each other, no single one of them is needed. So levels are also removed one by one, lowest cost ratio first, until every
remaining level earns its place.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from ..diffusion.level import Level
from ..errors import UserError
from .gains import Effects
from .plan import Plan
from .planner import Planner, price_range

MEAN, LARGEST = 0.02, 0.10  # savings with which a level earns its place: on geometric average, or at one error
_ABOVE_LOWEST = 1.1  # the comparison starts at this times the lowest error: below, only the finest grid counts
_POINTS = 97  # number of errors at which frontiers are compared


# ------------------------------------------------------------------------------------------------- seconds


@torch.no_grad()
def seconds_per_image(
    family: Sequence[Level],
    shape: tuple[int, ...],
    batch: int,
    device: torch.device | str = "cpu",
    runs: int = 9,
    warm_up: int = 2,
    at_least: float = 1.0,
) -> list[float]:
    """Seconds per image of one evaluation of each level on `batch` images of this shape.

    They are medians of at least `runs` runs after a warm-up; runs go on until `at_least` seconds have passed. The
    levels take turns, so that a short load on the machine slows all of them; run nothing else meanwhile. If a coin
    fires for few images of a batch, the level runs on a smaller batch, which costs more per image on a GPU.
    """
    device = torch.device(device)
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    # one number for all images, as in sampling, so that networks embed it once
    logsnr = torch.zeros((), device=device).expand(batch)
    times: list[list[float]] = [[] for _ in family]
    run, began = 0, time.perf_counter()
    while run < warm_up + runs or time.perf_counter() - began < at_least:
        for k, level in enumerate(family):
            _wait_for(device)
            started = time.perf_counter()
            level.denoise(x, logsnr)
            _wait_for(device)
            if run >= warm_up:
                times[k].append(time.perf_counter() - started)
        run += 1
    return [statistics.median(each) / batch for each in times]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ----------------------------------------------------------------------------------------------- frontiers


@dataclass(frozen=True)
class RuleInputs:
    """Inputs to the plans for one dynamics and step rule; arguments as in `planner.plans`."""

    effects: Effects
    methods: Sequence[str]
    grids: Mapping[int, np.ndarray]
    own_errors: Mapping[tuple[int, int], float]

    @property
    def rule(self) -> str:
        return f"{self.effects.dynamics}/{self.effects.step_rule}"


@dataclass(frozen=True)
class CostRatio:
    """Cost without a level over the cost with it, at equal predicted error: geometric mean and largest value.

    errors: range of squared errors, weighted evenly in their logarithm."""

    mean: float
    largest: float
    errors: tuple[float, float]

    def score(self, mean: float = MEAN, largest: float = LARGEST) -> float:
        """1 or more if the level earns its place; 0 if it saves nothing."""
        return max(math.log(self.mean) / math.log1p(mean), math.log(self.largest) / math.log1p(largest))


class Frontiers:
    """Predicted frontiers of a family and of its subsets, for one step rule and one unit of cost.

    Plans are cached. A plan of a subset is also a plan of each larger set, so the frontier of a subset is never below
    that of a larger set.
    """

    def __init__(
        self, measured: RuleInputs, planners: Sequence[tuple[int, Planner]], costs: Sequence[float] | np.ndarray
    ):
        self.measured = measured
        self.names = measured.effects.names
        costs_ = np.asarray(costs, dtype=np.float64)
        self.planners = [(steps, p.priced(costs_), price_range(p.effects, costs_, 2.0)) for steps, p in planners]
        self.pool: dict[str, Plan] = {}
        self.planned: set[frozenset[int]] = set()

    def find(self, levels: Collection[int]) -> None:
        """Compute the plans with these levels (indices), for every price, grid and method."""
        part = frozenset(levels)
        if part in self.planned:
            return
        self.planned.add(part)
        for steps, planner, prices in self.planners:
            for top in (k for k in part if (k, steps) in self.measured.own_errors):
                own = self.measured.own_errors[top, steps]
                for price in prices:
                    plan = planner.plan(top, float(price), among=part)
                    self.pool[plan.id] = replace(plan, steps=steps, predicted=own + (plan.added or 0.0))

    def hull(self, levels: Collection[int]) -> tuple[np.ndarray, np.ndarray]:
        """Squared errors (ascending) and costs (descending) of the lower convex hull of the plans with these levels.

        A mixture of two plans, one for some images and the other for the rest, has error and cost on the line between
        them. No such mixture beats a plan on the hull."""
        self.find(levels)
        names = {self.names[k] for k in levels}
        points = [(p.predicted or 0.0, p.cost) for p in self.pool.values() if names.issuperset(p.levels)]
        if not points:
            raise UserError(f"No plan for {self.measured.rule} can be made from the remaining levels.")
        out: list[tuple[float, float]] = []
        for error, cost in sorted(points):
            if out and cost >= out[-1][1]:
                continue  # not cheaper than a plan of smaller error
            while len(out) > 1 and _turns_up(out[-2], out[-1], (error, cost)):
                out.pop()
            out.append((error, cost))
        errors, costs = np.array(out).T
        return errors, costs

    def cost_ratio(self, levels: Collection[int], without: int) -> CostRatio:
        """The cost ratio of the level `without` among `levels`."""
        rest = [k for k in levels if k != without]
        self.find(rest)
        whole, part = self.hull(levels), self.hull(rest)
        low, high = self._range(levels, max(whole[0][0], part[0][0]))
        errors = np.geomspace(low, high, _POINTS)
        ratio = np.interp(errors, *part) / np.interp(errors, *whole)
        return CostRatio(float(np.exp(np.log(ratio).mean())), float(ratio.max()), (low, high))

    def _range(self, levels: Collection[int], lowest: float) -> tuple[float, float]:
        """The range of squared errors for the comparison, from a tenth above the lowest error.

        It ends at the error of the largest level alone on the coarsest grid, the largest error of interest. If this is
        below the start, for example with a single grid, it ends at the error of the cheapest plan."""
        top = len(self.names) - 1
        alone = [e for (k, _), e in self.measured.own_errors.items() if k == top]
        low, high = _ABOVE_LOWEST * lowest, max(alone, default=0.0)
        return (low, high) if high > low else (low, max(1.01 * low, self.hull(levels)[0][-1]))


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


# ------------------------------------------------------------------------------------------------ the verdict


@dataclass(frozen=True)
class Ablation:
    """An ablation in one unit of cost.

    cost_ratios: {level: {rule: CostRatio}} in the full family, for all but the largest level. removed: (level, its
    CostRatio by rule at removal), in order of removal. kept: the remaining levels. cost_ratio_among_kept: their cost
    ratios."""

    cost_ratios: dict[str, dict[str, CostRatio]]
    removed: list[tuple[str, dict[str, CostRatio]]]
    kept: tuple[str, ...]
    cost_ratio_among_kept: dict[str, dict[str, CostRatio]]


def remove_levels(
    frontiers: Sequence[Frontiers],
    mean: float = MEAN,
    largest: float = LARGEST,
    progress: Callable[[str], None] | None = None,
) -> Ablation:
    """Remove the level of the lowest cost ratio, repeatedly, until every remaining level earns its place.

    A level earns its place if, for some step rule, it saves more than `mean` of the cost on geometric average, or more
    than `largest` at one error. If cost ratios are equal, the most expensive level in FLOPs goes first. The largest
    level stays, since errors are measured against it. progress: called with a description of the current work."""
    names = frontiers[0].names
    left, removed, first = list(range(len(names))), [], None
    while True:
        if progress is not None:
            progress(f"{len(left)} levels")
        for f in frontiers:  # all plans before the first comparison, since a subset's plans belong to larger sets too
            for k in left[:-1]:
                f.find([other for other in left if other != k])
        now = {k: {f.measured.rule: f.cost_ratio(left, k) for f in frontiers} for k in left[:-1]}
        first = now if first is None else first
        scores = {k: max(w.score(mean, largest) for w in by_rule.values()) for k, by_rule in now.items()}
        least = min(scores, key=lambda k: (round(scores[k], 6), -k), default=None)
        if least is None or scores[least] > 1:
            break
        removed.append((names[least], now[least]))
        left.remove(least)
    named = [{names[k]: by_rule for k, by_rule in ratios.items()} for ratios in (first, now)]
    return Ablation(named[0], removed, tuple(names[k] for k in left), named[1])


def ablate(
    measured: Sequence[RuleInputs],
    seconds: Sequence[float],
    mean: float = MEAN,
    largest: float = LARGEST,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Ablation]:
    """{"flops": Ablation, "seconds": Ablation} of a family with measurements for several step rules.

    seconds [K]: per image, of one evaluation."""
    planners = []
    for rule in measured:
        grids = {steps: rule.effects.on(logsnr) for steps, logsnr in rule.grids.items()}
        planners.append(
            [(n, Planner(on_grid, m, rule.effects.flops)) for m in rule.methods for n, on_grid in grids.items()]
        )
    out = {}
    for unit, costs in (("flops", measured[0].effects.flops), ("seconds", seconds)):
        frontiers = [Frontiers(rule, found, costs) for rule, found in zip(measured, planners, strict=True)]
        report = None if progress is None else lambda what, unit=unit: progress(f"{unit}, {what}")
        out[unit] = remove_levels(frontiers, mean, largest, report)
    return out


def ablation_json(
    names: Sequence[str], flops: Sequence[float], seconds: Sequence[float], found: Mapping[str, Ablation]
) -> dict[str, Any]:
    """The content of ablation.json; the caller adds how seconds were measured."""
    levels = []
    for k, name in enumerate(names):
        entry: dict[str, Any] = {"name": name, "flops": float(flops[k]), "seconds": float(seconds[k])}
        entry |= {"flops_share": flops[k] / flops[-1], "seconds_share": seconds[k] / seconds[-1]}
        for unit, ablation in found.items():
            by_rule = ablation.cost_ratios.get(name)
            entry[f"cost_ratio_{unit}"] = by_rule and {rule: asdict(w) for rule, w in by_rule.items()}
            entry[f"kept_{unit}"] = name in ablation.kept
        levels.append(entry)
    removed = {
        unit: [
            {"name": name, "cost_ratio": {r: asdict(w) for r, w in by_rule.items()}}
            for name, by_rule in ablation.removed
        ]
        for unit, ablation in found.items()
    }
    kept = {unit: list(ablation.kept) for unit, ablation in found.items()}
    left = {
        u: {n: {r: asdict(w) for r, w in by.items()} for n, by in v.cost_ratio_among_kept.items()}
        for u, v in found.items()
    }
    return {"levels": levels, "removed": removed, "kept": kept, "cost_ratio_among_kept": left}


def table(content: Mapping[str, Any]) -> str:
    """ablation.json as text: shares of the largest level's cost, and the cost ratio as "mean (largest)", see `most`."""
    header = (
        "level",
        "MFLOP",
        "share",
        "us/image",
        "share",
        "cost ratio, FLOPs",
        "kept",
        "cost ratio, seconds",
        "kept",
    )
    rows = [header]
    for e in content["levels"]:
        cells = [e["name"], f"{e['flops'] / 1e6:.4g}", f"{e['flops_share']:.3g}"]
        cells += [f"{1e6 * e['seconds']:.4g}", f"{e['seconds_share']:.3g}"]
        for unit in ("flops", "seconds"):
            best = most(e[f"cost_ratio_{unit}"])
            cells += [f"{best['mean']:.3f} ({best['largest']:.2f})" if best else "-"]
            cells += ["yes" if e[f"kept_{unit}"] else "no"]
        rows.append(tuple(cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines.append(
        "cost ratio: cost at equal predicted error without the level, over the cost with it: geometric mean (largest),"
    )
    lines.append(
        "for the step rule that the level helps most. kept: levels that remain after removal by lowest cost ratio."
    )
    for unit, word in (("flops", "FLOPs"), ("seconds", "seconds")):
        gone = ", ".join(entry["name"] for entry in content["removed"][unit]) or "none"
        lines.append(f"In {word} {' + '.join(content['kept'][unit])} earn their place; removed, in order: {gone}.")
    return "\n".join(lines)


def most(by_rule: Mapping[str, Mapping[str, Any]] | None) -> Mapping[str, Any] | None:
    """The cost ratio of the rule with the largest one; None for the largest level."""
    return max(by_rule.values(), key=lambda w: (w["mean"], w["largest"])) if by_rule else None
