"""The analytic family with one level that fails. Configurations name it as family.callable."""

from dataclasses import replace

import torch
from torch import Tensor

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.models.analytic import analytic_family


def broken_family(broken: int = -1, above: float = 0.0, value: float | str = "nan", **settings: float) -> list[Level]:
    """The analytic family, except that level number `broken` returns `value` at log-SNRs above `above`.

    A value that is not finite is given as text, because a configuration cannot hold one.
    """
    levels = analytic_family(**settings)  # type: ignore[arg-type]
    level = levels[broken]

    def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
        fails = (logsnr > above).reshape(-1, 1, 1, 1)  # one noise level for all, or one per sample
        return torch.where(fails, torch.full_like(x, float(value)), level.denoise(x, logsnr))

    levels[broken] = replace(level, denoise=denoise)
    return levels
