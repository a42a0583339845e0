"""Diagnostics of a family before it is used: statistics per level, the telescope check, and findings.

Multilevel Monte Carlo codes (Giles 2015, section 3) first report the mean, variance and kurtosis of each level
difference, its cost, and a consistency check. In a diffusion model the differences depend on the state and the noise
level, so they are measured along the largest level's own trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from ..diffusion.brownian import BrownianPath
from ..diffusion.level import Level, check_family
from ..diffusion.process import Process
from ..diffusion.step_rules import StepRule
from ..errors import UserError
from .estimators import Multilevel
from .level_checks import (
    LevelStatistics,
    check_contract,
    check_telescope,
    finding,
    firing_cost,
    measure,
    telescope_finding,
)

NARROW, WIDE = 1.5, 30.0  # cost ratios of neighbours: below, one level is superfluous; above, a level is missing
HEAVY = 20.0  # kurtosis; 3 if the differences of all samples have the same size
COSTLY_BASE = 0.1  # share of the largest level's cost; the base runs at every step


def diagnose(
    family: Sequence[Level],
    process: Process,
    rule: StepRule,
    path: BrownianPath,
    steps: int = 24,
    batch: int = 64,
    p: np.ndarray | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Check a family's levels and telescope, and measure their differences along the largest level's trajectories.

    steps: number of visited noise levels. p: [K], or [n, K] over the n evaluations of a sampling run (for [K], n is
    that of `steps`); adds the expected firings and evaluations per image. progress: called with (images done, all
    images), counted over noise levels. Cost: one evaluation of every level per seed and step, and 64 to 256 of each for
    the checks.

    Returns JSON values without NaN. Lists start at the cheapest level, whose difference is its own output; arrays have
    axes (levels, noise levels). pair_mean_square [i][j] is E|f^j - f^i|^2 for i < j, else 0. There are no statistics if
    a level violates the contract. A violated contract, a wrong telescope or a poor hierarchy is a finding, not an
    exception. Raises UserError for fewer than two levels, levels not ordered by cost, fewer than two seeds, and
    probabilities that do not fit.
    """
    check_family(family)
    if len(family) < 2 or len(path.seeds) < 2:
        raise UserError("Diagnostics need at least two levels and two seeds.")
    names, flops = [level.name for level in family], [float(level.flops) for level in family]
    out: dict[str, Any] = {"levels": names, "flops": flops, "dynamics": rule.dynamics, "step_rule": rule.name}
    out |= {"samples": len(path.seeds), "telescope": None, "firings": None, "evaluations": None, "flops_spent": 0.0}
    if p is not None:
        n = len(p) if np.ndim(p) == 2 else len(rule.program(process.grid(steps)))
        out["evaluations"] = Multilevel(tuple(family), p).expected_evaluations(n)
        out["firings"] = np.broadcast_to(p, (n, len(family))).sum(0)
    x = BrownianPath(path.seeds[: min(8, batch)], path.shape, path.device).initial()
    # states in the middle of the path are nearly standard normal too, so one set of states serves all checks
    middle = float(process.logsnr_at(np.array(0.5)))
    found = check_contract(family, x, process.logsnr_min) or check_contract(family, x, middle)
    if not any(f["severity"] == "error" for f in found):
        out["telescope"] = check_telescope(family, x, middle, batch=batch)
        statistics, out["flops_spent"] = measure(family, process, rule, path, steps, batch, progress)
        out |= describe(statistics)
        found, checked = [*found, *judge(statistics)], telescope_finding(out["telescope"])
        found = [*found, checked] if checked["severity"] == "ok" else [checked, *found]
    return _plain(out | {"findings": found})


def describe(s: LevelStatistics) -> dict[str, Any]:
    """Statistics per noise level and pooled over them; standard errors are over samples. best_levels: of best_chain."""
    signed, finite = s.signed @ s.weights, np.isfinite(s.pairs).all()
    per_noise_level = {
        "mean": s.signed.mean(1),
        "mean_se": standard_error(s.signed),
        "mean_square": s.mean_square,
        "mean_square_se": standard_error(s.square),
        "variance": s.spread,
        "kurtosis": kurtosis(s.square),
        "pair_mean_square": s.pairs[1:].mean(2),
        "largest_variance": s.top_spread,
    }
    pooled = {
        "mean": signed.mean(1),
        "mean_se": standard_error(signed),
        "mean_square": s.pooled.mean(1),
        "mean_square_se": standard_error(s.pooled),
        "variance": s.spread @ s.weights,
        "kurtosis": kurtosis(s.pooled),
        "firing_cost": s.firing_costs,
        "variance_cost": s.pooled.mean(1) * s.firing_costs,
        "pair_mean_square": s.pairs[1:].mean(2) @ s.weights,
        "seconds": s.seconds,
    }
    best = [s.names[k] for k in best_chain(s)[0]] if finite else None
    facts = {"logsnr": s.logsnr, "weights": s.weights, "best_levels": best}
    return facts | {"per_noise_level": per_noise_level, "pooled": pooled}


def _plain(value: Any) -> Any:
    """Convert arrays to lists, numbers to Python numbers, and values that are not finite to None."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not np.isfinite(value) else value


def table(content: dict[str, Any]) -> str:
    """Diagnostics as text: statistics per level, pooled over noise levels, and the findings."""
    where = f"{content['samples']} trajectories of {content['levels'][-1]}"
    lines = [f"Levels along {where} ({content['dynamics']}, {content['step_rule']}), images in [-1, 1]"]
    if "pooled" in content:
        of = content["pooled"]
        columns = {"MFLOP": np.array(content["flops"]) / 1e6, "ms": 1e3 * np.array(of["seconds"])}
        columns |= {"V": of["mean_square"], "(s.e.)": of["mean_square_se"], "kurtosis": of["kurtosis"]}
        columns |= {"V c": of["variance_cost"], "fires": content["firings"], "runs": content["evaluations"]}
        frame = pd.DataFrame(columns, index=content["levels"]).astype(float)
        lines += ["", frame.to_string(float_format="{:.3g}".format), ""]
        lines += [
            "V: mean square difference to the level before; V c: times the FLOPs of one firing; fires, runs: times"
        ]
        lines += ["per image. kurtosis: 3 if all differences have the same size.", ""]
    return "\n".join([*lines, *(f"{f['severity']:<8}{f['text']}" for f in content["findings"])])


# ---------------------------------------------------------------------------------------------------- statistics


def standard_error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the second axis, [K, N, ...] -> [K, ...]; 0 for one sample."""
    n = values.shape[1]
    return values.std(1, ddof=1) / np.sqrt(n) if n > 1 else np.zeros_like(values[:, 0])


def kurtosis(square: np.ndarray) -> np.ndarray:
    """3 E[q^2] / E[q]^2 over samples, for q = |Y|^2 per sample [K, N, ...] -> [K, ...]; nan if Y = 0.

    This is E[s^4] / E[s^2]^2 for the projection s = <u, Y> on a Gaussian direction u, averaged exactly over u. It is 3
    if the differences of all samples have the same size, and 3 N if only one sample has a difference. ML-EM draws one
    coin per image, and its error grows with |Y|^2 of the image. So heavy tails over samples make V unreliable, and with
    it p and the predicted error. Tails over the pixels of an image (edges) average out in |Y|^2 and do no harm, so
    pixels are not pooled. The moments are about zero, not about the mean, since the coin multiplies Y itself.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return 3 * (square**2).mean(1) / square.mean(1) ** 2


def rise(earlier: np.ndarray, later: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over images [N, ...] of later - earlier, and its standard error; above two of these, values rise."""
    change = later - earlier
    return change.mean(0), change.std(0, ddof=1) / np.sqrt(len(change))


def differences_fall(errors: Any) -> dict[str, Any]:
    """Whether the differences fall from each level to the next, pooled and at each noise level; ready for JSON.

    errors: names [K], logsnr and weights [S], and the squared differences per held-out image [K-1, M, S]
    E|f^k - f^K|^2 (to_largest) and E|f^k - f^(k-1)|^2 (to_previous). "pairs", per kind: the levels whose values are
    compared (for to_previous, the upper levels of the two differences). "ratio" [pairs][S]: later value / earlier
    value, below 1 if the value falls. "violations": rises by more than two standard errors over the same held-out
    images (logsnr None: pooled).
    """
    kinds: dict[str, Any] = {}
    violations, checks = [], 0
    for kind, array, labels in (
        ("to_largest", errors.to_largest, errors.names[:-1]),
        ("to_previous", errors.to_previous, errors.names[1:]),
    ):
        pairs, ratios = [list(pair) for pair in pairwise(labels)], []
        for pair, before, after in zip(pairs, array[:-1], array[1:], strict=True):
            ratios.append((after.mean(0) / np.maximum(before.mean(0), 1e-300)).tolist())
            places = [(None, before @ errors.weights, after @ errors.weights)]
            places += [(float(u), before[:, j], after[:, j]) for j, u in enumerate(errors.logsnr)]
            for logsnr, earlier, later in places:
                checks += 1
                mean, se = rise(earlier, later)
                unit = max(float(earlier.mean()), 1e-300)
                if mean > 2 * se:
                    where = {"kind": kind, "levels": pair, "logsnr": logsnr}
                    violations.append({**where, "ratio": float(later.mean()) / unit, "ratio_se": float(se) / unit})
        kinds[kind] = {"pairs": pairs, "ratio": ratios}
    criterion = "a rise by more than two standard errors, over the same held-out images, is a violation"
    facts = {"criterion": criterion, "noise_levels": errors.logsnr.tolist(), "checks": checks}
    return {**facts, **kinds, "violations": violations}


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


# ------------------------------------------------------------------------------------------------------ findings


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
