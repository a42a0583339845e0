"""Statistics of the differences Y_k = f^k - f^{k-1} (f^0 = 0) along the largest level's own trajectories."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..diffusion.estimator import Estimator
from ..diffusion.ledger import Ledger
from ..diffusion.level import Level
from ..diffusion.process import Process
from ..diffusion.sampler import sample
from ..diffusion.step_rules import step_rule_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LevelStatistics:
    """Measured statistics, float64: K levels, N samples, S noise levels (ascending log-SNR), images in [-1, 1].

    Values are stored per sample, since the differences of one sample at different noise levels are dependent. Standard
    errors are over samples, also for values pooled over noise levels.
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

    def label(self, k: int) -> str:
        """Name of Y_k, such as "w8 - w4"."""
        return f"{self.names[k]} - {self.names[k - 1]}" if k else self.names[0]


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


class _Observed(Estimator):
    """The largest level as an estimator; `visit` makes each estimate and runs all levels at chosen evaluations."""

    def __init__(self, family: Sequence[Level], visit: Callable[[int, Tensor, float, Ledger], Tensor]):
        self._family, self._visit = list(family), visit

    @property
    def levels(self) -> list[Level]:
        return self._family

    def weights(self, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
        return np.broadcast_to(np.eye(len(self._family))[-1], (evaluations, len(seeds), len(self._family)))

    def expected_evaluations(self, evaluations: int) -> np.ndarray:
        return np.full(len(self._family), float(evaluations))

    def weight_table(
        self, evaluations: int, seeds: Sequence[int], ledger: Ledger
    ) -> Callable[[int, Tensor, float], Tensor]:
        return lambda j, x, logsnr: self._visit(j, x, logsnr, ledger)


@torch.no_grad()
def measure(
    family: Sequence[Level],
    process: Process,
    dynamics: str,
    step_rule: str,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    steps: int = 24,
    batch: int = 64,
    progress: Progress | None = None,
) -> tuple[LevelStatistics, Ledger]:
    """Run the largest level's trajectories of these seeds on `steps` noise levels; run all levels on each state.

    If a step rule evaluates twice at a noise level, the later evaluation is measured. Memory: the states and outputs of
    one noise level and one batch. The ledger counts every evaluation.
    """
    grid = process.grid(steps)
    visits = {e.logsnr: j for j, e in enumerate(step_rule_of(dynamics, step_rule).program(grid))}
    slots = {visits[value]: s for s, value in enumerate(sorted(visits))}
    logsnr = np.array(sorted(visits))
    k, n, s = len(family), len(seeds), len(logsnr)
    pairs, signed = np.zeros((k + 1, k, n, s)), np.zeros((k, n, s))
    # sums over samples, per pixel, of the differences and of the largest level
    total = torch.zeros(k + 1, s, *shape, dtype=torch.float64, device=device)
    timings: list[list[float]] = [[] for _ in family]
    done = 0

    def visit(j: int, x: Tensor, level_logsnr: float, ledger: Ledger) -> Tensor:
        nonlocal done
        noise_level = torch.full((len(x),), level_logsnr, dtype=torch.float32, device=x.device)
        if j not in slots:
            ledger.record(k - 1, np.arange(len(x)))
            return family[-1].denoise(x, noise_level)
        slot, part = slots[j], slice(first, first + len(x))
        output, outputs = x, []
        for i, level in enumerate(family):
            began = _now(x.device)
            output = level.denoise(x, noise_level)
            timings[i].append((_now(x.device) - began) / len(x))
            ledger.record(i, np.arange(len(x)))
            outputs.append(output.double())
            for low in range(i + 1):
                pairs[low, i, part, slot] = _mean((outputs[i] - (outputs[low - 1] if low else 0)).square())
            y = outputs[i] - (outputs[i - 1] if i else 0)
            signed[i, part, slot] = _mean(y)
            total[i, slot] += y.sum(0)
        total[k, slot] += outputs[-1].sum(0)
        done += len(x)
        if progress is not None:
            progress(done, n * s)
        return output

    ledger = Ledger([level.flops for level in family])
    for first in range(0, n, batch):
        few = list(seeds)[first : first + batch]
        _, part = sample(_Observed(family, visit), grid, dynamics, step_rule, few, shape, device)
        ledger.add(part)
    of_mean = total.flatten(2).div(n).square().mean(2).cpu().numpy()
    own = pairs[[*range(k), 0], [*range(k), k - 1]]  # Y_1, ..., Y_K, f^K
    spread = (own.mean(1) - of_mean).clip(min=0) * (n / max(n - 1, 1))
    flops, seconds = np.array(ledger.flops), np.array([np.median(t) for t in timings])
    weights = process.drift_weights(logsnr)
    names = [level.name for level in family]
    return LevelStatistics(names, flops, seconds, logsnr, weights, pairs, signed, spread[:k], spread[k]), ledger


def _mean(values: Tensor) -> np.ndarray:
    """Mean over pixels, [B, ...] -> [B]."""
    return values.flatten(1).mean(1).cpu().numpy()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
