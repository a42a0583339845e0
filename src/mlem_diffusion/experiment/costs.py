"""What a stage would cost: FLOPs, and seconds from one timed evaluation of each level."""

import time
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from ..comparison.settings import GAUSSIAN
from ..diffusion.level import Level
from ..models.family import build_denoiser
from .environment import device_model

BATCH = 16  # images per timed evaluation; fewer of large networks on a CPU


def estimate(exp: Any, cost: Callable[[Any], list[tuple[str, Any]]] | None) -> str:
    """The resolved configuration and the estimated cost. cost(exp): rows (text, {level: evaluations})."""
    lines = [OmegaConf.to_yaml(OmegaConf.create(exp.plain()))]
    if cost is None:
        return "\n".join([*lines, f"estimated cost of {exp.name}: no network is evaluated; seconds to minutes."])
    rows, (flops, seconds) = cost(exp), priced(exp)
    total = {name: sum(counts.get(name, 0) for _, counts in rows) for name in flops}
    for text, counts in [*rows, (f"estimated cost of {exp.name}", total)]:
        tera, time_ = (sum(per[name] * count for name, count in counts.items()) for per in (flops, seconds))
        lines.append(f"{text:<44} {tera / 1e12:12.3f} TFLOP  about {tqdm.format_interval(time_)}")
    return "\n".join(lines) + f" on {device_model(exp.device)}"


def unweighted(exp: Any) -> dict[str, Level]:
    """The levels by name with their costs, networks without weights; a Gaussian level costs nothing."""
    if exp.cfg.family.callable is not None:
        return exp.levels()
    flops = ({GAUSSIAN: 1.0} if exp.cfg.family.gaussian else {}) | {
        v["name"]: v["flops"] for v in exp.describe_levels()
    }
    return {name: Level(name, lambda x, logsnr: x, cost) for name, cost in flops.items()}


def priced(exp: Any) -> tuple[dict[str, float], dict[str, float]]:
    """FLOPs and seconds per image of one evaluation of each level; the Gaussian denoiser counts as free."""
    flops, seconds = {GAUSSIAN: 0.0}, {GAUSSIAN: 0.0}
    for name, (evaluate, cost) in _levels(exp).items():
        batch = BATCH if exp.device.type != "cpu" else max(1, min(BATCH, int(20e9 / cost)))
        flops[name], seconds[name] = cost, _seconds(evaluate, (batch, *exp.shape), exp.device) / batch
    return flops, seconds


def _levels(exp: Any) -> dict[str, tuple[Callable[..., torch.Tensor], float]]:
    """Function and FLOPs of each level; networks have fresh weights."""
    family, unet = exp.cfg.family, exp.plain("unet")["unet"]
    if family.callable is not None:
        return {level.name: (level.denoise, level.flops) for level in exp.build(family.callable)}
    size, target = exp.cfg.data.size, family.target
    return {
        v["name"]: (build_denoiser(v["width"], size, 0.5, unet, target).to(exp.device).eval(), v["flops"])
        for v in exp.describe_levels()
    }


@torch.no_grad()
def _seconds(evaluate: Callable[..., torch.Tensor], shape: tuple[int, ...], device: torch.device) -> float:
    x, logsnr = torch.zeros(shape, device=device), torch.zeros(shape[0], device=device)
    evaluate(x, logsnr).sum().item()  # the first call also prepares
    start = time.perf_counter()
    evaluate(x, logsnr).sum().item()
    return time.perf_counter() - start
