"""The settings of both protocols of a comparison, and their runs: learned probabilities, shared patterns, distances."""

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

from ..comparison import paper, planned
from ..comparison.features import RealImages
from ..comparison.planned import Planned
from ..comparison.runner import Runner
from ..comparison.settings import Measurement, SamplerSetting, chosen_levels, probabilities_of
from ..diffusion.level import Level, base_evaluations, shared_costs
from ..diffusion.reference import reference_evaluations
from ..multilevel.plan import Plan
from .plan_search import learned_table
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
    """Settings with probabilities learned by SGD, begun at constant ones; the runner gets their plans. Their costs are
    in evaluations of the largest level."""
    out, training = [], exp.plain("compare")["compare"]["paper"]["training"]
    for sweep in exp.cfg.compare.paper.learned:
        for family, cost in product(sweep.families, sweep.costs):
            names, kinds = chosen_levels(runner.levels, family), ("learned", "independent")
            setting = SamplerSetting(sweep.dynamics, sweep.step_rule, "ml_em", names, training["steps"], *kinds)
            setting, own = replace(setting, protocol="paper"), [runner.levels[name] for name in names]
            flops, base = shared_costs(own)
            wanted = cost * (flops[-1] + base) - base_evaluations(own, setting.visits(exp.process)) * base
            start = probabilities_of(own, runner.levels, runner.gamma, 1.0)
            facts = [training, setting.rule.key, cost, names, runner.gamma, "even in t"]
            grid = setting.grid(exp.process)
            p, _ = learned_table(exp, own, setting.rule, grid, training, facts, flops.astype(float), wanted, start)
            plan = Plan("independent", "learned", names, setting.steps, p, cost, None, None)
            runner.plans[plan.id] = plan
            out.append(replace(setting, plan=plan.id))
    return out


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
    patterns, training, judged = config.paper.patterns, config.paper.training, config.num_samples
    shared = judged + patterns.count * (patterns.select + patterns.judge)  # the best pattern, and all of them
    parts: dict[str, Any] = {}

    def add(part: str, name: str, count: float) -> None:
        parts.setdefault(part, Counter())[name] += count

    for dynamics, steps in references.items():
        evaluations = reference_evaluations(dynamics, steps)
        add("references", largest, evaluations * (judged + (patterns.select if "paper" in settings else 0)))
    for protocol, own in settings.items():
        for setting in own:
            more = shared if protocol == "paper" and setting.estimator == "ml_em" else 0
            for name, number in setting.expected_evaluations(levels, gamma, plans.plans, exp.process).items():
                add(f"{protocol}, {len(own)} settings", name, number * (judged + more))
        frontiers = (3 if protocol == "paper" else 2) * len({setting.dynamics for setting in own})
        middle = 0.5 * config.distances.evaluations  # an assumption: their costs are spread evenly
        add("distances", largest, frontiers * config.distances[protocol] * middle * config.num_distance)
    for sweep in config.paper.learned if "paper" in settings else ():
        for wanted, _ in product(sweep.costs, sweep.families):
            # three runs and a tangent for each draw, and a reference for each path
            steps = training.iterations * training.paths * (training.steps + 5 * wanted * training.draws)
            add("learned probabilities", largest, wanted * (judged + shared) + steps)
    for part, counts in parts.items():
        flops = sum(levels[name].flops * number for name, number in counts.items())
        exp.print(f"{part}: {flops / 1e12:,.3f} TFLOP")
    return sum(parts.values(), Counter())
