"""The comparison: configured settings, the cache of finished settings, the best setting, and fallbacks for gamma."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from mlem_diffusion.comparison.features import Extractor
from mlem_diffusion.comparison.runner import NoiseCache, Runner
from mlem_diffusion.comparison.settings import (
    SamplerSetting,
    best_setting,
    row_of,
    setting_from,
    setting_of,
    settings_of,
)
from mlem_diffusion.comparison.table import read_rows, write_rows
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.errors import UserError
from mlem_diffusion.files import write_json
from mlem_diffusion.multilevel.plan import Plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

NAMES = ["w2", "w4", "w8", "w16"]
EMPTY: dict[str, Any] = {"baselines": [], "stitched": [], "ml_em": []}
BASELINE = {"dynamics": "sde", "step_rule": "ddpm", "levels": "all", "steps": [8]}
ML_EM = {
    "dynamics": "ode", "step_rule": "ddim", "families": ["all"], "coins": ["systematic"], "c": [2], "steps": [8],
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("all", ["w2", "w4", "w8", "w16"]),
        ("largest", ["w16"]),
        ([0, 2], ["w2", "w8"]),
        ([-1], ["w16"]),
        ([3, -1], ["w16"]),
    ],
)
def test_levels_by_name_and_by_index(which, expected):
    found = settings_of(EMPTY | {"baselines": [BASELINE | {"levels": which}]}, NAMES, 50)
    assert [s.levels for s in found] == [(name,) for name in expected]
    assert all(s.estimator == "single" and s.c is None and s.switch is None and s.probabilities == "" for s in found)


@pytest.mark.parametrize("which", [[4], [-5], ["w2"], "medium", 3, [None]])
def test_missing_levels_give_one_sentence(which):
    with pytest.raises(UserError, match="does not fit a family of 4 levels"):
        settings_of(EMPTY | {"baselines": [BASELINE | {"levels": which}]}, NAMES, 50)


def test_duplicates_are_run_once_in_the_first_order():
    config = EMPTY | {"baselines": [BASELINE | {"steps": [16, 8]}, BASELINE, BASELINE | {"levels": "largest"}]}
    found = settings_of(config, NAMES, 50)
    assert [(s.levels[0], s.steps) for s in found] == [(name, n) for name in NAMES for n in (16, 8)]


def test_stitched_and_ml_em_settings():
    stitched = {
        "dynamics": "sde",
        "step_rule": "ddpm",
        "pairs": [[0, -1], [-2, -1]],
        "switch": [0.25, 0.5],
        "steps": [8],
    }
    ml_em = ML_EM | {"families": ["all", [0, 2, -1]], "coins": ["systematic", "independent-shared"], "c": [1, 2.5]}
    found = settings_of(EMPTY | {"stitched": [stitched], "ml_em": [ml_em]}, NAMES, 50)
    assert found[:4] == [
        SamplerSetting("sde", "ddpm", "stitched", pair, 8, switch=switch)
        for pair in (("w2", "w16"), ("w8", "w16"))
        for switch in (0.25, 0.5)
    ]
    assert len(found) == 4 + 2 * 2 * 2
    assert found[4] == SamplerSetting("ode", "ddim", "ml_em", tuple(NAMES), 8, "constant", "systematic", 1.0)
    assert found[-1] == SamplerSetting(
        "ode", "ddim", "ml_em", ("w2", "w8", "w16"), 8, "constant", "independent-shared", 2.5
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"step_rule": "heun"}, "no step rule heun for sde"),
        ({"dynamics": "ode"}, "no step rule ddpm for ode"),
        ({"steps": [51]}, r"51 steps are outside 2\.\.50"),
        ({"steps": [1]}, r"1 steps are outside 2\.\.50"),
    ],
)
def test_impossible_settings_give_one_sentence(change, sentence):
    with pytest.raises(UserError, match=sentence):
        settings_of(EMPTY | {"baselines": [BASELINE | change]}, NAMES, 50)


SETTINGS = [
    SamplerSetting("sde", "ddpm", "single", ("w8",), 16),
    SamplerSetting("ode", "dpmpp_2m", "single", ("w2",), 5),
    SamplerSetting("sde", "ddpm", "stitched", ("w2", "w8"), 16, switch=0.25),
    SamplerSetting("ode", "ddim", "ml_em", ("w2", "w4", "w8"), 16, "constant", "independent", 3.5),
    SamplerSetting("sde", "ddpm", "ml_em", ("w2", "w8"), 16, "constant", "systematic-shared", 1.0),
    SamplerSetting("sde", "dpmpp_2m", "single", ("w2",), 5),
    SamplerSetting("ode", "unipc", "ml_em", ("w2", "w8"), 16, "constant", "systematic", 1.0),
]


def costs(**more: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(
        ("error", "error_se", "network_calls", "gflops_expected", "gflops_realised", "seconds"), 0.5
    )
    return {**numbers, "top_evaluations": 3} | more


def full_row(setting: SamplerSetting, **more: Any) -> dict[str, Any]:
    shared = {"seed": 0, "num_samples": 8, "distance": 1.5, "distance_name": "FD", "distance_floor": 0.1}
    return row_of(setting, costs(), **(shared | more))


def test_a_setting_round_trips_through_csv_and_json(tmp_path):
    path = write_rows([full_row(s) for s in SETTINGS], tmp_path / "compare.csv")
    assert [setting_from(row) for row in read_rows(path)] == SETTINGS
    assert [setting_from(full_row(s)) for s in SETTINGS] == SETTINGS
    # also from a configuration, in which levels may be a list
    assert setting_from({**full_row(SETTINGS[3]), "levels": ["w2", "w4", "w8"]}) == SETTINGS[3]


def test_best_setting_is_the_cheapest_within_five_percent_of_the_best_distance():
    def row(distance: float | None, gflops: float) -> dict[str, Any]:
        return {"distance": distance, "gflops_realised": gflops}

    rows = [row(1.00, 100), row(1.049, 40), row(1.051, 10), row(1.02, 60), row(None, 1)]
    assert best_setting(rows) == row(1.049, 40)
    assert best_setting(rows, tolerance=0.06) == row(1.051, 10)
    assert best_setting(rows, tolerance=0.0) == row(1.00, 100)
    assert best_setting([row(-1e-9, 5), row(0.2, 1)]) == row(-1e-9, 5)  # rounding below zero
    with pytest.raises(UserError, match="No setting has a distance"):
        best_setting([row(None, 1)])


def test_building_a_setting_that_does_not_fit_the_family():
    levels = {name: Level(name, lambda x, logsnr: x, float(i + 1)) for i, name in enumerate(NAMES)}
    with pytest.raises(UserError, match="no level w9; the family has w2, w4, w8, w16"):
        replace(SETTINGS[0], levels=("w9",)).build(levels, 2.5)
    with pytest.raises(UserError, match="'ml_em' with c = None"):
        replace(SETTINGS[3], c=None).build(levels, 2.5)
    with pytest.raises(UserError, match="sde/heun is unknown"):
        replace(SETTINGS[0], step_rule="heun").evaluations(Process(LinearSchedule()))


def plan_of(method: str, levels: tuple[str, ...] = ("w2", "w8"), steps: int = 16, share: float = 0.4) -> Plan:
    table = np.tile(np.array([1.0, share]), (steps, 1))
    if method == "quadrature":
        table[::2, 1], table[1::2, 1] = 0, 2
    if len(levels) == 1:
        table = table[:, :1]
    return Plan(method, "optimal", levels, steps, table.astype(np.float32), 1.0, 0.1, 0.2, 0.3)


PLANS = {plan.id: plan for plan in map(plan_of, ("independent", "nested", "systematic", "quadrature"))}


@pytest.mark.parametrize("plan", PLANS.values(), ids=lambda p: p.method)
def test_a_setting_with_a_plan_round_trips_through_csv_and_builds_it(plan, tmp_path):
    setting = setting_of(plan, "sde", "ddpm")
    row = full_row(setting, predicted=plan.predicted, largest_effect=plan.largest_effect, selected_error=0.15)
    again = read_rows(write_rows([row, full_row(SETTINGS[0])], tmp_path / "compare.csv"))
    assert setting_from(again[0]) == setting and setting_from(again[1]) == SETTINGS[0]
    assert (again[0]["plan"], again[0]["predicted"], again[0]["largest_effect"], again[0]["c"]) == (
        plan.id,
        0.2,
        0.3,
        None,
    )
    assert again[1]["plan"] == "" and again[1]["predicted"] is None
    levels = {name: Level(name, lambda x, logsnr: x, float(i + 1)) for i, name in enumerate(NAMES)}
    estimator = setting.build(levels, 2.5, PLANS)
    assert [level.name for level in estimator.levels] == ["w2", "w8"]
    assert np.array_equal(estimator.weights(16, [3]), plan.build(levels.values()).weights(16, [3]))
    for plans in ({}, None):
        with pytest.raises(UserError, match=f"no plan {plan.id}; run make optimise again"):
            setting.build(levels, 2.5, plans)


def test_a_plan_of_one_level_is_the_baseline_itself():
    plan = plan_of("quadrature", ("w8",))
    assert setting_of(plan, "sde", "ddpm") == SETTINGS[0] and "plan" not in full_row(setting_of(plan, "sde", "ddpm"))


def test_levels_outside_the_family_are_baselines_if_all_are_selected():
    sweeps = [BASELINE, BASELINE | {"levels": "largest", "steps": [9]}, BASELINE | {"levels": [0], "steps": [10]}]
    config = EMPTY | {"baselines": sweeps, "ml_em": [ML_EM]}
    found = settings_of(config, NAMES, 50, beside=("gauss",))
    assert [s.levels for s in found if s.estimator == "single"] == [
        ("gauss",), ("w2",), ("w4",), ("w8",), ("w16",), ("w16",), ("w2",)
    ]  # fmt: skip
    assert next(s for s in found if s.estimator == "ml_em").levels == tuple(NAMES)


# -------------------------------------------------------------------------------------------------- runner

GAIN = {"w2": 0.5, "w4": 0.8, "w8": 0.9}


class Counter:
    """Linear denoisers that count the images they see."""

    def __init__(self) -> None:
        self.images = 0

    def level(self, name: str, flops: float) -> Level:
        def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
            self.images += len(x)
            return GAIN[name] * torch.sigmoid(logsnr)[:, None, None, None] * x

        return Level(name, denoise, flops)


@pytest.fixture
def counter() -> Counter:
    return Counter()


@pytest.fixture
def make(counter: Counter, tmp_path: Path) -> Callable[..., Runner]:
    def runner(**more: Any) -> Runner:
        levels = [counter.level(name, 1e9 * 4.0**i) for i, name in enumerate(GAIN)]
        extractor = Extractor("FD-mean", "k", lambda images: images.float().mean((2, 3)))
        given: dict[str, Any] = {
            "levels": {level.name: level for level in levels}, "process": Process(LinearSchedule(), base_steps=16),
            "gamma": 2.5, "shape": (3, 4, 4), "seeds": list(range(100, 110)), "num_reference": 6, "batch": 4,
            "device": torch.device("cpu"), "extractor": extractor, "cache": tmp_path / "cache", "key": "a",
            "grid_images": 5,
        }  # fmt: skip
        return Runner(**(given | more))

    return runner


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.dynamics}-{s.estimator}-{s.step_rule}")
def test_a_finished_setting_is_not_evaluated_again(make, counter, setting):
    runner = make()
    reference = runner.reference(setting.dynamics)
    assert reference.shape == (6, 3, 4, 4) and counter.images == 16 * 6
    assert torch.equal(runner.reference(setting.dynamics), reference) and counter.images == 16 * 6
    counter.images = 0
    assert not runner.is_done(setting)
    first = runner.run(setting, reference, NoiseCache())
    calls = counter.images
    assert calls > 0 and calls / 10 == pytest.approx(first["costs"]["network_calls"])
    assert runner.is_done(setting)
    for again in (runner, make()):  # the same process, and another one later
        second = again.run(setting, reference, NoiseCache())
        assert counter.images == calls
        assert second["costs"] == first["costs"]
        for name in ("errors", "clusters", "features", "images"):
            assert np.array_equal(second[name], first[name])
    assert first["errors"].shape == (6,) and first["features"].shape == (10, 3)
    assert first["images"].shape == (5, 3, 4, 4) and first["images"].dtype == np.uint8
    assert first["costs"]["error"] == pytest.approx(first["errors"].mean())


@pytest.mark.parametrize(
    "change",
    [{"key": "b"}, {"gamma": 3.0}, {"seeds": list(range(200, 210))}, {"seeds": list(range(100, 109))},
     {"num_reference": 5}, {"batch": 5}, {"grid_images": 4}],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_every_input_of_the_result_is_in_the_key(make, counter, change):
    setting = SETTINGS[3]
    make().run(setting, make().reference("ode"), NoiseCache())
    other, before = make(**change), counter.images
    assert not other.is_done(setting)
    other.run(setting, other.reference("ode"), NoiseCache())
    assert counter.images > before


def test_the_reference_setting_has_no_error_and_others_have_one(make):
    runner = make()
    for dynamics, rule in (("sde", "ddpm"), ("ode", "dpmpp_2m")):
        reference = runner.reference(dynamics)

        def error(levels: str, steps: int, dynamics=dynamics, rule=rule, reference=reference) -> float:
            setting = SamplerSetting(dynamics, rule, "single", (levels,), steps)
            return runner.run(setting, reference, NoiseCache())["costs"]["error"]

        assert error("w8", 16) < 1e-10  # the same path, grid and network
        # coarser grids share the path, so their errors are small beside those of unrelated samples
        assert all(1e-8 < error("w8", steps) < 0.2 * float(2 * reference.var()) for steps in (12, 8))
        assert error("w8", 16) < error("w4", 16) < error("w2", 16)


def test_costs_are_per_image_and_realised_costs_are_counted(make):
    runner = make()
    costs = runner.run(SamplerSetting("ode", "ddim", "single", ("w4",), 8), runner.reference("ode"), NoiseCache())[
        "costs"
    ]
    assert costs["network_calls"] == 8 and costs["gflops_expected"] == costs["gflops_realised"] == 8 * 4
    assert costs["top_evaluations"] == 8 * runner.num_reference and costs["seconds"] > 0
    heun = SamplerSetting("ode", "heun", "single", ("w4",), 8)
    costs = runner.run(heun, runner.reference("ode"), NoiseCache())["costs"]
    assert heun.evaluations(runner.process) == costs["network_calls"] == 15  # two for each of seven steps, and the last
    assert costs["gflops_expected"] == costs["gflops_realised"] == 15 * 4
    setting = SamplerSetting("ode", "ddim", "stitched", ("w2", "w8"), 8, switch=0.25)
    costs = runner.run(setting, runner.reference("ode"), NoiseCache())["costs"]
    assert costs["gflops_expected"] == costs["gflops_realised"] == 2 * 1 + 6 * 16
    assert costs["top_evaluations"] == 6 * runner.num_reference


@pytest.mark.parametrize("setting", [SETTINGS[3], SETTINGS[4], SETTINGS[6]], ids=lambda s: s.coins)
def test_fires_of_the_top_level_are_counted_over_the_compared_samples(make, setting):
    """Counts over 6 compared samples of 10, in batches of 4."""
    runner = make()
    found = runner.run(setting, runner.reference(setting.dynamics), NoiseCache())["costs"]["top_evaluations"]
    estimator, seeds = setting.build(runner.levels, runner.gamma), runner.seeds
    weights = [estimator.weights(16, seeds[start : start + 4]) for start in (0, 4, 8)]
    assert 0 < found == np.count_nonzero(np.concatenate(weights, axis=1)[:, :6, -1])


@pytest.mark.parametrize("plan", PLANS.values(), ids=lambda p: p.method)
def test_plans_are_run_by_their_id(make, counter, plan):
    runner, setting = make(plans=PLANS), setting_of(plan, "ode", "ddim")
    found = runner.run(setting, runner.reference("ode"), NoiseCache())
    estimator, costs = runner.build(setting), found["costs"]
    assert costs["gflops_expected"] * 1e9 == pytest.approx(estimator.expected_flops(16))
    weights = np.concatenate([estimator.weights(16, runner.seeds[start : start + 4]) for start in (0, 4, 8)], axis=1)
    assert costs["network_calls"] == pytest.approx(np.count_nonzero(weights) / 10)
    assert runner.is_done(setting) and found["clusters"].tolist() == list(range(100, 110))
    # another table is another setting
    other = plan_of(plan.method, steps=12)
    assert not make(plans=PLANS | {other.id: other}).is_done(setting_of(other, "ode", "ddim"))


def test_without_an_extractor_there_are_errors_only(make, counter):
    runner = make(extractor=None, key="b")
    found = runner.run(SETTINGS[0], runner.reference("sde"), NoiseCache())
    assert set(found) == {"costs", "errors", "clusters"}
    whole = make().run(SETTINGS[0], make().reference("sde"), NoiseCache())
    assert np.array_equal(found["errors"], whole["errors"])
    counter.images = 0
    again = make(extractor=None, key="b").run(SETTINGS[0], runner.reference("sde"), NoiseCache())
    assert counter.images == 0 and again["costs"] == found["costs"]


def test_a_coarser_reference_is_another_one_and_costs_less(make, counter):
    fine = make().reference("ode")
    counter.images = 0
    runner = make(reference_steps=8)
    assert runner.reference_grid.steps == 8 and make().reference_grid.steps == 16
    coarse = runner.reference("ode")
    assert counter.images == 8 * 6 and not torch.equal(coarse, fine)
    direct = runner.run(SamplerSetting("ode", "dpmpp_2m", "single", ("w8",), 8), coarse, NoiseCache())["costs"]
    assert direct["error"] < 1e-12
    assert not runner.is_done(SETTINGS[0]) and not torch.equal(make().reference("ode"), coarse)


def test_shared_coins_are_one_cluster_per_batch(make):
    runner = make()
    shared = runner.run(SETTINGS[4], runner.reference("sde"), NoiseCache())
    assert shared["clusters"].tolist() == [100] * 4 + [104] * 4 + [108] * 2
    own = runner.run(SETTINGS[3], runner.reference("ode"), NoiseCache())
    assert own["clusters"].tolist() == list(range(100, 110))


def test_the_noise_cache_equals_fresh_draws(make, monkeypatch):
    from mlem_diffusion.comparison import runner as compare

    drawn: list[tuple] = []
    original = compare.path_increments

    def counted(seeds, shape, grid, clock, device):
        drawn.append((grid.steps, clock, seeds[0]))
        return original(seeds, shape, grid, clock, device)

    monkeypatch.setattr(compare, "path_increments", counted)
    runner, cache, seeds = make(), NoiseCache(entries=2), [100, 101]
    assert cache.get(runner, 8, None, seeds) is None
    first = cache.get(runner, 8, "snr", seeds)
    assert cache.get(runner, 8, "snr", seeds) is first and len(drawn) == 1
    assert not torch.equal(first, cache.get(runner, 8, "time", seeds))
    assert not torch.equal(first, cache.get(runner, 8, "snr", [104, 105]))  # the third entry drops the first
    assert len(drawn) == 3 and len(cache.cached) == 2
    assert torch.equal(cache.get(runner, 8, "snr", seeds), first) and len(drawn) == 4


# ------------------------------------------------------------------------------------ gamma of the probabilities


def stage_with(tmp_path: Path, gamma: Any) -> Any:
    return SimpleNamespace(cfg=OmegaConf.create({"compare": {"gamma": gamma}}), find=lambda name: tmp_path / name)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"differences": 2.2, "to_largest": 2.4, "loss_fit": 3.0}, 2.2),
        ({"differences": None, "to_largest": 2.4, "loss_fit": 3.0}, 2.4),
        ({"differences": None, "to_largest": None, "loss_fit": 3.0}, 3.0),
    ],
)
def test_gamma_is_the_first_finite_estimate(tmp_path, found, expected):
    from mlem_diffusion.experiment.sampler_runs import used_gamma

    write_json(
        tmp_path / "gamma.json", {"estimates": {k: {"gamma": v, "interval": [1, None]} for k, v in found.items()}}
    )
    assert used_gamma(stage_with(tmp_path, "auto"), None) == expected
    assert used_gamma(stage_with(tmp_path, 4), None) == 4.0  # a number in the configuration comes first


def test_missing_gamma_gives_one_sentence(tmp_path):
    from mlem_diffusion.experiment.sampler_runs import used_gamma

    with pytest.raises(UserError, match="make measure-gamma"):
        used_gamma(stage_with(tmp_path, "auto"), None)
    none = {"gamma": None, "interval": [None, None]}
    write_json(tmp_path / "gamma.json", {"estimates": dict.fromkeys(("differences", "to_largest", "loss_fit"), none)})
    with pytest.raises(UserError, match=r"set compare\.gamma to a number"):
        used_gamma(stage_with(tmp_path, "auto"), None)
    with pytest.raises(UserError, match="neither a number nor auto"):
        used_gamma(stage_with(tmp_path, "automatic"), None)
