"""Drifts: what a sampler asks for one denoised estimate per step. ML-EM is a drift, not a sampler.

A drift here is a family of levels and a table of weights [n, B, K]: which networks enter the estimate of each step
for each sample, and how much. One level alone, a stitched schedule and the multilevel estimator differ in the table only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cost import Ledger
from .errors import UserError
from .levels import Level, check_family
from .probabilities import draw_coins, evaluation_probabilities, telescope_weights
from .process import Grid


@dataclass(frozen=True)
class SingleLevel:
    """One network at every step: plain EM, DDPM, DDIM, ... with that level."""

    level: Level

    @property
    def levels(self) -> list[Level]:
        return [self.level]

    def weights(self, grid: Grid, seeds: Sequence[int]) -> np.ndarray:
        return np.ones((grid.steps, len(seeds), 1))

    def expected_evaluations(self, grid: Grid) -> np.ndarray:
        """Evaluations of each level [K] per image."""
        return np.array([float(grid.steps)])

    def expected_flops(self, grid: Grid) -> float:
        """FLOPs per image."""
        return _flops(self, grid)

    def clusters(self, seeds: Sequence[int]) -> list[int]:
        """Samples with equal numbers share their coins."""
        return list(seeds)


@dataclass(frozen=True)
class Stitched:
    """The cheaper of two levels for the first `switch` of the steps (high noise), the other after (T-Stitch, Pan et al. 2024)."""

    small: Level
    large: Level
    switch: float

    def __post_init__(self) -> None:
        check_family([self.small, self.large])
        if not 0 <= self.switch <= 1:
            raise UserError(f"stitched: the switch fraction {self.switch} is outside 0..1.")

    @property
    def levels(self) -> list[Level]:
        return [self.small, self.large]

    def _first_large(self, grid: Grid) -> int:
        return round(self.switch * grid.steps)

    def weights(self, grid: Grid, seeds: Sequence[int]) -> np.ndarray:
        out = np.zeros((grid.steps, len(seeds), 2))
        out[: self._first_large(grid), :, 0] = 1
        out[self._first_large(grid) :, :, 1] = 1
        return out

    def expected_evaluations(self, grid: Grid) -> np.ndarray:
        """Evaluations of each level [K] per image."""
        first = self._first_large(grid)
        return np.array([float(first), float(grid.steps - first)])

    def expected_flops(self, grid: Grid) -> float:
        """FLOPs per image."""
        return _flops(self, grid)

    def clusters(self, seeds: Sequence[int]) -> list[int]:
        return list(seeds)


@dataclass(frozen=True)
class Multilevel:
    """The ML-EM estimate sum_k (B_k / p_k) (f^k - f^{k-1}), unbiased for the largest level at every step.

    p: [K], or [n, K] for time-dependent probabilities; p_1 = 1. coins: "independent" or "systematic".
    shared: one set of coins for a whole batch (keyed by its first seed) instead of one per sample.
    """

    family: tuple[Level, ...]
    p: np.ndarray
    coins: str = "independent"
    shared: bool = False

    def __post_init__(self) -> None:
        check_family(self.family)
        p = np.asarray(self.p)
        if p.shape[-1] != len(self.family):
            raise UserError(f"{p.shape[-1]} probabilities do not fit {len(self.family)} levels.")
        if not np.all((p > 0) & (p <= 1)) or np.any(p[..., 0] != 1):  # NaN is refused too
            raise UserError("Inclusion probabilities must lie in (0, 1], with p_1 = 1.")

    @property
    def levels(self) -> list[Level]:
        return list(self.family)

    def _table(self, grid: Grid) -> np.ndarray:
        p = np.asarray(self.p, dtype=np.float64)
        if p.ndim == 2 and len(p) != grid.steps:
            raise UserError(f"Probabilities for {len(p)} steps do not fit a grid of {grid.steps}.")
        return np.broadcast_to(p, (grid.steps, p.shape[-1]))

    def weights(self, grid: Grid, seeds: Sequence[int]) -> np.ndarray:
        p = self._table(grid)
        weights = telescope_weights(p, draw_coins(p, seeds[:1] if self.shared else seeds, self.coins))
        return np.broadcast_to(weights, (grid.steps, len(seeds), p.shape[1]))

    def expected_evaluations(self, grid: Grid) -> np.ndarray:
        """Expected evaluations of each level [K] per image, exact (cancellations of equal weights included)."""
        return evaluation_probabilities(self._table(grid)).sum(axis=0)

    def expected_flops(self, grid: Grid) -> float:
        """Expected FLOPs per image, exact."""
        return _flops(self, grid)

    def clusters(self, seeds: Sequence[int]) -> list[int]:
        return [seeds[0]] * len(seeds) if self.shared else list(seeds)


Drift = SingleLevel | Stitched | Multilevel


def _flops(drift: Drift, grid: Grid) -> float:
    return float(drift.expected_evaluations(grid) @ [level.flops for level in drift.levels])


def weighted_estimate(levels: Sequence[Level], weights: np.ndarray, x: Tensor, logsnr: float, ledger: Ledger) -> Tensor:
    """sum_k w_k f^k(x) for weights [B, K]; each network sees only the samples in which its weight is not zero."""
    estimate = torch.zeros_like(x)
    for k, level in enumerate(levels):
        rows = np.flatnonzero(weights[:, k])
        if len(rows) == 0:
            continue
        ledger.record(k, len(rows))
        w = torch.as_tensor(weights[rows, k], dtype=x.dtype, device=x.device).reshape(-1, *([1] * (x.ndim - 1)))
        noise_level = torch.full((len(rows),), logsnr, dtype=torch.float32, device=x.device)
        if len(rows) == len(x):
            estimate += w * level.denoise(x, noise_level)
        else:
            index = torch.as_tensor(rows, device=x.device)
            estimate.index_add_(0, index, w * level.denoise(x[index], noise_level))
    return estimate
