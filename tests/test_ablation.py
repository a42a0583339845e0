"""Ablations with a known answer: duplicate levels, needed levels, and levels that are cheap only in FLOPs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toys import effects_of, smooth_effects

from mlem_diffusion.multilevel.ablation import Frontiers, remove_levels, table
from mlem_diffusion.multilevel.planner import METHODS, Calibration

N = 16
TWO = ("independent", "quadrature")


def smooth(sizes: list[float], flops: list[float], seed: int = 0, methods: tuple[str, ...] = TWO) -> Calibration:
    """Levels whose differences have smooth random effects of these sizes, on two grids."""
    return replace(smooth_effects(sizes, flops, {n: 8 / n**2 for n in (8, N)}, seed), methods=methods)


def ablated(rules: list[Calibration], limits: tuple[float, float] = (0.02, 0.1), progress: Any = max) -> tuple:
    return remove_levels(rules, *limits, progress)


def test_the_cost_ratio_of_a_needed_level_matches_brute_force() -> None:
    """Two levels with effects of size A at every evaluation and independent coins.
    The error is own + n A (1/p - 1) at cost n (T_1 + p T_2), or own at n T_2 for the largest level alone. The cost at
    an error is that of the best mixture of two such plans."""
    rng = np.random.default_rng(0)
    values, gain, own, costs = rng.choice([-1.0, 1.0], (40, 2, 2, N)), 1e-4, 1e-3, (1.0, 20.0)
    values[:, :, 1] *= np.sqrt(gain)
    effects = effects_of(values, list(costs))
    measured = Calibration(effects, {N: effects.logsnr}, {(1, N): own}, effects.flops, ["independent"])
    found = Frontiers(measured).cost_ratio([0, 1], without=0)

    p = np.geomspace(1e-3, 0.999, 600)
    error = np.append(own + N * gain * (1 / p - 1), own)
    cost = np.append(N * (costs[0] + p * costs[1]), N * costs[1])
    ratios = []
    for e in np.geomspace(*found["errors"], 97):
        low, high = error <= e, error > e
        cheapest = cost[low].min()
        if high.any():
            share = (e - error[low])[:, None] / (error[high] - error[low][:, None])
            cheapest = min(cheapest, (cost[low][:, None] * (1 - share) + cost[high] * share).min())
        ratios.append(N * costs[1] / cheapest)
    assert found["errors"][0] == pytest.approx(1.1 * own)
    assert found["largest"] == pytest.approx(max(ratios), rel=0.02) and found["largest"] > 5
    assert found["mean"] == pytest.approx(np.exp(np.log(ratios).mean()), rel=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_a_duplicate_has_cost_ratio_one(method: str) -> None:
    """The second level has the output of the first, at twice its cost; so it can replace the first at twice the cost.
    Only ratios of costs matter."""
    inputs = smooth([1, 0, 0.3], [1, 2, 16], methods=(method,))
    found, scaled = Frontiers(inputs), Frontiers(replace(inputs, costs=1e-6 * inputs.costs))
    assert found.cost_ratio([0, 1, 2], without=1)["largest"] < 1 + 1e-6
    mean = found.cost_ratio([0, 1, 2], without=0)["mean"]
    assert 1.0 <= mean < 2.0 and found.cost_ratio([0, 2], without=0)["mean"] > 1.2 * mean
    assert scaled.cost_ratio([0, 1, 2], without=0)["mean"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_no_cost_ratio_is_below_one_and_parts_are_never_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = list(np.cumprod(rng.uniform(1.2, 5, 4)))
    methods = METHODS if seed == 0 else ("nested", "systematic")
    found = Frontiers(smooth(list(rng.uniform(0.1, 1, 4)), costs, seed, methods))
    for k in range(3):
        ratio = found.cost_ratio(range(4), without=k)
        assert ratio["mean"] >= 1 - 1e-12 and ratio["largest"] >= ratio["mean"]
        assert 0 < ratio["errors"][0] < ratio["errors"][1]
    errors, costs_ = found.hull(range(4))
    assert np.all(np.diff(errors) > 0) and np.all(np.diff(costs_) < 0)
    assert np.all(np.diff(np.diff(costs_) / np.diff(errors)) > 0)  # convex
    part = found.hull([1, 3])
    at = np.geomspace(part[0][0], errors[-1], 50)
    assert np.all(np.interp(at, *found.hull(range(4))) <= np.interp(at, *part) * (1 + 1e-9))


def test_a_level_that_is_cheap_in_flops_alone_is_not_kept_in_seconds() -> None:
    """If launches dominate, the first level takes as long as the second, which is better."""
    flops = smooth([1, 0.3, 0.1], [1, 16, 256])
    ratios, kept = ablated([flops])
    assert kept == ["w0", "w1", "w2"] and ratios["w0"]["sde/ddpm"]["mean"] > 1.1
    ratios, kept = ablated([replace(flops, costs=np.array([16.0, 16.0, 256.0]))])
    assert kept == ["w1", "w2"] and ratios.keys() == {"w0", "w1"} and ratios["w0"]["sde/ddpm"]["largest"] < 1.001
    levels = [{"name": w, "flops": 1e6, "seconds": 1e-6, "cost_ratio_seconds": ratios.get(w)} for w in ("w0", "w2")]
    text = table({"levels": levels, "kept": {"seconds": kept}})
    assert "Levels that pay off in seconds: w1 + w2." in text and "ratio, seconds" in text


def test_of_two_near_duplicates_exactly_one_is_kept() -> None:
    """Removing one of them costs almost nothing; removing both costs much. Of exact duplicates the dearer goes."""
    ratios, kept = ablated([smooth([1, 0.01, 0.3], [1, 1.02, 32])])
    assert all(ratios[name]["sde/ddpm"]["mean"] < 1.02 for name in ("w0", "w1"))
    assert len(kept) == 2 and kept[-1] == "w2"
    exact = smooth([1, 0, 0.3], [1, 2, 16])
    for costs in (exact.costs, np.array([1.0, 1.0, 16.0])):
        assert ablated([replace(exact, costs=costs)])[1] == ["w0", "w2"]
    # errors are measured against the largest level, so it stays
    assert ablated([exact], (1e6, 1e6))[1] == ["w2"]


def test_a_level_that_one_rule_needs_is_kept() -> None:
    """For the other rule the second level has the output of the first."""
    needed, useless = smooth([1, 0.3, 0.02], [1, 8, 64]), smooth([1, 0, 0.3], [1, 8, 64])
    assert ablated([useless])[1] == ["w0", "w2"]
    other = replace(useless, effects=replace(useless.effects, dynamics="ode", step_rule="ddim"))
    seen: list[tuple[int, int]] = []
    found, kept = ablated([needed, other], progress=lambda *at: seen.append(at))
    ratios = found["w1"]
    assert "w1" in kept and set(ratios) == {"sde/ddpm", "ode/ddim"}
    assert ratios["ode/ddim"]["largest"] < 1.001 < 1.1 < ratios["sde/ddpm"]["largest"] and seen[0] == (1, 3)
