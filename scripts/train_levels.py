"""Packed images -> checkpoints/<experiment>/<level>/: train every level of the family, cheap to expensive.

One process per GPU, with launch.py or torchrun: torchrun --nproc-per-node 8 scripts/train_levels.py experiment=celeba64
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mlem_diffusion import parallel
from mlem_diffusion.data.images import ImageData
from mlem_diffusion.data.pixels import to_uint8
from mlem_diffusion.diffusion.estimator import SingleLevel
from mlem_diffusion.diffusion.sampler import sample
from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment import side_by_side, training_plan
from mlem_diffusion.experiment.locks import FolderLock
from mlem_diffusion.experiment.stage import (
    Config,
    Stage,
    bar,
    device_model,
    entry_point,
    is_main_process,
    run_stage,
    seconds_per_evaluation,
    shown,
    to_plain,
    to_yaml,
)
from mlem_diffusion.experiment.tracking import Tracker
from mlem_diffusion.figures.image_grid import save_grid
from mlem_diffusion.figures.training import plot_training
from mlem_diffusion.files import read_json, sha256_of, write_json, write_text
from mlem_diffusion.gamma.denoising_errors import denoising_errors, noise_levels
from mlem_diffusion.gamma.snapshots import snapshot_losses
from mlem_diffusion.models import published
from mlem_diffusion.models.checkpoint import AGAIN, check_weights, load_state
from mlem_diffusion.models.family import as_level, build_denoiser, read_metadata, weights_of
from mlem_diffusion.training.loop import train_level

TRAINING = ("data", "process", "unet", "train", "family")  # groups of the configuration that define what is trained
GROUPS = ("process", "unet", "train")
SNAPSHOT_IMAGES = 256  # held-out images for the loss of every snapshot
JOBS = "jobs"  # folder in the results with records of levels trained by other processes, one folder each
STATE = "state.pt"
RETRAIN = "train this level anew (ARGS=overwrite=true)"
CLAIM = "claim.json"  # in a level's folder: the fingerprint of its training


def level_fingerprint(stage: Stage, level: dict[str, Any], data_sha256: str) -> str:
    own = {key: level[key] for key in ("width", "target", "train_seed") if key in level}
    return stage.fingerprint(GROUPS, data=data_sha256, **own)


def is_trained(stage: Stage, folder: Path, fingerprint: str) -> bool:
    """Whether the level was fully trained with this configuration and its files are unchanged.

    False if a damaged file can be restored from the training state. UserError for other damage, unless overwrite=true.
    """
    if not (folder / "metadata.json").is_file():
        return False
    try:
        metadata = read_json(folder / "metadata.json", AGAIN)
        if metadata["fingerprint"] != fingerprint:
            return False
        check_weights(folder / weights_of(metadata)[0], metadata["weights_sha256"])
    except UserError:
        if stage.cfg.overwrite or (folder / STATE).is_file():
            return False
        raise
    for i in range(len(metadata["snapshots"])):
        file, sha256 = weights_of(metadata, i)
        try:
            check_weights(folder / file, str(sha256), RETRAIN)
        except UserError:
            if not stage.cfg.overwrite:
                raise
            return False
    return True


def claim_folder(stage: Stage, folder: Path, fingerprint: str) -> None:
    """Prepare the level's folder for this configuration, to begin training or to resume it."""
    if stage.cfg.overwrite and not can_go_on(folder, fingerprint):
        for file in folder.iterdir():
            if file.name != ".lock":
                file.unlink()
    marker = folder / CLAIM
    if marker.is_file() and read_json(marker, RETRAIN)["fingerprint"] != fingerprint:
        raise UserError(
            f"{shown(folder)} holds a level of another configuration or data set; "
            "give this run another name (name=...), or ARGS=overwrite=true to train it anew."
        )
    write_json(marker, {"fingerprint": fingerprint})
    write_text(folder / "config.yaml", to_yaml(stage.plain()))


def can_go_on(folder: Path, fingerprint: str) -> bool:
    """Whether the folder belongs to this configuration and its state and snapshots are undamaged."""
    try:
        state = load_state(folder / STATE)
        for file, sha256 in (state or {}).get("snapshots", {}).items():
            check_weights(folder / file, sha256)
        return read_json(folder / CLAIM, RETRAIN)["fingerprint"] == fingerprint
    except UserError:
        return False


def train_one(
    stage: Stage,
    level: dict[str, Any],
    images: ImageData,
    held_out: torch.Tensor,
    tracker: Tracker | None,
    position: int = 0,
) -> dict[str, Any]:
    """Train one level unless it is trained already, and return its metadata. position: line of the progress bar."""
    folder = stage.checkpoints / level["name"]
    fingerprint = level_fingerprint(stage, level, images.manifest["sha256"])
    trained = parallel.from_main(lambda: is_trained(stage, folder, fingerprint))
    if trained:
        print(f"{level['name']}: already trained.") if is_main_process() else None
        return read_json(folder / "metadata.json", AGAIN)
    lock = FolderLock(folder, f"training of {level['name']}", shown(folder))
    try:
        if is_main_process():
            lock.take()
            claim_folder(stage, folder, fingerprint)
        wait_for_all()  # no process reads the folder before this
        return train_claimed(stage, level, images, held_out, tracker, position, fingerprint)
    finally:
        lock.release()


def train_claimed(
    stage: Stage,
    level: dict[str, Any],
    images: ImageData,
    held_out: torch.Tensor,
    tracker: Tracker | None,
    position: int,
    fingerprint: str,
) -> dict[str, Any]:
    """The part of `train_one` after the folder is locked and claimed."""
    cfg, folder, process = stage.cfg, stage.checkpoints / level["name"], stage.process()
    config = training_plan.train_config(stage, level)
    unet: Any = to_plain(cfg.unet)
    denoiser = build_denoiser(level["width"], level["size"], level["data_rms"], unet, level["target"], config.seed)
    shape, seeds = (3, level["size"], level["size"]), list(range(16))

    def on_snapshot(seen: int, ema: Any) -> None:
        preview = sample(
            SingleLevel(as_level(level["name"], ema, level["flops"], compile="off")),
            process.grid(min(25, process.base_steps)), "ode", "ddim", seeds, shape, stage.device,
        )[0]  # fmt: skip
        path = stage.results / "training" / f"{level['name']}-{seen:010d}-ema.png"
        save_grid(to_uint8(preview.cpu()), path, scale=None)
        if tracker is not None:
            tracker.image(f"{level['name']}/samples-ema", path)

    train_images = images.images[images.train()]
    with bar(level["name"], config.images, position=position) as progress:

        def report(record: dict[str, Any]) -> None:
            progress(record["images"], config.images)
            progress.tqdm.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
            if tracker is not None:
                tracker.log({"level": level["name"], **record})

        def resume(seen: int) -> None:
            if tracker is not None:  # records after the saved state are made again
                tracker.rewind(level["name"], seen)

        started = time.monotonic()
        ema = train_level(
            denoiser, train_images, process, config, folder, width=level["width"], device=stage.device,
            report=report, snapshot=None if "train_seed" in level else on_snapshot, should_stop=stage.should_stop,
            on_resume=resume, identity=fingerprint,
        )  # fmt: skip
    if not is_main_process():
        return level
    state: Any = load_state(folder / STATE)
    logsnr = noise_levels(process, cfg.gamma.noise_levels)
    loss, _, _ = denoising_errors(
        [as_level(level["name"], ema, level["flops"], cfg.precision, compile="off")], held_out, logsnr, seed=1
    )
    snapshots = snapshot_losses(
        ema, {folder / name: state["snapshots"][name] for name in sorted(state["snapshots"])},
        held_out[:SNAPSHOT_IMAGES], logsnr, process.drift_weights(logsnr), precision=cfg.precision,
    )  # fmt: skip
    metadata = {
        **level,
        "images": state["images"],
        "train": {k: v for k, v in training_plan.settings(stage, level).items() if not k.startswith("_")},
        "data_sha256": images.manifest["sha256"],
        "logsnr_range": [process.logsnr_min, process.logsnr_max],
        "fingerprint": fingerprint,
        "weights_sha256": sha256_of(folder / "ema.safetensors"),
        "snapshots": snapshots,
        "history": state["history"],
        "held_out": {"images": len(held_out), "logsnr": list(logsnr), "loss": list(loss[0].mean(axis=0))},
        "config": stage.plain("name", *TRAINING),
        "device": device_model(stage.device),
        "seconds_last_run": round(time.monotonic() - started, 1),
    }
    write_json(folder / "metadata.json", metadata)
    return metadata


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def work(stage: Stage) -> None:
    """Train the levels; with several processes, each trains on its part of every batch."""
    chosen = chosen_levels(stage)
    if parallel.from_main(lambda: is_published(stage, chosen)):
        if is_main_process():
            where = shown(stage.checkpoints / published.FOLDER)
            print(f"train_levels: the levels are already published in {where}/ (ARGS=overwrite=true trains them anew).")
        return
    images = stage.data()  # on first use one process draws the procedural images while others wait
    if stage.cfg.only is None:
        train_all(stage, images)
    else:
        train_some(stage, images, chosen)


def is_published(stage: Stage, chosen: list[str]) -> bool:
    """Whether these levels are published in the experiment's folder and the training of none has begun.

    Levels trained again may be missing if levels of the family are among these. UserError if the published levels have
    another configuration or data set. Needs no images.
    """
    folder = stage.checkpoints / published.FOLDER
    wanted = [level for level in training_plan.describe(stage) if level["name"] in chosen]
    there = [level for level in wanted if (folder / level["name"] / "metadata.json").is_file()]
    missing = [level for level in wanted if level not in there and "train_seed" not in level]
    begun = any((stage.checkpoints / name / CLAIM).is_file() for name in chosen)
    if stage.cfg.overwrite or begun or missing or not there or published.read_index(folder) is None:
        return False
    prepared = stage.data_dir / "manifest.json"
    for level in there:
        found = read_json(folder / level["name"] / "metadata.json", "publish the family again", sealed=False)
        data = read_json(prepared, "prepare the images again")["sha256"] if prepared.is_file() else found["data_sha256"]
        if found["fingerprint"] != level_fingerprint(stage, level, data):
            raise UserError(
                f"{shown(folder)} holds published levels of another configuration or data set; "
                "give this run another name (name=...), or ARGS=overwrite=true to train anew."
            )
    return True


def chosen_levels(stage: Stage) -> list[str]:
    """Names of the levels to train: all, or those in `only`; UserError for a level that the family does not have."""
    names, only = training_plan.names(stage), stage.cfg.only
    wanted = names if only is None else [only] if isinstance(only, str) else list(only)
    missing = [name for name in wanted if name not in names]
    if missing or not wanted:
        what = f"there is no level {missing[0]}" if missing else "no level is named"
        raise UserError(f"only={only}: {what}; the family has {', '.join(names)}.")
    return [name for name in names if name in wanted]


def train_some(stage: Stage, images: ImageData, names: list[str]) -> None:
    """Train some levels of the family, while other jobs may train the rest.

    Writes these levels' checkpoints and images, and their records in separate folders. A later run without `only`
    writes the artefacts of the full family.
    """
    stage.catch_signals()
    levels = [level for level in training_plan.describe(stage, images.manifest["rms"]) if level["name"] in names]
    missing = parallel.from_main(lambda: [v for v in levels if not is_trained_here(stage, v, images)])
    for level in levels:
        if level not in missing and is_main_process():
            print(f"{level['name']}: already trained.")
    held_out = stage.held_out(images)
    for level in missing:
        with recorded(stage, [level], stage.results / JOBS / level["name"]) as tracker:
            train_one(stage, level, images, held_out, tracker)
        wait_for_all()
        if is_main_process():
            print(f"{level['name']}: trained; see {shown(stage.checkpoints / level['name'])}/")


def is_trained_here(stage: Stage, level: dict[str, Any], images: ImageData) -> bool:
    return is_trained(
        stage, stage.checkpoints / level["name"], level_fingerprint(stage, level, images.manifest["sha256"])
    )


@contextmanager
def recorded(stage: Stage, levels: list[dict[str, Any]], folder: Path) -> Iterator[Tracker | None]:
    """The main process's tracker for these levels, which writes to the folder.

    If the training of none has begun, records and images of earlier runs are removed.
    """
    if not is_main_process():
        tracker = None
    else:
        fresh = not any((stage.checkpoints / v["name"] / STATE).is_file() for v in levels)
        for picture in [p for v in levels for p in (stage.results / "training").glob(f"{v['name']}-*.png") if fresh]:
            picture.unlink()
        tracker = Tracker(folder, stage.name, stage.plain(), **stage.cfg.tracking, fresh=fresh)
    with tracker or nullcontext():
        yield tracker


def train_all(stage: Stage, images: ImageData) -> None:
    levels = training_plan.describe(stage, images.manifest["rms"])
    repeats = training_plan.repeated(stage)
    inputs = {"data": images.manifest["sha256"], **({"repeats": repeats} if repeats else {})}
    fingerprint = stage.fingerprint((*GROUPS, "family"), **inputs)
    if parallel.from_main(lambda: all(is_trained_here(stage, v, images) for v in levels)) and parallel.from_main(
        lambda: stage.finished(fingerprint, ["training.png"])
    ):
        return
    stage.catch_signals()
    with recorded(stage, levels, stage.results) as tracker:
        metadata = []
        if (workers := side_by_side.worker_count(stage.cfg.workers, stage.device, len(levels))) > 1:
            expensive_first = sorted(levels, key=lambda v: -v["flops"] * training_plan.settings(stage, v)["images"])
            tasks = [(stage, level, line) for line, level in enumerate(expensive_first)]
            side_by_side.run(train_in_worker, tasks, workers, stage.should_stop)
            metadata = read_metadata(stage.checkpoints, stage.cfg.family.widths)
            if tracker is not None:
                mirror_pictures(stage, metadata, tracker)
        else:
            held_out = stage.held_out(images)
            for level in levels:
                metadata.append(train_one(stage, level, images, held_out, tracker))
                wait_for_all()
        if tracker is not None:
            collect_jobs(stage, tracker)
            publish(stage, [m for m in metadata if "train_seed" not in m], tracker)
    if is_main_process():
        stage.record(fingerprint, ["training.png"], images.manifest)


def publish(stage: Stage, metadata: list[dict[str, Any]], tracker: Tracker) -> None:
    """Plot the losses of all levels and add them to the records."""
    shown = [{**m, "logsnr": m["held_out"]["logsnr"], "held_out": m["held_out"]["loss"]} for m in metadata]
    tracker.image("training", Path(plot_training(shown, stage.results / "training.png", title=stage.cfg.title)))
    tracker.settle(
        [
            {"level": m["name"], "held_out_loss": float(np.mean(m["held_out"]["loss"])), "images": m["images"]}
            for m in metadata
        ]
    )


def collect_jobs(stage: Stage, tracker: Tracker) -> None:
    """Take over the records of processes that trained one level."""
    for path in sorted((stage.results / JOBS).glob("*/metrics.jsonl")):
        tracker.take_over(path)
        with suppress(OSError):  # it may contain other files
            path.parent.rmdir()
    with suppress(OSError):
        (stage.results / JOBS).rmdir()


def mirror_pictures(stage: Stage, metadata: list[dict[str, Any]], tracker: Tracker) -> None:
    """Send to W&B the sample grids that workers wrote to files."""
    for level in metadata:
        for picture in sorted((stage.results / "training").glob(f"{level['name']}-*.png")):
            tracker.image(f"{level['name']}/samples-ema", picture)


def train_in_worker(stage: Stage, level: dict[str, Any], position: int) -> None:
    """Train one of several levels at the same time, each in its own process."""
    stage.should_stop = side_by_side.stop_requested
    images = stage.data()
    with Tracker(stage.results / JOBS / level["name"], stage.name, {}, mode="disabled") as tracker:
        train_one(stage, level, images, stage.held_out(images), tracker, position)


def estimate(stage: Stage) -> list[tuple[str, float, float]]:
    seconds = dict(zip(stage.cfg.family.widths, seconds_per_evaluation(stage, 16), strict=True))
    chosen, rows = chosen_levels(stage), []
    for v in training_plan.describe(stage):
        if v["name"] in chosen:
            images = training_plan.settings(stage, v)["images"]
            what = f"train {v['name']} ({v['parameters']:,} parameters) on {images:,} images"
            # a backward pass costs twice the forward pass
            rows.append((what, 3 * v["flops"] * images, 3 * seconds[v["width"]] * images))
    return rows


@entry_point("train_levels")
def main(cfg: Config) -> None:
    run_stage("train_levels", cfg, work, estimate, everyone=True, trained_only=True)


if __name__ == "__main__":
    main()
