"""Estimates from a family's errors: content, the test of gamma > 2, pooling, and warnings."""

import copy
import json

import numpy as np
import pytest
from laws import FORMS, contains, flops_of, law, noisy_family

from mlem_diffusion.gamma.estimates import estimate
from mlem_diffusion.gamma.measurement import hierarchy_warnings, overfitting_warnings
from mlem_diffusion.gamma.verdict import htmc_answer
from mlem_diffusion.gamma.power_law import fit


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
    ("gammas", "answer"), [((5, 5, 5), "yes"), ((1, 5, 5), "undetermined"), ((5, 5, 1), "undetermined"),
                           ((1, 1, 1), "no"), ((None, 5, 5), "yes")]
)  # fmt: skip
def test_loss_fit_may_veto_but_not_decide(gammas, answer):
    flops = flops_of(7)
    weak = law(flops, 5.0)["loss_fit"] * (1 + 0.15 * (-1.0) ** np.arange(7))  # falls, but its interval has 2
    fits = {
        form: fit(form, flops, weak if gamma is None else law(flops, gamma)[form])
        for form, gamma in zip(FORMS, gammas, strict=True)
    }
    assert fits["loss_fit"].falls
    assert htmc_answer(fits)[0] == answer


def test_content():
    errors = noisy_family(2.5)
    result = estimate(errors, 3, 50)
    assert estimate(errors, 3, 50) == result
    for found in result["estimates"].values():
        assert found["gamma"] == pytest.approx(2.5, rel=0.1) and contains(found["interval"], 2.5)
    assert [level["width"] for level in result["levels"]] == errors.widths
    assert result["levels"][0]["gflop"] == pytest.approx(0.233)
    assert result["levels"][2]["loss"] == pytest.approx((errors.loss[2] @ errors.weights).mean())
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
