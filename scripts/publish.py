"""A trained family -> checkpoints/<experiment>/published/: bf16 weights, statistics of the images, model card."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sample_compare
import torch
from train_levels import TRAINING

from mlem_diffusion.comparison.frechet import distance_floor, feature_moments, save_moments
from mlem_diffusion.data.images import ImageData
from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment import sampler_runs, training_plan
from mlem_diffusion.experiment.stage import (
    Config,
    Stage,
    bar,
    chosen_experiment,
    commit,
    composed,
    entry_point,
    run_stage,
    seconds_per_evaluation,
    shown,
)
from mlem_diffusion.files import sha256_of, write_json
from mlem_diffusion.gamma.denoising_errors import denoising_errors, noise_levels
from mlem_diffusion.models import published
from mlem_diffusion.models.checkpoint import load_weights, save_weights
from mlem_diffusion.models.family import as_level, build_denoiser, level_name, read_repeats, repeat_name
from mlem_diffusion.models.model_card import write_card
from mlem_diffusion.models.unet import Denoiser
from mlem_diffusion.statistics import standard_error

# configuration groups in a published metadata.json; its other keys cover the rest
GROUPS = ("data", "process", "train")


def work(stage: Stage) -> None:
    if stage.cfg.family.callable is not None:
        raise UserError("The levels of this experiment are your own functions, so there are no weights to publish.")
    images = stage.data()
    metadata = stage.levels_of(images)
    published.check_size(2 * sum(m["parameters"] for m in metadata), "The weights")
    networks = [
        trained(stage, m, stage.checkpoints / m["name"] / "ema.safetensors", m["weights_sha256"]) for m in metadata
    ]
    repeats = trained_again(stage)
    with replacing(stage.checkpoints / published.FOLDER) as folder:
        for m, network in zip(metadata, networks, strict=True):
            write_level(stage, folder / m["name"], m, network)
        checked = rounding(stage, metadata, networks, folder, images)
        for m, found in zip(metadata, checked, strict=True):
            path = folder / m["name"]
            write_json(path / "metadata.json", entry(stage, m, path) | {"rounding": found})
        for m in repeats:
            path, weights = folder / m["name"], stage.checkpoints / m["name"] / "ema.safetensors"
            write_level(stage, path, m, trained(stage, m, weights, m["weights_sha256"]))
            write_json(path / "metadata.json", entry(stage, m, path))
        index = {
            "format": 1,
            "experiment": str(stage.cfg.name),
            "title": stage.cfg.title,
            "levels": [m["name"] for m in metadata],
            "repeats": [m["name"] for m in repeats],
            "gaussian": write_gaussian(stage, folder, images) if stage.cfg.family.gaussian else None,
            "statistics": write_statistics(stage, folder, images) if stage.cfg.publish.statistics else None,
            "data": images.manifest,
            "training": training_record(stage, metadata[-1]["config"]),
            "published": {"commit": commit(), "date": time.strftime("%Y-%m-%d", time.gmtime())},
        }
        index = published.write_index(folder, index)
        write_card(folder, index)
        published.check_size(size := published.size_of(folder), "The files")
    where = shown(stage.checkpoints / published.FOLDER)
    print(f"publish: {len(metadata)} levels, {size / 1e6:.2f} MB in {where}/; its {published.CARD} is the model card.")


def trained_again(stage: Stage) -> list[dict[str, Any]]:
    """metadata.json of the cheapest levels' other training seeds, which gamma's intervals need, if they are trained."""
    wanted = [
        (width, seed)
        for width, seed in training_plan.repeated(stage)
        if (stage.checkpoints / repeat_name(level_name(width), seed) / "metadata.json").is_file()
    ]
    return read_repeats(stage.checkpoints, wanted)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder to fill, which replaces the target at the end; after an error the target is unchanged."""
    partial, old = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("partial", "old"))
    for left in target.parent.glob(f".{target.name}.*-*"):  # left by killed runs
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def trained(stage: Stage, m: dict[str, Any], path: Path, sha256: str | None = None) -> Denoiser:
    """The level's network with the weights of a file; UserError if their hash is not the given one."""
    network = build_denoiser(m["width"], m["size"], m["data_rms"], m["unet"], m["target"])
    load_weights(path, network, sha256)
    return network


def write_level(stage: Stage, folder: Path, m: dict[str, Any], network: Denoiser) -> None:
    save_weights(folder / published.WEIGHTS, network, torch.bfloat16)
    for snapshot in m["snapshots"][:-1] if stage.cfg.publish.snapshots else []:
        then = trained(stage, m, stage.checkpoints / m["name"] / snapshot["file"], snapshot["sha256"])
        save_weights(folder / rounded_name(snapshot["file"]), then, torch.bfloat16)


def rounded_name(file: str) -> str:
    return f"{Path(file).stem}-bf16.safetensors"


def entry(stage: Stage, m: dict[str, Any], folder: Path) -> dict[str, Any]:
    """metadata.json of a published level: that of training, with the published files and the training configuration."""
    *earlier, last = m["snapshots"]
    files = [rounded_name(s["file"]) for s in earlier if stage.cfg.publish.snapshots]
    snapshots = [
        {**s, "file": file, "sha256": sha256_of(folder / file)}
        for s, file in zip([*earlier[: len(files)], last], [*files, published.WEIGHTS], strict=True)
    ]
    config = m["config"]
    return {
        **m,
        "snapshots": snapshots,
        "weights_file": published.WEIGHTS,
        "weights_dtype": "bfloat16",
        "weights_sha256": sha256_of(folder / published.WEIGHTS),
        "trained_weights_sha256": m["weights_sha256"],
        "config": {key: config[key] for key in GROUPS},
    }


def rounding(
    stage: Stage, metadata: list[dict[str, Any]], networks: list[Denoiser], folder: Path, images: ImageData
) -> list[dict[str, Any]]:
    """Effect of rounding the weights, per level: on the held-out loss, and on the output.

    The change of the output is compared with the difference of neighbouring levels. All values are means over held-out
    images, noise levels along the sampler's path, channels and pixels.
    """
    levels = []
    for m, network in zip(metadata, networks, strict=True):
        rounded = trained(stage, m, folder / m["name"] / published.WEIGHTS)
        levels += [as_level(f"{m['name']}-{i}", net.to(stage.device), m["flops"], compile="off")
                   for i, net in enumerate((network, rounded))]  # fmt: skip
    held_out = stage.held_out(images)[: stage.cfg.publish.images]
    logsnr = noise_levels(stage.process(), stage.cfg.gamma.noise_levels)
    with bar("rounding", len(logsnr), unit="noise level") as progress:
        loss, steps, _ = denoising_errors(levels, held_out, logsnr, 1, stage.cfg.gamma.batch, progress)
    loss, steps = loss.mean(2), steps.mean(2)  # [2 K, M] and [2 K - 1, M]
    found = []
    for k in range(len(metadata)):
        own, rounded = loss[2 * k], loss[2 * k + 1]
        found.append(
            {
                "images": len(held_out),
                "logsnr": list(logsnr),
                "loss": float(own.mean()),
                "loss_rounded": float(rounded.mean()),
                "loss_change": float((rounded - own).mean() / own.mean()),
                "loss_change_se": standard_error(rounded - own) / float(own.mean()),
                "squared_change": float(steps[2 * k].mean()),
                # from the level below, as published
                "squared_difference": float(steps[2 * k - 1].mean()) if k else None,
            }
        )
    return found


def write_gaussian(stage: Stage, folder: Path, images: ImageData) -> dict[str, Any]:
    gaussian: Any = sampler_runs.gaussian_level(stage, images).denoise
    gaussian.save(folder / published.GAUSSIAN)
    return {
        "file": published.GAUSSIAN,
        "asked_rank": stage.cfg.family.gaussian_rank,
        "rank": gaussian.rank,
        "explained": gaussian.explained,
        "flops": gaussian.flops,
        "images": gaussian.images,
    }


def write_statistics(stage: Stage, folder: Path, images: ImageData) -> dict[str, Any] | None:
    """Mean and covariance of the training images' features; None if the experiment has no distances."""
    extractor = sampler_runs.make_extractor(stage)
    if extractor is None:
        return None
    features = sample_compare.real_features(stage, images, extractor, stage.results / "cache")
    statistics = feature_moments(features)
    save_moments(folder / published.STATISTICS, statistics)
    n, seed = stage.cfg.compare.num_samples, stage.cfg.compare.seed
    return {
        "file": published.STATISTICS,
        "name": extractor.name,
        "identity": extractor.identity or extractor.key,
        "images": statistics.n,
        "dimensions": len(statistics.mean),
        "data_sha256": images.manifest["sha256"],
        "floor": {"num_samples": n, "seed": seed, "distance": distance_floor(features, n, seed)},
    }


def training_record(stage: Stage, config: dict[str, Any]) -> dict[str, Any]:
    """When, where, from which commit and with which arguments the family was trained, as far as this is recorded."""
    noted = stage.read_provenance().get("stages", {}).get("train_levels", {})
    experiment = chosen_experiment()
    return {
        **{key: noted.get(key) for key in ("commit", "finished", "device")},
        "experiment": experiment,
        "arguments": arguments(experiment, config),
    }


def arguments(experiment: str | None, config: dict[str, Any]) -> list[str]:
    """The ARGS that reproduce this training configuration from the experiment file."""
    usual = composed("train_levels", experiment, ["name", *TRAINING])
    usual["data"]["source"] = config["data"]["source"]  # passed as SOURCE
    before, now = flat(usual), flat({key: config[key] for key in ("name", *TRAINING)})
    return [f"{key}={written(value)}" for key, value in now.items() if before.get(key, ...) != value]


def written(value: Any) -> str:
    """A value in Hydra's syntax, with blanks only within quotes."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(v)}" for key, v in value.items()) + "}"
    if isinstance(value, str) and not re.fullmatch(r"[\w./:+-]*", value):
        return json.dumps(value)  # Hydra quotes as JSON does
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def cost(stage: Stage) -> list[tuple[str, float, float]]:
    seconds, count = seconds_per_evaluation(stage, 16), stage.cfg.publish.images * stage.cfg.gamma.noise_levels
    rows = zip(stage.describe_levels(), seconds, strict=True)
    return [(f"check rounding of {v['name']}", 2 * v["flops"] * count, 2 * s * count) for v, s in rows]


@entry_point("publish")
def main(cfg: Config) -> None:
    run_stage("publish", cfg, work, cost)


if __name__ == "__main__":
    main()
