"""Noise schedules, grids and weights of noise levels; random streams, one Brownian path for all grids; references."""

import math
from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from toys import SHAPE, process

from mlem_diffusion.comparison.bias import bias_text
from mlem_diffusion.diffusion import process as processes
from mlem_diffusion.diffusion.bridge import bridge_tree
from mlem_diffusion.diffusion.brownian import BrownianPath, coin_uniforms, stream_seed
from mlem_diffusion.diffusion.process import CosineSchedule, LinearSchedule, Process, TimeGrid, alpha_sigma
from mlem_diffusion.diffusion.reference import reference_evaluations, reference_steps, sample_reference
from mlem_diffusion.diffusion.sampler import SingleLevel, sample
from mlem_diffusion.diffusion.step_rules import step_rule
from mlem_diffusion.errors import UserError
from mlem_diffusion.models.analytic import analytic_family
from mlem_diffusion.statistics import squared_errors

SCHEDULES: list[Any] = [LinearSchedule(), CosineSchedule()]


def test_alpha_and_sigma_follow_from_the_log_snr() -> None:
    logsnr = np.linspace(-40, 40, 81)
    alpha, sigma = alpha_sigma(logsnr)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)
    np.testing.assert_allclose(np.log(alpha**2 / sigma**2), logsnr, rtol=1e-12, atol=1e-12)


def test_linear_schedule_is_the_limit_of_discrete_ddpm() -> None:
    """prod(1 - beta_i) with N betas from 0.1/N to 20/N tends to alpha^2(i/N), first order in 1/N."""

    def worst(n: int) -> float:
        discrete = np.cumprod(1 - np.linspace(0.1 / n, 20 / n, n))
        alpha, _ = alpha_sigma(LinearSchedule().logsnr(np.arange(1, n + 1) / n))
        return float(np.abs(discrete - alpha**2).max())

    assert worst(1000) < 4e-3
    assert worst(16000) == pytest.approx(worst(1000) / 16, rel=0.1)


def test_cosine_schedule_is_the_published_formula() -> None:
    t, s = np.linspace(0.01, 0.99, 50), 0.008
    f = np.cos((t + s) / (1 + s) * math.pi / 2) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2
    alpha, _ = alpha_sigma(CosineSchedule(s).logsnr(t))
    np.testing.assert_allclose(alpha**2, f, rtol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_time_inverts_logsnr_and_beta_is_the_slope_of_log_alpha2(schedule: Any) -> None:
    t = np.linspace(0.002, 0.995, 100)
    np.testing.assert_allclose(schedule.time(schedule.logsnr(t)), t, rtol=1e-9)
    t, h = np.linspace(0.05, 0.95, 19), 1e-5
    slope = -2 * (np.log(alpha_sigma(schedule.logsnr(t + h))[0]) - np.log(alpha_sigma(schedule.logsnr(t - h))[0]))
    np.testing.assert_allclose(schedule.beta(t), slope / (2 * h), rtol=1e-6)


@pytest.mark.parametrize("spacing", ["time", "logsnr"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_grids_are_subsets_with_common_ends(schedule: Any, spacing: str) -> None:
    p = Process(schedule, -7.0, 8.0, 101, spacing)
    base = p.grid()
    assert len(base.logsnr) == 101
    assert p.logsnr_at(np.array([0.0, 1.0])) == pytest.approx([-7.0, 8.0], abs=1e-9)
    np.testing.assert_allclose(schedule.logsnr(base.time), base.logsnr, rtol=1e-9, atol=1e-9)
    even = np.diff(base.time if spacing == "time" else base.logsnr)
    np.testing.assert_allclose(even, even.mean(), rtol=1e-6)
    for steps in (2, 3, 7, 50, 67, 100, 101):
        grid = p.grid(steps)
        assert len(grid.logsnr) == steps == len(set(grid.index))
        assert np.all(np.diff(grid.logsnr) > 0) and np.all(np.diff(grid.time) < 0)
        assert grid.index[0] == 0 and grid.index[-1] == 100
        assert np.array_equal(grid.logsnr, base.logsnr[grid.index])
        assert np.array_equal(grid.time, base.time[grid.index])
        np.testing.assert_allclose(grid.beta, schedule.beta(grid.time))
        assert np.ptp(np.diff(grid.index)) <= 1  # spread evenly


def test_bad_arguments_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"spacing": "sigma"}, {"logsnr_min": 3.0, "logsnr_max": 3.0}, {"base_steps": 1}]
    for bad in wrong:
        with pytest.raises(UserError):
            Process(LinearSchedule(), **bad)
    for steps in (0, 1, 65):
        with pytest.raises(UserError):
            process(64).grid(steps)


@pytest.mark.parametrize("kind", ["uniform", "gain", "alpha2"])
def test_pooling_does_not_depend_on_the_choice_of_noise_levels(kind: str) -> None:
    fine = np.linspace(-9, 9, 4001)
    own = {
        "uniform": (processes.uniform_weights, np.ones(4001)),
        "alpha2": (processes.alpha2_weights, alpha_sigma(fine)[0] ** 2),
        "gain": (lambda logsnr: processes.gain_weights(logsnr, fine, np.exp(-0.3 * fine)), np.exp(-0.3 * fine)),
    }
    weights_of, density = own[kind]

    def pooled(logsnr: np.ndarray) -> float:
        weights = weights_of(logsnr)
        assert weights.sum() == pytest.approx(1)
        return float(weights @ np.exp(-0.1 * (logsnr + 2) ** 2))

    exact = float((density * np.exp(-0.1 * (fine + 2) ** 2)).sum() / density.sum())
    for logsnr in (fine, np.linspace(-9, 9, 60), np.sort(9 * np.sin(np.linspace(-np.pi / 2, np.pi / 2, 60)))):
        assert pooled(logsnr) == pytest.approx(exact, rel=0.01)


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


def assert_exact(fine: TimeGrid, coarse: Iterable[TimeGrid], atol: float) -> None:
    """Covariances of two grids and clocks are those of sums of white noise, to float64 precision.
    Base steps are the same normals in both clocks, so EM in t and the ancestral step follow one path."""
    base = in_numbers(fine, "snr")
    np.testing.assert_allclose(in_numbers(fine, "time"), base, atol=atol)  # negligible terms are left out
    np.testing.assert_allclose(base @ base.T, np.eye(len(base)), atol=1e-12)
    for grid, clock in product(coarse, CLOCKS):
        np.testing.assert_allclose(in_numbers(grid, clock), in_base_steps(grid, clock) @ base, atol=atol)


@pytest.mark.parametrize("p", BASES)
def test_the_law_is_exact(p: Process) -> None:
    assert_exact(p.grid(), map(p.grid, {min(n, p.base_steps) for n in (2, 3, 6, 12, 24, 32, 33, 74)}), 1e-8)


def test_clocks_that_agree_or_span_many_orders_are_exact() -> None:
    """Proportional clocks leave nothing for V; here u spans 35 orders of magnitude."""
    logsnr = np.linspace(-40, 40, 200)
    for time in (-np.exp(logsnr), -logsnr, -logsnr - 1e-7 * np.cos(logsnr)):
        parts = np.arange(200), np.array([0, 3, 50, 51, 120, 199])
        fine, coarse = (TimeGrid(logsnr, time, time, index, logsnr, time) for index in parts)
        assert_exact(fine, [coarse], 1e-7)


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


def test_the_reference_has_eight_times_as_many_intervals_as_the_finest_grid():
    fine = process(513)
    assert [reference_steps(fine, steps) for steps in ([64, 8], [65], [32], [9], [2])] == [513, 513, 257, 65, 9]
    assert np.array_equal(fine.grid(257).index, fine.grid(513).index[::2])  # the half of a grid is nested in it
    with pytest.raises(UserError, match=r"grid of 66 steps needs process.base_steps = 521 or more"):
        reference_steps(fine, [8, 66])
    assert (reference_evaluations("sde", 513), reference_evaluations("ode", 513)) == (513 + 257, 513 + 257 + 129)


@pytest.mark.parametrize(("rule", "largest"), [("sde/ddpm", 0.03), ("sde/em", 0.03), ("ode/ddim", 1e-3)])
def test_a_reference_eight_times_finer_leaves_little_bias(rule, largest):
    """The analytic family, 17 steps, 24 seeds. DDPM itself as the reference would leave more than 10% (SDE)."""
    fine, level, path = process(1025, "logsnr"), analytic_family(4)[-1], BrownianPath(range(24), (1, 4, 4))
    dynamics = rule.split("/")[0]

    def run(by, steps):
        return sample(SingleLevel(level), step_rule(by), fine.grid(steps), path)[0]

    (whole, half), (finest, _) = (sample_reference(level, dynamics, fine, steps, path) for steps in (129, 1025))
    error, before, limit = (squared_errors(run(rule, 17), to).mean() for to in (whole, half, finest))
    assert abs(error / limit - 1) < largest and abs(before - error) / 3 < largest * error  # what is left, and stated
    if dynamics == "sde":
        assert abs(squared_errors(run(rule, 17), run("sde/ddpm", 129)).mean() / limit - 1) > 0.1
    else:  # Richardson extrapolation makes rms errors 15 times smaller
        plain, extrapolated = (squared_errors(images, finest).mean() for images in (run("ode/dpmpp_2m", 129), whole))
        assert 15**2 * extrapolated < plain < 1e-7


def test_a_large_bias_is_a_warning():
    entry = {"steps": 65, "finest": 9, "bias": 0.02, "setting": "DDPM, w8, 9 steps"}
    lines = bias_text({"sde": entry, "ode": entry | {"bias": 0.25}}).splitlines()
    assert "sde 2% (of 65 steps), ode 25%" in lines[0] and len(lines) == 2
    assert lines[1].startswith("warning: the ode reference") and "DDPM, w8, 9 steps by 25%" in lines[1]
