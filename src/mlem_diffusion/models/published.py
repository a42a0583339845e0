"""A published family: the folder that is committed, from which a clone samples without training and without images.

checkpoints/<experiment>/published/ holds, per level, <level>/ema-bf16.safetensors and metadata.json as training writes it;
gauss.safetensors and statistics.npz stand for what else later stages take from the training images; family.json says what
all of it is, with the SHA-256 of every file. Training writes beside this folder and never into it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json, sha256_of, write_json

FOLDER, INDEX, CARD = "published", "family.json", "README.md"
WEIGHTS, GAUSSIAN, STATISTICS = "ema-bf16.safetensors", "gauss.safetensors", "statistics.npz"
LIMIT = 60_000_000  # bytes of a published family: it is committed as it is
_DOUBLE = 512  # features up to which statistics are kept in float64
_RESTORE = "restore it (git checkout), or publish the family again (make publish)"


def levels_folder(directory: Path, names: Sequence[str]) -> Path:
    """Where the levels of these names are: the folder itself where all are trained in it, else the published ones in it
    where these are all there; else the folder itself."""

    def has_all(folder: Path) -> bool:
        return all((folder / name / "metadata.json").is_file() for name in names)

    published = directory / FOLDER
    return published if not has_all(directory) and (published / INDEX).is_file() and has_all(published) else directory


def size_of(folder: Path) -> int:
    """Bytes of all files below the folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def check_size(size: float, what: str) -> None:
    """Raise UserError for a family of more bytes than are committed."""
    if size > LIMIT:
        raise UserError(
            f"{what} take {size / 1e6:.1f} MB, and a published family has at most {LIMIT / 1e6:.0f} MB: leave out "
            "levels (family.widths), or what is optional (publish.snapshots, publish.statistics)."
        )


def write_index(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Write family.json over a folder whose other files are finished; returns what it holds: `index`, the SHA-256 of every
    file but the card, and its own."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / INDEX and p != folder / CARD)
    index = {**index, "files": {p.relative_to(folder).as_posix(): sha256_of(p) for p in paths}}
    index["sha256"] = _own(index)
    write_json(folder / INDEX, index)
    return index


def read_index(folder: Path) -> dict[str, Any] | None:
    """What family.json of a published folder holds, all its files checked by SHA-256; None for a folder without one.
    UserError that names the file where one is missing or has changed."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = read_json(path, _RESTORE, sealed=False)
    except UserError as error:
        raise UserError(f"{path} is damaged: {_RESTORE}.") from error
    if not isinstance(index, dict) or index.get("sha256") != _own(index):
        raise UserError(f"{path} has been changed since it was published: {_RESTORE}.")
    for name, expected in index["files"].items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing: {_RESTORE}.")
        if sha256_of(file) != expected:
            raise UserError(f"{file} is not the file that was published (its SHA-256 is another): {_RESTORE}.")
    return index


def _own(index: dict[str, Any]) -> str:
    content = {key: value for key, value in index.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
