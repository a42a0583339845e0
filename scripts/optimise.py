"""Levels -> gains.png, diagnostics.json, plans.json, ablation.json: measure gains, select plans, ablate levels.

Plans are selected on seeds that the comparison does not use.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlem_diffusion.comparison.runner import Runner
from mlem_diffusion.comparison.settings import SamplerSetting, setting_of
from mlem_diffusion.errors import Interrupted, UserError
from mlem_diffusion.experiment import sampler_runs
from mlem_diffusion.experiment.stage import Config, Stage, bar, device_model, entry_point, run_stage
from mlem_diffusion.experiment.tracking import Tracker
from mlem_diffusion.figures.ablation import plot_ablation
from mlem_diffusion.figures.diagnostics import plot_diagnostics
from mlem_diffusion.figures.gains import plot_gains
from mlem_diffusion.files import Damaged, cached, read_json, write_json
from mlem_diffusion.multilevel.ablation import RuleInputs, ablate, ablation_json, seconds_per_image
from mlem_diffusion.multilevel.ablation import table as ablation_table
from mlem_diffusion.multilevel.calibrate import check_reference
from mlem_diffusion.multilevel.diagnostics import diagnose, table
from mlem_diffusion.multilevel.estimators import Multilevel
from mlem_diffusion.multilevel.gains import Effects, measure_effects
from mlem_diffusion.multilevel.learned import learn_probabilities
from mlem_diffusion.multilevel.plan import Plan, frontier, save_plans
from mlem_diffusion.multilevel.planner import plan_for_cost, plans
from mlem_diffusion.multilevel.probabilities import (
    constant_probabilities,
    measured_probabilities,
    probabilities_for_cost,
)

OUTPUTS = ["plans.json", "plans.npz", "gains.png", "diagnostics.json", "ablation.json", "ablation.png"]
Candidates = dict[str, list[Plan]]  # keys "method, probabilities"


def stoppable(stage: Stage, progress: Any) -> Any:
    """A progress callback that also raises Interrupted if the stage should stop."""

    def call(done: int, total: int) -> None:
        progress(done, total)
        if stage.should_stop():
            raise Interrupted("stopped; finished measurements are saved")

    return call


def effects_of(stage: Stage, runner: Runner, dynamics: str, rule: str) -> Effects:
    """The effects for one step rule, measured once and then read from the cache."""
    o = stage.cfg.optimise
    facts = [o.seed, o.calibrate, o.probes, o.calibrate_steps, dynamics, rule]
    key = stage.fingerprint(("process",), runner=runner.key, facts=facts)[:20]
    path = runner.cache / f"effects-{key}.npz"

    def measure() -> None:
        with bar(f"gains {dynamics} {rule}", o.calibrate) as progress:
            seeds = range(o.seed, o.seed + o.calibrate)
            grid = runner.process.grid(o.calibrate_steps)
            family = list(runner.levels.values())
            measure_effects(
                family, grid, dynamics, rule, seeds, runner.shape, runner.device, o.probes, runner.batch,
                stoppable(stage, progress),
            ).save(path)  # fmt: skip

    return cached(path, Effects.load, measure)


def check(stage: Stage) -> None:
    if stage.cfg.optimise.cost not in ("flops", "seconds"):
        raise UserError(f"optimise.cost = {stage.cfg.optimise.cost} is unknown; expected flops or seconds.")
    steps = [count for rule in stage.cfg.optimise.rules for count in rule.steps]
    check_reference(reference_steps(stage), steps, "optimise.reference_steps")


def reference_steps(stage: Stage) -> int:
    return stage.cfg.optimise.reference_steps or stage.process().base_steps


def timed(stage: Stage, runner: Runner) -> dict[str, Any]:
    """{"seconds": per image of one evaluation of each level, "batch", "device", "threads"}.

    Measured once with nothing else running, then read from the cache, so that a repeated run gives the same plans.
    """
    family, batch = list(runner.levels.values()), stage.cfg.compare.batch
    if runner.device.type == "cpu":  # seconds per image hardly depend on the batch, and large images would take long
        batch = max(1, min(batch, int(20e9 / family[-1].flops)))
    where = {"batch": batch, "device": device_model(runner.device), "threads": torch.get_num_threads()}
    key = stage.fingerprint(("precision",), runner=runner.key, **where)[:20]
    path = runner.cache / f"seconds-{key}.json"

    def measure() -> None:
        seconds = seconds_per_image(family, runner.shape, batch, runner.device)
        write_cached(path, {"seconds": dict(zip(runner.levels, seconds, strict=True)), **where})

    return cached(path, read_cached, measure)


def write_cached(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file of the cache, with its name; the name contains a hash of all inputs."""
    write_json(path, {**content, "file": path.name})


def read_cached(path: Path) -> dict[str, Any]:
    """The content given to write_cached; Damaged if it belongs to another file."""
    content = read_json(path, "run make optimise again")
    if content.pop("file", None) != path.name:
        raise Damaged(path, f"{path} holds another file's content: remove it and run make optimise again.")
    return content


def measured_plans(stage: Stage, runner: Runner, effects: Effects, costs: np.ndarray) -> list[Plan]:
    """Plans by the square-root law from measured differences, constant in time, at the configured costs."""
    o, family = stage.cfg.optimise, list(runner.levels.values())
    weights = runner.process.drift_weights(effects.logsnr)
    squares, unit = effects.squares @ weights, costs.tolist()
    out = []
    for steps in o.measured.steps:
        there = effects.on(runner.process.grid(steps).logsnr)
        for cost in o.measured.costs:
            p = probabilities_for_cost(lambda c: measured_probabilities(squares, unit, c), unit, steps, cost * unit[-1])
            if p is not None:
                out.append(_plain_plan("measured", tuple(runner.levels), steps, p, family, there, costs))
    return out


def learned_plans(
    stage: Stage, runner: Runner, effects: Effects, start: list[Plan], costs: np.ndarray
) -> tuple[list[Plan], float]:
    """Plans with probabilities learned by SGD, started from measured ones of similar cost; and the FLOPs spent."""
    o, family, out, spent = stage.cfg.optimise, list(runner.levels.values()), [], 0.0
    dynamics, rule, steps = effects.dynamics, effects.step_rule, o.learned.steps
    grid = runner.process.grid(steps)
    for cost in o.learned.costs:
        wanted = cost * costs[-1]
        nearest = min(start, key=lambda plan: (plan.steps != steps, abs(np.log(plan.cost / wanted))))
        facts = [stage.plain("optimise")["optimise"]["learned"], dynamics, rule, cost, nearest.id]
        facts += [] if o.cost == "flops" else [costs.tolist()]
        key = stage.fingerprint(("process",), runner=runner.key, facts=facts)[:20]
        path = runner.cache / f"learned-{key}.json"

        def learn(path: Path = path, cost: float = cost, wanted: float = wanted, nearest: Plan = nearest) -> None:
            with bar(f"learn {dynamics} {rule}, cost {cost:g}", o.learned.iterations, "iteration") as progress:
                found = learn_probabilities(
                    family, grid, dynamics, rule, runner.shape, runner.device, expected_flops=wanted,
                    start=nearest.table[0].astype(np.float64), iterations=o.learned.iterations, paths=o.learned.paths,
                    draws=o.learned.draws, costs=costs.tolist(), progress=stoppable(stage, progress),
                )  # fmt: skip
            write_cached(path, {"p": found.p.tolist(), "flops": found.flops})

        found = cached(path, read_cached, learn)
        spent += found["flops"]
        p = np.array(found["p"])
        out.append(_plain_plan("learned", tuple(runner.levels), steps, p, family, effects.on(grid.logsnr), costs))
    return out, spent


def _plain_plan(
    source: str, names: tuple[str, ...], steps: int, p: np.ndarray, family: list, effects: Effects, costs: np.ndarray
) -> Plan:
    """A plan for independent coins on the full family, with its predicted error."""
    p = np.broadcast_to(p, (len(effects.logsnr), len(names))).astype(np.float32)
    gains = effects.gains()[0][1:].T
    ratio = 1 / p[:, 1:].astype(np.float64)
    cost = float(Multilevel(tuple(family), p).expected_evaluations(len(p)) @ costs)
    return Plan(
        "independent", source, names, steps, p, cost, float((gains * (ratio - 1)).sum()), None,
        float((ratio * np.sqrt(gains)).max(initial=0.0)),
    )  # fmt: skip


def candidates(
    stage: Stage, runner: Runner, rule: Any, own: dict[tuple[int, int], float], costs: np.ndarray
) -> tuple[Candidates, Effects, float]:
    """Thinned predicted frontiers of all methods for one rule; the effects they use; and the FLOPs spent on learning.

    costs [K]: cost of one evaluation of each level, in the unit that plans minimise.
    """
    o = stage.cfg.optimise
    effects = effects_of(stage, runner, rule.dynamics, rule.step_rule)
    grids = {n: runner.process.grid(n).logsnr for n in rule.steps}
    found: Candidates = {}
    bases = [b for b in o.bases if b is None or b < len(runner.levels) - 1]
    for method in rule.get("methods", o.methods):
        chosen: dict[str, Plan] = {}
        with bar(f"plan {rule.dynamics} {rule.step_rule} {method}", len(grids), unit="grid") as progress:
            for base in bases:
                best = plans(effects, method, grids, own, costs, base=base, progress=stoppable(stage, progress))
                chosen |= {p.id: p for p in spread([p for p in best if len(p.levels) > 1], o.plans)}
        for cost in o.measured.costs:  # at the same costs as the measured probabilities
            plan = plan_for_cost(effects, method, grids, own, cost * costs[-1], costs)
            if plan is not None and len(plan.levels) > 1:
                chosen[plan.id] = plan
        found[f"{method}, optimal"] = list(chosen.values())
    measured = measured_plans(stage, runner, effects, costs) if found else []
    found["independent, measured"] = measured
    learn = measured and rule.get("learn", False)
    found["independent, learned"], spent = (
        learned_plans(stage, runner, effects, measured, costs) if learn else ([], 0.0)
    )
    top = len(runner.levels) - 1
    for key in ("independent, measured", "independent, learned"):
        found[key] = [_with_own_error(p, own.get((top, p.steps))) for p in found[key]]
    return found, effects, spent


def spread(found: list[Plan], most: int) -> list[Plan]:
    """At most `most` of a frontier's plans, spread evenly and including both ends."""
    if len(found) <= most:
        return found
    return [found[i] for i in np.unique(np.round(np.linspace(0, len(found) - 1, most)).astype(int))]


def _with_own_error(plan: Plan, own: float | None) -> Plan:
    return plan if own is None or plan.added is None else replace(plan, predicted=own + plan.added)


def singles(stage: Stage, runner: Runner) -> list[SamplerSetting]:
    """Settings of every level alone on every grid of the plans: a plan's error is at least that of its top level alone.

    Fine grids leave out the cheap levels, which cost much there and add nothing.
    """
    out = []
    largest = list(runner.levels.values())[-1].flops
    for rule in stage.cfg.optimise.rules:
        for name, level in runner.levels.items():
            fine = [n for n in rule.steps if n <= 600 or level.flops > 0.5 * largest]
            out += [SamplerSetting(rule.dynamics, rule.step_rule, "single", (name,), n) for n in fine]
    return out


def diagnosis(stage: Stage, runner: Runner) -> float:
    """Print and save the diagnostics of the family; return the FLOPs spent."""
    o, family, spent, saved = stage.cfg.optimise, list(runner.levels.values()), 0.0, {}
    p = constant_probabilities([level.flops for level in family], gamma=2.5, c=1.0)  # for the table's column of fires
    for dynamics in dict.fromkeys(rule.dynamics for rule in o.rules):
        rule = next(r.step_rule for r in o.rules if r.dynamics == dynamics)
        with bar(f"diagnose {dynamics}", None) as progress:
            found = diagnose(
                family, runner.process, dynamics, rule, list(range(o.seed, o.seed + o.diagnose.seeds)), runner.shape,
                runner.device, steps=o.diagnose.steps, batch=runner.batch, p=p, progress=stoppable(stage, progress),
            )  # fmt: skip
        print(table(found))
        lost = [f.text for f in found.findings if f.severity == "error" and "not finite" in f.text]
        if lost:
            raise UserError(lost[0])
        saved[dynamics] = found.to_json()
        spent += found.flops_spent
        if found.statistics is not None:
            plot_diagnostics(found, stage.results / f"diagnostics-{dynamics}.png")
    write_json(stage.results / "diagnostics.json", saved)
    return spent


def priced(plan: Plan, runner: Runner, seconds: dict[str, float]) -> Plan:
    """The plan with expected FLOPs as its cost, and expected seconds."""
    estimator = plan.build(runner.levels.values())
    counts = estimator.expected_evaluations(len(plan.table))
    flops = float(np.dot(counts, [level.flops for level in estimator.levels]))
    return replace(plan, cost=flops, seconds=float(np.dot(counts, [seconds[level.name] for level in estimator.levels])))


def ablation(stage: Stage, runner: Runner, timing: dict[str, Any], rules: list[RuleInputs]) -> None:
    """Print the cost ratios without each level, and write ablation.json and ablation.png."""
    o, names = stage.cfg.optimise, list(runner.levels)
    seconds = [timing["seconds"][name] for name in names]
    with bar("ablation", None, unit="family") as progress:
        done = 0

        def report(what: str) -> None:
            nonlocal done
            done += 1
            progress.tqdm.set_postfix_str(what, refresh=False)
            stoppable(stage, progress)(done, 2 * len(names))

        found = ablate(rules, seconds, o.ablation.mean, o.ablation.largest, report)
    content = ablation_json(names, [level.flops for level in runner.levels.values()], seconds, found)
    content |= {"tolerance": {"mean": o.ablation.mean, "largest": o.ablation.largest}}
    content |= {key: timing[key] for key in ("batch", "device", "threads")}
    write_json(stage.results / "ablation.json", content)
    plot_ablation(content, stage.results / "ablation.png", stage.cfg.title)
    print(ablation_table(content))


def work(stage: Stage) -> None:
    cfg, o = stage.cfg, stage.cfg.optimise
    check(stage)
    runner, images = sampler_runs.make_runner(stage)
    fingerprint = stage.fingerprint(("optimise",), runner=runner.key)
    if stage.finished(fingerprint, OUTPUTS):
        return
    stage.catch_signals()
    timing = timed(stage, runner)  # before workers use the machine
    costs = np.array([level.flops if o.cost == "flops" else timing["seconds"][n] for n, level in runner.levels.items()])
    spent = diagnosis(stage, runner)

    # ---- errors of single levels, then plans from gains ------------------------------------------------------
    alone = singles(stage, runner)
    errors = [found["costs"]["error"] for found in sampler_runs.run_all(stage, runner, alone, "levels alone")]
    fit = [i for i, error in enumerate(errors) if error is not None]  # without those that diverged
    alone, errors = [alone[i] for i in fit], [errors[i] for i in fit]
    index = {name: i for i, name in enumerate(runner.levels)}
    by_rule, rules = {}, []
    for rule in o.rules:
        if not rule.get("methods", o.methods):
            continue
        own = {
            (index[s.levels[0]], s.steps): e
            for s, e in zip(alone, errors, strict=True)
            if (s.dynamics, s.step_rule) == (rule.dynamics, rule.step_rule)
        }
        found, effects, learning = candidates(stage, runner, rule, own, costs)
        by_rule[rule.dynamics, rule.step_rule] = found
        grids = {n: runner.process.grid(n).logsnr for n in rule.steps}
        rules.append(RuleInputs(effects, rule.get("methods", o.methods), grids, own))
        spent += effects.flops_spent + learning
    ablation(stage, runner, timing, rules)
    all_effects = [rule.effects for rule in rules]
    pool = [p for found in by_rule.values() for group in found.values() for p in group]
    where = runner.cache / "candidates.json"
    save_plans(where, [(p, {}) for p in {p.id: p for p in pool}.values()])

    # ---- selection: run the plans ----------------------------------------------------------------------------
    runner, _ = sampler_runs.make_runner(stage)  # with the candidates
    tried = [setting_of(p, *key) for key, found in by_rule.items() for group in found.values() for p in group]
    tried = list(dict.fromkeys(tried))
    costs = {s: f["costs"] for s, f in zip(tried, sampler_runs.run_all(stage, runner, tried, "plans"), strict=True)}
    chosen = []
    for key, found in by_rule.items():
        for group in found.values():
            measured = {p.id: costs[setting_of(p, *key)]["error"] for p in group}
            for p in frontier(group, lambda p, measured=measured: measured[p.id]):
                facts = {"dynamics": key[0], "step_rule": key[1], "selected_error": measured[p.id]}
                chosen.append((priced(p, runner, timing["seconds"]), facts))

    # ---- artefacts ------------------------------------------------------------------------------------------
    images_run = len(runner.seeds)
    spent += sum(runner.build(s).expected_flops(s.evaluations(runner.process)) for s in [*alone, *tried]) * images_run
    spent += (
        len({r.dynamics for r in o.rules})
        * len(runner.reference_grid.logsnr)
        * list(runner.levels.values())[-1].flops
        * images_run
    )
    seeds_used = sorted({*range(o.seed, o.seed + max(o.calibrate, o.diagnose.seeds)), *runner.seeds})
    calibration = {"flops": float(spent), "gains_flops": float(sum(e.flops_spent for e in all_effects))}
    levels_alone = [
        {"dynamics": s.dynamics, "step_rule": s.step_rule, "level": s.levels[0], "steps": s.steps, "selected_error": e}
        for s, e in zip(alone, errors, strict=True)
    ]
    facts = {"calibration": calibration, "seeds_used": seeds_used, "tried": len(tried), "alone": levels_alone}
    facts |= {"cost_unit": o.cost, "timing": timing, "made_with": runner.made_with}
    save_plans(stage.results / "plans.json", chosen, **facts)
    plot_gains(all_effects, stage.results / "gains.png", cfg.title)
    with Tracker(stage.results, stage.name, stage.plain(), **cfg.tracking, fresh=True) as tracker:
        tracker.log({"plans": len(chosen), "calibration_pflops": spent / 1e15})
        for name in ["gains", "levels", *(path.stem for path in sorted(stage.results.glob("diagnostics-*.png")))]:
            tracker.image(name, Path(stage.results / f"{name}.png"))
    print(f"{len(chosen)} of {len(tried)} plans selected; calibration and selection cost {spent / 1e12:.3g} TFLOP.")
    stage.record(
        fingerprint, [*OUTPUTS, *stage.written("diagnostics-*.png")], stage.manifest(images), plans=len(chosen)
    )


def cost(stage: Stage) -> list[tuple[str, float, float]]:
    """Rows (description, FLOPs, seconds on this device).

    The cost of candidate plans is not known before they are made: it is estimated as a quarter of the largest level at
    every step of the middle grid.
    """
    check(stage)
    o, (levels, seconds) = stage.cfg.optimise, sampler_runs.priced_levels(stage)
    *_, largest = levels.values()
    everything = sum(level.flops for level in levels.values()), sum(seconds.values())
    top = largest.flops, seconds[largest.name]
    dynamics = {rule.dynamics for rule in o.rules}
    visits = len(dynamics) * o.diagnose.seeds * o.diagnose.steps
    finest = reference_steps(stage)
    out = [
        ("diagnostics", visits * everything[0], visits * everything[1]),
        ("references", *(len(dynamics) * finest * o.num_select * t for t in top)),
    ]
    for rule in o.rules:
        methods, name = rule.get("methods", o.methods), f"{rule.dynamics} {rule.step_rule}"
        if methods:
            points, passes = o.calibrate * o.calibrate_steps, 2 + o.probes
            out.append((f"{name}: gains", *(points * (a + passes * t) for a, t in zip(everything, top, strict=True))))
        count = sum(rule.steps) * o.num_select
        out.append((f"{name}: levels alone", count * everything[0], count * everything[1]))
        count = len(methods) * len(o.bases) * o.plans * o.num_select * sorted(rule.steps)[len(rule.steps) // 2] / 4
        out.append((f"{name}: candidate plans, roughly", *(count * t for t in top)))
    return out


@entry_point("optimise")
def main(cfg: Config) -> None:
    run_stage("optimise", cfg, work, cost)


if __name__ == "__main__":
    main()
