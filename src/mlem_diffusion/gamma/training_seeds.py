"""How much a level's errors change when it is trained again from another seed.

Only a few levels are repeated, usually the cheapest, and their spread stands for that of all levels. The spread is the
variance of the logarithm of each value that a law is fitted to, pooled over the repeated levels. It excludes effects
that all seeds share (data, recipe).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .denoising_errors import Pair
from .estimate import LevelErrors


@dataclass(frozen=True)
class Repeat:
    """One level trained again: its squared errors on the images, noise levels and noise of `LevelErrors`."""

    level: int  # index of the repeated level in the family, below the largest
    seed: int
    loss: np.ndarray  # [M, S] |g - x0|^2, where g is this training of the level
    to_largest: np.ndarray  # [M, S] |g - f^K|^2
    to_upper: np.ndarray  # [M, S] |f^(k+1) - g|^2
    to_lower: np.ndarray | None = None  # [M, S] |g - f^(k-1)|^2; None for the cheapest level


@dataclass(frozen=True)
class SeedSpread:
    """The variance between training seeds of the logarithm of each value that a law is fitted to."""

    variance: dict[str, float]  # by form: loss_fit, differences, to_largest
    degrees_of_freedom: dict[str, int]


def repeat_pairs(levels: int, repeated: Sequence[int]) -> list[list[Pair]]:
    """For each repeated level (index in the family) the pairs of `Repeat`'s fields, in their order.

    The repeats follow the family's `levels` in the list of levels."""
    out = []
    for own, level in enumerate(repeated, start=levels):
        lower: list[Pair] = [(own, level - 1)] if level else []
        out.append([(own, None), (own, levels - 1), (own, level + 1), *lower])
    return out


def seed_spread(errors: LevelErrors, repeats: Sequence[Repeat]) -> SeedSpread:
    """The variances between training seeds, pooled over the repeated levels.

    Two separately trained levels enter a value of `differences`, so its variance is twice that of retraining one of
    them. Raises UserError without repeats, or for a level that cannot be compared."""
    if not repeats or any(not 0 <= r.level < len(errors.names) - 1 for r in repeats):
        raise UserError("The spread between seeds needs repeated trainings of levels below the largest one.")
    groups: dict[str, list[list[np.ndarray]]] = {"loss_fit": [], "differences": [], "to_largest": []}
    for k in sorted({r.level for r in repeats}):
        again = [r for r in repeats if r.level == k]
        groups["loss_fit"].append([errors.loss[k], *(r.loss for r in again)])
        groups["to_largest"].append([errors.to_largest[k], *(r.to_largest for r in again)])
        groups["differences"].append([errors.to_previous[k], *(r.to_upper for r in again)])
        lower = [r.to_lower for r in again if r.to_lower is not None]
        if lower:
            groups["differences"].append([errors.to_previous[k - 1], *lower])
    variance, dof = {}, {}
    for form, found in groups.items():
        logs = [np.log([float(errors.pool(values).mean()) for values in group]) for group in found]
        dof[form] = sum(len(x) - 1 for x in logs)
        pooled = sum(float(((x - x.mean()) ** 2).sum()) for x in logs) / dof[form]
        variance[form] = 2 * pooled if form == "differences" else pooled
    return SeedSpread(variance, dof)


def as_json(errors: LevelErrors, repeats: Sequence[Repeat], spread: SeedSpread) -> dict[str, Any]:
    """The entry of gamma.json. log_error_sd is for the root-mean-square error: half the value for the squared error."""
    return {
        "levels": [errors.names[k] for k in sorted({r.level for r in repeats})],
        "seeds": sorted({r.seed for r in repeats}),
        "log_error_sd": {form: float(np.sqrt(v)) / 2 for form, v in spread.variance.items()},
        "degrees_of_freedom": spread.degrees_of_freedom,
    }
