"""A published family: a committed folder, from which a clone can sample without training and without images.

checkpoints/<experiment>/published/ contains, for each level, <level>/ema-bf16.safetensors and <level>/metadata.json
(that of training, with the rounded weights' SHA-256). gauss.safetensors and statistics.npz replace the training images
in later stages. family.json describes the folder, README.md is the model card. Training never writes into this folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import read_json, write_json
from .checkpoint import save_weights
from .family import RESTORE, load_denoiser
from .model_card import write_card

FOLDER, INDEX, CARD = "published", "family.json", "README.md"
WEIGHTS, GAUSSIAN, STATISTICS = "ema-bf16.safetensors", "gauss.safetensors", "statistics.npz"


def levels_folder(directory: Path, names: Sequence[str]) -> Path:
    """Return the published folder if it has all these levels and `directory` has not; otherwise `directory`."""

    def has_all(folder: Path) -> bool:
        return all((folder / name / "metadata.json").is_file() for name in names)

    published = directory / FOLDER
    return published if not has_all(directory) and (published / INDEX).is_file() and has_all(published) else directory


def read_index(folder: Path) -> dict[str, Any] | None:
    """Return the content of family.json; None if the folder has none. Raises Damaged if it cannot be read."""
    path = folder / INDEX
    return read_json(path, RESTORE) if path.is_file() else None


def publish(
    source: Path,
    target: Path,
    metadata: Sequence[Mapping[str, Any]],
    repeats: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> None:
    """Write the levels of the folder `source`, family.json and the model card into the folder `target`.

    repeats: metadata of the levels trained again. facts: about images, training and the other files of the folder.
    Raises UserError as `family.load_denoiser` does.
    """
    for m in [*metadata, *repeats]:
        folder = target / m["name"]
        sha256 = save_weights(folder / WEIGHTS, load_denoiser(source / m["name"], m), torch.bfloat16)
        own = {
            "snapshots": [{**m["snapshots"][-1], "file": WEIGHTS, "sha256": sha256}],
            "weights_file": WEIGHTS,
            "weights_sha256": sha256,
            "trained_weights_sha256": m["weights_sha256"],
        }
        write_json(folder / "metadata.json", {**{k: v for k, v in m.items() if k != "config"}, **own})
    names = {"levels": [m["name"] for m in metadata], "repeats": [m["name"] for m in repeats]}
    write_json(target / INDEX, {**names, **facts})
    write_card(target / CARD, {**names, **facts})
