"""Measurements of gamma: denoising errors of a family, common noise, and how repeated levels widen the intervals."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from laws import contains, flops_of, law
from toys import gaussian_level, gaussian_variance, process, toy_family

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import alpha_sigma, uniform_weights
from mlem_diffusion.gamma import measurement
from mlem_diffusion.gamma.measurement import family_pairs, noise_levels, seed_variances, squared_differences
from mlem_diffusion.gamma.power_law import fit

SCATTER = 0.2  # standard deviation between seeds of the logarithm of a squared difference


def groups(rng: np.random.Generator) -> list[tuple[str, list[np.ndarray]]]:
    """Values of the two cheapest of six levels with independent seed noise, and of the same levels trained again; a
    difference has the noise of both its levels."""
    values, hard = law(flops_of(6), 2.5), np.exp(0.3 * rng.standard_normal((16, 1))) * np.ones(3)  # [M, S]
    z, again = SCATTER * rng.standard_normal(6), SCATTER * rng.standard_normal(6)

    def group(form: str, i: int, k: int, shared: float) -> tuple[str, list[np.ndarray]]:
        return form, [values[form][i] * np.exp(shared + noise) * hard for noise in (z[k], again[k])]

    found = [group(form, k, k, 0.0) for k in (0, 1) for form in ("loss_fit", "to_largest")]
    return [*found, *(group("differences", k, k, z[k + 1]) for k in (0, 1)), group("differences", 0, 1, z[0])]


def test_the_spread_matches_the_seeds():
    rng = np.random.default_rng(0)
    found = [seed_variances(groups(rng), np.full(3, 1 / 3)) for _ in range(300)]
    for form, levels_in_it in (("loss_fit", 1), ("to_largest", 1), ("differences", 2)):
        assert np.mean([variance[form] for variance in found]) == pytest.approx(levels_in_it * SCATTER**2, rel=0.15)


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


def test_a_measurement_holds_every_length_the_repeats_and_the_poolings():
    """Levels that add a known shift to a noisy image, twice as large at high noise: all differences are known."""
    shifts = {"a": 0.4, "b": 0.2, "c": 0.1, "d": 0.0, "a1": 0.5, "b1": 0.25}
    family = [{"name": n, "width": i, "flops": float(4**i), "unet": {"blocks": 1}} for i, n in enumerate("abcd")]
    again = [{**family[i], "name": f"{n}1", "train_seed": 7} for i, n in enumerate("ab")]
    for m in [*family, *again]:
        m |= {"snapshots": [{"images": 5}, {"images": 10}], "images": 10, "weights_sha256": "0", "data_sha256": "1"}

    def load(m, snapshot):
        shift = shifts[m["name"]] * (1 if snapshot == -1 else 2)
        return Level(m["name"], lambda x, logsnr: x + shift * (2 if logsnr < 0 else 1), m["flops"])

    settings, held_out = SimpleNamespace(noise_levels=21, batch=3, seed=4, bootstrap=20), torch.zeros(3, 1, 2, 2)
    bar = lambda *_: nullcontext(lambda *_: None)  # noqa: E731
    gains = {"sde/ddpm": {"logsnr": [-9, -0.1, 0, 9], "density": [0, 0, 1, 1]}}  # low noise only
    result = measurement.measure(family, again, load, held_out, process(), settings, bar, gains)
    assert [(e["fraction"], e["images"]) for e in result["training_lengths"]] == [(0.5, [5] * 4), (1.0, [10] * 4)]
    assert result["estimates"] == result["training_lengths"][-1]["estimates"] and result["held_out_images"] == 3
    values = {form: np.array([p["value"] for p in points]) for form, points in result["points"].items()}
    p = process()
    mean = 1 + 3 * p.logsnr_min / (p.logsnr_min - p.logsnr_max)  # uniformly over log-SNR
    assert values["differences"] / mean == pytest.approx([0.04, 0.01, 0.01], rel=0.06)
    assert values["to_largest"] / mean == pytest.approx([0.16, 0.04, 0.01], rel=0.06)
    pairs = [(0.16, 0.25), (0.04, 0.0625)]  # |a - d|^2 and |a1 - d|^2, |b - d|^2 and |b1 - d|^2
    variance = np.mean([np.log(one / other) ** 2 / 2 for one, other in pairs])
    assert result["between_seeds"]["log_error_sd"]["to_largest"] == pytest.approx(variance**0.5 / 2, rel=1e-4)
    by_gains = result["weighted_by_gains"]["sde/ddpm"]
    low = [(row["loss"], row["weight"]) for row in result["per_noise_level"] if row["logsnr"] >= 0]
    expected = np.average([loss for loss, _ in low], axis=0, weights=[weight for _, weight in low])
    assert by_gains["levels"] == pytest.approx(expected, rel=1e-3)
    assert by_gains["estimates"].keys() == result["estimates"].keys() and by_gains["htmc"] != "no verdict"
    assert "gamma (drops) weighted by gains of sde/ddpm" in measurement.summary(result)
    family[0]["unet"] = {"blocks": 2}
    mixed = measurement.measure(family, [], load, held_out, process(), settings, bar)
    assert (mixed["htmc"], "blocks 2 in a, 1 in b+c+d" in mixed["htmc_reason"]) == ("no verdict", True)
    assert "weighted_by_gains" not in mixed


IMAGES = 0.5 * torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LOGSNR = np.array([-6.0, -1.0, 0.5, 7.0])


def denoising_errors(levels, *arguments, **named):
    """loss [K, M, S], to_previous and to_largest [K-1, M, S]."""
    found = squared_differences(levels, family_pairs(len(levels)), *arguments, **named)
    return np.split(found, [len(levels), 2 * len(levels) - 1])


def test_errors_do_not_depend_on_the_batch_size():
    runs = [denoising_errors(toy_family(), IMAGES, LOGSNR, seed=3, batch=batch) for batch in (1, 3, 128)]
    for run in runs[:-1]:
        for a, b in zip(run, runs[-1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    other = denoising_errors(toy_family(), IMAGES, LOGSNR, seed=4)
    assert not np.allclose(other[0], runs[-1][0], rtol=1e-3)


def test_differences_follow_their_definitions():
    """The differences of constant denoisers, whose errors are known."""
    values = [0.1, 0.4, -0.2, 0.3]
    levels = [Level(str(v), lambda x, logsnr, v=v: torch.full_like(x, v), 1.0) for v in values]
    loss, previous, largest = denoising_errors(levels, IMAGES, LOGSNR)
    assert loss.shape == (4, 10, 4) and previous.shape == largest.shape == (3, 10, 4)
    for k, value in enumerate(values):
        expected = (IMAGES - value).square().mean((1, 2, 3)).numpy()
        np.testing.assert_allclose(loss[k], np.repeat(expected[:, None], 4, 1), rtol=1e-5)
    for k in range(3):
        np.testing.assert_allclose(previous[k], (values[k + 1] - values[k]) ** 2, rtol=1e-4)
        np.testing.assert_allclose(largest[k], (values[k] - values[-1]) ** 2, rtol=1e-4)


def test_noise_is_common_to_the_levels_and_fresh_elsewhere():
    seen: dict[str, list[torch.Tensor]] = {"a": [], "b": []}

    def recorder(name: str) -> Level:
        return Level(name, lambda x, logsnr: seen[name].append(x) or x, 1.0)

    # images of zeros at one noise level, twice, so that the level sees the noise alone
    denoising_errors([recorder("a"), recorder("b")], torch.zeros(5, 3, 16, 16), np.array([0.0, 0.0]))
    a, b = torch.cat(seen["a"]).flatten(1), torch.cat(seen["b"]).flatten(1)
    assert torch.equal(a, b)
    correlation = np.corrcoef(a.numpy())  # 5 images at 2 noise levels
    assert np.abs(correlation - np.eye(10)).max() < 5 / np.sqrt(3 * 16 * 16)


def test_exact_denoiser_has_the_exact_error():
    """Gaussian data with s = 0.5: the error is s^2 sigma^2 / v per pixel; 48000 pixels, 4 standard errors of 0.65%."""
    images = 0.5 * torch.randn(250, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    loss, _, _ = denoising_errors([gaussian_level(0.5)], images, LOGSNR)
    _, sigma = alpha_sigma(LOGSNR)
    np.testing.assert_allclose(loss[0].mean(0), 0.25 * sigma**2 / gaussian_variance(LOGSNR, 0.5), rtol=0.026)


def test_noise_levels_cover_the_path_and_its_ends():
    p, reported = process(), []
    values = noise_levels(p, 10)
    assert len(values) == 10 and np.all(np.diff(values) > 0)
    assert (values[0], values[-1]) == (p.logsnr_min, p.logsnr_max)
    np.testing.assert_allclose(values[1:-1], p.logsnr_at((np.arange(8) + 0.5) / 8))
    weights = uniform_weights(values)
    assert weights.sum() == pytest.approx(1) and weights.min() > 0
    denoising_errors(toy_family(1), IMAGES, values, progress=lambda done, of: reported.append((done, of)))
    assert reported == [(i, 10) for i in range(1, 11)]
