"""Ablations with a known answer: duplicate levels, needed levels, and levels that are cheap only in FLOPs."""

import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.multilevel.ablation import Frontiers, ablate, seconds_per_image, table
from mlem_diffusion.multilevel.gains import Effects
from mlem_diffusion.multilevel.planner import METHODS, RuleInputs

N = 16
TWO = ("independent", "quadrature")


def effects_of(values: np.ndarray, flops: list[float]) -> Effects:
    """Effects with these values [S, P, K, n] on an even grid."""
    levels, n = values.shape[2:]
    names = tuple(f"w{k}" for k in range(levels))
    where, squares = np.linspace(-9, 9, n), np.ones((levels, n))
    return Effects(names, np.array(flops), "sde", "ddpm", where, values.astype(np.float32), squares, 0.0)


def smooth(sizes: list[float], flops: list[float], seed: int = 0, methods: tuple[str, ...] = TWO) -> RuleInputs:
    """Levels whose differences have smooth random effects of these sizes (any for the first level's output).

    Two grids; the levels' own errors are their effects plus a little for the grid."""
    rng = np.random.default_rng(seed)
    waves = np.stack([np.cos(m * np.linspace(0, 2, N)) for m in range(4)])
    values = rng.standard_normal((50, 2, len(sizes), 4)) @ waves * np.array(sizes)[:, None] / N
    effects, top = effects_of(values, flops), len(sizes) - 1
    rest = [effects.difference(k, top).sum(axis=1) if k < top else np.zeros(1) for k in range(top + 1)]
    own = {(k, n): 8 / n**2 + float((r**2).mean()) for k, r in enumerate(rest) for n in (8, N)}
    return RuleInputs(effects, {n: np.linspace(-9, 9, n) for n in (8, N)}, own, methods)


def test_the_cost_ratio_of_a_needed_level_matches_brute_force() -> None:
    """Two levels with effects of size A at every evaluation and independent coins.

    The error is own + n A (1/p - 1) at cost n (T_1 + p T_2), or own at n T_2 for the largest level alone. The cost at
    an error is that of the best mixture of two such plans.
    """
    rng = np.random.default_rng(0)
    values, gain, own, costs = rng.choice([-1.0, 1.0], (40, 2, 2, N)), 1e-4, 1e-3, (1.0, 20.0)
    values[:, :, 1] *= np.sqrt(gain)
    effects = effects_of(values, list(costs))
    measured = RuleInputs(effects, {N: effects.logsnr}, {(1, N): own}, ["independent"])
    found = Frontiers(measured, list(costs)).cost_ratio([0, 1], without=0)

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
    found, scaled = Frontiers(inputs, [1, 2, 16]), Frontiers(inputs, [1e-6, 2e-6, 16e-6])
    assert found.cost_ratio([0, 1, 2], without=1)["largest"] < 1 + 1e-6
    mean = found.cost_ratio([0, 1, 2], without=0)["mean"]
    assert 1.0 <= mean < 2.0 and found.cost_ratio([0, 2], without=0)["mean"] > 1.2 * mean
    assert scaled.cost_ratio([0, 1, 2], without=0)["mean"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_no_cost_ratio_is_below_one_and_parts_are_never_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = list(np.cumprod(rng.uniform(1.2, 5, 4)))
    methods = METHODS if seed == 0 else ("nested", "systematic")
    found = Frontiers(smooth(list(rng.uniform(0.1, 1, 4)), costs, seed, methods), costs)
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


def removed(found: dict[str, Any], unit: str) -> list[str]:
    return [entry["name"] for entry in found["removed"][unit]]


def test_a_level_that_is_cheap_in_flops_alone_is_not_kept_in_seconds() -> None:
    """If launches dominate, the first level takes as long as the second, which is better. The content of the JSON."""
    found = json.loads(json.dumps(ablate([smooth([1, 0.3, 0.1], [1, 16, 256])], [16, 16, 256]), allow_nan=False))
    assert found["kept"] == {"flops": ["w0", "w1", "w2"], "seconds": ["w1", "w2"]}
    assert removed(found, "flops") == [] and removed(found, "seconds") == ["w0"]
    first, middle, last = found["levels"]
    assert first["flops_share"] == pytest.approx(1 / 256) and first["seconds_share"] == pytest.approx(1 / 16)
    assert (first["kept_flops"], first["kept_seconds"], middle["kept_seconds"]) == (True, False, True)
    assert first["cost_ratio_flops"]["sde/ddpm"]["mean"] > 1.1 and last["cost_ratio_flops"] is None
    assert first["cost_ratio_seconds"]["sde/ddpm"]["largest"] < 1.001
    assert found["cost_ratio_among_kept"]["seconds"].keys() == {"w1"}
    assert "Levels that pay off in seconds: w1 + w2." in table(found)


def test_of_two_near_duplicates_exactly_one_is_kept() -> None:
    """Removing one of them costs almost nothing; removing both costs much. Of exact duplicates the dearer goes."""
    found = ablate([smooth([1, 0.01, 0.3], [1, 1.02, 32])], [1, 1.02, 32])
    assert all(level["cost_ratio_flops"]["sde/ddpm"]["mean"] < 1.02 for level in found["levels"][:2])
    assert len(removed(found, "flops")) == 1 and found["kept"]["flops"][-1] == "w2"
    ((last, by_rule),) = found["cost_ratio_among_kept"]["flops"].items()
    assert last in ("w0", "w1") and by_rule["sde/ddpm"]["mean"] > 1.5
    exact = smooth([1, 0, 0.3], [1, 2, 16])
    assert list(ablate([exact], [1, 1, 16])["kept"].values()) == [["w0", "w2"], ["w0", "w2"]]
    # errors are measured against the largest level, so it stays
    assert ablate([exact], [1, 1, 16], mean=1e6, largest=1e6)["kept"]["flops"] == ["w2"]


def test_a_level_that_one_rule_needs_is_kept() -> None:
    """For the other rule the second level has the output of the first."""
    needed, useless = smooth([1, 0.3, 0.02], [1, 8, 64]), smooth([1, 0, 0.3], [1, 8, 64])
    assert ablate([useless], [1, 8, 64])["kept"]["flops"] == ["w0", "w2"]
    other = replace(useless, effects=replace(useless.effects, dynamics="ode", step_rule="ddim"))
    seen: list[tuple[int, int]] = []
    found = ablate([needed, other], [1, 8, 64], progress=lambda *at: seen.append(at))
    ratios = found["levels"][1]["cost_ratio_flops"]
    assert "w1" in found["kept"]["flops"] and set(ratios) == {"sde/ddpm", "ode/ddim"}
    assert ratios["ode/ddim"]["largest"] < 1.001 < 1.1 < ratios["sde/ddpm"]["largest"] and seen[0] == (1, 6)


def test_seconds_are_of_one_image_and_in_proportion() -> None:
    def level(name: str, pause: float, flops: float) -> Level:
        def denoise(x: torch.Tensor, logsnr: torch.Tensor) -> torch.Tensor:
            assert x.shape == (4, 3, 2, 2) and logsnr.ndim == 0
            time.sleep(pause)
            return x

        return Level(name, denoise, flops)

    family = [level("quick", 0.004, 1), level("slow", 0.02, 2)]
    quick, slow = seconds_per_image(family, (3, 2, 2), 4, torch.device("cpu"), at_least=0.0)
    assert 0.001 <= quick < 0.005 <= slow < 0.03
