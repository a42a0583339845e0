"""Trained levels -> results/<experiment>/gamma.json and gamma.png: error against FLOPs, and the exponent."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment import training_plan
from mlem_diffusion.experiment.stage import Config, Stage, bar, entry_point, run_stage, seconds_per_evaluation
from mlem_diffusion.experiment.tracking import Tracker
from mlem_diffusion.figures.gamma import plot_gamma
from mlem_diffusion.files import write_json
from mlem_diffusion.gamma.denoising_errors import family_pairs, noise_levels, split_by_kind, squared_differences
from mlem_diffusion.gamma.estimate import LevelErrors, estimate, hierarchy_warnings
from mlem_diffusion.gamma.level_quality import differences_fall, overfitting_warnings
from mlem_diffusion.gamma.training_seeds import Repeat, as_json, repeat_pairs, seed_spread
from mlem_diffusion.models.family import identity_of, load_family, load_level, read_metadata, read_repeats

OUTPUTS = ["gamma.json", "gamma.png"]


def measure(stage: Stage, images: Any, snapshot: int, label: str) -> tuple[LevelErrors, list[Repeat]]:
    """Errors of the family and of the levels trained again, at one training length on held-out images."""
    cfg, process = stage.cfg, stage.process()
    metadata = read_metadata(stage.checkpoints, cfg.family.widths)
    levels = load_family(stage.checkpoints, cfg.family.widths, stage.device, "float32", snapshot, compile="off")
    count, again = len(levels), read_repeats(stage.checkpoints, training_plan.repeated(stage))
    for m in again:
        levels.append(load_level(stage.checkpoints / m["name"], m, stage.device, "float32", snapshot, compile="off"))
    index = [list(cfg.family.widths).index(m["width"]) for m in again]
    pairs, own = family_pairs(count), repeat_pairs(count, index)
    held_out = stage.held_out(images)
    logsnr = noise_levels(process, cfg.gamma.noise_levels)
    with bar(label, len(logsnr), unit="noise level") as progress:
        found = squared_differences(
            levels, [*pairs, *(p for group in own for p in group)], held_out, logsnr,
            cfg.gamma.seed, cfg.gamma.batch, progress,
        )  # fmt: skip
    loss, previous, largest = split_by_kind(found, count)
    repeats, start = [], len(pairs)
    for m, level, group in zip(again, index, own, strict=True):
        part = list(found[start : start + len(group)])
        start += len(group)
        to_lower = part[3] if len(part) > 3 else None
        repeats.append(Repeat(level, m["train_seed"], part[0], to_lower, to_upper=part[2], to_largest=part[1]))
    seen = [m["snapshots"][snapshot]["images"] for m in metadata]
    errors = LevelErrors(
        widths=[m["width"] for m in metadata],
        names=[m["name"] for m in metadata],
        flops=np.array([m["flops"] for m in metadata]),
        images=seen,
        logsnr=logsnr,
        weights=process.drift_weights(logsnr),
        loss=loss,
        to_previous=previous,
        to_largest=largest,
    )
    return errors, repeats


def estimates(stage: Stage, errors: LevelErrors, repeats: list[Repeat]) -> dict[str, Any]:
    """gamma at one training length, including the spread between training seeds, and checks of the hierarchy."""
    options = {"seed": stage.cfg.gamma.seed, "bootstrap": stage.cfg.gamma.bootstrap}
    found = estimate(errors, **options)
    if repeats:
        without = {name: e["interval"] for name, e in found["estimates"].items()}
        spread = seed_spread(errors, repeats)
        found = estimate(errors, between=spread.variance, **options)
        found["between_seeds"] = as_json(errors, repeats, spread)
        for name, entry in found["estimates"].items():
            entry["interval_without_seeds"] = without[name]
            entry["log_error_sd_between_seeds"] = found["between_seeds"]["log_error_sd"][name]
    falls, warnings = differences_fall(errors), hierarchy_warnings(errors)
    if falls["violations"]:
        count = f"{len(falls['violations'])} of {falls['checks']} checks"
        warnings.append(f"Squared differences between levels rise with the level in {count} (differences_fall).")
    return {**found, "differences_fall": falls, "warnings": warnings}


def work(stage: Stage) -> None:
    cfg, images = stage.cfg, stage.data()
    metadata = stage.levels_of(images)
    if len(metadata) < 3:
        raise UserError("gamma needs at least three levels (family.widths), better seven.")
    trained = [*metadata, *read_repeats(stage.checkpoints, training_plan.repeated(stage))]
    fingerprint = stage.fingerprint(("process", "gamma"), levels=[m["weights_sha256"] for m in trained])
    if stage.finished(fingerprint, OUTPUTS):
        return
    lengths, losses = [], []
    count = min(len(m["snapshots"]) for m in trained)
    for i in range(count):  # count from the end: the last snapshot of every level is its final one
        errors, repeats = measure(stage, images, i - count, f"training length {i + 1}")
        losses.append(errors.loss @ errors.weights)
        fraction = round(errors.images[0] / metadata[0]["images"], 3)
        lengths.append({"fraction": fraction, "images": errors.images, **estimates(stage, errors, repeats)})
    last = lengths[-1]
    for entry in lengths:  # the top of the file already holds the last length
        entry.pop("per_noise_level", None) if entry is not last else None
    result = {k: v for k, v in last.items() if k not in ("fraction", "images")}
    overfitting = overfitting_warnings([m["name"] for m in metadata], [e["images"] for e in lengths], losses)
    result["warnings"] = [*result["warnings"], *overfitting]
    result |= {
        "unit": "FLOPs",
        "pooling": "mean squared error of the drift in log-SNR: weights alpha^2 d(logsnr) over the sampler's range",
        "weights_used": "EMA",
        "made_with": identity_of(metadata),
        "held_out_images": len(images.held_out()[: cfg.gamma.images]),
        "training_lengths": [{k: v for k, v in e.items() if k != "per_noise_level"} for e in lengths],
    }
    write_json(stage.results / "gamma.json", result)
    plot_gamma(result, stage.results / "gamma.png", cfg.title)
    with Tracker(stage.results, stage.name, stage.plain(), **cfg.tracking, fresh=True) as tracker:
        gammas = {f"gamma/{name}": e["gamma"] for name, e in result["estimates"].items()}
        tracker.log({**gammas, "htmc": result["htmc"]})
        tracker.image("gamma", stage.results / "gamma.png")
    for name, e in result["estimates"].items():
        print(f"gamma ({name}): {e['gamma'] and round(e['gamma'], 2)}, 95% interval {e['interval']}")
    for name, sd in result.get("between_seeds", {}).get("log_error_sd", {}).items():
        print(f"between training seeds, log error ({name}): standard deviation {sd:.2g}, in the interval above")
    print(f"harder than Monte Carlo (gamma > 2): {result['htmc']}. {result.get('htmc_reason', '')}")
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    stage.record(fingerprint, OUTPUTS, images.manifest)


def cost(stage: Stage) -> list[tuple[str, float, float]]:
    seconds = dict(zip(stage.cfg.family.widths, seconds_per_evaluation(stage, 16), strict=True))
    count = len(stage.cfg.train.snapshots) * stage.cfg.gamma.images * stage.cfg.gamma.noise_levels
    levels = training_plan.describe(stage)
    return [(f"evaluate {v['name']}", v["flops"] * count, seconds[v["width"]] * count) for v in levels]


@entry_point("measure_gamma")
def main(cfg: Config) -> None:
    run_stage("measure_gamma", cfg, work, cost, trained_only=True)


if __name__ == "__main__":
    main()
