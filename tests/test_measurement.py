"""Gamma from a family's errors: common noise, repeated levels, the test of gamma > 2, pooling, and warnings."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import FORMS, contains, flops_of, gaussian_level, gaussian_variance, law, noisy_family, process, toy_family

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import alpha2_weights, alpha_sigma
from mlem_diffusion.experiment.runs import gain_densities, used_gamma
from mlem_diffusion.gamma import measurement
from mlem_diffusion.gamma.drops import fit_drops
from mlem_diffusion.gamma.estimates import estimate
from mlem_diffusion.gamma.power_law import Fit, fit
from mlem_diffusion.gamma.verdict import BY_LOSS, htmc_answer, mixed_architectures

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
    found = [measurement.seed_variances(groups(rng), np.full(3, 1 / 3)) for _ in range(300)]
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
    lengths = [mixed, *mixed["training_lengths"]]
    assert not any(own["applicable"] for entry in lengths for own in entry["estimates"].values())
    assert "weighted_by_gains" not in mixed


IMAGES = 0.5 * torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LOGSNR = np.array([-6.0, -1.0, 0.5, 7.0])


def denoising_errors(levels, *arguments, **named):
    """loss [K, M, S], to_previous and to_largest [K-1, M, S]."""
    found = measurement.squared_differences(levels, measurement.family_pairs(len(levels)), *arguments, **named)
    return np.split(found, [len(levels), 2 * len(levels) - 1])


def test_errors_do_not_depend_on_the_batch_size():
    runs = [denoising_errors(toy_family(), IMAGES, LOGSNR, seed=3, batch=batch) for batch in (1, 3, 128)]
    for run in runs[:-1]:
        for a, b in zip(run, runs[-1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    other = denoising_errors(toy_family(), IMAGES, LOGSNR, seed=4)
    assert not np.allclose(other[0], runs[-1][0], rtol=1e-3)


def test_noise_is_common_to_the_levels_and_fresh_elsewhere():
    seen: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    recorders = [Level(name, lambda x, u, own=own: own.append(x) or x, 1.0) for name, own in seen.items()]
    # images of zeros at one noise level, twice, so that the level sees the noise alone
    denoising_errors(recorders, torch.zeros(5, 3, 16, 16), np.array([0.0, 0.0]))
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


@pytest.mark.parametrize(("gamma", "answer"), [(5, "yes"), (1.2, "no"), (2, "undetermined"), (None, "undetermined")])
def test_harder_than_monte_carlo(gamma, answer):
    result = estimate(noisy_family(gamma), 0, 60)
    assert result["htmc"] == answer and result["htmc_reason"].endswith(".")
    if gamma is None:
        assert all(e["interval"][1] is None for e in result["estimates"].values())
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(("gammas", "answer", "alone"), [
    ((5, 5, 5), "yes", "yes"), ((1, 5, 5), "undetermined", "no"), ((5, 5, 1), "undetermined", "yes"),
    ((1, 1, 1), "no", "no"), ((None, 5, 5), "yes", "undetermined"),
])  # fmt: skip
def test_the_loss_may_veto_and_decides_alone_where_levels_are_not_nested(gammas, answer, alone):
    flops = flops_of(7)
    weak = law(flops, 5.0)["loss_fit"] * (1 + 0.15 * (-1.0) ** np.arange(7))  # falls, but its interval has 2
    laws = [weak if gamma is None else law(flops, gamma)[form] for form, gamma in zip(FORMS, gammas, strict=True)]
    fits = {form: fit(form, flops, values) for form, values in zip(FORMS, laws, strict=True)}
    fits["drops"] = fit_drops(flops, weak if gammas[0] is None else law(flops, gammas[0])["loss_fit"])[0]
    assert fits["loss_fit"].falls
    assert htmc_answer(fits, nested=True)[0] == answer
    assert htmc_answer(fits, nested=False)[0] == alone
    # two fits to the loss that disagree do not speak
    assert htmc_answer({**fits, "drops": Fit()}, nested=False)[0] == "undetermined"


def test_differences_of_levels_that_are_not_nested_do_not_apply():
    good, k = noisy_family(5.0), np.arange(7)[:, None, None]
    bad = replace(good, to_previous=good.to_previous * np.where(k[:6] == 4, 1.5, 1.0))
    # a smaller loss of one level puts the next ratio to 1.19: within the limit, but by less than such scatter
    rough = replace(good, loss=good.loss * np.where(k == 5, 0.985, 1.0))
    rising = replace(good, loss=good.loss * np.where(k == 6, 1.3, 1.0))
    nested, *others = (estimate(errors, 0, 40) for errors in (good, bad, rough, rising))
    pairs = [result["nestedness"] for result in (nested, *others)]
    assert [pair["ratio"] for pair in pairs[0]] == pytest.approx([1] * 6, rel=0.05)
    assert all(e["applicable"] for e in nested["estimates"].values()) and pairs[0][4]["names"] == ["w40", "w48"]
    assert pairs[1][4]["ratio"] == pytest.approx(1.5 * pairs[0][4]["ratio"]) and pairs[2][5]["ratio"] < 1.25
    assert (pairs[3][5]["ratio"], pairs[3][5]["se"], pairs[3][5]["nested"]) == (None, None, False)
    for result in others[:2]:
        assert [e["applicable"] for e in result["estimates"].values()] == [True, True, False, False]
        assert result["htmc"] == "yes" and "by the loss alone" in result["htmc_reason"]
        assert measurement.summary({**result, "warnings": []}).count("NOT APPLICABLE") == 2


def test_levels_of_several_architectures_are_named():
    narrow, wide = {"multipliers": [2, 2], "blocks": 1, "patch": 2}, {"multipliers": [1, 2, 2], "blocks": 1}
    family = [{"name": name, "unet": unet} for name, unet in (("w8", narrow), ("w12", narrow), ("w20", wide))]
    text = mixed_architectures(family)
    assert "patch 2 in w8+w12, 1 in w20" in text and "multipliers [2, 2] in w8+w12, [1, 2, 2] in w20" in text
    assert "blocks" not in text and mixed_architectures(family[:2]) == ""


def test_the_gamma_that_probabilities_use(tmp_path):
    made_with, settings, said = {"levels": {}}, SimpleNamespace(compare=SimpleNamespace(gamma="auto")), []
    exp = SimpleNamespace(results=tmp_path, cfg=settings, identity=made_with, print=said.append)

    def used(nested, *gammas):
        estimates = dict(zip(("differences", "to_largest", "drops", "loss_fit"), gammas, strict=True))
        own = {name: {"gamma": g, "applicable": nested or name in BY_LOSS} for name, g in estimates.items()}
        (tmp_path / "gamma.json").write_text(json.dumps({"estimates": own, "made_with": made_with}))
        return used_gamma(exp)

    assert (used(True, 5, 4, 3, 2), used(True, None, 4, 3, 2), used(False, 5, 4, 3, 2)) == (5, 4, 3)
    assert (used(False, 5, 4, None, 2), said) == (2, [])
    assert used(False, None, 4, None, None) == 4 and "4.00 is from a law that does not apply" in said[0]
    assert gain_densities(exp) is None
    (tmp_path / "gains.json").write_text(json.dumps({"made_with": made_with, "rules": {"a": 1}}))
    assert gain_densities(exp) == {"a": 1}
    exp.identity = {"levels": {"w4": "1"}}
    assert gain_densities(exp) is None  # of other levels


def test_content():
    errors = noisy_family(2.5)
    result = estimate(errors, 3, 50)
    assert estimate(errors, 3, 50) == result
    for found in result["estimates"].values():
        assert found["gamma"] == pytest.approx(2.5, rel=0.1) and contains(found["interval"], 2.5)
    assert [level["width"] for level in result["levels"]] == errors.widths
    assert result["levels"][0]["gflop"] == pytest.approx(0.233)
    assert result["levels"][2]["loss"] == pytest.approx((errors.loss[2] @ errors.weights).mean())
    w = alpha2_weights(errors.logsnr)
    assert result["levels"][2]["loss_alpha2"] == pytest.approx((errors.loss[2] @ w).mean())
    assert result["per_noise_level"][1]["logsnr"] == errors.logsnr[1]
    point, pooled = result["points"]["differences"][0], errors.to_previous @ errors.weights
    assert point["gflop"] == result["levels"][1]["gflop"] and point["gflop_previous"] == result["levels"][0]["gflop"]
    assert point["se"] == pytest.approx(pooled[0].std(ddof=1) / 8)
    # comparing levels on the same images is far more precise than the losses themselves are
    assert result["points"]["loss_fit"][2]["contrast_se"] < result["points"]["loss_fit"][2]["se"] / 2


def test_warnings_name_the_bad_pairs_only():
    good = noisy_family(2.5, scatter=0.0)
    assert measurement.hierarchy_warnings(good) == []
    bad = copy.deepcopy(good)
    bad.loss[3] = 1.02 * bad.loss[2]
    bad.to_previous[4] *= 10
    text = measurement.hierarchy_warnings(bad)
    assert "w32 is not measurably better than w24 in loss." in text
    assert any(line.startswith("w40 and w48 differ by more than twice") for line in text)
    assert not any(line.startswith(("w8 ", "w16 ")) for line in text)  # the good pairs stay unmentioned


def test_overfitting_is_reported_once_per_level():
    rng = np.random.default_rng(6)
    first = 1 + 0.1 * rng.standard_normal((2, 100))
    second = first - 0.05
    third = np.stack([second[0] - 0.05, second[1] + 0.02 + 0.001 * rng.standard_normal(100)])
    (found,) = measurement.overfitting_warnings(["a", "b"], [[10, 10], [20, 20], [40, 40]], [first, second, third])
    assert found.startswith("The held-out loss of b after 40 images is above that after 20 by 0.0199")
    noisy = third + 0.5 * rng.standard_normal(third.shape)
    assert measurement.overfitting_warnings(["a"], [[1], [2]], [second[:1], noisy[:1]]) == []
