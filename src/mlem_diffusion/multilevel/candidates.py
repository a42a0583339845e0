"""The candidates of one step rule for the optimiser: planned from gains (planner.py), with probabilities by the
square-root law, or with learned ones (learned.py). They are run, and the best by measured error selected."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np

from ..diffusion.process import Process
from .estimators import evaluation_probabilities, measured_for_cost
from .options import uncancelled
from .plan import Plan, Progress, frontier
from .planner import Calibration

Learn = Callable[[float, Plan], np.ndarray]  # cost in evaluations of the largest level, plan to start from -> p [n, K]


def candidates(
    inputs: Calibration, process: Process, options: Any, learn: Learn | None, progress: Progress
) -> list[list[Plan]]:
    """Groups of plans for one rule: the thinned predicted frontier of each method; stitched schedules on them, which
    are baselines; plans by the square-root law from the gains of the differences, constant in time; and learned ones,
    started from these at similar cost. The last two are made of all levels and of the best chain.

    options: the node `optimise` of the configuration."""
    found, schedules, measured, learned, costs = [], {}, [], [], inputs.costs
    for method in inputs.methods:
        chosen: dict[str, Plan] = {}
        for base in (b for b in options.bases if b is None or b < len(costs) - 1):
            best = [p for p in inputs.plans(method, base, progress) if len(p.levels) > 1]
            for group, alone in ((chosen, False), (schedules, True)):
                group |= {p.id: p for p in spread([p for p in best if p.is_baseline == alone], options.plans)}
        for cost in options.measured.costs:  # at the same costs as the measured probabilities
            plan = inputs.plan_for_cost(method, cost * inputs.unit)
            if plan is not None and len(plan.levels) > 1:
                (schedules if plan.is_baseline else chosen)[plan.id] = plan
        found.append(list(chosen.values()))
    between = inputs.effects.between()
    for levels in dict.fromkeys([tuple(range(len(costs))), inputs.chain]):
        gains, own, plans = np.array([0.0, *(between[a, b] for a, b in pairwise(levels))]), costs[list(levels)], []
        for steps, cost in product(options.measured.steps, options.measured.costs):
            logsnr = process.grid(steps).logsnr
            p = measured_for_cost(gains, own, steps, cost * inputs.unit - inputs.base_cost(logsnr))
            if p is not None:
                plans.append(_plan("measured", inputs, levels, logsnr, p))
        measured += plans
        for cost in options.learned.costs if plans else ():
            if learn is None:
                break
            steps, wanted = options.learned.steps, cost * inputs.unit
            start = min(plans, key=lambda plan: (plan.steps != steps, abs(np.log(plan.cost / wanted))))
            learned.append(_plan("learned", inputs, levels, process.grid(steps).logsnr, learn(cost, start)))
    return [*found, list(schedules.values()), measured, learned]


def spread(found: list[Plan], most: int) -> list[Plan]:
    """At most `most` of a frontier's plans, spread evenly and including both ends."""
    places = np.linspace(0, len(found) - 1, min(most, len(found)))
    return [found[i] for i in np.unique(np.round(places).astype(int))]


def _plan(source: str, inputs: Calibration, levels: Sequence[int], logsnr: np.ndarray, p: np.ndarray) -> Plan:
    """A plan for independent coins on some levels; its error is predicted if the largest level's is known."""
    names, effects = tuple(inputs.effects.names[k] for k in levels), inputs.effects_on(logsnr)
    gains = np.stack([effects.gain(a, b) for a, b in pairwise(levels)], axis=1)
    table = np.broadcast_to(p, (len(logsnr), len(names))).astype(np.float32)
    exact = table.astype(np.float64)
    cost = float((evaluation_probabilities(exact) @ inputs.costs[list(levels)]).sum()) + inputs.base_cost(logsnr)
    effect = float((1 / exact[:, 1:] * np.sqrt(gains)).max(initial=0.0))
    own = inputs.own_errors.get((levels[-1], len(logsnr)))
    predicted = None if own is None else own + uncancelled(gains, exact[:, 1:])
    return Plan("independent", source, names, len(logsnr), table, cost, predicted, effect)


def select(groups: Sequence[Sequence[Plan]], errors: Mapping[str, float | None]) -> list[Plan]:
    """The plans on each group's frontier of measured errors, {id: error, or None if it diverged}, against cost."""
    return [plan for group in groups for plan in frontier(group, lambda p: errors[p.id])]
