"""Plans from measured gains: which levels to use, at which evaluations, with which probabilities or weights.

The predicted squared error of a plan is the own error of its largest level, measured alone on that grid, plus the error
added by coins or omitted evaluations. To first order in the effects s_kj and gains A_kj (gains.py) this is

    independent coins   sum_kj A_kj (1/p_kj - 1)
    any coins           E (sum_kj (B_kj/p_kj - 1) s_kj)^2
    quadrature          E (sum_kj (W_kj - 1) s_kj)^2        fixed weights W, most of them zero

over the differences k of neighbouring *used* levels. The errors of neighbouring firings cancel in the last two, but not
wholly: a firing moves the state, at which the next differences are others. This second-order term is taken as a share
`drift` of the error without any cancellation, sum_kj A_kj (1/p_kj - 1), and measured with one plan (`drift_of`).

A plan minimises (added error + price * cost). Both are sums over these differences, except for shared evaluations. So
the best levels for a price are a shortest path from "nothing" to the largest used level, whose edge (a, b) is as long
as the best estimate of f^b - f^a."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise

import numpy as np
import torch

from ..diffusion.brownian import BrownianPath
from ..diffusion.conditions import ConditionsOf, check_taken
from ..diffusion.level import Level, runs_base, shared_costs
from ..diffusion.process import Process
from ..diffusion.reference import reference_evaluations, reference_steps, sample_reference
from ..diffusion.sampler import Estimator, SingleLevel, sample
from ..diffusion.step_rules import StepRule
from ..errors import UserError
from ..statistics import squared_errors
from . import options as ways
from .estimators import evaluation_probabilities, following
from .gains import Effects, best_chain, measure_effects, sweep_flops
from .plan import Plan, Progress, frontier

METHODS = ("independent", "nested", "systematic", "quadrature")
_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Calibration:
    """What was measured of a family for one step rule, and the plans that follow from it."""

    effects: Effects  # on the finest grid that they were measured on
    grids: Mapping[int, np.ndarray]  # {steps: log-SNR of each evaluation [n]}
    # {(level, steps): squared error of this level alone}; only these can be the largest level of plans with these steps
    own_errors: Mapping[tuple[int, int], float]
    # [K] of one more evaluation of each level (level.shared_costs), in FLOPs or seconds, as the costs of plans
    costs: np.ndarray
    methods: Sequence[str] = METHODS
    base: float = 0.0  # the cost of the base that the levels share, once in every estimate in which it runs
    coarser: Sequence[Effects] = ()  # on coarser grids: a coarse grid's steps propagate less than its length says
    drift: float = 0.0  # the share of the error without cancellation that stays
    base_runs: Callable[[float], bool] = lambda logsnr: True  # whether the base runs at a log-SNR: a guide may rest
    made: dict[str, list[Planner]] = field(default_factory=dict, init=False, repr=False)

    @property
    def unit(self) -> float:
        """The cost of one evaluation of the largest level alone."""
        return float(self.costs[-1]) + self.base

    def base_cost(self, logsnr: np.ndarray) -> float:
        """The cost of the base in all estimates at these log-SNRs, per image."""
        return self.base * sum(map(self.base_runs, logsnr.tolist()))

    @property
    def rule(self) -> str:
        return f"{self.effects.dynamics}/{self.effects.step_rule}"

    @property
    def chain(self) -> tuple[int, ...]:
        """The best chain of levels for coins of constant probability (gains.py), at these costs."""
        return tuple(best_chain(self.effects.between(), self.costs)[0])

    def effects_on(self, logsnr: np.ndarray) -> Effects:
        """The effects on a grid, from the coarsest measured grid that is not coarser, else from the finest.
        Interpolated between coarser steps the effects of an SDE would be too smooth, and plans with few firings seem up
        to five times better than they are."""
        fitting = (e for e in (*self.coarser, self.effects) if len(e.logsnr) >= len(logsnr))
        return min(fitting, key=lambda e: len(e.logsnr), default=self.effects).on(logsnr)

    def planners(self, method: str) -> list[Planner]:
        """The planner of a method on each grid; made once, since planners cache what they compute."""
        if method not in METHODS:
            raise UserError(f"method = {method!r} is unknown; expected one of {', '.join(METHODS)}.")
        if method not in self.made:
            self.made[method] = [Planner(self, method, steps) for steps in self.grids]
        return self.made[method]

    def plans(self, method: str, base: int | None = None, progress: Progress = lambda done, total: None) -> list[Plan]:
        """The plans on the predicted frontier of a method (see METHODS), from cheap to expensive.
        base: the level that runs at every evaluation; None for the best one."""
        out: list[Plan] = []
        for done, planner in enumerate(self.planners(method), 1):
            for top in (k for k in planner.tops if base is None or k >= base):
                out += [planner.plan(top, price, base) for price in planner.prices()]
            progress(done, len(self.grids))
        return frontier(out, lambda plan: plan.predicted)

    def plan_for_cost(self, method: str, wanted: float) -> Plan | None:
        """The plan of smallest predicted error that costs at most `wanted` per image, or None.
        The price is found by bisection for every grid and every largest level."""
        found: list[Plan] = []
        for planner in self.planners(method):
            for top in planner.tops:
                low, high, best = min(planner.prices()), max(planner.prices()), None
                for _ in range(16):
                    price = math.sqrt(low * high)
                    plan = planner.plan(top, price)
                    low, high, best = (price, high, best) if plan.cost > wanted else (low, price, plan)
                found += [best] if best is not None else []
        return min(found, key=lambda plan: (plan.predicted, plan.cost), default=None)

    def probe(self) -> Plan | None:
        """The plan that measures `drift`: systematic coins on the grid with the most steps, at an eighth of its cost or
        at four evaluations of the largest level; None if no method needs it."""
        steps = max(self.grids)
        if "systematic" not in self.methods and "quadrature" not in self.methods:
            return None
        narrowed = replace(self, grids={steps: self.grids[steps]}, drift=0.0)
        plan = narrowed.plan_for_cost("systematic", max(4, steps / 8) * self.unit)
        return None if plan is None or plan.is_baseline else plan

    def drift_of(self, probe: Plan, error: float) -> float:
        """The drift in [0, 1] that explains the probe's measured squared error."""
        effects, names = self.effects_on(self.grids[probe.steps]), self.effects.names
        gains = [effects.gain(low, high) for low, high in pairwise(map(names.index, probe.levels))]
        coins = probe.table.astype(np.float64).T[1:]
        loose = sum(ways.uncancelled(gain, p) for gain, p in zip(gains, coins, strict=True))
        return float(np.clip((error - (probe.predicted or 0.0)) / max(loose, 1e-300), 0.0, 1.0))

    def with_drift(self, run: Callable[[Plan], float | None]) -> Calibration:
        """This calibration with its drift, measured by run(plan): a plan's squared error, or None if it diverges."""
        probe = self.probe()
        error = None if probe is None else run(probe)
        return self if probe is None or error is None else replace(self, drift=self.drift_of(probe, error))

    def plan(self, method: str, *, cost: float | None = None, error: float | None = None) -> Plan:
        """The plan of smallest predicted error within a cost per image, or the cheapest within a squared error.
        Raises UserError if no plan qualifies, and unless exactly one of cost and error is given."""
        if (cost is None) == (error is None):
            raise UserError("Give either the cost or the error that a plan may have.")
        found, words = self.plans(method), "cost per image" if error is None else "predicted squared error"
        limited, wanted, limit = ("cost", "predicted", cost) if error is None else ("predicted", "cost", error)
        if cost is not None and (exact := self.plan_for_cost(method, cost)) is not None:
            found.append(exact)
        within = [plan for plan in found if getattr(plan, limited) <= limit]
        if not within:
            least = min((getattr(plan, limited) for plan in found), default=float("nan"))
            raise UserError(f"No plan has a {words} of {limit:.4g} or less; the least is {least:.4g}.")
        return min(within, key=lambda plan: getattr(plan, wanted))


def gain_grids(calibrate_steps: Sequence[int], finest: int) -> list[int]:
    """The numbers of steps, ascending, on which gains are measured: without those of twice `finest`, the most steps of
    a plan, or more, unless none is left."""
    return [n for n in sorted(calibrate_steps) if n < 2 * finest] or [min(calibrate_steps)]


def calibrate(
    family: Sequence[Level], process: Process, rule: StepRule, shape: tuple[int, ...], *,
    steps: Sequence[int] = (8, 16, 32, 64, 128), seeds: Sequence[int] = range(10**6, 10**6 + 32),
    calibrate_steps: Sequence[int] = (32, 128), device: torch.device | str = "cpu", conditions: ConditionsOf = None,
    batch: int = 64, progress: Progress = lambda done, total: None,
) -> Calibration:  # fmt: skip
    """Measure the gains of a family and the error of each level alone, for plans with one of these numbers of steps.
    calibrate_steps: noise levels of the grids on which gains are measured (`gain_grids`). conditions: those of these
    seeds, or a function of seeds. batch: images at a time. progress: called with (GFLOPs done, all). Guided levels are
    measured as they are, so plans know that a guide's scale w multiplies the variance of coins by w^2; they count a
    common guide once in every estimate. Evaluate on other seeds, and run a plan before you rely on its predicted error.
    Raises UserError for a family out of order or without derivatives, and a process too coarse for a reference."""
    finest = reference_steps(process, steps)
    if len(seeds) < 2:
        raise UserError("calibrate: at least two seeds are needed, better 32 or more.")
    path = BrownianPath(seeds, shape, device, conditions)
    check_taken(family, path.conditions)
    counts, done = gain_grids(calibrate_steps, max(steps)), 0.0
    exact = reference_evaluations(rule.dynamics, finest) * family[-1].flops
    total = sweep_flops(family, sum(counts)) + exact + sum(steps) * sum(level.flops for level in family)
    parts = [path.part(first, first + batch) for first in range(0, len(seeds), batch)]

    def spend(cost: float) -> None:
        nonlocal done
        done = min(total, done + cost)
        progress(int(done * len(seeds) / 1e9), int(total * len(seeds) / 1e9))

    def gains(n: int) -> Effects:
        cost = sweep_flops(family, n) / len(parts)  # of a batch
        return measure_effects(family, rule, process.grid(n), path, batch=batch, progress=lambda *_: spend(cost))

    *coarser, effects = map(gains, counts)
    fine = [sample_reference(family[-1], rule.dynamics, process, finest, part)[0] for part in parts]
    spend(exact)

    def error(estimator: Estimator, count: int) -> float:
        spend(count * estimator.levels[-1].flops)
        images = (sample(estimator, rule, process.grid(count), part)[0] for part in parts)
        return float(np.concatenate([squared_errors(*pair) for pair in zip(images, fine, strict=True)]).mean())

    own = {(k, count): error(SingleLevel(level), count) for k, level in enumerate(family) for count in steps}
    grids = {count: process.grid(count).logsnr for count in sorted(steps)}
    costs, base = shared_costs(family)
    found = Calibration(effects, grids, own, costs, base=base, coarser=coarser, base_runs=partial(runs_base, family))
    return found.with_drift(lambda plan: error(plan.build(family), plan.steps))


class Planner:
    """Plans on one grid; caches the options of each pair of levels, and the plan of each choice of levels."""

    def __init__(self, inputs: Calibration, method: str, steps: int):
        self.effects, self.costs, self.drift = inputs.effects_on(inputs.grids[steps]), inputs.costs, inputs.drift
        self.method, self.n = method, len(self.effects.logsnr)
        self.base = inputs.base_cost(self.effects.logsnr)  # per image, in any plan
        self.own = {k: error for (k, n), error in inputs.own_errors.items() if n == steps}
        self.tops = sorted(self.own)  # the levels that can be the largest of a plan
        self.gain, self.options = cache(self.effects.gain), cache(self._options)
        self.edge, self.finish = cache(self._edge), cache(self._finish)

    def prices(self, ratio: float = 4.0) -> list[float]:
        """Prices, a factor `ratio` apart, that lead to anything from almost no firings to one at every evaluation."""
        gain_per_cost = self.effects.gains()[0][1:].sum() * self.n / (self.costs[-1] * self.n)
        count = round(17 * math.log(4.0) / math.log(ratio)) + 1
        return (gain_per_cost * 4.0**3 * ratio ** -np.arange(count, dtype=np.float64)).tolist()

    def _options(self, low: int, high: int) -> list[ways.Option]:
        difference, counts = self.effects.difference(low, high), [c for c in _COUNTS if c <= self.n // 2]
        if self.method == "systematic":
            return ways.systematic_options(difference, counts, self.drift)
        return ways.quadrature_options(difference, counts, len(self.effects.values), self.drift)

    def _edge(self, low: int, high: int, price: float, base: bool) -> tuple[float, ways.Option | None]:
        """Smallest (error + price * cost) of f^high - f^low, and its option. base: f^low runs at every evaluation."""
        unit = self.costs[high] + (0.0 if base else self.costs[low])
        if self.method in ("independent", "nested"):
            gain = self.gain(low, high)
            p = np.minimum(1.0, np.sqrt(gain / (price * unit)) + ways.LEAST)
            return float((gain * (1 / p - 1)).sum() + price * unit * p.sum()), None
        # if f^low is the base, a certain option does not run it at its firings
        saved, options = self.costs[low] if base else 0.0, self.options(low, high)
        totals = [o.added + price * o.fires * (unit - saved * o.certain) for o in options]
        best = int(np.argmin(totals))
        return totals[best], options[best]

    def plan(self, top: int, price: float, base: int | None = None, among: Collection[int] | None = None) -> Plan:
        """The best plan for a price with f^top as the largest level: a shortest path over levels.
        base: the first level of the path; None for the best one. among: the levels to use; None for all up to `top`."""
        best: tuple[float, tuple[int, ...]] = (np.inf, (top,))
        allowed = [k for k in range(top + 1) if among is None or k in among]
        for first in allowed if base is None else [base]:
            cost_to: dict[int, tuple[float, tuple[int, ...]]] = {first: (price * self.n * self.costs[first], (first,))}
            for high in (k for k in allowed if k > first):
                cost_to[high] = min(
                    (before + self.edge(low, high, price, low == first)[0], (*path, high))
                    for low, (before, path) in cost_to.items()
                )
            best = min(best, cost_to[top])
        return self.finish(best[1], price)

    def _table(self, levels: tuple[int, ...], gains: np.ndarray, price: float) -> tuple[np.ndarray, float, np.ndarray]:
        """The table [n, K], the added error and the expected evaluations [n, K] of a path."""
        costs = self.costs[list(levels)]
        if len(levels) == 1:
            return np.ones((self.n, 1)), 0.0, np.ones((self.n, 1))
        if self.method == "independent":
            table = ways.independent_probabilities(gains, costs, price)
            return table, ways.uncancelled(gains.T, table), evaluation_probabilities(table)
        if self.method == "nested":
            to_top = np.stack([np.zeros(self.n)] + [self.gain(a, levels[-1]) for a in levels[:-1]])
            table = ways.nested_probabilities(to_top, costs, price)
            added = float((to_top[1:].T * np.diff(1 / table, axis=1)).sum())
            return table, added, evaluation_probabilities(table, nested=True)
        chosen = [self.edge(a, b, price, i == 0)[1] for i, (a, b) in enumerate(pairwise(levels))]
        options = [option for option in chosen if option is not None]
        table = np.stack([np.ones(self.n), *(o.table for o in options)], axis=1)
        # with fixed weights the networks f^k of weight W_k - W_{k+1} = 0 are not evaluated
        fixed = self.method == "quadrature"
        evaluations = (table != following(table)).astype(float) if fixed else evaluation_probabilities(table)
        return table, sum(o.added for o in options), evaluations

    def _finish(self, levels: tuple[int, ...], price: float) -> Plan:
        gains = np.stack([np.zeros(self.n)] + [self.gain(a, b) for a, b in pairwise(levels)])
        table, added, evaluations = self._table(levels, gains, price)
        # leading differences with weight 1 at every evaluation: lower levels never run
        certain = int(np.cumprod(np.all(table == 1, axis=0)).sum()) - 1
        levels, gains = levels[certain:], gains[certain:]
        table, evaluations = table[:, certain:], evaluations[:, certain:]
        weights = np.abs(table) if self.method == "quadrature" else 1 / table
        largest_effect = float((weights * np.sqrt(gains.T))[:, 1:].max(initial=0.0))
        names = tuple(self.effects.names[i] for i in levels)
        cost = float(evaluations.sum(axis=0) @ self.costs[list(levels)]) + self.base
        predicted = self.own[levels[-1]] + added
        return Plan(self.method, "optimal", names, self.n, table.astype(np.float32), cost, predicted, largest_effect)
