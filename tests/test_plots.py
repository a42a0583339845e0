from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlem_diffusion.comparison.table import (
    COLUMNS,
    describe,
    for_figures,
    key_of,
    method_of,
    pool_seeds,
    read_rows,
    trusted,
    write_rows,
)
from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment.html_tables import interval, number
from mlem_diffusion.figures import comparison as plots
from mlem_diffusion.figures.comparison import plot_compare
from mlem_diffusion.figures.image_grid import comparison_grid, image_grid, save_grid
from mlem_diffusion.figures.training import plot_training
from mlem_diffusion.statistics import frontier


def make_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "dynamics": "ode",
        "step_rule": "ddim",
        "estimator": "single",
        "probabilities": "",
        "coins": "",
        "c": None,
        "switch": None,
        "levels": "w8",
        "steps": 16,
        "seed": 0,
        "error": 0.02,
        "error_se": 0.001,
        "distance": 7.5,
        "distance_name": "Frechet",
        "distance_floor": 1.25,
        "num_samples": 64,
        "network_calls": 16.0,
        "gflops_expected": 3.2,
        "gflops_realised": 3.2,
        "seconds": 0.05,
    }
    return row | changes


def make_rows(dynamics: tuple[str, ...] = ("sde", "ode")) -> list[dict[str, Any]]:
    rows = []
    for name in dynamics:
        for level, size in (("w4", 0.1), ("w16", 1.0)):
            for steps in (4, 16, 64):
                cost = {
                    "gflops_realised": size * steps,
                    "gflops_expected": size * steps,
                    "seconds": 0.01 * steps * size,
                }
                for rule in ("em", "ddpm") if name == "sde" else ("em", "ddim", "dpmpp_2m"):
                    error = 1 / steps + 0.02 / size
                    rows.append(
                        make_row(
                            dynamics=name,
                            step_rule=rule,
                            levels=level,
                            steps=steps,
                            error=error,
                            network_calls=steps,
                            **cost,
                        )
                    )
        rows.append(make_row(dynamics=name, estimator="stitched", levels="w4+w16", switch=0.5, gflops_realised=8.0))
        for coins, fires in (("independent", 500), ("systematic", 500), ("systematic", 20)):
            ml_em = {"estimator": "ml_em", "probabilities": "constant", "coins": coins, "top_evaluations": fires}
            rows.append(
                make_row(
                    dynamics=name,
                    levels="w4+w16",
                    c=fires / 100,
                    gflops_realised=5.0,
                    error=0.01,
                    **ml_em,
                )
            )
    return rows


# ---- tables ----


def test_csv_round_trip(tmp_path: Path) -> None:
    rows = [
        make_row(top_evaluations=123.5, c=0.25, note='odd, "quoted"'),
        make_row(distance=None, distance_floor=None, error=float("nan"), top_evaluations=None, note="x"),
    ]
    path = write_rows(rows, tmp_path / "new" / "compare.csv")
    header = path.read_text().splitlines()[0].split(",")
    assert header == [*COLUMNS, "top_evaluations", "note"]
    assert read_rows(path) == [rows[0], rows[1] | {"error": None}]
    assert isinstance(read_rows(path)[0]["steps"], int) and isinstance(read_rows(path)[0]["seconds"], float)
    assert [p.name for p in path.parent.iterdir()] == ["compare.csv"]


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_rows(tmp_path / "absent.csv")
    row = make_row()
    del row["steps"]
    with pytest.raises(UserError, match="steps"):
        write_rows([row], tmp_path / "a.csv")
    path = write_rows([make_row()], tmp_path / "b.csv")
    good = path.read_text()
    for text, message in (
        (good.replace("0.02", "many"), "error is not a number"),
        (good.rstrip("\n") + ",1\n", "number of fields"),
        (good.replace("gflops_realised", "cost"), "gflops_realised"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_rows(path)


def test_methods_trust_and_descriptions() -> None:
    paper = make_row(estimator="ml_em", probabilities="constant", coins="independent", levels="w4+w8", c=0.3)
    assert method_of(paper) == "paper"
    assert method_of(paper | {"coins": "systematic"}) == "other"
    assert (
        method_of(paper | {"coins": "nested"}) == method_of(paper | {"estimator": "quadrature", "coins": ""}) == "other"
    )
    assert method_of(paper | {"coins": "independent-shared"}) == "other"
    assert method_of(paper | {"probabilities": "learned"}) == "paper"  # any probabilities, if the coins are independent
    assert [method_of(make_row(estimator=d)) for d in ("single", "stitched")] == ["single", "stitched"]
    assert trusted(paper) and trusted(paper | {"top_evaluations": 100}) and not trusted(paper | {"top_evaluations": 99})
    assert trusted(paper | {"top_evaluations": ""})  # not recorded
    assert describe(make_row()) == "DDIM, w8, 16 steps"
    assert describe(paper) == "ML-EM w4+w8, DDIM, 16 steps, independent coins, C = 0.3"
    planned = paper | {"probabilities": "optimal", "c": None, "plan": "abc"}
    assert describe(planned) == "ML-EM w4+w8, DDIM, 16 steps, independent coins, optimal probabilities"
    weights = planned | {"estimator": "quadrature", "coins": ""}
    assert describe(weights).startswith("quadrature w4+w8, DDIM, 16 steps") and trusted(
        weights | {"top_evaluations": 1}
    )
    # plans with different tables are different settings, even if the rest agrees
    assert key_of(planned) == key_of(planned | {"seed": 7, "error": 9.0}) != key_of(planned | {"plan": "abd"})


def test_frontier_keeps_only_unbeaten_trusted_positive_rows() -> None:
    def point(cost: float, error: float | None, **more: Any) -> dict[str, Any]:
        return make_row(gflops_realised=cost, error=error, **more)

    rows = [
        point(4, 0.1),
        point(1, 0.5),
        point(2, 0.6),
        point(1, 0.4),
        point(8, 0.0),
        point(3, None),
        point(5, 0.1),
    ]
    rows.append(point(0.5, 0.01, estimator="ml_em", top_evaluations=3))
    assert [
        (r["gflops_realised"], r["error"]) for r in frontier(filter(trusted, rows), "gflops_realised", "error")
    ] == [
        (1, 0.4),
        (4, 0.1),
    ]


def test_pooling_over_seeds() -> None:
    rows = [
        make_row(seed=0, error=0.02, error_se=0.003),
        make_row(seed=64, error=0.04, error_se=0.004),
        make_row(steps=8),
    ]
    pooled = pool_seeds(rows)
    assert [row["runs"] for row in pooled] == [2, 1]
    assert pooled[0]["error"] == pytest.approx(0.03) and pooled[0]["error_se"] == pytest.approx(0.0025)


def test_number_formatting() -> None:
    shown = [
        number(v) for v in (0.123456, 12.3456, 1234.56, 123456.7, 1.234e-7, 0.9996, 0.0, None, float("nan"), 24000)
    ]
    assert shown == ["0.123", "12.3", "1235", "123,457", "1.23e-7", "1.00", "0", "–", "–", "24,000"]
    assert interval([2.2, None]) == "2.20 and above" and interval([1.0, 2.5]) == "1.00 to 2.50"


# ---- figures ----


def pixels(path: Path) -> np.ndarray:
    image = Image.open(path)
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def test_plot_compare_full_and_for_one_dynamics(tmp_path: Path) -> None:
    both = pixels(plot_compare(for_figures(make_rows()), tmp_path / "new" / "both.png", title="demo"))
    assert both.shape[0] > 1000 and both.shape[1] > 1000
    assert both.std() > 10  # something is drawn
    one = pixels(plot_compare(for_figures(make_rows(("ode",))), tmp_path / "ode.png"))
    assert one.shape[1] < both.shape[1] and one.shape[0] == both.shape[0]


def test_plot_compare_notes_missing_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    draw = plots.note

    def listen(ax: Any, text: str) -> None:
        notes.append(text)
        draw(ax, text)

    monkeypatch.setattr(plots, "note", listen)
    absent = {"distance": None, "distance_floor": None, "error_se": None}
    rows = make_rows(("sde",))
    bare = pixels(plot_compare(for_figures(row | absent for row in rows), tmp_path / "bare.png"))
    full = pixels(plot_compare(for_figures(rows), tmp_path / "full.png"))
    assert notes == [] and bare.shape[0] < 0.8 * full.shape[0]  # without distances there is no panel for them
    plot_compare(
        for_figures(row | (absent if row["dynamics"] == "sde" else {}) for row in make_rows()), tmp_path / "half.png"
    )
    assert notes == ["not computed"]
    # An error of exactly zero cannot appear on a log axis.
    plot_compare(for_figures([make_row(error=0.0, seconds=None)]), tmp_path / "zero.png")
    assert notes == ["not computed"] * 3 and pixels(tmp_path / "zero.png").shape[0] > 1000


def test_plot_compare_refuses_rows_that_cannot_share_an_axis(tmp_path: Path) -> None:
    rows = make_rows(("ode",))[:3]
    for change, message in (
        ({"num_samples": 65}, "sample counts num_samples.*64.*65"),
        ({"distance_name": "FID"}, "distances.*FID.*Frechet"),
    ):
        with pytest.raises(UserError, match=message):
            plot_compare(for_figures([*rows, make_row(**change)]), tmp_path / "mixed.png")
    with pytest.raises(UserError, match="no rows"):
        plot_compare([], tmp_path / "mixed.png")
    assert not (tmp_path / "mixed.png").exists()
    # A row without a distance does not determine the distance's name.
    plot_compare(for_figures([*rows, make_row(distance=None, distance_name="FID")]), tmp_path / "fine.png")


def test_plot_training(tmp_path: Path) -> None:
    levels: list[dict[str, Any]] = [
        {
            "name": f"w{width}",
            "width": width,
            "history": [{"images": i * 1000, "loss": 1 / (i * width)} for i in range(1, 9)],
            "logsnr": [-5.0, 0.0, 5.0],
            "held_out": [0.9 / width, 0.3 / width, 0.05 / width],
        }
        for width in (4, 8)
    ]
    full = pixels(plot_training(levels, tmp_path / "training.png"))
    assert full.shape[1] > 1.5 * full.shape[0] > 600
    plot_training([{"name": "w4", "width": 4, "history": [], "logsnr": [], "held_out": []}], tmp_path / "empty.png")
    with pytest.raises(UserError, match="w8"):
        plot_training([levels[0], levels[1] | {"held_out": [0.1]}], tmp_path / "bad.png")


# ---- grids ----


def test_image_grid_places_and_enlarges_pixels() -> None:
    images = np.zeros((3, 3, 4, 5), np.uint8)
    images[1, 0] = 200  # the second image is red
    images[2, 2, 0, 0] = 255  # the third has one blue corner
    grid = np.asarray(image_grid(images, columns=2, scale=3, pad=2))
    assert grid.shape == (2 * (4 * 3 + 2) + 2, 2 * (5 * 3 + 2) + 2, 3)
    assert (grid[2:14, 19:34] == (200, 0, 0)).all()
    assert (grid[16:19, 2:5] == (0, 0, 255)).all() and (grid[19, 2:17] == 0).all()
    assert (grid[16:, 19:] == 255).all() and (grid[:2] == 255).all()  # the empty place and the rim are white


def test_image_grid_takes_tensors_and_refuses_floats() -> None:
    torch = pytest.importorskip("torch")
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    same = image_grid(images, 2), image_grid(images.numpy(), 2)
    assert np.array_equal(np.asarray(same[0]), np.asarray(same[1]))
    for bad in (images.float(), images[0], images[:, :1], images[:0]):
        with pytest.raises(UserError, match="uint8 images"):
            image_grid(bad, 2)


def test_save_grid(tmp_path: Path) -> None:
    images = np.zeros((9, 3, 16, 16), np.uint8)
    assert pixels(save_grid(images, tmp_path / "deep" / "grid.png", scale=None)).shape == (
        3 * 65 + 1,
        3 * 65 + 1,
        3,
    )


def test_comparison_grid_puts_settings_in_rows_with_labels_at_left(tmp_path: Path) -> None:
    red, blue = np.zeros((2, 4, 3, 16, 16), np.uint8)
    red[:, 0], blue[:, 2] = 255, 255
    label = "ML-EM with a name that is far too long for a single line of this label"
    picture = pixels(comparison_grid([("reference", red), (label, blue[:2])], tmp_path / "grid.png"))
    is_red, is_blue = (picture == (255, 0, 0)).all(2), (picture == (0, 0, 255)).all(2)
    assert is_red.sum() == 2 * is_blue.sum() == 4 * 64 * 64
    first_red, first_blue = (np.argwhere(mask.any(0))[0, 0] for mask in (is_red, is_blue))
    assert first_red == first_blue > 60  # same seeds in the same columns, right of the labels
    assert np.argwhere(is_red.any(1)).max() < np.argwhere(is_blue.any(1)).min()
    labels = picture[:, :first_red].min(2) < 120
    half = np.argwhere(is_blue.any(1)).min()
    assert labels[:half].any() and labels[half:].any()
    with pytest.raises(UserError, match="one size"):
        comparison_grid([("a", red), ("b", red[:, :, :8])], tmp_path / "bad.png")
