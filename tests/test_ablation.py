"""Ablations with a known answer: duplicate levels, needed levels, and levels that are cheap only in FLOPs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.errors import UserError
from mlem_diffusion.figures.ablation import plot_ablation
from mlem_diffusion.multilevel.ablation import (
    Ablation,
    CostRatio,
    Frontiers,
    RuleInputs,
    ablate,
    ablation_json,
    seconds_per_image,
    table,
)
from mlem_diffusion.multilevel.gains import Effects
from mlem_diffusion.multilevel.planner import METHODS, Planner

N = 32


def effects_of(values: np.ndarray, flops: list[float]) -> Effects:
    """Effects with these values [S, P, K, n] on an even grid."""
    levels, n = values.shape[2:]
    names = tuple(f"w{k}" for k in range(levels))
    where, squares = np.linspace(-9, 9, n), np.ones((levels, n))
    return Effects(names, np.array(flops), "sde", "ddpm", where, values.astype(np.float32), squares, 0.0, 0.0)


def smooth(sizes: list[float], flops: list[float], seed: int = 0) -> RuleInputs:
    """Levels whose differences have smooth random effects of these sizes (any for the first level's output)."""
    rng = np.random.default_rng(seed)
    waves = np.stack([np.cos(m * np.linspace(0, 2, N)) for m in range(4)])
    values = rng.standard_normal((50, 2, len(sizes), 4)) @ waves * np.array(sizes)[:, None] / N
    return measured_of(effects_of(values, flops), ("independent", "quadrature"))


def measured_of(effects: Effects, methods: tuple[str, ...]) -> RuleInputs:
    """Two grids; the levels' own errors are their effects plus a little for the grid."""
    top = len(effects.names) - 1
    rest = [effects.difference(k, top).sum(axis=1) if k < top else np.zeros(1) for k in range(top + 1)]
    own = {(k, n): 8 / n**2 + float((r**2).mean()) for k, r in enumerate(rest) for n in (16, N)}
    return RuleInputs(effects, methods, {n: np.linspace(-9, 9, n) for n in (16, N)}, own)


def frontiers_of(measured: RuleInputs, costs: list[float]) -> Frontiers:
    grids = {n: measured.effects.on(logsnr) for n, logsnr in measured.grids.items()}
    planners = [(n, Planner(e, m, measured.effects.flops)) for m in measured.methods for n, e in grids.items()]
    return Frontiers(measured, planners, costs)


# ------------------------------------------------------------------------------------------------ one level


def test_the_cost_ratio_of_a_needed_level_matches_brute_force() -> None:
    """Two levels with effects of size A at every evaluation and independent coins.

    The error is own + n A (1/p - 1) at cost n (T_1 + p T_2), or own at n T_2 for the largest level alone. The cost at
    an error is that of the best mixture of two such plans.
    """
    rng = np.random.default_rng(0)
    values, gain, own, costs = rng.choice([-1.0, 1.0], (40, 2, 2, N)), 1e-4, 1e-3, (1.0, 20.0)
    values[:, :, 1] *= np.sqrt(gain)
    effects = effects_of(values, list(costs))
    measured = RuleInputs(effects, ["independent"], {N: effects.logsnr}, {(1, N): own})
    found = frontiers_of(measured, list(costs)).cost_ratio([0, 1], without=0)

    p = np.geomspace(1e-3, 0.999, 600)
    error = np.append(own + N * gain * (1 / p - 1), own)
    cost = np.append(N * (costs[0] + p * costs[1]), N * costs[1])
    ratios = []
    for e in np.geomspace(*found.errors, 97):
        low, high = error <= e, error > e
        if not high.any():
            ratios.append(N * costs[1] / cost.min())
            continue
        share = (e - error[low])[:, None] / (error[high] - error[low][:, None])
        mixed = cost[low][:, None] * (1 - share) + cost[high] * share
        ratios.append(N * costs[1] / min(mixed.min(), cost[low].min()))
    assert found.errors[0] == pytest.approx(1.1 * own)
    assert found.largest == pytest.approx(max(ratios), rel=0.02) and found.largest > 5
    assert found.mean == pytest.approx(np.exp(np.log(ratios).mean()), rel=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_a_duplicate_has_cost_ratio_one(method: str) -> None:
    """The second level has the output of the first, at twice its cost."""
    measured = smooth([1, 0, 0.3], [1, 2, 16])
    found = frontiers_of(measured_of(measured.effects, (method,)), [1, 2, 16])
    assert found.cost_ratio([0, 1, 2], without=1).largest < 1 + 1e-6
    assert 1.0 <= found.cost_ratio([0, 1, 2], without=0).mean < 2.0  # its duplicate replaces it, at twice the cost
    assert found.cost_ratio([0, 2], without=0).mean > 1.2 * found.cost_ratio([0, 1, 2], without=0).mean


@pytest.mark.parametrize("seed", range(4))
def test_no_cost_ratio_is_below_one_and_parts_are_never_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = list(np.cumprod(rng.uniform(1.2, 5, 4)))
    measured = smooth(list(rng.uniform(0.1, 1, 4)), costs, seed)
    found = frontiers_of(measured_of(measured.effects, METHODS if seed == 0 else ("nested", "systematic")), costs)
    for k in range(3):
        ratio = found.cost_ratio(range(4), without=k)
        assert ratio.mean >= 1 - 1e-12 and ratio.largest >= ratio.mean
        assert (
            0 < ratio.errors[0] < ratio.errors[1] <= max(e for (j, _), e in found.measured.own_errors.items() if j == 3)
        )
    errors, costs_ = found.hull(range(4))
    assert np.all(np.diff(errors) > 0) and np.all(np.diff(costs_) < 0)
    slopes = np.diff(costs_) / np.diff(errors)
    assert np.all(np.diff(slopes) > 0)  # convex
    part = found.hull([1, 3])
    at = np.geomspace(part[0][0], errors[-1], 50)
    assert np.all(np.interp(at, *found.hull(range(4))) <= np.interp(at, *part) * (1 + 1e-9))


def test_only_ratios_of_costs_matter() -> None:
    measured = smooth([1, 0.4, 0.2], [1, 4, 16])
    one, other = (frontiers_of(measured, [c, 4 * c, 16 * c]).cost_ratio(range(3), without=1) for c in (1.0, 1e-6))
    assert other.mean == pytest.approx(one.mean, rel=1e-6) and other.largest == pytest.approx(one.largest, rel=1e-6)


def test_without_own_errors_there_is_no_frontier() -> None:
    measured = smooth([1, 0.4], [1, 4])
    nothing = RuleInputs(measured.effects, measured.methods, measured.grids, {})
    with pytest.raises(UserError, match="No plan for sde/ddpm can be made"):
        frontiers_of(nothing, [1, 4]).cost_ratio([0, 1], without=0)


# ------------------------------------------------------------------------------------------------ whole families


def test_a_level_that_is_cheap_in_flops_alone_is_not_kept_in_seconds() -> None:
    """If launches dominate, the first level takes as long as the second, which is better."""
    measured = smooth([1, 0.3, 0.1], [1, 16, 256])
    found = ablate([measured], [16, 16, 256])
    assert found["flops"].kept == ("w0", "w1", "w2") and found["flops"].removed == []
    assert found["seconds"].kept == ("w1", "w2")
    assert [name for name, _ in found["seconds"].removed] == ["w0"]
    assert found["seconds"].cost_ratios["w0"]["sde/ddpm"].largest < 1.001
    assert (
        found["seconds"].cost_ratio_among_kept.keys() == {"w1"}
        and found["flops"].cost_ratio_among_kept == found["flops"].cost_ratios
    )


def test_of_two_near_duplicates_exactly_one_is_kept() -> None:
    """Removing one of them costs almost nothing; removing both costs much."""
    measured = smooth([1, 0.01, 0.3], [1, 1.02, 32])
    found = ablate([measured], [1, 1.02, 32])["flops"]
    assert all(found.cost_ratios[name]["sde/ddpm"].mean < 1.02 for name in ("w0", "w1"))
    assert len(found.removed) == 1 and len(found.kept) == 2 and found.kept[-1] == "w2"
    ((last, by_rule),) = found.cost_ratio_among_kept.items()
    assert last in ("w0", "w1") and by_rule["sde/ddpm"].mean > 1.5


def test_exact_duplicates_the_dearer_goes_and_tolerances_decide() -> None:
    measured = smooth([1, 0, 0.3], [1, 2, 16])
    found = ablate([measured], [1, 1, 16])
    assert found["flops"].kept == found["seconds"].kept == ("w0", "w2")
    everything_goes = ablate([measured], [1, 1, 16], mean=1e6, largest=1e6)
    assert everything_goes["flops"].kept == ("w2",)  # errors are measured against the largest


def test_a_level_that_one_rule_needs_is_kept() -> None:
    """For the other rule the second level has the output of the first."""
    needed, useless = smooth([1, 0.3, 0.02], [1, 8, 64]), smooth([1, 0, 0.3], [1, 8, 64])
    assert ablate([useless], [1, 8, 64])["flops"].kept == ("w0", "w2")
    values = useless.effects
    other = Effects(values.names, values.flops, "ode", "ddim", values.logsnr, values.values, values.squares, 0, 0)
    both = [needed, RuleInputs(other, useless.methods, useless.grids, useless.own_errors)]
    lines: list[str] = []
    found = ablate(both, [1, 8, 64], progress=lines.append)["flops"]
    assert "w1" in found.kept and set(found.cost_ratios["w1"]) == {"sde/ddpm", "ode/ddim"}
    assert found.cost_ratios["w1"]["ode/ddim"].largest < 1.001 < 1.1 < found.cost_ratios["w1"]["sde/ddpm"].largest
    assert lines[0] == "flops, 3 levels" and any(text.startswith("seconds") for text in lines)


def test_one_level_is_a_family_too() -> None:
    measured = smooth([1], [4])
    found = ablate([measured], [4])["seconds"]
    assert found == Ablation({}, [], ("w0",), {})


def test_scores_count_tolerances() -> None:
    assert CostRatio(1.02, 1.05, (1, 2)).score() == pytest.approx(1)
    assert CostRatio(1.00, 1.10, (1, 2)).score() == pytest.approx(1)
    assert CostRatio(1.0, 1.0, (1, 2)).score() == 0
    assert CostRatio(1.04, 1.05, (1, 2)).score(mean=0.1) < 1 < CostRatio(1.04, 1.05, (1, 2)).score()


# ---------------------------------------------------------------------------------------- seconds and artefacts


def test_seconds_are_of_one_image_and_in_proportion() -> None:
    calls = dict.fromkeys(("quick", "slow"), 0)

    def level(name: str, pause: float, flops: float) -> Level:
        def denoise(x: Any, logsnr: Any) -> Any:
            assert x.shape == (4, 3, 2, 2) and logsnr.shape == (4,) and logsnr.stride() == (0,)
            calls[name] += 1
            if calls[name] == 1:
                time.sleep(0.2)  # a first call that compiles
            time.sleep(pause)
            return x

        return Level(name, denoise, flops)

    family = [level("quick", 0.004, 1), level("slow", 0.02, 2)]
    quick, slow = seconds_per_image(family, (3, 2, 2), batch=4, runs=5, warm_up=1, at_least=0.0)
    assert calls == {"quick": 6, "slow": 6}
    assert 0.001 <= quick < 0.005 <= slow < 0.03
    seconds_per_image(family[:1], (3, 2, 2), batch=4, runs=1, warm_up=0, at_least=0.1)
    assert calls["quick"] > 6 + 5  # as many as fit


@pytest.fixture
def content() -> dict[str, Any]:
    measured = smooth([1, 0.3, 0.1], [1e6, 16e6, 256e6])
    found = ablate([measured], [1.6e-4, 1.6e-4, 2.56e-3])
    out = ablation_json(measured.effects.names, measured.effects.flops, [1.6e-4, 1.6e-4, 2.56e-3], found)
    return out | {"tolerance": {"mean": 0.02, "largest": 0.1}, "batch": 8, "device": "a GPU", "threads": 1}


def test_content_of_levels_json(content: dict[str, Any]) -> None:
    content = json.loads(json.dumps(content, allow_nan=False))
    first, middle, last = content["levels"]
    assert first["flops_share"] == pytest.approx(1 / 256) and first["seconds_share"] == pytest.approx(1 / 16)
    assert (first["kept_flops"], first["kept_seconds"], middle["kept_seconds"]) == (True, False, True)
    assert (
        first["cost_ratio_flops"]["sde/ddpm"]["mean"] > 1.1
        and last["cost_ratio_flops"] is None
        and last["kept_seconds"]
    )
    assert set(first["cost_ratio_flops"]["sde/ddpm"]) == {"mean", "largest", "errors"}
    assert content["kept"] == {"flops": ["w0", "w1", "w2"], "seconds": ["w1", "w2"]}
    assert [e["name"] for e in content["removed"]["seconds"]] == ["w0"]
    text = table(content)
    assert text.splitlines()[0].split()[:2] == ["level", "MFLOP"] and "removed, in order: w0." in text
    assert "In FLOPs w0 + w1 + w2 earn their place; removed, in order: none." in text


def test_the_figure_is_drawn(content: dict[str, Any], tmp_path: Path) -> None:
    plot_ablation(content, tmp_path / "deeper" / "ablation.png", "A family")
    with Image.open(tmp_path / "deeper" / "ablation.png") as image:
        assert min(image.size) > 400
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
