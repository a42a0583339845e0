"""Estimates from a family's errors: content, the test of gamma > 2, warnings, and the figure."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from laws import FLOOR, FORMS, contains, flops_of, law

from mlem_diffusion.errors import UserError
from mlem_diffusion.figures.gamma import plot_gamma
from mlem_diffusion.gamma.estimate import LevelErrors, estimate, hierarchy_warnings, htmc_answer
from mlem_diffusion.gamma.power_law import Fit, fit_loss


def family(gamma: float | None, levels: int = 7, scatter: float = 0.03, seed: int = 0) -> LevelErrors:
    """Errors of a synthetic family; with gamma None all levels are equally good and equally far apart."""
    rng = np.random.default_rng(seed)
    images, noise_levels = 64, 6
    flops = flops_of(levels)
    logsnr = np.linspace(-6, 6, noise_levels)
    if gamma is None:
        values = {
            "loss_fit": np.full(levels, FLOOR),
            "differences": np.full(levels - 1, 1e-3),
            "to_largest": np.full(levels - 1, 1e-3),
        }
    else:
        values = law(flops, gamma)
    per_image = np.exp(0.3 * rng.standard_normal((1, images, 1)))  # some images are harder, for every level

    def spread(name: str) -> np.ndarray:
        sd = scatter / 20 if name == "loss_fit" else scatter  # only the small excess of the loss scatters
        mean = values[name] * np.exp(sd * rng.standard_normal(len(values[name])))
        noise = np.exp(0.01 * rng.standard_normal((len(mean), images, noise_levels)))
        return mean[:, None, None] * np.exp(-logsnr / 4) * per_image * noise

    return LevelErrors(
        widths=[8 * (k + 1) for k in range(levels)],
        names=[f"w{8 * (k + 1)}" for k in range(levels)],
        flops=flops,
        images=[1000] * levels,
        logsnr=logsnr,
        weights=np.full(noise_levels, 1 / noise_levels),
        loss=spread("loss_fit"),
        to_previous=spread("differences"),
        to_largest=spread("to_largest"),
    )


def test_flat_losses_are_undetermined() -> None:
    result = estimate(family(None), bootstrap=50)
    assert result["htmc"] == "undetermined"
    assert all(e["interval"][1] is None for e in result["estimates"].values())
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("gamma", "answer"),
    [(5.0, "yes"), (3.0, "yes"), (1.2, "no"), (2.0, "undetermined"), (None, "undetermined")],
)
def test_htmc(gamma: float | None, answer: str) -> None:
    result = estimate(family(gamma), bootstrap=100)
    assert result["htmc"] == answer
    assert result["htmc_reason"].endswith(".")


def test_loss_fit_may_veto_but_not_decide() -> None:
    flops = flops_of(7)
    fits: Callable[[float, float, float], dict[str, Fit]] = lambda a, b, c: {  # noqa: E731
        name: FORMS[name](flops, law(flops, g)[name]) for name, g in zip(FORMS, (a, b, c), strict=True)
    }
    assert htmc_answer(fits(5, 5, 5))[0] == "yes"
    assert htmc_answer(fits(1, 5, 5))[0] == "undetermined"
    assert htmc_answer(fits(5, 5, 1))[0] == "undetermined"
    assert htmc_answer(fits(1, 1, 1))[0] == "no"
    weak = fits(5, 5, 5)
    weak["loss_fit"] = fit_loss(flops, law(flops, 5.0)["loss_fit"] * (1 + 0.15 * (-1.0) ** np.arange(7)))
    assert weak["loss_fit"].falls and contains(weak["loss_fit"].interval, 2.0)
    assert htmc_answer(weak)[0] == "yes"


def test_macs_for_flops_leave_gamma_alone() -> None:
    errors = family(2.5)
    half = copy.copy(errors)
    object.__setattr__(half, "flops", errors.flops / 2)
    in_flops, in_macs = estimate(errors, bootstrap=20), estimate(half, bootstrap=20)
    for name in FORMS:
        one, two = in_flops["estimates"][name], in_macs["estimates"][name]
        assert one["gamma"] == pytest.approx(two["gamma"], rel=1e-6)
        assert one["interval"] == pytest.approx(two["interval"], rel=1e-6)
        assert one["amplitude"] != pytest.approx(two["amplitude"], rel=0.1)


def test_estimate_has_the_promised_content() -> None:
    errors = family(2.5)
    result = estimate(errors, bootstrap=50, seed=3)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert estimate(errors, bootstrap=50, seed=3) == result
    assert set(result["estimates"]) == set(FORMS)
    for found in result["estimates"].values():
        assert found["gamma"] == pytest.approx(2.5, rel=0.1)
        assert contains(tuple(found["interval"]), 2.5)
    assert [level["width"] for level in result["levels"]] == errors.widths
    assert result["levels"][0]["gflop"] == pytest.approx(0.233)
    assert result["levels"][2]["loss"] == pytest.approx((errors.loss[2] @ errors.weights).mean())
    assert len(result["per_noise_level"]) == len(errors.logsnr)
    assert result["per_noise_level"][1]["loss"] == pytest.approx(errors.loss[:, :, 1].mean(1))
    pooled = errors.to_previous @ errors.weights
    point = result["points"]["differences"][0]
    assert point["gflop"] == result["levels"][1]["gflop"]
    assert point["gflop_previous"] == result["levels"][0]["gflop"]
    assert point["se"] == pytest.approx(pooled[0].std(ddof=1) / 8)
    assert point["fitted"] == pytest.approx(point["value"], rel=0.2)
    # Comparing levels on the same images is far more precise than the losses themselves are.
    assert result["points"]["loss_fit"][2]["contrast_se"] < result["points"]["loss_fit"][2]["se"] / 2


def test_pooling_follows_the_weights() -> None:
    errors = family(2.5)
    one = copy.copy(errors)
    weights = np.eye(len(errors.logsnr))[2]
    object.__setattr__(one, "weights", weights)
    result = estimate(one, bootstrap=0)
    for name in FORMS:
        assert result["estimates"][name]["gamma"] == pytest.approx(
            result["per_noise_level"][2]["estimates"][name]["gamma"], rel=1e-9
        )
        assert result["estimates"][name]["bootstrap_interval"] is None


def test_bad_level_errors_are_refused() -> None:
    good = family(2.5)
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__}
    for change in (
        {"flops": good.flops[::-1]},
        {"loss": good.loss[:, :, :-1]},
        {"to_previous": np.full_like(good.to_previous, np.nan)},
        {"weights": good.weights * 2},
        {"names": good.names[:-1]},
        {"loss": -good.loss},
    ):
        with pytest.raises(UserError):
            LevelErrors(**{**fields, **change})
    pair = {
        **fields,
        **{name: fields[name][:2] for name in ("names", "widths", "images", "flops", "loss")},
        **{name: fields[name][:1] for name in ("to_previous", "to_largest")},
    }
    with pytest.raises(UserError, match="three levels"):
        estimate(LevelErrors(**pair))


def test_warnings_name_the_bad_pairs_only() -> None:
    good = family(2.5, scatter=0.0)
    assert hierarchy_warnings(good) == []
    bad = copy.deepcopy(good)
    bad.loss[3] = 1.02 * bad.loss[2]
    bad.to_previous[4] *= 10
    text = hierarchy_warnings(bad)
    assert any(line.startswith("w32 is not measurably better than w24 in loss pooled") for line in text)
    assert any("and worse pooled" in line and "6 of 6 noise levels" in line for line in text)
    assert any(line.startswith("w40 to w48 is not a smaller step than w32 to w40") for line in text)
    assert any(line.startswith("w40 and w48 differ by more than twice") for line in text)
    assert not any(line.startswith(("w8 ", "w16 ")) for line in text)  # the good pairs stay unmentioned
    local = copy.deepcopy(good)
    local.loss[1, :, 0] = local.loss[0, :, 0]
    assert any("at log-SNR -6.0 (1 of 6 noise levels)" in line for line in hierarchy_warnings(local))


@pytest.mark.parametrize("gamma", [2.5, None])
def test_plot_writes_a_png(tmp_path: Path, gamma: float | None) -> None:
    result = estimate(family(gamma), bootstrap=20)
    plot_gamma(result, tmp_path / "one.png")
    keys = ("estimates", "levels", "points")
    lengths = [{"fraction": f, "images": [int(1000 * f)] * 7, **{k: result[k] for k in keys}} for f in (0.5, 1)]
    plot_gamma({**result, "training_lengths": lengths}, tmp_path / "new" / "two.png", "a family")
    for path in (tmp_path / "one.png", tmp_path / "new" / "two.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
