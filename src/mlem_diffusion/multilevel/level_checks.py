"""Measurements of a family before it is used: the contract of each level, the telescope, and the level differences."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.brownian import BrownianPath
from ..diffusion.estimator import SingleLevel
from ..diffusion.ledger import Ledger
from ..diffusion.level import Level
from ..diffusion.process import Process
from ..diffusion.sampler import sample
from ..diffusion.step_rules import StepRule
from .estimators import Multilevel

REPEAT_TOLERANCE = 1e-5  # relative; GPU kernels may sum in another order
BATCH_TOLERANCE = 1e-4
ROUNDING_TOLERANCE = 1e-4
Z_LIMIT = 4.0  # |z| exceeds it with probability 6e-5


def finding(severity: str, text: str) -> dict[str, str]:
    """A message of one or two sentences, with severity "error", "warning" or "ok"."""
    return {"severity": severity, "text": text}


@torch.no_grad()
def check_contract(family: Sequence[Level], x: Tensor, logsnr: float) -> list[dict[str, str]]:
    """Violations of the level contract on states x [B, ...] at one noise level; at most one finding per level.

    The contract: shape, dtype, finite values, an unchanged input, the same output for the same input, and the same
    output for the same sample in another batch."""
    noise_level = torch.full((len(x),), logsnr, dtype=torch.float32, device=x.device)
    broken = [_broken(level, x, noise_level) for level in family]
    return [finding(*found) for found in broken if found is not None]


def _broken(level: Level, x: Tensor, logsnr: Tensor) -> tuple[str, str] | None:
    name, given, where = level.name, x.clone(), f"at log-SNR {float(logsnr[0]):.1f}"
    first = level.denoise(given, logsnr)
    if not isinstance(first, Tensor) or first.shape != x.shape:
        shape = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
        return "error", f"{name} returns {shape} for images {list(x.shape)}: it must keep their shape."
    if first.dtype != torch.float32:
        return "error", f"{name} returns {first.dtype}, not torch.float32: add .float() to its output."
    if not torch.isfinite(first).all():
        return "error", f"{name} returns values that are not finite {where}: check its divisions."
    if not torch.equal(given, x):
        return "error", f"{name} changes its input images: let it work on a copy."
    first = first.clone()  # a level may return the same memory at every call
    again = _deviation(level.denoise(given, logsnr), first)
    if again > REPEAT_TOLERANCE:
        what = f"{name} gives different outputs for the same input {where} (relative difference {again:.1e}): "
        return "error", what + "put the network in eval mode and remove random numbers from it."
    split = [rows for rows in (slice(0, 1), slice(1, None)) if len(x[rows])]
    parts = [level.denoise(x[rows].clone(), logsnr[rows]).clone() for rows in split]
    apart = _deviation(torch.cat(parts), first)
    what = f"{name} gives a sample a different output in another batch {where} (relative difference {apart:.1e}): "
    if apart > 1e-2:
        return "error", what + "put batch norms in eval mode, and let no sample depend on another."
    if apart > BATCH_TOLERANCE:
        advice = "acceptable only if the levels differ by much more; otherwise run it in float32."
        return "warning", what + advice
    return None


def _deviation(a: Tensor, b: Tensor) -> float:
    """Largest root-mean-square difference of a sample, relative to the root mean square of b; inf if not finite."""
    scale = float(b.double().square().mean().sqrt())
    value = float((a.double() - b.double()).square().flatten(1).mean(1).max().sqrt()) / max(scale, 1e-12)
    return value if np.isfinite(value) else float("inf")


@torch.no_grad()
def check_telescope(
    family: Sequence[Level], x: Tensor, logsnr: float, draws: int = 256, batch: int = 64, p: float = 0.5
) -> dict[str, Any]:
    """Whether the multilevel estimate has mean f^K, the output of the largest level, for states x [B, ...] in turn.

    The check uses one noise level, independent coins and p_k = p for k >= 2. rounding: |sum_k Y_k - f^K| in the dtype
    of the levels. gather: |estimate - sum_k w_k f^k| with the networks evaluated on full batches. Both are root mean
    squares of the worst image, relative to f^K. bias_z [K-1]: for k >= 2, the mean over coins of <estimate - f^K, Y_k>,
    in standard errors. size_z: the mean of |estimate - f^K|^2 - sum_k (1/p_k - 1) |Y_k|^2, in standard errors. ledger:
    whether the ledger counted exactly the evaluations of non-zero weights.
    """
    noise_level = torch.full((len(x),), logsnr, dtype=torch.float32, device=x.device)
    outputs = torch.stack([level.denoise(x, noise_level).clone() for level in family])
    y = torch.cat([outputs[:1], outputs[1:] - outputs[:-1]])
    estimator = Multilevel(tuple(family), np.array([1.0] + [p] * (len(family) - 1)))
    top, differences = outputs[-1].double(), y[1:].double().flatten(2)
    projections, sizes, gather, exact = [], [], 0.0, True
    for start in range(0, draws, batch):
        path = BrownianPath(range(start, min(start + batch, draws)), tuple(x.shape[1:]), x.device)
        index = torch.tensor(path.seeds, device=x.device) % len(x)
        ledger = Ledger([level.flops for level in family], images=len(path.seeds))
        estimate = estimator.weight_table(1, path, ledger)(0, x[index], logsnr)
        weights = estimator.weights(1, path)[0]
        exact &= bool(np.array_equal(ledger.per_sample, (weights != 0).astype(np.int64)))
        w = torch.tensor(np.array(weights), device=x.device)
        full = torch.einsum("bk,kbd->bd", w, outputs[:, index].double().flatten(2))
        gather = max(gather, _deviation(estimate.flatten(1), full))
        error, own = (estimate.double() - top[index]).flatten(1), differences[:, index]
        projections.append((error * own).mean(2).cpu().numpy())
        expected = (1 / p - 1) * own.square().mean(2).sum(0)
        sizes.append((error.square().mean(1) - expected).cpu().numpy())
    # float32 rounding of outputs of this size is no deviation, even if the coins leave no variance
    rms = [float(differences[k].square().mean().sqrt()) for k in range(len(differences))]
    floor = 1e-6 * float(top.square().mean().sqrt())
    bias = [_z(values, floor * r) for values, r in zip(np.concatenate(projections, axis=1), rms, strict=True)]
    size, rounding = _z(np.concatenate(sizes), floor * float(np.sqrt(np.square(rms).sum()))), _deviation(y.sum(0), top)
    holds = max(map(abs, [*bias, size])) <= Z_LIMIT and rounding <= ROUNDING_TOLERANCE and gather <= BATCH_TOLERANCE
    return {
        "logsnr": logsnr, "draws": draws, "rounding": rounding, "gather": gather, "bias_z": bias, "size_z": size,
        "ledger": exact, "holds": holds and exact,
    }  # fmt: skip


def _z(values: np.ndarray, floor: float) -> float:
    """Mean in units of its standard error, which is at least `floor`."""
    if not np.isfinite(values).all():
        return float("inf")
    return float(values.mean() / max(values.std(ddof=1) / np.sqrt(len(values)), floor, 1e-300))


def telescope_finding(check: dict[str, Any]) -> dict[str, str]:
    """The result of `check_telescope` as a sentence."""
    figures = (
        f"over {check['draws']} coin draws at log-SNR {check['logsnr']:.1f} the mean of the multilevel estimate is "
        f"{max(map(abs, check['bias_z'])):.1f} standard errors from the largest level, "
        f"and its variance {abs(check['size_z']):.1f} from the predicted one"
    )
    if check["holds"]:
        return finding("ok", f"The telescope holds: {figures}.")
    why = "more than 4 is no accident: the output of a level depends on more than its input"
    if check["gather"] > BATCH_TOLERANCE:
        apart = f"(relative difference {check['gather']:.1e})"
        why = f"networks give a sample a different output in a smaller batch {apart}"
    elif not check["ledger"]:
        why = "the ledger did not count exactly the evaluations made"
    elif check["rounding"] > ROUNDING_TOLERANCE:
        apart = f"(relative difference {check['rounding']:.1e})"
        why = f"the differences do not sum to the largest level {apart}: the outputs have low precision"
    return finding("error", f"The telescope does not hold: {figures}; {why}.")


@dataclass(frozen=True)
class LevelStatistics:
    """Statistics of Y_k = f^k - f^{k-1} (f^0 = 0), float64: K levels, N samples, S noise levels (ascending log-SNR).

    Images are in [-1, 1]. Values are stored per sample, since the differences of one sample at different noise levels
    are dependent. Standard errors are over samples, also for values pooled over noise levels.
    """

    names: list[str]
    flops: np.ndarray  # [K] T_k, FLOPs per evaluation of one image
    seconds: np.ndarray  # [K] seconds per evaluation of one image, at the batch size of the measurement (median)
    logsnr: np.ndarray  # [S]
    weights: np.ndarray  # [S] Process.drift_weights, with sum 1
    pairs: np.ndarray  # [K + 1, K, N, S] [i, j - 1]: mean over pixels of (f^j - f^i)^2 if i < j, else 0; f^0 = 0
    signed: np.ndarray  # [K, N, S] mean over pixels of Y_k
    spread: np.ndarray  # [K, S] variance of Y_k over samples, mean over pixels
    top_spread: np.ndarray  # [S] variance of f^K itself over samples, mean over pixels

    @property
    def firing_costs(self) -> np.ndarray:
        """Cost c_k [K] of one firing in FLOPs per image: it runs f^k and f^{k-1}, except that f^1 runs anyway."""
        return np.array([firing_cost(self.flops, k - 1, k) for k in range(len(self.flops))])

    @property
    def square(self) -> np.ndarray:
        """Mean over pixels of Y_k^2 [K, N, S]."""
        k = np.arange(len(self.names))
        return self.pairs[k, k]

    @property
    def mean_square(self) -> np.ndarray:
        """V_k, the mean of Y_k^2 over pixels and samples [K, S]."""
        return self.square.mean(1)

    @property
    def pooled(self) -> np.ndarray:
        """Mean over pixels of Y_k^2, pooled over noise levels [K, N]."""
        return self.square @ self.weights


def firing_cost(flops: np.ndarray, low: int, high: int) -> float:
    """FLOPs of one f^high - f^low (positions in `flops`; low = -1 stands for f^0 = 0); position 0 always runs."""
    return float(flops[high] + (flops[low] if low > 0 else 0.0))


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


def measure(
    family: Sequence[Level],
    process: Process,
    rule: StepRule,
    path: BrownianPath,
    steps: int = 24,
    batch: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LevelStatistics, float]:
    """Run the largest level's trajectories on `steps` noise levels; run all levels on each state. Also the FLOPs spent.

    If a step rule evaluates twice at a noise level, the later evaluation is measured. Memory: the states and outputs of
    one noise level and one batch.
    """
    grid = process.grid(steps)
    program = rule.program(grid)
    visits = {e.logsnr: j for j, e in enumerate(program)}
    logsnr, slots = np.array(sorted(visits)), {visits[value]: s for s, value in enumerate(sorted(visits))}
    k, n, s = len(family), len(path.seeds), len(slots)
    pairs, signed = np.zeros((k + 1, k, n, s)), np.zeros((k, n, s))
    # sums over samples, per pixel, of the differences and of the largest level
    total = torch.zeros(k + 1, s, *path.shape, dtype=torch.float64, device=path.device)
    timings, calls, done = [[] for _ in family], itertools.cycle(range(len(program))), 0

    def visit(x: Tensor, at: Tensor) -> Tensor:
        nonlocal done
        j, noise_level = next(calls), at.repeat(len(x))
        if j not in slots:
            return family[-1].denoise(x, noise_level)
        slot, part = slots[j], slice(first, first + len(x))
        output, outputs = x, [torch.zeros_like(x, dtype=torch.float64)]  # f^0
        for i, level in enumerate(family):
            began = _now(x.device)
            output = level.denoise(x, noise_level)
            timings[i].append((_now(x.device) - began) / len(x))
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
    spread = (own.mean(1) - of_mean).clip(min=0) * (n / max(n - 1, 1))
    flops, seconds = np.array([level.flops for level in family]), np.array([np.median(t) for t in timings])
    names, weights = [level.name for level in family], process.drift_weights(logsnr)
    found = LevelStatistics(names, flops, seconds, logsnr, weights, pairs, signed, spread[:k], spread[k])
    return found, float(np.dot([n * s] * (k - 1) + [n * len(program)], flops))


def _mean(values: Tensor) -> np.ndarray:
    """Mean over pixels, [B, ...] -> [B]."""
    return values.flatten(1).mean(1).cpu().numpy()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
