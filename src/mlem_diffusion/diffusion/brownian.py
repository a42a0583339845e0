"""Random numbers keyed by the sample's seed: Brownian paths shared by all time grids, and coins from separate streams.

A sample's numbers depend only on its seed and the kind of device. The batch size and the numbers of processes, levels
and steps do not matter. The increments of every coarse grid are sums over the increments of one base grid, so all
grids share one Brownian path per sample (Giles 2015, section 2, applied over log-SNR)."""

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .process import TimeGrid

_INITIAL, _PATH, _COIN, _TRAIN = 0, 1, 2, 3
WINDOW_BYTES = 1 << 30  # size of the increments that a path stores at a time


def stream_seed(*key: int) -> int:
    """A 63-bit generator seed from a tuple of integers in [0, 2^64), mixed by numpy's SeedSequence."""
    return int(_mixed(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _mixed(key: Sequence[int]) -> np.random.SeedSequence:
    if min(key) < 0 or max(key) >= 1 << 64:
        raise UserError(f"Seeds must lie in 0..2^64 - 1, not {key}.")
    # two words per integer: numpy drops leading zero words, so keys of different lengths could collide
    return np.random.SeedSequence([word for part in key for word in (part & 0xFFFFFFFF, part >> 32)])


def training_generator(device: torch.device, *key: int) -> torch.Generator:
    """The random generator of one training step; the same key restores it after an interruption."""
    return torch.Generator(device=device).manual_seed(stream_seed(_TRAIN, *key))


def coin_uniforms(seeds: Sequence[int], level: int, count: int) -> np.ndarray:
    """Uniforms [B, count] in [0, 1) for the coins of one level; the streams of levels and seeds are independent."""
    return np.stack([np.random.default_rng(_mixed((_COIN, seed, level))).random(count) for seed in seeds])


def increment_weights(grid: TimeGrid, clock: str) -> np.ndarray:
    """Weights [n-1, N-1] of the base increments in each standardised increment of the grid; rows have norm 1.

    clock: "snr" weights by sqrt(du), u = alpha^2/sigma^2, exact for the ancestral step; "time" by sqrt(dt), for EM."""
    if clock == "snr":
        # log du, since u spans tens of orders of magnitude; each coarse step is normalised below
        u = grid.base_logsnr
        log_increment = u[1:] + np.log(-np.expm1(u[:-1] - u[1:]))
    else:
        log_increment = np.log(-np.diff(grid.base_time))
    weights = np.zeros((len(grid.index) - 1, len(grid.base_logsnr) - 1))
    for j, (start, stop) in enumerate(zip(grid.index[:-1], grid.index[1:], strict=True)):
        part = np.exp(log_increment[start:stop] - log_increment[start:stop].max())
        weights[j, start:stop] = np.sqrt(part / part.sum())
    return weights


class BrownianPath:
    """The randomness of one batch of samples, one stream per seed: starting points and Brownian increments.

    seeds: one per sample. shape: of one sample. `increment` draws a window of about WINDOW_BYTES at a time and keeps
    the last one, so settings with the same grid and clock share one draw if they share the path."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu"):
        self.seeds, self.shape, self.device = list(seeds), tuple(shape), torch.device(device)
        self.seconds = 0.0  # spent on drawing windows
        self._first, self._window = 0, torch.empty(0)
        self._drawn: tuple | None = None  # grid and clock of the window

    def initial(self) -> Tensor:
        """Standard normal starting points [B, *shape]."""
        out = torch.empty(len(self.seeds), *self.shape, device=self.device)
        for i, seed in enumerate(self.seeds):
            out[i].normal_(generator=torch.Generator(device=self.device).manual_seed(stream_seed(_INITIAL, seed)))
        return out

    def increments(self, grid: TimeGrid, clock: str, steps: slice = slice(None)) -> Tensor:
        """Standardised Brownian increments [n-1, B, *shape], float32, of all steps of a grid, or of a slice of them.
        All steps cost base_steps normals per pixel, whatever the grid."""
        table = increment_weights(grid, clock)[steps]
        weights = torch.as_tensor(table, dtype=torch.float32, device=self.device)
        # base increments per generator; a block's numbers are the same for every grid; few large draws suit a GPU
        size, block = math.prod(self.shape), 1024 if self.device.type == "cuda" else 32
        out = torch.zeros(len(table), len(self.seeds), size, device=self.device)
        parts = []  # the few coarse steps that each block of base increments touches, and their weights
        for number, start in enumerate(range(0, table.shape[1], block)):
            touched = np.flatnonzero(table[:, start : start + block].any(axis=1))
            if len(touched):
                rows = slice(int(touched[0]), int(touched[-1]) + 1)
                parts.append((number, rows, weights[rows, start : start + block].contiguous()))
        fine = torch.empty(min(block, table.shape[1]), size, device=self.device)
        generator = torch.Generator(device=self.device)
        for i, seed in enumerate(self.seeds):
            for number, rows, part in parts:
                fine.normal_(generator=generator.manual_seed(stream_seed(_PATH, seed, number)))
                out[rows, i].addmm_(part, fine[: part.shape[1]])
        return out.reshape(len(table), len(self.seeds), *self.shape)

    def increment(self, grid: TimeGrid, clock: str, step: int) -> Tensor:
        """The standardised increment [B, *shape] of one step; steps should be asked for in order."""
        asked = (grid.index.tobytes(), grid.base_logsnr.tobytes(), clock)
        if self._drawn != asked or not 0 <= step - self._first < len(self._window):
            began = now(self.device)
            self._window = torch.empty(0)  # frees the memory before the next draw
            length = max(1, WINDOW_BYTES // (4 * len(self.seeds) * math.prod(self.shape)))
            self._first = 0 if length >= len(grid.index) - 1 else step
            self._window = self.increments(grid, clock, slice(self._first, self._first + length))
            self._drawn = asked
            self.seconds += now(self.device) - began
        return self._window[step - self._first]


def now(device: torch.device) -> float:
    """The time in seconds when all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
