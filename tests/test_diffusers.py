"""Step rules against diffusers' schedulers, on the same noise levels, noise and denoiser."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import grid_of, nonlinear_denoise

from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.sampler import SingleLevel, sample
from mlem_diffusion.diffusion.step_rules import STEP_RULES

diffusers = pytest.importorskip("diffusers")

SHAPE, SEEDS = (3, 8, 8), [0, 1, 2]
SECOND_ORDER = {"solver_order": 2, "final_sigmas_type": "zero", "lower_order_final": True, "prediction_type": "sample"}
SCHEDULERS = {
    "ode/dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}),
    "sde/dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "midpoint"}),
    "ode/unipc": ("UniPCMultistepScheduler", {"solver_type": "bh2", "predict_x0": True}),
}


class GivenPath(BrownianPath):
    """A path whose increments [n - 1, B, *SHAPE] are given."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__(SEEDS, SHAPE)
        self.noise = noise

    def increment(self, grid: Any, clock: str, step: int) -> Tensor:
        return self.noise[step]


def agrees(rule: str, scheduler: Any, logsnr: np.ndarray, monkeypatch: pytest.MonkeyPatch, draws: int = 0) -> bool:
    """Whether sampler and scheduler agree to 1e-5 of the largest value; draws: of noise, of which the last may be 0."""
    noise = torch.randn(draws, len(SEEDS), *SHAPE, generator=torch.Generator().manual_seed(1))
    given, module = iter(noise), type(scheduler).__module__
    if draws:
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *a, **k: next(given))
    path = GivenPath(noise)
    x = path.initial()
    for t, value in zip(scheduler.timesteps, logsnr, strict=True):
        output = nonlinear_denoise(x, torch.tensor(float(value)))
        x = scheduler.step(output, t, x).prev_sample
    assert next(given, None) is None  # the scheduler used all the noise
    ours = sample(SingleLevel(Level("toy", nonlinear_denoise, 1.0)), STEP_RULES[rule], grid_of(logsnr), path)[0]
    return bool((ours - x).abs().max() < 1e-5 * x.abs().max())


@pytest.mark.parametrize("count", [10, 25])
@pytest.mark.parametrize(("rule", "name", "own"), [
    ("sde/ddpm", "DDPM", {"variance_type": "fixed_small"}), ("ode/ddim", "DDIM", {"set_alpha_to_one": True}),
])  # fmt: skip
def test_first_order(rule: str, name: str, own: Any, count: int, monkeypatch: pytest.MonkeyPatch):
    make = getattr(diffusers, f"{name}Scheduler")
    scheduler = make(clip_sample=False, prediction_type="sample", timestep_spacing="leading", **own)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(count)
    logsnr = torch.logit(scheduler.alphas_cumprod[scheduler.timesteps.long()]).numpy()
    assert agrees(rule, scheduler, logsnr, monkeypatch, draws=count - 1 if rule == "sde/ddpm" else 0)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("count", [10, 25])  # DPM-Solver treats fewer than 15 steps specially
@pytest.mark.parametrize("rule", SCHEDULERS)
def test_second_order(rule: str, count: int, spacing: str, monkeypatch: pytest.MonkeyPatch):
    name, own = SCHEDULERS[rule]
    scheduler = getattr(diffusers, name)(timestep_spacing=spacing, **SECOND_ORDER, **own)
    scheduler.set_timesteps(count)
    logsnr = -2 * np.log(scheduler.sigmas[:-1].double().numpy())
    alpha2 = scheduler.alphas_cumprod.double()[scheduler.timesteps.long()]
    np.testing.assert_allclose(logsnr, torch.logit(alpha2).numpy(), rtol=1e-4, atol=1e-4)
    # the SDE's scheduler draws once more, for the final denoising, and multiplies by zero
    assert agrees(rule, scheduler, logsnr, monkeypatch, draws=count if rule.startswith("sde") else 0)
