"""Findings about a family as a hierarchy, from its statistics: which levels, which noise levels, what to do."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .level_checks import LevelStatistics, finding, firing_cost, kurtosis, rise, standard_error

NARROW, WIDE = 1.5, 30.0  # cost ratios of neighbours: below, one level is superfluous; above, a level is missing
HEAVY = 20.0  # kurtosis; 3 if the differences of all samples have the same size
COSTLY_BASE = 0.1  # share of the largest level's cost; the base runs at every step


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


def judge(s: LevelStatistics) -> list[dict[str, str]]:
    """All findings about a measured family, warnings first."""
    bad = ~np.isfinite(s.mean_square)
    if bad.any():
        k = int(np.flatnonzero(bad.any(1))[0])
        text = f"{s.names[k]} returns values that are not finite {_where(s, bad[k])}: check its divisions, "
        advice = "or leave these noise levels out (process.logsnr_min, process.logsnr_max)."
        return [finding("error", text + advice)]
    warnings = [*_not_falling(s), *_high_noise(s), *_drops(s), *_cost_ratios(s), *_tails(s)]
    found = [finding("warning", text) for text in warnings] + _growth(s)
    if all(f["severity"] == "ok" for f in found):
        found.append(finding("ok", "The family is a good hierarchy on these trajectories."))
    return sorted(found, key=lambda f: f["severity"] == "ok")


def _where(s: LevelStatistics, hit: np.ndarray) -> str:
    """The noise levels in `hit` [S] as text, by log-SNR ranges."""
    if hit.all():
        return "at every noise level"
    edges = np.flatnonzero(np.diff(np.concatenate([[False], hit, [False]]).astype(int)))
    ends = [(s.logsnr[a], s.logsnr[b - 1]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return "at log-SNR " + " and ".join(f"{a:.1f}" if a == b else f"{a:.1f} to {b:.1f}" for a, b in ends)


def _not_falling(s: LevelStatistics) -> list[str]:
    """Differences larger than those of the level below, if they hold 5% or more of the level's pooled mean square."""
    found = []
    for (c, b, a), k in zip(zip(s.names, s.names[1:], s.names[2:], strict=False), range(2, len(s.names)), strict=True):
        mean, se = rise(s.square[k - 1], s.square[k])
        hit, padded = mean > 2 * se, np.concatenate([[False], mean > 2 * se, [False]])
        if len(hit) > 3:  # a single noise level may be chance
            hit = hit & (padded[:-2] | padded[2:])
        own, before = s.mean_square[k] * s.weights, s.mean_square[k - 1] * s.weights
        share, part = own[hit].sum() / max(own.sum(), 1e-300), s.weights[hit].sum()
        if share >= 0.05:
            found.append(
                f"{a} differs from {b} more than {b} from {c} {_where(s, hit)} ({100 * share:.0f}% of its pooled mean "
                f"square): {own[hit].sum() / part:.1e} against {before[hit].sum() / part:.1e}. "
                f"Train {b} and {a} longer at these noise levels, or let only one of them fire."
            )
    return found


def _high_noise(s: LevelStatistics) -> list[str]:
    """Disagreement at the highest noise, where all denoisers should return the mean of the data.

    The two largest levels differ by training, not by size, if they differ by more than half of the spread of their own
    outputs, and not much less than the smallest levels differ."""
    low, k = np.arange(len(s.logsnr)) < len(s.logsnr) // 3, len(s.names) - 1
    v = s.mean_square[k]
    hit = low & (v > 0.25 * s.top_spread) & (v > 0.1 * s.mean_square[1]) & (v > 0.02 * v.max())
    if len(s.logsnr) < 4 or not hit.any():
        return []
    return [
        f"The levels do not converge where noise is highest: {_where(s, hit)} "
        f"{s.names[k]} and {s.names[k - 1]} differ by {np.sqrt(v[hit].mean()):.2g} rms, "
        f"while the outputs of {s.names[-1]} vary by {np.sqrt(s.top_spread[hit].mean()):.2g} over samples. "
        f"Train these noise levels more, use one level for them, or start sampling at a higher log-SNR."
    ]


def _drops(s: LevelStatistics) -> list[str]:
    """Levels whose removal lowers variance times cost."""
    total = float(np.sqrt(s.pooled[1:].mean(1) * s.firing_costs[1:]).sum())
    if total == 0:
        return ["All levels give the same output: use only the cheapest."]
    chain, change, se = best_chain(s)
    gain = 1 - (1 + change / total) ** 2
    if change > -2 * se or gain < 0.05:
        return []
    *others, last = [name for k, name in enumerate(s.names) if k not in chain]
    dropped = f"{', '.join(others)} and {last}" if others else last
    return [
        f"Drop {dropped}: with {' + '.join(s.names[k] for k in chain)} variance times cost, (sum of sqrt(V c))^2 over "
        f"the levels above the first, is {100 * gain:.0f}% lower "
        f"(pooled over log-SNR {s.logsnr[0]:.1f} to {s.logsnr[-1]:.1f})."
    ]


def _cost_ratios(s: LevelStatistics) -> list[str]:
    found, slow, n = [], [], s.names
    for k in range(1, len(n)):
        ratio, timed = s.flops[k] / s.flops[k - 1], s.seconds[k] / max(s.seconds[k - 1], 1e-12)
        pair = f"{n[k]} costs {ratio:.3g} times the FLOPs of {n[k - 1]}"
        if ratio < NARROW:
            found.append(f"{pair}: too close for two levels. Drop one of them.")
        elif ratio > WIDE and k > 1:  # a base can hardly be too cheap
            found.append(f"{pair}: a wide gap. Train a level between them.")
        elif timed < 1.2:
            figures = f"({timed:.2g} times the seconds, {ratio:.3g} the FLOPs)"
            slow.append(f"{n[k - 1]} saves nothing against {n[k]} {figures}")
    if slow:
        found.append(
            f"In seconds on this device, at this batch size, {', '.join(slow)}. "
            f"Use larger batches, compile, or drop levels if seconds count."
        )
    share = s.flops[0] / s.flops[-1]
    if share > COSTLY_BASE:
        found.append(
            f"{n[0]} runs at every step and costs {100 * share:.0f}% of {n[-1]}: at equal steps no speed-up can exceed "
            f"{1 / share:.2g}. Put a cheaper level below it, such as a linear Gaussian denoiser."
        )
    return found


def _tails(s: LevelStatistics) -> list[str]:
    found, tails = [], kurtosis(s.square)
    for k in range(1, len(s.names)):
        hit = tails[k] > HEAVY
        if hit.any():
            found.append(
                f"Few samples carry the difference {s.names[k]} - {s.names[k - 1]} {_where(s, hit)}: "
                f"kurtosis {np.nanmax(tails[k]):.0f} over {s.square.shape[1]} samples, 3 if all were alike. "
                f"Its mean square and every p from it are unreliable: "
                f"measure with more seeds, and look at the samples on which the two levels disagree."
            )
    return found


def _growth(s: LevelStatistics) -> list[dict[str, str]]:
    """How the mean squares fall with cost: V_k ~ T_k^slope, with gamma = -2 / slope."""
    v = s.pooled[1:].mean(1)
    if len(s.names) < 3 or np.any(v <= 0):
        return []
    x = np.log(s.flops[1:])
    centred = (x - x.mean()) / np.square(x - x.mean()).sum()
    slope = float(centred @ np.log(v))
    se = float(standard_error((centred / v @ s.pooled[1:])[None])[0])
    figures, n = f"V_k falls as T_k^{slope:.2f} (s.e. {se:.2f})", s.names
    if slope > -0.1:
        text = f"The differences hardly fall with cost from {n[1]} - {n[0]} to {n[-1]} - {n[-2]}: {figures}. "
        advice = "Such levels differ by chance more than by size: train all of them longer, or space them wider."
        return [finding("warning", text + advice)]
    if slope + 2 * se > 0:
        text = f"Whether the differences fall with cost cannot be decided: {figures}. Measure with more seeds."
        return [finding("warning", text)]
    gamma = f"{figures}, gamma about {-2 / slope:.2g}"
    if slope - 2 * se > -1:
        text = f"V_k T_k grows with level, harder than Monte Carlo: {gamma}; the largest levels dominate the cost."
    elif slope + 2 * se < -1:
        text = f"V_k T_k falls with level, easier than Monte Carlo: {gamma}; the cheapest levels dominate the cost."
    else:
        text = f"V_k T_k neither grows nor falls measurably with level: {gamma}; all levels share the cost."
    return [finding("ok", text)]
