"""The optimiser's plans in the comparison: settings that run them, and what plans add to the rows of compare.csv."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..diffusion.level import Level
from ..diffusion.process import Process
from ..diffusion.reference import reference_steps
from ..errors import UserError
from ..files import expect_content
from ..multilevel.plan import Plan, load_plans
from ..statistics import frontier
from .features import RealImages, distance_interval, kernel_distance
from .paper import fresh_settings
from .runner import Runner
from .settings import Measurement, Row, SamplerSetting, describe, is_multilevel, setting_of, settings_of, trusted

DISTANCES = ("distance", "distance_low", "distance_high", "kid", "num_distance")


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
            if first < config.seed + max(config.num_samples, config.num_distance) and config.seed <= last:
                text = f"The plans were made with sample seeds of this comparison ({part}: {first} to {last})"
                raise UserError(f"{text}: change compare.seed.")
        spent, made_with = content["calibration"]["flops"], content.get("made_with")
        return Planned(plans, settings, facts, content.get("chains", {}), spent, content["cost_unit"], made_with)


def all_settings(config: Any, levels: Mapping[str, Level], base_steps: int, planned: Planned) -> list[SamplerSetting]:
    """The configured settings and the plans; those that share noise increments are neighbours."""
    settings = dict.fromkeys([*settings_of(config, levels, base_steps, planned.chains), *planned.settings])
    return sorted(settings, key=lambda s: (s.dynamics, s.rule.clock or "", s.steps))


def by_protocol(
    asked: str, config: Any, levels: Mapping[str, Level], base_steps: int, plans: Planned
) -> dict[str, list[SamplerSetting]]:
    """{protocol: its settings, without learned probabilities and shared patterns}; asked: "both", or one of them."""
    found = {}
    if asked != "paper":
        found["strict"] = all_settings(config, levels, base_steps, plans)
    if asked != "strict":
        found["paper"] = fresh_settings(config.paper, levels, base_steps)
    return found


def references_for(settings: Iterable[SamplerSetting], process: Process) -> dict[str, int]:
    """{dynamics: noise levels of the reference} for these settings; UserError if the base grid is too coarse."""
    steps: dict[str, list[int]] = {}
    for setting in settings:
        steps.setdefault(setting.dynamics, []).append(setting.steps)
    return {dynamics: reference_steps(process, counts) for dynamics, counts in sorted(steps.items())}


def complete(
    measured: Iterable[tuple[SamplerSetting, Measurement]], seeds: Sequence[int], planned: Planned
) -> list[tuple[SamplerSetting, Measurement]]:
    """The settings with whole rows but for distances: protocol, seeds, and what plans add."""
    out = []
    for setting, m in measured:
        shared = {"protocol": setting.protocol, "seed": seeds[0], "num_samples": m.errors.shape[-1]}
        out.append((setting, replace(m, row=m.row | shared | planned.facts.get(setting, {}))))
    return out


def for_distances(rows: Sequence[Row], config: Any, largest: Level) -> list[int]:
    """The places of the rows whose distance is measured, by a `compare.distances` configuration: so many of each
    protocol's frontiers of error against FLOPs, evenly spread over it in order of cost, with both ends; in the paper's,
    EM with the largest level has one of its own. Those that cost more than `evaluations` of that level are left out."""

    def kind(row: Row) -> Any:
        return is_multilevel(row) or (row["protocol"] == "paper" and row["levels"] == largest.name and "largest")

    found: list[int] = []
    for (protocol, *_), own in frontiers(rows, kind).items():
        cheap = [i for i in own if rows[i]["gflops_realised"] <= config.evaluations * largest.flops * 1.01e-9]
        places = np.linspace(0, len(cheap) - 1, min(config[protocol], len(cheap)))
        found += [cheap[i] for i in places.round().astype(int)]
    return found


def distances(features: np.ndarray, real: RealImages, replicates: int, seed: int) -> Row:
    """The columns of DISTANCES for features [N, D], with an interval from this many bootstrap replicates."""
    kid = None if real.features is None else kernel_distance(features, real.features)
    values = (*distance_interval(features, real.moments, replicates, seed), kid, len(features))
    return dict(zip(DISTANCES, values, strict=True))


def frontiers(rows: Sequence[Row], kind: Callable[[Row], Any] = is_multilevel) -> dict[tuple[str, str, Any], list[int]]:
    """{(protocol, dynamics, kind): places of the rows on a frontier of error against FLOPs}, cheap first."""
    groups: dict[Any, list[Row]] = {}
    for i, row in enumerate(rows):
        if trusted(row) and "diverged" not in row and row["coins"] != "shared":  # those are many samplers
            key = (row["protocol"], row["dynamics"], kind(row))
            groups.setdefault(key, []).append(row | {"index": i})
    best = {key: frontier(own, "gflops_realised", "error") for key, own in groups.items()}
    return {key: [row["index"] for row in own] for key, own in best.items()}


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
    reference = runner.pictures(runner.reference(dynamics)[: runner.grid_images])
    return [("reference: largest level, finest grid", reference), *found]
