"""Sampler settings from a configuration, a row or a plan, and their estimators. Fields are named as in compare.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..diffusion.estimator import Estimator, SingleLevel, Stitched
from ..diffusion.level import Level
from ..diffusion.process import Process
from ..diffusion.step_rules import STEP_RULES, step_rule_of
from ..errors import UserError
from ..multilevel.estimators import Multilevel
from ..multilevel.plan import Plan
from ..multilevel.probabilities import constant_probabilities


@dataclass(frozen=True)
class SamplerSetting:
    """One sampler setting, with the field names of compare.csv."""

    dynamics: str
    step_rule: str
    estimator: str  # "single", "stitched", "ml_em" or "quadrature"
    levels: tuple[str, ...]
    steps: int  # noise levels of the grid
    probabilities: str = ""  # of ml_em: "constant", or the kind that its plan uses
    coins: str = ""  # kind of coins, "-shared" appended for one set of coins per batch
    c: float | None = None  # of ml_em: C of the constant probabilities
    switch: float | None = None  # of stitched: the fraction of evaluations made with the cheaper level
    plan: str = ""  # id of the plan that holds the table of probabilities or weights

    def build(self, levels: Mapping[str, Level], gamma: float, plans: Mapping[str, Plan] | None = None) -> Estimator:
        """The estimator of this setting. Raises UserError for unknown levels, kinds or plans."""
        if self.plan:
            if plans is None or self.plan not in plans:
                raise UserError(f"There is no plan {self.plan}; run make optimise again.")
            return plans[self.plan].build(levels.values())
        missing = [name for name in self.levels if name not in levels]
        if missing:
            raise UserError(f"There is no level {missing[0]}; the family has {', '.join(levels)}.")
        family = tuple(levels[name] for name in self.levels)
        if self.estimator == "single":
            return SingleLevel(family[0])
        if self.estimator == "stitched" and self.switch is not None:
            return Stitched(family[0], family[-1], self.switch)
        if self.estimator == "ml_em" and self.c is not None:
            p = constant_probabilities([level.flops for level in family], gamma, self.c)
            return Multilevel(family, p, self.coins.removesuffix("-shared"), self.coins.endswith("-shared"))
        raise UserError(f"The estimator {self.estimator!r} with c = {self.c}, switch = {self.switch} is unknown.")

    def evaluations(self, process: Process) -> int:
        """Network evaluations that the step rule makes on a grid of `steps` noise levels."""
        return len(step_rule_of(self.dynamics, self.step_rule).program(process.grid(self.steps)))


def setting_of(plan: Plan, dynamics: str, step_rule: str) -> SamplerSetting:
    """The setting that runs a plan."""
    if len(plan.levels) == 1:
        return SamplerSetting(dynamics, step_rule, "single", plan.levels, plan.steps)
    if plan.method == "quadrature":
        return SamplerSetting(
            dynamics, step_rule, "quadrature", plan.levels, plan.steps, plan.probabilities, plan=plan.id
        )
    return SamplerSetting(
        dynamics, step_rule, "ml_em", plan.levels, plan.steps, plan.probabilities, plan.method, plan=plan.id
    )


def setting_from(values: Mapping[str, Any]) -> SamplerSetting:
    """A setting from a row or a configuration. Levels are a list or joined by "+"; blank fields are None or ""."""
    names = values["levels"]

    def number(key: str) -> float | None:
        return None if values.get(key) in (None, "") else float(values[key])

    return SamplerSetting(
        dynamics=str(values["dynamics"]),
        step_rule=str(values["step_rule"]),
        estimator=str(values["estimator"]),
        levels=tuple(names.split("+") if isinstance(names, str) else names),
        steps=int(values["steps"]),
        probabilities=values.get("probabilities") or "",
        coins=values.get("coins") or "",
        c=number("c"),
        switch=number("switch"),
        plan=str(values.get("plan") or ""),
    )


def _choose(names: Sequence[str], which: Any) -> list[str]:
    """Level names from "all", "largest" or a list of indices."""
    if which == "all":
        return list(names)
    try:
        chosen = [names[int(i)] for i in ([-1] if which == "largest" else which)]
        return list(dict.fromkeys(chosen))  # [0, 2, -1] of three levels names the last one twice
    except (IndexError, TypeError, ValueError) as error:
        raise UserError(f"levels = {which!r} does not fit a family of {len(names)} levels.") from error


def settings_of(
    config: Mapping[str, Any], names: Sequence[str], base_steps: int, beside: Sequence[str] = ()
) -> list[SamplerSetting]:
    """All settings of a `compare` configuration for a family with these level names, cheap to expensive.

    `beside`: extra levels without an index (a Gaussian denoiser); a sweep with levels "all" has them as baselines too.
    """
    out: dict[SamplerSetting, None] = {}
    for sweep in config["baselines"]:
        for name in [*(beside if sweep["levels"] == "all" else ()), *_choose(names, sweep["levels"])]:
            for steps in sweep["steps"]:
                out[SamplerSetting(sweep["dynamics"], sweep["step_rule"], "single", (name,), steps)] = None
    for sweep in config["stitched"]:
        for pair in sweep["pairs"]:
            for steps in sweep["steps"]:
                for switch in sweep["switch"]:
                    pair_names = tuple(_choose(names, pair))
                    s = SamplerSetting(
                        sweep["dynamics"],
                        sweep["step_rule"],
                        "stitched",
                        pair_names,
                        steps,
                        switch=float(switch),
                    )
                    out[s] = None
    for sweep in config["ml_em"]:
        for family in sweep["families"]:
            for steps in sweep["steps"]:
                for coins in sweep["coins"]:
                    for c in sweep["c"]:
                        chosen = tuple(_choose(names, family))
                        s = SamplerSetting(
                            sweep["dynamics"],
                            sweep["step_rule"],
                            "ml_em",
                            chosen,
                            steps,
                            "constant",
                            coins,
                            float(c),
                        )
                        out[s] = None
    for setting in out:
        if (setting.dynamics, setting.step_rule) not in STEP_RULES:
            raise UserError(f"compare: there is no step rule {setting.step_rule} for {setting.dynamics}.")
        if not 2 <= setting.steps <= base_steps:
            raise UserError(f"compare: {setting.steps} steps are outside 2..{base_steps} (process.base_steps).")
    return list(out)


def row_of(setting: SamplerSetting, costs: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A compare.csv row from a setting, its measured values and the columns that all rows share."""
    row = asdict(setting) | dict(costs) | more
    if not setting.plan:
        row.pop("plan")
    row["levels"] = "+".join(setting.levels)
    return row


def best_setting(rows: Sequence[Mapping[str, Any]], tolerance: float = 0.05) -> dict[str, Any]:
    """The cheapest row (FLOPs) whose distance is within `tolerance` of the smallest distance."""
    measured = [row for row in rows if row.get("distance") is not None]
    if not measured:
        raise UserError("No setting has a distance, so none can be called best.")
    best = min(row["distance"] for row in measured)
    limit = best + tolerance * abs(best)  # rounding can make a zero distance negative
    return dict(min((r for r in measured if r["distance"] <= limit), key=lambda r: r["gflops_realised"]))
