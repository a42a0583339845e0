"""Estimators combine the levels of a family into one denoised estimate for each evaluation of a sampler.

An estimator has a table of weights [n, B, K]: the weight of each of K levels in each of n estimates, for each sample.
A single level, a stitched schedule and the multilevel estimator (ML-EM) differ only in this table. ML-EM is an
estimator and not a sampler, so every step rule can use it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .brownian import BrownianPath
from .ledger import Ledger
from .level import Level, check_family


class Estimator(ABC):
    """An estimator of the denoised image. `evaluations` is n, the length of the sampler's program."""

    @property
    @abstractmethod
    def levels(self) -> list[Level]: ...

    @abstractmethod
    def weights(self, evaluations: int, path: BrownianPath) -> np.ndarray:
        """Weights [n, B, K] of the levels in each estimate."""

    @abstractmethod
    def expected_evaluations(self, evaluations: int) -> np.ndarray:
        """Expected evaluations of each level [K] per image, exact."""

    def expected_flops(self, evaluations: int) -> float:
        """Expected FLOPs per image, exact."""
        return float(self.expected_evaluations(evaluations) @ [level.flops for level in self.levels])

    def clusters(self, seeds: Sequence[int]) -> list[int]:
        """One number per sample; samples with equal numbers share their coins."""
        return list(seeds)

    def weight_table(
        self, evaluations: int, path: BrownianPath, ledger: Ledger
    ) -> Callable[[int, Tensor, float], Tensor]:
        """The function (j, x [B, ...], logsnr) -> denoised estimate [B, ...] of one sampling run.

        It is called with j = 0, 1, ... in order and records every network evaluation in the ledger. It must not change
        an estimate that it has returned."""
        return WeightTable(self.levels, self.weights(evaluations, path), ledger)


@dataclass(frozen=True)
class SingleLevel(Estimator):
    """One network for all evaluations: EM, DDPM, DDIM, ... with this level."""

    level: Level

    @property
    def levels(self) -> list[Level]:
        return [self.level]

    def weights(self, evaluations: int, path: BrownianPath) -> np.ndarray:
        return np.ones((evaluations, len(path.seeds), 1))

    def expected_evaluations(self, evaluations: int) -> np.ndarray:
        return np.array([float(evaluations)])


@dataclass(frozen=True)
class Stitched(Estimator):
    """T-Stitch (Pan et al. 2024): the small level for the first fraction `switch` of the evaluations (high noise), then
    the large level."""

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

    def weights(self, evaluations: int, path: BrownianPath) -> np.ndarray:
        is_large = np.arange(evaluations) >= round(self.switch * evaluations)
        table = np.stack([~is_large, is_large], axis=1).astype(np.float64)
        return np.broadcast_to(table[:, None], (evaluations, len(path.seeds), 2))

    def expected_evaluations(self, evaluations: int) -> np.ndarray:
        first = round(self.switch * evaluations)
        return np.array([float(first), float(evaluations - first)])


class WeightTable:
    """The estimates sum_k w_k f^k(x) of one run, for weights w [n, B, K].

    Each network is evaluated only on the samples with a nonzero weight. The table and these selections are on the
    device before the first estimate, so the loop never waits for a transfer. The ledger records every evaluation."""

    def __init__(self, levels: Sequence[Level], weights: np.ndarray, ledger: Ledger):
        self.levels, self.ledger = levels, ledger
        self.weights = np.ascontiguousarray(np.moveaxis(weights, 2, 1))  # [n, K, B]
        used = self.weights != 0
        self.counts = used.sum(axis=2)
        partial = used & (self.counts < weights.shape[1])[:, :, None]
        self.start = np.concatenate([[0], np.cumsum(partial.sum(axis=2))])  # where (j, k) starts in `positions`
        self.positions = np.nonzero(partial)[2]
        self.same = (self.weights == self.weights[:, :, :1]).all(axis=2)
        self.on_device: tuple[Tensor, Tensor] | None = None

    def __call__(self, j: int, x: Tensor, logsnr: float) -> Tensor:
        """The j-th estimate at x [B, ...]. All samples share the log-SNR, so each level gets a scalar."""
        if self.on_device is None:
            table = torch.tensor(self.weights, dtype=x.dtype).to(x.device)  # a copy: the weights may be read-only
            self.on_device = table, torch.as_tensor(self.positions).to(x.device)
        table, positions = self.on_device
        estimate, noise_level = None, torch.full((), logsnr, dtype=torch.float32, device=x.device)
        for k, level in enumerate(self.levels):
            count = int(self.counts[j, k])
            if count == 0:
                continue
            self.ledger.record(k, np.flatnonzero(self.weights[j, k]))
            if count == len(x):
                output = level.denoise(x, noise_level).to(x.dtype)
                w = float(self.weights[j, k, 0]) if self.same[j, k] else _column(table[j, k], x)
                estimate = w * output if estimate is None else estimate.add_(w * output)
            else:
                first = self.start[j * len(self.levels) + k]
                rows = positions[first : first + count]
                output = level.denoise(x[rows], noise_level).to(x.dtype)
                estimate = torch.zeros_like(x) if estimate is None else estimate
                estimate.index_add_(0, rows, _column(table[j, k][rows], x) * output)
        return torch.zeros_like(x) if estimate is None else estimate


def _column(weights: Tensor, x: Tensor) -> Tensor:
    """Weights [B] reshaped to [B, 1, ...], with the rank of x."""
    return weights.reshape(-1, *([1] * (x.ndim - 1)))


def weighted_estimate(levels: Sequence[Level], weights: np.ndarray, x: Tensor, logsnr: float, ledger: Ledger) -> Tensor:
    """The single estimate sum_k w_k f^k(x) for weights [B, K]."""
    return WeightTable(levels, weights[None], ledger)(0, x, logsnr)
