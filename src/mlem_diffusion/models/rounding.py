"""Rounding errors of a family in lower precision: each level against float32 at each noise level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.brownian import initial_noise
from ..diffusion.level import Level
from ..diffusion.process import add_noise
from ..errors import UserError


@dataclass(frozen=True)
class PrecisionErrors:
    """Mean squares per pixel at log-SNRs [S], relative to the levels in float32.

    rounding: [K, S], of f^k minus f^k in float32. difference: [K, S], of f^k - f^(k-1) in float32 (for the first level,
    f^1 minus the clean image). A multilevel estimate weights these differences, so rounding does not matter if it is
    well below them.
    """

    names: tuple[str, ...]
    logsnr: np.ndarray
    rounding: np.ndarray
    difference: np.ndarray

    def ratio(self) -> np.ndarray:
        """Return RMS rounding over RMS difference [K, S]; 0 if the rounding is 0, for any difference."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.rounding == 0, 0.0, np.sqrt(self.rounding / self.difference))

    def to_json(self) -> dict[str, Any]:
        levels = [
            {
                "level": name,
                "rms_rounding": np.sqrt(self.rounding[k]).tolist(),
                "rms_difference": np.sqrt(self.difference[k]).tolist(),
                "worst_ratio": float(self.ratio()[k].max()),
            }
            for k, name in enumerate(self.names)
        ]
        return {"logsnr": self.logsnr.tolist(), "levels": levels}


@torch.no_grad()
def precision_errors(
    exact: Sequence[Level],
    rounded: Sequence[Level],
    images: Tensor,
    logsnr: np.ndarray,
    seed: int = 0,
    batch: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> PrecisionErrors:
    """Compare two versions of a family on images [M,C,H,W] in [-1, 1] with the same noise.

    Raises UserError unless the levels have the same names in the same order.
    """
    names = tuple(level.name for level in exact)
    if names != tuple(level.name for level in rounded):
        raise UserError("Two precisions can be compared only for the same levels in the same order.")
    rounding, difference = np.zeros((len(names), len(logsnr))), np.zeros((len(names), len(logsnr)))
    for j, value in enumerate(logsnr):
        for start in range(0, len(images), batch):
            x0 = images[start : start + batch]
            share = len(x0) / len(images)
            seeds = [seed * 1_000_003 + j * len(images) + start + i for i in range(len(x0))]
            noise_level = torch.full((1,), float(value), device=x0.device).expand(len(x0))
            x = add_noise(x0, initial_noise(seeds, tuple(x0.shape[1:]), x0.device), noise_level)
            before = x0
            for k, (a, b) in enumerate(zip(exact, rounded, strict=True)):
                output = a.denoise(x, noise_level)
                rounding[k, j] += share * float((b.denoise(x, noise_level) - output).double().square().mean())
                difference[k, j] += share * float((output - before).double().square().mean())
                before = output
        if progress is not None:
            progress(j + 1, len(logsnr))
    return PrecisionErrors(names, np.asarray(logsnr), rounding, difference)
