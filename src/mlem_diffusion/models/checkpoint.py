"""Files of one level: weights (safetensors) and resume state. Every write is atomic, every read is checked (files.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from ..errors import UserError, is_out_of_memory
from ..files import Damaged, atomic_write, check_zip, is_the_systems, seal_zip, sha256_of

AGAIN = "run make train-levels again, which mends it where the level's state.pt is sound"


def save_weights(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Parameters and buffers of an (uncompiled) module as safetensors; the file's SHA-256. dtype: parameters, not buffers, are
    rounded to it; `load_weights` gives them back in the module's own."""
    kinds = {name: dtype for name, _ in module.named_parameters()} if dtype is not None else {}
    tensors = {
        name: value.detach().cpu().to(kinds.get(name, value.dtype)).contiguous().clone()
        for name, value in module.state_dict().items()
    }
    found = ""

    def write(temporary: Path) -> None:
        nonlocal found
        temporary.write_bytes(save(tensors))  # save_file would write to a temporary file of its own
        found = sha256_of(temporary)

    atomic_write(path, write)
    return found


def check_weights(path: Path, sha256: str, hint: str = AGAIN) -> None:
    """Raise Damaged unless the file has this hash, and UserError where there is none."""
    if not path.is_file():
        raise UserError(f"{path} is not there: train the level first (make train-levels).")
    try:
        found = sha256_of(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    if found != sha256:
        raise Damaged(path, f"{path} is damaged, or not the file that its level's metadata.json speaks of: {hint}.")


def load_weights(path: Path, module: nn.Module, sha256: str | None = None, hint: str = AGAIN) -> None:
    """Load safetensors into the module; UserError for a missing or foreign file. sha256: of the file, where it is known and has
    not been checked before. hint: what to do about a damaged file."""
    if sha256 is not None:
        check_weights(path, sha256, hint)
    elif not path.is_file():
        raise UserError(f"{path} is not there: train the level first (make train-levels).")
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:
        if is_the_systems(error) or is_out_of_memory(error):
            raise
        reason = _first_sentence(error)
        raise UserError(f"{path} does not fit the configured network ({reason}): {hint}.") from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    """A resume state, sealed (files.py); torch.load reads it as ever."""

    def write(temporary: Path) -> None:
        torch.save(state, temporary)
        seal_zip(temporary, path.name)

    atomic_write(path, write)


def load_state(path: Path) -> dict[str, Any] | None:
    """The resume state, or None where there is none; UserError where it is damaged. Loaded with weights_only: no code runs from
    the file."""
    if not path.is_file():
        return None
    hint = "delete it to train this level again"
    check_zip(path, hint)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if is_the_systems(error) or is_out_of_memory(error):
            raise
        raise Damaged(path, f"{path} cannot be read ({_first_sentence(error)}): {hint}.") from error


def _first_sentence(error: Exception) -> str:
    """The first sentence: torch's messages go on for paragraphs."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.split(". ")[0].strip().rstrip(".:")
