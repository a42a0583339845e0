"""A trained family on disk: checkpoints/<experiment>/<level>/ with EMA weights, resume state and metadata.

A published family (published.py) has the same form, with weights in bf16.
"""

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
from .unet import Denoiser, UNet

RESTORE = "restore it (git checkout), or publish the family again (make publish)"


def level_name(width: int) -> str:
    return f"w{width}"


def repeat_name(name: str, seed: int) -> str:
    """Return the folder name of a level that was trained again from another seed."""
    return f"{name}-seed{seed}"


def at_width(settings: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Return the settings for a level of this width.

    settings["narrow"] lists changes for narrow levels, such as {upto: 32, images: 500000}. The entry with the smallest
    `upto` that is at least the width applies. Raises UserError for an entry without `upto`.
    """
    entries: Any = settings.get("narrow") or ()
    if any(not isinstance(entry, Mapping) or "upto" not in entry for entry in entries):
        raise UserError("Every entry of a list `narrow` needs `upto`, the largest width that it applies to.")
    fitting = [entry for entry in entries if width <= entry["upto"]]
    changes = min(fitting, key=lambda entry: entry["upto"], default={})
    return {key: value for key, value in {**settings, **changes}.items() if key not in ("narrow", "upto")}


def build_denoiser(
    width: int, size: int, data_rms: float, unet: Mapping[str, Any], target: str, seed: int = 0
) -> Denoiser:
    """Return an untrained denoiser; its weights depend only on the seed, the width and its settings (`at_width`)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 100_003 + width)
        return Denoiser(UNet(width, size, **at_width(unet, width)), data_rms, target)


def describe(width: int, size: int, data_rms: float, unet: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Return a level's description before training, with parameter count and FLOPs per evaluation of one image."""
    denoiser = build_denoiser(width, size, data_rms, unet, target)
    asked = {"name": level_name(width), "width": width, "size": size, "target": target, "data_rms": data_rms}
    parameters = sum(p.numel() for p in denoiser.parameters())
    flops = flops_per_evaluation(denoiser, size)
    return {**asked, "unet": at_width(unet, width), "parameters": parameters, "flops": flops}


def read_metadata(directory: Path, widths: Sequence[int]) -> list[dict[str, Any]]:
    """Return metadata.json of each level, in the order of `widths`; UserError if one is not trained or damaged."""
    return [_read_level(directory / level_name(width)) for width in widths]


def read_repeats(directory: Path, wanted: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Return metadata.json of each (width, training seed) that was trained again."""
    return [_read_level(directory / repeat_name(level_name(width), seed)) for width, seed in wanted]


def _read_level(folder: Path) -> dict[str, Any]:
    path = folder / "metadata.json"
    metadata = read_json(path, AGAIN if path.is_file() else "run make train-levels with the same EXPERIMENT first")
    if not isinstance(metadata, dict) or metadata.get("name") != folder.name:
        raise Damaged(path, f"{path} does not describe the level {folder.name}: {AGAIN}.")
    return metadata


def weights_of(metadata: Mapping[str, Any], snapshot: int | None = None) -> tuple[str, str]:
    """Return file name and SHA-256 of a level's final weights, or of those at a training length (an index)."""
    if snapshot is None:
        return metadata.get("weights_file", "ema.safetensors"), metadata["weights_sha256"]
    return metadata["snapshots"][snapshot]["file"], metadata["snapshots"][snapshot]["sha256"]


def identity_of(metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the hashes by which artefacts name their levels: of the images and of the weights before rounding."""
    levels = {m["name"]: m.get("trained_weights_sha256", m["weights_sha256"]) for m in metadata}
    return {"levels": levels, "data": metadata[0]["data_sha256"]}


def load_denoiser(folder: Path, metadata: Mapping[str, Any], snapshot: int | None = None) -> Denoiser:
    """Return a level's trained denoiser, in float32 on the CPU; snapshot: as in `weights_of`.

    Raises UserError if the weights are missing, do not fit, or are not those of the metadata (by SHA-256).
    """
    hint = RESTORE if "trained_weights_sha256" in metadata else AGAIN
    with expect_content(folder / "metadata.json", hint):
        shape = [metadata[key] for key in ("width", "size", "data_rms", "unet", "target")]
        denoiser = build_denoiser(*shape)
        file, sha256 = weights_of(metadata, snapshot)
    load_weights(folder / file, denoiser, sha256, hint)
    return denoiser


def load_level(
    folder: Path,
    metadata: Mapping[str, Any],
    device: torch.device | str = "cpu",
    precision: str = "float32",
    snapshot: int | None = None,
    **options: Any,
) -> Level:
    """Load one trained level for sampling; options: compile and batch, as for `FastDenoiser`."""
    denoiser, name = load_denoiser(folder, metadata, snapshot).to(device), metadata["name"]
    return Level(name, FastDenoiser(denoiser, precision, name=name, **options), float(metadata["flops"]))


def load_family(directory: Path, widths: Sequence[int], *where: Any, **options: Any) -> list[Level]:
    """Load the levels of a trained family, in the order of `widths`; further arguments: see `load_level`."""
    levels = [load_level(directory / m["name"], m, *where, **options) for m in read_metadata(directory, widths)]
    check_family(levels)
    return levels
