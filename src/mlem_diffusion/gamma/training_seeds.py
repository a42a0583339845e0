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

# the values of a repeated level k, and their index, less k, among the values of the law
_VALUES = (("loss_fit", 0), ("to_largest", 0), ("differences", 0), ("differences", -1))


@dataclass(frozen=True)
class Repeat:
    """One level k trained again as g, below the largest: |g - x0|^2, |g - f^K|^2, |f^(k+1) - g|^2 and, if k > 0,
    |g - f^(k-1)|^2 on the images, noise levels and noise of `LevelErrors`."""

    level: int  # its index k in the family
    seed: int
    values: Sequence[np.ndarray]  # 4 times [M, S], 3 times for the cheapest level


def repeat_pairs(levels: int, repeated: Sequence[int]) -> list[list[Pair]]:
    """The pairs of each `Repeat` (k given); the repeats follow the family's `levels` in the list of levels."""
    pairs: list[list[Pair]] = [
        [(own, None), (own, levels - 1), (own, k + 1), (own, k - 1)] for own, k in enumerate(repeated, start=levels)
    ]
    return [group if k else group[:3] for group, k in zip(pairs, repeated, strict=True)]


def seed_spread(errors: LevelErrors, repeats: Sequence[Repeat]) -> tuple[dict[str, float], dict[str, Any]]:
    """The variances between training seeds by law, pooled over the repeated levels, and the entry of gamma.json.

    Two separately trained levels enter a value of `differences`, so its variance is twice that of retraining one of
    them. log_error_sd is for the root-mean-square error: half the value for the squared error."""
    levels = sorted({r.level for r in repeats})
    if not levels or levels[0] < 0 or levels[-1] >= len(errors.names) - 1:
        raise UserError("The spread between seeds needs repeated trainings of levels below the largest one.")
    squares, dof = dict.fromkeys(errors.by_form, 0.0), dict.fromkeys(errors.by_form, 0)
    for k in levels:
        for i, (form, offset) in enumerate(_VALUES if k else _VALUES[:3]):
            group = [errors.by_form[form][k + offset], *(r.values[i] for r in repeats if r.level == k)]
            logs = np.log([float(errors.pool(values).mean()) for values in group])
            squares[form] += float(((logs - logs.mean()) ** 2).sum())
            dof[form] += len(logs) - 1
    variance = {form: (2 if form == "differences" else 1) * squares[form] / dof[form] for form in dof}
    return variance, {
        "levels": [errors.names[k] for k in levels],
        "seeds": sorted({r.seed for r in repeats}),
        "log_error_sd": {form: float(np.sqrt(v)) / 2 for form, v in variance.items()},
        "degrees_of_freedom": dof,
    }
