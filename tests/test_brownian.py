"""Random streams keyed by the sample's seed, and one Brownian path shared by all grids."""

import numpy as np
import pytest
import torch
from toys import SHAPE, process

from mlem_diffusion.diffusion.bridge import bridge_tree
from mlem_diffusion.diffusion.brownian import BrownianPath, coin_uniforms, stream_seed
from mlem_diffusion.diffusion.process import CosineSchedule, Process, TimeGrid

CLOCKS = ["snr", "time"]
BASES = [process(2), process(75), process(512, "logsnr"), process(129), Process(CosineSchedule(), -9, 9, 120)]


def in_numbers(grid: TimeGrid, clock: str) -> np.ndarray:
    """Increments [n-1, 2N-2] by the independent normals that a path draws."""
    tree = bridge_tree(grid.base_logsnr.tobytes(), grid.base_time.tobytes())
    columns, coefficients = tree.coefficients(grid.index, clock)
    out = np.zeros((len(grid.index) - 1, 2 * len(grid.base_time) - 2))
    out[:, columns] = coefficients
    return out


def in_base_steps(grid: TimeGrid, clock: str) -> np.ndarray:
    """Increments [n-1, N-1] by the white noise of the base steps: dW = sum sqrt(ds_i) z_i, divided by its spread."""
    position = np.exp(grid.base_logsnr) if clock == "snr" else -grid.base_time
    out, width = np.zeros((len(grid.index) - 1, len(position) - 1)), np.diff(position)
    for row, start, stop in zip(out, grid.index[:-1], grid.index[1:], strict=True):
        row[start:stop] = np.sqrt(width[start:stop] / (position[stop] - position[start]))
    return out


@pytest.mark.parametrize("p", BASES)
def test_the_law_is_exact(p: Process) -> None:
    """Covariances of two grids and clocks are those of sums of white noise, to float64 precision.
    Base steps are the same normals in both clocks, so EM in t and the ancestral step follow one path."""
    base = in_numbers(p.grid(), "snr")
    np.testing.assert_allclose(in_numbers(p.grid(), "time"), base, atol=1e-8)  # negligible terms are left out
    np.testing.assert_allclose(base @ base.T, np.eye(p.base_steps - 1), atol=1e-12)
    for steps in {min(n, p.base_steps) for n in (2, 3, 6, 12, 24, 32, 33, 74)}:
        for clock in CLOCKS:
            np.testing.assert_allclose(
                in_numbers(p.grid(steps), clock), in_base_steps(p.grid(steps), clock) @ base, atol=1e-8
            )


def test_clocks_that_agree_or_span_many_orders_are_exact() -> None:
    """Proportional clocks leave nothing for V; here u spans 35 orders of magnitude."""
    logsnr = np.linspace(-40, 40, 200)
    for time in (-np.exp(logsnr), -logsnr, -logsnr - 1e-7 * np.cos(logsnr)):
        index = np.array([0, 3, 50, 51, 120, 199])
        grids = [TimeGrid(logsnr, time, time, i, logsnr, time) for i in (np.arange(200), index)]
        base = in_numbers(grids[0], "snr")
        np.testing.assert_allclose(base @ base.T, np.eye(199), atol=1e-12)
        for clock in CLOCKS:
            expected = in_base_steps(grids[1], clock) @ base
            np.testing.assert_allclose(in_numbers(grids[1], clock), expected, atol=1e-7)


@pytest.mark.parametrize("clock", CLOCKS)
def test_coarse_increments_are_exact_sums_of_the_fine_ones(clock: str) -> None:
    p = process(200)
    fine = BrownianPath([5, 8], SHAPE).increments(p.grid(), "snr").double().numpy()
    for steps in (2, 5, 33, 150):
        coarse = BrownianPath([5, 8], SHAPE).increments(p.grid(steps), clock)
        expected = np.tensordot(in_base_steps(p.grid(steps), clock), fine, 1)
        np.testing.assert_allclose(coarse.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_run_of_32_steps_draws_few_numbers_whatever_the_base_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 31 are necessary. A sum over base steps would draw 511 to 16384."""
    drawn, normal = [], torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, "normal_", lambda x, **options: drawn.append(x.numel()) or normal(x, **options))
    for base_steps in (512, 1000, 4097, 16385):
        drawn.clear()
        BrownianPath([1], SHAPE).increments(process(base_steps, "logsnr").grid(32), "snr")
        assert sum(drawn) <= 110 * 48
    drawn.clear()
    BrownianPath([1], SHAPE).increments(process(4097, "logsnr").grid(), "snr")
    assert sum(drawn) <= 3 * 4096 * 48


def test_streams_are_separate() -> None:
    """Start, path, coins of each level, seeds and training steps share no numbers, which are standard normals."""
    keys = [(stream, seed, number) for stream in range(4) for seed in range(20) for number in range(20)]
    assert len({stream_seed(*key) for key in keys}) == len(keys)
    grid, n = process(70).grid(), 3 * 64 * 64
    start = BrownianPath([0, 1], (3, 64, 64)).initial().reshape(2, n)
    path = BrownianPath([0, 1], (3, 64, 64)).increments(grid, "time").reshape(-1, n)
    rows = torch.cat([start, path]).double()
    covariance = rows @ rows.T / n - torch.eye(len(rows))  # standard error 1/sqrt(n), of variances sqrt(2/n)
    assert covariance.diagonal().abs().max() < 5 * np.sqrt(2 / n) and rows.mean(1).abs().max() < 5 / np.sqrt(n)
    assert covariance.fill_diagonal_(0).abs().max() < 6 / np.sqrt(n)
    coins = np.concatenate([coin_uniforms([0, 1], level, 5000) for level in range(3)])
    assert np.array_equal(coins[1:2, :10], coin_uniforms([1], 0, 10))  # by seed alone, and whatever the length of a run
    assert np.abs(np.corrcoef(coins) - np.eye(6)).max() < 5 / np.sqrt(5000)


def test_a_path_tells_grids_and_clocks_apart_and_starts_again() -> None:
    p, path = process(200), BrownianPath([4, 9], SHAPE)
    for grid, clock in ((p.grid(150), "snr"), (p.grid(9), "snr"), (p.grid(9), "time"), (process(100).grid(9), "time")):
        whole = BrownianPath([4, 9], SHAPE).increments(grid, clock)
        assert all(torch.equal(path.increment(grid, clock, j), whole[j]) for j in (*range(len(whole)), 0, 7, 3))
