"""Files of one level: weights (safetensors) and resume state; writes are atomic, reads are checked (files.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from ..errors import UserError, is_out_of_memory
from ..files import Damaged, atomic_write, check_zip, is_the_systems, seal_zip, sha256_of

AGAIN = "run make train-levels again, which repairs it if the level's state.pt is intact"


def save_weights(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Write parameters and buffers of an uncompiled module as safetensors; return the file's SHA-256.

    dtype: parameters, but not buffers, are rounded to it; `load_weights` converts them to the module's dtype.
    """
    kinds = {name: dtype for name, _ in module.named_parameters()} if dtype is not None else {}
    tensors = {
        name: value.detach().cpu().to(kinds.get(name, value.dtype)).contiguous().clone()
        for name, value in module.state_dict().items()
    }
    found = ""

    def write(temporary: Path) -> None:
        nonlocal found
        temporary.write_bytes(save(tensors))  # save_file would write another temporary file
        found = sha256_of(temporary)

    atomic_write(path, write)
    return found


def check_weights(path: Path, sha256: str, hint: str = AGAIN) -> None:
    """Raise Damaged if the file has another hash, and UserError if it is missing."""
    if not path.is_file():
        raise UserError(f"{path} is missing: train the level first (make train-levels).")
    try:
        found = sha256_of(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    if found != sha256:
        raise Damaged(path, f"{path} is damaged, or not the file named in its level's metadata.json: {hint}.")


def load_weights(path: Path, module: nn.Module, sha256: str | None = None, hint: str = AGAIN) -> None:
    """Load safetensors into the module; raise UserError if the file is missing or does not fit.

    sha256: expected hash of the file, if known and not yet checked. hint: what to do about a damaged file.
    """
    if sha256 is not None:
        check_weights(path, sha256, hint)
    elif not path.is_file():
        raise UserError(f"{path} is missing: train the level first (make train-levels).")
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:
        if is_the_systems(error) or is_out_of_memory(error):
            raise
        reason = _first_sentence(error)
        raise UserError(f"{path} does not fit the configured network ({reason}): {hint}.") from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a resume state, sealed (files.py); torch.load can read it."""

    def write(temporary: Path) -> None:
        torch.save(state, temporary)
        seal_zip(temporary, path.name)

    atomic_write(path, write)


def load_state(path: Path) -> dict[str, Any] | None:
    """Return the resume state, or None if the file does not exist; raise UserError if it is damaged.

    It is loaded with weights_only, so no code in the file can run.
    """
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
    """Return the first sentence of an error; torch's messages have paragraphs."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.split(". ")[0].strip().rstrip(".:")
