"""A trained family on disk: checkpoints/<experiment>/<level>/ with EMA weights, resume state, config and metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..diffusion.level import Level, check_family
from ..errors import UserError
from ..files import Damaged, expect_content, read_json
from .checkpoint import AGAIN, load_weights
from .compiled import FastDenoiser
from .flops import flops_per_evaluation
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
    """metadata.json of each level, cheap to expensive; UserError for a level that is not fully trained or damaged, and in a
    published folder for a file that has changed since (`published.read_index`)."""
    is_published = read_index(directory) is not None
    return [_read_level(directory / level_name(width), not is_published) for width in widths]


def _read_level(folder: Path, sealed: bool) -> dict[str, Any]:
    path = folder / "metadata.json"
    metadata = read_json(path, _HINT if not path.is_file() else AGAIN, sealed)
    if metadata.get("name") != folder.name:
        raise Damaged(path, f"{path} speaks of another level ({metadata.get('name')}): {AGAIN}.")
    return metadata


def weights_of(metadata: Mapping[str, Any], snapshot: int | None = None) -> tuple[str, str | None]:
    """File name and SHA-256 of a level's final weights, or of one of its snapshots; no hash where a published family's index
    holds it."""
    if snapshot is None:
        return metadata.get("weights_file", "ema.safetensors"), metadata["weights_sha256"]
    entry = metadata["snapshots"][snapshot]
    return entry["file"], entry.get("sha256")


def identity_of(metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What artefacts note of the levels that they were made with: the hash of each one's weights as trained (publishing rounds
    them) and of the images."""
    return {
        "levels": {m["name"]: m.get("trained_weights_sha256", m["weights_sha256"]) for m in metadata},
        "data": metadata[0]["data_sha256"],
    }


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
    with expect_content(folder / "metadata.json", AGAIN):
        denoiser = build_denoiser(
            metadata["width"], metadata["size"], metadata["data_rms"], metadata["unet"], metadata["target"]
        )
        file, sha256 = weights_of(metadata, snapshot)
        path, flops = folder / file, float(metadata["flops"])
    load_weights(path, denoiser, sha256)
    return as_level(metadata["name"], denoiser.to(device), flops, precision, compile, batch)


def read_repeats(directory: Path, wanted: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """metadata.json of each (width, training seed) that was trained again."""
    is_published = read_index(directory) is not None
    return [_read_level(directory / repeat_name(level_name(w), seed), not is_published) for w, seed in wanted]


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
