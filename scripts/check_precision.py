"""Levels -> precision.json, precision.png: rounding error of bf16 per level and noise level, and its effect on errors.

The settings on the frontiers of compare.csv are run in both precisions with the same seeds and paths.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlem_diffusion.comparison import speedup
from mlem_diffusion.comparison.settings import SamplerSetting, row_of, setting_from
from mlem_diffusion.comparison.table import BASELINES, describe, read_rows, trusted
from mlem_diffusion.experiment import sampler_runs
from mlem_diffusion.experiment.provenance import check_written
from mlem_diffusion.experiment.stage import Config, Stage, bar, entry_point, merged, run_stage
from mlem_diffusion.figures.rounding import plot_precision
from mlem_diffusion.files import write_json
from mlem_diffusion.gamma.denoising_errors import noise_levels
from mlem_diffusion.models.family import load_family
from mlem_diffusion.models.rounding import precision_errors
from mlem_diffusion.statistics import frontier

PRECISIONS = ("float32", "bf16")
MOST = 6  # settings per kind and dynamics


def compared(cfg: Config) -> int:
    """The number of samples that are compared with the reference."""
    return min(cfg.compare.num_samples, cfg.compare.num_reference)


def frontier_settings(rows: list[dict[str, Any]]) -> list[SamplerSetting]:
    """For each dynamics, baselines on their frontier and multilevel settings on theirs, cheap to expensive."""
    chosen: dict[SamplerSetting, None] = {}
    for dynamics in dict.fromkeys(row["dynamics"] for row in rows):
        for is_baseline in (True, False):
            mine = [
                r
                for r in rows
                if r["dynamics"] == dynamics and (r["estimator"] in BASELINES) == is_baseline and trusted(r)
            ]
            best = frontier(mine, "gflops_realised", "error")
            spread = np.unique(np.round(np.linspace(0, len(best) - 1, min(MOST, len(best)))).astype(int))
            chosen |= {setting_from(best[i]): None for i in spread}
    return list(chosen)


def run_in(stage: Stage, precision: str, settings: list[SamplerSetting]) -> list[speedup.Measurement]:
    """Run the settings in one precision, against the reference in the same precision, without distances."""
    whole = stage.cfg
    changed: Any = merged(whole, {"precision": precision, "compare": {"num_samples": compared(whole)}})
    stage.cfg = changed
    stage.cfg.metrics = {"_target_": None}
    try:
        runner, _ = sampler_runs.make_runner(stage)
        found = sampler_runs.run_all(stage, runner, settings, precision)
    finally:
        stage.cfg = whole
    return [
        speedup.Measurement(row_of(s, f["costs"]), f["errors"], f["clusters"])
        for s, f in zip(settings, found, strict=True)
    ]


def finite_in_both(measured: dict[str, list[speedup.Measurement]]) -> dict[str, list[speedup.Measurement]]:
    """The measurements without the settings that diverged in either precision."""
    good = [all(s.row["error"] is not None for s in pair) for pair in zip(*measured.values(), strict=True)]
    return {p: [s for s, fine in zip(found, good, strict=True) if fine] for p, found in measured.items()}


def side_by_side_rows(exact: list[speedup.Measurement], rounded: list[speedup.Measurement]) -> list[dict[str, Any]]:
    """Mean squared errors of every setting in both precisions, with the standard error of their paired difference."""
    out = []
    for a, b in zip(exact, rounded, strict=True):
        change = b.errors - a.errors
        out.append({
            "dynamics": a.row["dynamics"], "setting": describe(a.row), "gflops": a.row["gflops_expected"],
            "error_float32": float(a.errors.mean()), "error_bf16": float(b.errors.mean()),
            "change": float(change.mean()), "change_se": float(change.std(ddof=1) / math.sqrt(len(change))),
        })  # fmt: skip
    return out


def speedups_of(settings: list[speedup.Measurement], stage: Stage) -> dict[str, Any]:
    """{dynamics: {"paper" | "any": {"max", "lower95"} in FLOPs at equal error}} within these settings."""
    found = speedup.speedups(settings, seed=stage.cfg.compare.seed, replicates=stage.cfg.compare.bootstrap)
    return {
        dynamics: {kind: {k: entry[kind]["error"]["flops"][k] for k in ("max", "lower95")} for kind in ("paper", "any")}
        for dynamics, entry in found.items()
    }


def work(stage: Stage) -> None:
    cfg, images = stage.cfg, stage.data()
    metadata = stage.levels_of(images)
    table = stage.find("compare.csv")
    check_written(table.parent, stage.read_provenance(), table.name)
    rows = read_rows(table) if table.is_file() else []
    inputs = {"levels": [m["weights_sha256"] for m in metadata], "rows": rows}
    fingerprint = stage.fingerprint(("process", "gamma", "compare"), **inputs)
    if stage.finished(fingerprint, ["precision.json", "precision.png"]):
        return
    stage.catch_signals()
    exact, rounded = (
        load_family(stage.checkpoints, cfg.family.widths, stage.device, p, compile=cfg.compile, batch=cfg.gamma.batch)
        for p in PRECISIONS
    )
    logsnr = noise_levels(stage.process(), cfg.gamma.noise_levels)
    with bar("rounding", len(logsnr), unit="noise level") as progress:
        found = precision_errors(
            exact, rounded, stage.held_out(images), logsnr, cfg.gamma.seed, cfg.gamma.batch, progress
        )
    plot_precision(found, stage.results / "precision.png", precision="bf16", title=cfg.title)
    for k, name in enumerate(found.names):
        ratio = found.ratio()[k]
        print(
            f"{name}: the rounding error of bf16 is at most {ratio.max():.2g} of the difference to the level below "
            f"(log-SNR {logsnr[int(ratio.argmax())]:.3g}), {np.median(ratio):.2g} in the median."
        )
    result: dict[str, Any] = found.to_json()
    if rows:
        settings = frontier_settings(rows)
        measured = finite_in_both({p: run_in(stage, p, settings) for p in PRECISIONS})
        result["settings"] = side_by_side_rows(measured["float32"], measured["bf16"])
        result["samples"] = compared(cfg)
        result["speedup"] = {p: speedups_of(measured[p], stage) for p in PRECISIONS}
        moved = max(result["settings"], key=lambda row: abs(row["change"]) / row["error_float32"])
        print(
            f"{len(settings)} settings: bf16 changes the error by at most "
            f"{100 * abs(moved['change']) / moved['error_float32']:.2g}% ({moved['setting']})."
        )
    else:
        print("compare.csv is missing, so no settings were run in both precisions (run make sample-compare first).")
    write_json(stage.results / "precision.json", result)
    stage.record(fingerprint, ["precision.json", "precision.png"], images.manifest)


@entry_point("check_precision")
def main(cfg: Config) -> None:
    run_stage("check_precision", cfg, work)


if __name__ == "__main__":
    main()
