"""The analytic family with a level that fails: what configurations name as family.callable."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.models.analytic import analytic_family


def broken_family(broken: int = -1, above: float = 0.0, value: float | str = "nan", **settings: float) -> list[Level]:
    """broken: index of the level that gives this value at log-SNRs above `above`; the others are as they were. A value that
    is not finite comes as text, since a configuration holds none."""
    levels = analytic_family(**settings)  # type: ignore[arg-type]
    level = levels[broken]

    def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
        fails = (logsnr > above)[:, None, None, None]
        return torch.where(fails, torch.full_like(x, float(value)), level.denoise(x, logsnr))

    levels[broken] = replace(level, denoise=denoise)
    return levels
