"""Runs many sampler settings of one family, with shared levels and caches, in one or several processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from .. import parallel
from ..comparison.features import Extractor
from ..comparison.frechet import FeatureMoments, load_moments
from ..comparison.runner import NoiseCache, Runner
from ..comparison.settings import SamplerSetting
from ..data.images import ImageData
from ..diffusion.level import Level
from ..errors import Interrupted, UserError
from ..files import Damaged, cached, check_zip, discard_damaged, expect_content, read_json
from ..models import published
from ..models.family import identity_of, load_family
from ..models.gaussian import fit_gaussian, load_gaussian
from ..multilevel.plan import Plan, load_plans
from . import side_by_side
from .stage import Stage, bar, build, seconds_per_evaluation, shown

PUBLISH = "publish the family again (make publish)"
GAUSSIAN = "gauss"  # name of the linear Gaussian denoiser among the levels


def used_gamma(stage: Stage, made_with: dict[str, Any] | None) -> float:
    """gamma of the constant probabilities: the number in the configuration, or the measured value of these levels."""
    if stage.cfg.compare.gamma != "auto":
        try:
            return float(stage.cfg.compare.gamma)
        except ValueError as error:
            raise UserError(f"compare.gamma = {stage.cfg.compare.gamma} is neither a number nor auto.") from error
    hint = "run make measure-gamma with the same EXPERIMENT first, or set compare.gamma"
    path = stage.find("gamma.json")
    content = read_json(path, hint)
    check_made_with(stage, content, made_with, path, "make measure-gamma")
    with expect_content(path, hint):
        estimates = content["estimates"]
        for name in ("differences", "to_largest", "loss_fit"):
            if estimates[name]["gamma"] is not None:
                return float(estimates[name]["gamma"])
    raise UserError("No estimate in gamma.json is finite; set compare.gamma to a number.")


def make_extractor(stage: Stage) -> Extractor | None:
    """The configured feature extractor, on this device if it supports devices; None without distances."""
    if stage.cfg.metrics.get("_target_") is None:
        return None
    config: Any = OmegaConf.to_container(stage.cfg.metrics, resolve=True)
    if config["_target_"].split(".")[-1] in ("light", "inception"):
        config["device"] = str(stage.device)
    return build(config)


def load_levels(stage: Stage) -> tuple[dict[str, Level], dict[str, Any], tuple[int, ...], ImageData | None]:
    """The levels by name, their identity, the shape of a sample, and the training images or None."""
    cfg = stage.cfg
    if cfg.family.callable is not None:
        levels = {level.name: level for level in build(cfg.family.callable)}
        return levels, {"callable": stage.plain("family"), "made_with": None}, tuple(cfg.family.shape), None
    images = stage.data_if_needed()
    metadata = stage.levels_of(images)
    loaded = load_family(
        stage.checkpoints, cfg.family.widths, stage.device, cfg.precision, compile=cfg.compile, batch=cfg.compare.batch
    )
    inputs: dict[str, Any] = {"levels": [m["weights_sha256"] for m in metadata], "data": metadata[0]["data_sha256"]}
    inputs["made_with"] = identity_of(metadata)
    if cfg.family.gaussian:
        gauss = gaussian_level(stage, images)
        if gauss.flops < loaded[0].flops:  # useless if it costs more than the first network
            loaded.insert(0, gauss)
            inputs["gaussian"] = gauss.flops
    return {level.name: level for level in loaded}, inputs, (3, cfg.data.size, cfg.data.size), images


def gaussian_level(stage: Stage, images: ImageData | None) -> Level:
    """The linear Gaussian denoiser of the training images: the published one, or fitted once and cached."""
    found = (stage.published or {}).get("gaussian")
    with expect_content(stage.checkpoints / published.INDEX, PUBLISH):
        if found is not None and found["asked_rank"] == stage.cfg.family.gaussian_rank:
            return load_gaussian(stage.checkpoints / found["file"], stage.device, sealed=False).as_level(GAUSSIAN)
    if images is None:
        raise UserError(
            f"No Gaussian level with family.gaussian_rank={stage.cfg.family.gaussian_rank} is published, so it must be "
            "fitted to the training images: prepare them (make data), or set family.gaussian=false."
        )
    path = (
        stage.results / "cache" / f"gauss-{images.manifest['sha256'][:12]}-{stage.cfg.family.gaussian_rank}.safetensors"
    )
    found = cached(
        path,
        lambda p: load_gaussian(p, stage.device),
        lambda: fit_gaussian(images.images[images.train()], stage.cfg.family.gaussian_rank).save(path),
    )
    return found.as_level(GAUSSIAN)


def published_moments(stage: Stage, extractor: Extractor) -> tuple[FeatureMoments, float | None] | None:
    """The published moments of the training images' features, and the published real-against-real distance.

    The distance is None unless it was published for compare.num_samples images and this seed. The result is None if no
    moments by this extractor are published.
    """
    found = (stage.published or {}).get("statistics")
    if found is None or (found["name"], found["identity"]) != (extractor.name, extractor.identity or extractor.key):
        return None
    floor, asked = found["floor"], (stage.cfg.compare.num_samples, stage.cfg.compare.seed)
    statistics = load_moments(stage.checkpoints / found["file"])
    return statistics, floor["distance"] if (floor["num_samples"], floor["seed"]) == asked else None


def names_of(levels: Iterable[str]) -> tuple[list[str], tuple[str, ...]]:
    """Names of the trained levels, which a configuration selects by index, and of the other levels."""
    levels = list(levels)
    return [name for name in levels if name != GAUSSIAN], tuple(n for n in levels if n == GAUSSIAN)


def check_enough(extractor: Extractor, n: int, shape: tuple[int, ...]) -> None:
    """Raise UserError before sampling if n images are too few for a Frechet distance with this extractor."""
    dimensions = extractor.features(torch.zeros(1, *shape, dtype=torch.uint8)).shape[1]
    if n <= dimensions:
        raise UserError(
            f"compare.num_samples={n} images are too few for {extractor.name}, which has {dimensions} features, "
            "since the covariance would be singular: "
            f"set compare.num_samples={dimensions + 1} or more, or metrics=light, light32 or none."
        )


def make_runner(stage: Stage) -> tuple[Runner, ImageData | None]:
    """The runner of all settings of this stage, from the artefacts of earlier stages; and the images or None."""
    cfg, select = stage.cfg, stage.name == "optimise"
    levels, inputs, shape, images = load_levels(stage)
    extractor = None if select else make_extractor(stage)
    if extractor is not None and images is None and stage.published and published_moments(stage, extractor) is None:
        extractor = None  # nothing to compare with
    if extractor is not None and not cfg.dry_run:
        check_enough(extractor, cfg.compare.num_samples, shape)
    made_with = inputs.pop("made_with")
    # the selection of plans runs no setting with constant probabilities
    gamma = 2.5 if select else used_gamma(stage, made_with)
    inputs |= {"gamma": gamma, "extractor": extractor.key if extractor else None}
    where = stage.results / "cache" / "candidates.json" if select else stage.find("plans.json")
    plans = plans_there(stage, where, made_with) if where.is_file() and (select or cfg.compare.plans != "none") else {}
    first, count = (
        (cfg.optimise.seed, cfg.optimise.num_select) if select else (cfg.compare.seed, cfg.compare.num_samples)
    )
    runner = Runner(
        levels=levels, process=stage.process(), gamma=gamma, shape=shape, seeds=list(range(first, first + count)),
        num_reference=count if select else min(cfg.compare.num_reference, count), batch=cfg.compare.batch,
        device=stage.device, extractor=extractor, cache=stage.results / "cache", grid_images=cfg.compare.grid_images,
        key=stage.fingerprint(("process", "precision"), **inputs, device=stage.device.type), plans=plans,
        reference_steps=cfg.optimise.reference_steps if select else None, made_with=made_with,
    )  # fmt: skip
    return runner, images


def plans_there(stage: Stage, path: Path, made_with: dict[str, Any] | None) -> dict[str, Plan]:
    """Plans by id; damaged candidates are removed and computed again."""
    if stage.name != "optimise":
        plans, content = load_plans(path)
        check_made_with(stage, content, made_with, path, "make optimise")
        return plans
    try:
        return load_plans(path)[0]
    except Damaged as error:
        discard_damaged(error)
        return {}


def check_made_with(
    stage: Stage, content: dict[str, Any], levels: dict[str, Any] | None, path: Path, target: str
) -> None:
    """Raise UserError if an artefact was made with other levels, or with levels trained on other images.

    levels: `family.identity_of`, or None for a family that is not trained.
    """
    made_with = content.get("made_with")
    if levels is None or made_with == levels:
        return
    what = shown(path)
    again = f"run {target} EXPERIMENT={stage.cfg.name} again"
    if made_with is None:
        raise UserError(f"{what} does not name the levels that it was made with: {again}.")
    with expect_content(path, again):
        same_images = made_with["data"] == levels["data"]
        names = [name for name, sha256 in levels["levels"].items() if made_with["levels"].get(name) != sha256]
    if not same_images:
        raise UserError(f"{what} was made with levels that were trained on other images: {again}.")
    raise UserError(f"{what} was made with other levels than the current ones ({', '.join(names)} differ): {again}.")


def priced_levels(stage: Stage) -> tuple[dict[str, Level], dict[str, float]]:
    """For cost estimates: the levels by name, without weights, and the measured seconds per image of one evaluation.

    The Gaussian denoiser counts as free.
    """
    cfg = stage.cfg
    if cfg.family.callable is not None:
        levels = {level.name: level for level in build(cfg.family.callable)}
        return levels, {name: _seconds(level, tuple(cfg.family.shape), stage) for name, level in levels.items()}
    flops = {v["name"]: v["flops"] for v in stage.describe_levels()}
    seconds = dict(zip(flops, seconds_per_evaluation(stage, 16), strict=True))
    if cfg.family.gaussian:
        flops, seconds = {GAUSSIAN: 1.0, **flops}, {GAUSSIAN: 0.0, **seconds}
    return {name: Level(name, lambda x, logsnr: x, f) for name, f in flops.items()}, seconds


def _seconds(level: Level, shape: tuple[int, ...], stage: Stage, batch: int = 16) -> float:
    x, times = torch.zeros(batch, *shape, device=stage.device), []
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            level.denoise(x, torch.zeros(batch, device=stage.device)).sum().item()
            times.append(time.perf_counter() - started)
    return min(times[1:]) / batch


_in_worker: dict[str, Any] = {}  # a worker process reuses its runner and the last noise between tasks


def run_in_worker(stage: Stage, dynamics: str, settings: list[SamplerSetting]) -> None:
    """Run some settings of one dynamics, or only its reference if there are none, and cache the results."""
    if side_by_side.stop_requested():
        raise Interrupted("stopped; finished batches are saved")
    if not _in_worker:
        _in_worker.update(runner=make_runner(stage)[0], noise=NoiseCache())
        _in_worker["runner"].warm_up()
    reference = _in_worker["runner"].reference(dynamics, side_by_side.stop_requested)
    for setting in settings:
        _in_worker["runner"].run(setting, reference, _in_worker["noise"], side_by_side.stop_requested)


def run_all(
    stage: Stage, runner: Runner, settings: Sequence[SamplerSetting], label: str = "compare"
) -> list[dict[str, Any]]:
    """Run all settings and return the result of Runner.read for each; can be stopped between batches.

    Finished settings are read from the cache, and run again if their file is damaged. Several processes share the
    batches.
    """
    found: dict[SamplerSetting, dict[str, Any]] = {}
    for _ in range(3):
        run_missing(stage, runner, [s for s in settings if s not in found], label)
        for setting in settings:
            try:
                found[setting] = found.get(setting) or runner.read(setting)
            except Damaged as error:
                discard_damaged(error)
        if len(found) == len(set(settings)):
            break
    return [found.get(setting) or runner.read(setting) for setting in settings]


def run_missing(stage: Stage, runner: Runner, settings: Sequence[SamplerSetting], label: str) -> None:
    """Run the settings that are not in the cache; progress and time left are in expected FLOPs."""
    parallel.remove_parts(runner.cache)
    n, largest = len(runner.seeds), list(runner.levels.values())[-1]
    dynamics = sorted({s.dynamics for s in settings})
    reference_cost = len(runner.reference_grid.logsnr) * largest.flops * runner.num_reference / 1e9
    costs = {s: runner.build(s).expected_flops(s.evaluations(runner.process)) * n / 1e9 for s in settings}
    missing = [s for s in settings if not runner.is_done(s)]
    for d in dynamics:  # before other processes wait for this one
        try:
            if runner.reference_path(d).is_file():
                check_zip(runner.reference_path(d), "remove it")
        except Damaged as error:
            discard_damaged(error)
    unmade = [d for d in dynamics if not runner.reference_path(d).is_file()]
    done, total = 0.0, sum(costs[s] for s in missing) + reference_cost * len(unmade)
    workers = side_by_side.worker_count(stage.cfg.workers, stage.device, len(settings))
    with bar(label, int(total), unit="GFLOP") as progress:

        def advance(setting: SamplerSetting | None, by_batch: bool = False) -> None:
            nonlocal done
            cost, images = (reference_cost, runner.num_reference) if setting is None else (costs[setting], n)
            done += cost / -(-images // runner.batch) if by_batch else cost
            progress(int(done), int(total))

        if workers > 1:
            todo = [(stage, d, []) for d in unmade]
            side_by_side.run(run_in_worker, todo, workers, stage.should_stop, lambda _: advance(None))
            todo = [(stage, s.dynamics, [s]) for s in sorted(missing, key=lambda s: -costs[s])]
            side_by_side.run(run_in_worker, todo, workers, stage.should_stop, lambda t: advance(t[2][0]))
        else:
            if parallel.world() > 1:  # in each round all processes then have about the same cost
                missing.sort(key=lambda s: -costs[s])
            parallel.ask(help_measure, _facts(runner), dynamics, missing)
            measure(stage, runner, dynamics, missing, lambda setting: advance(setting, by_batch=True))


def measure(
    stage: Stage,
    runner: Runner,
    dynamics: Sequence[str],
    settings: Sequence[SamplerSetting],
    advance: Callable[[SamplerSetting | None], object] = lambda _: None,
) -> None:
    """Run references and settings and cache the results; collective (parallel.py).

    advance(setting), or advance(None) for a reference, is called after each of its batches.
    """
    if settings:
        runner.warm_up()
    references = {d: runner.reference(d, stage.should_stop, lambda _: advance(None)) for d in dynamics}
    if settings and parallel.agree(stage.should_stop()):
        raise Interrupted("stopped; finished batches are saved")
    noise = NoiseCache()
    jobs = [runner.setting_job(s, references[s.dynamics], noise) for s in settings]
    parallel.run_jobs(jobs, stage.should_stop, lambda j: advance(settings[j]))


def _facts(runner: Runner) -> dict[str, Any]:
    """The fields of a runner that can be sent to another process."""
    own = ("levels", "extractor", "device")
    facts = {f.name: getattr(runner, f.name) for f in fields(runner) if f.name not in own}
    return {**facts, "names": list(runner.levels), "distances": runner.extractor is not None}


def help_measure(stage: Stage, facts: dict[str, Any], dynamics: list[str], settings: list[SamplerSetting]) -> None:
    """Run `measure` in a process that helps the main one, with levels and extractor on its own device."""
    if _in_worker.get("stage") is not stage:  # another job of a sweep has other levels
        _in_worker.clear()
        _in_worker.update(stage=stage, levels=load_levels(stage)[0])
    if facts["distances"] and "extractor" not in _in_worker:
        _in_worker["extractor"] = make_extractor(stage)
    levels = {name: _in_worker["levels"][name] for name in facts["names"]}
    extractor = _in_worker["extractor"] if facts["distances"] else None
    shared = {name: value for name, value in facts.items() if name not in ("names", "distances")}
    measure(stage, Runner(levels=levels, extractor=extractor, device=stage.device, **shared), dynamics, settings)
