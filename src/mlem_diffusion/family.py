"""A trained family on disk: checkpoints/<experiment>/<level>/ with EMA weights, resume state, config and metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .checkpoint import load_weights, read_json
from .cost import flops_per_evaluation
from .inference import FastDenoiser
from .levels import Level, check_family
from .unet import Denoiser, UNet

_HINT = "run make train-levels with the same EXPERIMENT first"


def level_name(width: int) -> str:
    return f"w{width}"


def shape_of(unet: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The UNet's arguments at a width, the family's one knob. unet["narrow"] lists changes for narrow levels, such as
    {upto: 32, patch: 2, multipliers: [2, 2]}: the first entry whose `upto` is not below the width applies."""
    shape = {key: value for key, value in unet.items() if key != "narrow"}
    entries: Any = unet.get("narrow") or ()
    for entry in sorted(entries, key=lambda entry: entry["upto"]):
        if width <= entry["upto"]:
            return shape | {key: value for key, value in entry.items() if key != "upto"}
    return shape


def build_denoiser(
    width: int, size: int, data_rms: float, unet: Mapping[str, Any], target: str, seed: int = 0
) -> Denoiser:
    """A fresh denoiser; its initial weights depend on the seed, the width and its shape (`shape_of`) alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 100_003 + width)
        return Denoiser(UNet(width, size, **shape_of(unet, width)), data_rms, target)


def as_level(
    name: str,
    denoiser: torch.nn.Module,
    flops: float,
    precision: str = "float32",
    compile: str = "auto",
    batch: int | None = None,
) -> Level:
    """A denoiser as a Level, by a frozen copy of it on its device: see `inference.FastDenoiser`."""
    return Level(name, FastDenoiser(denoiser, precision, compile, name, batch), flops)


def read_metadata(directory: Path, widths: Sequence[int]) -> list[dict[str, Any]]:
    """metadata.json of each level, cheap to expensive; UserError for a level that is not fully trained."""
    return [read_json(directory / level_name(width) / "metadata.json", _HINT) for width in widths]


def load_family(
    directory: Path,
    widths: Sequence[int],
    device: torch.device | str = "cpu",
    precision: str = "float32",
    snapshot: int | None = None,
    compile: str = "auto",
    batch: int | None = None,
) -> list[Level]:
    """The levels of a trained family, ready to sample (`as_level`; batch: the usual batch size). snapshot: index into each
    level's snapshots; None: the final EMA."""
    levels = []
    for width, metadata in zip(widths, read_metadata(directory, widths), strict=True):
        denoiser = build_denoiser(
            metadata["width"], metadata["size"], metadata["data_rms"], metadata["unet"], metadata["target"]
        )
        weights = "ema.safetensors" if snapshot is None else metadata["snapshots"][snapshot]["file"]
        load_weights(directory / level_name(width) / weights, denoiser)
        levels.append(as_level(metadata["name"], denoiser.to(device), metadata["flops"], precision, compile, batch))
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
        "unet": shape_of(unet, width),
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "flops": flops_per_evaluation(denoiser, size),
    }
