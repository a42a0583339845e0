"""Files of one level: EMA weights (safetensors), resume state, metadata. Every write is atomic."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .errors import UserError


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename over `path`: a stop at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_arrays(path: Path, **arrays: Any) -> None:
    """A compressed npz, atomic; read it with numpy.load, no pickle needed."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # an open file: numpy would append .npz to the temporary name
            np.savez_compressed(file, **arrays)

    atomic_write(path, write)


def write_json(path: Path, value: Any) -> None:
    """Strict JSON (no NaN), two-space indent, atomic."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    atomic_write(path, lambda p: p.write_text(text))


def read_json(path: Path, hint: str) -> Any:
    """Parsed JSON; UserError with `hint` (what to run) where the file is missing or broken."""
    if not path.is_file():
        raise UserError(f"{path} is not there: {hint}.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): {hint}.") from error


def save_weights(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Parameters and buffers of an (uncompiled) module as safetensors. dtype: parameters, not buffers, are rounded to it;
    `load_weights` gives them back in the module's own."""
    kinds = {name: dtype for name, _ in module.named_parameters()} if dtype is not None else {}
    tensors = {
        name: value.detach().cpu().to(kinds.get(name, value.dtype)).contiguous().clone()
        for name, value in module.state_dict().items()
    }
    atomic_write(path, lambda p: save_file(tensors, p))


def load_weights(path: Path, module: nn.Module) -> None:
    """Load safetensors into the module; UserError for a missing or foreign file."""
    if not path.is_file():
        raise UserError(f"{path} is not there: train the level first (make train-levels).")
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:
        reason = _first_sentence(error)
        raise UserError(f"{path} does not fit the configured network ({reason}).") from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    atomic_write(path, lambda p: torch.save(state, p))


def load_state(path: Path) -> dict[str, Any] | None:
    """The resume state, or None where there is none. Loaded with weights_only: no code runs from the file."""
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({_first_sentence(error)}); delete it to train this level again."
        ) from error


def _first_sentence(error: Exception) -> str:
    """The first sentence: torch's messages go on for paragraphs."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.split(". ")[0].strip().rstrip(".:")
