"""The optimiser's plans in the comparison: settings that run them, and what plans add to the rows of compare.csv."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.pixels import to_uint8
from ..diffusion.level import Level
from ..diffusion.process import Process
from ..diffusion.reference import reference_evaluations, reference_steps
from ..errors import UserError
from ..files import expect_content
from ..multilevel.plan import Plan, load_plans
from ..statistics import frontier
from .features import RealImages, distance_interval
from .runner import Runner
from .settings import Measurement, Row, SamplerSetting, describe, is_multilevel, setting_of, settings_of, trusted


@dataclass(frozen=True)
class Planned:
    """The content of plans.json; without the file there are no plans."""

    plans: Mapping[str, Plan] = field(default_factory=dict)
    settings: Sequence[SamplerSetting] = ()  # those that run the plans
    facts: Mapping[SamplerSetting, Row] = field(default_factory=dict)  # further columns
    chains: Mapping[str, Sequence[str]] = field(default_factory=dict)  # {rule: its best chain of levels}
    flops: float = 0.0  # cost of the calibration
    unit: str = "flops"  # the cost that plans minimise, "flops" or "seconds"
    made_with: dict[str, Any] | None = None  # the hashes of images and levels


def read_planned(path: Path, config: Any) -> Planned:
    """Planned from plans.json, if there is one and a `compare` configuration does not leave its plans out.
    Raises UserError if the plans were selected on sample seeds of the comparison."""
    if config.plans == "none" or not path.is_file():
        return Planned()
    plans, content = load_plans(path)
    with expect_content(path, "run make optimise again"):
        settings, facts = [], {}
        for e in content["plans"]:
            plan = plans[e["id"]]
            setting = setting_of(plan, e["dynamics"], e["step_rule"])
            more = {"predicted": plan.predicted, "largest_effect": plan.largest_effect} if setting.plan else {}
            facts[setting] = more | {"selected_error": e["selected_error"]}
            settings.append(setting)
        for part in ("calibration", "selection"):
            first, last = content["seeds"][part]
            if first < config.seed + config.num_samples and config.seed <= last:
                text = f"The plans were made with sample seeds of this comparison ({part}: {first} to {last})"
                raise UserError(f"{text}: change compare.seed.")
        spent, made_with = content["calibration"]["flops"], content.get("made_with")
        return Planned(plans, settings, facts, content.get("chains", {}), spent, content["cost_unit"], made_with)


def all_settings(config: Any, levels: Mapping[str, Level], base_steps: int, planned: Planned) -> list[SamplerSetting]:
    """The configured settings and the plans; those that share noise increments are neighbours."""
    settings = dict.fromkeys([*settings_of(config, levels, base_steps, planned.chains), *planned.settings])
    return sorted(settings, key=lambda s: (s.dynamics, s.rule.clock or "", s.steps))


def references_for(settings: Iterable[SamplerSetting], process: Process) -> dict[str, int]:
    """{dynamics: noise levels of the reference} for these settings; UserError if the base grid is too coarse."""
    steps: dict[str, list[int]] = {}
    for setting in settings:
        steps.setdefault(setting.dynamics, []).append(setting.steps)
    return {dynamics: reference_steps(process, counts) for dynamics, counts in sorted(steps.items())}


def expected_evaluations(config: Any, levels: Mapping[str, Level], process: Process, planned: Planned) -> Counter[str]:
    """The evaluations of each level in a comparison: of its settings and their references."""
    gamma, count = 2.5 if config["gamma"] == "auto" else float(config["gamma"]), config["num_samples"]
    settings, total = all_settings(config, levels, process.base_steps, planned), Counter()
    for setting in settings:
        for name, number in setting.expected_evaluations(levels, gamma, planned.plans, process).items():
            total[name] += number * count
    for dynamics, steps in references_for(settings, process).items():
        total[list(levels)[-1]] += reference_evaluations(dynamics, steps) * min(config["num_reference"], count)
    return total


def complete(
    settings: Sequence[SamplerSetting], measured: Sequence[Measurement], seeds: Sequence[int],
    real: RealImages | None, planned: Planned, replicates: int = 20,
) -> list[Measurement]:  # fmt: skip
    """The measurements with whole rows: seeds, what plans add, and, for settings on a frontier of error against FLOPs,
    the distance to real images with its interval from this many bootstrap replicates."""
    columns = ("distance", "distance_low", "distance_high")
    shared = {"seed": seeds[0], "num_samples": len(seeds), **dict.fromkeys(columns)}
    shared |= {"distance_name": real.name if real else "", "distance_floor": real.floor if real else None}
    pairs = zip(settings, measured, strict=True)
    out = [replace(m, row=m.row | shared | planned.facts.get(setting, {})) for setting, m in pairs]
    if real is not None:
        for m in on_frontiers(out):
            found = distance_interval(m.features, real.moments, replicates, seeds[0])
            m.row.update(zip(columns, found, strict=True))
    return out


def on_frontiers(measured: Sequence[Measurement]) -> list[Measurement]:
    """The settings on the frontiers of error against FLOPs of each dynamics: of its baselines, and of the others."""
    groups: dict[Any, list[Row]] = {}
    for i, m in enumerate(measured):
        if trusted(m.row):
            groups.setdefault((m.row["dynamics"], is_multilevel(m.row)), []).append(m.row | {"index": i})
    return [measured[row["index"]] for rows in groups.values() for row in frontier(rows, "gflops_realised", "error")]


def examples(measured: Iterable[Measurement], dynamics: str, runner: Runner) -> list[tuple[str, Any]]:
    """(label, images) of the reference, and of three baselines on their frontier with the best ML-EM as cheap."""
    rows: list[Row] = [m.row | {"images": m.images} for m in measured if m.row["dynamics"] == dynamics]
    multilevel = [row for row in rows if is_multilevel(row)]
    base = frontier([row for row in rows if not is_multilevel(row)], "gflops_realised", "error")
    found: list[tuple[str, Any]] = []
    for i in sorted({len(base) // 4, len(base) // 2, (3 * len(base)) // 4}) if base else ():
        ours = [row for row in multilevel if row["gflops_realised"] <= 1.02 * base[i]["gflops_realised"]]
        for row in (base[i], *sorted(ours, key=lambda row: row["error"])[:1]):
            label = f"{describe(row)}\n{row['gflops_realised']:.3g} GFLOP, error {row['error']:.2g}"
            found.append((label, row["images"]))
    reference = to_uint8(runner.reference(dynamics)[: runner.grid_images])
    return [("reference: largest level, finest grid", reference), *found]
