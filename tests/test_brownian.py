"""Random streams keyed by the sample's seed, and one Brownian path shared by all grids."""

import numpy as np
import pytest
import torch
from toys import SHAPE, process

from mlem_diffusion.diffusion import brownian
from mlem_diffusion.diffusion.brownian import (
    BrownianPath,
    coin_uniforms,
    increment_weights,
    stream_seed,
    training_generator,
)
from mlem_diffusion.diffusion.process import CosineSchedule, Process

CPU = torch.device("cpu")
CLOCKS = ["snr", "time"]


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("p", [process(75), Process(CosineSchedule(), -9, 9, 75, "logsnr")])
def test_coarse_increments_are_exact_sums_of_the_fine_ones(p: Process, clock: str) -> None:
    """Coarse increments equal base increments dW = sqrt(ds) xi summed one by one, in either clock."""
    base = p.grid()
    fine = BrownianPath([5, 8], SHAPE).increments(base, clock).double().numpy()
    position = np.exp(base.logsnr) if clock == "snr" else -base.time
    for steps in (2, 5, 33, 74):
        grid = p.grid(steps)
        coarse = BrownianPath([5, 8], SHAPE).increments(grid, clock).double().numpy()
        for j in range(steps - 1):
            start, stop = grid.index[j], grid.index[j + 1]
            total = sum(np.sqrt(position[i + 1] - position[i]) * fine[i] for i in range(start, stop))
            expected = total / np.sqrt(position[stop] - position[start])
            np.testing.assert_allclose(coarse[j], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clock", CLOCKS)
def test_the_base_grid_uses_the_base_increments_unchanged(clock: str) -> None:
    """Both clocks use the same standard normals, so EM in t and the ancestral step follow one path."""
    grid = process(40).grid()
    np.testing.assert_allclose(increment_weights(grid, clock), np.eye(39), atol=1e-12)


@pytest.mark.parametrize("clock", CLOCKS)
def test_increments_are_standard_and_uncorrelated(clock: str) -> None:
    grid = process(100).grid(12)
    np.testing.assert_allclose((increment_weights(grid, clock) ** 2).sum(1), 1, rtol=1e-12)
    n = 4 * 3 * 64 * 64
    flat = BrownianPath([0, 1, 2, 3], (3, 64, 64)).increments(grid, clock).reshape(11, n).double().numpy()
    assert np.abs(flat.mean(1)).max() < 5 / np.sqrt(n)
    # a sample covariance of standard normals has standard error 1/sqrt(n), a variance sqrt(2/n)
    assert np.abs(flat @ flat.T / n - np.eye(11)).max() < 5 * np.sqrt(2 / n)


def test_numbers_depend_on_the_seed_alone() -> None:
    grid = process(70).grid(9)
    assert torch.equal(BrownianPath([3, 4, 5], SHAPE).initial()[1:2], BrownianPath([4], SHAPE).initial())
    together = BrownianPath([3, 4, 5], SHAPE).increments(grid, "snr")
    assert torch.equal(together[:, 1:2], BrownianPath([4], SHAPE).increments(grid, "snr"))
    assert np.array_equal(coin_uniforms([3, 4], 1, 10)[1:], coin_uniforms([4], 1, 10))
    # a longer run begins with the coins of a shorter one
    assert np.array_equal(coin_uniforms([4], 1, 10), coin_uniforms([4], 1, 20)[:, :10])


def test_streams_are_separate() -> None:
    """Start, path, coins of each level, seeds and training steps share no numbers."""
    keys = [(stream, seed, number) for stream in range(4) for seed in range(20) for number in range(20)]
    assert len({stream_seed(*key) for key in keys}) == len(keys)
    grid, n = process(70).grid(), 3 * 64 * 64
    start = BrownianPath([0, 1], (3, 64, 64)).initial().reshape(2, n)
    path = BrownianPath([0, 1], (3, 64, 64)).increments(grid, "time").reshape(-1, n)
    rows = torch.cat([start, path]).double()
    assert (rows @ rows.T / n - torch.eye(len(rows))).fill_diagonal_(0).abs().max() < 6 / np.sqrt(n)
    coins = np.concatenate([coin_uniforms([0, 1], level, 5000) for level in range(3)])
    assert np.abs(np.corrcoef(coins) - np.eye(6)).max() < 5 / np.sqrt(5000)


def test_training_randomness_can_be_derived_again() -> None:
    a, b, c = (torch.randn(8, generator=training_generator(CPU, 0, step)) for step in (7, 7, 8))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("held", [1, 3, 7, 100])
def test_a_path_is_drawn_a_few_steps_at_a_time(clock: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, seeds = process(200).grid(23), [4, 9, 11]
    whole = BrownianPath(seeds, SHAPE).increments(grid, clock)
    monkeypatch.setattr(brownian, "WINDOW_BYTES", held * 4 * whole[0].numel())
    path, windows = BrownianPath(seeds, SHAPE), set()
    for j in range(22):
        torch.testing.assert_close(path.increment(grid, clock, j), whole[j], rtol=0, atol=1e-6)
        windows.add(path.seconds)  # spent on drawing
    assert len(windows) == -(-22 // held)
    torch.testing.assert_close(path.increment(grid, clock, 0), whole[0], rtol=0, atol=1e-6)  # and again from the start


def test_a_path_tells_grids_and_clocks_apart() -> None:
    p, path = process(200), BrownianPath([4, 9], SHAPE)
    for grid, clock in ((p.grid(23), "snr"), (p.grid(9), "snr"), (p.grid(9), "time"), (process(100).grid(9), "time")):
        whole = BrownianPath([4, 9], SHAPE).increments(grid, clock)
        assert all(torch.equal(path.increment(grid, clock, j), whole[j]) for j in range(3))


def test_a_range_of_steps_draws_only_the_blocks_it_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(brownian, "stream_seed", lambda *key: calls.append(key) or stream_seed(*key))
    BrownianPath([1], SHAPE).increments(process(320).grid(), "snr", slice(0, 10))
    assert [number for _, _, number in calls] == [0]  # ten base increments lie in the first block of 32
