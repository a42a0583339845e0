"""Random numbers keyed by the sample's seed: Brownian paths shared by all time grids, and coins from separate streams.
A sample's numbers depend only on its seed and the kind of device, not on the batch size or the numbers of processes,
levels and steps. The increments of every grid are sums over those of one base grid, so all grids share one Brownian
path per sample (Giles 2015, section 2, over log-SNR). A bridge tree (bridge.py) draws only what a grid needs."""

import math
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .bridge import bridge_tree
from .conditions import ConditionsOf, conditions_of, rows_of
from .process import TimeGrid

_INITIAL, _PATH, _COIN, _TRAIN = 0, 1, 2, 3
_WINDOW = 64  # steps that a path draws at a time


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


class BrownianPath:
    """The randomness of one batch of samples, one stream per seed: starting points and Brownian increments.
    seeds: one per sample. shape: of one sample. conditions: of these samples, such as labels, or a function that gives
    them for seeds (conditions.py). `increment` draws _WINDOW steps at a time and keeps the last ones."""

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu",
        conditions: ConditionsOf = None,
    ):  # fmt: skip
        self.seeds, self.shape, self.device = list(seeds), tuple(shape), torch.device(device)
        self.conditions = conditions_of(conditions, self.seeds, self.device)
        self._window = torch.empty(0)
        self._drawn: tuple | None = None  # which window

    def part(self, first: int, last: int) -> "BrownianPath":
        """The path of the samples first, ..., last - 1 of the batch."""
        own = slice(first, last)
        return BrownianPath(self.seeds[own], self.shape, self.device, rows_of(self.conditions, own))

    def initial(self) -> Tensor:
        """Standard normal starting points [B, *shape]."""
        out = torch.empty(len(self.seeds), *self.shape, dtype=torch.float32, device=self.device)
        for i, seed in enumerate(self.seeds):
            out[i].normal_(generator=torch.Generator(device=self.device).manual_seed(stream_seed(_INITIAL, seed)))
        return out

    def increments(self, grid: TimeGrid, clock: str) -> Tensor:
        """Standardised Brownian increments [n-1, B, *shape], float32, of all steps of a grid. clock: "snr" weights by
        sqrt(du), u = alpha^2/sigma^2, exact for the ancestral step; "time" by sqrt(dt), for EM."""
        return torch.cat([self._draw(*_window(grid, clock, j)) for j in range(0, len(grid.index) - 1, _WINDOW)])

    def numbers(self, grid: TimeGrid, clock: str) -> int:
        """Random numbers per pixel that all steps of a grid draw."""
        windows = [_window(grid, clock, j) for j in range(0, len(grid.index) - 1, _WINDOW)]
        return sum(_terms(*window, _block(self.device))[1].shape[1] for window in windows)

    def increment(self, grid: TimeGrid, clock: str, step: int) -> Tensor:
        """The standardised increment [B, *shape] of one step; steps should be asked for in order."""
        first = step - step % _WINDOW
        asked = _window(grid, clock, first)
        if self._drawn != asked:
            self._window = torch.empty(0)  # frees the memory before the next draw
            self._window, self._drawn = self._draw(*asked), asked
        return self._window[step - first]

    def _draw(self, base_logsnr: bytes, base_time: bytes, index: bytes, clock: str) -> Tensor:
        """Increments [n-1, B, *shape] between the base points index [n]."""
        blocks, table = _terms(base_logsnr, base_time, index, clock, _block(self.device))
        weights = torch.as_tensor(table, dtype=torch.float32, device=self.device)
        options: Any = {"dtype": torch.float32, "device": self.device}  # whatever torch's own defaults are
        out = torch.empty(len(table), len(self.seeds), math.prod(self.shape), **options)
        normals = torch.empty(len(blocks), table.shape[1] // len(blocks), out.shape[2], **options)
        generator = torch.Generator(device=self.device)
        for i, seed in enumerate(self.seeds):
            keys = _mixed((_PATH, seed)).generate_state(blocks[-1] + 1, np.uint64)[blocks] >> np.uint64(1)
            for block, key in zip(normals, keys.tolist(), strict=True):
                block.normal_(generator=generator.manual_seed(key))
            out[:, i] = weights @ normals.flatten(0, 1)
        return out.reshape(len(table), len(self.seeds), *self.shape)


def _window(grid: TimeGrid, clock: str, first: int) -> tuple[bytes, bytes, bytes, str]:
    """What `_terms` needs of the steps from the first one on: the base grid, the points between them, the clock."""
    index = grid.index[first : first + _WINDOW + 1].tobytes()
    return grid.base_logsnr.tobytes(), grid.base_time.tobytes(), index, clock


def _block(device: torch.device) -> int:
    """Numbers per pixel that one generator draws: few, so that few are unused, but on a GPU each draw is a launch."""
    return 64 if device.type == "cuda" else 4


@lru_cache(maxsize=512)
def _terms(base_logsnr: bytes, base_time: bytes, index: bytes, clock: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks [m] of random numbers that these increments need, and their coefficients [n-1, m * size] in them.
    One generator draws a block; its numbers are the same for every grid."""
    points = np.frombuffer(index, dtype=np.int64)
    columns, coefficients = bridge_tree(base_logsnr, base_time).coefficients(points, clock)
    blocks, block = np.unique(columns // size, return_inverse=True)
    table = np.zeros((len(coefficients), len(blocks) * size), dtype=np.float32)
    table[:, block * size + columns % size] = coefficients
    return blocks, table


def now(device: torch.device) -> float:
    """The time in seconds when all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
