"""Findings about a family as a hierarchy, from its statistics: which levels, which noise levels, what to do."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .level_checks import Finding
from .level_statistics import LevelStatistics, firing_cost, kurtosis, standard_error

NARROW, WIDE = 1.5, 30.0  # cost ratios of neighbours: below, one level is superfluous; above, a level is missing
HEAVY = 20.0  # kurtosis; 3 if the differences of all samples have the same size
COSTLY_BASE = 0.1  # share of the largest level's cost; the base runs at every step


def judge(s: LevelStatistics) -> list[Finding]:
    """All findings about a measured family, warnings first."""
    bad = ~np.isfinite(s.mean_square)
    if bad.any():
        return [
            Finding(
                "error",
                f"{s.names[k]} returns values that are not finite {_where(s, bad[k])}: check its divisions, "
                f"or leave these noise levels out (process.logsnr_min, process.logsnr_max).",
            )
            for k in np.flatnonzero(bad.any(1))[:1]
        ]
    found = [*_not_falling(s), *_high_noise(s), *_drops(s), *_cost_ratios(s), *_tails(s)]
    growth = _growth(s)
    found += [growth] if growth else []
    if all(finding.severity == "ok" for finding in found):
        found.append(Finding("ok", "The family is a good hierarchy on these trajectories."))
    return sorted(found, key=lambda finding: finding.severity == "ok")


def _where(s: LevelStatistics, hit: np.ndarray) -> str:
    """The noise levels in `hit` [S] as text, by log-SNR ranges."""
    if hit.all():
        return "at every noise level"
    edges = np.flatnonzero(np.diff(np.concatenate([[False], hit, [False]]).astype(int)))
    ends = [(s.logsnr[a], s.logsnr[b - 1]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return "at log-SNR " + " and ".join(f"{a:.1f}" if a == b else f"{a:.1f} to {b:.1f}" for a, b in ends)


def _above(values: np.ndarray) -> np.ndarray:
    """Whether means over samples of paired values [N, ...] are above zero by more than two standard errors."""
    return values.mean(0) > 2 * standard_error(values[None])[0]


def _long_runs(hit: np.ndarray) -> np.ndarray:
    """The hits [S] that have a neighbouring hit, since a single noise level may be chance."""
    padded = np.concatenate([[False], hit, [False]])
    return hit & (padded[:-2] | padded[2:]) if len(hit) > 3 else hit


def _not_falling(s: LevelStatistics) -> list[Finding]:
    """Differences larger than those of the level below, if they hold 5% or more of the level's pooled mean square."""
    found = []
    for k in range(2, len(s.names)):
        hit = _long_runs(_above(s.square[k] - s.square[k - 1]))
        own, before = s.mean_square[k] * s.weights, s.mean_square[k - 1] * s.weights
        share = own[hit].sum() / max(own.sum(), 1e-300)
        if share < 0.05:
            continue
        part = s.weights[hit].sum()
        found.append(
            Finding(
                "warning",
                f"{s.names[k]} differs from {s.names[k - 1]} more than {s.names[k - 1]} from {s.names[k - 2]} "
                f"{_where(s, hit)} ({100 * share:.0f}% of its pooled mean square): "
                f"{own[hit].sum() / part:.1e} against {before[hit].sum() / part:.1e}. "
                f"Train {s.names[k - 1]} and {s.names[k]} longer at these noise levels, or let only one of them fire.",
            )
        )
    return found


def _high_noise(s: LevelStatistics) -> list[Finding]:
    """Disagreement at the highest noise, where all denoisers should return the mean of the data.

    The two largest levels differ by training, not by size, if they differ by more than half of the spread of their own
    outputs, and not much less than the smallest levels differ."""
    if len(s.logsnr) < 4:
        return []
    low, k = np.arange(len(s.logsnr)) < len(s.logsnr) // 3, len(s.names) - 1
    v = s.mean_square[k]
    hit = low & (v > 0.25 * s.top_spread) & (v > 0.1 * s.mean_square[1]) & (v > 0.02 * v.max())
    if not hit.any():
        return []
    return [
        Finding(
            "warning",
            f"The levels do not converge where noise is highest: {_where(s, hit)} "
            f"{s.names[k]} and {s.names[k - 1]} differ by {np.sqrt(v[hit].mean()):.2g} rms, "
            f"while the outputs of {s.names[-1]} vary by {np.sqrt(s.top_spread[hit].mean()):.2g} over samples. "
            f"Train these noise levels more, use one level for them, or start sampling at a higher log-SNR.",
        )
    ]


def best_chain(s: LevelStatistics) -> tuple[list[int], float, float]:
    """The chain of levels, from the cheapest to the largest, with the smallest sum of sqrt(V c) over its steps.

    V and c of a step are those of the difference of the two levels that it joins. Also returns the change of the sum
    against the chain of all levels, and the standard error of this change. With the best constant p, the square of the
    sum is the product of variance and cost of all random differences. A chain is a path, so the best one is a shortest
    path.
    """
    last = len(s.names) - 1
    q = {(i, j): s.pairs[i + 1, j] @ s.weights for j in range(1, last + 1) for i in range(j)}
    cost = {(i, j): firing_cost(s.flops, i, j) for i, j in q}
    length, before = [0.0], [0]
    for j in range(1, last + 1):
        options = [length[i] + float(np.sqrt(q[i, j].mean() * cost[i, j])) for i in range(j)]
        before.append(int(np.argmin(options)))
        length.append(min(options))
    chain = [last]
    while chain[-1] != 0:
        chain.append(before[chain[-1]])
    chain.reverse()
    change, influence = 0.0, np.zeros(s.pairs.shape[2])
    for path, sign in ((chain, 1), (range(last + 1), -1)):
        for pair in pairwise(path):
            root = float(np.sqrt(max(q[pair].mean(), 1e-300)))
            change += sign * root * np.sqrt(cost[pair])
            influence += sign * np.sqrt(cost[pair]) * 0.5 * q[pair] / root
    return chain, change, float(standard_error(influence[None])[0])


def _drops(s: LevelStatistics) -> list[Finding]:
    """Levels whose removal lowers variance times cost."""
    total = float(np.sqrt(s.pooled[1:].mean(1) * s.firing_costs[1:]).sum())
    if total == 0:
        return [Finding("warning", "All levels give the same output: use only the cheapest.")]
    chain, change, se = best_chain(s)
    gain = 1 - (1 + change / total) ** 2
    if change > -2 * se or gain < 0.05:
        return []
    *others, last = [name for k, name in enumerate(s.names) if k not in chain]
    dropped = f"{', '.join(others)} and {last}" if others else last
    kept = " + ".join(s.names[k] for k in chain)
    return [
        Finding(
            "warning",
            f"Drop {dropped}: with {kept} variance times cost, (sum of sqrt(V c))^2 over the levels above the first, "
            f"is {100 * gain:.0f}% lower (pooled over log-SNR {s.logsnr[0]:.1f} to {s.logsnr[-1]:.1f}).",
        )
    ]


def _cost_ratios(s: LevelStatistics) -> list[Finding]:
    found, n, slow = [], s.names, []
    for k in range(1, len(n)):
        ratio, timed = s.flops[k] / s.flops[k - 1], s.seconds[k] / max(s.seconds[k - 1], 1e-12)
        pair = f"{n[k]} costs {ratio:.3g} times the FLOPs of {n[k - 1]}"
        if ratio < NARROW:
            found.append(Finding("warning", f"{pair}: too close for two levels. Drop one of them."))
        elif ratio > WIDE and k > 1:  # a base can hardly be too cheap
            found.append(Finding("warning", f"{pair}: a wide gap. Train a level between them."))
        elif timed < 1.2:
            slow.append(
                f"{n[k - 1]} saves nothing against {n[k]} ({timed:.2g} times the seconds, {ratio:.3g} the FLOPs)"
            )
    if slow:
        found.append(
            Finding(
                "warning",
                f"In seconds on this device, at this batch size, {', '.join(slow)}. "
                f"Use larger batches, compile, or drop levels if seconds count.",
            )
        )
    share = s.flops[0] / s.flops[-1]
    if share > COSTLY_BASE:
        found.append(
            Finding(
                "warning",
                f"{n[0]} runs at every step and costs {100 * share:.0f}% of {n[-1]}: "
                f"at equal steps no speed-up can exceed {1 / share:.2g}. "
                f"Put a cheaper level below it, such as a linear Gaussian denoiser.",
            )
        )
    return found


def _tails(s: LevelStatistics) -> list[Finding]:
    found, tails = [], kurtosis(s.square)
    for k, values in list(enumerate(tails))[1:]:
        hit = values > HEAVY
        if hit.any():
            found.append(
                Finding(
                    "warning",
                    f"Few samples carry the difference {s.label(k)} {_where(s, hit)}: "
                    f"kurtosis {np.nanmax(values):.0f} over {s.square.shape[1]} samples, 3 if all were alike. "
                    f"Its mean square and every p from it are unreliable: "
                    f"measure with more seeds, and look at the samples on which the two levels disagree.",
                )
            )
    return found


def _growth(s: LevelStatistics) -> Finding | None:
    """How the mean squares fall with cost: V_k ~ T_k^slope, with gamma = -2 / slope."""
    if len(s.names) < 3:
        return None
    x = np.log(s.flops[1:])
    centred = (x - x.mean()) / np.square(x - x.mean()).sum()
    v = s.pooled[1:].mean(1)
    if np.any(v <= 0):
        return None
    slope = float(centred @ np.log(v))
    se = float(standard_error((centred / v @ s.pooled[1:])[None])[0])
    figures = f"V_k falls as T_k^{slope:.2f} (s.e. {se:.2f})"
    if slope > -0.1:
        return Finding(
            "warning",
            f"The differences hardly fall with cost from {s.label(1)} to {s.label(len(s.names) - 1)}: {figures}. "
            f"Such levels differ by chance more than by size: train all of them longer, or space them wider.",
        )
    if slope + 2 * se > 0:
        return Finding(
            "warning", f"Whether the differences fall with cost cannot be decided: {figures}. Measure with more seeds."
        )
    gamma = f"{figures}, gamma about {-2 / slope:.2g}"
    if slope - 2 * se > -1:
        return Finding(
            "ok", f"V_k T_k grows with level, harder than Monte Carlo: {gamma}; the largest levels dominate the cost."
        )
    if slope + 2 * se < -1:
        return Finding(
            "ok", f"V_k T_k falls with level, easier than Monte Carlo: {gamma}; the cheapest levels dominate the cost."
        )
    return Finding("ok", f"V_k T_k neither grows nor falls measurably with level: {gamma}; all levels share the cost.")
