"""Step rules against diffusers' schedulers, on the same noise levels, noise and denoiser."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import grid_of, nonlinear_denoise

from mlem_diffusion.diffusion.brownian import initial_noise
from mlem_diffusion.diffusion.estimator import SingleLevel
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.sampler import sample

diffusers = pytest.importorskip("diffusers")

SHAPE, SEEDS, CPU = (3, 8, 8), [0, 1, 2], torch.device("cpu")
LEVEL = Level("toy", nonlinear_denoise, 1.0)
COUNTS = [10, 25]  # DPM-Solver treats fewer than 15 steps specially


def theirs(scheduler: Any, logsnr: np.ndarray, prediction: str) -> Tensor:
    """Run a scheduler from our starting points; `prediction` is its prediction type."""
    x = initial_noise(SEEDS, SHAPE, CPU)
    for t, value in zip(scheduler.timesteps, logsnr, strict=True):
        noise_level = torch.full((len(x),), float(value))
        output = nonlinear_denoise(x, noise_level)
        if prediction == "epsilon":
            alpha, sigma = torch.sigmoid(noise_level[0]).sqrt(), torch.sigmoid(-noise_level[0]).sqrt()
            output = (x - alpha * output) / sigma
        x = scheduler.step(output, t, x).prev_sample
    return x


def logsnr_of(scheduler: Any) -> np.ndarray:
    alpha2 = scheduler.alphas_cumprod.double()[scheduler.timesteps.long()]
    return torch.logit(alpha2).numpy()


def ours(logsnr: np.ndarray, dynamics: str, rule: str, increments: Tensor | None = None) -> Tensor:
    return sample(SingleLevel(LEVEL), grid_of(logsnr), dynamics, rule, SEEDS, SHAPE, increments=increments)[0]


def agree(a: Tensor, b: Tensor) -> None:
    """Check agreement to 1e-5 of the largest value, in float32."""
    assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
@pytest.mark.parametrize("count", COUNTS)
def test_ddpm(count: int, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.DDPMScheduler(
        variance_type="fixed_small", clip_sample=False, prediction_type=prediction, timestep_spacing="leading"
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(count)
    logsnr = logsnr_of(scheduler)
    noise = torch.randn(count - 1, len(SEEDS), *SHAPE, generator=torch.Generator().manual_seed(1))
    draws = iter(noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(draws))
    expected = theirs(scheduler, logsnr, prediction)
    assert next(draws, None) is None  # the scheduler used all the noise
    agree(ours(logsnr, "sde", "ddpm", noise), expected)


@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
@pytest.mark.parametrize("count", COUNTS)
def test_ddim(count: int, prediction: str) -> None:
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, set_alpha_to_one=True, prediction_type=prediction, timestep_spacing="leading"
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(count)
    logsnr = logsnr_of(scheduler)
    agree(ours(logsnr, "ode", "ddim"), theirs(scheduler, logsnr, prediction))


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("count", COUNTS)
def test_dpm_solver(count: int, spacing: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        lower_order_final=True,
        prediction_type="sample",
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(count)
    logsnr = -2 * np.log(scheduler.sigmas[:-1].double().numpy())
    np.testing.assert_allclose(logsnr, logsnr_of(scheduler), rtol=1e-4, atol=1e-4)
    agree(ours(logsnr, "ode", "dpmpp_2m"), theirs(scheduler, logsnr, "sample"))


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("count", COUNTS)
def test_sde_dpm_solver(count: int, spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        lower_order_final=True,
        prediction_type="sample",
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(count)
    logsnr = -2 * np.log(scheduler.sigmas[:-1].double().numpy())
    noise = torch.randn(count, len(SEEDS), *SHAPE, generator=torch.Generator().manual_seed(1))
    draws = iter(noise)  # the scheduler draws once more for the final denoising and multiplies by zero
    module = "diffusers.schedulers.scheduling_dpmsolver_multistep.randn_tensor"
    monkeypatch.setattr(module, lambda *a, **k: next(draws))
    expected = theirs(scheduler, logsnr, "sample")
    assert next(draws, None) is None
    agree(ours(logsnr, "sde", "dpmpp_2m", noise[:-1]), expected)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("count", COUNTS)
def test_unipc(count: int, spacing: str) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=2,
        solver_type="bh2",
        predict_x0=True,
        final_sigmas_type="zero",
        lower_order_final=True,
        prediction_type="sample",
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(count)
    logsnr = -2 * np.log(scheduler.sigmas[:-1].double().numpy())
    agree(ours(logsnr, "ode", "unipc"), theirs(scheduler, logsnr, "sample"))


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("count", COUNTS)
def test_heun(count: int, spacing: str) -> None:
    """The scheduler uses EDM's coordinates x / alpha; its last step, to no noise, is Euler's: the final denoising."""
    scheduler = diffusers.HeunDiscreteScheduler(prediction_type="sample", timestep_spacing=spacing)
    scheduler.set_timesteps(count)
    sigmas = scheduler.sigmas[:-1].double()
    assert len(sigmas) == len(scheduler.timesteps) == 2 * count - 1
    alphas = (1 + sigmas**2) ** -0.5
    y = initial_noise(SEEDS, SHAPE, CPU) / alphas[0].float()
    for t, sigma, alpha in zip(scheduler.timesteps, sigmas, alphas, strict=True):
        output = nonlinear_denoise(y * alpha.float(), torch.full((len(y),), -2 * float(sigma.log())))
        y = scheduler.step(output, t, y).prev_sample
    agree(ours(-2 * np.log(sigmas[::2].numpy()), "ode", "heun"), y)
