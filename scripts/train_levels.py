"""Packed images -> checkpoints/<experiment>/<level>/: train every level of the family, cheap to expensive.

Also under torchrun (one process per GPU): torchrun --nproc-per-node 8 scripts/train_levels.py experiment=celeba64
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import common
import hydra
import numpy as np
import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mlem_diffusion.checkpoint import atomic_write, read_json, write_json
from mlem_diffusion.drift import SingleLevel
from mlem_diffusion.errors import UserError
from mlem_diffusion.evaluate import denoising_errors, noise_levels, to_float
from mlem_diffusion.family import as_level, build_denoiser
from mlem_diffusion.grids import save_grid
from mlem_diffusion.metrics import to_uint8
from mlem_diffusion.plot_compare import plot_training
from mlem_diffusion.samplers import sample
from mlem_diffusion.tracking import Tracker
from mlem_diffusion.train import Interrupted, TrainConfig, train_level

GROUPS = ("process", "unet", "train")


def train_one(
    stage: common.Stage, level: dict[str, Any], images: Any, held_out: torch.Tensor, tracker: Tracker | None
) -> dict:
    """Train one level unless that has been done; returns its metadata."""
    cfg, folder, process = stage.cfg, stage.checkpoints / level["name"], stage.process()
    config: TrainConfig = instantiate(cfg.train)
    fingerprint = stage.fingerprint(
        GROUPS, width=level["width"], target=level["target"], data=images.manifest["sha256"]
    )
    marker = folder / "fingerprint.txt"
    if marker.is_file() and marker.read_text() != fingerprint:
        if not cfg.overwrite:
            raise UserError(
                f"{folder.relative_to(common.ROOT)} holds a level of another configuration or data set; "
                "give this run another name (name=...), or ARGS=overwrite=true to train it anew."
            )
        if common.is_main_process():
            for file in folder.iterdir():
                file.unlink()
    if (folder / "metadata.json").is_file():
        print(f"{level['name']}: already trained.") if common.is_main_process() else None
        return read_json(folder / "metadata.json", "train it again")
    if common.is_main_process():
        atomic_write(marker, lambda p: p.write_text(fingerprint))
        atomic_write(
            folder / "config.yaml", lambda p: p.write_text(OmegaConf.to_yaml(OmegaConf.create(stage.plain())))
        )

    unet: Any = OmegaConf.to_container(cfg.unet, resolve=True)
    denoiser = build_denoiser(
        level["width"], level["size"], level["data_rms"], unet, level["target"], config.seed
    )
    snapshots: list[dict[str, Any]] = []
    shape, seeds = (3, level["size"], level["size"]), list(range(16))

    def on_snapshot(seen: int, ema: Any) -> None:
        preview = sample(
            SingleLevel(as_level(level["name"], ema, level["flops"])), process.grid(min(25, process.base_steps)),
            "ode", "ddim", seeds, shape, stage.device,
        )[0]  # fmt: skip
        path = stage.results / "training" / f"{level['name']}-{seen:010d}-ema.png"
        save_grid(to_uint8(preview.cpu()), path, scale=None)
        if tracker is not None:
            tracker.image(f"{level['name']}/samples-ema", path)

    train_images = images.images[images.train()]
    with common.bar(level["name"], config.images) as progress:

        def report(record: dict[str, Any]) -> None:
            progress(record["images"], config.images)
            progress.tqdm.set_postfix(loss=f"{record['loss']:.4f}")
            if tracker is not None:
                tracker.log({"level": level["name"], **record})

        started = time.monotonic()
        ema = train_level(
            denoiser, train_images, process, config, folder, width=level["width"], device=stage.device,
            report=report, snapshot=on_snapshot, should_stop=stage.should_stop,
        )  # fmt: skip
    if not common.is_main_process():
        return level
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    logsnr = noise_levels(process, cfg.gamma.noise_levels)
    loss, _, _ = denoising_errors(
        [as_level(level["name"], ema, level["flops"], cfg.precision)], held_out, logsnr, seed=1
    )
    for file in sorted(folder.glob("ema-*.safetensors")):
        snapshots.append({"images": int(file.stem.removeprefix("ema-")), "file": file.name})
    metadata = {
        **level,
        "images": state["images"],
        "data_sha256": images.manifest["sha256"],
        "fingerprint": fingerprint,
        "snapshots": snapshots,
        "history": state["history"],
        "held_out": {"images": len(held_out), "logsnr": list(logsnr), "loss": list(loss[0].mean(axis=0))},
        "device": common.device_model(stage.device),
        "seconds_last_run": round(time.monotonic() - started, 1),
    }
    write_json(folder / "metadata.json", metadata)
    return metadata


def work(stage: common.Stage) -> None:
    images = stage.data()
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if stage.device.type == "cuda":
            stage.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(stage.device)
        dist.init_process_group("nccl" if stage.device.type == "cuda" else "gloo")
    stage.catch_signals()
    rms = images.manifest["rms"]
    levels = stage.describe_levels(rms)
    held_out = to_float(images.images[images.held_out()[: stage.cfg.gamma.images]], stage.device)
    main_process = common.is_main_process()
    tracker = None
    if main_process:
        tracker = Tracker(stage.results, "train_levels", stage.plain(), **stage.cfg.tracking)
    metadata = []
    try:
        for level in levels:
            metadata.append(train_one(stage, level, images, held_out, tracker))
            if world > 1:
                dist.barrier()
    except Interrupted as error:
        print(
            f"train_levels: {level['name']} {error}; its state is saved, run the same command again to go on.",
            file=sys.stderr,
        )
        sys.exit(75)
    finally:
        if world > 1:
            dist.destroy_process_group()
    if main_process and tracker is not None:
        shown = [
            {**m, "logsnr": m["held_out"]["logsnr"], "held_out": m["held_out"]["loss"]} for m in metadata
        ]
        tracker.image(
            "training", Path(plot_training(shown, stage.results / "training.png", title=stage.cfg.title))
        )
        for m in metadata:
            tracker.log(
                {
                    "level": m["name"],
                    "held_out_loss": float(np.mean(m["held_out"]["loss"])),
                    "images": m["images"],
                }
            )
        tracker.finish()
        fingerprint = stage.fingerprint((*GROUPS, "family"), data=images.manifest["sha256"])
        stage.record(fingerprint, images.manifest)


def estimate(stage: common.Stage) -> list[tuple[str, float, float]]:
    levels, images = stage.describe_levels(), stage.cfg.train.images
    seconds = common.seconds_per_evaluation(stage, 16)
    # a backward pass costs twice the forward pass
    return [
        (
            f"train {v['name']} ({v['parameters']:,} parameters) on {images:,} images",
            3 * v["flops"] * images,
            3 * s * images,
        )
        for v, s in zip(levels, seconds, strict=True)
    ]


@hydra.main(version_base=None, config_path=common.CONFIGS, config_name="train_levels")
def main(cfg: DictConfig) -> None:
    common.run("train_levels", cfg, work, estimate)


if __name__ == "__main__":
    main()
