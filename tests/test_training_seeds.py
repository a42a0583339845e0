"""How repeated levels widen gamma's intervals, for synthetic families with a known spread between seeds."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from laws import contains, flops_of, law, level_errors
from toys import process

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.gamma import measurement
from mlem_diffusion.gamma.estimate import LevelErrors
from mlem_diffusion.gamma.power_law import fit
from mlem_diffusion.gamma.training_seeds import Repeat, seed_spread

SCATTER = 0.2  # standard deviation between seeds of the logarithm of a squared difference


def family(sd: float, rng: np.random.Generator) -> tuple[LevelErrors, list[Repeat]]:
    """A family whose levels have independent seed noise (a difference has that of both its levels), and the two
    cheapest levels trained again."""
    values, hard = law(flops_of(6), 2.5), np.exp(0.3 * rng.standard_normal((16, 1))) * np.ones(3)  # [M, S]
    z, again = sd * rng.standard_normal(6), sd * rng.standard_normal(6)

    def at(form: str, k: int, noise: float) -> np.ndarray:
        return values[form][k] * np.exp(noise) * hard

    def repeat(k: int) -> Repeat:
        values = [at("loss_fit", k, again[k]), at("to_largest", k, again[k]), at("differences", k, again[k] + z[k + 1])]
        return (k, 1, [*values, at("differences", k - 1, z[k - 1] + again[k])] if k else values)

    errors = level_errors(
        np.array([at("loss_fit", k, z[k]) for k in range(6)]),
        np.array([at("differences", k, z[k] + z[k + 1]) for k in range(5)]),
        np.array([at("to_largest", k, z[k]) for k in range(5)]),
    )
    return errors, [repeat(0), repeat(1)]


def test_the_spread_matches_the_seeds():
    rng = np.random.default_rng(0)
    found = [seed_spread(*family(SCATTER, rng)) for _ in range(300)]
    assert found[0][1]["levels"] == ["w8", "w16"] and found[0][1]["seeds"] == [1]
    assert found[0][1]["degrees_of_freedom"] == {"loss_fit": 2, "differences": 3, "to_largest": 2}
    for form, levels_in_it in (("loss_fit", 1), ("to_largest", 1), ("differences", 2)):
        assert np.mean([variance[form] for variance, _ in found]) == pytest.approx(levels_in_it * SCATTER**2, rel=0.15)


@pytest.mark.parametrize("form", ["differences", "to_largest"])
def test_coverage_improves_where_seeds_scatter(form):
    flops, gamma, rng, repeats = flops_of(5), 2.5, np.random.default_rng(1), 60
    covered = {"without": 0, "with": 0}
    for i in range(repeats):
        z = SCATTER * rng.standard_normal(5)
        noise = z[:4] if form == "to_largest" else (z[:4] + z[1:]) / np.sqrt(2)  # neighbours share a level
        y = law(flops, gamma)[form] * np.exp(noise)
        measured = SCATTER**2 * rng.chisquare(2) / 2  # two levels, two seeds each: two degrees of freedom
        for name, between in (("without", 0.0), ("with", measured)):
            found = fit(form, flops, y, between=between, bootstrap=40, seed=i)
            covered[name] += contains(found.bootstrap_interval, gamma)
    assert covered["with"] > covered["without"] + 1
    assert covered["with"] >= 0.92 * repeats


def test_a_measurement_holds_every_length_and_the_repeats():
    """Levels that add a known shift to a noisy image: all differences are known, and repeats meet the same noise."""
    shifts = {"a": 0.4, "b": 0.2, "c": 0.1, "d": 0.0, "a1": 0.5, "b1": 0.25}
    family = [{"name": n, "width": i, "flops": float(4**i)} for i, n in enumerate("abcd")]
    again = [{**family[i], "name": f"{n}1", "train_seed": 7} for i, n in enumerate("ab")]
    for m in [*family, *again]:
        m |= {"snapshots": [{"images": 5}, {"images": 10}], "images": 10, "weights_sha256": "0", "data_sha256": "1"}

    def load(m, snapshot):
        return Level(m["name"], lambda x, logsnr: x + shifts[m["name"]] * (1 if snapshot == -1 else 2), m["flops"])

    class Settings:
        noise_levels, batch, seed, bootstrap = 3, 2, 4, 20

    levels, held_out = [load(m, -1) for m in [*family, *again]], torch.zeros(3, 1, 2, 2)
    arguments = (family, again, levels, [10] * 4, held_out, process(), Settings, lambda *_: None)
    errors, ((_, _, first), (_, _, second)) = measurement.level_errors(*arguments)
    assert errors.to_previous.mean((1, 2)) == pytest.approx([0.04, 0.01, 0.01], rel=1e-4)
    assert errors.to_largest.mean((1, 2)) == pytest.approx([0.16, 0.04, 0.01], rel=1e-4)
    assert [v.mean() for v in first] == pytest.approx([first[0].mean(), 0.25, 0.09], rel=1e-4)
    assert [v.mean() for v in second[1:]] == pytest.approx([0.25**2, 0.15**2, 0.15**2], rel=1e-4)
    bar = lambda *_: nullcontext(lambda *_: None)  # noqa: E731
    result = measurement.measure(family, again, load, held_out, process(), Settings, bar)
    assert [(e["fraction"], e["images"]) for e in result["training_lengths"]] == [(0.5, [5] * 4), (1.0, [10] * 4)]
    assert result["estimates"] == result["training_lengths"][-1]["estimates"] and result["held_out_images"] == 3
    assert all("interval_without_seeds" in e for e in result["estimates"].values())
    assert "gamma (differences)" in measurement.summary(result)
