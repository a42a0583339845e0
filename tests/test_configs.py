"""The configuration composes and instantiates for every experiment and every option of each group."""

import copy
import functools
import re
from collections.abc import Iterator
from itertools import chain, pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from packaging.specifiers import SpecifierSet

from mlem_diffusion.comparison.paper import fresh_settings
from mlem_diffusion.comparison.planned import references_for
from mlem_diffusion.comparison.settings import settings_of
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import Process
from mlem_diffusion.diffusion.step_rules import REFERENCE_RULE, step_rule
from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment import checks, config
from mlem_diffusion.experiment.runs import make_extractor, planned_steps, sample_seeds
from mlem_diffusion.models.family import build_denoiser, check_attention, describe, level_name
from mlem_diffusion.multilevel.planner import METHODS
from mlem_diffusion.training.levels import TrainConfig, level_names, taught_widths
from mlem_diffusion.training.levels import settings as level_settings

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
EXPERIMENTS = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
GROUPS = sorted(f"{p.parent.name}={p.stem}" for p in CONFIGS.glob("*/*.yaml") if p.parent.name != "experiment")


@pytest.fixture(autouse=True)
def hydra_context() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        yield
    GlobalHydra.instance().clear()


@functools.cache
def composed(*overrides: str) -> DictConfig:
    return compose("config", overrides=list(overrides))


def configuration(*overrides: str) -> DictConfig:
    return copy.deepcopy(composed(*overrides))  # composition is slow


def unchanged(cfg: DictConfig) -> bool:
    """Whether the checks leave a shipped configuration as it is."""
    before = OmegaConf.to_yaml(cfg)
    checks.settle(cfg, [])
    return OmegaConf.to_yaml(cfg) == before


def settled(*overrides: str) -> DictConfig:
    """The miniature with these overrides; only groups need Hydra's slow composition."""
    if any(text.split("=")[0] in ("metrics", "process", "unet") for text in overrides):
        cfg = configuration("experiment=smoke", *overrides)
    else:
        cfg = configuration("experiment=smoke")
        for o in OverridesParser.create().parse_overrides(list(overrides)):
            OmegaConf.update(cfg, o.key_or_group, o.value(), force_add=True)
    checks.settle(cfg, overrides)
    return cfg


@pytest.fixture(params=EXPERIMENTS)
def cfg(request: pytest.FixtureRequest) -> DictConfig:
    return configuration(f"experiment={request.param}")


def plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def test_every_experiment_instantiates(cfg):
    assert unchanged(cfg)
    assert cfg.name in EXPERIMENTS and cfg.paths.results == f"results/{cfg.name}"
    assert isinstance(config.build(cfg.process), Process)
    widths, unet = list(cfg.family.widths), plain(cfg.unet)
    assert widths == sorted(set(widths))
    for width in widths:
        train = config.build(level_settings(plain(cfg.train), {"width": width}))
        assert isinstance(train, TrainConfig) and max(train.snapshots) == 1.0 and len(train.snapshots) >= 3
    build_denoiser(widths[0], cfg.data.size, 0.5, unet, cfg.family.target)
    if cfg.family.callable is None:
        check_attention(widths, cfg.data.size, unet)
        with pytest.raises(UserError, match=r"unet\.attention=\[7\]: .* only at \d"):
            check_attention(widths, cfg.data.size, unet | {"attention": [7]})
    assert cfg.data.holdout >= 2 and cfg.gamma.images <= cfg.data.holdout


def test_every_experiment_compares_the_multilevel_method_with_baselines(cfg):
    names, teacher = [level_name(w) for w in cfg.family.widths], level_name(cfg.family.widths[-1])
    found = [Level(name, abs, i + 1.0) for i, name in enumerate(names)]
    found[-1:-1] = [Level(name, abs, 1.0, teacher=teacher) for name in level_names(cfg) if name not in names]
    if cfg.family.callable is not None:
        found = config.build(cfg.family.callable)
    levels = {level.name: level for level in found}
    names = list(levels)
    settings = settings_of(plain(cfg.compare), levels, cfg.process.base_steps)
    papers = fresh_settings(plain(cfg.compare.paper), levels, cfg.process.base_steps)
    assert {(s.rule.key, s.estimator) for s in papers} >= set(product(("sde/ddpm", "ode/ddim"), ("single", "ml_em")))
    for setting in papers:  # they share the references
        assert setting.grid(config.build(cfg.process)).index[-1] == cfg.process.base_steps - 1
    assert references_for([*settings, *papers], config.build(cfg.process)) == references_for(
        settings, config.build(cfg.process)
    )
    assert references_for(settings, config.build(cfg.process)).keys() == {"sde", "ode"}  # UserError if too coarse
    kinds = {(s.dynamics, s.estimator) for s in settings}
    assert {("sde", "single"), ("ode", "single"), ("sde", "ml_em")} <= kinds
    assert {"sde/ddpm", "ode/ddim", "ode/dpmpp_2m"} <= {f"{s.dynamics}/{s.step_rule}" for s in settings}
    for setting in settings:
        assert set(setting.levels) <= set(names)
        assert setting.estimator != "ml_em" or setting.levels[-1] == names[-1]  # unbiased for the largest level


def test_every_experiment_has_separate_seeds_and_fine_references(cfg):
    o, base = cfg.optimise, cfg.process.base_steps
    assert set(o.methods) <= set(METHODS) and 2 <= min(o.calibrate_steps) <= max(o.calibrate_steps) <= base
    for rule in o.rules:
        one_each = len(step_rule(rule.dynamics, rule.step_rule).program(config.build(cfg.process).grid(9))) == 9
        assert one_each and rule.dynamics in REFERENCE_RULE  # effects carry over to its grids
        steps = list(rule.steps)
        assert steps == sorted(set(steps)) and steps[-1] <= base
        # learned probabilities start from measured ones at those steps
        assert not rule.get("learn", False) or (o.measured.costs and o.learned.steps in o.measured.steps)
    assert references_for(planned_steps(o), config.build(cfg.process)).keys() == {"sde", "ode"}
    seeds, sizes = sample_seeds(cfg), (max(o.calibrate, o.diagnose.seeds), o.num_select)
    parts, judged = (seeds.calibration, seeds.selection, seeds.judgement), len(seeds.judgement)
    assert judged == max(cfg.compare.num_samples, cfg.compare.num_distance)
    assert len(set().union(*parts)) == sum(map(len, parts)) == sum(sizes) + judged
    # the best pattern is chosen on other samples than those that judge it
    assert len(seeds.patterns) == cfg.compare.paper.patterns.select and not set(seeds.patterns) & set(seeds.judgement)
    assert cfg.compare.paper.patterns.judge <= cfg.compare.num_samples and seeds.errors.start == seeds.distances.start
    for first in (o.seed + sum(sizes) - 1, o.seed + 1 - judged):  # at either end
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
    assert plain(cfg.compare) and group in cfg and unchanged(cfg)
    if group == "process":
        grid = config.build(cfg.process).grid()
        assert np.all(np.isfinite(grid.beta)) and np.all(np.diff(grid.time) < 0)
    if group == "unet":  # FLOPs grow with the width, across all changes of shape
        unet, size = plain(cfg.unet), 16 if name == "small" else 64
        narrow = [e["upto"] for e in unet.get("narrow", ())]
        widths = sorted({4, *narrow, *(w + 8 for w in narrow or [4])})
        assert all(b > a for a, b in pairwise(describe(w, size, 0.5, unet, "v")["flops"] for w in widths))


def test_the_families_of_celeba64():
    """One architecture without patches, whose FLOPs grow by nearly equal factors, and the same widths for ML-EM."""
    paper, telescope = configuration("experiment=celeba64"), configuration("experiment=celeba64", "family=telescope")
    assert configuration("experiment=celeba64", "family=paper") == paper and not paper.family.gaussian
    unet, widths = plain(paper.unet), list(paper.family.widths)
    assert not {"narrow", "patch"} & set(unet) and unet["precondition"] == "scalar" and len(widths) >= 7
    flops = [describe(width, 64, 0.5, unet, "v")["flops"] for width in widths]
    factors = [b / a for a, b in pairwise(flops)]
    assert max(factors) < 1.25 * min(factors)
    again = ["experiment=celeba64", "family=telescope", "unet=adm"]
    other = configuration(*again)
    checks.settle(other, again)
    assert unchanged(telescope) and other.unet == telescope.unet == {**unet, "precondition": "gaussian"}
    assert telescope.family == {**paper.family, "gaussian": True} and taught_widths(telescope)
    fast = configuration("experiment=celeba64", "family=fast")
    assert unchanged(fast) and "narrow" in fast.unet
    assert [c.name for c in (paper, telescope, fast)] == ["celeba64", "celeba64_telescope", "celeba64_fast"]


def extractor_of(*overrides: str) -> Any:
    cfg = configuration(*overrides)
    return make_extractor(SimpleNamespace(cfg=cfg, device=torch.device("cpu")))


def test_extractors_instantiate():
    assert extractor_of("metrics=none") is None and extractor_of("experiment=analytic") is None
    light = extractor_of("metrics=light", "metrics.dim=8")
    assert light.name != "FID" and light.features(np.zeros((2, 3, 8, 8), np.uint8)).shape == (2, 8)
    own = extractor_of("metrics=custom", "metrics.callable._target_=torch.nn.Flatten", "metrics.name=FD-pixels")
    assert own.name == "FD-pixels" and own.features(np.zeros((2, 3, 4, 4), np.uint8)).shape == (2, 48)


@pytest.mark.parametrize(("overrides", "sentence"), [
    (["metrics=custom", "metrics.callable._target_=torch.nn.Flatten", "metrics.name=FID"], "must not be FID"),
    (["metrics=custom", "metrics.callable._target_=nowhere.Network", "metrics.name=x"], "cannot be built"),
    (["metrics=light", "+metrics.colour=red"], r"features\.light cannot be built"),
])  # fmt: skip
def test_a_bad_metric_gives_one_sentence(overrides, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        extractor_of(*overrides)
    assert "\n" not in str(error.value)


def test_defaults(monkeypatch):
    """Those of training are the code's, and W&B is offline unless the environment overrides it."""
    for mode, used in (("", "offline"), ("online", "online")):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert (configuration().tracking.mode or "offline") == used
    cfg = plain(configuration().train)
    assert cfg.pop("_target_").endswith("TrainConfig") and cfg.pop("narrow") == []
    assert cfg.pop("teacher") == {"widths": []}
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


@pytest.mark.parametrize(("key", "text", "value"), [
    ("gamma.images", "3e2", 300), ("family.widths", "8.0", [8]), ("optimise.bases", "[null,1.0]", [None, 1]),
    ("train.compile", "false", "off"), ("name", "2026", "2026"), ("only", "w2", ["w2"]), ("seeds", "5", "5"),
    ("+metrics.x", "5", 5), ("+mine", "yes", "yes"), ("unet.attention", "[]", []), ("train.narrow", "null", []),
    ("+my.lr", "1", 1), ("force", "1", True), ("title", "null", None), ("train.reference_channels", "12.5", 12.5),
])  # fmt: skip
def test_whole_floats_and_single_values_are_read_as_what_they_mean(key, text, value):
    found = OmegaConf.select(settled(f"{key}={text}"), key.lstrip("+"))
    assert (found, repr(found)) == (value, repr(value))


BASELINE = "compare.baselines=[{dynamics: sde, step_rule: ddpm, levels: all, "
WRONG = ["gamma.images=many", "gamma.images=-1", "gamma.images=null", "gamma.images=2.5", "gamma.images=true"]
WRONG += ["family.widths=[2.5,4]", "family.widths=[4,4]", "family.widths=[6,2,4]", "family.widths=[]", "workers=0"]
WRONG += ["train.lr=nan", "train.lr=inf", "train.lr=-1", "train.decay_fraction=2", "train.flips=yes", "threads=0"]
WRONG += ["paths.results=", "paths.data=null", "name=../../x", "name=/x", "name=", "precision=fp16", "compare.batch=0"]
WRONG += ["compare.gamma=often", "sampler=heun", "optimise.cost=money", "max_minutes=-1", "compare.seed=-3", "train=5"]
WRONG += ["rates.gammas=[0]", "benchmark.small.batches=[a]", "timing.rounds=0", "compare.baselines=all"]
WRONG += ["process.spacing=even", "family.target=score", "unet.dropout=2"]
REFUSED = [(text, rf"^{text.split('=')[0]}=.* must be ") for text in WRONG]
REFUSED += [
    (f"{BASELINE}step: 4}}]", r"baselines\[0\]\.step is no setting"),
    (f"{BASELINE}steps: [a]}}]", r"\[0\]\.steps=\[a\]"),
    ("train.narrow=[{images: 9}]", "lacks the key upto"), ("+optimize={seed: 1}", "optimize is no setting"),
    ("paths.data='~nobody-here/x'", "HOME"), ("paths.data='${nope}'", "cannot be resolved: .*nope"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "sentence"), REFUSED)
def test_a_wrong_value_is_one_sentence_that_names_its_key(override, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        settled(override)
    assert "\n" not in str(error.value)


def test_a_group_chosen_on_the_command_line_has_no_fields_of_the_experiment():
    cfg = settled("metrics=inception", "process=cosine")
    assert set(cfg.metrics) == {"_target_", "weights"} and cfg.process.base_steps == 2049
    assert dict(settled("metrics=light32", "metrics.seed=8").metrics)["dim"] == 32


def test_home_stands_for_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MLEM_SOURCE", "~/faces.zip")
    cfg = settled("paths.results='~/x/${name}'", "data.source=${oc.env:MLEM_SOURCE}", "metrics=inception",
                  "metrics.weights='~/w'")  # fmt: skip
    cfg.name = "smoke/job"  # as a sweep does
    assert cfg.paths.results == "/home/me/x/smoke/job" and cfg.metrics.weights == "/home/me/w"
    assert cfg.data.source == "/home/me/faces.zip"


def test_folders_of_jobs_have_short_and_distinct_names():
    names = [config.job_folder(text) for text in ("a=1", "a=x/y", "é" * 200, "é" * 201)]
    assert names[:2] == ["a=1", "a=x_y"] and len(set(names)) == 4 and all(len(n.encode()) <= 200 for n in names)


def test_conda_installs_this_package_with_a_python_that_it_takes():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    environment = plain(OmegaConf.load(ROOT / "environment.yml"))
    *conda, last = environment["dependencies"]
    assert environment["name"] == project["name"] and "pip" in conda and list(last) == ["pip"]
    package, *more = last["pip"]
    extras = re.fullmatch(r"-e \.(?:\[(.+)\])?", package)  # of the folder of environment.yml
    assert extras and set((extras[1] or "test").split(",")) <= set(project["optional-dependencies"])
    named, bounds = (project["dependencies"], *project["optional-dependencies"].values()), {}
    for text in chain(conda, more, *named):
        name, bound = re.findall(r"^([\w.-]+)(?:\[.+\])?\s*(.*)$", text.lower())[0]
        assert bounds.setdefault(name, bound) == bound
    assert SpecifierSet(project["requires-python"]).contains(bounds["python"].lstrip("="))
