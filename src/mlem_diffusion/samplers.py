"""One sampling loop; EM, DDPM, DDIM and DPM-Solver++(2M) are step rules. Every rule works with every drift."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cost import Ledger
from .drift import Drift, weighted_estimate
from .errors import UserError
from .noise import initial_noise, path_increments
from .process import Grid, alpha_sigma


@dataclass(frozen=True)
class Step:
    """One step between neighbouring noise levels s -> t of a grid, as plain numbers."""

    alpha_s: float
    sigma_s: float
    alpha_t: float
    sigma_t: float
    logsnr_s: float
    logsnr_t: float
    logsnr_before: float | None  # of the step before, for multistep rules
    beta_dt: float  # beta(s) * (time(s) - time(t))


def steps_of(grid: Grid) -> list[Step]:
    """The n - 1 steps of a grid."""
    alpha, sigma = alpha_sigma(grid.logsnr)
    return [
        Step(
            float(alpha[i]),
            float(sigma[i]),
            float(alpha[i + 1]),
            float(sigma[i + 1]),
            float(grid.logsnr[i]),
            float(grid.logsnr[i + 1]),
            float(grid.logsnr[i - 1]) if i else None,
            float(grid.beta[i] * (grid.time[i] - grid.time[i + 1])),
        )
        for i in range(grid.steps - 1)
    ]


def _score(x: Tensor, denoised: Tensor, step: Step) -> Tensor:
    return (step.alpha_s * denoised - x) / step.sigma_s**2


def em_sde(x: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, z: Tensor) -> Tensor:
    """Euler-Maruyama in t of the reverse SDE dx = -beta (x/2 + score) dt + sqrt(beta) dW (Song et al. 2021, eq. 6)."""
    return x + step.beta_dt * (0.5 * x + _score(x, denoised, step)) + math.sqrt(step.beta_dt) * z


def em_ode(x: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, z: None) -> Tensor:
    """Euler in t of the probability flow dx = -beta/2 (x + score) dt (Song et al. 2021, eq. 13)."""
    return x + 0.5 * step.beta_dt * (x + _score(x, denoised, step))


def ddpm(x: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, z: Tensor) -> Tensor:
    """Ancestral step with the posterior variance (Ho et al. 2020, eq. 7); exactly EM of dm = denoised du + dW_u,
    u = alpha^2/sigma^2, m = u x / alpha."""
    keep = math.exp(step.logsnr_s - step.logsnr_t)  # u_s / u_t
    fresh = -math.expm1(step.logsnr_s - step.logsnr_t)
    return (
        (step.alpha_t / step.alpha_s * keep) * x
        + (step.alpha_t * fresh) * denoised
        + (step.sigma_t * math.sqrt(fresh)) * z
    )


def ddim(x: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, z: None) -> Tensor:
    """Deterministic DDIM (Song et al. 2020, eq. 12 with eta = 0)."""
    ratio = step.sigma_t / step.sigma_s
    return ratio * x + (step.alpha_t - step.alpha_s * ratio) * denoised


def dpmpp_2m(x: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, z: None) -> Tensor:
    """DPM-Solver++(2M), data prediction (Lu et al. 2022, algorithm 2); its first step is DDIM."""
    h = 0.5 * (step.logsnr_t - step.logsnr_s)
    if previous is not None and step.logsnr_before is not None:
        r = 0.5 * (step.logsnr_s - step.logsnr_before) / h
        denoised = (1 + 0.5 / r) * denoised - (0.5 / r) * previous
    return (step.sigma_t / step.sigma_s) * x - (step.alpha_t * math.expm1(-h)) * denoised


# (dynamics, name) -> step function and the clock in which its Brownian increments are standardised
STEP_RULES = {
    ("sde", "em"): (em_sde, "time"),
    ("sde", "ddpm"): (ddpm, "snr"),
    ("ode", "em"): (em_ode, None),
    ("ode", "ddim"): (ddim, None),
    ("ode", "dpmpp_2m"): (dpmpp_2m, None),
}
# which rule at the base grid serves as the reference of a dynamics
REFERENCE_RULE = {"sde": "ddpm", "ode": "dpmpp_2m"}


@torch.no_grad()
def sample(
    drift: Drift,
    grid: Grid,
    dynamics: str,
    step_rule: str,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    increments: Tensor | None = None,
) -> tuple[Tensor, Ledger]:
    """Sample one batch: images [B, *shape] in [-1, 1] before clipping, and the ledger of what was evaluated.

    seeds: one per sample; each keys its own start, path and coins. increments [n-1, B, *shape] may be passed in to share
    one draw between settings on the same grid, seeds and clock. ledger.seconds covers the loop, not the drawing of noise.
    Raises UserError for an unknown rule.
    """
    if (dynamics, step_rule) not in STEP_RULES:
        known = ", ".join(f"{d}/{r}" for d, r in STEP_RULES)
        raise UserError(f"The step rule {dynamics}/{step_rule} is unknown; expected one of {known}.")
    rule, clock = STEP_RULES[dynamics, step_rule]
    device = torch.device(device)
    x = initial_noise(seeds, shape, device)
    if clock is not None and increments is None:
        increments = path_increments(seeds, shape, grid, clock, device)
    weights = drift.weights(grid, seeds)
    ledger = Ledger([level.flops for level in drift.levels], images=len(seeds))
    start, previous, denoised = _now(device), None, x
    for i, step in enumerate(steps_of(grid)):
        denoised = weighted_estimate(drift.levels, weights[i], x, step.logsnr_s, ledger)
        x = rule(x, denoised, previous, step, increments[i] if clock and increments is not None else None)
        previous = denoised
    images = weighted_estimate(drift.levels, weights[-1], x, float(grid.logsnr[-1]), ledger)
    ledger.seconds = _now(device) - start
    return images, ledger


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
