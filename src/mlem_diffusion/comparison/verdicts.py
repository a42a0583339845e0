"""Speed-ups of the optimiser's plans by method, and the windows of errors in which they hold."""

import math
from collections.abc import Sequence
from typing import Any

from .foresight import chosen_blindly, prediction
from .settings import Measurement
from .speedup import equal_error
from .table import BASELINES, MIN_FIRES

FIRST_ORDER = ("em", "ddpm", "ddim")
# names of methods in verdicts.json: "<coins>, <probabilities> p"
METHODS = [f"independent, {source} p" for source in ("constant", "measured", "optimal", "learned")]
METHODS += ["nested, optimal p", "systematic, constant p", "systematic, optimal p"]


def verdicts(
    settings: Sequence[Measurement], calibration_flops: float, seed: int = 0, unit: str = "flops"
) -> dict[str, Any]:
    """{"dynamics/rule": entry} for each dynamics and step rule for which an optimiser's plans were run.

    An entry compares each method with the first-order baselines of the same dynamics and with all of them, and judges
    the optimiser's foresight. Speed-ups are at equal squared error, in expected FLOPs, or in measured seconds if the
    plans were made for seconds (`unit`).
    """
    cost = {"flops": "gflops_expected", "seconds": "seconds"}[unit]
    out: dict[str, Any] = {}
    for dynamics, rule in dict.fromkeys((m.row["dynamics"], m.row["step_rule"]) for m in settings if m.row.get("plan")):
        here = [m for m in settings if m.row["dynamics"] == dynamics]
        base = [m for m in here if m.row["estimator"] in BASELINES]
        ours = [m for m in here if m.row["estimator"] not in BASELINES and m.row["top_evaluations"] >= MIN_FIRES]
        planned = [m for m in ours if m.row["step_rule"] == rule]
        methods = _by_method(planned)
        first_order = [m for m in base if m.row["step_rule"] in FIRST_ORDER]
        entry: dict[str, Any] = {"unit": unit, "against_em": {}, "against_all_baselines": {}}
        for against, theirs in (("against_em", first_order), ("against_all_baselines", base)):
            for name, mine in methods.items() if theirs else ():
                found = equal_error(theirs, mine, cost, seed)
                windows = [window(found["curve"], least) for least in (1, 2, 4, 8)]
                found["windows"] = [w for w in windows if w is not None]
                if found["max"] is not None and found["max"] > 1:
                    saved = (found["baseline"]["gflops_realised"] - found["ours"]["gflops_realised"]) * 1e9
                    found["images_to_repay_calibration"] = calibration_flops / saved
                entry[against][name] = found
        entry["optimiser_against_em"] = chosen_blindly([*base, *ours], first_order, cost, seed)
        entry["predicted_error"] = prediction(m.row for m in planned)
        out[f"{dynamics}/{rule}"] = entry
    return out


def _by_method(planned: list[Measurement]) -> dict[str, list[Measurement]]:
    """The settings of each method that has any."""
    found = {name: [m for m in planned if "{coins}, {probabilities} p".format(**m.row) == name] for name in METHODS}
    found["quadrature"] = [m for m in planned if m.row["estimator"] == "quadrature"]
    return {name: mine for name, mine in (found | {"any": planned}).items() if mine}


def window(curve: Sequence[dict[str, Any]], least: float) -> dict[str, Any] | None:
    """The widest contiguous range of errors in which the lower 95% bound of the speed-up is at least `least`.

    curve: {"at": mean squared error, "lower95"} along the baseline frontier (speedup.py). "factor" is the ratio of the
    root mean squared errors at its ends. None if no point qualifies.
    """
    runs: list[list[dict[str, Any]]] = [[]]
    for point in curve:
        if point["lower95"] is not None and point["lower95"] >= least:
            runs[-1].append(point)
        else:
            runs.append([])
    factors = [(math.sqrt(run[0]["at"] / run[-1]["at"]), i) for i, run in enumerate(runs) if run]
    if not factors:
        return None
    factor, widest = max(factors)
    ends = [math.sqrt(runs[widest][i]["at"]) for i in (0, -1)]
    return {"least": least, "factor": factor, "rms_error": ends, "lower95": [p["lower95"] for p in runs[widest]]}
