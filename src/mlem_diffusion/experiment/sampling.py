"""The sampler of make sample: the one in the configuration, or the comparison's."""

from collections.abc import Mapping
from typing import Any

from ..comparison.choice import choose
from ..comparison.settings import SamplerSetting, setting_from
from ..files import expect_content, read_json
from ..multilevel.plan import Plan, load_plans
from .runs import check_levels

_AGAIN = "run make sample-compare ARGS=force=true"


def chosen(exp: Any, levels: Mapping[str, Any]) -> tuple[SamplerSetting, float, dict[str, Plan], str]:
    """The setting to sample with, the gamma of its probabilities, the plans, and sentences that say why.
    Raises UserError if the comparison was made with other levels, or if its plan is gone."""
    given, path = exp.plain("sampler")["sampler"], exp.results / "best.json"
    gamma, reason = 2.5, "the sampler is given."
    if given != "best":
        setting = setting_from(given)
        gamma = float(given.get("gamma", gamma))
    else:
        best = read_json(path, _AGAIN) if path.is_file() else None
        with expect_content(path, _AGAIN):
            if best is not None:
                check_levels(exp, path.name, best.get("made_with"), "make sample-compare")
                gamma = float(best["gamma"])
            row, reason = choose(best, exp.plain("sample")["sample"], list(levels)[-1])
            setting = setting_from(row)
    return setting, gamma, load_plans(exp.results / "plans.json")[0] if setting.plan else {}, reason
