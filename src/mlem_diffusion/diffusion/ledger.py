"""The cost of sampling: a ledger counts the network evaluations that were performed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Ledger:
    """Evaluations of each level for each image, counted as they happen."""

    flops: list[float]  # FLOPs per evaluation of one image, per level
    images: int = 0  # images sampled
    seconds: float = 0.0  # wall-clock seconds of sampling
    per_sample: np.ndarray = field(init=False)  # [images, K] evaluations, images in the order of their batches
    launches: list[int] = field(init=False)  # batches evaluated by each level

    def __post_init__(self) -> None:
        self.per_sample = np.zeros((self.images, len(self.flops)), dtype=np.int64)
        self.launches = [0] * len(self.flops)

    def record(self, level: int, rows: np.ndarray) -> None:
        """Count one evaluation of a level on these images of the batch (distinct positions)."""
        self.per_sample[rows, level] += 1
        self.launches[level] += 1

    def add(self, other: Ledger) -> None:
        """Append another batch with the same levels."""
        self.per_sample = np.concatenate([self.per_sample, other.per_sample])
        self.launches = [a + b for a, b in zip(self.launches, other.launches, strict=True)]
        self.images += other.images
        self.seconds += other.seconds

    @property
    def evaluations(self) -> list[int]:
        """Evaluations of each level, summed over the images."""
        return self.per_sample.sum(axis=0).tolist()

    @property
    def calls_per_image(self) -> float:
        """Network evaluations per image, summed over the levels."""
        return sum(self.evaluations) / self.images

    @property
    def flops_per_image(self) -> float:
        """Realised FLOPs per image."""
        return sum(n * t for n, t in zip(self.evaluations, self.flops, strict=True)) / self.images

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / self.images
