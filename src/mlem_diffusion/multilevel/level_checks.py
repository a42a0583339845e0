"""Checks of a family before it is used: the contract of each level, and the telescope of the multilevel estimate."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.level import Level
from ..diffusion.sampler import WeightTable
from .estimators import Multilevel

# relative differences: of a repeated call (GPU kernels may sum in another order), of another batch, of the telescope
REPEAT_TOLERANCE, BATCH_TOLERANCE, ROUNDING_TOLERANCE = 1e-5, 1e-4, 1e-4
Z_LIMIT = 4.0  # |z| exceeds it with probability 6e-5
DRAWS, P = 256, 0.5  # of the telescope check


def finding(severity: str, text: str) -> dict[str, str]:
    """severity: "error", "warning" or "ok"."""
    return {"severity": severity, "text": text}


@torch.no_grad()
def check_contract(family: Sequence[Level], x: Tensor, logsnr: float) -> list[dict[str, str]]:
    """Violations of the level contract on states x [B, ...] at one noise level; at most one finding per level.

    The contract: shape, float32, finite values, an unchanged input, the same output for the same input, and the same
    output for the same sample in another batch."""
    noise_level = torch.full((len(x),), logsnr, dtype=torch.float32, device=x.device)
    found = [_violation(level, x, noise_level) for level in family]
    return [violation for violation in found if violation is not None]


def _violation(level: Level, x: Tensor, logsnr: Tensor) -> dict[str, str] | None:
    name, given, where = level.name, x.clone(), f"at log-SNR {float(logsnr[0]):.1f}"
    first = level.denoise(given, logsnr)
    if getattr(first, "shape", None) != x.shape:
        shape = list(getattr(first, "shape", [])) or type(first).__name__
        return finding("error", f"{name} returns {shape} for images {list(x.shape)}: it must keep their shape.")
    if first.dtype != torch.float32:
        return finding("error", f"{name} returns {first.dtype}, not torch.float32: add .float() to its output.")
    if not torch.isfinite(first).all():
        return finding("error", f"{name} returns values that are not finite {where}: check its divisions.")
    if not torch.equal(given, x):
        return finding("error", f"{name} changes its input images: let it work on a copy.")
    first = first.clone()  # a captured graph returns the same memory at every call
    again = _deviation(level.denoise(given, logsnr), first)
    if again > REPEAT_TOLERANCE:
        text = f"{name} gives different outputs for the same input {where} (relative difference {again:.1e}): "
        return finding("error", text + "put the network in eval mode and remove random numbers from it.")
    parts = [level.denoise(x[rows].clone(), logsnr[rows]).clone() for rows in (slice(0, 1), slice(1, None))]
    apart = _deviation(torch.cat(parts), first)
    text = f"{name} gives a sample a different output in another batch {where} (relative difference {apart:.1e}): "
    if apart > 1e-2:
        return finding("error", text + "put batch norms in eval mode, and let no sample depend on another.")
    if apart > BATCH_TOLERANCE:
        advice = "acceptable only if the levels differ by much more; otherwise run it in float32."
        return finding("warning", text + advice)
    return None


def _deviation(a: Tensor, b: Tensor) -> float:
    """Largest root-mean-square difference of a sample, relative to the root mean square of b; inf if not finite."""
    scale = float(b.double().square().mean().sqrt())
    value = float((a.double() - b.double()).square().flatten(1).mean(1).max().sqrt()) / max(scale, 1e-12)
    return value if np.isfinite(value) else float("inf")


@torch.no_grad()
def check_telescope(family: Sequence[Level], x: Tensor, logsnr: float, batch: int = 64) -> dict[str, Any]:
    """Whether the multilevel estimate has mean f^K, the output of the largest level, for states x [B, ...] in turn.

    Independent coins with p_k = P for k >= 2 at one noise level. rounding: |sum_k Y_k - f^K|. gather: |estimate -
    sum_k w_k f^k| with the networks evaluated on full batches; both are rms of the worst image, relative to f^K.
    bias_z [K-1]: the mean over coins of <estimate - f^K, Y_k> for k >= 2, and size_z: that of |estimate - f^K|^2 -
    sum_k (1/p_k - 1) |Y_k|^2, in standard errors.
    """
    noise_level = torch.full((len(x),), logsnr, dtype=torch.float32, device=x.device)
    outputs = torch.stack([level.denoise(x, noise_level).clone() for level in family])
    y = torch.cat([outputs[:1], outputs[1:] - outputs[:-1]])
    estimator = Multilevel(tuple(family), np.array([1.0] + [P] * (len(family) - 1)))
    top, differences = outputs[-1].double(), y[1:].double().flatten(2)
    projections, sizes, gather = [], [], 0.0
    for start in range(0, DRAWS, batch):
        seeds = range(start, min(start + batch, DRAWS))
        index = torch.tensor(seeds, device=x.device) % len(x)
        weights = estimator.weights(1, seeds)
        estimate, w = WeightTable(family, weights)(0, x[index], logsnr), torch.tensor(weights[0], device=x.device)
        full = torch.einsum("bk,kbd->bd", w, outputs[:, index].double().flatten(2))
        gather = max(gather, _deviation(estimate.flatten(1), full))
        error, own = (estimate.double() - top[index]).flatten(1), differences[:, index]
        projections.append((error * own).mean(2).cpu().numpy())
        expected = (1 / P - 1) * own.square().mean(2).sum(0)
        sizes.append((error.square().mean(1) - expected).cpu().numpy())
    # float32 rounding of outputs of this size is no deviation, even if the coins leave no variance
    rms = [float(difference.square().mean().sqrt()) for difference in differences]
    floor = 1e-6 * float(top.square().mean().sqrt())
    bias = [_z(values, floor * r) for values, r in zip(np.concatenate(projections, axis=1), rms, strict=True)]
    size, rounding = _z(np.concatenate(sizes), floor * float(np.sqrt(np.square(rms).sum()))), _deviation(y.sum(0), top)
    holds = max(map(abs, [*bias, size])) <= Z_LIMIT and rounding <= ROUNDING_TOLERANCE and gather <= BATCH_TOLERANCE
    return {"rounding": rounding, "gather": gather, "bias_z": bias, "size_z": size, "holds": holds}


def _z(values: np.ndarray, floor: float) -> float:
    """Mean in units of its standard error, which is at least `floor`."""
    if not np.isfinite(values).all():
        return float("inf")
    return float(values.mean() / max(values.std(ddof=1) / np.sqrt(len(values)), floor, 1e-300))


def telescope_finding(check: dict[str, Any]) -> dict[str, str]:
    """The result of `check_telescope` as a sentence."""
    bias, size = max(map(abs, check["bias_z"])), abs(check["size_z"])
    figures = (
        f"over {DRAWS} coin draws the mean of the multilevel estimate is {bias:.1f} standard errors from the "
        f"largest level, and its variance {size:.1f} from the predicted one"
    )
    if check["holds"]:
        return finding("ok", f"The telescope holds: {figures}.")
    why = f"more than {Z_LIMIT:.0f} is no accident: the output of a level depends on more than its input"
    if check["gather"] > BATCH_TOLERANCE:
        why = f"networks give a sample a different output in a smaller batch (by {check['gather']:.1e})"
    elif check["rounding"] > ROUNDING_TOLERANCE:
        why = f"the differences sum to the largest level only within {check['rounding']:.1e}: outputs are imprecise"
    return finding("error", f"The telescope does not hold: {figures}; {why}.")


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
