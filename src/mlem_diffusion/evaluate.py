"""Denoising errors of a family on held-out images: every level sees the same images, noise levels and noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .levels import Level
from .noise import initial_noise
from .process import Process, add_noise


def to_float(images: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [N,3,H,W] -> float32 in [-1, 1] on the device."""
    return (
        torch.as_tensor(np.array(images) if isinstance(images, np.ndarray) else images).to(device).float() / 127.5 - 1
    )


def noise_levels(process: Process, count: int) -> np.ndarray:
    """`count` ascending log-SNRs: midpoints of equal parts of the path that a sampler visits, its two ends included."""
    inner = process.logsnr_at((np.arange(count - 2) + 0.5) / (count - 2))
    return np.concatenate([[process.logsnr_min], inner, [process.logsnr_max]])


@torch.no_grad()
def denoising_errors(
    levels: Sequence[Level],
    images: Tensor,
    logsnr: np.ndarray,
    seed: int = 0,
    batch: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per-image mean squared errors for images [M,C,H,W] in [-1, 1] at log-SNRs [S].

    Returns loss [K, M, S] = |f^k - x0|^2, to_previous [K-1, M, S] = |f^k - f^{k-1}|^2 and
    to_largest [K-1, M, S] = |f^k - f^K|^2, means over channels and pixels.
    """
    k, m, s = len(levels), len(images), len(logsnr)
    loss, to_previous = np.zeros((k, m, s)), np.zeros((max(k - 1, 0), m, s))
    to_largest = np.zeros_like(to_previous)

    def squares(a: Tensor, b: Tensor) -> np.ndarray:
        return (a - b).double().square().flatten(1).mean(1).cpu().numpy()

    for j, value in enumerate(logsnr):
        for start in range(0, m, batch):
            part = slice(start, min(start + batch, m))
            x0 = images[part]
            # the noise of image i at noise level j is the same whatever the batch size
            seeds = [seed * 1_000_003 + j * m + i for i in range(m)[part]]
            level_logsnr = torch.full((1,), float(value), device=x0.device).expand(len(x0))
            x = add_noise(x0, initial_noise(seeds, tuple(x0.shape[1:]), x0.device), level_logsnr)
            outputs = [level.denoise(x, level_logsnr).float() for level in levels]
            for i, output in enumerate(outputs):
                loss[i, part, j] = squares(output, x0)
                if i:
                    to_previous[i - 1, part, j] = squares(output, outputs[i - 1])
                if i < k - 1:
                    to_largest[i, part, j] = squares(output, outputs[-1])
        if progress is not None:
            progress(j + 1, s)
    return loss, to_previous, to_largest
