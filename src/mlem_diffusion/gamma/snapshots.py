"""The held-out loss of a level at each snapshot of its training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.checkpoint import load_weights
from ..models.family import as_level
from .denoising_errors import denoising_errors


def snapshot_losses(
    denoiser: torch.nn.Module,
    files: Mapping[Path, str],
    held_out: Tensor,
    logsnr: np.ndarray,
    weights: np.ndarray,
    *,
    precision: str = "float32",
    batch: int = 128,
    seed: int = 1,
) -> list[dict[str, Any]]:
    """The held-out loss of each snapshot, on the same images and noise; one entry per file, in their order.

    files: ema-<images>.safetensors with their SHA-256. held_out [M,3,H,W] in [-1, 1]. weights [S] with sum 1 pool over
    the noise levels logsnr [S]. held_out_rise is the change of the mean squared error since the previous snapshot, and
    held_out_rise_se its standard error over the images (both None for the first)."""
    entries, before = [], None
    network = copy.deepcopy(denoiser)
    for file, sha256 in files.items():
        load_weights(file, network, sha256)
        level = as_level(file.stem, network, 1.0, precision, compile="off")
        loss = denoising_errors([level], held_out, logsnr, seed, batch)[0][0] @ weights  # [M]
        rise = None if before is None else loss - before
        entry = {"images": int(file.stem.removeprefix("ema-")), "file": file.name, "sha256": sha256}
        entry["held_out_loss"] = float(loss.mean())
        entry["held_out_rise"] = None if rise is None else float(rise.mean())
        entry["held_out_rise_se"] = None if rise is None else float(rise.std(ddof=1) / np.sqrt(len(rise)))
        entries.append(entry)
        before = loss
    return entries
