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

from ..errors import UserError
from .process import TimeGrid

_INITIAL, _PATH, _COIN, _TRAIN = 0, 1, 2, 3
# base increments drawn per generator: a block's numbers never depend on which grid asks. A GPU wants few, large draws
_BLOCK = {"cuda": 1024}
_CPU_BLOCK = 32
WINDOW_BYTES = 1 << 30  # of increments that a sampler holds at a time


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


def increment_weights(grid: TimeGrid, clock: str) -> np.ndarray:
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
    seeds: Sequence[int],
    shape: tuple[int, ...],
    grid: TimeGrid,
    clock: str,
    device: torch.device,
    steps: range | None = None,
) -> Tensor:
    """Standardised Brownian increments [n-1, B, *shape] of the grid's steps (or of a range of them), from one path per seed.

    Memory is (n-1) * B images in float32; drawing all steps costs base_steps normals per pixel whatever the grid.
    """
    steps = range(grid.steps - 1) if steps is None else steps
    table = increment_weights(grid, clock)[steps.start : steps.stop]
    weights = torch.as_tensor(table, dtype=torch.float32, device=device)
    size, block = int(np.prod(shape)), _BLOCK.get(device.type, _CPU_BLOCK)
    out = torch.zeros(len(weights), len(seeds), size, device=device)
    # the few coarse steps that each block of base increments touches, and their weights
    parts = []
    for number, start in enumerate(range(0, table.shape[1], block)):
        touched = np.flatnonzero(table[:, start : start + block].any(axis=1))
        if len(touched):
            rows = slice(int(touched[0]), int(touched[-1]) + 1)
            parts.append((number, rows, weights[rows, start : start + block].contiguous()))
    fine = torch.empty(min(block, table.shape[1]), size, device=device)
    generator = torch.Generator(device=device)
    for i, seed in enumerate(seeds):
        for number, rows, part in parts:
            fine.normal_(generator=generator.manual_seed(stream_seed(_PATH, seed, number)))
            out[rows, i].addmm_(part, fine[: part.shape[1]])
    return out.reshape(len(weights), len(seeds), *shape)


class PathWindows:
    """The increments of `path_increments` for a sampler that asks for one step after the other: a few steps are drawn at
    a time, at most about WINDOW_BYTES of them. A new window redraws the normals of the blocks that it shares with the last.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, ...],
        grid: TimeGrid,
        clock: str,
        device: torch.device,
        most: int = WINDOW_BYTES,
    ):
        self._draw = lambda steps: path_increments(seeds, shape, grid, clock, device, steps)
        self._length = max(1, most // (4 * len(seeds) * int(np.prod(shape))))
        self._end, self._steps = grid.steps - 1, range(0)
        self._held: Tensor | None = None

    def holds(self, step: int) -> bool:
        """Whether this step's increment has been drawn and not been dropped."""
        return step in self._steps

    def __getitem__(self, step: int) -> Tensor:
        """Increment [B, *shape] of a step."""
        if not self.holds(step):
            self._held = None  # before the next one is drawn
            self._steps = range(step, min(step + self._length, self._end))
            self._held = self._draw(self._steps)
        assert self._held is not None
        return self._held[step - self._steps.start]


def coin_uniforms(seeds: Sequence[int], level: int, count: int) -> np.ndarray:
    """Uniforms [B, count] in [0, 1) for the coins of one level; streams of levels and seeds are independent."""
    return np.stack([np.random.default_rng(_mixed((_COIN, seed, level))).random(count) for seed in seeds])
