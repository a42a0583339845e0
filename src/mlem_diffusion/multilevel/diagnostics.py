"""Diagnostics of a family before it is used: mean, variance, kurtosis and cost of each level difference (Giles 2015,
section 3), the checks of level_checks.py, and findings.

In a diffusion model the differences depend on the state and the noise level, so they are measured along the largest
level's own trajectories.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import sem
from torch import Tensor

from ..diffusion.brownian import BrownianPath
from ..diffusion.level import Level, check_family
from ..diffusion.process import Process
from ..diffusion.sampler import SingleLevel, sample
from ..diffusion.step_rules import StepRule
from ..errors import UserError
from .level_checks import check_contract, check_telescope, finding
from .plan import Progress


@dataclass(frozen=True)
class LevelStatistics:
    """Statistics of Y_k = f^k - f^{k-1} (f^0 = 0), float64: K levels, N samples, S noise levels (ascending log-SNR)."""

    names: list[str]
    flops: np.ndarray  # [K] T_k, FLOPs per evaluation of one image
    logsnr: np.ndarray  # [S]
    weights: np.ndarray  # [S] Process.drift_weights, with sum 1
    mean: np.ndarray  # [K, N, S] mean over pixels of Y_k
    square: np.ndarray  # [K, N, S] mean over pixels of Y_k^2
    spread: np.ndarray  # [K + 1, S] variance of Y_1, ..., Y_K and f^K over samples, mean over pixels

    @property
    def pooled(self) -> np.ndarray:
        """Mean over pixels of Y_k^2, pooled over noise levels [K, N]."""
        return self.square @ self.weights


def diagnose(
    family: Sequence[Level], process: Process, rule: StepRule, path: BrownianPath, steps: int, batch: int, bar: Progress
) -> dict[str, Any]:
    """Check a family's levels and telescope, and measure their differences along the largest level's trajectories.

    steps: number of visited noise levels. bar: called with (images done, all images), counted over noise levels.
    Returns JSON values without NaN. Lists start at the cheapest level, whose difference is its own output; arrays have
    axes (levels, noise levels). If a level violates the contract, this is a finding and there are no statistics. Raises
    UserError for fewer than two levels or seeds, and for levels not ordered by cost.
    """
    check_family(family)
    if len(family) < 2 or len(path.seeds) < 2:
        raise UserError("Diagnostics need at least two levels and two seeds.")
    out: dict[str, Any] = {"dynamics": rule.dynamics, "step_rule": rule.name, "samples": len(path.seeds)}
    out |= {"levels": [level.name for level in family], "flops": [float(level.flops) for level in family]}
    x = BrownianPath(path.seeds[: min(8, batch)], path.shape, path.device).initial()
    # states in the middle of the path are nearly standard normal too, so one set of states serves all checks
    middle, spent = float(process.logsnr_at(np.array(0.5))), 0.0
    found = check_contract(family, x, process.logsnr_min) or check_contract(family, x, middle)
    if not any(f["severity"] == "error" for f in found):
        statistics, spent = measure(family, process, rule, path, steps, batch, bar)
        out |= describe(statistics)
        found += [*judge(statistics), check_telescope(family, x, middle, batch)]
    found.sort(key=lambda f: ["error", "warning", "ok"].index(f["severity"]))
    out |= {"flops_spent": spent, "findings": found}
    # arrays become lists, and NaN, which is not JSON, becomes None
    return json.loads(json.dumps(out, default=np.ndarray.tolist), parse_constant=lambda _: None)


def measure(
    family: Sequence[Level], process: Process, rule: StepRule, path: BrownianPath, steps: int, batch: int, bar: Progress
) -> tuple[LevelStatistics, float]:
    """Statistics of all levels on the largest level's trajectories through `steps` noise levels; and the FLOPs spent.

    If a step rule evaluates twice at a noise level, the later evaluation is measured."""
    grid = process.grid(steps)
    program = rule.program(grid)
    visits = {e.logsnr: j for j, e in enumerate(program)}
    logsnr = np.array(sorted(visits))
    slots = {visits[value]: s for s, value in enumerate(sorted(visits))}
    k, n, s = len(family), len(path.seeds), len(slots)
    # of Y_1, ..., Y_K and f^K: means over pixels of values and squares, and sums over samples per pixel
    mean, square = np.zeros((2, k + 1, n, s))
    total = torch.zeros(k + 1, s, *path.shape, dtype=torch.float64, device=path.device)
    calls, done = itertools.cycle(range(len(program))), 0

    def visit(x: Tensor, at: Tensor) -> Tensor:
        nonlocal done
        j, noise_level = next(calls), at.repeat(len(x))
        if j not in slots:
            return family[-1].denoise(x, noise_level)
        slot, part = slots[j], slice(first, first + len(x))
        output, outputs = x, [torch.zeros_like(x, dtype=torch.float64)]  # f^0
        for level in family:
            output = level.denoise(x, noise_level)
            outputs.append(output.double())
        for i, y in enumerate([*(b - a for a, b in pairwise(outputs)), outputs[-1]]):
            mean[i, part, slot] = y.flatten(1).mean(1).cpu().numpy()
            square[i, part, slot] = y.square().flatten(1).mean(1).cpu().numpy()
            total[i, slot] += y.sum(0)
        done += len(x)
        bar(done, n * s)
        return output

    largest = SingleLevel(Level(family[-1].name, visit, family[-1].flops))
    for first in range(0, n, batch):
        sample(largest, rule, grid, BrownianPath(path.seeds[first : first + batch], path.shape, path.device))
    of_mean = total.flatten(2).div(n).square().mean(2).cpu().numpy()
    spread = (square.mean(1) - of_mean).clip(min=0) * (n / (n - 1))
    names, flops = [level.name for level in family], np.array([level.flops for level in family])
    found = LevelStatistics(names, flops, logsnr, process.drift_weights(logsnr), mean[:-1], square[:-1], spread)
    return found, float(np.dot([n * s] * (k - 1) + [n * len(program)], flops))


def describe(s: LevelStatistics) -> dict[str, Any]:
    """Statistics per noise level and pooled over them; standard errors (se) are over samples.

    kurtosis: 3 E[q^2] / E[q]^2 for q = |Y|^2; nan if Y = 0. This is E[s^4] / E[s^2]^2 for the projection s = <u, Y> on
    a Gaussian direction u, averaged exactly over u. It is 3 if the differences of all samples have the same size, and
    3 N if only one sample has a difference: then the mean square is unreliable, and with it p and the predicted error.
    The moments are about zero, not about the mean, since the coin multiplies Y itself.
    """
    each = {"mean_square": s.square.mean(1), "mean_square_se": sem(s.square, axis=1), "largest_variance": s.spread[-1]}
    q = s.pooled
    costs = s.flops + np.concatenate([[0, 0], s.flops[1:-1]])  # of one firing; the first level runs anyway
    pooled = {"mean": (s.mean @ s.weights).mean(1), "variance": s.spread[:-1] @ s.weights}
    pooled |= {"mean_square": q.mean(1), "mean_square_se": sem(q, axis=1), "variance_cost": q.mean(1) * costs}
    with np.errstate(invalid="ignore"):
        pooled["kurtosis"] = 3 * (q**2).mean(1) / q.mean(1) ** 2
    return {"logsnr": s.logsnr, "per_noise_level": each, "pooled": pooled}


def judge(s: LevelStatistics) -> list[dict[str, str]]:
    """Findings about a measured family as a hierarchy."""
    for name, bad in zip(s.names, ~np.isfinite(s.square.mean(1)), strict=True):
        if bad.any():
            text = f"{name} returns values that are not finite {_where(s, bad)}: check its divisions, or leave "
            return [finding("error", text + "these noise levels out (process.logsnr_min, process.logsnr_max).")]
    if not s.square[1:].any():
        return [finding("warning", "All levels give the same output: use only the cheapest.")]
    found = [*_not_falling(s), *_growth(s)]
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
        hit = change.mean(0) > 2 * sem(change)
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


def _growth(s: LevelStatistics) -> list[dict[str, str]]:
    """How the mean squares fall with cost: V_k ~ T_k^slope, with gamma = -2 / slope."""
    v = s.pooled[1:].mean(1)
    if len(s.names) < 3 or np.any(v <= 0):
        return []
    x = np.log(s.flops[1:])
    centred = (x - x.mean()) / np.square(x - x.mean()).sum()
    slope, se = float(centred @ np.log(v)), float(sem(centred / v @ s.pooled[1:]))
    figures = f"V_k falls as T_k^{slope:.2f} (s.e. {se:.2f})"
    if slope > -0.1 or slope + 2 * se > 0:
        text = f"The differences do not measurably fall with cost: {figures}. Train all levels longer, or measure with "
        return [finding("warning", text + "more seeds.")]
    verdict = "neither grows nor falls measurably with level"
    if abs(slope + 1) > 2 * se:
        harder, easier = "grows with level, harder than Monte Carlo", "falls with level, easier than Monte Carlo"
        verdict = harder if slope > -1 else easier
    return [finding("ok", f"{figures}, gamma about {-2 / slope:.2g}: V_k T_k {verdict}.")]


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
