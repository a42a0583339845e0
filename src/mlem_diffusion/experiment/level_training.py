"""The levels of an experiment in training: which are left, and one of them with its previews, records and metadata."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from .. import parallel
from ..data.pixels import to_uint8
from ..diffusion.brownian import BrownianPath
from ..diffusion.level import Level
from ..diffusion.sampler import SingleLevel, sample
from ..diffusion.step_rules import step_rule
from ..figures import style
from ..files import locked, sha256_of, write_json
from ..gamma.measurement import noise_levels, squared_differences
from ..models import family
from ..models.compiled import FastDenoiser
from ..training.levels import CLAIM, METADATA, STATE, claim, is_trained, level_names, settings
from ..training.loop import train_level
from . import config
from .config import commit, device_model
from .experiment import Experiment
from .tracking import bar


def fingerprint(exp: Experiment, level: dict[str, Any]) -> str:
    """Hash of what a level's training depends on; it decides whether a checkpoint is still valid."""
    own = {key: level[key] for key in ("width", "target", "train_seed", "gauss", "teacher") if key in level}
    if "teacher" in level:
        own["teacher"] = [found["weights_sha256"] for _, found in tutors(exp, level)]
    return exp.fingerprint(("process", "unet", "train"), data=exp.images.manifest["sha256"], **own)


def tutors(exp: Experiment, level: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and metadata of a level's teacher, and of the level that it starts from, if it does; trained already, here
    or in a published folder."""
    warm, out = training_of(exp, level)["warm_start"], []
    for name in [level["teacher"]["name"], *([family.level_name(level["width"])] if warm else [])]:
        folder = family.levels_folder(exp.checkpoints, [name])
        out.append((folder / name, family.read_metadata(folder, [name])[0]))
    return out


def training_of(exp: Experiment, level: dict[str, Any]) -> dict[str, Any]:
    return settings(exp.plain("train")["train"], level)


def untrained(exp: Experiment, levels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The levels that are not fully trained; rank 0 looks, and all ranks get the same answer.
    Raises UserError if any is left and its settings make no sense."""
    own = levels if parallel.is_main() else []
    missing = [v for v in own if not is_trained(exp.checkpoints / v["name"], fingerprint(exp, v), exp.cfg.overwrite)]
    missing = parallel.gather({parallel.rank(): missing})[0]
    if missing:
        family.check_attention(exp.cfg.family.widths, exp.cfg.data.size, exp.plain("unet")["unet"])
    return missing


def train_one(task: tuple[Experiment, dict[str, Any], int]) -> None:
    """Train one level and write its metadata, in this process, on all ranks, or in a worker.
    task: experiment, level, line of the progress bar."""
    exp, level, line = task
    images, folder = exp.images, exp.checkpoints / level["name"]
    identity, train = fingerprint(exp, level), training_of(exp, level)
    denoiser, teacher = family.described_denoiser(exp.checkpoints, level, train["seed"]), None
    if "teacher" in level:
        teacher, *start = (family.load_denoiser(*tutor) for tutor in tutors(exp, level))
        denoiser.load_state_dict(start[0].state_dict() if start else denoiser.state_dict())
    alone = locked(folder, f"training of {level['name']}") if parallel.is_main() else nullcontext()
    with alone, bar(level["name"], train["images"], position=line) as progress:
        if parallel.is_main():
            claim(folder, identity, exp.cfg.overwrite)
        parallel.barrier()  # no rank reads the folder before this

        def report(record: dict[str, Any]) -> None:
            progress(record["images"], train["images"])
            progress.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
            own = {f"train/{key}/{level['name']}": record[key] for key in ("loss", "lr")}
            exp.log({"level": level["name"], "train/images_seen": record["images"], **own})

        ema = train_level(
            denoiser, images.images[images.train()], exp.process, config.build(train), folder,
            device=exp.device, report=report, should_stop=exp.should_stop, identity=identity,
            teacher=teacher, snapshot=partial(preview, exp, level),
        )  # fmt: skip
        if parallel.is_main():
            used: dict[str, Any] = {"train": {k: v for k, v in train.items() if not k.startswith("_")}}
            used |= {"data_sha256": images.manifest["sha256"], "fingerprint": identity}
            used |= {"device": device_model(exp.device), "commit": commit(), **measured(exp, level, ema, folder)}
            write_json(folder / METADATA, {**level, **used})
        parallel.barrier()


def preview(exp: Experiment, level: dict[str, Any], seen: int, ema: Any) -> None:
    """Draw 16 samples of the moving average after `seen` images."""
    estimator = SingleLevel(Level(level["name"], FastDenoiser(ema, compile="off"), level["flops"]))
    path = BrownianPath(range(16), exp.shape, exp.device)
    grid = exp.process.grid(min(25, exp.process.base_steps))
    pictures = sample(estimator, step_rule("ode/ddim"), grid, path)[0]
    file = f"training/{level['name']}-{seen:010d}-ema.png"
    style.save(style.image_grid(to_uint8(pictures.cpu())), exp.results / file)
    exp.log({"level": level["name"], "train/images_seen": seen, f"train/samples/{level['name']}": file})


def measured(exp: Experiment, level: dict[str, Any], ema: Any, folder: Path) -> dict[str, Any]:
    """The part of a trained level's metadata that its files and the held-out images give."""
    held_out, process = exp.held_out(), exp.process
    state: Any = family.load_state(folder / STATE)
    logsnr = noise_levels(process, exp.cfg.gamma.noise_levels)
    trained = Level(level["name"], FastDenoiser(ema, exp.cfg.precision, "off"), level["flops"])
    loss = squared_differences([trained], [(0, None)], held_out, logsnr, seed=1)
    return {
        "images": state["images"],
        "logsnr_range": [process.logsnr_min, process.logsnr_max],
        "weights_sha256": sha256_of(folder / "ema.safetensors"),
        "snapshots": [
            {"images": int(Path(file).stem.removeprefix("ema-")), "file": file, "sha256": sha256}
            for file, sha256 in sorted(state["snapshots"].items())
        ],
        "history": state["history"],
        "held_out": {"images": len(held_out), "logsnr": list(logsnr), "loss": list(loss[0].mean(axis=0))},
    }


def are_published(exp: Experiment) -> bool:
    """Whether the family is published in the experiment's folder, and no training of it has begun here."""
    folder = family.levels_folder(exp.checkpoints, level_names(exp.cfg))
    begun = any((path / CLAIM).is_file() for path in exp.checkpoints.glob("[wt]*"))
    return folder != exp.checkpoints and not begun and not exp.cfg.overwrite
