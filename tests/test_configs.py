"""Every configuration composes and instantiates: each experiment with each script, each option of each group."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mlem_diffusion.comparison.features import Extractor
from mlem_diffusion.comparison.settings import settings_of
from mlem_diffusion.diffusion.process import Process
from mlem_diffusion.diffusion.step_rules import REFERENCE_RULE, STEP_RULES
from mlem_diffusion.errors import UserError
from mlem_diffusion.models.family import at_width, build_denoiser, describe, level_name
from mlem_diffusion.multilevel.planner import METHODS
from mlem_diffusion.training.loop import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
sys.path.insert(0, str(ROOT / "scripts"))

ROOTS = sorted(p.stem for p in CONFIGS.glob("*.yaml") if p.stem != "base")
EXPERIMENTS = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    f"{p.parent.name}={p.stem}" for p in CONFIGS.glob("*/*.yaml") if p.parent.name not in ("experiment", "hydra")
)


@pytest.fixture(autouse=True)
def hydra_context() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        yield
    GlobalHydra.instance().clear()


def configuration(root: str, *overrides: str) -> DictConfig:
    return compose(root, overrides=list(overrides))


def to_container(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def test_every_script_has_a_root_config_and_vice_versa():
    scripts = {p.stem for p in (ROOT / "scripts").glob("*.py") if "@entry_point(" in p.read_text()}
    assert set(ROOTS) == scripts
    assert {"demo", "smoke", "celeba64"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("experiment", [None, *EXPERIMENTS])
def test_every_experiment_composes_with_every_script(root, experiment):
    cfg = configuration(root, *([f"experiment={experiment}"] if experiment else []))
    if experiment:
        assert cfg.name == experiment
    for node in (cfg.process, cfg.train, cfg.unet, cfg.compare, cfg.gamma, cfg.tracking, cfg.paths, cfg.family):
        to_container(node)  # every interpolation resolves
    assert "/" not in cfg.name and cfg.paths.results == f"results/{cfg.name}"
    assert cfg.paths.checkpoints == f"checkpoints/{cfg.name}" and cfg.paths.data == f"data/{cfg.data.name}"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_instantiates(experiment):
    cfg = configuration("sample_compare", f"experiment={experiment}")
    process = instantiate(cfg.process)
    assert isinstance(process, Process) and np.all(np.diff(process.grid().logsnr) > 0)
    for width in cfg.family.widths:
        train = instantiate(at_width(to_container(cfg.train), width))
        assert isinstance(train, TrainConfig) and max(train.snapshots) == 1.0 and len(train.snapshots) >= 3
        if not cfg.train.narrow:
            assert train.images == cfg.train.images
    widths = list(cfg.family.widths)
    assert widths == sorted(set(widths))
    unet = to_container(cfg.unet)
    build_denoiser(widths[0], cfg.data.size, 0.5, unet, cfg.family.target)
    assert cfg.data.holdout >= 2 and cfg.gamma.images <= cfg.data.holdout
    assert cfg.compare.num_reference <= cfg.compare.num_samples


def level_names(cfg: DictConfig) -> list[str]:
    if cfg.family.callable is not None:
        return [level.name for level in instantiate(cfg.family.callable)]
    return [level_name(w) for w in cfg.family.widths]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_has_settings_of_every_kind(experiment):
    cfg = configuration("sample_compare", f"experiment={experiment}")
    names = level_names(cfg)
    settings = settings_of(to_container(cfg.compare), names, cfg.process.base_steps)
    kinds = {(s.dynamics, s.estimator) for s in settings}
    expected = {(d, k) for d in ("sde", "ode") for k in ("single", "stitched", "ml_em")}
    if experiment == "analytic":  # these experiments compare plans
        assert {("sde", k) for k in ("single", "stitched", "ml_em")} | {("ode", "single")} <= kinds <= expected
    else:
        assert kinds == expected
    rules = {(s.dynamics, s.step_rule) for s in settings if s.estimator == "single"}
    assert {("sde", "ddpm"), ("ode", "ddim"), ("ode", "dpmpp_2m")} <= rules <= set(STEP_RULES)
    for setting in settings:
        assert set(setting.levels) <= set(names)
        if setting.estimator == "ml_em":
            assert setting.levels[-1] == names[-1]  # the estimate is unbiased for the largest level


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_can_be_optimised_and_judged_on_other_seeds(experiment):
    cfg = configuration("optimise", f"experiment={experiment}")
    o, base = cfg.optimise, cfg.process.base_steps
    assert set(o.methods) <= set(METHODS) and o.plans >= 1 and o.probes >= 1
    assert 2 <= o.calibrate_steps <= base and (o.reference_steps is None or o.reference_steps <= base)
    for rule in o.rules:
        one_each = len(STEP_RULES[rule.dynamics, rule.step_rule].program(instantiate(cfg.process).grid(9))) == 9
        assert one_each and rule.dynamics in REFERENCE_RULE  # effects carry over to its grids
        steps = list(rule.steps)
        assert steps == sorted(set(steps)) and steps[0] >= 2 and steps[-1] <= base
        assert max(o.measured.steps, default=2) <= base
        # learned probabilities start from measured ones at those steps
        if rule.get("learn", False):
            assert o.measured.costs and o.learned.steps in o.measured.steps
    calibration = set(range(o.seed, o.seed + max(o.calibrate, o.diagnose.seeds, o.num_select)))
    assert not calibration & set(range(cfg.compare.seed, cfg.compare.seed + cfg.compare.num_samples))


def test_the_analytic_experiment_is_a_family_of_its_own_without_distances():
    from mlem_diffusion.experiment.sampler_runs import make_extractor

    cfg = configuration("sample_compare", "experiment=analytic")
    levels = instantiate(cfg.family.callable)
    assert len(levels) == 7 and make_extractor(stub(cfg)) is None
    x = torch.zeros(2, *cfg.family.shape)
    assert levels[0].denoise(x, torch.zeros(2)).shape == x.shape
    assert make_extractor(stub(configuration("sample_compare", "metrics=none"))) is None


def test_step_counts_of_verify_rates_divide_its_grid():
    rates = configuration("verify_rates").rates
    assert not set(rates.choose_seeds) & set(rates.judge_seeds)
    assert len(rates.gammas) >= 3 and rates.grid % 3 == 0 and rates.targets.finest < rates.targets.coarsest


def test_families_are_long_enough_for_gamma():
    assert len(configuration("train_levels", "experiment=celeba64").family.widths) >= 7
    assert len(configuration("train_levels", "experiment=demo").family.widths) >= 5


def test_real_experiments_read_real_images_and_the_others_need_no_download():
    for experiment in ("celeba32", "celeba64", "celeba64_sprint"):
        assert OmegaConf.is_missing(configuration("prepare_data", f"experiment={experiment}").data, "source")
    for experiment in ("demo", "smoke"):
        assert configuration("prepare_data", f"experiment={experiment}").data.source == "portraits"


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes(option):
    for root in ("train_levels", "sample_compare"):
        cfg = configuration(root, option)
        assert option.split("=")[0] in cfg


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIGS / "process").glob("*.yaml")))
def test_every_process_instantiates_over_its_range(name):
    process = instantiate(configuration("train_levels", f"process={name}").process)
    grid = process.grid()
    assert grid.steps == process.base_steps
    assert grid.logsnr[0] == pytest.approx(process.logsnr_min, abs=1e-6)
    assert grid.logsnr[-1] == pytest.approx(process.logsnr_max, abs=1e-6)
    assert np.all(np.isfinite(grid.beta)) and np.all(np.diff(grid.time) < 0)


UNETS = {"small": 16, "adm": 64, "adm_fast": 64}


@pytest.mark.parametrize(("name", "size"), list(UNETS.items()))
def test_every_unet_is_one_function_of_width(name, size):
    """Every UNet builds, and its FLOPs grow with the width, across all changes of shape."""
    unet = to_container(configuration("train_levels", f"unet={name}").unet)
    widths = sorted(
        {4, 96, *(e["upto"] for e in unet.get("narrow", ())), *(e["upto"] + 8 for e in unet.get("narrow", ()))}
    )
    costs = [describe(width, size, 0.5, unet, "v")["flops"] for width in widths]
    assert all(b > a for a, b in pairwise(costs))
    build_denoiser(4, size, 0.5, unet, "v")
    assert {p.stem for p in (CONFIGS / "unet").glob("*.yaml")} == set(UNETS)


# ------------------------------------------------------------------------------------------------- metrics


def stub(cfg: DictConfig) -> Any:
    return type("Stage", (), {"cfg": cfg, "device": torch.device("cpu")})()


def test_the_light_extractor_instantiates():
    from mlem_diffusion.experiment.sampler_runs import make_extractor

    extractor = make_extractor(stub(configuration("sample_compare", "metrics=light", "metrics.dim=8")))
    assert isinstance(extractor, Extractor) and extractor.name != "FID"
    assert extractor.features(np.zeros((2, 3, 8, 8), np.uint8)).shape == (2, 8)


def test_a_custom_extractor_instantiates():
    from mlem_diffusion.experiment.sampler_runs import make_extractor

    overrides = [
        "metrics=custom",
        "metrics.callable._target_=torch.nn.Flatten",
        "metrics.name=FD-pixels",
        "metrics.key=v1",
    ]
    extractor = make_extractor(stub(configuration("sample_compare", *overrides)))
    assert extractor.name == "FD-pixels" and extractor.key == "v1"
    assert extractor.features(np.zeros((2, 3, 4, 4), np.uint8)).shape == (2, 48)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["metrics=inception", "metrics.weights=/nowhere/inception.pth"], "/nowhere/inception.pth do not exist"),
        (["metrics=light", "metrics.dim=0"], "needs dim >= 1"),
        (["metrics=custom", "metrics.callable._target_=torch.nn.Flatten", "metrics.name=FID"], "must not be FID"),
        (["metrics=custom", "metrics.callable._target_=nowhere.Network", "metrics.name=x"], "cannot be built"),
        (["metrics=custom"], "cannot be built|missing"),
        (["metrics=light", "+metrics.colour=red"], r"features\.light cannot be built"),
    ],
    ids=[
        "inception without its file",
        "no dimension",
        "a name that is taken",
        "no such module",
        "no callable",
        "unknown key",
    ],
)
def test_a_bad_metric_gives_one_sentence(overrides, sentence):
    from mlem_diffusion.experiment.sampler_runs import make_extractor

    with pytest.raises(UserError, match=sentence) as error:
        make_extractor(stub(configuration("sample_compare", *overrides)))
    assert "\n" not in str(error.value)


def test_an_impossible_process_gives_one_sentence():
    from mlem_diffusion.experiment import stage as common

    with pytest.raises(UserError, match=r"process\.spacing is 'even'"):
        common.build(configuration("train_levels", "process.spacing=even").process)


# ----------------------------------------------------------------------------------------------- the rest


def test_wandb_is_offline_unless_the_environment_overrides_it(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert configuration("train_levels").tracking.mode == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert configuration("train_levels").tracking.mode == "online"


def test_a_missing_experiment_is_named():
    with pytest.raises(MissingConfigException, match="nothing"):
        configuration("train_levels", "experiment=nothing")


def test_the_defaults_of_the_configuration_are_those_of_the_code():
    cfg = to_container(configuration("train_levels").train)
    cfg.pop("_target_")
    assert cfg.pop("narrow") == []
    assert TrainConfig(**cfg) == TrainConfig()


def test_the_comment_on_the_reference_architecture_is_true():
    from mlem_diffusion.models.family import describe

    text = (CONFIGS / "unet" / "adm.yaml").read_text()
    found = re.search(r"([\d.]+) GFLOP at width (\d+), ([\d.]+) at width (\d+)", text)
    assert found
    unet = to_container(configuration("train_levels", "unet=adm").unet)
    for gflop, width in (found.group(1, 2), found.group(3, 4)):
        flops = describe(int(width), 64, 0.5, unet, "v")["flops"]
        assert flops / 1e9 == pytest.approx(float(gflop), rel=0.02)
