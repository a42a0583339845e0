"""Candidate plans for one step rule, and the choice among them by measured errors.

Probabilities or weights are optimal for the predicted error (planner.py), or follow the square-root law from measured
differences, constant in time (probabilities.measured_probabilities), or are learned by SGD (learned.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..diffusion.level import Level
from ..diffusion.process import Process
from .plan import Plan, frontier
from .planner import RuleInputs, plan_for_cost, plans
from .probabilities import evaluation_probabilities, measured_probabilities, probabilities_for_cost

Candidates = dict[str, list[Plan]]  # keys "method, probabilities"
Learn = Callable[[float, Plan], np.ndarray]  # cost in evaluations of the largest level, plan to start from -> p [n, K]
Progress = Callable[[int, int], object]


def steps_alone(level: Level, largest: Level, steps: Sequence[int]) -> list[int]:
    """The grids on which a level is run alone; fine grids leave out the cheap levels, which add nothing there."""
    return [n for n in steps if n <= 600 or level.flops > 0.5 * largest.flops]


def candidates(
    inputs: RuleInputs,
    process: Process,
    options: Any,
    costs: np.ndarray,
    learn: Learn | None = None,
    progress: Progress = lambda done, total: None,
) -> Candidates:
    """Thinned predicted frontiers of all methods for one rule.

    options: the node `optimise` of the configuration. costs [K]: of one evaluation of each level, to be minimised."""
    found: Candidates = {}
    top = len(costs) - 1
    for method in inputs.methods:
        chosen: dict[str, Plan] = {}
        for base in (b for b in options.bases if b is None or b < top):
            best = plans(inputs, method, costs, base=base, progress=progress)
            chosen |= {p.id: p for p in spread([p for p in best if len(p.levels) > 1], options.plans)}
        for cost in options.measured.costs:  # at the same costs as the measured probabilities
            plan = plan_for_cost(inputs, method, cost * costs[-1], costs)
            if plan is not None and len(plan.levels) > 1:
                chosen[plan.id] = plan
        found[f"{method}, optimal"] = list(chosen.values())
    measured = measured_plans(inputs, process, options.measured, costs)
    learned = learned_plans(inputs, process, options.learned, costs, measured, learn) if learn and measured else []
    for key, group in (("measured", measured), ("learned", learned)):
        known = [(top, p.steps) in inputs.own_errors for p in group]
        found[f"independent, {key}"] = [
            inputs.complete(p, top, p.steps) if k else p for p, k in zip(group, known, strict=True)
        ]
    return found


def spread(found: list[Plan], most: int) -> list[Plan]:
    """At most `most` of a frontier's plans, spread evenly and including both ends."""
    if len(found) <= most:
        return found
    return [found[i] for i in np.unique(np.round(np.linspace(0, len(found) - 1, most)).astype(int))]


def measured_plans(inputs: RuleInputs, process: Process, options: Any, costs: np.ndarray) -> list[Plan]:
    """Plans by the square-root law from measured differences, constant in time, at the configured costs and steps."""
    squares, unit, out = inputs.effects.squares @ process.drift_weights(inputs.effects.logsnr), costs.tolist(), []
    for steps in options.steps:
        for cost in options.costs:
            p = probabilities_for_cost(lambda c: measured_probabilities(squares, unit, c), unit, steps, cost * unit[-1])
            if p is not None:
                out.append(_plan("measured", inputs, process.grid(steps).logsnr, p, costs))
    return out


def learned_plans(
    inputs: RuleInputs, process: Process, options: Any, costs: np.ndarray, start: list[Plan], learn: Learn
) -> list[Plan]:
    """Plans with learned probabilities, started from measured ones of similar cost."""
    logsnr, out = process.grid(options.steps).logsnr, []
    for cost in options.costs:
        wanted = cost * costs[-1]
        nearest = min(start, key=lambda p: (p.steps != options.steps, abs(np.log(p.cost / wanted))))
        out.append(_plan("learned", inputs, logsnr, learn(cost, nearest), costs))
    return out


def _plan(source: str, inputs: RuleInputs, logsnr: np.ndarray, p: np.ndarray, costs: np.ndarray) -> Plan:
    """A plan for independent coins on the full family, with its predicted added error."""
    names, gains = inputs.effects.names, inputs.effects.on(logsnr).gains()[0][1:].T
    table = np.broadcast_to(p, (len(logsnr), len(names))).astype(np.float32)
    exact = table.astype(np.float64)
    ratio, cost = 1 / exact[:, 1:], float(evaluation_probabilities(exact).sum(axis=0) @ costs)
    added, largest = float((gains * (ratio - 1)).sum()), float((ratio * np.sqrt(gains)).max(initial=0.0))
    return Plan("independent", source, names, len(logsnr), table, cost, added, None, largest)


def select(found: Candidates, errors: Mapping[str, float | None]) -> list[Plan]:
    """The plans on each group's frontier of measured errors, {id: error, or None if it diverged}, against cost."""
    return [plan for group in found.values() for plan in frontier(group, lambda p: errors[p.id])]


def priced(plan: Plan, family: Sequence[Level], seconds: Mapping[str, float]) -> Plan:
    """The plan with expected FLOPs as its cost, and expected seconds. seconds: of one evaluation of each level."""
    estimator = plan.build(family)
    counts = estimator.expected_evaluations(len(plan.table))
    flops = float(np.dot(counts, [level.flops for level in estimator.levels]))
    return replace(plan, cost=flops, seconds=float(np.dot(counts, [seconds[level.name] for level in estimator.levels])))
