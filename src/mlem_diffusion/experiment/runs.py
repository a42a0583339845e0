"""Levels and runner of an experiment, and its settings run by several ranks or workers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import parallel
from ..comparison.features import Extractor
from ..comparison.runner import Runner
from ..comparison.settings import GAUSSIAN, SamplerSetting
from ..diffusion.level import Level
from ..errors import Interrupted, UserError
from ..files import cached, expect_content
from ..models.family import level_name, load_family
from ..models.gaussian import fit_gaussian, load_gaussian
from ..multilevel.plan import Plan, load_plans
from .progress import bar

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------- levels


def load_levels(exp: Any) -> dict[str, Level]:
    """The levels by name, cheap to expensive."""
    cfg = exp.cfg
    if cfg.family.callable is not None:
        return {level.name: level for level in exp.build(cfg.family.callable)}
    options = {"device": exp.device, "precision": cfg.precision, "compile": cfg.compile, "batch": cfg.compare.batch}
    found = load_family(exp.checkpoints, map(level_name, cfg.family.widths), **options)
    if cfg.family.gaussian:
        gauss = gaussian_level(exp)
        if gauss.flops < found[0].flops:  # useless if it costs more than the first network
            found.insert(0, gauss)
    return {level.name: level for level in found}


def gaussian_level(exp: Any) -> Level:
    """The linear Gaussian denoiser of the training images: the published one, or fitted once and cached."""
    rank, found = exp.cfg.family.gaussian_rank, (exp.published or {}).get("gaussian")
    if found is not None and found["asked_rank"] == rank:
        return load_gaussian(exp.checkpoints / found["file"], exp.device).as_level(GAUSSIAN)
    images = exp.images_if_needed()
    if images is None:
        raise UserError(
            f"No Gaussian level with family.gaussian_rank={rank} is published, so it must be fitted to the training "
            "images: prepare them (make data), or set family.gaussian=false."
        )
    path = exp.results / "cache" / f"gauss-{images.manifest['sha256'][:12]}-{rank}.safetensors"

    found = made_once(
        path,
        lambda p: load_gaussian(p, exp.device),
        lambda p: fit_gaussian(images.images[images.train()], rank).save(p),
    )
    return found.as_level(GAUSSIAN)


def made_once(path: Path, read: Callable[[Path], T], make: Callable[[Path], object]) -> T:
    """read(path) on every rank; rank 0 makes the file first if it is missing or damaged."""
    found = cached(path, read, lambda: make(path)) if parallel.is_main() else None
    parallel.barrier()
    return read(path) if found is None else found


# ------------------------------------------------------------------------------------------------------- runner


def make_extractor(exp: Any) -> Extractor | None:
    """The configured feature extractor, on this device if it supports devices; None without distances."""
    target = exp.cfg.metrics.get("_target_")
    if target is None:
        return None
    own = target.rpartition(".")[2] in ("light", "inception")
    return exp.build(exp.cfg.metrics, **({"device": str(exp.device)} if own else {}))


def check_enough(extractor: Extractor, n: int, shape: Sequence[int]) -> None:
    """Raise UserError before sampling if n images are too few for a Frechet distance with this extractor."""
    dimensions = extractor.features(torch.zeros(1, *shape, dtype=torch.uint8)).shape[1]
    if n <= dimensions:
        raise UserError(
            f"compare.num_samples={n} images are too few for {extractor.name}, which has {dimensions} features, since "
            f"the covariance would be singular: set compare.num_samples={dimensions + 1} or more, or metrics=none."
        )


def check_levels(exp: Any, name: str, content: dict[str, Any], target: str) -> None:
    """Raise UserError if an artefact was not made with the current levels."""
    if exp.identity is not None and (noted := content.get("made_with")) != exp.identity:
        known = (noted or {}).get("levels", {})
        names = [level for level, sha256 in exp.identity["levels"].items() if known.get(level) != sha256]
        what = f"other levels than the current ones ({', '.join(names)} differ)" if names else "other images"
        raise UserError(f"{name} was made with {what}: run {target} EXPERIMENT={exp.cfg.name} again.")


def used_gamma(exp: Any) -> float:
    """gamma of the constant probabilities: the number in the configuration, or the measured value of these levels."""
    if exp.cfg.compare.gamma != "auto":
        try:
            return float(exp.cfg.compare.gamma)
        except ValueError as error:
            raise UserError(f"compare.gamma = {exp.cfg.compare.gamma} is neither a number nor auto.") from error
    hint = "run make measure-gamma with the same EXPERIMENT first, or set compare.gamma"
    content = exp.read("gamma.json", hint)
    check_levels(exp, "gamma.json", content, "make measure-gamma")
    with expect_content(exp.results / "gamma.json", hint):
        found = [content["estimates"][name]["gamma"] for name in ("differences", "to_largest", "loss_fit")]
    finite = [float(gamma) for gamma in found if gamma is not None]
    if not finite:
        raise UserError("No estimate in gamma.json is finite; set compare.gamma to a number.")
    return finite[0]


def known_plans(exp: Any) -> dict[str, Plan]:
    """The plans of make optimise by id; none if there are none, or if they are not wanted."""
    path = exp.results / "plans.json"
    if exp.cfg.compare.plans == "none" or not path.is_file():
        return {}
    plans, content = load_plans(path)
    check_levels(exp, "plans.json", content, "make optimise")
    return plans


def make_runner(exp: Any, select: bool) -> Runner:
    """The runner on the seeds of the comparison, or (select) on those that select plans, without distances."""
    c, o, levels = exp.cfg.compare, exp.cfg.optimise, exp.levels()
    extractor = None if select else make_extractor(exp)
    if extractor is not None and exp.images_if_needed() is None:  # for functions there is nothing to compare with
        moments = (exp.published or {}).get("statistics") or {}
        extractor = extractor if moments.get("name") == extractor.name else None
    if extractor is not None:
        check_enough(extractor, c.num_samples, exp.shape)
    first, count = (o.seed, o.num_select) if select else (c.seed, c.num_samples)
    costs = {name: level.flops for name, level in levels.items()}  # that of the Gaussian level depends on its rank
    facts = {"levels": exp.identity or exp.plain("family"), "costs": costs, "device": exp.device.type}
    key = exp.fingerprint(("process", "precision"), **facts, extractor=extractor and extractor.key)
    return Runner(
        levels=levels, process=exp.process, shape=exp.shape, seeds=list(range(first, first + count)),
        gamma=2.5 if select else used_gamma(exp),  # the selection runs no setting with constant probabilities
        num_reference=count if select else min(c.num_reference, count), batch=c.batch, device=exp.device,
        extractor=extractor, cache=exp.results / "cache", key=key, grid_images=c.grid_images,
        plans={} if select else known_plans(exp), reference_steps=o.reference_steps if select else None,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- settings

_in_worker: dict[Any, Runner] = {}  # a worker process reuses its runner between tasks


def worker_count(exp: Any, tasks: int) -> int:
    """The number of worker processes; "auto": one per CPU core without a GPU and without torchrun, else one."""
    if parallel.world() > 1:
        return 1
    if exp.cfg.workers != "auto":
        return int(exp.cfg.workers)
    return 1 if exp.device.type != "cpu" else max(1, min(tasks, torch.get_num_threads()))


def run_all(exp: Any, runner: Runner, settings: Sequence[SamplerSetting], label: str) -> list[Any]:
    """Run all settings and return the results in order; Runner.read measures damaged ones again."""
    run_missing(exp, runner, list(dict.fromkeys(settings)), label)
    found = {setting: runner.read(setting) for setting in dict.fromkeys(settings)}
    return [found[setting] for setting in settings]


def run_missing(exp: Any, runner: Runner, settings: Sequence[SamplerSetting], label: str) -> None:
    """Run the references, then the settings that are not in the cache; progress and time left are in FLOPs."""
    dynamics = sorted({s.dynamics for s in settings})
    references = parallel.mine([task for d in dynamics for task in runner.reference_tasks(d)])
    missing = [s for s in settings if not runner.is_done(s)]  # neighbours share noise
    if worker_count(exp, len(missing)) > 1 or parallel.world() > 1:  # for an even end
        missing.sort(key=lambda s: -runner.expected_flops(s))
    missing = parallel.mine(missing)
    parallel.barrier()  # all ranks have looked, from the same files, before one of them writes
    batches = max(1, -(-runner.num_reference // runner.batch))
    costs = [[runner.reference_flops(d) / batches for d, _ in references], [runner.expected_flops(s) for s in missing]]
    done, total = 0.0, sum(map(sum, costs)) / 1e9
    with bar(label, int(total), unit="GFLOP") as progress:
        for tasks, prices in zip((references, missing), costs, strict=True):
            workers = worker_count(exp, len(tasks))
            distances = runner.extractor is not None
            items = [(exp, _for_worker(runner, task) if workers > 1 else runner, task, distances) for task in tasks]
            if items and workers == 1:
                runner.warm_up()
            for index, _ in parallel.run(run_task, items, workers, exp.should_stop):
                done += prices[index] / 1e9
                progress(int(done), int(total))
            parallel.barrier()


def run_task(item: tuple[Any, Runner, Any, bool]) -> None:
    """Measure one setting, or one batch of a reference given as (dynamics, number); with or without distances."""
    exp, runner, task, distances = item
    if exp.should_stop():
        raise Interrupted("stopped; finished work is saved")
    if not runner.levels:  # in a worker
        runner = _rebuilt(exp, runner, distances)
    if isinstance(task, SamplerSetting):
        runner.measure(task, exp.should_stop)
    else:
        runner.measure_reference(*task)


def _for_worker(runner: Runner, task: Any) -> Runner:
    """The runner without what a worker rebuilds, and with the task's plan only."""
    plan = getattr(task, "plan", "")
    return replace(runner, levels={}, extractor=None, plans={plan: runner.plans[plan]} if plan else {})


def _rebuilt(exp: Any, small: Runner, distances: bool) -> Runner:
    """The runner with levels and extractor again; the worker keeps it for its next task."""
    key = (exp.results, exp.name, small.key)
    if key not in _in_worker:
        _in_worker.clear()
        extractor = make_extractor(exp) if distances else None
        _in_worker[key] = replace(small, levels=exp.levels(), extractor=extractor, plans={})
        _in_worker[key].warm_up()
    _in_worker[key].plans.update(small.plans)
    return _in_worker[key]
