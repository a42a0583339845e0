"""Ablation of levels: how much more the same predicted error costs without each level.
Of levels that can replace each other no single one is needed, so they are also removed one by one."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..errors import UserError
from ..statistics import lower_hull
from .plan import Plan, Progress
from .planner import Calibration

_ABOVE_LOWEST = 1.1  # the comparison starts at this times the lowest error: below, only the finest grid counts
_POINTS = 97  # number of errors at which frontiers are compared
# cost without a level over the cost with it, at equal predicted error: {"mean": geometric, "largest", "errors": range}
Ratio = dict[str, Any]


class Frontiers:
    """Predicted frontiers of a family and of its subsets, for one step rule.
    Plans are cached. A plan of a subset is also a plan of each larger set, so no cost ratio is below 1."""

    def __init__(self, inputs: Calibration):
        self.inputs, self.names = inputs, inputs.effects.names
        self.pool: dict[str, Plan] = {}
        self.planned: set[frozenset[int]] = set()

    def find(self, levels: Collection[int]) -> None:
        """Compute the plans with these levels (indices), for every price, grid and method."""
        part = frozenset(levels)
        if part in self.planned:
            return
        self.planned.add(part)
        for planner in itertools.chain(*map(self.inputs.planners, self.inputs.methods)):
            for top in part.intersection(planner.tops):
                found = [planner.plan(top, price, among=part) for price in planner.prices(2.0)]
                self.pool |= {plan.id: plan for plan in found}

    def hull(self, levels: Collection[int]) -> tuple[np.ndarray, np.ndarray]:
        """The `lower_hull` of the plans with these levels; a mixture is two plans, each for some of the images."""
        self.find(levels)
        names = {self.names[k] for k in levels}
        points = [(p.predicted or 0.0, p.cost) for p in self.pool.values() if names.issuperset(p.levels)]
        if not points:
            raise UserError(f"No plan for {self.inputs.rule} can be made from the remaining levels.")
        errors, costs = np.array(lower_hull(sorted(points)))
        return errors, costs

    def cost_ratio(self, levels: Collection[int], without: int) -> Ratio:
        """The cost ratio of the level `without` among `levels`, over errors weighted evenly in their logarithm, up to
        that of the largest level alone on the coarsest grid, or, if that is too low, of the cheapest plan."""
        rest = [k for k in levels if k != without]
        self.find(rest)
        whole, part = self.hull(levels), self.hull(rest)
        low = _ABOVE_LOWEST * max(whole[0][0], part[0][0])
        high = max((e for (k, _), e in self.inputs.own_errors.items() if k == len(self.names) - 1), default=0.0)
        if high <= low:
            high = max(1.01 * low, whole[0][-1])
        errors = np.geomspace(low, high, _POINTS)
        ratio = np.interp(errors, *part) / np.interp(errors, *whole)
        mean, largest = float(np.exp(np.log(ratio).mean())), float(ratio.max())
        return {"mean": mean, "largest": largest, "errors": [float(low), float(high)]}


def remove_levels(
    rules: Sequence[Calibration], mean: float, largest: float, progress: Progress
) -> tuple[dict[str, dict[str, Ratio]], list[str]]:
    """Remove the level of the lowest cost ratio, repeatedly, until each level earns its place for some rule: without it
    the cost would rise by more than `mean` on geometric average, or by more than `largest` at one error.

    Of equal ones the most expensive goes first. The largest level stays, since errors are measured against it.
    Returns {level: {rule: Ratio}} in the full family, and the names of the levels that are kept."""
    limits = {"mean": math.log1p(mean), "largest": math.log1p(largest)}
    names, frontiers = rules[0].effects.names, [Frontiers(rule) for rule in rules]
    left, first = list(range(len(names))), {}
    while True:
        progress(1 + len(names) - len(left), len(names))
        for f in frontiers:  # all plans before the first comparison, since a subset's plans belong to larger sets too
            for k in left[:-1]:
                f.find([other for other in left if other != k])
        ratios = {k: {f.inputs.rule: f.cost_ratio(left, k) for f in frontiers} for k in left[:-1]}
        first = first or {names[k]: by_rule for k, by_rule in ratios.items()}
        scores = {
            k: max(math.log(ratio[name]) / limit for ratio in by_rule.values() for name, limit in limits.items())
            for k, by_rule in ratios.items()
        }
        least = min(scores, key=lambda k: (round(scores[k], 6), -k), default=None)
        if least is None or scores[least] > 1:
            return first, [names[k] for k in left]
        left.remove(least)


def table(content: Mapping[str, Any]) -> str:
    """ablation.json as text; ratios are geometric means (largest) for the step rule that a level helps most."""
    rows = []
    for e in content["levels"]:
        row = {"level": e["name"], "MFLOP": f"{e['flops'] / 1e6:.4g}", "us/image": f"{1e6 * e['seconds']:.4g}"}
        for unit in content["kept"]:
            ratios = (e[f"cost_ratio_{unit}"] or {}).values()
            row[f"ratio, {unit}"] = max((f"{r['mean']:.3f} ({r['largest']:.2f})" for r in ratios), default="-")
        rows.append(row)
    lines = [f"Levels that pay off in {unit}: {' + '.join(kept)}." for unit, kept in content["kept"].items()]
    return "\n".join([pd.DataFrame(rows).to_string(index=False), *lines])
