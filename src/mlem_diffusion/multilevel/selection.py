"""Candidate plans for one step rule, and the choice among them by measured errors.

Probabilities or weights are optimal for the predicted error (planner.py), or follow the square-root law from measured
differences, constant in time (probabilities.py), or are learned by SGD (learned.py).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..diffusion.process import Process
from .plan import Plan, frontier
from .planner import Calibration
from .probabilities import evaluation_probabilities, measured_for_cost

Learn = Callable[[float, Plan], np.ndarray]  # cost in evaluations of the largest level, plan to start from -> p [n, K]


def candidates(
    inputs: Calibration, process: Process, options: Any, learn: Learn | None, progress: Callable[[int, int], object]
) -> list[list[Plan]]:
    """Thinned predicted frontiers for one rule: of each method, with measured and with learned probabilities.

    options: the node `optimise` of the configuration."""
    found, largest = [], len(inputs.costs) - 1
    for method in inputs.methods:
        chosen: dict[str, Plan] = {}
        for base in (b for b in options.bases if b is None or b < largest):
            best = inputs.plans(method, base, progress)
            chosen |= {p.id: p for p in spread([p for p in best if len(p.levels) > 1], options.plans)}
        for cost in options.measured.costs:  # at the same costs as the measured probabilities
            plan = inputs.plan_for_cost(method, cost * inputs.costs[-1])
            if plan is not None and len(plan.levels) > 1:
                chosen[plan.id] = plan
        found.append(list(chosen.values()))
    measured = measured_plans(inputs, process, options.measured)
    learned = learned_plans(inputs, process, options.learned, measured, learn) if learn and measured else []
    return [*found, measured, learned]


def spread(found: list[Plan], most: int) -> list[Plan]:
    """At most `most` of a frontier's plans, spread evenly and including both ends."""
    if len(found) <= most:
        return found
    return [found[i] for i in np.unique(np.round(np.linspace(0, len(found) - 1, most)).astype(int))]


def measured_plans(inputs: Calibration, process: Process, options: Any) -> list[Plan]:
    """Plans by the square-root law from measured differences, constant in time, at the configured costs and steps."""
    squares, out = inputs.effects.squares @ process.drift_weights(inputs.effects.logsnr), []
    for steps in options.steps:
        for cost in options.costs:
            p = measured_for_cost(squares, inputs.costs, steps, cost * inputs.costs[-1])
            if p is not None:
                out.append(_plan("measured", inputs, process.grid(steps).logsnr, p))
    return out


def learned_plans(inputs: Calibration, process: Process, options: Any, start: list[Plan], learn: Learn) -> list[Plan]:
    """Plans with learned probabilities, started from measured ones of similar cost."""
    logsnr, out = process.grid(options.steps).logsnr, []
    for cost in options.costs:
        wanted = cost * inputs.costs[-1]
        nearest = min(start, key=lambda p: (p.steps != options.steps, abs(np.log(p.cost / wanted))))
        out.append(_plan("learned", inputs, logsnr, learn(cost, nearest)))
    return out


def _plan(source: str, inputs: Calibration, logsnr: np.ndarray, p: np.ndarray) -> Plan:
    """A plan for independent coins on the full family; its error is predicted if the largest level's is known."""
    names, gains = inputs.effects.names, inputs.effects.on(logsnr).gains()[0][1:].T
    table = np.broadcast_to(p, (len(logsnr), len(names))).astype(np.float32)
    exact = table.astype(np.float64)
    ratio, cost = 1 / exact[:, 1:], float(evaluation_probabilities(exact).sum(axis=0) @ inputs.costs)
    added, effect = float((gains * (ratio - 1)).sum()), float((ratio * np.sqrt(gains)).max(initial=0.0))
    own = inputs.own_errors.get((len(names) - 1, len(logsnr)))
    predicted = None if own is None else own + added
    return Plan("independent", source, names, len(logsnr), table, cost, predicted, effect)


def select(groups: Sequence[Sequence[Plan]], errors: Mapping[str, float | None]) -> list[Plan]:
    """The plans on each group's frontier of measured errors, {id: error, or None if it diverged}, against cost."""
    return [plan for group in groups for plan in frontier(group, lambda p: errors[p.id])]
