"""Diagnostics of a family before it is used: variance, kurtosis and cost of each level difference along the largest
level's trajectories (Giles 2015, section 3), the checks of level_checks.py, and findings."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import sem
from torch import Tensor

from ..diffusion.brownian import BrownianPath
from ..diffusion.conditions import Conditions, bound
from ..diffusion.level import Level, check_family, shared_costs
from ..diffusion.process import Process, gain_weights, uniform_weights
from ..diffusion.sampler import SingleLevel, sample
from ..diffusion.step_rules import StepRule
from ..errors import UserError
from . import outlook
from .gains import Effects, best_chain, firing_costs
from .level_checks import check_contract, check_telescope, finding
from .plan import Progress


@dataclass(frozen=True)
class LevelStatistics:
    """Statistics of Y_k = f^k - f^{k-1} (f^0 = 0), float64: K levels, N samples, S noise levels (ascending log-SNR)."""

    names: list[str]
    flops: np.ndarray  # [K] T_k, FLOPs of one more evaluation of one image (level.shared_costs)
    logsnr: np.ndarray  # [S]
    weights: np.ndarray  # [S] sum 1, of pooling: by gains if `between` is known, else uniform in log-SNR
    square: np.ndarray  # [K, N, S] mean over pixels of Y_k^2
    spread: np.ndarray  # [S] variance of f^K over samples, mean over pixels
    apart: np.ndarray  # [K, K, S] [i, j]: mean over samples and pixels of (f^j - f^i)^2 for i < j
    between: np.ndarray | None = None  # [K, K] the summed gains of the same differences, if they were measured

    @property
    def chain(self) -> tuple[list[int], float]:
        """The best chain (gains.py), by gains or by pooled squares."""
        return best_chain(self.apart @ self.weights if self.between is None else self.between, self.flops)


def violations(family: Sequence[Level], process: Process, path: BrownianPath, batch: int) -> list[dict[str, str]]:
    """Violations of the level contract (level_checks.py) at the noisy end or in the middle of the process."""
    x, middle, conditions = _state(process, path, batch)
    ends = check_contract(family, x, process.logsnr_min, conditions)
    return ends or check_contract(family, x, middle, conditions)


def _state(process: Process, path: BrownianPath, batch: int) -> tuple[Tensor, float, Conditions]:
    """A few starting points [B, ...], the log-SNR in the middle, where states are nearly standard normal too, and the
    samples' conditions."""
    few = path.part(0, min(8, batch))
    return few.initial(), float(process.logsnr_at(np.array(0.5))), few.conditions


def diagnose(
    family: Sequence[Level], process: Process, rule: StepRule, path: BrownianPath, steps: int, batch: int,
    bar: Progress, effects: Effects | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Check a family's levels and telescope, and measure their differences along the largest level's trajectories.
    steps: number of visited noise levels. bar: called with (images done, all images), counted over noise levels.
    effects: measured ones, if known; then differences are pooled by their gains.
    Returns JSON values without NaN. Lists start at the cheapest level, whose difference is its own output; arrays have
    axes (levels, noise levels). If a level violates the contract, this is a finding and there are no statistics."""
    check_family(family)
    if len(family) < 2 or len(path.seeds) < 2:
        raise UserError("Diagnostics need at least two levels and two seeds.")
    out: dict[str, Any] = {"dynamics": rule.dynamics, "step_rule": rule.name, "samples": len(path.seeds)}
    out |= {"levels": [level.name for level in family], "flops": [float(level.flops) for level in family]}
    found, spent = violations(family, process, path, batch), 0.0
    if not any(f["severity"] == "error" for f in found):
        statistics, spent = measure(family, process, rule, path, steps, batch, bar, effects)
        out |= describe(statistics)
        x, middle, conditions = _state(process, path, batch)
        found += [*judge(statistics), check_telescope(family, x, middle, batch, conditions)]
    found.sort(key=lambda f: ["error", "warning", "ok"].index(f["severity"]))
    out |= {"flops_spent": spent, "findings": found}
    # arrays become lists, and NaN, which is not JSON, becomes None
    return json.loads(json.dumps(out, default=np.ndarray.tolist), parse_constant=lambda _: None)


def measure(
    family: Sequence[Level], process: Process, rule: StepRule, path: BrownianPath, steps: int, batch: int,
    bar: Progress, effects: Effects | None = None,
) -> tuple[LevelStatistics, float]:  # fmt: skip
    """Statistics of all levels on the largest level's trajectories through `steps` noise levels; and the FLOPs spent.
    If a step rule evaluates twice at a noise level, the later evaluation is measured."""
    grid = process.grid(steps)
    program = rule.program(grid)
    visits = sorted({e.logsnr: j for j, e in enumerate(program)}.items())
    logsnr, slots = np.array([value for value, _ in visits]), {j: s for s, (_, j) in enumerate(visits)}
    k, n, s = len(family), len(path.seeds), len(slots)
    square = np.zeros((k + 1, n, s))  # of Y_1, ..., Y_K and f^K: means over pixels
    total = torch.zeros(s, *path.shape, dtype=torch.float64, device=path.device)  # sums of f^K over samples
    apart, calls, done = np.zeros((k, k, s)), itertools.cycle(range(len(program))), 0

    def visit(x: Tensor, at: Tensor) -> Tensor:
        nonlocal done
        j, noise_level = next(calls), at.repeat(len(x))
        if j not in slots:
            return levels[-1].denoise(x, noise_level)
        slot, part = slots[j], slice(first, first + len(x))
        output, outputs = x, [torch.zeros_like(x, dtype=torch.float64)]  # f^0
        for level in levels:
            output = level.denoise(x, noise_level)
            outputs.append(output.double())
        for i, y in enumerate([*(b - a for a, b in pairwise(outputs)), outputs[-1]]):
            square[i, part, slot] = y.square().flatten(1).mean(1).cpu().numpy()
        for low, high in itertools.combinations(range(k), 2):
            apart[low, high, slot] += float((outputs[high + 1] - outputs[low + 1]).square().mean()) * len(x) / n
        total[slot] += outputs[-1].sum(0)
        done += len(x)
        bar(done, n * s)
        return output

    for first in range(0, n, batch):
        own = path.part(first, first + batch)
        levels = bound(family, own.conditions)
        sample(SingleLevel(replace(levels[-1], denoise=visit, base=None)), rule, grid, own)
    of_mean = total.flatten(1).div(n).square().mean(1).cpu().numpy()
    spread = (square[-1].mean(0) - of_mean).clip(min=0) * (n / (n - 1))
    names, flops = [level.name for level in family], np.array([level.flops for level in family])
    weights, between = uniform_weights(logsnr), None
    if effects is not None:
        weights, between = gain_weights(logsnr, *effects.density()), effects.between()
    found = LevelStatistics(names, shared_costs(family)[0], logsnr, weights, square[:-1], spread, apart, between)
    return found, float(np.dot([n * s] * (k - 1) + [n * len(program)], flops))


def describe(s: LevelStatistics) -> dict[str, Any]:
    """Statistics per noise level and pooled over them; standard errors (se) are over samples.
    kurtosis: 3 E[q^2] / E[q]^2 for q = |Y|^2, about zero; nan if Y = 0. This is E[s^4] / E[s^2]^2 for the projection
    s = <u, Y> on a Gaussian direction u, averaged exactly over u. It is 3 if the differences of all samples have the
    same size, and 3 N if only one has a difference: then the mean square is unreliable."""
    each = {"mean_square": s.square.mean(1), "mean_square_se": sem(s.square, axis=1), "largest_variance": s.spread}
    q = s.square @ s.weights  # [K, N]
    costs = np.concatenate([s.flops[:1], np.diag(firing_costs(s.flops), 1)])
    pooled = {"mean_square": q.mean(1), "mean_square_se": sem(q, axis=1), "variance_cost": q.mean(1) * costs}
    with np.errstate(invalid="ignore"):
        pooled["kurtosis"] = 3 * (q**2).mean(1) / q.mean(1) ** 2
    pooling = "uniform" if s.between is None else "gains"
    return {"logsnr": s.logsnr, "per_noise_level": each, "pooling": pooling, "pooled": pooled}


def judge(s: LevelStatistics) -> list[dict[str, str]]:
    """Findings about a measured family as a hierarchy."""
    for name, bad in zip(s.names, ~np.isfinite(s.square.mean(1)), strict=True):
        if bad.any():
            text = f"{name} returns values that are not finite {_where(s, bad)}: check its divisions, or leave "
            return [finding("error", text + "these noise levels out (process.logsnr_min, process.logsnr_max).")]
    if not s.square[1:].any():
        return [finding("warning", "All levels give the same output: use only the cheapest.")]
    found, (chain, ratio) = [*_not_falling(s)], s.chain
    if ratio <= 0.9:
        dropped = " and ".join(name for k, name in enumerate(s.names) if k not in chain)
        text = f"Drop {dropped}: with {' + '.join(s.names[k] for k in chain)} variance times cost, "
        text += f"(sum of sqrt(V c))^2 over the levels above the first, is {100 * (1 - ratio):.0f}% lower."
        found.append(finding("warning", text))
    found += _growth(s)
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
            hit &= np.convolve(hit, [1, 0, 1], "same") > 0
        own = s.square[k].mean(0) * s.weights
        share = own[hit].sum() / max(own.sum(), 1e-300)
        if share >= 0.05:
            c, b, a = s.names[k - 2 : k + 1]
            text = f"{a} differs from {b} more than {b} from {c} {_where(s, hit)} ({100 * share:.0f}% of its pooled "
            text += f"mean square). Train {b} and {a} longer at these noise levels, or let only one of them fire."
            found.append(finding("warning", text))
    return found


def _growth(s: LevelStatistics) -> list[dict[str, str]]:
    """How the mean squares fall with cost: V_k ~ T_k^slope, with gamma = -2 / slope."""
    pooled = (s.square @ s.weights)[1:]
    v = pooled.mean(1)
    if len(s.names) < 3 or np.any(v <= 0):
        return []
    x = np.log(s.flops[1:])
    centred = (x - x.mean()) / np.square(x - x.mean()).sum()
    slope, se = float(centred @ np.log(v)), float(sem(centred / v @ pooled))
    figures = f"V_k falls as T_k^{slope:.2f} (s.e. {se:.2f})"
    if slope > -0.1 or slope + 2 * se > 0:
        text = f"The differences do not measurably fall with cost: {figures}. Train all levels longer, or measure with "
        return [finding("warning", text + "more seeds.")]
    verdict = "neither grows nor falls measurably with level"
    if abs(slope + 1) > 2 * se:
        harder, easier = "grows with level, harder than Monte Carlo", "falls with level, easier than Monte Carlo"
        verdict = harder if slope > -1 else easier
    return [finding("ok", f"{figures}, gamma about {-2 / slope:.2g}: V_k T_k {verdict}.")]


def differences_fall(errors: Any) -> dict[str, Any]:
    """Whether the differences of LevelErrors (gamma/estimates.py) fall from each level to the next; ready for JSON.
    "violations": rises by more than two standard errors over the same held-out images, pooled (logsnr None) or at one
    noise level; for to_previous, between the differences to the level before of two levels."""
    places, checks, violations = [None, *errors.logsnr.tolist()], 0, []
    for kind, array, names in (
        ("to_largest", errors.to_largest, errors.names), ("to_previous", errors.to_previous, errors.names[1:])
    ):  # fmt: skip
        values = np.concatenate([(array @ errors.weights)[..., None], array], axis=-1)  # pooled, then by noise level
        change = np.diff(values, axis=0)
        checks += len(change) * len(places)
        for i, j in np.argwhere(change.mean(1) > 2 * sem(change, axis=1)):
            ratio = float(values[i + 1, :, j].mean() / max(values[i, :, j].mean(), 1e-300))
            violations.append({"kind": kind, "levels": list(names[i : i + 2]), "logsnr": places[j], "ratio": ratio})
    return {"checks": checks, "violations": violations}


def table(content: dict[str, Any]) -> str:
    """Diagnostics as text: statistics per level, pooled over noise levels, and the findings."""
    where = f"{content['samples']} trajectories of {content['levels'][-1]}"
    lines = [f"Levels along {where} ({content['dynamics']}, {content['step_rule']}), images in [-1, 1]"]
    if "pooled" in content:
        of = content["pooled"]
        columns = {"MFLOP": np.array(content["flops"]) / 1e6, "V": of["mean_square"], "(s.e.)": of["mean_square_se"]}
        columns |= {"kurtosis": of["kurtosis"], "V c": of["variance_cost"]}
        frame = pd.DataFrame(columns, index=content["levels"]).astype(float)
        pooling = "by gains" if content["pooling"] == "gains" else "uniformly in log-SNR"
        text = f"V: mean square difference to the level before, pooled {pooling}. V c: times the FLOPs of one firing."
        lines += ["", frame.to_string(float_format="{:.3g}".format), "", text, ""]
    lines += [f"{f['severity']:<8}{f['text']}" for f in content["findings"]]
    return "\n".join([*lines, *([outlook.sentence(content)] if "S" in content else [])])
