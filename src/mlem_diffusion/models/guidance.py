"""Guidance as part of a level: D_u + w (D_c - D_u), for classifier-free guidance (Ho and Salimans 2022, with w as 1 + w
there) and autoguidance (Karras et al. 2024), at chosen noise levels (Kynkaanniemi et al. 2024).

With a guide of its own each level costs two evaluations, and levels differ by w (D_k - D_{k-1}) - (w - 1) (U_k -
U_{k-1}), whose parts may cancel. With one guide for all levels (EDM2: the smallest unconditional network) they differ
by w (D_k - D_{k-1}): the variance of coins grows as w^2, but the guide, as a shared base, runs once in every estimate,
because the weights of an estimate add up to one."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..diffusion.level import Level
from ..diffusion.process import expand
from ..errors import UserError

Scale = float | Sequence[tuple[float, float, float]]


def guided(level: Level, guide: Level, scale: Scale, *, common: bool = False) -> Level:
    """Return a level with guidance. scale: w, or intervals (lowest log-SNR, highest, w), with w = 1 elsewhere.
    common: all levels of the family have this guide. It runs once in every estimate within the intervals, and is free
    as a level. Else the guide is this level's own: both run on every sample, at the sum of their FLOPs.
    Raises UserError for a guide that does not fit."""
    given = [(-math.inf, math.inf, scale)] if isinstance(scale, int | float) else scale
    if any(len(interval) != 3 or not interval[0] < interval[1] for interval in given):
        raise UserError("guided: scale is a number, or intervals (lowest log-SNR, highest, scale).")
    intervals = tuple((float(low), float(high), float(w)) for low, high, w in given)
    if guide.guidance:
        raise UserError(f"{guide.name} is guided itself: the guide of {level.name} is the level before guidance.")
    if level.guidance:
        raise UserError(f"{level.name} is guided already: guide the level before guidance.")
    if level.space and guide.space and level.space != guide.space:
        raise UserError(f"{guide.name} denoises {guide.space}, so it cannot guide {level.name}, of {level.space}.")
    if common and guide.name == level.name:
        return level  # guided by itself it is itself
    if common and (base := level.base or guide.base) is not None:
        raise UserError(f"{level.name} cannot have a common guide: {base.name} is a base already.")

    def denoise(x: Tensor, logsnr: Tensor, *shared: Tensor | None, **given: Any) -> Tensor:
        own = level.denoise(x, logsnr, **_named(level, given))
        other = shared[0] if shared else guide.denoise(x, logsnr, **_named(guide, given))
        if other is None:  # the guide rests at this noise level
            return own
        if isinstance(scale, int | float):
            return other + scale * (own - other)
        w = expand(_scale_at(intervals, logsnr), x)
        return torch.where(w == 1, own, other + w * (own - other))

    names = tuple(dict.fromkeys((*level.conditions, *guide.conditions)))
    out = Level(level.name, denoise, level.flops + guide.flops, conditions=names, space=level.space)
    return replace(out, guidance=intervals, base=guide if common else None)


def _named(level: Level, given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in level.conditions}


def _scale_at(intervals: Sequence[tuple[float, float, float]], logsnr: Tensor) -> Tensor:
    """w at log-SNRs [B] or 0-dimensional."""
    w = torch.ones_like(logsnr)
    for low, high, scale in intervals:
        w = torch.where((logsnr >= low) & (logsnr <= high), scale, w)
    return w
