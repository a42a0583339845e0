"""Levels and gamma -> compare.csv, compare.png, speedup.json, best.json and grids: EM, ML-EM and baselines on the same seeds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import common
import hydra
import numpy as np
import side_by_side
from omegaconf import DictConfig, OmegaConf

from mlem_diffusion import speedup
from mlem_diffusion.checkpoint import atomic_write, read_json, write_json
from mlem_diffusion.compare import NoiseCache, Runner, Setting, best_setting, row_of, settings_of
from mlem_diffusion.data import ImageData
from mlem_diffusion.errors import UserError
from mlem_diffusion.extractors import Extractor
from mlem_diffusion.family import load_family
from mlem_diffusion.grids import comparison_grid
from mlem_diffusion.levels import Level
from mlem_diffusion.metrics import (
    distance_floor,
    feature_statistics,
    frechet_distance,
    to_uint8,
)
from mlem_diffusion.plot_compare import plot_compare
from mlem_diffusion.step_rules import STEP_RULES
from mlem_diffusion.tables import describe, frontier, write_rows
from mlem_diffusion.tracking import Tracker

OUTPUTS = ["compare.csv", "compare.png", "speedup.json", "best.json"]


def used_gamma(stage: common.Stage) -> float:
    """gamma of the constant probabilities: the number in the configuration, or as measured."""
    if stage.cfg.compare.gamma != "auto":
        try:
            return float(stage.cfg.compare.gamma)
        except ValueError as error:
            raise UserError(f"compare.gamma = {stage.cfg.compare.gamma} is neither a number nor auto.") from error
    hint = "run make measure-gamma with the same EXPERIMENT first, or set compare.gamma"
    estimates = read_json(stage.find("gamma.json"), hint)["estimates"]
    for name in ("differences", "to_largest", "loss_fit"):
        if estimates[name]["gamma"] is not None:
            return float(estimates[name]["gamma"])
    raise UserError("No estimate in gamma.json is finite; set compare.gamma to a number.")


def make_extractor(stage: common.Stage) -> Extractor:
    """The feature extractor of the configuration, on this device where it takes one."""
    config: Any = OmegaConf.to_container(stage.cfg.metrics, resolve=True)
    if config["_target_"].split(".")[-1] in ("light", "inception"):
        config["device"] = str(stage.device)
    return common.build(config)


def make_runner(stage: common.Stage) -> tuple[Runner, ImageData]:
    """What all settings share, from the artefacts of the stages before; and the images."""
    cfg, images = stage.cfg, stage.data()
    metadata, gamma, extractor = stage.levels_of(images), used_gamma(stage), make_extractor(stage)
    inputs: dict[str, Any] = {"levels": [m["weights_sha256"] for m in metadata], "data": images.manifest["sha256"]}
    inputs |= {"gamma": gamma, "extractor": extractor.key}
    runner = Runner(
        levels={level.name: level for level in load_family(stage.checkpoints, cfg.family.widths, stage.device, cfg.precision)},
        process=stage.process(), gamma=gamma, shape=(3, cfg.data.size, cfg.data.size),
        seeds=list(range(cfg.compare.seed, cfg.compare.seed + cfg.compare.n)),
        n_reference=min(cfg.compare.n_reference, cfg.compare.n), batch=cfg.compare.batch, device=stage.device,
        extractor=extractor, cache=stage.results / "cache", grid_images=cfg.compare.grid_images,
        key=stage.fingerprint(("process", "precision"), **inputs, device=stage.device.type),
    )  # fmt: skip
    return runner, images


def real_features(stage: common.Stage, images: ImageData, runner: Runner) -> np.ndarray:
    """Features [N, D] of all training images, kept in the cache: Inception needs hours for them on a CPU."""
    key = hashlib.sha256(f"{images.manifest['sha256']} {runner.extractor.key}".encode()).hexdigest()[:20]
    path = runner.cache / f"real-{key}.npy"
    if not path.is_file():
        parts, train = [], images.train()
        with common.bar("features of the real images", len(train)) as progress:
            for start in range(0, len(train), 1024):
                part = images.images[train[start : start + 1024]]
                parts.append(runner.extractor.features(part).numpy())
                progress(start + len(part), len(train))
                if start + 1024 < len(train) and stage.should_stop():
                    raise common.Stopped("stopped as asked while extracting the features of the real images")

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.save(file, np.concatenate(parts))

        atomic_write(path, write)
    return np.load(path)


def work(stage: common.Stage) -> None:
    cfg = stage.cfg
    runner, images = make_runner(stage)
    fingerprint = stage.fingerprint(("compare",), runner=runner.key)
    if stage.finished(fingerprint, OUTPUTS):
        return
    stage.catch_signals()
    config: Any = OmegaConf.to_container(cfg.compare, resolve=True)
    settings = settings_of(config, list(runner.levels), runner.process.base_steps)
    # settings that share noise increments run next to each other
    settings.sort(key=lambda s: (s.dynamics, STEP_RULES[s.dynamics, s.step_rule].clock or "", s.steps))

    # ---- real images: statistics of all training images, and the real-against-real floor -------------------
    real = real_features(stage, images, runner)
    statistics, floor = feature_statistics(real), distance_floor(real, config["n"], config["seed"])
    rows, measured, pictures = run_all(stage, runner, settings, statistics, floor)

    # ---- artefacts ---------------------------------------------------------------------------------------
    write_rows(rows, stage.results / "compare.csv")
    plot_compare(rows, stage.results / "compare.png", title=cfg.title)
    result = speedup.speedups(
        measured, reference=statistics, seed=config["seed"],
        replicates=config["bootstrap"], distance_replicates=config["distance_bootstrap"],
    )  # fmt: skip
    left_out = {dynamics: entry.pop("left_out") for dynamics, entry in result.items()}
    write_json(stage.results / "speedup.json", result)
    write_json(
        stage.results / "best.json",
        {k: v for k, v in best_setting(rows).items() if k != "seed"} | {"gamma": runner.gamma},
    )
    for dynamics in result:
        grid_rows = pick_for_grid(rows, pictures, dynamics)
        comparison_grid(grid_rows, stage.results / "grids" / f"{dynamics}.png")
    with Tracker(stage.results, stage.name, stage.plain(), **cfg.tracking, fresh=True) as tracker:
        for row in rows:
            tracker.log(row)
        for path in [stage.results / "compare.png", *sorted((stage.results / "grids").glob("*.png"))]:
            tracker.image(path.stem, path)
    tell(result)
    count = side_by_side.worker_count(cfg.workers, stage.device, len(settings))
    workers = {"workers": count, "threads_per_worker": side_by_side.threads_per_worker(count)}
    stage.record(
        fingerprint, images.manifest, gamma_used=runner.gamma, settings=len(rows), left_out=left_out, **workers
    )


_in_worker: dict[str, Any] = {}  # a worker process keeps its runner and the last noise between tasks


def run_in_worker(stage: common.Stage, dynamics: str, settings: list[Setting]) -> None:
    """Some settings of one dynamics (none: the reference), into the cache of finished settings."""
    if side_by_side.stop_requested():
        raise common.Stopped("stopped as asked; finished settings are kept")
    if not _in_worker:
        _in_worker.update(runner=make_runner(stage)[0], noise=NoiseCache())
        _in_worker["runner"].warm_up()
    reference = _in_worker["runner"].reference(dynamics)
    for setting in settings:
        _in_worker["runner"].run(setting, reference, _in_worker["noise"])


def run_all(stage: common.Stage, runner: Runner, settings: list[Setting], statistics: Any, floor: float) -> tuple:
    """Every setting, with progress and time left by expected FLOPs; stops between settings when asked."""
    n, largest = len(runner.seeds), list(runner.levels.values())[-1]
    dynamics = sorted({s.dynamics for s in settings})
    reference_cost = runner.process.base_steps * largest.flops * runner.n_reference / 1e9
    costs = {s: s.build(runner.levels, runner.gamma).expected_flops(s.evaluations(runner.process)) for s in settings}
    costs = {s: cost * n / 1e9 for s, cost in costs.items()}
    rows, measured, pictures, done = [], [], {}, 0.0
    total = sum(costs.values()) + reference_cost * len(dynamics)
    workers = side_by_side.worker_count(stage.cfg.workers, stage.device, len(settings))
    with common.bar("compare", int(total), unit="GFLOP") as progress:

        def advance(cost: float) -> None:
            nonlocal done
            done += cost
            progress(int(done), int(total))

        if workers > 1:
            todo = [(stage, d, []) for d in dynamics]
            side_by_side.run(run_in_worker, todo, workers, stage.should_stop, lambda _: advance(reference_cost))
            waiting = sorted((s for s in settings if not runner.is_done(s)), key=lambda s: -costs[s])
            todo = [(stage, s.dynamics, [s]) for s in waiting]
            side_by_side.run(run_in_worker, todo, workers, stage.should_stop, lambda t: advance(costs[t[2][0]]))
        else:
            runner.warm_up()
        references, noise, done = {}, NoiseCache(), 0.0
        for d in dynamics:
            progress.tqdm.set_postfix_str(f"reference {d}", refresh=False)
            references[d] = runner.reference(d)
            pictures[d, "reference"] = to_uint8(references[d][: runner.grid_images]).numpy()
            advance(reference_cost)
        for setting in settings:
            if stage.should_stop():
                raise common.Stopped("stopped as asked; finished settings are kept")
            progress.tqdm.set_postfix_str(
                f"{setting.dynamics} {setting.drift} {setting.step_rule} {setting.steps}", refresh=False
            )
            found = runner.run(setting, references[setting.dynamics], noise)
            advance(costs[setting])
            row = row_of(
                setting, found["costs"], seed=runner.seeds[0], n=n, distance=frechet_distance(found["features"], statistics),
                distance_name=runner.extractor.name, distance_floor=floor,
            )  # fmt: skip
            rows.append(row)
            measured.append(speedup.Setting(row, found["errors"], found["clusters"], found["features"]))
            pictures[json.dumps(row, sort_keys=True)] = found["images"]
    return rows, measured, pictures


def pick_for_grid(rows: list[dict], pictures: dict, dynamics: str) -> list[tuple[str, Any]]:
    """The reference, then for three points of the baselines' frontier the baseline and the best ML-EM of no higher cost."""
    mine = [r for r in rows if r["dynamics"] == dynamics]
    base = frontier([r for r in mine if r["drift"] != "ml_em"], "gflops_realised", "error")
    chosen = [("reference: largest level, finest grid", pictures[dynamics, "reference"])]
    if not base:
        return chosen
    for i in sorted({len(base) // 4, len(base) // 2, (3 * len(base)) // 4}):
        baseline = base[min(i, len(base) - 1)]
        for row in (baseline, best_within(mine, baseline["gflops_realised"])):
            if row is not None:
                label = f"{describe(row)}\n{row['gflops_realised']:.3g} GFLOP, error {row['error']:.2g}"
                chosen.append((label, pictures[json.dumps(row, sort_keys=True)]))
    return chosen


def best_within(rows: list[dict], cost: float) -> dict | None:
    ours = [r for r in rows if r["drift"] == "ml_em" and r["gflops_realised"] <= 1.02 * cost]
    return min(ours, key=lambda r: r["error"]) if ours else None


def tell(result: dict[str, Any]) -> None:
    """The speed-ups in words, one line each."""
    for dynamics, kinds in result.items():
        for kind in ("plain", "best"):
            for measure in ("error", "distance"):
                entry = (kinds.get(kind) or {}).get(measure) or {}
                found = (entry.get("flops") or {}).get("max")
                low = (entry.get("flops") or {}).get("lower95")
                text = "never reaches a baseline" if found is None else f"{found:.2f}x (95% lower bound {low:.2f}x)"
                print(f"{dynamics}, {kind} ML-EM, FLOPs at equal {measure}: {text}")


def cost(stage: common.Stage) -> list[tuple[str, float, float]]:
    described = stage.describe_levels()
    seconds = dict(zip((v["name"] for v in described), common.seconds_per_evaluation(stage, 16), strict=True))
    levels = {v["name"]: Level(v["name"], lambda x, logsnr: x, v["flops"]) for v in described}
    config: Any = OmegaConf.to_container(stage.cfg.compare, resolve=True)
    process, out = stage.process(), {}
    gamma = 2.5 if config["gamma"] == "auto" else float(config["gamma"])
    for s in settings_of(config, list(levels), process.base_steps):
        drift, evaluations = s.build(levels, gamma), s.evaluations(process)
        per_level = zip(drift.levels, drift.expected_evaluations(evaluations), strict=True)
        time = sum(seconds[level.name] * count for level, count in per_level) * config["n"]
        flops, before = out.get(f"{s.dynamics} {s.drift} {s.step_rule}", (0.0, 0.0))
        out[f"{s.dynamics} {s.drift} {s.step_rule}"] = (
            flops + drift.expected_flops(evaluations) * config["n"],
            before + time,
        )
    largest, count = described[-1], process.base_steps * min(config["n_reference"], config["n"])
    for d in sorted({key.split()[0] for key in out}):
        out[f"{d} reference"] = count * largest["flops"], count * seconds[largest["name"]]
    return [(what, flops, time) for what, (flops, time) in out.items()]


@hydra.main(version_base=None, config_path=common.CONFIGS, config_name="sample_compare")
def main(cfg: DictConfig) -> None:
    common.run("sample_compare", cfg, work, cost)


if __name__ == "__main__":
    main()
