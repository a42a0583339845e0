"""Checks of the hierarchy: levels get better and closer, and losses fall during training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from .estimate import LevelErrors, standard_errors


def hierarchy_warnings(errors: LevelErrors) -> list[str]:
    """Sentences about neighbouring levels that do not get better or closer as assumed; empty if all do.

    Each pair has three checks, pooled and per noise level, with two standard errors over the same images (paired).
    The loss falls. E|f^k - f^(k-1)|^2 per unit of log FLOPs falls from one pair to the next (a power law is convex in
    log FLOPs). The levels are nested: E|f^k - f^(k-1)|^2 is about the drop in loss, and at most twice the drop.
    """
    found, names = [], errors.names
    per_log = errors.to_previous / np.log(errors.flops[1:] / errors.flops[:-1])[:, None, None]
    for k in range(1, len(names)):
        low, high = names[k - 1], names[k]
        drop = errors.loss[k - 1] - errors.loss[k]
        if where := _where(errors, drop, positive=False):
            worse = _where(errors, -drop, positive=True)
            text = f"{high} is not measurably better than {low} in loss {where}"
            found.append(f"{text}, and worse {worse}." if worse else f"{text}.")
        if k >= 2 and (where := _where(errors, per_log[k - 2] - per_log[k - 1], positive=False)):
            found.append(f"{low} to {high} is not a smaller step than {names[k - 2]} to {low} {where}.")
        if where := _where(errors, errors.to_previous[k - 1] - 2 * drop, positive=True):
            found.append(f"{low} and {high} differ by more than twice the drop in loss {where}: they are not nested.")
    return found


def _where(errors: LevelErrors, values: np.ndarray, *, positive: bool) -> str:
    """The noise levels where the mean over images of values [M, S] is (not) above two standard errors, as text."""

    def hit(x: np.ndarray) -> np.ndarray:
        return (x.mean(0) > 2 * standard_errors(x.T)) == positive

    places = [f"{value:.1f}" for value in errors.logsnr[hit(values)]]
    parts = ["pooled"] if hit(values @ errors.weights) else []
    if places:
        parts.append(f"at log-SNR {', '.join(places)} ({len(places)} of {len(errors.logsnr)} noise levels)")
    return " and ".join(parts)


def overfitting_warnings(
    names: Sequence[str], images: Sequence[Sequence[int]], losses: Sequence[np.ndarray]
) -> list[str]:
    """Sentences about levels whose held-out loss rises from one training length to a later one, by more than two
    standard errors over the same images; the largest rise of each.

    images [lengths][K]: images seen in training. losses: per length [K, M], pooled over noise levels."""
    found = []
    for k, name in enumerate(names):
        rises = []
        for i, j in combinations(range(len(losses)), 2):
            rise = losses[j][k] - losses[i][k]
            mean, se = float(rise.mean()), float(standard_errors(rise))
            if mean > 2 * se:
                rises.append((mean, f"{images[j][k]:,} images is above that after {images[i][k]:,} by {mean:.3g}", se))
        if rises:
            _, text, se = max(rises)
            text = f"The held-out loss of {name} after {text} (s.e. {se:.1g})"
            found.append(f"{text}: it overfits, or its learning rate is too high.")
    return found
