"""The answer to gamma > 2 (harder than Monte Carlo), and when the estimates behind it apply."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as t_distribution

from ..models.unet import UNet
from .power_law import CONFIDENCE, Fit, Interval

NESTED = 1.3  # the largest E|f^k - f^(k-1)|^2 / drop in loss for which the laws of differences are used; nested: 1
BY_LOSS, BY_DIFFERENCES = ("loss_fit", "drops"), ("differences", "to_largest")


def nestedness(names: Sequence[str], loss: np.ndarray, to_previous: np.ndarray, scatter: float) -> list[dict[str, Any]]:
    """For each pair of neighbours, E|f^k - f^(k-1)|^2 / (L_(k-1) - L_k), and whether it is at most `NESTED`.
    loss [K, M], to_previous [K-1, M]: per image, pooled over noise levels. scatter: the variance from training of the
    logarithm of a level's loss. "ratio" is None if the loss does not drop; "se" is over the same images."""
    k, m = loss.shape
    mean, found, drops = loss.mean(1), [], -np.diff(loss, axis=0)
    quantile = t_distribution.ppf(CONFIDENCE, k - 3) if k > 3 else np.inf
    for i, (drop, difference) in enumerate(zip(drops, to_previous, strict=True)):
        # The ratio must be shown to be small, given the scatter from training. Where that exceeds the drops, levels
        # that are not nested pass the plain ratios by luck: of 27 simulated families with incoherent parts that passed
        # (tests/test_power_law.py, 200 repeats a cell), the interval from differences missed gamma in 15.
        below = NESTED * drop - difference
        variance = below.var(ddof=1) / m + NESTED**2 * scatter * (mean[i] ** 2 + mean[i + 1] ** 2)
        ratio = float(difference.mean() / drop.mean()) if drop.mean() > 0 else None
        se = None if ratio is None else float((difference - ratio * drop).std(ddof=1) / np.sqrt(m) / drop.mean())
        nested = bool(below.mean() > 0 and below.mean() >= quantile * np.sqrt(variance))
        found.append({"names": list(names[i : i + 2]), "ratio": ratio, "se": se, "nested": nested})
    return found


def htmc_answer(fits: Mapping[str, Fit], nested: bool) -> tuple[str, str]:
    """Whether the problem is harder than Monte Carlo (gamma > 2): "yes", "no" or "undetermined", and a reason.
    The two fits to the loss are one law: they speak where their intervals agree. For nested levels the two laws of
    differences decide together, and the loss can veto, by intervals on the other side or by a loss that does not fall
    with FLOPs. For others the loss decides alone."""
    deciding = BY_DIFFERENCES if nested else BY_LOSS
    for name in BY_DIFFERENCES if nested else ():
        if fits[name].gamma is None:
            return "undetermined", f"The estimate from {name} has no finite exponent. {fits[name].note}"
    if not fits["loss_fit"].falls:
        reason = "The loss does not fall measurably with FLOPs, so the levels are no hierarchy of accuracy."
        return "undetermined", reason
    why = "" if nested else " Decided by the loss alone: the levels are not shown to be nested."
    shown = dict.fromkeys([*deciding, *BY_LOSS])
    intervals = "; ".join(f"{name} {interval_text(fits[name].interval)}" for name in shown)
    side, loss = _common_side(fits, deciding), _common_side(fits, BY_LOSS)
    if side == 0:
        return "undetermined", f"The 95% intervals do not settle on which side of 2 gamma lies: {intervals}.{why}"
    where = "above" if side > 0 else "below"
    if loss == -side:
        return "undetermined", f"The level differences put gamma {where} 2, the loss on the other side: {intervals}."
    return "yes" if side > 0 else "no", f"The deciding estimates lie {where} 2: {intervals}.{why}"


def _common_side(fits: Mapping[str, Fit], names: Sequence[str]) -> int:
    """1 if these intervals are all above 2, -1 if all are below, else 0."""
    low = min(fits[name].interval[0] for name in names)
    highs = [fits[name].interval[1] for name in names]
    return 1 if low > 2 else -1 if all(high is not None and high < 2 for high in highs) else 0


def interval_text(interval: Interval) -> str:
    return f"[{interval[0]:.2f}, {'unbounded' if interval[1] is None else f'{interval[1]:.2f}'}]"


def mixed_architectures(family: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on how the levels (metadata) differ in the network's settings, besides the width; empty if not."""
    defaults = {p.name: p.default for p in inspect.signature(UNet).parameters.values() if p.default is not p.empty}
    settings = {m["name"]: {**defaults, **m.get("unet", {}), "target": m.get("target")} for m in family}
    differing = []
    for key in dict.fromkeys(key for own in settings.values() for key in own):
        values: dict[str, list[str]] = {}
        for name, own in settings.items():
            value = own.get(key)
            values.setdefault(str(list(value) if isinstance(value, (list, tuple)) else value), []).append(name)
        if len(values) > 1:
            differing.append(f"{key} " + ", ".join(f"{value} in {'+'.join(names)}" for value, names in values.items()))
    if not differing:
        return ""
    return f"The levels are not one architecture of several widths ({'; '.join(differing)}): no law joins them."
