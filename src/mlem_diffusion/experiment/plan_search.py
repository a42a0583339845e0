"""The measurements of make optimise, made once on rank 0 and then read from the cache; and the plans made from them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..comparison import planned
from ..comparison.runner import Runner
from ..comparison.settings import SamplerSetting, setting_of, telescope
from ..diffusion.brownian import BrownianPath
from ..diffusion.level import Level, base_of, runs_base, shared_costs, with_base
from ..diffusion.process import TimeGrid
from ..diffusion.reference import reference_evaluations
from ..diffusion.step_rules import StepRule, step_rule
from ..errors import UserError
from ..files import read_json, write_json
from ..multilevel import ablation, outlook, planner
from ..multilevel.candidates import candidates
from ..multilevel.diagnostics import diagnose, violations
from ..multilevel.gains import Effects, measure_effects
from ..multilevel.learned import learn_probabilities
from ..multilevel.plan import Plan
from . import runs
from .seeds import sample_seeds


def _cached(exp: Any, stem: str, facts: Any, compute: Callable[[], Any]) -> Any:
    """The value of compute(), kept as JSON."""
    read = partial(read_json, hint="run the same command again")
    return exp.cached(f"{stem}.json", facts, read, lambda path: write_json(path, compute()))


def _path(exp: Any, count: int) -> BrownianPath:
    """The paths of the first seeds of the calibration."""
    return exp.path(sample_seeds(exp.cfg).calibration[:count])


def timing(exp: Any, levels: dict[str, Level]) -> dict[str, Any]:
    """{"seconds": per image of one evaluation of each level, and of their base, "batch", "device", "threads"}."""
    parts = runs.timing(exp, levels).parts
    names = [level.name for level in with_base(list(levels.values()))]
    return {"seconds": {name: parts[name][0] for name in names}, **runs.timed_where(exp)}


def diagnostics(exp: Any, levels: dict[str, Level]) -> dict[str, dict[str, Any]]:
    """The diagnostics of the family for the first rule of each dynamics that has methods, else for its first rule."""
    o, rules = exp.cfg.optimise, {}
    for r in sorted(o.rules, key=lambda r: not r.get("methods", o.methods)):
        rules.setdefault(r.dynamics, r)
    return {dynamics: _diagnosis(exp, levels, r) for dynamics, r in rules.items()}


def outlooks(
    exp: Any, levels: dict[str, Level], alone: dict[SamplerSetting, float], diagnosed: dict[str, dict[str, Any]]
) -> None:
    """Add what coins can gain (multilevel/outlook.py), in FLOPs, to the diagnostics of rules with methods."""
    costs, base = shared_costs(list(levels.values()))
    for content in diagnosed.values():
        rule = step_rule(content["dynamics"], content["step_rule"])
        own = {s.steps: error for s, error in alone.items() if s.rule == rule and s.levels == (content["levels"][-1],)}
        if content.get("pooling") == "gains" and len(own) > 1:
            *coarser, finest = effects(exp, levels, rule)
            content |= outlook.outlook(finest, costs, base, own)
            by_steps = {len(e.logsnr): outlook.variance_cost(e, costs, float(costs[-1]) + base)[0] for e in coarser}
            content["S_by_steps"] = {**by_steps, len(finest.logsnr): content["S"]}


def _diagnosis(exp: Any, levels: dict[str, Level], entry: Any) -> dict[str, Any]:
    """The diagnostics for one entry of optimise.rules, by gains if it has methods; UserError if a value is not finite.
    A family that violates the contract is reported before anything else is measured of it."""
    o, rule = exp.cfg.optimise, step_rule(entry.dynamics, entry.step_rule)
    family, path, batch = list(levels.values()), _path(exp, o.diagnose.seeds), exp.cfg.compare.batch
    broken = _cached(exp, "contract", [o.seed, batch], lambda: violations(family, exp.process, path, batch))
    planned = entry.get("methods", o.methods) and not any(f["severity"] == "error" for f in broken)
    known = effects(exp, levels, rule)[-1] if planned else None

    def compute() -> dict[str, Any]:
        with exp.progress(f"diagnose {rule.dynamics}", None) as progress:
            return diagnose(family, exp.process, rule, path, o.diagnose.steps, batch, progress, known)

    facts = [o.seed, dict(o.diagnose), rule.key, known and [o.calibrate, o.probes, len(known.logsnr)]]
    found = _cached(exp, "diagnostics", facts, compute)
    for f in found["findings"]:
        if f["severity"] == "error" and "not finite" in f["text"]:
            raise UserError(f["text"])
    return found


def effects(exp: Any, levels: dict[str, Level], rule: StepRule) -> list[Effects]:
    """The effects of all level differences for one step rule, on each of the grids of optimise.calibrate_steps that is
    not twice as fine as the rule's finest."""
    o = exp.cfg.optimise

    def make(steps: int, path: Path) -> None:
        family, seeds, batch = list(levels.values()), _path(exp, o.calibrate), exp.cfg.compare.batch
        with exp.progress(f"gains {rule.key}, {steps} steps", o.calibrate) as progress:
            found = measure_effects(family, rule, exp.process.grid(steps), seeds, o.probes, batch, progress)
        found.save(path)

    finest = max(step for r in o.rules if (r.dynamics, r.step_rule) == (rule.dynamics, rule.name) for step in r.steps)
    counts = planner.gain_grids(o.calibrate_steps, finest)
    facts = ["bridge", o.seed, o.calibrate, o.probes, list(levels), rule.key]
    return [exp.cached("effects.npz", [*facts, n], Effects.load, partial(make, n)) for n in counts]


def errors_alone(exp: Any, runner: Runner) -> dict[SamplerSetting, float]:
    """The squared error of every level alone on every grid of the plans, without those that diverged. runner: of the
    calibration."""
    *_, largest = runner.levels.values()
    settings = [
        SamplerSetting(rule.dynamics, rule.step_rule, "single", (name,), steps)
        for rule in exp.cfg.optimise.rules
        for name, level in runner.levels.items()
        for steps in rule.steps
        if steps <= 600 or level.flops > 0.5 * largest.flops  # on fine grids the cheap levels add nothing
    ]
    found = runs.run_all(exp, runner, settings, "levels alone")
    return {s: m.row["error"] for s, m in zip(settings, found, strict=True) if m.row["error"] is not None}


@dataclass
class Searched:
    """One step rule: what its plans are made from, the candidates, and the FLOPs of learning."""

    rule: StepRule
    inputs: planner.Calibration
    candidates: list[list[Plan]]
    learning: float

    def setting(self, plan: Plan) -> SamplerSetting:
        return setting_of(plan, self.rule.dynamics, self.rule.name)


def _error(exp: Any, runner: Runner, rule: StepRule, plan: Plan) -> float | None:
    """The squared error of a plan on the runner's seeds; None if it diverged."""
    setting = setting_of(plan, rule.dynamics, rule.name)
    return runs.run_all(exp, replace(runner, plans={plan.id: plan}), [setting], "drift")[0].row["error"]


def search(exp: Any, runner: Runner, alone: dict[Any, float], seconds: dict[str, float]) -> list[Searched]:
    """Candidate plans for every rule with methods. runner: of the calibration; alone: `errors_alone`; seconds: of one
    evaluation of each level."""
    o, levels, names, out = exp.cfg.optimise, runner.levels, list(runner.levels), []
    shared, (costs, base) = base_of(list(levels.values())), shared_costs(list(levels.values()))
    if o.cost == "seconds":  # a level that costs nothing more is the base
        costs = np.array([seconds[name] if cost else 0.0 for name, cost in zip(names, costs, strict=True)])
        base = seconds[shared.name] if shared else 0.0
    for r in o.rules:
        methods, rule, spent = list(r.get("methods", o.methods)), step_rule(r.dynamics, r.step_rule), [0.0]
        if not methods:
            continue
        own = {(names.index(s.levels[0]), s.steps): e for s, e in alone.items() if s.rule == rule}
        grids = {n: exp.process.grid(n).logsnr for n in r.steps}
        *coarser, finest = effects(exp, levels, rule)
        inputs = planner.Calibration(finest, grids, own, costs.astype(np.float64), methods, base, coarser)
        inputs = replace(inputs, base_runs=partial(runs_base, list(levels.values())))
        inputs = inputs.with_drift(partial(_error, exp, runner, rule))
        learned = partial(learn, exp, levels, rule, inputs, spent) if r.get("learn", False) else None
        with exp.progress(f"plan {rule.key}", None, "grid") as progress:
            found = candidates(inputs, exp.process, o, learned, progress)
        out.append(Searched(rule, inputs, found, sum(spent)))
    return out


def learned_table(
    exp: Any, family: list[Level], rule: StepRule, grid: TimeGrid, options: dict[str, Any], facts: list[Any],
    costs: np.ndarray, wanted: float, start: np.ndarray,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """`learn_probabilities`, cached under `facts`. options: iterations, paths and draws, among others."""
    numbers = {key: options[key] for key in ("iterations", "paths", "draws")}

    def compute() -> dict[str, Any]:
        label = f"learn {rule.key}, {'+'.join(level.name for level in family)}"
        with exp.progress(label, numbers["iterations"], "iteration") as progress:
            p, flops = learn_probabilities(
                family, rule, grid, exp.shape, exp.device, costs=costs, wanted=wanted, start=start, progress=progress,
                conditions=exp.conditions, **numbers,
            )  # fmt: skip
        return {"p": p.tolist(), "flops": flops}

    content = _cached(exp, "learned", facts, compute)
    return np.array(content["p"]), content["flops"]


def learn(
    exp: Any, levels: dict[str, Level], rule: StepRule, inputs: planner.Calibration, spent: list[float], cost: float,
    start: Plan,
) -> np.ndarray:  # fmt: skip
    """Learned p [n, K] of a plan's levels at a cost, begun with its p; appends the FLOPs of learning to `spent`."""
    options = exp.plain("optimise")["optimise"]["learned"]
    family, costs = [levels[name] for name in start.levels], inputs.costs[[list(levels).index(n) for n in start.levels]]
    grid, facts = exp.process.grid(options["steps"]), [options, rule.key, cost, start.id, costs.tolist()]
    wanted = cost * inputs.unit - inputs.base_cost(grid.logsnr)
    first = start.table[0].astype(np.float64)
    p, flops = learned_table(exp, family, rule, grid, options, facts, costs, wanted, first)
    spent.append(flops)
    return p


def ablate(exp: Any, levels: dict[str, Level], searched: list[Searched], seconds: dict[str, float]) -> dict[str, Any]:
    """The content of ablation.json; cost ratios are in the cost that plans minimise."""
    unit, tolerance, found = exp.cfg.optimise.cost, dict(exp.cfg.optimise.ablation), []
    with exp.progress("ablation", None, "family") as progress:
        ratios, kept = ablation.remove_levels([s.inputs for s in searched], **tolerance, progress=progress)
    for name, level in levels.items():
        costs = {"flops": float(level.flops), "seconds": seconds[name]}
        found.append({"name": name, **costs, f"cost_ratio_{unit}": ratios.get(name), f"kept_{unit}": name in kept})
    return {"levels": found, "kept": {unit: kept}, "tolerance": tolerance}


def densities(exp: Any, searched: list[Searched]) -> dict[str, Any]:
    """The content of gains.json: the density of gains for each rule."""
    found = {s.rule.key: s.inputs.effects.density() for s in searched}
    rules = {key: {"logsnr": where.tolist(), "density": values.tolist()} for key, (where, values) in found.items()}
    return {"made_with": exp.identity, "rules": rules}


def described(s: Searched, plans: list[Plan], errors: dict[str, Any], runner: Runner) -> list[tuple[Plan, dict]]:
    """Selected plans with their FLOPs as cost, and what plans.json says of each. errors: measured, by plan."""
    out, family = [], runner.levels.values()
    for plan in plans:
        facts = {"dynamics": s.rule.dynamics, "step_rule": s.rule.name, "selected_error": errors[plan.id]}
        flops = plan.build(family).expected_flops(len(plan.table), runner.process.grid(plan.steps).logsnr.tolist())
        out.append((replace(plan, cost=flops), facts))
    return out


def ledger(
    exp: Any, calibrating: Runner, selecting: Runner, alone: dict[SamplerSetting, float], searched: list[Searched],
    tried: list[SamplerSetting], diagnosed: dict[str, dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """What calibration and selection cost, and which seeds they used. The runners are those of both parts."""
    spent = sum(content["flops_spent"] for content in diagnosed.values())
    spent += sum(s.learning + sum(e.flops_spent for e in (*s.inputs.coarser, s.inputs.effects)) for s in searched)
    for runner, settings in ((calibrating, alone), (selecting, tried)):
        spent += sum(map(runner.expected_flops, settings))
        spent += sum(map(runner.reference_flops, {s.dynamics for s in settings}))
    own = sample_seeds(exp.cfg)
    parts = {"calibration": own.calibration, "selection": own.selection, "judgement": own.judgement}
    seeds = {part: [found.start, found.stop - 1] for part, found in parts.items()}  # first and last
    found: dict[str, Any] = {"calibration": {"flops": float(spent)}, "seeds": seeds}
    found["drift"] = {s.rule.key: s.inputs.drift for s in searched}
    found["chains"] = {s.rule.key: [s.inputs.effects.names[k] for k in s.inputs.chain] for s in searched}
    return found | {"cost_unit": exp.cfg.optimise.cost, "made_with": exp.identity}


def cost(exp: Any, levels: dict[str, Level]) -> Counter[str]:
    """Evaluations of each level; candidate plans are assumed to use the largest at a quarter of the middle grid."""
    o, references = exp.cfg.optimise, planned.references_for(runs.planned_steps(exp.cfg.optimise), exp.process)
    *_, largest = levels = telescope(levels)
    counts = Counter(dict.fromkeys(levels, len(references) * o.diagnose.seeds * o.diagnose.steps))
    for dynamics, steps in references.items():
        counts[largest] += reference_evaluations(dynamics, steps) * (o.calibrate + o.num_select)
    for rule in o.rules:
        methods = rule.get("methods", o.methods)
        points = o.calibrate * sum(planner.gain_grids(o.calibrate_steps, max(rule.steps))) if methods else 0
        tried = len(methods) * len(o.bases) * o.plans * rule.steps[len(rule.steps) // 2] // 4
        counts.update(dict.fromkeys(levels, points + sum(rule.steps) * o.calibrate))
        counts[largest] += points * (2 + o.probes) + tried * o.num_select
    return counts
