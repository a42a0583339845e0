"""What sampling costs: FLOPs per network evaluation, and the ledger of the evaluations that really happened."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def flops_per_evaluation(network: nn.Module, size: int, channels: int = 3) -> float:
    """FLOPs (a multiply-add counts two) of one forward pass on one [channels, size, size] image.

    Counted on the meta device: on the CPU the counter sees nothing of fused attention. Norms and activations count 0.
    """
    network = copy.deepcopy(network).to("meta").eval()
    x, logsnr = torch.empty(1, channels, size, size, device="meta"), torch.empty(1, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, logsnr)
    return float(counter.get_total_flops())


@dataclass
class Ledger:
    """Evaluations of each level for each image, counted as they are made."""

    flops: list[float]  # FLOPs per evaluation of one image, per level
    images: int = 0  # images sampled
    seconds: float = 0.0  # wall-clock seconds of sampling
    per_sample: np.ndarray = field(init=False)  # [images, K] evaluations, images in the order of their batches
    launches: list[int] = field(init=False)  # batches put through each level

    def __post_init__(self) -> None:
        self.per_sample = np.zeros((self.images, len(self.flops)), dtype=np.int64)
        self.launches = [0] * len(self.flops)

    def record(self, level: int, rows: np.ndarray) -> None:
        """One evaluation of a level on these images of the batch (distinct positions)."""
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
        """Evaluations of each level, all images together."""
        return self.per_sample.sum(axis=0).tolist()

    @property
    def calls_per_image(self) -> float:
        """Network evaluations per image, all levels together."""
        return sum(self.evaluations) / self.images

    @property
    def flops_per_image(self) -> float:
        """Realised FLOPs per image."""
        return sum(n * t for n, t in zip(self.evaluations, self.flops, strict=True)) / self.images

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / self.images
