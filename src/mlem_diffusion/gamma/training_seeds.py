"""How much a level's errors change when it is trained again from another seed.

Only a few levels are repeated, usually the cheapest, and their spread stands for that of all levels: the variance of
the logarithm of each value that a law is fitted to. It excludes effects that all seeds share (data, recipe).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .denoising_errors import Pair
from .estimate import LevelErrors

# The index k of a level trained again as g, its seed, and the values [M, S] of its pairs: |g - x0|^2, |g - f^K|^2,
# |f^(k+1) - g|^2 and, if k > 0, |g - f^(k-1)|^2.
Repeat = tuple[int, int, Sequence[np.ndarray]]
# the law that each of these values belongs to, and its index there, less k
_VALUES = (("loss_fit", 0), ("to_largest", 0), ("differences", 0), ("differences", -1))


def repeat_pairs(levels: int, repeated: Sequence[int]) -> list[list[Pair]]:
    """The pairs of each repeat (k given); the repeats follow the family's `levels` in the list of levels."""
    pairs: list[list[Pair]] = []
    for own, k in enumerate(repeated, start=levels):
        group: list[Pair] = [(own, None), (own, levels - 1), (own, k + 1), (own, k - 1)]
        pairs.append(group if k else group[:3])
    return pairs


def seed_spread(errors: LevelErrors, repeats: Sequence[Repeat]) -> tuple[dict[str, float], dict[str, Any]]:
    """The variances between training seeds by law, pooled over the repeated levels, and the entry of gamma.json.

    Two separately trained levels enter a value of `differences`, so its variance is twice that of retraining one of
    them. log_error_sd is for the root-mean-square error: half the value for the squared error."""
    squares, dof = dict.fromkeys(errors.by_form, 0.0), dict.fromkeys(errors.by_form, 0)
    levels = sorted({k for k, _, _ in repeats})
    for k in levels:
        for i, (form, offset) in enumerate(_VALUES if k else _VALUES[:3]):
            group = [errors.by_form[form][k + offset], *(values[i] for level, _, values in repeats if level == k)]
            logs = np.log([float((values @ errors.weights).mean()) for values in group])
            squares[form] += float(((logs - logs.mean()) ** 2).sum())
            dof[form] += len(logs) - 1
    variance = {form: (2 if form == "differences" else 1) * squares[form] / dof[form] for form in dof}
    return variance, {
        "levels": [errors.names[k] for k in levels],
        "seeds": sorted({seed for _, seed, _ in repeats}),
        "log_error_sd": {form: float(np.sqrt(v)) / 2 for form, v in variance.items()},
        "degrees_of_freedom": dof,
    }
