"""Files of one level: weights (safetensors) and the state from which training resumes; no pickles are read."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from ..errors import UserError, is_out_of_memory
from ..files import Damaged, atomic_write, sha256_of

AGAIN = "train this level again (make train-levels ARGS=overwrite=true)"


def save_weights(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Write a module's parameters and buffers as safetensors; return the file's SHA-256. dtype: of the parameters."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    for name, _ in module.named_parameters():
        tensors[name] = tensors[name].to(dtype or tensors[name].dtype)
    atomic_write(path, lambda p: p.write_bytes(save(tensors)))
    return sha256_of(path)


def check_weights(path: Path, sha256: str, hint: str = AGAIN) -> None:
    """Raise Damaged if the file has another hash, and UserError if it is missing."""
    if not path.is_file():
        raise UserError(f"{path} is missing: train the level first (make train-levels).")
    if sha256_of(path) != sha256:
        raise Damaged(path, f"{path} is damaged, or not the file named in its level's metadata.json: {hint}.")


def load_weights(path: Path, module: nn.Module, sha256: str, hint: str = AGAIN) -> None:
    """Load safetensors of this SHA-256 into the module, in the module's dtype; hint: what to do about a damaged file.

    Raises UserError if the file is missing, has another hash or does not fit.
    """
    check_weights(path, sha256, hint)
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:
        raise explained(error, path, f"does not fit the configured network: {hint}") from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a resume state of tensors, numbers, text, lists and dicts."""
    atomic_write(path, lambda p: torch.save(state, p))


def load_state(path: Path) -> dict[str, Any] | None:
    """Return the resume state, or None without a file; Damaged if it cannot be read. No code in the file can run."""
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:  # torch does not compare checksums
                raise ValueError(f"the checksum of {part} differs")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise explained(error, path, "cannot be read: delete it to train this level again") from error


def explained(error: Exception, path: Path, text: str) -> Exception:
    """Return Damaged with this text, but lack of memory is not the file's fault."""
    return error if is_out_of_memory(error) else Damaged(path, f"{path} {text}.")
