"""A trained family on disk: checkpoints/<experiment>/<level>/ with EMA weights, resume state, config and metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .checkpoint import load_weights, read_json
from .cost import flops_per_evaluation
from .errors import UserError
from .inference import FastDenoiser
from .levels import Level, check_family
from .published import read_index
from .unet import Denoiser, UNet

_HINT = "run make train-levels with the same EXPERIMENT first"


def level_name(width: int) -> str:
    return f"w{width}"


def at_width(settings: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Settings at a width, the family's one knob. settings["narrow"] lists changes for narrow levels, such as
    {upto: 32, images: 500000}: the first entry whose `upto` is not below the width applies. UserError for an entry
    without `upto`."""
    plain = {key: value for key, value in settings.items() if key != "narrow"}
    entries: Any = settings.get("narrow") or ()
    if any(not isinstance(entry, Mapping) or "upto" not in entry for entry in entries):
        raise UserError("Every entry of a list `narrow` needs `upto`, the largest width that it applies to.")
    for entry in sorted(entries, key=lambda entry: entry["upto"]):
        if width <= entry["upto"]:
            return plain | {key: value for key, value in entry.items() if key != "upto"}
    return plain


def shape_of(unet: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The UNet's arguments at a width (`at_width`)."""
    return at_width(unet, width)


def repeat_name(name: str, seed: int) -> str:
    """Folder of a level that was trained once more, from another seed."""
    return f"{name}-seed{seed}"


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
    """metadata.json of each level, cheap to expensive; UserError for a level that is not fully trained, and in a published
    folder for a file that has changed since (`published.read_index`)."""
    read_index(directory)
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
    levels = [
        load_level(directory / level_name(width), metadata, device, precision, snapshot, compile, batch)
        for width, metadata in zip(widths, read_metadata(directory, widths), strict=True)
    ]
    check_family(levels)
    return levels


def load_level(
    folder: Path,
    metadata: Mapping[str, Any],
    device: torch.device | str = "cpu",
    precision: str = "float32",
    snapshot: int | None = None,
    compile: str = "auto",
    batch: int | None = None,
) -> Level:
    """One trained level, by the content of its metadata.json; the rest as in `load_family`."""
    denoiser = build_denoiser(
        metadata["width"], metadata["size"], metadata["data_rms"], metadata["unet"], metadata["target"]
    )
    final = metadata.get("weights_file", "ema.safetensors")
    load_weights(folder / (final if snapshot is None else metadata["snapshots"][snapshot]["file"]), denoiser)
    return as_level(metadata["name"], denoiser.to(device), metadata["flops"], precision, compile, batch)


def read_repeats(directory: Path, wanted: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """metadata.json of each (width, training seed) that was trained again."""
    return [read_json(directory / repeat_name(level_name(w), seed) / "metadata.json", _HINT) for w, seed in wanted]


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
