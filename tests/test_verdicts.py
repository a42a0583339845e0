"""Conclusions from synthetic comparisons with known answers."""

import json
import math
from typing import Any

import numpy as np
import pytest

from mlem_diffusion.comparison.settings import Measurement
from mlem_diffusion.comparison.verdicts import verdicts, window

N = 300
COSTS = (1, 4, 16, 64)


def test_the_widest_window_is_found_in_ratios_of_rms_errors() -> None:
    points = [(16.0, 5.0), (4.0, 4.0), (1.0, 3.9), (0.25, 4.5), (1e-2, 6.0), (1e-4, 4.0), (1e-6, None)]
    curve = [{"at": at, "lower95": lower} for at, lower in points]
    at_4, whole, single = window(curve, 4), window(curve, 3), window(curve, 5.5)
    assert at_4 == {
        "least": 4, "factor": pytest.approx(math.sqrt(0.25 / 1e-4)), "rms_error": pytest.approx([0.5, 0.01]),
        "lower95": [4.5, 6.0, 4.0],
    }  # fmt: skip
    assert whole is not None and whole["factor"] == pytest.approx(400) and len(whole["lower95"]) == 6
    assert single is not None and single["factor"] == 1 and single["rms_error"] == pytest.approx([0.1, 0.1])
    assert window(curve, 7) is None and window([], 1) is None
    last = window(curve[::-1][-2:], 4)
    assert last is not None and last["lower95"] == [4.0, 5.0]  # up to the end


def setting(estimator: str, cost: float, error: float, seed: int = 0, spread: float = 0.0, **row: Any) -> Measurement:
    noise = 1 + spread * np.random.default_rng(seed).standard_normal(N)
    defaults = {
        "dynamics": "sde", "step_rule": "ddpm", "estimator": estimator, "steps": 16, "probabilities": "", "coins": "",
        "error": error, "gflops_realised": cost, "gflops_expected": cost, "seconds": cost, "top_evaluations": 1000,
    }  # fmt: skip
    return Measurement({**defaults, **row}, error * noise)


def singles(*points: tuple[float, float], **row: Any) -> list[Measurement]:
    return [setting("single", cost, error, **row) for cost, error in points]


def planned(coins: str, probabilities: str, speed: float, **row: Any) -> list[Measurement]:
    """Plans with the errors 1 / c at the costs c / speed."""
    more = {"coins": coins, "probabilities": probabilities, "plan": "p"} | row
    return [setting("ml_em" if coins else "quadrature", c / speed, 1 / c, **more) for c in COSTS]


BASE = singles(*((c, 1 / c) for c in COSTS))


def test_a_complete_comparison() -> None:
    fancy = singles((1, 0.25), (4, 0.0625), (16, 1 / 64), step_rule="dpmpp_2m")
    settings = [
        *BASE, *fancy, *planned("systematic", "optimal", 1000, top_evaluations=3),
        *planned("independent", "measured", 1), *planned("independent", "optimal", 2),
        *planned("systematic", "optimal", 4), setting("ml_em", 3, 0.9, coins="independent", probabilities="constant"),
    ]  # fmt: skip
    faster = planned("independent", "optimal", 0.5)  # twice the FLOPs and half the seconds of EM
    for m in faster:
        m.row["seconds"] /= 4
    out = verdicts(settings, calibration_flops=48e9 * 1000)
    assert list(out) == ["sde/ddpm"] and json.loads(json.dumps(out, allow_nan=False)) == out
    entry = out["sde/ddpm"]
    em, everything = entry["against_em"], entry["against_all_baselines"]
    assert {name: em[name]["max"] for name in em} == {
        "independent, constant p": pytest.approx(1 / 3), "independent, measured p": pytest.approx(1),
        "independent, optimal p": pytest.approx(2), "systematic, optimal p": pytest.approx(4), "any": pytest.approx(4),
    }  # fmt: skip
    # 4 x everywhere: the window is the whole frontier, a factor of 8 in rms error
    assert [(w["least"], w["factor"]) for w in em["any"]["windows"]] == [(n, pytest.approx(8)) for n in (1, 2, 4)]
    # the second-order rule reaches 0.0625 at 4, and so do systematic coins
    assert everything["any"]["max"] == pytest.approx(1)
    assert everything["independent, optimal p"]["max"] == pytest.approx(0.5)
    optimal = em["independent, optimal p"]
    repaid = optimal["images_to_repay_calibration"] * optimal["baseline"]["gflops_realised"]
    assert repaid == pytest.approx(2 * 48000) and "images_to_repay_calibration" not in em["independent, measured p"]
    seconds = verdicts([*BASE, *faster], 1.0, unit="seconds")["sde/ddpm"]
    assert seconds["unit"] == "seconds" and seconds["against_em"]["any"]["max"] == pytest.approx(2)


def test_dynamics_and_rules_are_separate_and_no_plan_gives_no_verdict() -> None:
    assert verdicts(BASE, 1.0) == {}
    other: dict[str, Any] = {"dynamics": "ode", "step_rule": "dpmpp_2m"}
    ode = [*singles(*((c, 1 / c) for c in COSTS), **other), *planned("", "optimal", 2, **other)]
    out = verdicts([*BASE, *ode, *planned("nested", "optimal", 4)], 1.0)
    assert set(out) == {"ode/dpmpp_2m", "sde/ddpm"}
    assert out["ode/dpmpp_2m"]["against_em"] == {}
    assert out["ode/dpmpp_2m"]["against_all_baselines"]["quadrature"]["max"] == pytest.approx(2)
    assert out["sde/ddpm"]["against_em"]["nested, optimal p"]["max"] == pytest.approx(4)
