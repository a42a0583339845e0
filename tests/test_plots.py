"""Figures show the numbers that they are given, and no setting of the user's changes them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest

from mlem_diffusion.figures import style
from mlem_diffusion.figures.comparison import plot_compare
from mlem_diffusion.figures.gamma import plot_gamma, plot_gamma_details
from mlem_diffusion.figures.levels import plot_ablation, plot_diagnostics, plot_gains, plot_training
from mlem_diffusion.figures.paper import plot_paper
from mlem_diffusion.figures.rates import plot_rates
from mlem_diffusion.figures.style import comparison_grid, image_grid

RESULTS = Path(__file__).parents[1] / "results"


def content(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def points(ax: Any, **looks: Any) -> list[np.ndarray]:
    """The points [N, 2] of each line of a panel that has these properties."""
    lines = [line for line in ax.lines if all(getattr(line, f"get_{k}")() == v for k, v in looks.items())]
    return [np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float) for line in lines]


def texts(figure: Any) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def frame_of(**changes: Any) -> pd.DataFrame:
    """One level with three step counts, a stitched, one with independent coins and two other settings."""
    rows: list[dict[str, Any]] = []
    for dynamics in ("sde", "ode"):
        rows += [{"dynamics": dynamics, "steps": n, "gflops_realised": n, "error": 1 / n} for n in (4, 16, 64)]
        for method, cost, error, trusted in (
            ("stitched", 8, 0.3, True), ("coins", 6, 0.1, True), ("other", 5, 0.05, True), ("other", 2, 1e-3, False),
        ):  # fmt: skip
            row = {"dynamics": dynamics, "method": method, "gflops_realised": cost, "error": error, "trusted": trusted}
            rows.append(row | {"levels": "w4+w8", "coins": "systematic", "estimator": "ml_em"})
    defaults = {"method": "single", "trusted": True, "levels": "w8", "coins": "", "estimator": "single", "steps": 8}
    facts = {"step_rule": "em", "num_samples": 64, "network_calls": 4, "gflops_expected": 1.0, "error_se": 1e-3}
    facts |= {"distance": 2.0, "distance_low": 1.5, "distance_high": 3.0, "distance_name": "Frechet"}
    facts |= {"distance_floor": 1.0, "seconds": 0.1, "num_distance": 1000}
    return pd.DataFrame(rows).fillna(defaults).assign(**facts | changes)


def test_comparison_draws_points_frontiers_and_the_floor() -> None:
    wide = {"flops": {"window": {"lower95": 1.5, "rms_error": [0.5, 0.25]}}}
    none = {"flops": {"window": {"lower95": 1.0, "rms_error": [0.5, 0.25]}}}
    entries = {"any": {"all": wide}, "coins": {"all": none}}
    figure = plot_compare(frame_of(), "demo", {"strict": {"sde": entries, "ode": {}}})
    assert len(figure.axes) == 6
    distances, errors = figure.axes[0], figure.axes[2]
    assert "real images against\nreal images: 1" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert distances.get_ylim() == figure.axes[1].get_ylim()
    drawn = {tuple(map(tuple, line)) for line in points(errors)}
    assert ((4.0, 0.25), (16.0, 1 / 16), (64.0, 1 / 64)) in drawn  # the single level, and the baselines' frontier
    assert texts(figure) == ["≥ 1.5×"] and len(errors.texts) == 1  # the window, but not the one that gains nothing
    assert points(errors, linewidth=4)[0][:, 1].tolist() == [0.25, 0.0625]
    assert all(np.ptp(np.array(bar.get_paths()[0].vertices)[:, 1]) == 1.5 for bar in distances.collections)
    hollow = points(errors, markerfacecolor="none")
    assert len(hollow) == 1 and hollow[0].tolist() == [[2, 1e-3]]
    steps = points(errors, drawstyle="steps-post")  # the setting that is not trusted is on no frontier
    assert [line.tolist() for line in steps] == [[[4, 0.25], [16, 1 / 16], [64, 1 / 64]], [[6, 0.1]], [[5, 0.05]]]


def test_comparison_without_some_numbers() -> None:
    frame = frame_of(distance=np.nan, distance_floor=np.nan)
    assert len(plot_compare(frame[frame.dynamics == "sde"]).axes) == 2  # no panel for distances
    frame = frame_of(distance=np.geomspace(1, 1e3, 14), distance_low=1.0, distance_high=1e3, error_se=np.nan)
    frame.loc[frame.dynamics == "sde", "distance"] = np.nan
    frame.loc[frame.dynamics == "ode", "error"] = 0.0  # a log axis cannot show it
    figure = plot_compare(frame)
    assert texts(figure).count("not computed") == 3


def test_the_papers_figure_has_an_arrow_at_equal_error() -> None:
    curve = [{"at": 1 / n, "speedup": 4.0, "lower95": 3.5} for n in (4, 16, 64)]
    entry = {"window": {"lower95": 3.5, "rms_error": [0.5, 0.125]}, "curve": curve}
    frame = frame_of().replace({"method": {"other": "pattern"}})
    figure = plot_paper(frame, "demo", {"sde": {"pattern": {"em_largest": {"flops": entry}}}})
    errors, distances = figure.axes[0], figure.axes[2]
    arrow, text = errors.texts
    assert text.get_text() == "4.0×\n(≥ 3.5×)" and not figure.axes[1].texts
    assert arrow.xy == pytest.approx((4, 1 / 16)) and arrow.xyann == pytest.approx((16, 1 / 16))
    assert distances.get_ylabel() == "Frechet  (n = 1000)"
    labels = errors.get_legend_handles_labels()[1]
    assert labels[0] == "EM, largest network (w8)" and len(labels) == 3
    assert len(plot_paper(frame.assign(distance=np.nan)).axes) == 2


def test_gamma_shows_fits_intervals_and_training_lengths() -> None:
    result = content("celeba32/gamma.json")
    fits, per_noise_level, lengths, _ = plot_gamma_details(result, "demo").axes
    measured, fit = result["points"]["loss_fit"], result["estimates"]["loss_fit"]
    above_floor = np.array([[p["gflop"], p["value"] - fit["floor"]] for p in measured])
    errors, answer = plot_gamma(result, "demo").axes  # one law, of root-mean-square errors
    (law,) = points(errors, linestyle="-")
    assert np.allclose(points(errors, marker="o")[0], above_floor ** (1, 0.5))
    assert np.allclose(np.diff(np.log(law[:, 1])), np.diff(np.log(law[:, 0])) / -fit["gamma"])
    assert result["htmc"] in answer.get_title() and f"γ = {fit['gamma']:.1f}" in errors.get_title(loc="left")
    assert any(np.allclose(line, above_floor) for line in points(fits) if len(line) == len(measured))
    labels = fits.get_legend_handles_labels()[1]
    low, high = fit["interval"]
    assert f"[{low:.2f}, {'∞' if high is None else f'{high:.2f}'}]" in labels[0] and "not applicable" in labels[2]
    assert (f"γ = {fit['gamma']:.2f}" if fit["gamma"] else "no finite γ") in labels[0]
    at_noise = {row["logsnr"] for row in result["per_noise_level"]}
    assert any(len(line) == len(at_noise) for line in points(per_noise_level, marker="s"))
    # an unbounded interval ends in an arrow at the edge of the axis; a number beyond the axis has no marker
    arrows = np.concatenate(points(lengths, marker="^"))[:, 1]
    assert len(arrows) > 1 and np.allclose(arrows, 0.97 * lengths.get_ylim()[1])


def test_gamma_without_a_finite_value() -> None:
    result = content("demo/gamma.json")
    del result["training_lengths"][1:]
    for entry in [result, *result["per_noise_level"]]:
        for estimate in entry["estimates"].values():
            estimate |= {"gamma": None, "amplitude": None, "floor": None}
    # a drop below zero has no place on a log axis
    drops = {"gamma": 3.0, "amplitude": 0.01, "floor": None, "interval": [2.0, None]}
    result["estimates"]["drops"] = drops
    result["points"]["drops"] = [{**p, "value": -p["value"]} for p in result["points"]["differences"]]
    result["estimates"]["differences"]["applicable"] = False
    result["nestedness"] = [{"names": ["a", "b"], "ratio": ratio, "se": 0.1} for ratio in (1.234, None, 20.0)]
    for entry in [*result["per_noise_level"], *result["training_lengths"]]:
        entry["estimates"]["drops"] = drops
    for entry in (result, *result["training_lengths"]):  # differences that do not apply: the figure is of the loss
        entry["estimates"]["differences"]["applicable"] = False
    errors = plot_gamma(result).axes[0]
    assert errors.get_title(loc="left").startswith("no finite γ") and not points(errors, linestyle="-")
    figure = plot_gamma_details(result)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels[1].startswith("drop in loss:  γ = 3.00") and "not applicable:  no finite γ" in labels[2]
    assert {"×1.23", "no drop", "×20"} <= set(texts(figure))
    assert labels[0].startswith("loss:  no finite γ")


def test_training_shows_losses_and_held_out_errors() -> None:
    history = [{"images": 1000 * i, "loss": loss} for i, loss in enumerate((0.5, 0.2), 1)]
    held_out = {"logsnr": [-3.0, 3.0], "loss": [0.4, 0.1]}
    levels = [{"name": name, "history": history, "held_out": held_out} for name in ("w4", "w8")]
    left, right = plot_training(levels, "demo").axes
    assert points(left)[0].tolist() == [[1000, 0.5], [2000, 0.2]] and points(right)[1].tolist() == [[-3, 0.4], [3, 0.1]]


def test_ablation_marks_removed_levels_hollow() -> None:
    found = content("demo/ablation.json")
    shares, *ratios = plot_ablation(found).axes
    assert len(ratios) == 2 and ratios[0].get_ylim() == ratios[1].get_ylim()
    flops = np.array([level["flops"] for level in found["levels"]])
    assert np.array_equal(points(shares)[0][:, 1], flops / flops[-1])
    removed = sum(not level["kept_flops"] for level in found["levels"])
    assert len(points(ratios[0], marker="o", markerfacecolor="white")) == removed > 0


def test_diagnostics_show_differences_against_noise_and_cost() -> None:
    found = content("demo/diagnostics.json")["ode"]
    left, right = plot_diagnostics(found).axes
    expected = np.column_stack([found["logsnr"], found["per_noise_level"]["mean_square"][2]])
    assert any(np.array_equal(line, expected) for line in points(left))
    pooled = points(right, marker="s")[0]
    assert pooled[:, 1].tolist() == found["pooled"]["mean_square"][1:]


def test_gains_are_rates_per_unit_of_logsnr() -> None:
    gains = np.array([[1.0, 1.0, 1.0, 1.0], [0.04, 0.04, 0.16, 9.0]])
    effects = SimpleNamespace(
        names=("w4", "w8"), dynamics="ode", step_rule="heun", logsnr=np.array([-2.0, 0.0, 0.0, 1.0]),
        gains=lambda: (gains, gains / 10),
    )  # fmt: skip
    (panel,) = plot_gains([effects]).axes  # type: ignore[list-item]
    assert panel.get_title() == "Heun, deterministic (ODE)"
    assert np.allclose(points(panel)[0], [[-2, 0.1], [0, 0.4]])  # sqrt(gain) / step, without the step of length 0


def test_rates_show_points_and_fitted_exponents() -> None:
    result, frame = content("rates/rates.json"), pd.read_csv(RESULTS / "rates" / "rates.csv")
    for dynamics in ("sde", "ode"):
        result[dynamics] = {"1": result[dynamics]["1"]}  # fewer panels are faster
    figure = plot_rates(result, frame)
    assert len(figure.axes) == 5
    first = figure.axes[0]
    own = frame[(frame.dynamics == "sde") & (frame.gamma == 1) & (frame.method == "em")]
    assert any(np.array_equal(line, own[["error", "cost"]]) for line in points(first))
    assert first.get_legend_handles_labels()[1][0] == "EM −2.03"


def test_image_grid_places_and_enlarges_pixels() -> None:
    images = np.zeros((3, 3, 4, 5), np.uint8)
    images[1, 0] = 200  # the second image is red
    images[2, 2, 0, 0] = 255  # the third has one blue corner
    grid = np.asarray(image_grid(images, columns=2, pad=2))
    assert grid.shape == (2 * (64 + 2) + 2, 2 * (80 + 2) + 2, 3)  # blocks of 16 x 16
    assert (grid[2:66, 84:164] == (200, 0, 0)).all()
    assert (grid[68:84, 2:18] == (0, 0, 255)).all() and (grid[84, 2:82] == 0).all()
    assert (grid[68:, 84:] == 255).all() and (grid[:2] == 255).all()  # the empty place and the rim are white


def test_comparison_grid_puts_settings_in_rows_with_labels_at_left() -> None:
    red, blue = np.zeros((2, 4, 3, 16, 16), np.uint8)
    red[:, 0], blue[:, 2] = 255, 255
    label = "ML-EM with a name that is far too long for a single line of this label"
    picture = np.asarray(comparison_grid([("reference", red), (label, blue[:2])]))
    is_red, is_blue = (picture == (255, 0, 0)).all(2), (picture == (0, 0, 255)).all(2)
    assert is_red.sum() == 2 * is_blue.sum() == 4 * 64 * 64
    first_red, first_blue = (np.argwhere(mask.any(0))[0, 0] for mask in (is_red, is_blue))
    assert first_red == first_blue > 60  # same seeds in the same columns, right of the labels
    assert np.argwhere(is_red.any(1)).max() < np.argwhere(is_blue.any(1)).min()
    labels = picture[:, :first_red].min(2) < 120
    half = np.argwhere(is_blue.any(1)).min()
    assert labels[:half].any() and labels[half:].any()


def test_a_users_matplotlibrc_does_not_change_a_figure(tmp_path: Path) -> None:
    @style.styled
    def draw(path: Path) -> bytes:
        figure = style.new_figure(2, 2, "title")
        figure.subplots().plot([1, 2])
        style.save(figure, path)
        return path.read_bytes()

    expected = draw(tmp_path / "a.png")
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "savefig.transparent": True}):
        assert draw(tmp_path / "b.png") == expected
