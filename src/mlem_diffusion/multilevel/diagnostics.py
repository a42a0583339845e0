"""Diagnostics of a family before it is used: mean, variance, kurtosis and cost of each level difference (Giles 2015,
section 3), the checks of level_checks.py, and findings.

In a diffusion model the differences depend on the state and the noise level, so they are measured along the largest
level's own trajectories.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..diffusion.brownian import BrownianPath
from ..diffusion.level import Level, check_family
from ..diffusion.process import Process
from ..diffusion.sampler import SingleLevel, sample
from ..diffusion.step_rules import StepRule
from ..errors import UserError
from .level_checks import check_contract, check_telescope, finding, telescope_finding


@dataclass(frozen=True)
class LevelStatistics:
    """Statistics of Y_k = f^k - f^{k-1} (f^0 = 0), float64: K levels, N samples, S noise levels (ascending log-SNR)."""

    names: list[str]
    flops: np.ndarray  # [K] T_k, FLOPs per evaluation of one image
    logsnr: np.ndarray  # [S]
    weights: np.ndarray  # [S] Process.drift_weights, with sum 1
    pairs: np.ndarray  # [K + 1, K, N, S] [i, j - 1]: mean over pixels of (f^j - f^i)^2 if i < j, else 0; f^0 = 0
    signed: np.ndarray  # [K, N, S] mean over pixels of Y_k
    spread: np.ndarray  # [K + 1, S] variance of Y_1, ..., Y_K and f^K over samples, mean over pixels

    @property
    def square(self) -> np.ndarray:
        """Mean over pixels of Y_k^2 [K, N, S]."""
        k = np.arange(len(self.names))
        return self.pairs[k, k]

    @property
    def pooled(self) -> np.ndarray:
        """Mean over pixels of Y_k^2, pooled over noise levels [K, N]."""
        return self.square @ self.weights

    def firing_cost(self, low: int, high: int) -> float:
        """FLOPs of one f^high - f^low (from 0; low = -1 stands for f^0 = 0); the first level runs anyway."""
        return float(self.flops[high] + (self.flops[low] if low > 0 else 0.0))


def diagnose(
    family: Sequence[Level],
    process: Process,
    rule: StepRule,
    path: BrownianPath,
    steps: int = 24,
    batch: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Check a family's levels and telescope, and measure their differences along the largest level's trajectories.

    steps: number of visited noise levels. progress: called with (images done, all images), counted over noise levels.
    Returns JSON values without NaN. Lists start at the cheapest level, whose difference is its own output; arrays have
    axes (levels, noise levels). If a level violates the contract, this is a finding and there are no statistics. Raises
    UserError for fewer than two levels or seeds, and for levels not ordered by cost.
    """
    check_family(family)
    if len(family) < 2 or len(path.seeds) < 2:
        raise UserError("Diagnostics need at least two levels and two seeds.")
    out: dict[str, Any] = {"dynamics": rule.dynamics, "step_rule": rule.name, "samples": len(path.seeds)}
    out |= {"levels": [level.name for level in family], "flops": [float(level.flops) for level in family]}
    out |= {"telescope": None, "flops_spent": 0.0}
    x = BrownianPath(path.seeds[: min(8, batch)], path.shape, path.device).initial()
    # states in the middle of the path are nearly standard normal too, so one set of states serves all checks
    middle = float(process.logsnr_at(np.array(0.5)))
    found = check_contract(family, x, process.logsnr_min) or check_contract(family, x, middle)
    if not any(f["severity"] == "error" for f in found):
        out["telescope"] = check_telescope(family, x, middle, batch)
        statistics, out["flops_spent"] = measure(family, process, rule, path, steps, batch, progress)
        out |= describe(statistics)
        found = [*found, *judge(statistics), telescope_finding(out["telescope"])]
    return _plain(out | {"findings": sorted(found, key=lambda f: ["error", "warning", "ok"].index(f["severity"]))})


def measure(
    family: Sequence[Level],
    process: Process,
    rule: StepRule,
    path: BrownianPath,
    steps: int,
    batch: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LevelStatistics, float]:
    """Statistics of all levels on the largest level's trajectories through `steps` noise levels; and the FLOPs spent.

    If a step rule evaluates twice at a noise level, the later evaluation is measured."""
    grid = process.grid(steps)
    program = rule.program(grid)
    visits = {e.logsnr: j for j, e in enumerate(program)}
    logsnr, slots = np.array(sorted(visits)), {visits[value]: s for s, value in enumerate(sorted(visits))}
    k, n, s = len(family), len(path.seeds), len(slots)
    pairs, signed = np.zeros((k + 1, k, n, s)), np.zeros((k, n, s))
    # sums over samples, per pixel, of the differences and of the largest level
    total = torch.zeros(k + 1, s, *path.shape, dtype=torch.float64, device=path.device)
    calls, done = itertools.cycle(range(len(program))), 0

    def visit(x: Tensor, at: Tensor) -> Tensor:
        nonlocal done
        j, noise_level = next(calls), at.repeat(len(x))
        if j not in slots:
            return family[-1].denoise(x, noise_level)
        slot, part = slots[j], slice(first, first + len(x))
        output, outputs = x, [torch.zeros_like(x, dtype=torch.float64)]  # f^0
        for i, level in enumerate(family):
            output = level.denoise(x, noise_level)
            outputs.append(output.double())
            for low in range(i + 1):
                pairs[low, i, part, slot] = _mean((outputs[-1] - outputs[low]).square())
            signed[i, part, slot] = _mean(outputs[-1] - outputs[-2])
        total[:, slot] += torch.stack([*(b - a for a, b in pairwise(outputs)), outputs[-1]]).sum(1)
        done += len(x)
        progress(done, n * s)
        return output

    largest = SingleLevel(Level(family[-1].name, visit, family[-1].flops))
    for first in range(0, n, batch):
        sample(largest, rule, grid, BrownianPath(path.seeds[first : first + batch], path.shape, path.device))
    of_mean = total.flatten(2).div(n).square().mean(2).cpu().numpy()
    own = pairs[[*range(k), 0], [*range(k), k - 1]]  # Y_1, ..., Y_K, f^K
    spread = (own.mean(1) - of_mean).clip(min=0) * (n / (n - 1))
    names, flops = [level.name for level in family], np.array([level.flops for level in family])
    found = LevelStatistics(names, flops, logsnr, process.drift_weights(logsnr), pairs, signed, spread)
    return found, float(np.dot([n * s] * (k - 1) + [n * len(program)], flops))


def _mean(values: Tensor) -> np.ndarray:
    return values.flatten(1).mean(1).cpu().numpy()


def describe(s: LevelStatistics) -> dict[str, Any]:
    """Statistics per noise level and pooled over them; standard errors (se) are over samples."""
    costs = np.array([s.firing_cost(k - 1, k) for k in range(len(s.flops))])
    each = _moments(s.signed, s.square) | {"variance": s.spread[:-1], "largest_variance": s.spread[-1]}
    pooled = _moments(s.signed @ s.weights, s.pooled) | {"variance": s.spread[:-1] @ s.weights}
    pooled["variance_cost"] = pooled["mean_square"] * costs
    return {"logsnr": s.logsnr, "per_noise_level": each, "pooled": pooled}


def _moments(signed: np.ndarray, square: np.ndarray) -> dict[str, np.ndarray]:
    """Moments over samples of the means over pixels [K, N, ...] of differences and of their squares.

    kurtosis: 3 E[q^2] / E[q]^2 for q = |Y|^2; nan if Y = 0. This is E[s^4] / E[s^2]^2 for the projection s = <u, Y> on
    a Gaussian direction u, averaged exactly over u. It is 3 if the differences of all samples have the same size, and
    3 N if only one sample has a difference: then the mean square is unreliable, and with it p and the predicted error.
    The moments are about zero, not about the mean, since the coin multiplies Y itself.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        kurtosis = 3 * (square**2).mean(1) / square.mean(1) ** 2
    means = {"mean": signed.mean(1), "mean_se": standard_error(signed)}
    return means | {"mean_square": square.mean(1), "mean_square_se": standard_error(square), "kurtosis": kurtosis}


def standard_error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the second axis, [K, N, ...] -> [K, ...]."""
    return values.std(1, ddof=1) / np.sqrt(values.shape[1])


def best_chain(s: LevelStatistics) -> tuple[list[int], float]:
    """The chain of levels, from the cheapest to the largest, with the smallest sum of sqrt(V c) over its steps.

    V and c of a step are those of the difference of the two levels that it joins. With the best constant p, the square
    of the sum is variance times cost of all random differences; also returned: its ratio to that of all levels.
    """
    v = (s.pairs[1:] @ s.weights).mean(2)
    roots = np.sqrt(v * [[s.firing_cost(i, j) for j in range(len(v))] for i in range(len(v))])
    best = [(0.0, [0])]  # the shortest path to each level
    for j in range(1, len(v)):
        best.append(min((length + float(roots[i, j]), [*chain, j]) for i, (length, chain) in enumerate(best)))
    shortest, chain = best[-1]
    return chain, (shortest / max(float(np.diag(roots, 1).sum()), 1e-300)) ** 2


def judge(s: LevelStatistics) -> list[dict[str, str]]:
    """Findings about a measured family as a hierarchy."""
    for k, bad in enumerate(~np.isfinite(s.square.mean(1))):
        if bad.any():
            text = f"{s.names[k]} returns values that are not finite {_where(s, bad)}: check its divisions, or leave "
            return [finding("error", text + "these noise levels out (process.logsnr_min, process.logsnr_max).")]
    found = [*_not_falling(s), *_drops(s), *_growth(s)]
    if all(f["severity"] == "ok" for f in found):
        found.append(finding("ok", "The family is a good hierarchy on these trajectories."))
    return found


def _where(s: LevelStatistics, hit: np.ndarray) -> str:
    return f"between log-SNR {s.logsnr[hit][0]:.1f} and {s.logsnr[hit][-1]:.1f}"


def _not_falling(s: LevelStatistics) -> list[dict[str, str]]:
    """Differences larger than those of the level below, if they hold 5% or more of the level's pooled mean square."""
    found = []
    for k in range(2, len(s.names)):
        change = s.square[k] - s.square[k - 1]
        hit = change.mean(0) > 2 * standard_error(change[None])[0]
        if len(hit) > 3:  # a single noise level may be chance
            padded = np.concatenate([[False], hit, [False]])
            hit = hit & (padded[:-2] | padded[2:])
        own = s.square[k].mean(0) * s.weights
        share = own[hit].sum() / max(own.sum(), 1e-300)
        if share >= 0.05:
            c, b, a = s.names[k - 2 : k + 1]
            text = f"{a} differs from {b} more than {b} from {c} {_where(s, hit)} ({100 * share:.0f}% of its pooled "
            advice = f"mean square). Train {b} and {a} longer at these noise levels, or let only one of them fire."
            found.append(finding("warning", text + advice))
    return found


def _drops(s: LevelStatistics) -> list[dict[str, str]]:
    """Levels whose removal lowers variance times cost."""
    if not s.square[1:].any():
        return [finding("warning", "All levels give the same output: use only the cheapest.")]
    chain, ratio = best_chain(s)
    if ratio > 0.9:
        return []
    dropped = " and ".join(name for k, name in enumerate(s.names) if k not in chain)
    text = f"Drop {dropped}: with {' + '.join(s.names[k] for k in chain)} variance times cost, (sum of sqrt(V c))^2 "
    return [finding("warning", text + f"over the levels above the first, is {100 * (1 - ratio):.0f}% lower.")]


def _growth(s: LevelStatistics) -> list[dict[str, str]]:
    """How the mean squares fall with cost: V_k ~ T_k^slope, with gamma = -2 / slope."""
    v = s.pooled[1:].mean(1)
    if len(s.names) < 3 or np.any(v <= 0):
        return []
    x = np.log(s.flops[1:])
    centred = (x - x.mean()) / np.square(x - x.mean()).sum()
    slope = float(centred @ np.log(v))
    se = float(standard_error((centred / v @ s.pooled[1:])[None])[0])
    figures = f"V_k falls as T_k^{slope:.2f} (s.e. {se:.2f})"
    if slope > -0.1 or slope + 2 * se > 0:
        text = f"The differences do not measurably fall with cost: {figures}. Train all levels longer, or measure with "
        return [finding("warning", text + "more seeds.")]
    verdict = "neither grows nor falls measurably with level"
    if abs(slope + 1) > 2 * se:
        verdict = ("grows", "harder") if slope > -1 else ("falls", "easier")
        verdict = "{} with level, {} than Monte Carlo".format(*verdict)
    return [finding("ok", f"{figures}, gamma about {-2 / slope:.2g}: V_k T_k {verdict}.")]


def _plain(value: Any) -> Any:
    """Convert arrays to lists, numbers to Python numbers, and values that are not finite to None."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def table(content: dict[str, Any]) -> str:
    """Diagnostics as text: statistics per level, pooled over noise levels, and the findings."""
    where = f"{content['samples']} trajectories of {content['levels'][-1]}"
    lines = [f"Levels along {where} ({content['dynamics']}, {content['step_rule']}), images in [-1, 1]"]
    if "pooled" in content:
        of = content["pooled"]
        columns = {"MFLOP": np.array(content["flops"]) / 1e6, "V": of["mean_square"], "(s.e.)": of["mean_square_se"]}
        columns |= {"kurtosis": of["kurtosis"], "V c": of["variance_cost"]}
        frame = pd.DataFrame(columns, index=content["levels"]).astype(float)
        lines += ["", frame.to_string(float_format="{:.3g}".format), ""]
        lines += ["V: mean square difference to the level before; V c: times the FLOPs of one firing.", ""]
    return "\n".join([*lines, *(f"{f['severity']:<8}{f['text']}" for f in content["findings"])])
