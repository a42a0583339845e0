"""Denoising errors of a family on held-out images; all levels get the same images, noise levels and noise."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..diffusion.brownian import BrownianPath
from ..diffusion.level import Level
from ..diffusion.process import Process, add_noise

Pair = tuple[int, int | None]  # two levels, by index; None is the clean image


def noise_levels(process: Process, count: int) -> np.ndarray:
    """`count` ascending log-SNRs: the midpoints of equal parts of the sampler's path, and its two ends."""
    inner = process.logsnr_at((np.arange(count - 2) + 0.5) / (count - 2))
    return np.concatenate([[process.logsnr_min], inner, [process.logsnr_max]])


def family_pairs(levels: int) -> list[Pair]:
    """The pairs of a family: each level with the clean image, with the level below, and with the largest level."""
    loss: list[Pair] = [(k, None) for k in range(levels)]
    return loss + [(k, k - 1) for k in range(1, levels)] + [(k, levels - 1) for k in range(levels - 1)]


@torch.no_grad()
def squared_differences(
    levels: Sequence[Level],
    pairs: Sequence[Pair],
    images: Tensor,
    logsnr: np.ndarray,
    seed: int = 0,
    batch: int = 128,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> np.ndarray:
    """Per-image mean squared differences [pairs, M, S] of the levels' outputs, means over channels and pixels.

    images [M,C,H,W] in [-1, 1], log-SNRs [S]. Each level is evaluated once for all pairs, on the same noise."""
    m, s = len(images), len(logsnr)
    out = np.zeros((len(pairs), m, s))
    for j, value in enumerate(logsnr):
        level_logsnr = torch.tensor(float(value), dtype=torch.float32, device=images.device)
        for start in range(0, m, batch):
            part = slice(start, min(start + batch, m))
            x0 = images[part]
            # the noise of image i at noise level j does not depend on the batch size
            seeds = [seed * 1_000_003 + j * m + i for i in range(m)[part]]
            x = add_noise(x0, BrownianPath(seeds, tuple(x0.shape[1:]), x0.device).initial(), level_logsnr)
            outputs = [level.denoise(x, level_logsnr).float() for level in levels]
            for i, (first, second) in enumerate(pairs):
                other = x0 if second is None else outputs[second]
                out[i, part, j] = (outputs[first] - other).double().square().flatten(1).mean(1).cpu().numpy()
        progress(j + 1, s)
    return out
