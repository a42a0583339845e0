"""A published family: a committed folder, from which a clone can sample without training and without images.

checkpoints/<experiment>/published/ contains <level>/ema-bf16.safetensors and <level>/metadata.json (as written by
training) for each level. gauss.safetensors and statistics.npz replace the training images in later stages. family.json
describes the folder and lists the SHA-256 of each file. Training never writes into this folder.
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
LIMIT = 60_000_000  # bytes of a published family, since it is committed
_RESTORE = "restore it (git checkout), or publish the family again (make publish)"


def levels_folder(directory: Path, names: Sequence[str]) -> Path:
    """Return the published folder if it has all these levels and `directory` has not; otherwise `directory`."""

    def has_all(folder: Path) -> bool:
        return all((folder / name / "metadata.json").is_file() for name in names)

    published = directory / FOLDER
    return published if not has_all(directory) and (published / INDEX).is_file() and has_all(published) else directory


def size_of(folder: Path) -> int:
    """Return the bytes of all files below the folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def check_size(size: float, what: str) -> None:
    """Raise UserError if a family is larger than LIMIT."""
    if size > LIMIT:
        raise UserError(
            f"{what} take {size / 1e6:.1f} MB, and a published family has at most {LIMIT / 1e6:.0f} MB: leave out "
            "levels (family.widths) or optional parts (publish.snapshots, publish.statistics)."
        )


def write_index(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Write family.json for a folder whose other files are finished, and return its content.

    It contains `index`, the SHA-256 of each file except the card, and its own.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / INDEX and p != folder / CARD)
    index = {**index, "files": {p.relative_to(folder).as_posix(): sha256_of(p) for p in paths}}
    index["sha256"] = _own(index)
    write_json(folder / INDEX, index)
    return index


def read_index(folder: Path) -> dict[str, Any] | None:
    """Return the content of family.json after a SHA-256 check of all its files; None if the folder has none.

    Raises UserError, with the file's name, if a file is missing or has changed.
    """
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
            raise UserError(f"{file} is not the file that was published (its SHA-256 differs): {_RESTORE}.")
    return index


def _own(index: dict[str, Any]) -> str:
    content = {key: value for key, value in index.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
