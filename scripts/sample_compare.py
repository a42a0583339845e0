"""Levels and gamma -> compare.csv, compare.png, speedup.json, best.json, grids: EM, ML-EM and baselines compared.

All settings run on the same seeds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlem_diffusion import parallel
from mlem_diffusion.comparison import speedup
from mlem_diffusion.comparison.features import Extractor
from mlem_diffusion.comparison.frechet import FeatureMoments, distance_floor, feature_moments, frechet_distance
from mlem_diffusion.comparison.runner import Runner
from mlem_diffusion.comparison.settings import SamplerSetting, best_setting, row_of, setting_of, settings_of
from mlem_diffusion.comparison.table import BASELINES, describe, for_figures, key_of, write_rows
from mlem_diffusion.comparison.verdicts import verdicts
from mlem_diffusion.data.images import ImageData
from mlem_diffusion.data.pixels import to_uint8
from mlem_diffusion.diffusion.step_rules import STEP_RULES
from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment import sampler_runs, side_by_side
from mlem_diffusion.experiment.stage import Config, Stage, bar, entry_point, run_stage, to_plain
from mlem_diffusion.experiment.tracking import Tracker
from mlem_diffusion.figures.comparison import plot_compare
from mlem_diffusion.figures.image_grid import comparison_grid
from mlem_diffusion.files import cached, expect_content, read_arrays, sha256_of, write_arrays, write_json
from mlem_diffusion.multilevel.plan import Plan, load_plans
from mlem_diffusion.statistics import frontier

OUTPUTS = ["compare.csv", "compare.png", "speedup.json"]


def real_moments(stage: Stage, runner: Runner, images: ImageData | None) -> tuple[FeatureMoments, float | None]:
    """Feature moments of all training images, and the real-against-real distance for as many images as are sampled.

    Without images, both are the published ones. The distance is None if it is unknown.
    """
    assert runner.extractor is not None
    if images is not None:
        real = real_features(stage, images, runner.extractor, runner.cache)
        return feature_moments(real), distance_floor(real, stage.cfg.compare.num_samples, stage.cfg.compare.seed)
    found = sampler_runs.published_moments(stage, runner.extractor)
    if found is None:
        raise UserError("This family has no training images, so there is no distance to them: set metrics=none.")
    return found


def real_features(stage: Stage, images: ImageData, extractor: Extractor, cache: Path) -> np.ndarray:
    """Features [N, D] of all training images, cached because Inception needs hours for them on a CPU."""
    key = hashlib.sha256(f"{images.manifest['sha256']} {extractor.key}".encode()).hexdigest()[:20]
    path = cache / f"real-{key}.npz"

    def make() -> None:
        parallel.ask(help_extract, path)
        extract(stage, images, extractor, path)

    return cached(path, lambda p: read_arrays(p, "run make sample-compare again")["features"], make)


def extract(stage: Stage, images: ImageData, extractor: Extractor, path: Path, chunk: int = 1024) -> None:
    """Write the features of the real images to a file; collective (parallel.py)."""
    train = images.train()

    def work(i: int) -> parallel.Arrays:
        return {"features": extractor.features(images.images[train[i * chunk : (i + 1) * chunk]]).numpy()}

    def write(arrays: parallel.Arrays) -> None:
        write_arrays(path, arrays, compress=False)

    job, done = parallel.Job(path, -(-len(train) // chunk), work, write), 0
    with bar("features of the real images", len(train)) as progress:

        def advance(_: int) -> None:
            nonlocal done
            done += 1
            progress(min(done * chunk, len(train)), len(train))

        parallel.run_jobs([job], stage.should_stop, advance)


def help_extract(stage: Stage, path: Path) -> None:
    """Run `extract` in a process that helps the main one."""
    extractor = sampler_runs.make_extractor(stage)
    assert extractor is not None
    extract(stage, stage.data(), extractor, path)


@dataclass(frozen=True)
class Planned:
    """The content of plans.json.

    plans: by id; settings: those that run the plans; selected: errors on the selection seeds, also of single levels;
    flops: cost of the calibration; unit: the cost that plans minimise, "flops" or "seconds".
    """

    plans: dict[str, Plan] = field(default_factory=dict)
    settings: list[SamplerSetting] = field(default_factory=list)
    selected: dict[SamplerSetting, float] = field(default_factory=dict)
    flops: float | None = None
    unit: str = "flops"


def read_planned(stage: Stage) -> Planned:
    """The content of plans.json, empty without the file; UserError if plans and comparison share sample seeds."""
    path = stage.find("plans.json")
    if stage.cfg.compare.plans == "none" or not path.is_file():
        return Planned()
    plans, content = load_plans(path)
    with expect_content(path, "run make optimise again"):
        used = set(map(int, content["seeds_used"]))
    if used & set(range(stage.cfg.compare.seed, stage.cfg.compare.seed + stage.cfg.compare.num_samples)):
        raise UserError(
            "The plans were selected on sample seeds that the comparison would use too: change compare.seed or "
            "compare.num_samples."
        )
    with expect_content(path, "run make optimise again"):
        alone = {
            SamplerSetting(e["dynamics"], e["step_rule"], "single", (e["level"],), e["steps"]): e["selected_error"]
            for e in content["alone"]
        }
        settings = [setting_of(plans[e["id"]], e["dynamics"], e["step_rule"]) for e in content["plans"]]
        selected = {s: e["selected_error"] for s, e in zip(settings, content["plans"], strict=True)}
        unit = content.get("cost_unit", "flops")
        return Planned(plans, settings, alone | selected, content["calibration"]["flops"], unit)


def work(stage: Stage) -> None:
    cfg = stage.cfg
    runner, images = sampler_runs.make_runner(stage)
    plans = sha256_of(stage.find("plans.json")) if runner.plans else None  # their predictions are reported too
    fingerprint = stage.fingerprint(("compare",), runner=runner.key, plans=plans)
    if stage.finished(fingerprint, OUTPUTS):
        return
    stage.catch_signals()
    config: Any = to_plain(cfg.compare)
    planned = read_planned(stage)
    names, beside = sampler_runs.names_of(runner.levels)
    settings = list(dict.fromkeys(settings_of(config, names, runner.process.base_steps, beside) + planned.settings))
    # settings that share noise increments run next to each other
    settings.sort(key=lambda s: (s.dynamics, STEP_RULES[s.dynamics, s.step_rule].clock or "", s.steps))

    # ---- real images: statistics of all training images, and the real-against-real floor -------------------
    statistics, shared = (
        None,
        {
            "seed": runner.seeds[0],
            "num_samples": config["num_samples"],
            "distance": None,
            "distance_name": "",
            "distance_floor": None,
        },
    )
    if runner.extractor is not None:
        statistics, floor = real_moments(stage, runner, images)
        shared |= {"distance_name": runner.extractor.name, "distance_floor": floor}
    elif cfg.metrics.get("_target_") is not None:
        print("sample_compare: no distances, since the images are missing and no matching statistics are published.")
    rows, measured, pictures = [], [], {}
    for setting, found in zip(settings, sampler_runs.run_all(stage, runner, settings), strict=True):
        row = row_of(setting, found["costs"], **shared)
        has_diverged = "diverged" in row
        if statistics is not None:
            if not has_diverged:
                row["distance"] = frechet_distance(found["features"], statistics)
            pictures[key_of(row)] = found["images"]
        if setting.plan:
            plan = runner.plans[setting.plan]
            row |= {"predicted": plan.predicted, "largest_effect": plan.largest_effect}
        if setting in planned.selected:
            row["selected_error"] = planned.selected[setting]
        rows.append(row)
        if has_diverged:
            print(
                f"sample_compare: {describe(row)} diverged in {row['diverged']} of {row['num_samples']} samples, so it "
                "has no error and no distance."
            )
            continue
        measured.append(speedup.Measurement(row, found["errors"], found["clusters"], found.get("features")))

    # ---- artefacts ---------------------------------------------------------------------------------------
    write_rows(rows, stage.results / "compare.csv")
    plot_compare(for_figures(rows), stage.results / "compare.png", title=cfg.title)
    result = speedup.speedups(
        measured, reference=statistics, seed=config["seed"],
        replicates=config["bootstrap"], distance_replicates=config["distance_bootstrap"],
    )  # fmt: skip
    left_out = {dynamics: entry.pop("left_out") for dynamics, entry in result.items()}
    write_json(stage.results / "speedup.json", result)
    if planned.settings:
        found = verdicts(measured, planned.flops, config["seed"], planned.unit)
        write_json(stage.results / "verdicts.json", found)
    if statistics is not None:
        best = {k: v for k, v in best_setting(rows).items() if k != "seed"}
        write_json(stage.results / "best.json", best | {"gamma": runner.gamma, "made_with": runner.made_with})
        for dynamics in result:
            pictures[dynamics, "reference"] = to_uint8(runner.read_reference(dynamics)[: runner.grid_images]).numpy()
            comparison_grid(pick_for_grid(rows, pictures, dynamics), stage.results / "grids" / f"{dynamics}.png")
    with Tracker(stage.results, stage.name, stage.plain(), **cfg.tracking, fresh=True) as tracker:
        for row in rows:
            tracker.log(row)
        for path in [stage.results / "compare.png", *sorted((stage.results / "grids").glob("*.png"))]:
            tracker.image(path.stem, path)
    print_speedups(result)
    count = side_by_side.worker_count(cfg.workers, stage.device, len(settings))
    workers = {"workers": count, "threads_per_worker": side_by_side.threads_per_worker(count)}
    outputs = [*OUTPUTS, *stage.written("verdicts.json", "best.json", "grids/*.png")]
    stage.record(
        fingerprint,
        outputs,
        stage.manifest(images),
        made_with=runner.made_with,
        gamma_used=runner.gamma,
        settings=len(rows),
        left_out=left_out,
        **workers,
    )


def pick_for_grid(rows: list[dict], pictures: dict, dynamics: str) -> list[tuple[str, Any]]:
    """The reference, then three baselines on their frontier, each with the best ML-EM setting of no higher cost."""
    mine = [r for r in rows if r["dynamics"] == dynamics]
    base = frontier([r for r in mine if r["estimator"] in BASELINES], "gflops_realised", "error")
    chosen = [("reference: largest level, finest grid", pictures[dynamics, "reference"])]
    if not base:
        return chosen
    for i in sorted({len(base) // 4, len(base) // 2, (3 * len(base)) // 4}):
        baseline = base[min(i, len(base) - 1)]
        for row in (baseline, best_within(mine, baseline["gflops_realised"])):
            if row is not None:
                label = f"{describe(row)}\n{row['gflops_realised']:.3g} GFLOP, error {row['error']:.2g}"
                chosen.append((label, pictures[key_of(row)]))
    return chosen


def best_within(rows: list[dict], cost: float) -> dict | None:
    ours = [r for r in rows if r["estimator"] not in BASELINES and r["gflops_realised"] <= 1.02 * cost]
    return min(ours, key=lambda r: r["error"]) if ours else None


def print_speedups(result: dict[str, Any]) -> None:
    """Print one line per speed-up."""
    for dynamics, kinds in result.items():
        for kind in ("paper", "any"):
            for measure in ("error", "distance"):
                entry = (kinds.get(kind) or {}).get(measure) or {}
                found = (entry.get("flops") or {}).get("max")
                low = (entry.get("flops") or {}).get("lower95")
                text = "never reaches a baseline" if found is None else f"{found:.2f}x (95% lower bound {low:.2f}x)"
                print(f"{dynamics}, {kind}, FLOPs at equal {measure}: {text}")


def cost(stage: Stage) -> list[tuple[str, float, float]]:
    levels, seconds = sampler_runs.priced_levels(stage)
    config: Any = to_plain(stage.cfg.compare)
    process, out = stage.process(), {}
    gamma = 2.5 if config["gamma"] == "auto" else float(config["gamma"])
    planned = read_planned(stage)
    names, beside = sampler_runs.names_of(levels)
    for s in dict.fromkeys(settings_of(config, names, process.base_steps, beside) + planned.settings):
        estimator, evaluations = s.build(levels, gamma, planned.plans), s.evaluations(process)
        per_level = zip(estimator.levels, estimator.expected_evaluations(evaluations), strict=True)
        time = sum(seconds[level.name] * count for level, count in per_level) * config["num_samples"]
        flops, before = out.get(f"{s.dynamics} {s.estimator} {s.step_rule}", (0.0, 0.0))
        out[f"{s.dynamics} {s.estimator} {s.step_rule}"] = (
            flops + estimator.expected_flops(evaluations) * config["num_samples"],
            before + time,
        )
    largest, count = levels[names[-1]], process.base_steps * min(config["num_reference"], config["num_samples"])
    for d in sorted({key.split()[0] for key in out}):
        out[f"{d} reference"] = count * largest.flops, count * seconds[largest.name]
    return [(what, flops, time) for what, (flops, time) in out.items()]


@entry_point("sample_compare")
def main(cfg: Config) -> None:
    run_stage("sample_compare", cfg, work, cost)


if __name__ == "__main__":
    main()
