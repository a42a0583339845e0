"""What a stage would cost: FLOPs, and seconds from timed evaluations of each level."""

from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from ..comparison.settings import GAUSSIAN
from ..diffusion.level import Level
from ..models.family import build_denoiser
from ..multilevel.ablation import seconds_per_image
from .environment import device_model

# (experiment, levels by name) -> evaluations of each level
Cost = Callable[[Any, dict[str, Level]], Mapping[str, float]]


def estimate(exp: Any, cost: Cost | None) -> str:
    """The resolved configuration and the estimated cost of a stage; without `cost` it evaluates no network."""
    text = f"{OmegaConf.to_yaml(OmegaConf.create(exp.plain()))}\nestimated cost of {exp.name}"
    if cost is None:
        return f"{text}: no network is evaluated; seconds to minutes."
    levels = untrained(exp)
    counts, family = cost(exp, levels), list(levels.values())
    seconds = seconds_per_image(family, exp.shape, timed_batch(exp, family, 16), exp.device, at_least=0.0)
    total = sum(level.flops * counts.get(level.name, 0) for level in family)
    time = sum(each * counts.get(level.name, 0) for level, each in zip(family, seconds, strict=True))
    return f"{text} {total / 1e12:.3f} TFLOP, about {tqdm.format_interval(time)} on {device_model(exp.device)}"


def untrained(exp: Any) -> dict[str, Level]:
    """The levels by name, networks with fresh weights; a Gaussian level costs nothing."""
    if exp.cfg.family.callable is not None:
        return exp.levels()
    found = {GAUSSIAN: Level(GAUSSIAN, lambda x, logsnr: x, 1.0)} if exp.cfg.family.gaussian else {}
    for v in exp.describe_levels():
        network = build_denoiser(v["width"], v["size"], v["data_rms"], exp.plain("unet")["unet"], v["target"])
        found[v["name"]] = Level(v["name"], network.to(exp.device).eval(), v["flops"])
    return found


def timed_batch(exp: Any, family: list[Level], most: int) -> int:
    """Images per timed evaluation. On a CPU few: seconds per image hardly depend on it, and many would take long."""
    return most if exp.device.type != "cpu" else max(1, min(most, int(20e9 / family[-1].flops)))
