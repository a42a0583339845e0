"""The configuration composes and instantiates for every experiment and every option of each group."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from mlem_diffusion.comparison.planned import references_for
from mlem_diffusion.comparison.settings import settings_of
from mlem_diffusion.diffusion.process import Process
from mlem_diffusion.diffusion.step_rules import REFERENCE_RULE, step_rule
from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment import config
from mlem_diffusion.experiment.runs import make_extractor, planned_steps
from mlem_diffusion.experiment.seeds import sample_seeds
from mlem_diffusion.models.family import at_width, build_denoiser, describe, level_name
from mlem_diffusion.multilevel.planner import METHODS
from mlem_diffusion.training.levels import TrainConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EXPERIMENTS = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
GROUPS = sorted(f"{p.parent.name}={p.stem}" for p in CONFIGS.glob("*/*.yaml") if p.parent.name != "experiment")


@pytest.fixture(autouse=True)
def hydra_context() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        yield
    GlobalHydra.instance().clear()


def configuration(*overrides: str) -> DictConfig:
    return compose("config", overrides=list(overrides))


@pytest.fixture(params=EXPERIMENTS)
def cfg(request: pytest.FixtureRequest) -> DictConfig:
    return configuration(f"experiment={request.param}")


def plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def test_every_experiment_instantiates(cfg):
    assert cfg.name in EXPERIMENTS and cfg.paths.results == f"results/{cfg.name}"
    assert isinstance(config.build(cfg.process), Process)
    widths, unet = list(cfg.family.widths), plain(cfg.unet)
    assert widths == sorted(set(widths)) and cfg.compare.num_reference <= cfg.compare.num_samples
    for width in widths:
        train = config.build(at_width(plain(cfg.train), width))
        assert isinstance(train, TrainConfig) and max(train.snapshots) == 1.0 and len(train.snapshots) >= 3
    build_denoiser(widths[0], cfg.data.size, 0.5, unet, cfg.family.target)
    assert cfg.data.holdout >= 2 and cfg.gamma.images <= cfg.data.holdout


def test_every_experiment_compares_the_multilevel_method_with_baselines(cfg):
    names = [level_name(w) for w in cfg.family.widths]
    if cfg.family.callable is not None:
        names = [level.name for level in config.build(cfg.family.callable)]
    settings = settings_of(plain(cfg.compare), names, cfg.process.base_steps)
    assert references_for(settings, config.build(cfg.process)).keys() == {"sde", "ode"}  # UserError if too coarse
    kinds = {(s.dynamics, s.estimator) for s in settings}
    assert {("sde", "single"), ("ode", "single"), ("sde", "ml_em")} <= kinds
    assert {"sde/ddpm", "ode/ddim", "ode/dpmpp_2m"} <= {f"{s.dynamics}/{s.step_rule}" for s in settings}
    for setting in settings:
        assert set(setting.levels) <= set(names)
        assert setting.estimator != "ml_em" or setting.levels[-1] == names[-1]  # unbiased for the largest level


def test_every_experiment_has_separate_seeds_and_fine_references(cfg):
    o, base = cfg.optimise, cfg.process.base_steps
    assert set(o.methods) <= set(METHODS) and 2 <= o.calibrate_steps <= base
    for rule in o.rules:
        one_each = len(step_rule(rule.dynamics, rule.step_rule).program(config.build(cfg.process).grid(9))) == 9
        assert one_each and rule.dynamics in REFERENCE_RULE  # effects carry over to its grids
        steps = list(rule.steps)
        assert steps == sorted(set(steps)) and steps[-1] <= base
        # learned probabilities start from measured ones at those steps
        assert not rule.get("learn", False) or (o.measured.costs and o.learned.steps in o.measured.steps)
    assert references_for(planned_steps(o), config.build(cfg.process)).keys() == {"sde", "ode"}
    parts, sizes = vars(sample_seeds(cfg)).values(), (max(o.calibrate, o.diagnose.seeds), o.num_select)
    assert len(set().union(*parts)) == sum(map(len, parts)) == sum(sizes) + cfg.compare.num_samples
    for first in (o.seed + sum(sizes) - 1, o.seed + 1 - cfg.compare.num_samples):  # at either end
        cfg.compare.seed = first
        with pytest.raises(UserError, match=r"change compare.seed or optimise.seed"):
            sample_seeds(cfg)


def test_seeds_and_steps_of_verify_rates():
    rates = configuration().rates
    assert not set(rates.choose_seeds) & set(rates.judge_seeds)
    assert rates.grid % 4096 == 0 and rates.targets.finest < rates.targets.coarsest


@pytest.mark.parametrize("option", GROUPS)
def test_every_option_of_every_group_composes(option):
    group, name = option.split("=")
    cfg = configuration(option)
    assert plain(cfg.compare) and group in cfg
    if group == "process":
        grid = config.build(cfg.process).grid()
        assert np.all(np.isfinite(grid.beta)) and np.all(np.diff(grid.time) < 0)
    if group == "unet":  # FLOPs grow with the width, across all changes of shape
        unet, size = plain(cfg.unet), 16 if name == "small" else 64
        narrow = [e["upto"] for e in unet.get("narrow", ())]
        widths = sorted({4, 96, *narrow, *(w + 8 for w in narrow)})
        assert all(b > a for a, b in pairwise(describe(w, size, 0.5, unet, "v")["flops"] for w in widths))


def extractor_of(*overrides: str) -> Any:
    cfg = configuration(*overrides)
    return make_extractor(SimpleNamespace(cfg=cfg, device=torch.device("cpu")))


def test_extractors_instantiate():
    assert extractor_of("metrics=none") is None and extractor_of("experiment=analytic") is None
    light = extractor_of("metrics=light", "metrics.dim=8")
    assert light.name != "FID" and light.features(np.zeros((2, 3, 8, 8), np.uint8)).shape == (2, 8)
    own = extractor_of("metrics=custom", "metrics.callable._target_=torch.nn.Flatten", "metrics.name=FD-pixels")
    assert own.name == "FD-pixels" and own.features(np.zeros((2, 3, 4, 4), np.uint8)).shape == (2, 48)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["metrics=inception", "metrics.weights=/nowhere/inception.pth"], "/nowhere/inception.pth do not exist"),
        (["metrics=custom", "metrics.callable._target_=torch.nn.Flatten", "metrics.name=FID"], "must not be FID"),
        (["metrics=custom", "metrics.callable._target_=nowhere.Network", "metrics.name=x"], "cannot be built"),
        (["metrics=light", "+metrics.colour=red"], r"features\.light cannot be built"),
    ],
)
def test_a_bad_metric_gives_one_sentence(overrides, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        extractor_of(*overrides)
    assert "\n" not in str(error.value)


def test_wandb_is_offline_unless_the_environment_overrides_it(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert configuration().tracking.mode == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert configuration().tracking.mode == "online"


def test_the_defaults_of_the_configuration_are_those_of_the_code():
    cfg = plain(configuration().train)
    assert cfg.pop("_target_").endswith("TrainConfig") and cfg.pop("narrow") == []
    assert TrainConfig(**cfg) == TrainConfig()


def test_fingerprints_ignore_modules_and_what_only_watches():
    """A moved module, another log interval and narrow settings of other widths leave a level's fingerprint alone."""

    def key(*overrides: str, width: int = 8, target: str = "a.b.TrainConfig") -> str:
        groups = config.plain(configuration(*overrides), ["process", "train"])
        return config.fingerprint(groups | {"train": {**groups["train"], "_target_": target}}, {"width": width})

    assert key() == key("train.log_every=1", "train.compile=off") == key(target="c.TrainConfig")
    assert key() == key("train.narrow=[{upto: 4, images: 10}]") != key("train.narrow=[{upto: 8, images: 10}]")
    assert len({key(), key("train.lr=1"), key(width=9), key("process=cosine")}) == 4


def test_absolute_paths_stay_private():
    cfg = configuration("data.source=/home/me/images.zip", "metrics=inception", "metrics.weights=/mnt/w.pth")
    found = config.plain(cfg)
    assert found["data"]["source"] == "images.zip" and found["metrics"]["weights"] == "w.pth" and "paths" not in found
