"""The levels of an experiment in training: which are left, and one of them with its previews, records and metadata."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .. import parallel
from ..data.pixels import to_uint8
from ..diffusion.brownian import BrownianPath
from ..diffusion.estimator import SingleLevel
from ..diffusion.sampler import sample
from ..diffusion.step_rules import step_rule
from ..errors import UserError
from ..figures import style
from ..figures.image_grid import image_grid
from ..files import locked, read_json, sha256_of, write_json
from ..gamma.denoising_errors import noise_levels, snapshot_losses, squared_differences
from ..models import published
from ..models.checkpoint import load_state
from ..models.family import as_level, build_denoiser
from ..training.levels import CLAIM, METADATA, STATE, claim, is_trained, settings
from ..training.loop import train_level
from .environment import device_model, shown
from .experiment import Experiment
from .progress import bar

_SNAPSHOT_IMAGES = 256  # held-out images for the loss of every snapshot


def fingerprint(exp: Experiment, level: dict[str, Any], data_sha256: str) -> str:
    """Hash of what a level's training depends on; it decides whether a checkpoint is still valid."""
    own = {key: level[key] for key in ("width", "target", "train_seed") if key in level}
    return exp.fingerprint(("process", "unet", "train"), data=data_sha256, **own)


def training_of(exp: Experiment, level: dict[str, Any]) -> dict[str, Any]:
    """The training settings of one level."""
    return settings(exp.plain("train")["train"], level)


def untrained(exp: Experiment, levels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The levels that are not fully trained; rank 0 looks, and all ranks get the same answer."""
    data, missing = exp.images().manifest["sha256"], []
    for level in levels if parallel.is_main() else ():
        if not is_trained(exp.checkpoints / level["name"], fingerprint(exp, level, data), exp.cfg.overwrite):
            missing.append(level)
    return parallel.gather({parallel.rank(): missing})[0]


def train_one(task: tuple[Experiment, dict[str, Any], int]) -> None:
    """Train one level and write its metadata, in this process, on all ranks, or in a worker.

    task: experiment, level, line of the progress bar.
    """
    exp, level, line = task
    images, folder, started = exp.images(), exp.checkpoints / level["name"], time.monotonic()
    identity = fingerprint(exp, level, images.manifest["sha256"])
    train = training_of(exp, level)
    denoiser = build_denoiser(
        level["width"], level["size"], level["data_rms"], exp.plain("unet")["unet"], level["target"], train["seed"]
    )
    alone = locked(folder, f"training of {level['name']}") if parallel.is_main() else nullcontext()
    with alone, bar(level["name"], train["images"], position=line) as progress:
        if parallel.is_main():
            claim(folder, identity, exp.cfg.overwrite)
        parallel.barrier()  # no rank reads the folder before this

        def report(record: dict[str, Any]) -> None:
            progress(record["images"], train["images"])
            progress.tqdm.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
            exp.log({"level": level["name"], **record})

        ema = train_level(
            denoiser, images.images[images.train()], exp.process, exp.build(train), folder, width=level["width"],
            device=exp.device, report=report, should_stop=exp.should_stop, identity=identity,
            snapshot=None if "train_seed" in level else lambda seen, ema: preview(exp, level, seen, ema),
        )  # fmt: skip
        if parallel.is_main():
            facts = {"data_sha256": images.manifest["sha256"], "fingerprint": identity}
            measured = measure(exp, level, ema, folder)
            used = {"train": {k: v for k, v in train.items() if not k.startswith("_")}}
            spent = {"device": device_model(exp.device), "seconds_last_run": round(time.monotonic() - started, 1)}
            write_json(folder / METADATA, {**level, **used, **facts, **measured, **spent})
        parallel.barrier()


def preview(exp: Experiment, level: dict[str, Any], seen: int, ema: Any) -> None:
    """Draw 16 samples of the moving average after `seen` images."""
    estimator = SingleLevel(as_level(level["name"], ema, level["flops"], compile="off"))
    path = BrownianPath(range(16), (3, level["size"], level["size"]), exp.device)
    grid = exp.process.grid(min(25, exp.process.base_steps))
    pictures = sample(estimator, step_rule("ode/ddim"), grid, path)[0]
    file = exp.results / "training" / f"{level['name']}-{seen:010d}-ema.png"
    style.save(image_grid(to_uint8(pictures.cpu())), file)
    exp.tracker.image(f"{level['name']}/samples-ema", file)


def measure(exp: Experiment, level: dict[str, Any], ema: Any, folder: Path) -> dict[str, Any]:
    """The part of a trained level's metadata that its files and the held-out images give."""
    held_out, process, precision = exp.held_out(), exp.process, exp.cfg.precision
    state: Any = load_state(folder / STATE)
    logsnr = noise_levels(process, exp.cfg.gamma.noise_levels)
    trained = as_level(level["name"], ema, level["flops"], precision, compile="off")
    loss = squared_differences([trained], [(0, None)], held_out, logsnr, seed=1)
    files = {folder / name: state["snapshots"][name] for name in sorted(state["snapshots"])}
    return {
        "images": state["images"],
        "logsnr_range": [process.logsnr_min, process.logsnr_max],
        "weights_sha256": sha256_of(folder / "ema.safetensors"),
        "snapshots": snapshot_losses(
            ema, files, held_out[:_SNAPSHOT_IMAGES], logsnr, process.drift_weights(logsnr), precision=precision
        ),
        "history": state["history"],
        "held_out": {"images": len(held_out), "logsnr": list(logsnr), "loss": list(loss[0].mean(axis=0))},
        "config": exp.plain("name", "data", "process", "unet", "train", "family"),
    }


def are_published(exp: Experiment, levels: list[dict[str, Any]]) -> bool:
    """Whether these levels are published in the experiment's folder and the training of none has begun.

    Levels trained again may be missing if levels of the family are among these. UserError if the published levels have
    another configuration or data set. Needs no images.
    """
    folder = exp.checkpoints / published.FOLDER
    there = [level for level in levels if (folder / level["name"] / METADATA).is_file()]
    missing = [level for level in levels if level not in there and "train_seed" not in level]
    begun = any((exp.checkpoints / level["name"] / CLAIM).is_file() for level in levels)
    if exp.cfg.overwrite or begun or missing or not there or published.read_index(folder) is None:
        return False
    prepared = exp.data_dir / "manifest.json"
    for level in there:
        found = read_json(folder / level["name"] / METADATA, "publish the family again")
        data = read_json(prepared, "prepare the images again")["sha256"] if prepared.is_file() else found["data_sha256"]
        if found["fingerprint"] != fingerprint(exp, level, data):
            raise UserError(
                f"{shown(folder)} holds published levels of another configuration or data set; "
                "give this run another name (name=...), or ARGS=overwrite=true to train anew."
            )
    return True
