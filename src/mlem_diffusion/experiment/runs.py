"""The runner of an experiment, its settings run by several ranks or workers, and what a stage would cost."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from .. import parallel
from ..comparison import features, planned
from ..comparison.features import Extractor
from ..comparison.planned import Planned
from ..comparison.runner import Runner
from ..comparison.settings import Measurement, SamplerSetting
from ..diffusion.level import Level
from ..diffusion.step_rules import StepRule, step_rule
from ..errors import UserError
from ..files import expect_content, read_arrays, read_json, write_json
from ..models.family import build_denoiser, level_of
from ..models.gaussian import GaussianDenoiser, default_rank
from ..multilevel.timing import Timing, measure_timing, seconds_per_image
from . import config
from .config import device_model
from .seeds import sample_seeds
from .tracking import bar


def make_extractor(exp: Any) -> Extractor | None:
    """The configured feature extractor, on this device if it supports devices; None without distances."""
    target = exp.cfg.metrics.get("_target_")
    if target is None:
        return None
    own = target.rpartition(".")[2] in ("light", "inception")
    return config.build(exp.cfg.metrics, **({"device": str(exp.device)} if own else {}))


def real_images(exp: Any, extractor: Extractor) -> features.RealImages | None:
    """Feature moments of the training images; without images the published ones."""
    n, seed, images = exp.cfg.compare.num_distance, exp.cfg.compare.seed, exp.images_if_needed()
    n = n or min(features.MIN_IMAGES, (0 if images is None else len(images.train())) // 2)  # for published moments
    if images is None:
        return features.published_images(exp.published, exp.checkpoints, extractor, n, seed)
    rows, most = images.train(), exp.cfg.compare.num_real
    rows = rows if most is None else np.sort(np.random.default_rng(seed).permutation(rows)[:most])
    facts = [images.manifest["sha256"], extractor.key, *([] if most is None else [most, seed])]
    with exp.progress("features of the real images", len(rows)) as progress:
        found = exp.cached(
            "real.npz", facts,
            lambda path: read_arrays(path, "run make sample-compare again")["features"],
            lambda path: features.write_features(path, extractor, images.images, rows, progress),
        )  # fmt: skip
    moments, floor = features.feature_moments(found), features.distance_floor(found, n, seed)
    some = np.random.default_rng(seed).permutation(len(found))[:n]
    return features.RealImages(extractor.name, moments, floor, found[np.sort(some)])


def check_levels(exp: Any, name: str, made_with: dict[str, Any] | None, target: str) -> None:
    """Raise UserError if an artefact was not made with the current levels. made_with: the identity of its levels."""
    if exp.identity is not None and made_with != exp.identity:
        known = (made_with or {}).get("levels", {})
        names = [level for level, sha256 in exp.identity["levels"].items() if known.get(level) != sha256]
        what = f"other levels than the current ones ({', '.join(names)} differ)" if names else "other images"
        raise UserError(f"{name} was made with {what}: run {target} EXPERIMENT={exp.cfg.name} again.")


def own_plans(exp: Any) -> Planned:
    """The plans of make optimise for these levels; those of other levels are left out, which is printed."""
    plans = planned.read_planned(exp.results / "plans.json", exp.cfg.compare)
    if plans.settings and exp.identity is not None and plans.made_with != exp.identity:
        exp.print("plans.json was made with other levels, so its plans are left out; make optimise makes new ones.")
        return Planned()
    return plans


def used_gamma(exp: Any) -> float:
    """gamma of the constant probabilities: the number in the configuration, or the measured value of these levels.
    Of the measured ones the first finite one: differences to the level before and to the largest if they apply, else
    the drops in loss, else the loss; at last those that do not apply."""
    if exp.cfg.compare.gamma != "auto":
        return float(exp.cfg.compare.gamma)
    hint = "run make measure-gamma with the same EXPERIMENT first, or set compare.gamma"
    path = exp.results / "gamma.json"
    with expect_content(path, hint):
        content = read_json(path, hint)
        check_levels(exp, path.name, content.get("made_with"), "make measure-gamma")
        order = ("differences", "to_largest", "drops", "loss_fit")  # earlier results have no drops
        estimates = [content["estimates"][name] for name in order if name in content["estimates"]]
        estimates.sort(key=lambda own: not own.get("applicable", True))
        finite = [(float(own["gamma"]), own.get("applicable", True)) for own in estimates if own["gamma"] is not None]
    if not finite:
        raise UserError("No estimate in gamma.json is finite; set compare.gamma to a number.")
    if not finite[0][1]:
        exp.print(f"gamma = {finite[0][0]:.2f} is from a law that does not apply to these levels: see gamma.json.")
    return finite[0][0]


def gain_densities(exp: Any) -> Mapping[str, Any] | None:
    """The densities of gains by step rule in gains.json (make optimise); None unless it was made with these levels."""
    path, hint = exp.results / "gains.json", "remove it, or run make optimise again"
    if not path.is_file():
        return None
    with expect_content(path, hint):
        content = read_json(path, hint)
        return content["rules"] if content["made_with"] == exp.identity else None


def make_runner(exp: Any, plans: Planned | None = None) -> Runner:
    """The data that settings share: on the seeds of the comparison, with these plans, for both protocols; or (None) on
    those that select plans."""
    c, levels, seeds = exp.cfg.compare, exp.levels(), sample_seeds(exp.cfg)
    settings, select = planned_steps(exp.cfg.optimise), plans is None
    if plans is not None:
        found = planned.by_protocol(exp.cfg.protocol, c, levels, exp.process.base_steps, plans)
        settings = [setting for own in found.values() for setting in own]
    if 0 < c.num_distance < features.MIN_IMAGES:
        text = "say more about their number than about the sampler"
        raise UserError(f"compare.num_distance={c.num_distance}: distances of fewer than {features.MIN_IMAGES} {text}.")
    extractor = None if select or c.num_distance == 0 else make_extractor(exp)
    if extractor is not None and exp.images_if_needed() is None:  # for functions there is nothing to compare with
        moments = (exp.published or {}).get("statistics") or {}
        extractor = extractor if moments.get("name") == extractor.name else None
    costs = {name: level.flops for name, level in levels.items()}  # that of the Gaussian level depends on its rank
    facts = {"levels": exp.identity or exp.plain("family"), "costs": costs, "device": exp.device.type}
    return Runner(
        levels=levels, process=exp.process, shape=exp.shape, seeds=list(seeds.selection if select else seeds.errors),
        gamma=2.5 if select else used_gamma(exp),  # the selection runs no setting with constant probabilities
        num_shared=c.paper.patterns.judge, distance_seeds=seeds.distances, batch=c.batch, device=exp.device,
        extractor=extractor, cache=exp.results / "cache", key=exp.fingerprint(("process", "precision"), **facts),
        grid_images=c.grid_images, conditions=exp.conditions, decode=exp.decode,
        plans={} if plans is None else dict(plans.plans), reference_steps=planned.references_for(settings, exp.process),
        timing=timing(exp, levels, [setting.rule for setting in settings]),
    )  # fmt: skip


def planned_steps(options: Any) -> list[SamplerSetting]:
    """Stand-ins for all that make optimise runs, with the rules and steps of its plans."""
    found = []
    for r in options.rules:
        steps = [*r.steps, *(options.measured.steps if options.measured.costs and r.get("methods") != [] else ())]
        steps += [options.learned.steps] if options.learned.costs and r.get("learn") else []
        found += [SamplerSetting(r.dynamics, r.step_rule, "single", (), count) for count in steps]
    return found


@contextmanager
def sampling_threads(exp: Any) -> Iterator[int]:
    """torch's number of threads in this context: that of a process that samples, which shares the cores."""
    before, workers = torch.get_num_threads(), worker_count(exp, exp.cfg.compare.num_samples)
    torch.set_num_threads(max(1, before // workers))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def timed_where(exp: Any) -> dict[str, Any]:
    """The conditions of the timing: {"batch", "device", "threads"}."""
    with sampling_threads(exp) as threads:
        batch = min(exp.cfg.compare.batch, exp.cfg.compare.num_samples)
        return {"batch": batch, "device": device_model(exp.device), "threads": threads}


def timing(exp: Any, levels: Mapping[str, Level], rules: Iterable[StepRule] = ()) -> Timing:
    """The seconds of all parts of sampling for these rules and those of the optimiser and the comparison, so that both
    use one timing; measured once, before workers use the machine, and then read from the cache."""
    kinds = ("baselines", "stitched", "ml_em")
    own, c = exp.cfg.optimise.rules, exp.cfg.compare
    asked = [*own, *(s for kind in kinds for s in c[kind]), *c.paper.baselines, *c.paper.ml_em, *c.paper.learned]
    chosen = sorted({*rules, *(step_rule(r.dynamics, r.step_rule) for r in asked)}, key=lambda rule: rule.key)
    where, options = timed_where(exp), exp.plain("timing")["timing"]

    def make(path: Path) -> None:
        family, grid = list(levels.values()), exp.process.grid(min(33, exp.process.base_steps))
        with exp.progress("timing", None, "part") as progress, sampling_threads(exp):
            found = measure_timing(family, chosen, grid, exp.path, where["batch"], **options, progress=progress)
        write_json(path, {name: list(values) for name, values in found.parts.items()})

    def read(path: Path) -> Timing:
        with expect_content(path, "run the same command again"):
            content = read_json(path, "run the same command again")
            return Timing({name: (float(median), float(spread)) for name, (median, spread) in content.items()})

    facts = [where, options, [rule.key for rule in chosen], exp.plain("compile", "autotune")]
    return exp.cached("timing.json", facts, read, make)


def timing_record(exp: Any, found: Timing | None) -> dict[str, Any]:
    """The content of timing.json."""
    timed = {} if found is None else found.parts
    parts = {name: {"seconds": median, "log_sd": spread} for name, (median, spread) in timed.items()}
    return {"parts": parts, **timed_where(exp)}


_in_worker: dict[Any, Runner] = {}  # a worker process reuses its runner between tasks


def worker_count(exp: Any, tasks: int) -> int:
    """The number of worker processes; "auto": one per CPU core without a GPU and without torchrun, else one."""
    if parallel.world() > 1:
        return 1
    if exp.cfg.workers != "auto":
        return int(exp.cfg.workers)
    return 1 if exp.device.type != "cpu" else max(1, min(tasks, torch.get_num_threads()))


def run_all(
    exp: Any, runner: Runner, settings: Sequence[SamplerSetting], label: str, distances: bool = False
) -> list[Measurement]:
    """Run the references, then the settings that are not in the cache; the results of all settings, in order. With
    distances, make the features of their samples instead, and no results.
    Progress and time left are in FLOPs. Runner.read measures damaged settings again."""
    dynamics = [] if distances else sorted({s.dynamics for s in settings})
    references = parallel.mine([task for d in dynamics for task in runner.reference_tasks(d)])
    is_done = (lambda s: runner.features_file(s).is_file()) if distances else runner.is_done
    missing = [s for s in dict.fromkeys(settings) if not is_done(s)]  # neighbours share noise
    if worker_count(exp, len(missing)) > 1 or parallel.world() > 1:  # for an even end
        missing.sort(key=lambda s: -runner.expected_flops(s))
    missing = parallel.mine(missing)
    parallel.barrier()  # all ranks have looked, from the same files, before one of them writes
    share = min(1.0, runner.batch / len(runner.seeds))  # a task is one batch of a reference
    gflops = {task: runner.reference_flops(task[0]) * share / 1e9 for task in references}
    more = len(runner.distance_seeds) / len(runner.seeds) if distances else 1
    gflops |= {setting: runner.expected_flops(setting) * more / 1e9 for setting in missing}
    done, total = 0.0, int(sum(gflops.values()))
    small = replace(runner, levels={}, extractor=None, conditions=None, decode=None)  # workers load these themselves
    with bar(label, total, unit="GFLOP") as progress:
        for tasks in (references, missing):
            workers = worker_count(exp, len(tasks))
            items = [(exp, small if workers > 1 else runner, task, distances) for task in tasks]
            for index, _ in parallel.run(run_task, items, workers, exp.should_stop):
                done += gflops[tasks[index]]
                progress(int(done), total)
            parallel.barrier()
    return [] if distances else [runner.read(setting) for setting in settings]


def run_task(item: tuple[Any, Runner, Any, bool]) -> None:
    """Measure one setting, its errors or the features for its distance, or one batch of a reference given as
    (dynamics, number)."""
    exp, runner, task, distances = item
    if not runner.levels:  # in a worker
        key = (exp.results, exp.name, runner.key, distances, *runner.seeds)
        if key not in _in_worker:
            _in_worker.clear()
            extractor = make_extractor(exp) if distances else None
            own = {"conditions": exp.conditions, "decode": exp.decode}
            _in_worker[key] = replace(runner, levels=exp.levels(), extractor=extractor, plans={}, **own)
        _in_worker[key].plans.update(runner.plans)
        runner = _in_worker[key]
    if isinstance(task, SamplerSetting):
        (runner.measure_features if distances else runner.measure)(task, exp.should_stop)
    else:
        runner.measure_reference(*task)


Cost = Callable[[Any, dict[str, Level]], Mapping[str, float]]  # (experiment, levels by name) -> evaluations of each


def estimate(exp: Any, cost: Cost | None) -> str:
    """The resolved configuration and the estimated cost of a stage; without `cost` it evaluates no network."""
    text = f"{OmegaConf.to_yaml(OmegaConf.create(exp.plain()))}\nestimated cost of {exp.name}"
    if cost is None:
        return f"{text}: no network is evaluated; seconds to minutes."
    levels = fresh_levels(exp)
    counts, family = cost(exp, levels), list(levels.values())
    # on a CPU few images: seconds per image hardly depend on their number, and many would take long
    batch = 16 if exp.device.type != "cpu" else max(1, min(16, int(20e9 / family[-1].flops)))
    seconds = seconds_per_image(family, exp.path(range(batch)))
    total = sum(level.flops * counts.get(level.name, 0) for level in family)
    time = sum(each * counts.get(level.name, 0) for level, each in zip(family, seconds, strict=True))
    return f"{text} {total / 1e12:.3f} TFLOP, about {tqdm.format_interval(time)} on {device_model(exp.device)}"


def fresh_levels(exp: Any) -> dict[str, Level]:
    """The levels by name, networks with fresh weights; the Gaussian denoiser knows nothing and has the largest rank."""
    if exp.cfg.family.callable is not None:
        return exp.levels()
    d = math.prod(exp.shape)
    rank = exp.cfg.family.gaussian_rank or default_rank(d)
    values = torch.zeros(exp.shape), torch.eye(d, rank), torch.ones(rank), torch.ones(())
    gauss = GaussianDenoiser(*values).to(exp.device)
    found, unet = [gauss.as_level()] if exp.cfg.family.gaussian else [], exp.plain("unet")["unet"]
    for v in exp.describe_levels():
        network = build_denoiser(v["width"], v["size"], v["data_rms"], unet, v["target"], gauss=gauss)
        found.append(level_of(network, network.to(exp.device).eval(), v))
    return {level.name: level for level in sorted(found, key=lambda level: level.flops)}
