"""The measurements of make optimise, made once on rank 0 and then read from the cache; and the plans made from them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..comparison.runner import Runner
from ..comparison.settings import GAUSSIAN, SamplerSetting
from ..diffusion.brownian import BrownianPath
from ..diffusion.level import Level
from ..diffusion.step_rules import StepRule, step_rule
from ..errors import UserError
from ..files import read_json, write_json
from ..multilevel import ablation, planner
from ..multilevel.calibrate import check_reference
from ..multilevel.diagnostics import diagnose
from ..multilevel.gains import Effects, measure_effects
from ..multilevel.learned import learn_probabilities
from ..multilevel.plan import Plan
from .costs import unweighted
from .environment import device_model


def check(exp: Any) -> None:
    """Raise UserError for options that do not fit."""
    o = exp.cfg.optimise
    if o.cost not in ("flops", "seconds"):
        raise UserError(f"optimise.cost = {o.cost} is unknown; expected flops or seconds.")
    steps = [count for rule in o.rules for count in rule.steps]
    check_reference(o.reference_steps or exp.process.base_steps, steps, "optimise.reference_steps")


def _read(path: Path) -> Any:
    return read_json(path, "run make optimise again")


def _seeds(exp: Any, count: int) -> BrownianPath:
    """The first seeds of the calibration; the comparison uses others."""
    first = exp.cfg.optimise.seed
    return BrownianPath(range(first, first + count), exp.shape, exp.device)


def timing(exp: Any, levels: dict[str, Level]) -> dict[str, Any]:
    """{"seconds": per image of one evaluation of each level, "batch", "device", "threads"}."""
    family, batch = list(levels.values()), exp.cfg.compare.batch
    if exp.device.type == "cpu":  # seconds per image hardly depend on the batch, and large images would take long
        batch = max(1, min(batch, int(20e9 / family[-1].flops)))
    where = {"batch": batch, "device": device_model(exp.device), "threads": torch.get_num_threads()}

    def make(path: Path) -> None:
        seconds = ablation.seconds_per_image(family, exp.shape, batch, exp.device)
        write_json(path, {"seconds": dict(zip(levels, seconds, strict=True)), **where})

    return exp.cached("seconds.json", where, _read, make)


def diagnostics(exp: Any, levels: dict[str, Level]) -> dict[str, dict[str, Any]]:
    """The diagnostics of the family for the first rule of each dynamics; UserError if a value is not finite."""
    o, found = exp.cfg.optimise, {}
    for dynamics in dict.fromkeys(r.dynamics for r in o.rules):
        rule = step_rule(dynamics, next(r.step_rule for r in o.rules if r.dynamics == dynamics))

        def make(path: Path, rule: StepRule = rule) -> None:
            family, path_, batch = list(levels.values()), _seeds(exp, o.diagnose.seeds), exp.cfg.compare.batch
            with exp.progress(f"diagnose {rule.dynamics}", None) as progress:
                write_json(path, diagnose(family, exp.process, rule, path_, o.diagnose.steps, batch, progress))

        found[dynamics] = exp.cached("diagnostics.json", [o.seed, dict(o.diagnose), rule.key], _read, make)
        for f in found[dynamics]["findings"]:
            if f["severity"] == "error" and "not finite" in f["text"]:
                raise UserError(f["text"])
    return found


def effects(exp: Any, levels: dict[str, Level], rule: StepRule) -> Effects:
    """The effects of all level differences for one step rule."""
    o = exp.cfg.optimise

    def make(path: Path) -> None:
        with exp.progress(f"gains {rule.key}", o.calibrate) as progress:
            grid, part, batch = exp.process.grid(o.calibrate_steps), _seeds(exp, o.calibrate), exp.cfg.compare.batch
            measure_effects(list(levels.values()), rule, grid, part, o.probes, batch, progress).save(path)

    return exp.cached("effects.npz", [o.seed, o.calibrate, o.probes, o.calibrate_steps, rule.key], Effects.load, make)


@dataclass
class Search:
    """Inputs and candidates by rule, errors of single levels, and the FLOPs of learning by rule."""

    alone: dict[SamplerSetting, float]
    rules: list[planner.Calibration] = field(default_factory=list)
    groups: dict[tuple[str, str], list[list[Plan]]] = field(default_factory=dict)
    learning: list[float] = field(default_factory=list)


def errors_alone(exp: Any, runner: Runner) -> dict[SamplerSetting, float]:
    """The squared error of every level alone on every grid of the plans, without those that diverged."""
    *_, largest = runner.levels.values()
    settings = [
        SamplerSetting(rule.dynamics, rule.step_rule, "single", (name,), steps)
        for rule in exp.cfg.optimise.rules
        for name, level in runner.levels.items()
        for steps in rule.steps
        if steps <= 600 or level.flops > 0.5 * largest.flops  # on fine grids the cheap levels add nothing
    ]
    found = exp.run(runner, settings, "levels alone")
    return {s: m.row["error"] for s, m in zip(settings, found, strict=True) if m.row["error"] is not None}


def candidates(exp: Any, runner: Runner, seconds: dict[str, float]) -> Search:
    """Candidate plans for every rule with methods. seconds: of one evaluation of each level."""
    o, names, levels = exp.cfg.optimise, list(runner.levels), runner.levels
    costs = np.array([level.flops if o.cost == "flops" else seconds[name] for name, level in levels.items()])
    search = Search(errors_alone(exp, runner))
    for r in o.rules:
        methods, rule, spent = list(r.get("methods", o.methods)), step_rule(r.dynamics, r.step_rule), [0.0]
        if not methods:
            continue
        own = {(names.index(s.levels[0]), s.steps): e for s, e in search.alone.items() if s.rule == rule}
        grids = {n: exp.process.grid(n).logsnr for n in r.steps}
        inputs = planner.Calibration(effects(exp, levels, rule), grids, own, costs.astype(np.float64), methods)
        learn = learner(exp, levels, rule, costs, spent) if r.get("learn", False) else None
        with exp.progress(f"plan {rule.key}", None, "grid") as progress:
            found = planner.candidates(inputs, exp.process, o, learn, progress)
        search.rules.append(inputs)
        search.groups[rule.dynamics, rule.name] = found
        search.learning.append(sum(spent))
    return search


def learner(exp: Any, levels: dict[str, Level], rule: StepRule, costs: np.ndarray, spent: list[float]) -> planner.Learn:
    """The function (cost, plan to start from) -> learned p [n, K]; it appends the FLOPs of learning to `spent`."""
    options = exp.plain("optimise")["optimise"]["learned"]
    grid, numbers = exp.process.grid(options["steps"]), {k: options[k] for k in ("iterations", "paths", "draws")}

    def learn(cost: float, start: Plan) -> np.ndarray:
        def make(path: Path) -> None:
            with exp.progress(f"learn {rule.key}, cost {cost:g}", options["iterations"], "iteration") as progress:
                p, flops = learn_probabilities(
                    list(levels.values()), rule, grid, exp.shape, exp.device, costs=costs, wanted=cost * costs[-1],
                    start=start.table[0].astype(np.float64), progress=progress, **numbers,
                )  # fmt: skip
            write_json(path, {"p": p.tolist(), "flops": flops})

        content = exp.cached("learned.json", [options, rule.key, cost, start.id, costs.tolist()], _read, make)
        spent.append(content["flops"])
        return np.array(content["p"])

    return learn


def ablate(
    exp: Any, levels: dict[str, Level], rules: list[planner.Calibration], seconds: dict[str, float]
) -> dict[str, Any]:
    """The content of ablation.json; cost ratios are in the cost that plans minimise."""
    unit, tolerance, found = exp.cfg.optimise.cost, dict(exp.cfg.optimise.ablation), []
    with exp.progress("ablation", None, unit="family") as progress:
        ratios, kept = ablation.remove_levels(rules, **tolerance, progress=progress)
    for name, level in levels.items():
        costs = {"flops": float(level.flops), "seconds": seconds[name]}
        found.append({"name": name, **costs, f"cost_ratio_{unit}": ratios.get(name), f"kept_{unit}": name in kept})
    return {"levels": found, "kept": {unit: kept}, "tolerance": tolerance}


def ledger(
    exp: Any, runner: Runner, search: Search, tried: list[SamplerSetting], diagnosed: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What calibration and selection cost, which seeds they used, and the errors of single levels."""
    o, images = exp.cfg.optimise, len(runner.seeds)
    *_, largest = runner.levels.values()
    spent = sum(content["flops_spent"] for content in diagnosed.values())
    for rule, learning in zip(search.rules, search.learning, strict=True):
        spent += rule.effects.flops_spent + learning
    runs = [*search.alone, *tried]
    spent += sum(runner.build(s).expected_flops(s.evaluations(runner.process)) for s in runs) * images
    spent += len(diagnosed) * len(runner.reference_grid.logsnr) * largest.flops * images
    alone = [
        {"dynamics": s.dynamics, "step_rule": s.step_rule, "level": s.levels[0], "steps": s.steps, "selected_error": e}
        for s, e in search.alone.items()
    ]
    gains = float(sum(rule.effects.flops_spent for rule in search.rules))
    return {
        "calibration": {"flops": float(spent), "gains_flops": gains},
        "seeds_used": sorted({*range(o.seed, o.seed + max(o.calibrate, o.diagnose.seeds)), *runner.seeds}),
        "tried": len(tried),
        "alone": alone,
        "cost_unit": o.cost,
        "made_with": exp.identity,
    }


def cost(exp: Any) -> list[tuple[str, dict[str, float]]]:
    """Rows (text, {level: evaluations}) for a dry run.

    Candidate plans are assumed to cost a quarter of the largest level at every step of the middle grid."""
    check(exp)
    o, names, rows = exp.cfg.optimise, [name for name in unweighted(exp) if name != GAUSSIAN], []
    finest, points = o.reference_steps or exp.process.base_steps, o.calibrate * o.calibrate_steps
    for dynamics in dict.fromkeys(rule.dynamics for rule in o.rules):
        rows.append((f"{dynamics}: diagnostics", dict.fromkeys(names, o.diagnose.seeds * o.diagnose.steps)))
        rows.append((f"{dynamics}: reference", {names[-1]: finest * o.num_select}))
    for rule in o.rules:
        methods, name = rule.get("methods", o.methods), f"{rule.dynamics}/{rule.step_rule}"
        gains = dict.fromkeys(names, points) | {names[-1]: points * (3 + o.probes)}
        count = len(methods) * len(o.bases) * o.plans * o.num_select * sorted(rule.steps)[len(rule.steps) // 2] / 4
        rows.append((f"{name}: gains", gains if methods else {}))
        rows.append((f"{name}: levels alone", dict.fromkeys(names, sum(rule.steps) * o.num_select)))
        rows.append((f"{name}: candidate plans, roughly", {names[-1]: count}))
    return rows
