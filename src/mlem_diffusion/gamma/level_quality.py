"""Checks of the hierarchy: levels get better and closer, differences fall, and losses fall during training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from .estimate import LevelErrors, standard_errors


def hierarchy_warnings(errors: LevelErrors) -> list[str]:
    """Sentences about neighbouring levels that do not get better or closer as assumed; empty if all do.

    Each pair has three checks, pooled and per noise level, with two standard errors over the same images (paired).
    The loss falls. E|f^k - f^(k-1)|^2 per unit of log FLOPs falls from one pair to the next (a power law is convex in
    log FLOPs). The levels are nested: E|f^k - f^(k-1)|^2 is about the drop in loss, and at most twice the drop.
    """
    found = []
    names = errors.names
    per_log = errors.to_previous / np.log(errors.flops[1:] / errors.flops[:-1])[:, None, None]
    for k in range(1, len(names)):
        low, high = names[k - 1], names[k]
        drop = errors.loss[k - 1] - errors.loss[k]
        where = _where(errors, drop, positive=False)
        if where:
            worse = _where(errors, -drop, positive=True)
            text = f"{high} is not measurably better than {low} in loss {where}"
            found.append(f"{text}, and worse {worse}." if worse else f"{text}.")
        if k >= 2:
            where = _where(errors, per_log[k - 2] - per_log[k - 1], positive=False)
            if where:
                found.append(f"{low} to {high} is not a smaller step than {names[k - 2]} to {low} {where}.")
        where = _where(errors, errors.to_previous[k - 1] - 2 * drop, positive=True)
        if where:
            found.append(f"{low} and {high} differ by more than twice the drop in loss {where}: they are not nested.")
    return found


def _where(errors: LevelErrors, values: np.ndarray, *, positive: bool) -> str:
    """The noise levels where the mean over images of values [M, S] is (not) above two standard errors, as text."""

    def hit(x: np.ndarray) -> np.ndarray:
        return (x.mean(0) > 2 * standard_errors(x.T)) == positive

    places = [f"{value:.1f}" for value in errors.logsnr[hit(values)]]
    parts = ["pooled"] if bool(hit(errors.pool(values))) else []
    if places:
        parts.append(f"at log-SNR {', '.join(places)} ({len(places)} of {len(errors.logsnr)} noise levels)")
    return " and ".join(parts)


def differences_fall(errors: LevelErrors) -> dict[str, Any]:
    """Whether the differences fall from each level to the next, pooled and at each noise level; ready for JSON.

    The differences are E|f^k - f^K|^2 (to_largest) and E|f^k - f^(k-1)|^2 (to_previous). "pairs", per kind: the levels
    whose values are compared (for to_previous, the upper levels of the two differences). "ratio" [pairs][S]: later
    value / earlier value, below 1 if the value falls. "violations": rises by more than two standard errors over the
    same held-out images (logsnr None: pooled).
    """
    names, kinds, violations, checks = errors.names, {}, [], 0
    for kind, array, labels in (
        ("to_largest", errors.to_largest, names[:-1]),
        ("to_previous", errors.to_previous, names[1:]),
    ):
        pairs, ratios = [], []
        for k in range(1, len(array)):
            pairs.append([labels[k - 1], labels[k]])
            ratios.append((array[k].mean(0) / np.maximum(array[k - 1].mean(0), 1e-300)).tolist())
            columns = np.column_stack([(array[i] @ errors.weights)[:, None] for i in (k - 1, k)])
            places = [(None, columns[:, 0], columns[:, 1])]
            places += [(float(x), array[k - 1][:, j], array[k][:, j]) for j, x in enumerate(errors.logsnr)]
            for logsnr, earlier, later in places:
                checks += 1
                rise, unit = later - earlier, max(float(earlier.mean()), 1e-300)
                se = float(rise.std(ddof=1) / np.sqrt(len(rise)))
                if rise.mean() > 2 * se:
                    where = {"kind": kind, "levels": pairs[-1], "logsnr": logsnr}
                    violations.append({**where, "ratio": float(later.mean()) / unit, "ratio_se": se / unit})
        kinds[kind] = {"pairs": pairs, "ratio": ratios}
    return {
        "criterion": "a rise by more than two standard errors, over the same held-out images, is a violation",
        "noise_levels": errors.logsnr.tolist(),
        "checks": checks,
        **kinds,
        "violations": violations,
    }


def overfitting_warnings(
    names: Sequence[str], images: Sequence[Sequence[int]], losses: Sequence[np.ndarray]
) -> list[str]:
    """Sentences about levels whose held-out loss rises from one training length to a later one.

    Only rises by more than two standard errors over the same images count. images [lengths][K]: images seen in
    training. losses: per length [K, M], pooled over noise levels."""
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
