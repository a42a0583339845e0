"""Trained levels -> results/<experiment>/gamma.json and gamma.png: error against FLOPs, and the exponent."""

from __future__ import annotations

from typing import Any

import common
import hydra
import numpy as np
from omegaconf import DictConfig

from mlem_diffusion.checkpoint import write_json
from mlem_diffusion.errors import UserError
from mlem_diffusion.evaluate import denoising_errors, noise_levels
from mlem_diffusion.family import load_family, read_metadata
from mlem_diffusion.plot_gamma import plot_gamma
from mlem_diffusion.scaling import LevelErrors, estimate, hierarchy_warnings
from mlem_diffusion.tracking import Tracker


def measure(stage: common.Stage, images: Any, snapshot: int | None, label: str) -> LevelErrors:
    """Errors of the family at one training length on held-out images."""
    cfg, process = stage.cfg, stage.process()
    metadata = read_metadata(stage.checkpoints, cfg.family.widths)
    levels = load_family(stage.checkpoints, cfg.family.widths, stage.device, "float32", snapshot, compile="off")
    held_out = stage.held_out(images)
    logsnr = noise_levels(process, cfg.gamma.noise_levels)
    with common.bar(label, len(logsnr), unit="noise level") as progress:
        loss, previous, largest = denoising_errors(levels, held_out, logsnr, cfg.gamma.seed, cfg.gamma.batch, progress)
    seen = [m["images"] if snapshot is None else m["snapshots"][snapshot]["images"] for m in metadata]
    return LevelErrors(
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


def work(stage: common.Stage) -> None:
    cfg, images = stage.cfg, stage.data()
    metadata = stage.levels_of(images)
    if len(metadata) < 3:
        raise UserError("gamma needs at least three levels (family.widths), better seven.")
    fingerprint = stage.fingerprint(("process", "gamma"), levels=[m["weights_sha256"] for m in metadata])
    if stage.finished(fingerprint, ["gamma.json", "gamma.png"]):
        return
    lengths = []
    for i in range(min(len(m["snapshots"]) for m in metadata)):
        errors = measure(stage, images, i, f"training length {i + 1}")
        found = estimate(errors, seed=cfg.gamma.seed, bootstrap=cfg.gamma.bootstrap)
        fraction = round(errors.images[0] / metadata[0]["images"], 3)
        lengths.append({"fraction": fraction, "images": errors.images, **found, "warnings": hierarchy_warnings(errors)})
    last = lengths[-1]
    for entry in lengths:  # the last length stands at the top level already
        entry.pop("per_noise_level", None) if entry is not last else None
    result = {k: v for k, v in last.items() if k not in ("fraction", "images")}
    result |= {
        "unit": "FLOPs",
        "pooling": "mean squared error of the drift in log-SNR: weights alpha^2 d(logsnr) over the sampler's range",
        "weights_used": "EMA",
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
    print(f"harder than Monte Carlo (gamma > 2): {result['htmc']}. {result.get('htmc_reason', '')}")
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    stage.record(fingerprint, images.manifest)


def cost(stage: common.Stage) -> list[tuple[str, float, float]]:
    levels, seconds = stage.describe_levels(), common.seconds_per_evaluation(stage, 16)
    count = len(stage.cfg.train.snapshots) * stage.cfg.gamma.images * stage.cfg.gamma.noise_levels
    return [(f"evaluate {v['name']}", v["flops"] * count, s * count) for v, s in zip(levels, seconds, strict=True)]


@hydra.main(version_base=None, config_path=common.CONFIGS, config_name="measure_gamma")
def main(cfg: DictConfig) -> None:
    common.run("measure_gamma", cfg, work, cost)


if __name__ == "__main__":
    main()
