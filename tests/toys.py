"""Small problems with known answers: levels and their effects, portraits, and power laws of error against FLOPs."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlem_diffusion.data.portraits import portrait
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import LinearSchedule, Process, TimeGrid, alpha_sigma, expand
from mlem_diffusion.gamma.estimates import LevelErrors
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
    denoisers = [partial(nonlinear_denoise, scale=1 - 0.5 * 2.0**-k) for k in range(count)]
    return tuple(Level(f"w{k}", denoise, 4.0**k) for k, denoise in enumerate(denoisers))


def probabilities(n: int) -> np.ndarray:
    """Probabilities [n, 3] that change in time, and of which neither is always the larger."""
    t = np.linspace(0, 1, n)
    return np.stack([np.ones(n), 0.6 - 0.2 * t, 0.2 + 0.3 * t], axis=1)


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


FORMS = ("loss_fit", "differences", "to_largest")
AMPLITUDE, FLOOR = 0.02, 0.01


def flops_of(levels: int) -> np.ndarray:
    return 0.233e9 * 232 ** (np.arange(levels) / (levels - 1))


def law(flops: np.ndarray, gamma: float) -> dict[str, np.ndarray]:
    t = (flops / 1e9) ** (-2 / gamma)
    return {
        "loss_fit": FLOOR + AMPLITUDE * t,
        "differences": AMPLITUDE * (t[:-1] - t[1:]),
        "to_largest": AMPLITUDE * (t[:-1] - t[-1]),
    }


def contains(interval: tuple[float, float | None], gamma: float) -> bool:
    return interval[0] <= gamma and (interval[1] is None or gamma <= interval[1])


def level_errors(loss: np.ndarray, to_previous: np.ndarray, to_largest: np.ndarray, **changes: Any) -> LevelErrors:
    """Errors [n, M, S] of levels w8, w16, ... at evenly weighted noise levels from -6 to 6."""
    k, _, s = loss.shape
    widths, logsnr, weights = [8 * (i + 1) for i in range(k)], np.linspace(-6, 6, s), np.full(s, 1 / s)
    levels = widths, [f"w{width}" for width in widths], flops_of(k), [1000] * k
    return replace(LevelErrors(*levels, logsnr, weights, loss, to_previous, to_largest), **changes)


def noisy_family(gamma: float | None, scatter: float = 0.03) -> LevelErrors:
    """Seven levels, 64 images, 6 noise levels; with gamma None all levels are equally good and equally far apart."""
    rng = np.random.default_rng(0)
    flat = {"loss_fit": np.full(7, FLOOR), "differences": np.full(6, 1e-3), "to_largest": np.full(6, 1e-3)}
    values = flat if gamma is None else law(flops_of(7), gamma)
    per_image = np.exp(0.3 * rng.standard_normal((1, 64, 1)))  # some images are harder, for every level

    def spread(form: str) -> np.ndarray:
        sd = scatter / 20 if form == "loss_fit" else scatter  # only the small excess of the loss scatters
        mean = values[form] * np.exp(sd * rng.standard_normal(len(values[form])))
        noise = np.exp(0.01 * rng.standard_normal((len(mean), 64, 6)))
        return mean[:, None, None] * np.exp(-np.linspace(-6, 6, 6) / 4) * per_image * noise

    return level_errors(*(spread(form) for form in FORMS))
