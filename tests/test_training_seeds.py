"""How repeated levels widen gamma's intervals, for synthetic families with a known spread between seeds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from laws import FORMS, contains, flops_of, law

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.errors import UserError
from mlem_diffusion.figures.gamma import plot_gamma
from mlem_diffusion.gamma.denoising_errors import denoising_errors, family_pairs, split_by_kind, squared_differences
from mlem_diffusion.gamma.estimate import LevelErrors, estimate
from mlem_diffusion.gamma.level_quality import differences_fall, overfitting_warnings
from mlem_diffusion.gamma.training_seeds import Repeat, as_json, repeat_pairs, seed_spread

SCATTER = 0.2  # standard deviation between seeds of the logarithm of a squared difference


def family(
    sd: float, rng: np.random.Generator, levels: int = 6, gamma: float = 2.5
) -> tuple[LevelErrors, list[Repeat]]:
    """A family whose levels have independent seed noise, and two levels trained again.

    A difference has the noise of both its levels.
    """
    flops, images, noise_levels = flops_of(levels), 16, 3
    values = law(flops, gamma)
    hard = np.exp(0.3 * rng.standard_normal((images, 1))) * np.ones(noise_levels)  # [M, S], the same for all levels

    z, again = sd * rng.standard_normal(levels), sd * rng.standard_normal(levels)

    def at(value: float, noise: float) -> np.ndarray:
        return value * np.exp(noise) * hard

    errors = LevelErrors(
        widths=list(range(levels)),
        names=[f"w{k}" for k in range(levels)],
        flops=flops,
        images=[1] * levels,
        logsnr=np.arange(noise_levels),
        weights=np.full(noise_levels, 1 / noise_levels),
        loss=np.array([at(v, z[k]) for k, v in enumerate(values["loss_fit"])]),
        to_previous=np.array([at(v, z[k] + z[k + 1]) for k, v in enumerate(values["differences"])]),
        to_largest=np.array([at(v, z[k]) for k, v in enumerate(values["to_largest"])]),
    )
    repeats = [
        Repeat(
            k,
            1,
            at(values["loss_fit"][k], again[k]),
            at(values["differences"][k - 1], z[k - 1] + again[k]) if k else None,
            at(values["differences"][k], again[k] + z[k + 1]),
            at(values["to_largest"][k], again[k]),
        )
        for k in (0, 1)
    ]
    return errors, repeats


def test_the_spread_matches_the_seeds():
    rng = np.random.default_rng(0)
    found = [seed_spread(*family(SCATTER, rng)) for _ in range(300)]
    assert found[0].degrees_of_freedom == {"loss_fit": 2, "differences": 3, "to_largest": 2}
    for form, levels_in_it in (("loss_fit", 1), ("to_largest", 1), ("differences", 2)):
        assert np.mean([f.variance[form] for f in found]) == pytest.approx(levels_in_it * SCATTER**2, rel=0.15)


@pytest.mark.parametrize("form", ["differences", "to_largest"])
def test_coverage_improves_where_seeds_scatter(form):
    flops, gamma, rng = flops_of(5), 2.5, np.random.default_rng(1)
    covered = {"without": 0, "with": 0}
    for i in range(120):
        z = SCATTER * rng.standard_normal(5)
        noise = z[:4] if form == "to_largest" else (z[:4] + z[1:]) / np.sqrt(2)  # neighbours share a level
        y = law(flops, gamma)[form] * np.exp(noise)
        # two levels, two seeds each: two degrees of freedom
        measured = SCATTER**2 * rng.chisquare(2) / 2
        for name, between in (("without", 0.0), ("with", measured)):
            fit = FORMS[form](flops, y, between=between, bootstrap=100, seed=i)
            covered[name] += contains(fit.bootstrap_interval, gamma)
    assert covered["with"] > covered["without"] + 3
    assert covered["with"] >= 0.93 * 120


@pytest.mark.parametrize("form", FORMS)
def test_intervals_only_grow_and_zero_spread_leaves_them_unchanged(form):
    flops, rng = flops_of(6), np.random.default_rng(2)
    values = law(flops, 2.5)[form]
    y = values * np.exp((0.001 if form == "loss_fit" else 0.02) * rng.standard_normal(len(values)))
    without = FORMS[form](flops, y, bootstrap=60)
    same = FORMS[form](flops, y, between=0.0, bootstrap=60)
    assert same.interval == without.interval and same.profile_interval == without.profile_interval
    wide = FORMS[form](flops, y, between=0.01, bootstrap=60)
    for before, after in ((without.profile_interval, wide.profile_interval), (without.interval, wide.interval)):
        assert after[0] < before[0] and (after[1] is None or after[1] > before[1])
    # a spread below the scatter of the levels about the law is already included
    rough = values * np.exp(0.3 * rng.standard_normal(len(values)))
    assert FORMS[form](flops, rough, between=1e-6).profile_interval == FORMS[form](flops, rough).profile_interval


def test_estimate_with_identical_repeats_is_unchanged():
    errors, _ = family(0.05, np.random.default_rng(3))
    same = [
        Repeat(
            k, 1, errors.loss[k], errors.to_previous[k - 1] if k else None, errors.to_previous[k], errors.to_largest[k]
        )
        for k in (0, 1)
    ]
    spread = seed_spread(errors, same)
    assert set(spread.variance.values()) == {0.0}
    without, with_repeats = estimate(errors, bootstrap=40), estimate(errors, bootstrap=40, between=spread.variance)
    assert with_repeats["estimates"] == without["estimates"]
    content = as_json(errors, same, spread)
    assert content["levels"] == ["w0", "w1"] and content["seeds"] == [1] and content["log_error_sd"]["loss_fit"] == 0
    json.dumps(content, allow_nan=False)
    with pytest.raises(UserError):
        seed_spread(errors, [])


def test_repeats_are_compared_with_the_family_on_the_same_noise():
    import torch

    def level(name: str, shift: float, flops: float) -> Level:
        return Level(name, lambda x, logsnr: x + shift, flops)

    levels = [level("a", 0.3, 1), level("b", 0.2, 2), level("c", 0.0, 3), level("a1", 0.5, 1), level("b1", 0.1, 2)]
    images, logsnr = torch.zeros(3, 1, 2, 2), np.array([-1.0, 1.0])
    own = repeat_pairs(3, [0, 1])
    found = squared_differences(levels, family_pairs(3) + own[0] + own[1], images, logsnr, seed=4, batch=2)
    for got, expected in zip(
        split_by_kind(found, 3), denoising_errors(levels[:3], images, logsnr, seed=4), strict=True
    ):
        assert np.array_equal(got, expected)
    # to the largest, above, and for b1 below: squares of the differences of the shifts
    again = found[len(family_pairs(3)) :].mean((1, 2))
    assert again[1:3] == pytest.approx([0.25, 0.09], rel=1e-5)
    assert again[4:] == pytest.approx([0.01, 0.01, 0.04], rel=1e-5)


def test_violations_are_where_the_differences_rise(tmp_path):
    errors, _ = family(0.0, np.random.default_rng(5))
    clean = differences_fall(errors)
    assert clean["violations"] == [] and clean["checks"] == 2 * 4 * (3 + 1)
    assert np.array(clean["to_largest"]["ratio"]).shape == (4, 3) and clean["to_largest"]["pairs"][0] == ["w0", "w1"]
    assert clean["to_previous"]["pairs"][0] == ["w1", "w2"]
    errors.to_largest[2, :, 1] = 3 * errors.to_largest[1, :, 1]  # only there, and not enough to show pooled
    errors.weights[:] = [0.5, 0.0, 0.5]
    found = differences_fall(errors)
    assert [(v["kind"], v["levels"], v["logsnr"]) for v in found["violations"]] == [("to_largest", ["w1", "w2"], 1.0)]
    assert found["violations"][0]["ratio"] == pytest.approx(3)
    json.dumps(found, allow_nan=False)
    plot_gamma({**estimate(errors, bootstrap=0), "differences_fall": found}, tmp_path / "gamma.png")
    assert (tmp_path / "gamma.png").stat().st_size > 10_000


def test_overfitting_is_reported_once_per_level():
    rng = np.random.default_rng(6)
    first = 1 + 0.1 * rng.standard_normal((2, 100))
    second = first - 0.05
    third = np.stack([second[0] - 0.05, second[1] + 0.02 + 0.001 * rng.standard_normal(100)])
    found = overfitting_warnings(["a", "b"], [[10, 10], [20, 20], [40, 40]], [first, second, third])
    assert len(found) == 1 and found[0].startswith(
        "The held-out loss of b after 40 images is above that after 20 by 0.0199"
    )
    noisy = third + 0.5 * rng.standard_normal(third.shape)
    assert overfitting_warnings(["a"], [[1], [2]], [second[:1], noisy[:1]]) == []
