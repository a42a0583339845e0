"""Checks before sampling: every level satisfies the contract, and the telescope sums to the largest level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..diffusion.ledger import Ledger
from ..diffusion.level import Level
from .estimators import Multilevel

REPEAT_TOLERANCE = 1e-5  # relative; GPU kernels may sum in another order
BATCH_TOLERANCE = 1e-4
Z_LIMIT = 4.0  # |z| exceeds it with probability 6e-5


@dataclass(frozen=True)
class Finding:
    """A message of one or two sentences, with severity "error", "warning" or "ok"."""

    severity: str
    text: str


@torch.no_grad()
def check_contract(family: Sequence[Level], x: Tensor, logsnr: float) -> list[Finding]:
    """Violations of the level contract on states x [B, ...] at one noise level; at most one finding per level.

    The contract: shape, dtype, finite values, an unchanged input, the same output for the same input, and the same
    output for the same sample in another batch."""
    noise_level = torch.full((len(x),), logsnr, dtype=torch.float32, device=x.device)
    found = [_broken(level, x, noise_level) for level in family]
    return [finding for finding in found if finding is not None]


def _broken(level: Level, x: Tensor, logsnr: Tensor) -> Finding | None:
    given, where = x.clone(), f"at log-SNR {float(logsnr[0]):.1f}"
    first = level.denoise(given, logsnr)
    if not isinstance(first, Tensor) or first.shape != x.shape:
        shape = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
        return Finding("error", f"{level.name} returns {shape} for images {list(x.shape)}: it must keep their shape.")
    if first.dtype != torch.float32:
        return Finding("error", f"{level.name} returns {first.dtype}, not torch.float32: add .float() to its output.")
    if not torch.isfinite(first).all():
        return Finding("error", f"{level.name} returns values that are not finite {where}: check its divisions.")
    if not torch.equal(given, x):
        return Finding("error", f"{level.name} changes its input images: let it work on a copy.")
    first = first.clone()  # a level may return the same memory at every call
    again = _deviation(level.denoise(given, logsnr), first)
    if again > REPEAT_TOLERANCE:
        return Finding(
            "error",
            f"{level.name} gives different outputs for the same input {where} (relative difference {again:.1e}): "
            f"put the network in eval mode and remove random numbers from it.",
        )
    parts = torch.cat([level.denoise(x[a:b].clone(), logsnr[a:b]).clone() for a, b in ((0, 1), (1, len(x))) if b > a])
    apart = _deviation(parts, first)
    if apart > BATCH_TOLERANCE:
        small = apart < 1e-2
        why = (
            "acceptable only if the levels differ by much more; otherwise run it in float32"
            if small
            else "put batch norms in eval mode, and let no sample depend on another"
        )
        return Finding(
            "warning" if small else "error",
            f"{level.name} gives a sample a different output in another batch {where} "
            f"(relative difference {apart:.1e}): {why}.",
        )
    return None


def _deviation(a: Tensor, b: Tensor) -> float:
    """Largest root-mean-square difference of a sample, relative to the root mean square of b; inf if not finite."""
    scale = float(b.double().square().mean().sqrt())
    value = float((a.double() - b.double()).square().flatten(1).mean(1).max().sqrt()) / max(scale, 1e-12)
    return value if np.isfinite(value) else float("inf")


@dataclass(frozen=True)
class Telescope:
    """Result of the check that the multilevel estimate has mean f^K, the output of the largest level.

    The check uses one noise level, independent coins and p_k = 1/2 for k >= 2. rounding: |sum_k Y_k - f^K| in the dtype
    of the levels. gather: |estimate - sum_k w_k f^k| with the networks evaluated on full batches. Both are root mean
    squares of the worst image, relative to f^K. bias_z [K-1]: for k >= 2, the mean over coins of <estimate - f^K, Y_k>,
    in standard errors. size_z: the mean of |estimate - f^K|^2 - sum_k (1/p_k - 1) |Y_k|^2, in standard errors. ledger:
    whether the ledger counted exactly the evaluations of non-zero weights. draws: number of coin draws.
    """

    logsnr: float
    draws: int
    rounding: float
    gather: float
    bias_z: list[float]
    size_z: float
    ledger: bool

    @property
    def holds(self) -> bool:
        z = max([abs(v) for v in self.bias_z] + [abs(self.size_z)])
        return z <= Z_LIMIT and self.rounding <= 1e-4 and self.gather <= BATCH_TOLERANCE and self.ledger


@torch.no_grad()
def check_telescope(
    family: Sequence[Level], x: Tensor, logsnr: float, draws: int = 256, batch: int = 64, p: float = 0.5
) -> Telescope:
    """Run the check with coin draws for the states x [B, ...] in turn, through estimators.Multilevel."""
    noise_level = torch.full((len(x),), logsnr, dtype=torch.float32, device=x.device)
    outputs = torch.stack([level.denoise(x, noise_level).clone() for level in family])
    y = torch.cat([outputs[:1], outputs[1:] - outputs[:-1]])
    estimator = Multilevel(tuple(family), np.array([1.0] + [p] * (len(family) - 1)))
    top, differences = outputs[-1].double(), y[1:].double().flatten(2)
    projections, sizes, gather, exact = [], [], 0.0, True
    for start in range(0, draws, batch):
        seeds = range(start, min(start + batch, draws))
        index = torch.arange(seeds.start, seeds.stop, device=x.device) % len(x)
        ledger = Ledger([level.flops for level in family], images=len(seeds))
        estimate = estimator.weight_table(1, seeds, ledger)(0, x[index], logsnr)
        weights = estimator.weights(1, seeds)[0]
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
    size = _z(np.concatenate(sizes), floor * float(np.sqrt(np.square(rms).sum())))
    return Telescope(logsnr, draws, _deviation(y.sum(0), outputs[-1]), gather, bias, size, exact)


def _z(values: np.ndarray, floor: float) -> float:
    """Mean in units of its standard error, which is at least `floor`."""
    if not np.isfinite(values).all():
        return float("inf")
    return float(values.mean() / max(values.std(ddof=1) / np.sqrt(len(values)), floor, 1e-300))


def telescope_finding(check: Telescope) -> Finding:
    worst = max([abs(v) for v in check.bias_z] + [0.0])
    figures = (
        f"over {check.draws} coin draws at log-SNR {check.logsnr:.1f} the mean of the multilevel estimate is "
        f"{worst:.1f} standard errors from the largest level, "
        f"and its variance {abs(check.size_z):.1f} from the predicted one"
    )
    if check.holds:
        return Finding("ok", f"The telescope holds: {figures}.")
    if check.gather > BATCH_TOLERANCE:
        why = f"networks give a sample a different output in a smaller batch (relative difference {check.gather:.1e})"
    elif not check.ledger:
        why = "the ledger did not count exactly the evaluations made"
    elif check.rounding > 1e-4:
        why = (
            f"the differences do not sum to the largest level (relative difference {check.rounding:.1e}): "
            f"the outputs have low precision"
        )
    else:
        why = "more than 4 is no accident: the output of a level depends on more than its input"
    return Finding("error", f"The telescope does not hold: {figures}; {why}.")
