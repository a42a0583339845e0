"""The settings of both protocols of a comparison, and their runs: learned probabilities, shared patterns, distances."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..comparison import paper, planned
from ..comparison.features import RealImages
from ..comparison.planned import Planned
from ..comparison.runner import Runner
from ..comparison.settings import Measurement, SamplerSetting, chosen_levels, probabilities_of
from ..diffusion.level import Level, shared_costs
from ..diffusion.reference import reference_evaluations
from ..diffusion.step_rules import step_rule
from ..files import read_json, write_json
from ..multilevel.learned import learn_probabilities
from ..multilevel.plan import Plan
from .runs import run_all
from .seeds import sample_seeds


def run_protocols(exp: Any, runner: Runner, plans: Planned) -> list[tuple[SamplerSetting, Measurement]]:
    """All settings of the protocols asked for, measured, with rows that lack distances only. The settings of shared
    patterns at random stand for all their patterns."""
    found = planned.by_protocol(exp.cfg.protocol, exp.cfg.compare, runner.levels, exp.process.base_steps, plans)
    settings, shared = list(found.get("strict", ())), list[paper.Patterns]()
    if "paper" in found:
        fresh = [*found["paper"], *learned(exp, runner)]
        shared = choose_patterns(exp, runner, [setting for setting in fresh if setting.estimator == "ml_em"])
        settings += [*fresh, *(own.best for own in shared)]
    every = [*settings, *(trial for own in shared for trial in own.trials)]
    measured = dict(zip(every, run_all(exp, runner, every, "compare"), strict=True))
    pairs = [(setting, measured[setting]) for setting in settings] + [own.pooled(measured) for own in shared]
    return planned.complete(pairs, runner.seeds, plans)


def choose_patterns(exp: Any, runner: Runner, settings: list[SamplerSetting]) -> list[paper.Patterns]:
    """The shared patterns of each setting, the best of them chosen on the first samples that select plans."""
    counts = exp.cfg.compare.paper.patterns
    seeds = list(sample_seeds(exp.cfg).patterns)
    selecting = replace(runner, seeds=seeds, num_shared=len(seeds))
    trials = [paper.trials_of(setting, counts.count) for setting in settings]
    every = [trial for own in trials for trial in own]
    found = dict(zip(every, run_all(exp, selecting, every, "choose patterns"), strict=True))
    return [paper.choose(own, found) for own in trials]


def learned(exp: Any, runner: Runner) -> list[SamplerSetting]:
    """Settings with probabilities learned by SGD, begun at constant ones; the runner gets their plans."""
    out, training = [], exp.plain("compare")["compare"]["paper"]["training"]
    for sweep in exp.cfg.compare.paper.learned:
        rule = step_rule(sweep.dynamics, sweep.step_rule)
        for family, cost in ((family, cost) for family in sweep.families for cost in sweep.costs):
            names = chosen_levels(runner.levels, family)
            own = [runner.levels[name] for name in names]
            kinds = ("learned", "independent")
            setting = SamplerSetting(rule.dynamics, rule.name, "ml_em", names, training["steps"], *kinds)
            setting = replace(setting, protocol="paper")
            make = partial(_learn, exp, setting, own, runner, cost, training)
            facts = [training, rule.key, cost, names, runner.gamma, "even in t"]
            read = partial(read_json, hint="run make sample-compare again")
            content = exp.cached("learned.json", facts, read, lambda path, make=make: write_json(path, make()))
            plan = Plan("independent", "learned", names, setting.steps, np.array(content["p"]), cost, None, None)
            runner.plans[plan.id] = plan
            out.append(replace(setting, plan=plan.id))
    return out


def _learn(
    exp: Any, setting: SamplerSetting, family: list[Level], runner: Runner, cost: float, training: Mapping[str, Any]
) -> dict[str, Any]:
    """{"p": [n, K], "flops": of learning} at an expected cost of so many evaluations of the largest level."""
    flops, base = shared_costs(family)
    start = probabilities_of(family, runner.levels, runner.gamma, 1.0)
    numbers = {key: training[key] for key in ("iterations", "paths", "draws")}
    with exp.progress(f"learn {setting.rule.key}, {'+'.join(setting.levels)}", numbers["iterations"], "it") as progress:
        p, spent = learn_probabilities(
            family, setting.rule, setting.grid(exp.process), exp.shape, exp.device, costs=flops.astype(np.float64),
            wanted=cost * (flops[-1] + base) - setting.evaluations(exp.process) * base, start=start, progress=progress,
            **numbers,
        )  # fmt: skip
    return {"p": p.tolist(), "flops": spent}


def add_distances(
    exp: Any, runner: Runner, measured: list[tuple[SamplerSetting, Measurement]], real: RealImages | None
) -> None:
    """Measure the distances of settings on frontiers, and write them into their rows."""
    config, rows = exp.cfg.compare, [m.row for _, m in measured]
    for row in rows:
        row |= {"distance_name": real.name if real else "", "distance_floor": real.floor if real else None}
        row |= dict.fromkeys(planned.DISTANCES)
    if real is None:
        return
    *_, largest = runner.levels.values()
    chosen = planned.for_distances(rows, config.distances, largest)
    run_all(exp, runner, [measured[i][0] for i in chosen], "distances", distances=True)
    for i in chosen:
        features = runner.features(measured[i][0])
        rows[i] |= planned.distances(features, real, config.distance_bootstrap, config.seed)


def cost(exp: Any, levels: dict[str, Level]) -> Counter[str]:
    """Evaluations of each level in a comparison, whose parts are printed."""
    config = exp.cfg.compare
    gamma, largest = 2.5 if config.gamma == "auto" else float(config.gamma), list(levels)[-1]
    plans = planned.read_planned(exp.results / "plans.json", config)
    settings = planned.by_protocol(exp.cfg.protocol, config, levels, exp.process.base_steps, plans)
    references = planned.references_for([s for own in settings.values() for s in own], exp.process)
    patterns, training = config.paper.patterns, config.paper.training
    judged = len(sample_seeds(exp.cfg).errors)
    parts: dict[str, Any] = {}

    def add(part: str, name: str, count: float) -> None:
        parts.setdefault(part, Counter())[name] += count

    for dynamics, steps in references.items():
        evaluations = reference_evaluations(dynamics, steps)
        add("references", largest, evaluations * (judged + (patterns.select if "paper" in settings else 0)))
    for protocol, own in settings.items():
        for setting in own:
            more = 0
            if protocol == "paper" and setting.estimator == "ml_em":
                more = judged + patterns.count * (patterns.select + patterns.judge)
            for name, number in setting.expected_evaluations(levels, gamma, plans.plans, exp.process).items():
                add(f"{protocol}, {len(own)} settings", name, number * (judged + more))
        frontiers = (3 if protocol == "paper" else 2) * len({setting.dynamics for setting in own})
        middle = 0.5 * config.distances.evaluations  # an assumption: their costs are spread evenly
        add("distances", largest, frontiers * config.distances[protocol] * middle * config.num_distance)
    for sweep in config.paper.learned if "paper" in settings else ():
        for wanted in (c for c in sweep.costs for _ in sweep.families):
            runs = judged * 2 + patterns.count * (patterns.select + patterns.judge)
            # three runs and a tangent for each draw, and a reference for each path
            steps = training.iterations * training.paths * (training.steps + 5 * wanted * training.draws)
            add("learned probabilities", largest, wanted * runs + steps)
    for part, counts in parts.items():
        flops = sum(levels[name].flops * number for name, number in counts.items())
        exp.print(f"{part}: {flops / 1e12:,.3f} TFLOP")
    return sum(parts.values(), Counter())
