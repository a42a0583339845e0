"""The comparison: configured settings, the table, cached measurements, and plans."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from mlem_diffusion.comparison import paper, planned
from mlem_diffusion.comparison import settings as table
from mlem_diffusion.comparison.bias import reference_bias
from mlem_diffusion.comparison.features import Extractor, RealImages, distance_interval, feature_moments
from mlem_diffusion.comparison.planned import complete, examples, read_planned
from mlem_diffusion.comparison.runner import Runner, diverged
from mlem_diffusion.comparison.settings import SamplerSetting, setting_from, setting_of, settings_of, telescope
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.errors import Interrupted, SlowPath, UserError
from mlem_diffusion.multilevel.plan import Plan, save_plans
from mlem_diffusion.multilevel.timing import Timing

NAMES = ["gauss", "w2", "w4", "w8", "w16"]
LEVELS = {name: Level(name, lambda x, logsnr: x, 0.01 + 4.0**i) for i, name in enumerate(NAMES)}
TAUGHT = {name: Level(name, lambda x, logsnr: x, 4.01, teacher="w16") for name in ("t2", "t4")}
EMPTY: dict[str, Any] = {"baselines": [], "stitched": [], "ml_em": []}
BASELINE = {"dynamics": "sde", "step_rule": "ddpm", "levels": "all", "steps": [8]}
STITCHED = {
    "dynamics": "sde", "step_rule": "ddpm", "sequences": [[0, -1], [-1, "gauss"], ["gauss", -2, -1]], "steps": [8],
    "switch": [[0.25], [0.5], [0.25, 0.75]],
}  # fmt: skip
ML_EM = {
    "dynamics": "ode", "step_rule": "ddim", "families": ["all", [0, 2, -1]], "c": [1, 2.5], "steps": [8],
    "coins": ["systematic", "nested"],
}  # fmt: skip
SETTINGS = [
    SamplerSetting("sde", "ddpm", "single", ("w8",), 16),
    SamplerSetting("ode", "dpmpp_2m", "single", ("w2",), 5),
    SamplerSetting("sde", "ddpm", "stitched", ("w8", "w2"), 16, switch=(0.25,)),
    SamplerSetting("ode", "ddim", "ml_em", ("w2", "w4", "w8"), 16, "constant", "independent", 3.5),
    SamplerSetting("sde", "ddpm", "ml_em", ("w2", "w8"), 16, "constant", "nested", 1.0),
    SamplerSetting("sde", "em", "single", ("w2",), 5),
    SamplerSetting("ode", "unipc", "ml_em", ("w2", "w8"), 16, "constant", "systematic", 1.0),
    SamplerSetting("sde", "ddpm", "stitched", ("w2", "w8", "w4"), 16, switch=(0.25, 0.5)),
]


def plan_of(method: str, levels: tuple[str, ...] = ("w2", "w8"), steps: int = 16) -> Plan:
    share = np.tile([[1.0, 0.4]], (steps, 1))
    if method == "quadrature":
        share[:, 1] = np.arange(steps) % 2 * 2
    return Plan(method, "optimal", levels, steps, share[:, : len(levels)].astype(np.float32), 1.0, 0.2, 0.3)


PLANS = {plan.id: plan for plan in map(plan_of, ("independent", "nested", "systematic", "quadrature"))}


@pytest.mark.parametrize(("which", "expected"), [
    ("all", NAMES), ("largest", ["w16"]), ([0, 2], ["w2", "w8"]), (["gauss", 3, -1], ["gauss", "w16"]),
])  # fmt: skip
def test_levels_by_name_and_by_index(which, expected):
    """The Gaussian level has no index; it is among all levels, and may be named."""
    found = settings_of(EMPTY | {"baselines": [BASELINE | {"levels": which}]}, LEVELS, 50)
    assert [s.levels for s in found] == [(name,) for name in expected]


def test_taught_levels_are_rivals_and_plans_use_only_them_and_their_teacher():
    """They have no index, and constant probabilities over all levels leave them out."""
    levels = {**LEVELS, **TAUGHT}
    baselines = [BASELINE, BASELINE | {"levels": ["t2", 0, "t99", -1]}]
    found = settings_of({"baselines": baselines, "stitched": [], "ml_em": [ML_EM]}, levels, 50)
    assert [s.levels[0] for s in found[:7]] == list(levels) and {s.levels for s in found[7:]} == {
        tuple(NAMES[1:]), ("w2", "w8", "w16")}  # fmt: skip
    assert [s.levels[0] for s in settings_of(EMPTY | {"baselines": baselines[1:]}, levels, 50)] == ["t2", "w2", "w16"]
    assert list(telescope(levels)) == ["gauss", "w16", "t2", "t4"] and telescope(LEVELS) == LEVELS


def test_configured_settings_are_each_run_once():
    config = {"baselines": [BASELINE, BASELINE | {"levels": "largest"}], "stitched": [STITCHED], "ml_em": [ML_EM]}
    found = settings_of(config, LEVELS, 50)
    assert len(found) == len(set(found)) == 5 + 5 + 8
    assert found[6] == SamplerSetting("sde", "ddpm", "stitched", ("w2", "w16"), 8, switch=(0.5,))
    assert (found[8].levels, found[9].levels) == (("w16", "gauss"), ("gauss", "w8", "w16"))
    assert len(settings_of(config, {n: LEVELS[n] for n in NAMES[1:]}, 50)) == 4 + 2 + 8  # without a Gaussian level
    assert found[10] == SamplerSetting("ode", "ddim", "ml_em", tuple(NAMES[1:]), 8, "constant", "systematic", 1.0)
    assert (found[-1].levels, found[-1].coins, found[-1].c) == (("w2", "w8", "w16"), "nested", 2.5)


def test_the_best_chain_is_a_family_where_plans_name_one():
    """The rule's own chain, else that of another rule of its dynamics; C is relative to the cheapest network."""
    config = EMPTY | {"ml_em": [ML_EM | {"families": ["all", "chain"], "c": [2], "coins": ["independent"]}]}
    every, chain = settings_of(config, LEVELS, 50, {"ode/ddim": ["gauss", "w8", "w16"], "ode/em": NAMES})
    assert (every.levels, chain.levels) == (tuple(NAMES[1:]), ("gauss", "w8", "w16"))
    assert settings_of(config, LEVELS, 50, {"sde/ddpm": NAMES, "ode/em": ["w2", "w16"]})[1].levels == ("w2", "w16")
    for none in (None, {"sde/ddpm": ["w2", "w16"]}, {"ode/ddim": NAMES[1:]}):
        assert settings_of(config, LEVELS, 50, none) == [every]
    built: Any = chain.build(LEVELS, 2.0, {})
    assert built.p == pytest.approx([1, 2 * 4.01 / 64.01, 2 * 4.01 / 256.01])


@pytest.mark.parametrize("change", [{"levels": [4]}, {"levels": "medium"}, {"step_rule": "heun"}, {"steps": [51]}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(UserError):
        settings_of(EMPTY | {"baselines": [BASELINE | change]}, LEVELS, 50)


def full_row(setting: SamplerSetting, **more: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(("error", "error_se", "network_calls", "gflops_expected", "gflops_realised"), 0.5)
    shared = {"seconds": 1 / 3, "seed": 0, "num_samples": 8, "distance": 1.5, "distance_name": "FD"}
    shared |= {"distance_low": 1.4, "distance_high": 1.6, "distance_floor": None}
    return setting.row | numbers | shared | {"top_evaluations": 12345678} | more


@pytest.mark.parametrize("plan", PLANS.values(), ids=lambda plan: plan.method)
def test_settings_round_trip_through_the_table(plan, tmp_path):
    settings, path = [*SETTINGS, setting_of(plan, "sde", "ddpm")], tmp_path / "compare.csv"
    path.write_text(table.to_text(table.frame_of(full_row(s) for s in settings)))
    again = table.read_table(path)
    empty = again.astype(object).where(again.notna(), None)
    assert [setting_from(row) for row in empty.to_dict("records")] == settings
    assert [setting_from(s.row) for s in settings] == settings
    assert setting_from(SETTINGS[3].row | {"levels": ["w2", "w4", "w8"]}) == SETTINGS[3]  # as in a configuration
    for switch in (0.25, "0.25", [0.25]):
        assert setting_from(SETTINGS[2].row | {"switch": switch}) == SETTINGS[2]
    assert "switch at 0.25 and 0.5" in table.describe(again.to_dict("records")[7])


def test_a_setting_builds_the_estimator_of_its_plan():
    levels = {name: Level(name, lambda x, logsnr: x, float(i + 1)) for i, name in enumerate(NAMES)}
    for plan in PLANS.values():
        estimator = setting_of(plan, "sde", "ddpm").build(levels, 2.5, PLANS)
        assert np.array_equal(estimator.weights(16, [3]), plan.build(levels.values()).weights(16, [3]))
    alone = plan_of("quadrature", ("w8",))
    assert setting_of(alone, "sde", "ddpm") == SETTINGS[0]  # a plan of one level is the baseline itself
    for wrong in (replace(SETTINGS[0], plan="abc"), replace(SETTINGS[0], levels=("w9",)), replace(SETTINGS[3], c=None)):
        with pytest.raises(UserError):
            wrong.build(levels, 2.5, PLANS)


def test_the_table_keeps_six_digits_whole_numbers_and_gaps():
    rows = [full_row(SETTINGS[0], error=None), full_row(SETTINGS[3], plan="0a1e5", predicted=1e-12)]
    lines = table.to_text(table.frame_of(rows)).splitlines()
    assert lines[0].split(",") == [name for name in table.COLUMNS if name in {**rows[0], **rows[1]}]
    assert lines[1] == "sde,ddpm,single,,,,,w8,16,0,,0.5,1.5,1.4,1.6,FD,,8,0.5,0.5,0.5,0.333333,12345678,,"
    assert lines[2].endswith("12345678,0a1e5,1e-12")


@pytest.mark.parametrize(("old", "new"), [("0.333333", "fast"), ("12345678", "1,2,3")])
def test_a_broken_table_is_refused(old, new, tmp_path):
    path = tmp_path / "compare.csv"
    path.write_text(table.to_text(table.frame_of([full_row(SETTINGS[0])])).replace(old, new))
    with pytest.raises(ValueError):
        table.read_table(path)


def test_methods_are_named_for_figures():
    rows = [full_row(SETTINGS[3]), full_row(SETTINGS[6], top_evaluations=99), full_row(SETTINGS[2])]
    found = table.for_figures(table.frame_of(rows))
    assert list(found.method) == ["coins", "other", "stitched"] and list(found.trusted) == [True, False, True]


class Make:
    """Makes a runner, with levels that are linear denoisers; counts the images that all of them see."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, 0

    def level(self, name: str, gain: float, flops: float) -> Level:
        def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
            self.images += len(x)
            return gain * torch.sigmoid(logsnr) * x

        return Level(name, denoise, flops)

    def __call__(self, **more: Any) -> Runner:
        levels = self.level("w2", 0.5, 1e9), self.level("w4", 0.8, 4e9), self.level("w8", 0.9, 16e9)
        extractor = Extractor("FD-mean", "k", lambda images: images.float().mean((2, 3)))
        given: dict[str, Any] = {
            "levels": {level.name: level for level in levels}, "process": Process(LinearSchedule(), base_steps=16),
            "gamma": 2.5, "shape": (3, 4, 4), "seeds": list(range(100, 110)), "batch": 4,
            "distance_seeds": range(100, 113), "num_shared": 6,
            "device": torch.device("cpu"), "extractor": extractor, "cache": self.folder / "cache", "key": "a",
            "grid_images": 5, "plans": PLANS, "reference_steps": {"sde": 16, "ode": 16},
        }  # fmt: skip
        return Runner(**(given | more))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return Make(tmp_path)


@pytest.mark.parametrize("setting", [*SETTINGS, *(setting_of(p, "ode", "ddim") for p in PLANS.values())])
def test_costs_are_counted_and_a_finished_setting_is_not_evaluated_again(make, setting):
    runner = make()
    reference = runner.reference(setting.dynamics)
    spent = 10 * (16 + 8 if setting.dynamics == "sde" else 16 + 8 + 4)  # whole, half, and for the ODE a quarter
    assert reference.shape == (10, 3, 4, 4) and make.images == spent
    assert runner.reference_flops(setting.dynamics) == spent * 16e9
    assert torch.equal(make().reference(setting.dynamics), reference) and make.images == spent
    assert not runner.is_done(setting)
    first, evaluations = runner.read(setting), setting.evaluations(runner.process)
    calls = make.images - spent
    assert runner.is_done(setting) and calls / 10 == pytest.approx(first.row["network_calls"])
    timing = Timing({part: (2.0**-i, 0.0) for i, part in enumerate(sorted(first.work))})
    again = make(timing=timing).read(setting)  # another process later, on a machine that is timed
    assert make.images == calls + spent and first.row["seconds"] is None
    assert again.row == first.row | {"seconds": timing.seconds(first.work)} and again.row["seconds"] > 0
    assert first.work[f"step {setting.rule.key}"] == evaluations
    for part in ("errors", "images"):
        assert np.array_equal(getattr(again, part), getattr(first, part))
    assert first.errors.shape == (10,) and first.images.shape == (5, 3, 4, 4)
    assert first.row["error"] == pytest.approx(first.errors.mean())
    # the weights of the batches say which networks were evaluated, and how often the top one in the compared samples
    estimator = runner.build(setting)
    batches = [runner.seeds[start : start + 4] for start in (0, 4, 8)]
    used = np.concatenate([estimator.weights(evaluations, seeds) for seeds in batches], axis=1) != 0
    flops = (used.sum((0, 1)) * [level.flops for level in estimator.levels]).sum()
    assert first.row["gflops_realised"] == pytest.approx(flops / 10 / 1e9)
    assert first.row["gflops_expected"] == pytest.approx(runner.expected_flops(setting) / 10 / 1e9)
    assert first.row["top_evaluations"] == used[:, :, -1].sum()


@pytest.mark.parametrize(
    "change",
    [{"key": "b"}, {"gamma": 3.0}, {"seeds": list(range(200, 210))}, {"seeds": list(range(100, 109))},
     {"batch": 5}, {"grid_images": 4}, {"reference_steps": {"ode": 8}}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_input_of_the_result_is_in_the_key(make, change):
    make().read(SETTINGS[3])
    assert make().is_done(SETTINGS[3]) and not make(**change).is_done(SETTINGS[3])
    assert not make().reference_tasks("ode") and len(make(**change).reference_tasks("ode")) in (2, 3)


def test_errors_are_those_on_the_same_paths(make):
    even = {"process": Process(LinearSchedule(), base_steps=15)}  # of which the half has even steps, too
    runner = make(reference_steps={"sde": 15, "ode": 15}, **even)
    for dynamics in ("sde", "ode"):

        def error(level: str, steps: int, dynamics=dynamics) -> float:
            return runner.read(SamplerSetting(dynamics, "dpmpp_2m", "single", (level,), steps)).row["error"]

        assert error("w8", 15) < (1e-10 if dynamics == "sde" else 1e-3)  # the same path, grid and network; extrapolated
        # coarser grids share the path, so their errors are small beside those of unrelated samples
        unrelated = float(2 * runner.reference(dynamics).var())
        assert all(1e-8 < error("w8", steps) < 0.2 * unrelated for steps in (12, 8))
        assert error("w8", 15) < error("w4", 15) < error("w2", 15)
    coarse = make(reference_steps={"sde": 8}, **even)
    row = coarse.read(SamplerSetting("sde", "dpmpp_2m", "single", ("w8",), 8)).row
    assert row["error"] < 1e-12 < row["error_to_half"]
    found = [runner.read(SamplerSetting("sde", "dpmpp_2m", "single", (w,), 8)) for w in ("w2", "w8")]
    bias = reference_bias(found, runner)
    assert bias["sde"].pop("bias") == pytest.approx(1 / 3)  # a third of the change, for half of the reference
    assert bias == {"sde": {"steps": 15, "finest": 8, "setting": "DPM-Solver++(2M), w8, 8 steps"}}


def test_a_stopped_setting_and_a_damaged_file(make):
    runner, calls = make(), iter([False, True])
    with pytest.raises(Interrupted):
        runner.measure(SETTINGS[3], lambda: next(calls))
    assert not runner.is_done(SETTINGS[3])
    before = runner.read(SETTINGS[3])
    for file in runner.cache.iterdir():  # two batches of the reference, and the setting
        file.write_bytes(file.read_bytes()[:-50])
    make.images = 0
    with pytest.warns(SlowPath, match="was damaged"):
        assert np.array_equal(make().read(SETTINGS[3]).errors, before.errors)
    assert make.images > 6 * 16


def test_diverged_settings_are_rows_without_an_error(make):
    broken = Level("w2", lambda x, u: torch.where(x.mean((1, 2, 3), keepdim=True) > 0, x * torch.inf, x), 1e9)
    found = make(levels=make().levels | {"w2": broken}).read(SamplerSetting("ode", "ddim", "single", ("w2",), 8))
    assert 0 < found.row["diverged"] < 10 and found.row["error"] is None and found.row["error_se"] is None
    with pytest.raises(UserError, match=r"reference of the ODE.*not finite"):
        make(levels={"w8": broken}, key="c").reference("ode")
    values = torch.tensor([0.5, -999.0, 1001.0, torch.nan, -torch.inf]).reshape(5, 1, 1, 1)
    assert diverged(values).tolist() == [False, False, True, True, True]


def test_plans_add_their_settings_and_columns(make, tmp_path):
    facts = {"dynamics": "sde", "step_rule": "ddpm", "selected_error": 0.15}
    seeds = {"calibration": [5, 6], "selection": [7, 8]}
    content = {"seeds": seeds, "calibration": {"flops": 3e9}, "cost_unit": "seconds"}
    save_plans(tmp_path / "plans.json", [(plan, facts) for plan in PLANS.values()], **content)
    config = SimpleNamespace(plans="auto", seed=100, num_samples=10, num_distance=0)
    content = read_planned(tmp_path / "plans.json", config)
    assert (content.flops, content.unit, len(content.settings)) == (3e9, "seconds", 4)
    for config.seed, part in ((8, "selection: 7 to 8"), (-4, "calibration: 5 to 6")):
        with pytest.raises(UserError, match=rf"sample seeds of this comparison \({part}\)"):
            read_planned(tmp_path / "plans.json", config)

    runner, settings = make(), [*content.settings, replace(SETTINGS[0], steps=8)]
    moments = feature_moments(np.random.default_rng(0).normal(128, 10, (50, 3)))
    found = [runner.read(setting) for setting in settings]
    for m in found[:3]:
        m.row["top_evaluations"] = 100  # can be trusted
    measured = [m for _, m in complete(zip(settings, found, strict=True), runner.seeds, content)]
    assert [m.row.get("predicted") for m in measured] == [0.2] * 4 + [None]
    assert [m.row.get("selected_error") for m in measured] == [0.15] * 4 + [None]
    assert {(m.row["protocol"], m.row["num_samples"]) for m in measured} == {("strict", 10)}
    # distances only on the frontiers of error against FLOPs: of the plans, and of the one baseline
    rows = [m.row for m in measured]
    chosen = planned.for_distances(rows, OmegaConf.create({"strict": 2, "evaluations": 1e15}), LEVELS["w8"])
    best = min(range(4), key=lambda i: rows[i]["error"])
    assert best in chosen and 4 in chosen and 2 <= len(chosen) <= 3
    assert planned.for_distances(rows, OmegaConf.create({"strict": 2, "evaluations": 0}), LEVELS["w8"]) == []
    features = runner.features(settings[4])
    found = planned.distances(features, RealImages("FD-mean", moments, 0.1), 30, 100)
    names = ("distance", "distance_low", "distance_high")
    assert tuple(found[name] for name in names) == distance_interval(features, moments, 30, 100)
    assert found["num_distance"] == len(features) == 13 and found["kid"] is None
    _, (_, images), *others = examples(measured, "sde", runner)
    assert measured[-1].images is not None and np.array_equal(images, measured[-1].images)
    assert len(others) == 1 and "w2+w8" in others[0][0]  # the best plan that costs no more


def test_latents_are_compared_as_they_are_and_pictured_as_images(make):
    """Errors are those of latents; grids and features are of the decoded samples, here twice as large and half grey."""
    plain, decoded = make(), make(decode=lambda z: (0.5 * z).repeat_interleave(2, -1), cache=make.folder / "other")
    one, other = plain.read(SETTINGS[3]), decoded.read(SETTINGS[3])
    assert one.row["error"] == other.row["error"] and one.images.shape == (5, 3, 4, 4)
    assert other.images.shape == (5, 3, 4, 8) and decoded.pictures(torch.ones(1, 3, 4, 4)).unique().tolist() == [191]
    inside = (one.images > 0) & (one.images < 255)
    assert np.abs(0.5 * (one.images.astype(float) - 127.5) + 127.5 - other.images[..., ::2])[inside].max() < 1
    assert decoded.features(SETTINGS[3]).std() < plain.features(SETTINGS[3]).std()


def test_samples_of_a_distance_are_kept_for_another_extractor(make):
    runner = make()
    first = runner.features(SETTINGS[3])
    spent, calls = make.images, []

    def spread(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images.float().std((2, 3))

    again = make(extractor=Extractor("FD-sd", "s", spread)).features(SETTINGS[3])
    assert first.shape == again.shape == (13, 3) and not np.array_equal(first, again)
    assert sum(calls) == 13 and make.images == spent
    assert np.array_equal(make().features(SETTINGS[3]), first) and make.images == spent


# ------------------------------------------------------------------------------------------ the paper's protocol
PAPER: dict[str, Any] = {"baselines": [BASELINE], "ml_em": [{**ML_EM, "coins": [], "c": [1], "families": ["all"]}]}


def test_the_papers_settings_have_grids_even_in_t_and_fresh_coins(make):
    found = paper.fresh_settings(PAPER, {name: LEVELS[name] for name in ("w2", "w4", "w8")}, 50)
    assert [(s.estimator, s.coins) for s in found] == [("single", "")] * 3 + [("ml_em", "independent")]
    assert {s.protocol for s in found} == {"paper"} and found[0].row["protocol"] == "paper"
    process = Process(LinearSchedule())
    grid = replace(found[0], steps=100).grid(process)
    steps = -np.diff(grid.time)
    assert steps.max() / steps.min() < 1.2 and set(grid.index) <= set(process.grid().index)
    with pytest.raises(UserError, match="even in t need a finer base grid"):
        replace(found[0], steps=60).grid(Process(LinearSchedule(), base_steps=64))


def test_shared_patterns_are_pooled_and_the_best_is_chosen_on_other_samples(make):
    fresh = replace(SETTINGS[3], protocol="paper", steps=6)
    trials = paper.trials_of(fresh, 4)
    selecting, runner = make(seeds=list(range(200, 206))), make()
    select = {trial: selecting.read(trial) for trial in trials}
    chosen = paper.choose(trials, select)
    least = min(range(4), key=lambda i: select[trials[i]].row["error"])
    assert chosen.best == replace(trials[least], coins="best of 4") and chosen.best.row["pattern"] == least
    found = {trial: runner.read(trial) for trial in trials}
    found[trials[1]] = replace(found[trials[1]], work={"call": 6.0})  # a pattern in which some level never fires
    setting, pooled = chosen.pooled(found)
    assert pooled.errors.shape == (4, 6) and setting.coins == "shared" and setting.pattern is None
    means = pooled.errors.mean(axis=1)
    assert set(pooled.work) == set(found[trials[0]].work)
    assert pooled.row["error"] == pytest.approx(means.mean()) and "pattern" not in pooled.row
    assert pooled.row["error_spread"] == pytest.approx(means.std(ddof=1)) and pooled.row["error_spread"] > 0
    assert pooled.row["gflops_realised"] == pytest.approx(np.mean([m.row["gflops_realised"] for m in found.values()]))
    # one pattern for all samples, of a fixed cost, and the same in another run and on other samples
    weights = runner.build(chosen.best).weights(6, [1, 2, 3])
    assert (weights == weights[:, :1]).all() and np.array_equal(
        selecting.build(trials[least]).weights(6, [9, 8, 7]), weights
    )
    row = runner.read(chosen.best).row
    assert row["gflops_expected"] == row["gflops_realised"]
    assert table.method_of(row) == "pattern" and table.method_of(pooled.row | {"coins": "shared"}) == "shared"
    diverged = found | {trials[0]: replace(found[trials[0]], row=found[trials[0]].row | {"error": None, "diverged": 2})}
    lost = chosen.pooled(diverged)[1].row
    assert lost["error"] is None and lost["diverged"] == 2
