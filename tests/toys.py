"""Small problems with known answers, shared by the tests of sampling."""

import numpy as np
import torch
from torch import Tensor

from mlem_diffusion.data.portraits import portrait
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import LinearSchedule, Process, TimeGrid, alpha_sigma, expand
from mlem_diffusion.multilevel.gains import Effects
from mlem_diffusion.multilevel.planner import Calibration

SHAPE = (3, 4, 4)


def process(base_steps: int = 64, spacing: str = "time", reach: float = 9.0) -> Process:
    return Process(LinearSchedule(), -reach, reach, base_steps, spacing)


def gaussian_level(s: float, flops: float = 1.0) -> Level:
    """The exact denoiser of data N(0, s^2 I): linear in x."""

    def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
        logsnr = expand(logsnr, x)
        alpha, sigma2 = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr)
        return alpha * s**2 / (alpha**2 * s**2 + sigma2) * x

    return Level(f"gaussian-{s}", denoise, flops)


def nonlinear_denoise(x: Tensor, logsnr: Tensor, scale: float = 1.0) -> Tensor:
    """Bounded, nonlinear, different at every pixel and noise level, and mixing neighbouring pixels."""
    logsnr = expand(logsnr.to(x.dtype), x)
    ramp = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype, device=x.device).reshape(x.shape[1:])
    mixed = x + 0.3 * x.roll(1, dims=-1)
    return torch.tanh(scale * mixed * torch.sigmoid(0.5 * logsnr) + 0.5 * ramp + 0.1 * logsnr)


def toy_family(count: int = 3) -> tuple[Level, ...]:
    """Levels whose differences shrink as their costs (1, 4, 16, ...) grow."""

    def make(k: int) -> Level:
        return Level(f"w{k}", lambda x, logsnr: nonlinear_denoise(x, logsnr, 1 - 0.5 * 2.0**-k), 4.0**k)

    return tuple(make(k) for k in range(count))


def grid_of(logsnr: np.ndarray) -> TimeGrid:
    """A grid through given ascending log-SNRs, its own base grid, on the linear schedule's clock."""
    time = LinearSchedule().time(logsnr)
    return TimeGrid(logsnr, time, LinearSchedule().beta(time), np.arange(len(logsnr)), logsnr, time)


def gaussian_variance(logsnr: np.ndarray | float, s: float) -> np.ndarray:
    """Variance of x at a log-SNR for data N(0, s^2 I)."""
    alpha, sigma = alpha_sigma(logsnr)
    return alpha**2 * s**2 + sigma**2


def portraits(count: int, size: int, seed: int) -> np.ndarray:
    """The first portraits of a seed, uint8 [count,3,size,size]."""
    return np.stack([portrait(i, size, seed) for i in range(count)])


def effects_of(values: np.ndarray, flops: list[float]) -> Effects:
    """Effects with these values [S, P, K, n] on an even grid."""
    levels, n = values.shape[2:]
    names, where = tuple(f"w{k}" for k in range(levels)), np.linspace(-9, 9, n)
    return Effects(names, np.array(flops), "sde", "ddpm", where, values.astype(np.float32), np.ones((levels, n)), 0.0)


def smooth_effects(sizes: list[float], flops: list[float], grids: dict[int, float], seed: int = 0) -> Calibration:
    """Levels whose differences have smooth random effects of these sizes (any for the first level's output).
    The levels' own errors on each grid are those of the effects plus grids[steps]."""
    rng, n, top = np.random.default_rng(seed), max(grids), len(sizes) - 1
    waves = np.stack([np.cos(m * np.linspace(0, 2, n)) for m in range(4)])
    effects = effects_of(rng.standard_normal((50, 2, len(sizes), 4)) @ waves * np.array(sizes)[:, None] / n, flops)
    rest = [effects.difference(k, top).sum(axis=1) if k < top else np.zeros(1) for k in range(top + 1)]
    own = {(k, steps): more + float((r**2).mean()) for k, r in enumerate(rest) for steps, more in grids.items()}
    return Calibration(effects, {steps: np.linspace(-9, 9, steps) for steps in grids}, own, effects.flops)
