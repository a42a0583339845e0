"""Guidance as part of a level: D_u + w (D_c - D_u), for classifier-free guidance (Ho and Salimans 2022, with w as 1 + w
there) and autoguidance (Karras et al. 2024), at chosen noise levels (Kynkaanniemi et al. 2024).

With a guide of its own each level costs two evaluations, and levels differ by w (D_k - D_{k-1}) - (w - 1) (U_k -
U_{k-1}), whose parts may cancel. With one guide for all levels (EDM2: the smallest unconditional network) they differ
by w (D_k - D_{k-1}): the variance of coins grows as w^2, but the guide, as a shared base, runs once in every estimate,
because the weights of an estimate add up to one."""

import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.conditions import taken
from ..diffusion.level import Level, check_space
from ..diffusion.process import expand
from ..errors import UserError

Scale = float | Sequence[tuple[float, float, float]]


def guided(level: Level, guide: Level, scale: Scale, *, common: bool = False) -> Level:
    """Return a level with guidance. scale: w, or intervals (lowest log-SNR, highest, w), with w = 1 elsewhere.
    Where intervals overlap, the last one counts.
    common: all levels of the family have this guide. It runs once in every estimate within the intervals, and is free
    as a level. Else the guide is this level's own: both run on every sample, at the sum of their FLOPs, everywhere.
    A condition that both take has the same rows for both. Raises UserError for a guide that does not fit."""
    try:
        given = [(-math.inf, math.inf, scale)] if isinstance(scale, Real) else scale
        intervals = tuple((_single(low), _single(high), float(w)) for low, high, w in given)  # type: ignore[union-attr]
    except (TypeError, ValueError):
        intervals = ((0.0, 0.0, 0.0),)
    if not all(low < high and math.isfinite(w) for low, high, w in intervals):
        raise UserError("guided: scale is a finite number, or a list of intervals (lowest log-SNR, highest, scale).")
    if guide.guidance:
        raise UserError(f"{guide.name} is guided itself: the guide of {level.name} is the level before guidance.")
    if level.guidance:
        raise UserError(f"{level.name} is guided already: guide the level before guidance.")
    check_space(level, guide, "so one cannot guide the other")
    if common and guide == level:
        return level  # guided by itself it is itself
    if common and guide.name == level.name:
        raise UserError(f"{level.name} is the name of the level and of another network, its guide: rename the guide.")
    if common and (base := level.base or guide.base) is not None:
        raise UserError(f"{level.name} cannot have a common guide: {base.name} is a base already.")

    def denoise(x: Tensor, logsnr: Tensor, *shared: Tensor | None, **given: Any) -> Tensor:
        own = level.denoise(x, logsnr, **taken(level, given))
        other = shared[0] if shared else guide.denoise(x, logsnr, **taken(guide, given))
        if other is None:  # the guide rests at this noise level
            return own
        if isinstance(scale, Real):
            return other + float(scale) * (own - other)
        w = expand(_scale_at(intervals, logsnr), x)
        return torch.where(w == 1, own, other + w * (own - other))

    names = tuple(dict.fromkeys((*level.conditions, *guide.conditions)))
    out = Level(level.name, denoise, level.flops + guide.flops, conditions=names, space=level.space)
    return replace(out, guidance=intervals, base=guide if common else None)


def _single(value: float) -> float:
    """A number as levels know it, in single precision."""
    return float(np.float32(value))


def _scale_at(intervals: Sequence[tuple[float, float, float]], logsnr: Tensor) -> Tensor:
    """w at log-SNRs [B] or 0-dimensional."""
    w = torch.ones_like(logsnr)
    for low, high, scale in intervals:
        w = torch.where((logsnr >= low) & (logsnr <= high), scale, w)
    return w
