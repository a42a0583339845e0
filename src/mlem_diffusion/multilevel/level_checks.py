"""Checks of a family: the contract that a level must fulfil, and the telescope of the multilevel estimate."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import sem
from torch import Tensor

from ..diffusion.conditions import Conditions, bound, rows_of, taken
from ..diffusion.level import Level
from ..diffusion.sampler import WeightTable
from .estimators import Multilevel

REPEAT_TOLERANCE, BATCH_TOLERANCE = 1e-5, 1e-4  # relative: GPU kernels may sum in another order
Z_LIMIT = 4.0  # |z| exceeds it with probability 6e-5
DRAWS, P = 256, 0.5  # of the telescope check


def finding(severity: str, text: str) -> dict[str, str]:
    """severity: "error", "warning" or "ok"."""
    return {"severity": severity, "text": text}


@torch.no_grad()
def check_contract(
    family: Sequence[Level], x: Tensor, logsnr: float, conditions: Conditions | None = None
) -> list[dict[str, str]]:
    """Violations of the level contract on states x [B, ...], with these conditions, at one noise level; at most one
    finding per level."""
    noise_level = torch.full((len(x),), logsnr, dtype=torch.float32, device=x.device)
    found = [(level.name, _violation(level, x, noise_level, conditions or {})) for level in family]
    return [finding(violation[0], f"{name} {violation[1]}") for name, violation in found if violation]


def _violation(level: Level, x: Tensor, logsnr: Tensor, conditions: Conditions) -> tuple[str, str] | None:
    """Severity and what the level does wrong, or None."""

    def denoise(x: Tensor, rows: slice = slice(None)) -> Tensor:
        return level.denoise(x, logsnr[rows], **taken(level, conditions, rows))

    given, where = x.clone(), f"at log-SNR {float(logsnr[0]):.1f}"
    first = denoise(given)
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
    again = _deviation(denoise(given), first)
    if again > REPEAT_TOLERANCE:
        text = f"gives different outputs for the same input {where} (relative difference {again:.1e}): "
        return "error", text + "put the network in eval mode and remove random numbers from it."
    parts = [denoise(x[rows].clone(), rows).clone() for rows in (slice(0, 1), slice(1, None))[: len(x)]]
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
def check_telescope(
    family: Sequence[Level], x: Tensor, logsnr: float, batch: int, conditions: Conditions | None = None
) -> dict[str, str]:
    """Whether the multilevel estimate has mean f^K and the predicted variance, for states x [B, ...] in turn.
    Coins are independent, p_k = P for k >= 2. In standard errors over DRAWS draws, the finding names the largest mean
    of <estimate - f^K, Y_k> over k >= 2, and that of |estimate - f^K|^2 - sum_k (1/p_k - 1) |Y_k|^2."""
    given = conditions or {}
    noise_level = torch.full((len(x),), logsnr, dtype=torch.float32, device=x.device)
    outputs = torch.stack([level.denoise(x, noise_level).clone() for level in bound(family, given)])
    top, differences = outputs[-1].double(), (outputs[1:] - outputs[:-1]).double().flatten(2)
    estimator = Multilevel(family, np.array([1.0] + [P] * (len(family) - 1)))
    projections, sizes = [], []
    for start in range(0, DRAWS, batch):
        seeds = range(start, min(start + batch, DRAWS))
        index = torch.tensor(seeds, device=x.device) % len(x)
        table = WeightTable(family, estimator.weights(1, seeds), rows_of(given, index))
        estimate = table(0, x[index], logsnr)
        error, own = (estimate.double() - top[index]).flatten(1), differences[:, index]
        projections.append((error * own).mean(2).cpu().numpy())
        sizes.append((error.square().mean(1) - (1 / P - 1) * own.square().mean(2).sum(0)).cpu().numpy())
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
