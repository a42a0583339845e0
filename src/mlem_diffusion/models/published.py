"""A published family: a committed folder, from which a clone can sample without training and without images.

checkpoints/<experiment>/published/ contains, for each level, <level>/ema-bf16.safetensors and <level>/metadata.json
(that of training, with the rounded weights' SHA-256). gauss.safetensors and statistics.npz replace the training images
in later stages. family.json describes the folder, README.md is the model card. Training never writes into this folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import read_json, write_json
from .checkpoint import save_weights
from .family import RESTORE, load_denoiser
from .model_card import write_card

FOLDER, INDEX, CARD = "published", "family.json", "README.md"
WEIGHTS, GAUSSIAN, STATISTICS = "ema-bf16.safetensors", "gauss.safetensors", "statistics.npz"
LIMIT = 60  # MB of a published family, since it is committed


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


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Context of an empty folder to fill, which replaces `folder` at the end; after an error the old one stays.

    Raises UserError if the files take more than LIMIT MB.
    """
    filled = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(filled, ignore_errors=True)  # left by a killed run
    filled.mkdir(parents=True)
    try:
        yield filled
        size = sum(path.stat().st_size for path in filled.rglob("*") if path.is_file()) / 1e6
        if size > LIMIT:
            text = f"The files take {size:.1f} MB, and a published family has at most {LIMIT} MB: leave out levels"
            raise UserError(f"{text} (family.widths) or optional parts (publish.snapshots, publish.statistics).")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(filled, folder)
    finally:
        shutil.rmtree(filled, ignore_errors=True)


def publish(
    source: Path,
    target: Path,
    metadata: Sequence[Mapping[str, Any]],
    repeats: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    snapshots: bool = False,
) -> None:
    """Write the levels of the folder `source`, family.json and the model card into the folder `target`.

    repeats: metadata of the levels trained again. facts: about images, training and the other files of the folder.
    snapshots: also the weights at intermediate training lengths. Raises UserError as `family.load_denoiser` does.
    """
    for m in [*metadata, *repeats]:
        publish_level(source / m["name"], target / m["name"], m, snapshots)
    names = {"levels": [m["name"] for m in metadata], "repeats": [m["name"] for m in repeats]}
    write_json(target / INDEX, {**names, **facts})
    write_card(target / CARD, {**names, **facts})


def publish_level(source: Path, target: Path, metadata: Mapping[str, Any], snapshots: bool) -> None:
    """Write a level's weights as bf16, and its metadata."""
    *earlier, last = metadata["snapshots"]
    entries = []
    for i, entry in enumerate(earlier if snapshots else []):
        file = f"{Path(entry['file']).stem}-bf16.safetensors"
        sha256 = save_weights(target / file, load_denoiser(source, metadata, i), torch.bfloat16)
        entries.append({**entry, "file": file, "sha256": sha256})
    sha256 = save_weights(target / WEIGHTS, load_denoiser(source, metadata), torch.bfloat16)
    own = {
        "snapshots": [*entries, {**last, "file": WEIGHTS, "sha256": sha256}],
        "weights_file": WEIGHTS,
        "weights_sha256": sha256,
        "trained_weights_sha256": metadata["weights_sha256"],
    }
    write_json(target / "metadata.json", {**{k: v for k, v in metadata.items() if k != "config"}, **own})
