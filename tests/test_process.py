"""Noise schedules, log-SNR, grids, weights of noise levels; test_unet.py has forward noising."""

import math
from typing import Any

import numpy as np
import pytest
from toys import process

from mlem_diffusion.diffusion.process import (
    CosineSchedule,
    LinearSchedule,
    Process,
    alpha2_weights,
    alpha_sigma,
    gain_weights,
    uniform_weights,
)
from mlem_diffusion.errors import UserError

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
        "uniform": (uniform_weights, np.ones(4001)),
        "alpha2": (alpha2_weights, alpha_sigma(fine)[0] ** 2),
        "gain": (lambda logsnr: gain_weights(logsnr, fine, np.exp(-0.3 * fine)), np.exp(-0.3 * fine)),
    }
    weights_of, density = own[kind]

    def pooled(logsnr: np.ndarray) -> float:
        weights = weights_of(logsnr)
        assert weights.sum() == pytest.approx(1)
        return float(weights @ np.exp(-0.1 * (logsnr + 2) ** 2))

    exact = float((density * np.exp(-0.1 * (fine + 2) ** 2)).sum() / density.sum())
    for logsnr in (fine, np.linspace(-9, 9, 60), np.sort(9 * np.sin(np.linspace(-np.pi / 2, np.pi / 2, 60)))):
        assert pooled(logsnr) == pytest.approx(exact, rel=0.01)
