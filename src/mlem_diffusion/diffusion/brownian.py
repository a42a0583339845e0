"""Random numbers keyed by the sample's seed: Brownian paths shared by all time grids, and coins from separate streams.

A sample's numbers depend only on its seed and the kind of device. The batch size and the numbers of processes, levels
and steps do not matter. The increments of every coarse grid are sums over the increments of one base grid, so all
grids share one Brownian path per sample (Giles 2015, section 2, applied over log-SNR).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .process import TimeGrid

_INITIAL, _PATH, _COIN, _TRAIN = 0, 1, 2, 3
# base increments drawn per generator; a block's numbers are the same for every grid; few large draws suit a GPU
_BLOCK = {"cuda": 1024}
_CPU_BLOCK = 32
WINDOW_BYTES = 1 << 30  # size of the increments that a sampler stores at a time


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


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal starting points [B, *shape], one per seed."""
    out = torch.empty(len(seeds), *shape, device=device)
    for i, seed in enumerate(seeds):
        out[i].normal_(generator=torch.Generator(device=device).manual_seed(stream_seed(_INITIAL, seed)))
    return out


def increment_weights(grid: TimeGrid, clock: str) -> np.ndarray:
    """Weights [n-1, N-1] of the base increments in each standardised increment of the grid; rows have norm 1.

    clock "snr" weights by sqrt(du) with u = alpha^2/sigma^2, exact for the ancestral step. clock "time" weights by
    sqrt(dt), for Euler-Maruyama in t.
    """
    if clock == "snr":
        # log du, since u spans tens of orders of magnitude; each coarse step is normalised below
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
    """Standardised Brownian increments [n-1, B, *shape] of all steps of a grid, or of a range; one path per seed.

    Memory is (n-1) * B images in float32. Drawing all steps costs base_steps normals per pixel, whatever the grid.
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


class BrownianPath:
    """The randomness of one batch of samples, one stream per seed: starting points and Brownian increments.

    seeds: one per sample. shape: of one sample. `increment` draws a window of about `window_bytes` at a time and keeps
    the last one, so settings with the same grid and clock share one draw if they share the path.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
        window_bytes: int = WINDOW_BYTES,
    ):
        self.seeds, self.shape, self.device = list(seeds), tuple(shape), torch.device(device)
        self._length = max(1, window_bytes // (4 * len(self.seeds) * int(np.prod(shape))))
        self._grid: tuple | None = None  # grid and clock of the window
        self._steps, self._window = range(0), torch.empty(0)

    def initial(self) -> Tensor:
        """Standard normal starting points [B, *shape]."""
        return initial_noise(self.seeds, self.shape, self.device)

    def increments(self, grid: TimeGrid, clock: str, steps: range | None = None) -> Tensor:
        """Standardised increments [n-1, B, *shape] of all steps of a grid, or of a range of them."""
        return path_increments(self.seeds, self.shape, grid, clock, self.device, steps)

    def holds(self, grid: TimeGrid, clock: str, step: int) -> bool:
        """Whether the increment of a step is drawn already."""
        return self._grid == (grid.key, clock) and step in self._steps

    def increment(self, grid: TimeGrid, clock: str, step: int) -> Tensor:
        """The standardised increment [B, *shape] of one step; steps should be asked for in order."""
        if not self.holds(grid, clock, step):
            self._window = torch.empty(0)  # frees the memory before the next draw
            first = 0 if self._length >= grid.steps - 1 else step
            self._steps = range(first, min(first + self._length, grid.steps - 1))
            self._window = self.increments(grid, clock, self._steps)
            self._grid = (grid.key, clock)
        return self._window[step - self._steps.start]


def coin_uniforms(seeds: Sequence[int], level: int, count: int) -> np.ndarray:
    """Uniforms [B, count] in [0, 1) for the coins of one level; the streams of levels and seeds are independent."""
    return np.stack([np.random.default_rng(_mixed((_COIN, seed, level))).random(count) for seed in seeds])
