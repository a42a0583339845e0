"""Estimates from a family's errors: content, the test of gamma > 2, pooling, and warnings."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from laws import FORMS, contains, flops_of, law, noisy_family

from mlem_diffusion.diffusion.process import alpha2_weights
from mlem_diffusion.experiment.runs import gain_densities, used_gamma
from mlem_diffusion.gamma.drops import fit_drops
from mlem_diffusion.gamma.estimates import estimate
from mlem_diffusion.gamma.measurement import hierarchy_warnings, overfitting_warnings, summary
from mlem_diffusion.gamma.power_law import Fit, fit
from mlem_diffusion.gamma.verdict import BY_LOSS, htmc_answer, mixed_architectures

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("gamma", "answer"), [(5.0, "yes"), (1.2, "no"), (2.0, "undetermined"), (None, "undetermined")]
)
def test_harder_than_monte_carlo(gamma, answer):
    result = estimate(noisy_family(gamma), 0, 60)
    assert result["htmc"] == answer and result["htmc_reason"].endswith(".")
    if gamma is None:
        assert all(e["interval"][1] is None for e in result["estimates"].values())
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("gammas", "answer", "alone"),
    [((5, 5, 5), "yes", "yes"), ((1, 5, 5), "undetermined", "no"), ((5, 5, 1), "undetermined", "yes"),
     ((1, 1, 1), "no", "no"), ((None, 5, 5), "yes", "undetermined")],
)  # fmt: skip
def test_the_loss_may_veto_and_decides_alone_where_levels_are_not_nested(gammas, answer, alone):
    flops = flops_of(7)
    weak = law(flops, 5.0)["loss_fit"] * (1 + 0.15 * (-1.0) ** np.arange(7))  # falls, but its interval has 2
    fits = {
        form: fit(form, flops, weak if gamma is None else law(flops, gamma)[form])
        for form, gamma in zip(FORMS, gammas, strict=True)
    }
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
        assert summary({**result, "warnings": []}).count("NOT APPLICABLE") == 2


def test_levels_of_several_architectures_are_named():
    folder = ROOT / "checkpoints" / "celeba32" / "published"
    family = [json.loads((folder / name / "metadata.json").read_text()) for name in ("w8", "w12", "w20")]
    text = mixed_architectures(family)
    assert "patch 2 in w8+w12, 1 in w20" in text and "multipliers [2, 2] in w8+w12, [1, 2, 2] in w20" in text
    assert "blocks" not in text and mixed_architectures(family[:2]) == ""


def test_the_gamma_that_probabilities_use(tmp_path):
    made_with, settings = {"levels": {}}, SimpleNamespace(compare=SimpleNamespace(gamma="auto"))
    exp = SimpleNamespace(results=tmp_path, cfg=settings, identity=made_with)

    def used(nested, *gammas):
        estimates = dict(zip(("differences", "to_largest", "drops", "loss_fit"), gammas, strict=True))
        own = {name: {"gamma": g, "applicable": nested or name in BY_LOSS} for name, g in estimates.items()}
        (tmp_path / "gamma.json").write_text(json.dumps({"estimates": own, "made_with": made_with}))
        return used_gamma(exp)

    assert (used(True, 5, 4, 3, 2), used(True, None, 4, 3, 2), used(False, 5, 4, 3, 2)) == (5, 4, 3)
    assert (used(False, 5, 4, None, 2), used(False, None, 4, None, None)) == (2, 4)
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
    assert hierarchy_warnings(good) == []
    bad = copy.deepcopy(good)
    bad.loss[3] = 1.02 * bad.loss[2]
    bad.to_previous[4] *= 10
    text = hierarchy_warnings(bad)
    assert "w32 is not measurably better than w24 in loss." in text
    assert any(line.startswith("w40 and w48 differ by more than twice") for line in text)
    assert not any(line.startswith(("w8 ", "w16 ")) for line in text)  # the good pairs stay unmentioned


def test_overfitting_is_reported_once_per_level():
    rng = np.random.default_rng(6)
    first = 1 + 0.1 * rng.standard_normal((2, 100))
    second = first - 0.05
    third = np.stack([second[0] - 0.05, second[1] + 0.02 + 0.001 * rng.standard_normal(100)])
    (found,) = overfitting_warnings(["a", "b"], [[10, 10], [20, 20], [40, 40]], [first, second, third])
    assert found.startswith("The held-out loss of b after 40 images is above that after 20 by 0.0199")
    noisy = third + 0.5 * rng.standard_normal(third.shape)
    assert overfitting_warnings(["a"], [[1], [2]], [second[:1], noisy[:1]]) == []
