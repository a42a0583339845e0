"""A trained family on disk: checkpoints/<experiment>/<level>/ with EMA weights, resume state, config and metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import load_weights, read_json
from .cost import flops_per_evaluation
from .errors import UserError
from .levels import Level, check_family
from .unet import Denoiser, UNet

_HINT = "run make train-levels with the same EXPERIMENT first"


def level_name(width: int) -> str:
    return f"w{width}"


def build_denoiser(
    width: int, size: int, data_rms: float, unet: Mapping[str, Any], target: str, seed: int = 0
) -> Denoiser:
    """A fresh denoiser; its initial weights depend on the seed and the width alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 100_003 + width)
        return Denoiser(UNet(width, size, **unet), data_rms, target)


def as_level(name: str, denoiser: torch.nn.Module, flops: float, precision: str = "float32") -> Level:
    """Wrap a denoiser as a Level; precision "bf16" runs it under autocast."""
    if precision not in ("float32", "bf16"):
        raise UserError(f"precision = {precision!r} is unknown; expected 'float32' or 'bf16'.")
    denoiser = denoiser.eval()

    def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            return denoiser(x, logsnr).float()

    return Level(name, denoise, flops)


def read_metadata(directory: Path, widths: Sequence[int]) -> list[dict[str, Any]]:
    """metadata.json of each level, cheap to expensive; UserError for a level that is not fully trained."""
    return [read_json(directory / level_name(width) / "metadata.json", _HINT) for width in widths]


def load_family(
    directory: Path,
    widths: Sequence[int],
    device: torch.device | str = "cpu",
    precision: str = "float32",
    snapshot: int | None = None,
) -> list[Level]:
    """The levels of a trained family, ready to sample. snapshot: index into each level's snapshots; None: the final EMA."""
    levels = []
    for width, metadata in zip(widths, read_metadata(directory, widths), strict=True):
        denoiser = build_denoiser(
            metadata["width"], metadata["size"], metadata["data_rms"], metadata["unet"], metadata["target"]
        )
        weights = "ema.safetensors" if snapshot is None else metadata["snapshots"][snapshot]["file"]
        load_weights(directory / level_name(width) / weights, denoiser)
        denoiser = denoiser.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        denoiser.requires_grad_(False)  # gains need derivatives with respect to x alone
        levels.append(as_level(metadata["name"], denoiser, metadata["flops"], precision))
    check_family(levels)
    return levels


def describe(width: int, size: int, data_rms: float, unet: Mapping[str, Any], target: str) -> dict[str, Any]:
    """What is known of a level before training: name, width, parameters, FLOPs per evaluation of one image."""
    denoiser = build_denoiser(width, size, data_rms, unet, target)
    return {
        "name": level_name(width),
        "width": width,
        "size": size,
        "target": target,
        "data_rms": data_rms,
        "unet": dict(unet),
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "flops": flops_per_evaluation(denoiser, size),
    }
