"""Random numbers keyed by the sample's seed: Gaussian paths shared by all grids, and coins, from separate streams.

A sample's numbers depend on its seed (and the kind of device) alone, never on the batch size, the number of processes,
the number of levels or the step count. Every coarse grid's increments are sums over the increments of one base grid,
so all of them see the same Brownian path (Giles 2015, section 2; here over log-SNR).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .process import Grid

_INITIAL, _PATH, _COIN, _TRAIN = 0, 1, 2, 3
_BLOCK = 32  # base increments drawn per generator: a block's numbers never depend on which grid asks


def stream_seed(*key: int) -> int:
    """A 63-bit generator seed from a tuple of integers in [0, 2^64), well mixed (numpy's SeedSequence)."""
    return int(_mixed(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _mixed(key: Sequence[int]) -> np.random.SeedSequence:
    if min(key) < 0 or max(key) >= 1 << 64:
        raise UserError(f"Seeds must lie in 0..2^64 - 1, not {key}.")
    # two words each: numpy drops leading zero words, and keys of different lengths would meet
    return np.random.SeedSequence([word for part in key for word in (part & 0xFFFFFFFF, part >> 32)])


def training_generator(device: torch.device, *key: int) -> torch.Generator:
    """Generator of one training step's randomness, re-derivable after any stop."""
    return torch.Generator(device=device).manual_seed(stream_seed(_TRAIN, *key))


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal starting points [B, *shape]."""
    out = torch.empty(len(seeds), *shape, device=device)
    for i, seed in enumerate(seeds):
        out[i].normal_(generator=torch.Generator(device=device).manual_seed(stream_seed(_INITIAL, seed)))
    return out


def increment_weights(grid: Grid, clock: str) -> np.ndarray:
    """Weights [n-1, N-1] of the base increments in each standardised increment of the grid; rows have norm 1.

    clock "snr": sqrt(du) with u = alpha^2/sigma^2, exact for the ancestral step; "time": sqrt(dt), for Euler-Maruyama in t.
    """
    if clock == "snr":
        # du relative to the end of its own coarse step, in logs: u spans tens of orders of magnitude
        u = grid.base_logsnr
        log_increment = u[1:] + np.log(-np.expm1(u[:-1] - u[1:]))
    elif clock == "time":
        log_increment = np.log(-np.diff(grid.base_time))
    else:
        raise ValueError(f"clock {clock!r} is neither 'snr' nor 'time'")
    weights = np.zeros((grid.steps - 1, len(grid.base_logsnr) - 1))
    for j, (start, stop) in enumerate(zip(grid.index[:-1], grid.index[1:], strict=True)):
        part = np.exp(log_increment[start:stop] - log_increment[start:stop].max())
        weights[j, start:stop] = np.sqrt(part / part.sum())
    return weights


def path_increments(
    seeds: Sequence[int], shape: tuple[int, ...], grid: Grid, clock: str, device: torch.device
) -> Tensor:
    """Standardised Brownian increments [n-1, B, *shape] of the grid's steps, all from one path per seed.

    Memory is (n-1) * B images in float32; drawing costs base_steps normals per pixel whatever the grid.
    """
    weights = torch.as_tensor(increment_weights(grid, clock), dtype=torch.float32, device=device)
    size = int(np.prod(shape))
    out = torch.zeros(len(weights), len(seeds), size, device=device)
    blocks = range(0, weights.shape[1], _BLOCK)
    # the few coarse steps that each block of base increments touches
    touched = [torch.nonzero(weights[:, b : b + _BLOCK].any(dim=1)).flatten().tolist() for b in blocks]
    fine = torch.empty(_BLOCK, size, device=device)
    for i, seed in enumerate(seeds):
        for number, start in enumerate(blocks):
            generator = torch.Generator(device=device).manual_seed(stream_seed(_PATH, seed, number))
            fine.normal_(generator=generator)
            first, last = touched[number][0], touched[number][-1] + 1
            part = weights[first:last, start : start + _BLOCK]
            out[first:last, i] += part @ fine[: part.shape[1]]
    return out.reshape(len(weights), len(seeds), *shape)


def coin_uniforms(seeds: Sequence[int], level: int, count: int) -> np.ndarray:
    """Uniforms [B, count] in [0, 1) for the coins of one level; streams of levels and seeds are independent."""
    return np.stack([np.random.default_rng(_mixed((_COIN, seed, level))).random(count) for seed in seeds])
