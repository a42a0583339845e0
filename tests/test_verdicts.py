"""Verdicts on hand-made comparisons whose answers are known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mlem_diffusion.comparison.speedup import Measurement
from mlem_diffusion.comparison.verdicts import chosen_blindly, not_worse, prediction, verdicts, window

N = 300


def curve(*points: tuple[float, float | None]) -> list[dict[str, Any]]:
    return [{"at": at, "lower95": lower} for at, lower in points]


def test_the_widest_window_is_found_in_ratios_of_rms_errors() -> None:
    found = curve((16.0, 5.0), (4.0, 4.0), (1.0, 3.9), (0.25, 4.5), (1e-2, 6.0), (1e-4, 4.0), (1e-6, None))
    at_4 = window(found, 4)
    assert at_4 is not None and at_4["least"] == 4
    assert at_4["factor"] == pytest.approx(math.sqrt(0.25 / 1e-4)) and at_4["lower95"] == [4.5, 6.0, 4.0]
    assert at_4["rms_error"] == pytest.approx([0.5, 0.01])
    whole = window(found, 3)
    assert whole is not None and whole["factor"] == pytest.approx(400) and len(whole["lower95"]) == 6
    single = window(found, 5.5)
    assert single is not None and single["factor"] == 1 and single["rms_error"] == pytest.approx([0.1, 0.1])
    assert window(found, 7) is None and window([], 1) is None
    last = window(curve((4.0, None), (1.0, 2.0), (0.25, 3.0)), 1)
    assert last is not None and last["factor"] == pytest.approx(2)  # up to the end


def setting(estimator: str, cost: float, error: float, seed: int = 0, spread: float = 0.0, **row: Any) -> Measurement:
    noise = 1 + spread * np.random.default_rng(seed).standard_normal(N)
    defaults = {
        "dynamics": "sde", "step_rule": "ddpm", "estimator": estimator, "levels": "w1+w2", "steps": 16,
        "probabilities": "", "coins": "", "c": None, "switch": None, "error": error, "gflops_realised": cost,
        "gflops_expected": cost, "seconds": cost, "top_evaluations": 1000,
    }  # fmt: skip
    return Measurement({**defaults, **row}, error * noise)


def singles(*points: tuple[float, float], **row: Any) -> list[Measurement]:
    return [setting("single", cost, error, **row) for cost, error in points]


def test_not_worse_where_every_point_is_matched() -> None:
    theirs = singles((1, 1.0), (4, 0.25), (16, 0.0625))
    found = not_worse(singles((1, 1.0), (4, 0.2), (16, 0.06)), theirs)
    assert found["never_above"] is True and found["points"] == 3 and found["not_judged"] == 0
    assert found["worst"]["ratio"] == pytest.approx(1.0) and found["worst"]["gflops"] == 1
    # a setting of ours that is slightly dearer does not count at that cost
    late = not_worse(singles((1, 1.0), (4.1, 0.2), (16, 0.06)), theirs)
    assert late["never_above"] is False and late["worst"]["ratio"] == pytest.approx(4) and late["worst"]["gflops"] == 4


def test_points_cheaper_than_ours_are_not_judged() -> None:
    found = not_worse(singles((4, 0.2)), singles((1, 1.0), (2, 0.5), (4, 0.25)))
    assert (found["points"], found["not_judged"], found["never_above"]) == (1, 2, True)
    assert found["worst"]["ratio"] == pytest.approx(0.8)
    none = not_worse(singles((9, 0.2)), singles((1, 1.0)))
    assert none["never_above"] is None and none["worst"] is None and none["not_judged"] == 1


def test_an_excess_within_seed_noise_is_not_above() -> None:
    """With 50% scatter over 300 seeds the ratio has a standard error of about 4%: 0.5% is within it, 30% is not."""
    theirs = [setting("single", 1, 1.0, seed=1, spread=0.5)]
    mean = theirs[0].errors.mean()

    def ours(excess: float) -> list[Measurement]:
        one = setting("single", 1, 1.0, seed=2, spread=0.5)
        return [Measurement(one.row, one.errors * (mean * excess / one.errors.mean()))]

    near, far = not_worse(ours(1.005), theirs), not_worse(ours(1.3), theirs)
    assert near["never_above"] is True and near["worst"]["ratio"] == pytest.approx(1.005)
    assert far["never_above"] is False and far["worst"]["lower95"] > 1.1


def test_blind_choices_are_made_by_the_selection_seeds_and_judged_on_others() -> None:
    theirs = singles((1, 1.0), (2, 1.5), (4, 0.25), (16, 0.0625))  # (2, 1.5) is not on the frontier
    ours = [
        setting("single", 2, 0.5, selected_error=0.6), setting("ml_em", 3, 0.5, selected_error=0.2),
        setting("ml_em", 4, 0.01), setting("ml_em", 15, 0.03, selected_error=0.3),
        setting("ml_em", 16.01, 0.05, selected_error=0.1),
    ]  # fmt: skip
    found = chosen_blindly(ours, theirs)
    # at cost 4 the choice is the best on the selection seeds, with 0.5 on these seeds, although another is better
    assert found["points"] == 2 and found["unserved"] == 1 and found["never_above"] is False
    assert found["worst"] == {"gflops": 4, "ratio": pytest.approx(2), "lower95": pytest.approx(2)}
    assert chosen_blindly(ours[3:], theirs)["worst"]["ratio"] == pytest.approx(0.8)  # within a thousandth of the cost
    for empty in (chosen_blindly([], theirs), chosen_blindly(ours, []), chosen_blindly([], [])):
        assert empty["never_above"] is None and empty["points"] == 0


def test_plans_made_for_seconds_are_judged_by_seconds() -> None:
    """The plans take twice the FLOPs and half the seconds of EM at the same errors."""
    theirs = [setting("single", c, 1 / c) for c in (1, 4, 16)]
    ours = [setting("ml_em", 2 * c, 1 / c, seconds=0.5 * c, selected_error=1 / c) for c in (1, 4, 16)]
    assert not_worse(ours, theirs)["never_above"] is False
    in_seconds = not_worse(ours, theirs, cost="seconds")
    assert in_seconds["never_above"] is True and "seconds" in in_seconds["worst"]
    assert chosen_blindly(ours, theirs)["never_above"] is False
    found = chosen_blindly(ours, theirs, cost="seconds")
    assert found["never_above"] is True and found["unserved"] == 0 and found["worst"]["seconds"] in (1, 4, 16)
    planned = [
        setting("ml_em", 2 * c, 1 / c, seconds=0.5 * c, plan=f"p{c}", coins="independent", probabilities="optimal",
                predicted=1 / c, largest_effect=0.1)
        for c in (1, 4, 16)
    ]  # fmt: skip
    rules = {unit: verdicts([*theirs, *planned], unit=unit)["sde/ddpm"] for unit in ("flops", "seconds")}
    for unit, speed in (("flops", 0.5), ("seconds", 2.0)):
        assert rules[unit]["unit"] == unit
        assert rules[unit]["against_em"]["independent, optimal p"]["max"] == pytest.approx(speed)


def predicted(largest_effect: float, ratio: float, coins: str = "independent", **row: Any) -> dict[str, Any]:
    base = {
        "estimator": "ml_em",
        "coins": coins,
        "largest_effect": largest_effect,
        "predicted": 0.01,
        "error": 0.01 * ratio,
        "error_se": 0.0,
    }
    return {**base, **row}


def test_predictions_agree_up_to_some_largest_effect() -> None:
    rows = [
        predicted(0.3, 1.5), predicted(0.01, 1.0), predicted(0.1, 0.8), predicted(0.05, 1.24), predicted(0.5, 1.1),
        predicted(0.02, 3.0, "nested"), predicted(0.01, 0.9, "", estimator="quadrature"),
        {"estimator": "single", "coins": "", "error": 1.0},
    ]  # fmt: skip
    found = prediction(rows)
    assert set(found) == {"independent", "nested", "quadrature"}
    independent = found["independent"]
    assert (independent["rows"], independent["within"], independent["rows_up_to_it"]) == (5, 4, 3)
    assert independent["largest_effect_up_to_which_all_agree"] == 0.1 and independent["largest_effect"] == 0.5
    assert independent["measured_over_predicted"] == pytest.approx([0.8, 1.1, 1.5])
    assert found["nested"]["largest_effect_up_to_which_all_agree"] is None and found["nested"]["rows_up_to_it"] == 0
    assert found["quadrature"]["largest_effect_up_to_which_all_agree"] == 0.01  # all agree: the largest
    assert prediction([]) == {}


@pytest.mark.parametrize(("ratio", "agrees"), [(1.25, True), (1.27, False), (0.75, True), (0.73, False)])
def test_the_tolerance_is_of_the_squared_error_beyond_two_standard_errors(ratio: float, agrees: bool) -> None:
    assert prediction([predicted(0.1, ratio)])["independent"]["within"] == int(agrees)
    assert prediction([predicted(0.1, ratio, error_se=2e-4)])["independent"]["within"] == 1  # 2 x 2% of the prediction
    assert prediction([predicted(0.1, ratio, error_se=0.9e-4)])["independent"]["within"] == int(
        agrees
    )  # 1.8% is not enough
    assert prediction([predicted(0.1, ratio, error_se=None)])["independent"]["within"] == int(agrees)


def planned(coins: str, probabilities: str, points: Sequence[tuple[float, float]], **row: Any) -> list[Measurement]:
    more = {"coins": coins, "probabilities": probabilities, "predicted": 0.1, "largest_effect": 0.1} | row
    return [
        setting("ml_em" if coins else "quadrature", c, e, plan=f"{coins}{probabilities}{c}", **more) for c, e in points
    ]


BASE = singles((1, 1.0), (4, 0.25), (16, 0.0625), (64, 0.015625))
TWICE = [(0.5, 1.0), (2, 0.25), (8, 0.0625), (32, 0.015625)]
FOURTH = [(0.25, 1.0), (1, 0.25), (4, 0.0625), (16, 0.015625)]
ONCE = [(1, 1.0), (4, 0.25), (16, 0.0625), (64, 0.015625)]


def test_a_complete_comparison() -> None:
    fancy = singles((1, 0.25), (4, 0.0625), (16, 0.015625), step_rule="dpmpp_2m")
    few = planned("systematic", "optimal", [(0.01, 0.001)], top_evaluations=3)
    settings = [
        *BASE, *fancy, *few, *planned("independent", "measured", ONCE), *planned("independent", "optimal", TWICE),
        *planned("systematic", "optimal", FOURTH),
        setting("ml_em", 3, 0.9, coins="independent", probabilities="constant"),
    ]  # fmt: skip
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
    assert everything["any"]["max"] == pytest.approx(1) and everything["independent, optimal p"][
        "max"
    ] == pytest.approx(0.5)
    assert em["independent, optimal p"]["images_to_repay_calibration"] * em["independent, optimal p"]["baseline"][
        "gflops_realised"
    ] == pytest.approx(2 * 48000)
    assert "images_to_repay_calibration" not in em["independent, measured p"]
    assert entry["optimiser_against_em"] == {
        "never_above": None,
        "worst": None,
        "points": 0,
        "unserved": 4,
    }  # no selection
    assert entry["systematic_over_independent"]["max"] == pytest.approx(2)
    assert entry["optimal_over_measured"]["max"] == pytest.approx(2)
    assert entry["optimal_over_measured"]["error_at_equal_cost"]["never_above"] is True
    assert "learned_over_measured" not in entry
    assert entry["predicted_error"]["systematic"]["rows"] == 4  # the plan that hardly fired is not judged


def test_learned_probabilities_are_compared_at_their_own_steps_and_costs() -> None:
    """Learned probabilities with half the error at each cost get the ratio one half.

    Measured ones on a finer grid, four times cheaper, do not count.
    """
    settings = [
        *BASE, *planned("independent", "measured", ONCE), *planned("independent", "measured", FOURTH, steps=99),
        *planned("independent", "learned", [(cost, error / 2) for cost, error in ONCE]),
    ]  # fmt: skip
    entry = verdicts(settings)["sde/ddpm"]
    assert entry["learned_over_measured"]["error_at_equal_cost"]["worst"]["ratio"] == pytest.approx(0.5)
    assert entry["learned_over_measured"]["error_at_equal_cost"]["not_judged"] == 0
    assert "measured p, alike" not in entry["against_em"]
    assert "images_to_repay_calibration" not in entry["against_em"]["independent, learned p"]
    elsewhere = [s for s in settings if s.row["probabilities"] != "learned"]
    elsewhere += planned("independent", "learned", [(1.5 * cost, error) for cost, error in ONCE])
    assert "learned_over_measured" not in verdicts(elsewhere)["sde/ddpm"]


def test_dynamics_and_rules_are_separate_and_no_plan_gives_no_verdict() -> None:
    assert verdicts(BASE) == {}
    ode = [setting("single", c, e, dynamics="ode", step_rule="dpmpp_2m") for c, e in ONCE]
    settings = [*BASE, *ode, *planned("", "optimal", TWICE, dynamics="ode", step_rule="dpmpp_2m")]
    out = verdicts([*settings, *planned("nested", "optimal", FOURTH)])
    assert set(out) == {"ode/dpmpp_2m", "sde/ddpm"}
    assert out["ode/dpmpp_2m"]["against_em"] == {} and out["ode/dpmpp_2m"]["optimiser_against_em"]["points"] == 0
    assert out["ode/dpmpp_2m"]["against_all_baselines"]["quadrature"]["max"] == pytest.approx(2)
    assert out["sde/ddpm"]["against_em"]["nested, optimal p"]["max"] == pytest.approx(4)
