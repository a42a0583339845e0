"""Checks of the files in a results folder against the hashes in provenance.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import Damaged, sha256_of


def check_written(folder: Path, provenance: Mapping[str, Any], only: str | None = None) -> None:
    """Raise Damaged for a file of the folder (or for `only`) whose SHA-256 is not the one that its stage recorded.

    Missing files, and files that no stage recorded, are not checked.
    """
    config = folder / "config.yaml"
    noted = provenance.get("config_sha256")
    if only in (None, config.name) and noted and config.is_file() and sha256_of(config) != noted:
        raise Damaged(config, f"{config} is not the file that the last stage wrote: run one of the stages again.")
    for stage, entry in (provenance.get("stages") or {}).items():
        for name, sha256 in entry.get("outputs", {}).items():
            path = folder / name
            if only in (None, name) and path.is_file() and sha256_of(path) != sha256:
                target = stage.replace("_", "-")
                raise Damaged(
                    path,
                    f"{path} is not the file that {target} wrote: run make {target} EXPERIMENT={folder.name} again.",
                )


def check_same_levels(folder: Path, gamma: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Raise UserError if gamma.json and the comparison were made with different levels."""
    compared = ((provenance.get("stages") or {}).get("sample_compare") or {}).get("made_with")
    if gamma.get("made_with") and compared and gamma["made_with"] != compared:
        raise UserError(
            f"{folder / 'gamma.json'} and the comparison in this folder were made with different levels: "
            f"run make measure-gamma and make sample-compare EXPERIMENT={folder.name} again."
        )
