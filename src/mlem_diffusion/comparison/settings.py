"""Sampler settings, from the configuration to the rows of compare.csv, with costs per image (GFLOPs, not GMACs)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..diffusion.level import Level
from ..diffusion.process import Process, TimeGrid
from ..diffusion.sampler import Estimator, SingleLevel, Stitched
from ..diffusion.step_rules import STEP_RULE_NAMES, StepRule, step_rule
from ..errors import UserError
from ..multilevel.estimators import Multilevel, constant_probabilities
from ..multilevel.plan import Plan

GAUSSIAN = "gauss"  # name of the linear Gaussian denoiser among the levels
_OPTIONAL = re.compile(rf"{GAUSSIAN}|t\d+")  # names of levels that not every family has
Row = dict[str, Any]  # one row of compare.csv
COLUMNS = [
    "protocol", "dynamics", "step_rule", "estimator", "probabilities", "coins", "c", "switch", "levels", "steps",
    "seed", "error", "error_se", "distance", "distance_low", "distance_high", "distance_name", "distance_floor", "kid",
    "num_samples", "num_distance", "network_calls", "gflops_expected", "gflops_realised", "seconds",
    # if known; error_spread: standard deviation over shared patterns
    "top_evaluations", "plan", "predicted", "largest_effect", "selected_error", "pattern", "error_spread", "diverged",
]  # fmt: skip
_TEXT = [
    "protocol", "dynamics", "step_rule", "estimator", "probabilities", "coins", "switch", "levels", "distance_name",
    "plan",
]  # fmt: skip
_WHOLE = ["steps", "seed", "num_samples", "num_distance", "top_evaluations", "diverged", "pattern"]
BASELINES = ("single", "stitched")
MIN_FIRES = 100  # with fewer evaluations of the top level in a run, the error and its standard error are not reliable


@dataclass(frozen=True)
class SamplerSetting:
    """One sampler setting, with the field names of compare.csv."""

    dynamics: str
    step_rule: str
    estimator: str  # "single", "stitched", "ml_em" or "quadrature"
    levels: tuple[str, ...]  # cheap to expensive; of stitched: in order of use
    steps: int  # noise levels of the grid
    probabilities: str = ""  # of ml_em: "constant", or the kind that its plan uses
    coins: str = ""  # kind of coins; of one pattern for all samples: "shared", or "best of 15"
    c: float | None = None  # of ml_em: C of the constant probabilities
    switch: tuple[float, ...] = ()  # of stitched: the fractions of evaluations after which the next level takes over
    plan: str = ""  # id of the plan that holds the table of probabilities or weights
    pattern: int | None = None  # number of the pattern of independent coins that all samples share
    protocol: str = "strict"  # "paper": the grid is even in t

    @property
    def rule(self) -> StepRule:
        return step_rule(self.dynamics, self.step_rule)

    @property
    def row(self) -> Row:
        row = asdict(self) | {"levels": "+".join(self.levels), "switch": "+".join(f"{s:g}" for s in self.switch)}
        usual = {"plan": "", "pattern": None, "protocol": "strict"}  # left out, so that earlier caches stay valid
        return {key: value for key, value in row.items() if key not in usual or value != usual[key]}

    def grid(self, process: Process) -> TimeGrid:
        return process.grid(self.steps, even_in_time=self.protocol == "paper")

    def build(self, levels: Mapping[str, Level], gamma: float, plans: Mapping[str, Plan]) -> Estimator:
        """The estimator of this setting. Raises UserError for unknown levels, kinds or plans."""
        if self.plan:
            if self.plan not in plans:
                raise UserError(f"There is no plan {self.plan}: run make optimise and make sample-compare again.")
            return plans[self.plan].build(levels.values(), self.pattern)
        missing = [name for name in self.levels if name not in levels]
        if missing:
            raise UserError(f"There is no level {missing[0]}; the family has {', '.join(levels)}.")
        family = tuple(levels[name] for name in self.levels)
        if self.estimator == "single":
            return SingleLevel(family[0])
        if self.estimator == "stitched":
            return Stitched(family, self.switch)
        if self.estimator == "ml_em" and self.c is not None:
            p = probabilities_of(family, levels, gamma, self.c)
            return Multilevel(family, p, self.coins if self.pattern is None else "independent", self.pattern)
        raise UserError(f"The estimator {self.estimator!r} with c = {self.c} is unknown.")

    def visits(self, process: Process) -> list[float]:
        """The log-SNRs of the network evaluations that the step rule makes on a grid of `steps` noise levels."""
        return [evaluation.logsnr for evaluation in self.rule.program(self.grid(process))]

    def evaluations(self, process: Process) -> int:
        """The number of these network evaluations."""
        return len(self.visits(process))

    def expected_evaluations(
        self, levels: Mapping[str, Level], gamma: float, plans: Mapping[str, Plan], process: Process
    ) -> dict[str, float]:
        """Expected evaluations of each level for one image."""
        estimator = self.build(levels, gamma, plans)
        counts = estimator.expected_evaluations(self.evaluations(process))
        return {level.name: float(count) for level, count in zip(estimator.levels, counts, strict=True)}


@dataclass(frozen=True)
class Measurement:
    """What was measured of a setting, with the same seeds in all settings; no images of functions."""

    row: Row  # of compare.csv, costs per image
    errors: np.ndarray  # squared error of each seed [n]; of several shared patterns [P, m], m <= n
    images: np.ndarray | None = None  # of the first samples, uint8 [M, 3, H, W]
    work: Mapping[str, float] = field(default_factory=dict)  # how often each part of a `Timing` occurs per image


def probabilities_of(family: Sequence[Level], levels: Mapping[str, Level], gamma: float, c: float) -> np.ndarray:
    """The constant probabilities of a family of these levels, with C relative to the cheapest network: beside the
    Gaussian level it would have no useful size."""
    unit = min(level.flops for name, level in levels.items() if name != GAUSSIAN)
    return constant_probabilities([level.flops for level in family], gamma, c, unit)


def setting_of(plan: Plan, dynamics: str, step_rule: str) -> SamplerSetting:
    """The setting that runs a plan. If each evaluation runs one network alone, it is a baseline, whoever found it."""
    if len(plan.levels) == 1:
        return SamplerSetting(dynamics, step_rule, "single", plan.levels, plan.steps)
    if plan.stages is not None:
        order, firsts = zip(*plan.stages, strict=True)
        switch = tuple(round(first / len(plan.table), 6) for first in firsts[1:])  # as compare.csv keeps them
        return SamplerSetting(dynamics, step_rule, "stitched" if switch else "single", order, plan.steps, switch=switch)
    kind, coins = ("quadrature", "") if plan.method == "quadrature" else ("ml_em", plan.method)
    return SamplerSetting(dynamics, step_rule, kind, plan.levels, plan.steps, plan.probabilities, coins, plan=plan.id)


def setting_from(values: Any) -> SamplerSetting:
    """A setting from a row or a configuration; levels are a list or joined by "+". UserError if it is incomplete."""
    if not isinstance(values, Mapping):
        raise UserError(f"A sampler is best, or a setting such as '{{dynamics: ode, ...}}', and not {values!r}.")
    keys = [f.name for f in fields(SamplerSetting)]
    given: dict[str, Any] = {key: values[key] for key in keys if values.get(key) not in (None, "")}
    missing = [name for name in ("dynamics", "step_rule", "estimator", "levels", "steps") if name not in given]
    if missing:
        raise UserError(f"The sampler lacks the key {missing[0]}; it takes the columns of compare.csv.")
    names = given["levels"]
    given["levels"] = tuple(names.split("+") if isinstance(names, str) else names)
    if "switch" in given:  # "0.25+0.5", a list, or one number
        parts = given["switch"] if isinstance(given["switch"], (list, tuple)) else str(given["switch"]).split("+")
        given["switch"] = tuple(map(float, parts))
    return SamplerSetting(**given)


def telescope(levels: Mapping[str, Level]) -> dict[str, Level]:
    """The levels that plans use: those with a teacher, it and the Gaussian one; without a teacher, all."""
    taught = {name for name, level in levels.items() if level.teacher}
    chosen = {GAUSSIAN, *taught, *(levels[name].teacher for name in taught)} if taught else set(levels)
    return {name: level for name, level in levels.items() if name in chosen}


def _choose(levels: Mapping[str, Level], which: Any) -> tuple[str, ...]:
    """Level names from "all", "largest", or a list of names and of indices of the networks without a teacher.
    Levels that not every family has, "gauss" and those with a teacher, are left out where they are missing."""
    if which == "all":
        return tuple(levels)
    networks = [name for name, level in levels.items() if name != GAUSSIAN and level.teacher is None]
    try:
        known = [i for i in ([-1] if which == "largest" else which) if not _OPTIONAL.fullmatch(str(i)) or i in levels]
        chosen: list[Any] = [i if i in levels else networks[int(i)] for i in known]
        return tuple(dict.fromkeys(chosen))  # [0, 2, -1] of three levels names the last one twice
    except (IndexError, TypeError, ValueError) as error:
        raise UserError(f"levels = {which!r} does not fit a family of {len(networks)} levels.") from error


def chosen_levels(levels: Mapping[str, Level], family: Any) -> tuple[str, ...]:
    """The names of a family of ML-EM; "all" are the networks without a teacher."""
    data = tuple(name for name, level in levels.items() if level.teacher is None and name != GAUSSIAN)
    return data if family == "all" else _choose(levels, family)


def settings_of(
    config: Any, levels: Mapping[str, Level], base_steps: int, chains: Mapping[str, Sequence[str]] | None = None
) -> list[SamplerSetting]:
    """All settings of a `compare` configuration for these levels, cheap to expensive.
    chains: {rule: names of its best chain of levels}, from plans.json; for other rules that of the same dynamics. A
    family "chain" is left out if none is known or if it is that of all networks. The Gaussian level and those with a
    teacher belong to "all" of the baselines, but not to "all" of ML-EM, whose constant probabilities assume a power law
    of the networks' errors; a chain may have them."""
    out: list[SamplerSetting] = []
    for sweep in config["baselines"]:
        alone: list[Any] = list(_choose(levels, sweep["levels"]))
        for name, steps in product(alone, sweep["steps"]):
            out.append(SamplerSetting(sweep["dynamics"], sweep["step_rule"], "single", (name,), steps))
    for sweep in config["stitched"]:
        rule = (sweep["dynamics"], sweep["step_rule"])
        for sequence, steps, switch in product(sweep["sequences"], sweep["steps"], sweep["switch"]):
            order = _choose(levels, sequence)
            if len(order) == len(sequence) == len(switch) + 1:  # else the family lacks a level, or names one twice
                out.append(SamplerSetting(*rule, "stitched", order, steps, switch=tuple(map(float, switch))))
    for sweep in config["ml_em"]:
        rule, known = (sweep["dynamics"], sweep["step_rule"]), list(chosen_levels(levels, "all"))
        alike = [chain for key, chain in (chains or {}).items() if key.startswith(f"{sweep['dynamics']}/")]
        chain = (chains or {}).get("/".join(rule), alike[0] if alike else known)
        wanted = [family for family in sweep["families"] if family != "chain" or list(chain) != known]
        families: list[Any] = [
            tuple(chain) if family == "chain" else chosen_levels(levels, family) for family in wanted
        ]
        for names, steps, coins, c in product(families, sweep["steps"], sweep["coins"], sweep["c"]):
            out.append(SamplerSetting(*rule, "ml_em", names, steps, "constant", coins, float(c)))
    for setting in out:
        step_rule(setting.dynamics, setting.step_rule)  # raises UserError if it is unknown
        if not 2 <= setting.steps <= base_steps:
            raise UserError(f"compare: {setting.steps} steps are outside 2..{base_steps} (process.base_steps).")
    return list(dict.fromkeys(out))


def frame_of(rows: Iterable[Mapping[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    """Rows as a DataFrame: an empty number is NaN, an empty text "". ValueError for a number that is none."""
    frame = pd.DataFrame(rows)
    frame = frame.astype({column: object if column in _TEXT else float for column in frame})
    whole = [column for column in _WHOLE if column in frame and frame[column].notna().all()]
    return frame.fillna(dict.fromkeys(_TEXT, "")).astype(dict.fromkeys(whole, int))


def to_text(frame: pd.DataFrame) -> str:
    """The content of compare.csv: columns in their fixed order, numbers with six digits."""
    columns = [name for name in COLUMNS if name in frame]
    whole = {name: "Int64" for name in _WHOLE if name in frame}
    return frame[columns].astype(whole).to_csv(index=False, float_format="%.6g", lineterminator="\n")


def read_table(path: Path) -> pd.DataFrame:
    """The frame of a compare.csv; ValueError if it is damaged. Earlier tables know one protocol only."""
    found = frame_of(pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str)))
    return found.assign(protocol=found.get("protocol", "strict"))


def for_figures(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with two columns that the figures need: "method" (`method_of`) and "trusted"."""
    rows = frame.to_dict("records")
    return frame.assign(method=[method_of(row) for row in rows], trusted=[trusted(row) for row in rows])


def is_multilevel(row: Mapping[str, Any]) -> bool:
    return row["estimator"] not in BASELINES


def method_of(row: Mapping[str, Any]) -> str:
    """The method of a row: the baselines "single" and "stitched", "coins" (independent coins, any p), "shared" (one
    pattern of them for all samples), "pattern" (the best of several patterns) or "other"."""
    if not is_multilevel(row):
        return row["estimator"]
    known = {"independent": "coins", "shared": "shared"}
    return "pattern" if row["coins"].startswith("best of") else known.get(row["coins"], "other")


def trusted(row: Mapping[str, Any]) -> bool:
    """False for an ML-EM row with fewer than MIN_FIRES evaluations of its top level."""
    return row["estimator"] != "ml_em" or row["top_evaluations"] >= MIN_FIRES


def describe(row: Mapping[str, Any]) -> str:
    """A readable name of a row's setting, such as "ML-EM w4+w8+w16, DDIM, 64 steps, systematic coins, C = 0.3"."""
    names, kind = row["levels"].split("+"), row["estimator"].replace("ml_em", "ML-EM")
    levels = "+".join(names) if len(names) <= 4 else f"{names[0]}+…+{names[-1]} ({len(names)} levels)"
    rule, steps = STEP_RULE_NAMES[row["step_rule"]], f"{row['steps']} steps"
    parts = [rule, levels, steps] if kind == "single" else [f"{kind} {levels}", rule, steps]
    if row["coins"]:
        parts.append(f"{row['coins']} {'pattern' if method_of(row) in ('shared', 'pattern') else 'coins'}")
    if row["probabilities"] not in ("", "constant"):
        parts.append(f"{row['probabilities']} probabilities")
    if pd.notna(row["c"]):
        parts.append(f"C = {row['c']:.3g}")
    if row["switch"]:
        parts.append(f"switch at {row['switch'].replace('+', ' and ')}")
    return ", ".join(parts)
