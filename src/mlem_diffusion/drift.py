"""Drifts: what a sampler asks for one denoised estimate per network evaluation. ML-EM is a drift, not a sampler.

A drift here is a family of levels and a table of weights [n, B, K]: which networks enter each of the n estimates for each
sample, and how much. One level alone, a stitched schedule and the multilevel estimator differ in the table only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cost import Ledger
from .errors import UserError
from .levels import Level, check_family
from .probabilities import draw_coins, evaluation_probabilities, telescope_weights


class Drift(ABC):
    """What the classes below share. `evaluations` is the length of the sampler's program, n."""

    @property
    @abstractmethod
    def levels(self) -> list[Level]: ...

    @abstractmethod
    def weights(self, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
        """Weights of the levels in each estimate [n, B, K]."""

    @abstractmethod
    def expected_evaluations(self, evaluations: int) -> np.ndarray:
        """Expected evaluations of each level [K] per image, exact."""

    def expected_flops(self, evaluations: int) -> float:
        """Expected FLOPs per image, exact."""
        return float(self.expected_evaluations(evaluations) @ [level.flops for level in self.levels])

    def clusters(self, seeds: Sequence[int]) -> list[int]:
        """Samples with equal numbers share their coins."""
        return list(seeds)

    def estimator(
        self, evaluations: int, seeds: Sequence[int], ledger: Ledger
    ) -> Callable[[int, Tensor, float], Tensor]:
        """The function (j, x [B, ...], logsnr) -> denoised estimate [B, ...] of one sampling run, called with j = 0, 1, ...
        in order. It records in the ledger what it evaluates, and must not change an estimate that it has returned."""
        return Schedule(self.levels, self.weights(evaluations, seeds), ledger)


@dataclass(frozen=True)
class SingleLevel(Drift):
    """One network at every evaluation: plain EM, DDPM, DDIM, ... with that level."""

    level: Level

    @property
    def levels(self) -> list[Level]:
        return [self.level]

    def weights(self, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
        return np.ones((evaluations, len(seeds), 1))

    def expected_evaluations(self, evaluations: int) -> np.ndarray:
        return np.array([float(evaluations)])


@dataclass(frozen=True)
class Stitched(Drift):
    """The cheaper of two levels for the first `switch` of the evaluations (high noise), the other after (T-Stitch, Pan et
    al. 2024)."""

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

    def weights(self, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
        is_large = np.arange(evaluations) >= round(self.switch * evaluations)
        table = np.stack([~is_large, is_large], axis=1).astype(np.float64)
        return np.broadcast_to(table[:, None], (evaluations, len(seeds), 2))

    def expected_evaluations(self, evaluations: int) -> np.ndarray:
        first = round(self.switch * evaluations)
        return np.array([float(first), float(evaluations - first)])


@dataclass(frozen=True)
class Multilevel(Drift):
    """The ML-EM estimate sum_k (B_k / p_k) (f^k - f^{k-1}), unbiased for the largest level at every evaluation.

    p: [K], or [n, K] for time-dependent probabilities; p_1 = 1. coins: "independent", "systematic" or "nested".
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

    def _table(self, evaluations: int) -> np.ndarray:
        return _rows(self.p, evaluations, "Probabilities")

    def weights(self, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
        p = self._table(evaluations)
        weights = telescope_weights(p, draw_coins(p, seeds[:1] if self.shared else seeds, self.coins))
        return np.broadcast_to(weights, (evaluations, len(seeds), p.shape[1]))

    def expected_evaluations(self, evaluations: int) -> np.ndarray:
        """Expected evaluations of each level [K] per image, exact (cancellations of equal weights included)."""
        return evaluation_probabilities(self._table(evaluations), nested=self.coins == "nested").sum(axis=0)

    def clusters(self, seeds: Sequence[int]) -> list[int]:
        return [seeds[0]] * len(seeds) if self.shared else list(seeds)


@dataclass(frozen=True)
class Quadrature(Drift):
    """The sum f^1 + sum_{k>1} W_k (f^k - f^{k-1}) with fixed weights W [n, K], W_1 = 1, most of them zero.

    A deterministic quadrature of the level differences along the trajectory: where one is evaluated, it stands for its
    neighbours too. Not unbiased: weights come from measured effects (optimise.quadrature_options), and the error is measured.
    """

    family: tuple[Level, ...]
    table: np.ndarray

    def __post_init__(self) -> None:
        check_family(self.family)
        table = np.asarray(self.table)
        if table.ndim != 2 or table.shape[1] != len(self.family):
            raise UserError(f"A table of weights {list(table.shape)} does not fit {len(self.family)} levels.")
        if not np.isfinite(table).all() or np.any(table[:, 0] != 1):
            raise UserError("Quadrature weights must be finite, with W_1 = 1.")

    @property
    def levels(self) -> list[Level]:
        return list(self.family)

    def _networks(self, evaluations: int) -> np.ndarray:
        table = _rows(self.table, evaluations, "Weights")
        return table - np.concatenate([table[:, 1:], np.zeros_like(table[:, :1])], axis=1)

    def weights(self, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
        networks = self._networks(evaluations)
        return np.broadcast_to(networks[:, None], (evaluations, len(seeds), networks.shape[1]))

    def expected_evaluations(self, evaluations: int) -> np.ndarray:
        return np.count_nonzero(self._networks(evaluations), axis=0).astype(np.float64)


def _rows(values: np.ndarray, evaluations: int, what: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 2 and len(values) != evaluations:
        raise UserError(f"{what} for {len(values)} evaluations do not fit a run of {evaluations}.")
    return np.broadcast_to(values, (evaluations, values.shape[-1]))


class Schedule:
    """The estimates sum_k w_k f^k(x) of one run, for weights w [n, B, K]: which networks see which samples is decided, and
    sent to the device, before the first one, so that the loop never waits for it. Each network sees only the samples in
    which its weight is not zero; what is evaluated is recorded in the ledger."""

    def __init__(self, levels: Sequence[Level], weights: np.ndarray, ledger: Ledger):
        self.levels, self.ledger = levels, ledger
        self.weights = np.ascontiguousarray(np.moveaxis(weights, 2, 1))  # [n, K, B]
        used = self.weights != 0
        self.counts = used.sum(axis=2)
        partial = used & (self.counts < weights.shape[1])[:, :, None]
        self.start = np.concatenate([[0], np.cumsum(partial.sum(axis=2))])  # of each (j, k) among the positions
        self.positions = np.nonzero(partial)[2]
        self.same = (self.weights == self.weights[:, :, :1]).all(axis=2)
        self.on_device: tuple[Tensor, Tensor] | None = None

    def __call__(self, j: int, x: Tensor, logsnr: float) -> Tensor:
        """The j-th estimate at x [B, ...]. Samples share the log-SNR, which every level gets as [B] with stride 0."""
        if self.on_device is None:
            table = torch.tensor(self.weights, dtype=x.dtype).to(x.device)  # a copy: the weights may be read-only
            self.on_device = table, torch.as_tensor(self.positions).to(x.device)
        table, positions = self.on_device
        estimate, noise_level = None, torch.full((1,), logsnr, dtype=torch.float32, device=x.device)
        for k, level in enumerate(self.levels):
            count = int(self.counts[j, k])
            if count == 0:
                continue
            self.ledger.record(k, np.flatnonzero(self.weights[j, k]))
            if count == len(x):
                output = level.denoise(x, noise_level.expand(count)).to(x.dtype)
                w = float(self.weights[j, k, 0]) if self.same[j, k] else _column(table[j, k], x)
                estimate = w * output if estimate is None else estimate.add_(w * output)
            else:
                first = self.start[j * len(self.levels) + k]
                rows = positions[first : first + count]
                output = level.denoise(x[rows], noise_level.expand(count)).to(x.dtype)
                estimate = torch.zeros_like(x) if estimate is None else estimate
                estimate.index_add_(0, rows, _column(table[j, k][rows], x) * output)
        return torch.zeros_like(x) if estimate is None else estimate


def _column(weights: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] of the rank of x."""
    return weights.reshape(-1, *([1] * (x.ndim - 1)))


def weighted_estimate(levels: Sequence[Level], weights: np.ndarray, x: Tensor, logsnr: float, ledger: Ledger) -> Tensor:
    """sum_k w_k f^k(x) for weights [B, K]: a schedule of one estimate."""
    return Schedule(levels, weights[None], ledger)(0, x, logsnr)
