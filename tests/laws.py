"""Exact power laws of error against FLOPs, shared by the tests of the fits and of the estimates made from them."""

from __future__ import annotations

import numpy as np

from mlem_diffusion.gamma.power_law import fit_differences, fit_loss, fit_to_largest

FORMS = {"loss_fit": fit_loss, "differences": fit_differences, "to_largest": fit_to_largest}
AMPLITUDE, FLOOR = 0.02, 0.01


def flops_of(levels: int) -> np.ndarray:
    return 0.233e9 * 232 ** (np.arange(levels) / (levels - 1))


def law(flops: np.ndarray, gamma: float) -> dict[str, np.ndarray]:
    t = (flops / 1e9) ** (-2 / gamma)
    return {
        "loss_fit": FLOOR + AMPLITUDE * t,
        "differences": AMPLITUDE * (t[:-1] - t[1:]),
        "to_largest": AMPLITUDE * (t[:-1] - t[-1]),
    }


def contains(interval: tuple[float, float | None], gamma: float) -> bool:
    return interval[0] <= gamma and (interval[1] is None or gamma <= interval[1])
