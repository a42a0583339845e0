"""Diagnostics of a family before it is used: the contract of each level, the telescope of the multilevel estimate, and
variance, kurtosis and cost of each level difference (Giles 2015, section 3) along the largest level's trajectories."""

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
from ..diffusion.level import Level, check_family
from ..diffusion.process import Process
from ..diffusion.sampler import SingleLevel, WeightTable, sample
from ..diffusion.step_rules import StepRule
from ..errors import UserError
from .estimators import Multilevel
from .plan import Progress

REPEAT_TOLERANCE, BATCH_TOLERANCE = 1e-5, 1e-4  # relative: GPU kernels may sum in another order
Z_LIMIT = 4.0  # |z| exceeds it with probability 6e-5
DRAWS, P = 256, 0.5  # of the telescope check


@dataclass(frozen=True)
class LevelStatistics:
    """Statistics of Y_k = f^k - f^{k-1} (f^0 = 0), float64: K levels, N samples, S noise levels (ascending log-SNR)."""

    names: list[str]
    flops: np.ndarray  # [K] T_k, FLOPs per evaluation of one image
    logsnr: np.ndarray  # [S]
    weights: np.ndarray  # [S] Process.drift_weights, with sum 1
    square: np.ndarray  # [K, N, S] mean over pixels of Y_k^2
    spread: np.ndarray  # [S] variance of f^K over samples, mean over pixels


def diagnose(
    family: Sequence[Level], process: Process, rule: StepRule, path: BrownianPath, steps: int, batch: int, bar: Progress
) -> dict[str, Any]:
    """Check a family's levels and telescope, and measure their differences along the largest level's trajectories.

    steps: number of visited noise levels. bar: called with (images done, all images), counted over noise levels.
    Returns JSON values without NaN. Lists start at the cheapest level, whose difference is its own output; arrays have
    axes (levels, noise levels). If a level violates the contract, this is a finding and there are no statistics."""
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
    visits = sorted({e.logsnr: j for j, e in enumerate(program)}.items())
    logsnr, slots = np.array([value for value, _ in visits]), {j: s for s, (_, j) in enumerate(visits)}
    k, n, s = len(family), len(path.seeds), len(slots)
    square = np.zeros((k + 1, n, s))  # of Y_1, ..., Y_K and f^K: means over pixels
    total = torch.zeros(s, *path.shape, dtype=torch.float64, device=path.device)  # sums of f^K over samples
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
            square[i, part, slot] = y.square().flatten(1).mean(1).cpu().numpy()
        total[slot] += outputs[-1].sum(0)
        done += len(x)
        bar(done, n * s)
        return output

    largest = SingleLevel(replace(family[-1], denoise=visit))
    for first in range(0, n, batch):
        sample(largest, rule, grid, BrownianPath(path.seeds[first : first + batch], path.shape, path.device))
    of_mean = total.flatten(1).div(n).square().mean(1).cpu().numpy()
    spread = (square[-1].mean(0) - of_mean).clip(min=0) * (n / (n - 1))
    names, flops = [level.name for level in family], np.array([level.flops for level in family])
    found = LevelStatistics(names, flops, logsnr, process.drift_weights(logsnr), square[:-1], spread)
    return found, float(np.dot([n * s] * (k - 1) + [n * len(program)], flops))


def describe(s: LevelStatistics) -> dict[str, Any]:
    """Statistics per noise level and pooled over them; standard errors (se) are over samples.

    kurtosis: 3 E[q^2] / E[q]^2 for q = |Y|^2, about zero; nan if Y = 0. This is E[s^4] / E[s^2]^2 for the projection
    s = <u, Y> on a Gaussian direction u, averaged exactly over u. It is 3 if the differences of all samples have the
    same size, and 3 N if only one has a difference: then the mean square is unreliable."""
    each = {"mean_square": s.square.mean(1), "mean_square_se": sem(s.square, axis=1), "largest_variance": s.spread}
    q = s.square @ s.weights  # [K, N]
    costs = s.flops + np.concatenate([[0, 0], s.flops[1:-1]])  # of one firing; the first level runs anyway
    pooled = {"mean_square": q.mean(1), "mean_square_se": sem(q, axis=1), "variance_cost": q.mean(1) * costs}
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
            hit &= np.convolve(hit, [1, 0, 1], "same") > 0
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


def finding(severity: str, text: str) -> dict[str, str]:
    """severity: "error", "warning" or "ok"."""
    return {"severity": severity, "text": text}


@torch.no_grad()
def check_contract(family: Sequence[Level], x: Tensor, logsnr: float) -> list[dict[str, str]]:
    """Violations of the level contract on states x [B, ...] at one noise level; at most one finding per level."""
    noise_level = torch.full((len(x),), logsnr, dtype=torch.float32, device=x.device)
    found = [(level.name, _violation(level, x, noise_level)) for level in family]
    return [finding(violation[0], f"{name} {violation[1]}") for name, violation in found if violation]


def _violation(level: Level, x: Tensor, logsnr: Tensor) -> tuple[str, str] | None:
    """Severity and what the level does wrong, or None."""
    given, where = x.clone(), f"at log-SNR {float(logsnr[0]):.1f}"
    first = level.denoise(given, logsnr)
    if getattr(first, "shape", None) != x.shape:
        shape = list(getattr(first, "shape", [])) or type(first).__name__
        return "error", f"returns {shape} for images {list(x.shape)}: it must keep their shape."
    if first.dtype != torch.float32:
        return "error", f"returns {first.dtype}, not torch.float32: add .float() to its output."
    if not torch.isfinite(first).all():
        return "error", f"returns values that are not finite {where}: check its divisions."
    if not torch.equal(given, x):
        return "error", "changes its input images: let it work on a copy."
    first = first.clone()  # a captured graph returns the same memory at every call
    again = _deviation(level.denoise(given, logsnr), first)
    if again > REPEAT_TOLERANCE:
        text = f"gives different outputs for the same input {where} (relative difference {again:.1e}): "
        return "error", text + "put the network in eval mode and remove random numbers from it."
    parts = [level.denoise(x[rows].clone(), logsnr[rows]).clone() for rows in (slice(0, 1), slice(1, None))]
    apart = _deviation(torch.cat(parts), first)
    text = f"gives a sample a different output in another batch {where} (relative difference {apart:.1e}): "
    if apart > 1e-2:
        return "error", text + "put batch norms in eval mode, and let no sample depend on another."
    if apart > BATCH_TOLERANCE:
        return "warning", text + "acceptable only if the levels differ by much more; otherwise run it in float32."
    return None


def _deviation(a: Tensor, b: Tensor) -> float:
    """Largest root-mean-square difference of a sample, relative to the root mean square of b; inf if not finite."""
    scale = max(float(b.double().square().mean().sqrt()), 1e-12)
    value = float((a.double() - b.double()).square().flatten(1).mean(1).max().sqrt()) / scale
    return value if np.isfinite(value) else float("inf")


@torch.no_grad()
def check_telescope(family: Sequence[Level], x: Tensor, logsnr: float, batch: int) -> dict[str, str]:
    """Whether the multilevel estimate has mean f^K and the predicted variance, for states x [B, ...] in turn.

    Independent coins with p_k = P for k >= 2 at one noise level. In standard errors over DRAWS coin draws, the finding
    names the mean of <estimate - f^K, Y_k>, the largest over k >= 2, and that of |estimate - f^K|^2 -
    sum_k (1/p_k - 1) |Y_k|^2."""
    noise_level = torch.full((len(x),), logsnr, dtype=torch.float32, device=x.device)
    outputs = torch.stack([level.denoise(x, noise_level).clone() for level in family])
    top, differences = outputs[-1].double(), (outputs[1:] - outputs[:-1]).double().flatten(2)
    estimator = Multilevel(family, np.array([1.0] + [P] * (len(family) - 1)))
    projections, sizes = [], []
    for start in range(0, DRAWS, batch):
        seeds = range(start, min(start + batch, DRAWS))
        index = torch.tensor(seeds, device=x.device) % len(x)
        estimate = WeightTable(family, estimator.weights(1, seeds))(0, x[index], logsnr)
        error, own = (estimate.double() - top[index]).flatten(1), differences[:, index]
        projections.append((error * own).mean(2).cpu().numpy())
        expected = (1 / P - 1) * own.square().mean(2).sum(0)
        sizes.append((error.square().mean(1) - expected).cpu().numpy())
    # float32 rounding of outputs of this size is no deviation, even if the coins leave no variance
    rms = [float(difference.square().mean().sqrt()) for difference in differences]
    floor = 1e-6 * float(top.square().mean().sqrt())
    bias = max(_z(values, floor * r) for values, r in zip(np.concatenate(projections, axis=1), rms, strict=True))
    size = _z(np.concatenate(sizes), floor * float(np.sqrt(np.square(rms).sum())))
    figures = f"over {DRAWS} coin draws the mean of the multilevel estimate is {bias:.1f} standard errors from the "
    figures += f"largest level, and its variance {size:.1f} from the predicted one"
    if max(bias, size) <= Z_LIMIT:
        return finding("ok", f"The telescope holds: {figures}.")
    why = f"more than {Z_LIMIT:.0f} is no accident: the output of a level depends on more than its input"
    return finding("error", f"The telescope does not hold: {figures}; {why}.")


def _z(values: np.ndarray, floor: float) -> float:
    """Size of the mean in units of its standard error, which is at least `floor`."""
    if not np.isfinite(values).all():
        return float("inf")
    return float(abs(values.mean()) / max(sem(values), floor, 1e-300))


def differences_fall(errors: Any) -> dict[str, Any]:
    """Whether the differences of LevelErrors (gamma/estimate.py) fall from each level to the next; ready for JSON.

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
        lines += ["", frame.to_string(float_format="{:.3g}".format), ""]
        lines += ["V: mean square difference to the level before; V c: times the FLOPs of one firing.", ""]
    return "\n".join([*lines, *(f"{f['severity']:<8}{f['text']}" for f in content["findings"])])
