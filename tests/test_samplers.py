"""The sampling loop and its step rules: reductions, reproducibility, orders of convergence on a Gaussian problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import SHAPE, gaussian_level, gaussian_variance, grid_of, nonlinear_denoise, process, toy_family

from mlem_diffusion.drift import Multilevel, SingleLevel
from mlem_diffusion.errors import UserError
from mlem_diffusion.levels import Level
from mlem_diffusion.noise import initial_noise, path_increments
from mlem_diffusion.probabilities import COINS
from mlem_diffusion.process import alpha_sigma
from mlem_diffusion.samplers import REFERENCE_RULE, STEP_RULES, sample, steps_of

RULES = list(STEP_RULES)
CPU = torch.device("cpu")
S = 0.8  # standard deviation of the Gaussian data; at 0.5 the leading error of Euler in t happens to cancel


# --------------------------------------------------------------------------------------------------- reductions


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("coins", COINS)
@pytest.mark.parametrize(("dynamics", "rule"), RULES)
def test_certain_coins_are_plain_sampling_with_the_top_level(
    dynamics: str, rule: str, coins: str, shared: bool
) -> None:
    """Bit for bit, at the same cost."""
    family, grid, seeds = toy_family(), process().grid(9), [3, 1, 4]
    single = SingleLevel(family[-1])
    multilevel = Multilevel(family, np.ones(3), coins, shared)
    expected, plain = sample(single, grid, dynamics, rule, seeds, SHAPE)
    images, ledger = sample(multilevel, grid, dynamics, rule, seeds, SHAPE)
    assert torch.equal(images, expected)
    assert ledger.evaluations == [0, 0, *plain.evaluations] == [0, 0, 27]
    assert ledger.launches == [0, 0, *plain.launches]
    assert ledger.flops_per_image == plain.flops_per_image == multilevel.expected_flops(grid) == 9 * 16.0


def test_one_level_is_plain_sampling() -> None:
    family, grid = toy_family(1), process().grid(9)
    expected, plain = sample(SingleLevel(family[0]), grid, "sde", "em", [0, 1], SHAPE)
    images, ledger = sample(Multilevel(family, np.ones(1)), grid, "sde", "em", [0, 1], SHAPE)
    assert torch.equal(images, expected) and ledger.evaluations == plain.evaluations


@pytest.mark.parametrize(("dynamics", "rule"), RULES)
def test_n_steps_are_n_evaluations_the_last_a_denoising(dynamics: str, rule: str) -> None:
    seen: list[float] = []

    def constant(x: torch.Tensor, logsnr: torch.Tensor) -> torch.Tensor:
        seen.append(float(logsnr[0]))
        return torch.full_like(x, 0.25)

    grid = process().grid(6)
    images, ledger = sample(SingleLevel(Level("c", constant, 2.0)), grid, dynamics, rule, [0, 1], SHAPE)
    assert torch.equal(images, torch.full((2, *SHAPE), 0.25))
    np.testing.assert_allclose(seen, grid.logsnr, rtol=1e-6)
    assert (ledger.evaluations, ledger.images, ledger.flops_per_image) == ([12], 2, 12.0)
    assert ledger.seconds_per_image > 0


@pytest.mark.parametrize("rule", ["ddim", "dpmpp_2m"])
def test_exponential_rules_are_exact_for_a_constant_image(rule: str) -> None:
    """With denoised = c the flow keeps (x - alpha c) / sigma, in one step as in ten."""
    logsnr = np.linspace(-6, 6, 11)
    alpha, sigma = alpha_sigma(logsnr)
    c, x0 = torch.tensor([0.3], dtype=torch.float64), torch.tensor([1.7], dtype=torch.float64)
    x = x0
    for step in steps_of(grid_of(logsnr)):
        x = STEP_RULES["ode", rule][0](x, c, c, step, None)
    expected = alpha[-1] * c + sigma[-1] / sigma[0] * (x0 - alpha[0] * c)
    assert float(x) == pytest.approx(float(expected), rel=1e-12)


def test_ancestral_step_samples_the_posterior() -> None:
    """For a known image the chain stays on the forward marginal: mean alpha c, variance sigma^2, over any step."""
    for step in steps_of(grid_of(np.array([-4.0, -3.0, 0.5, 5.0]))):
        rule, c = STEP_RULES["sde", "ddpm"][0], torch.tensor(0.7, dtype=torch.float64)
        zero, one = torch.zeros(()).double(), torch.ones(()).double()
        mean = rule(step.alpha_s * c, c, None, step, zero)
        assert float(mean) == pytest.approx(step.alpha_t * 0.7, rel=1e-12)
        keep = float(rule(one, zero, None, step, zero))
        fresh = float(rule(zero, zero, None, step, one))
        assert keep**2 * step.sigma_s**2 + fresh**2 == pytest.approx(step.sigma_t**2, rel=1e-12)


def test_euler_rules_are_one_step_of_the_equations_in_time() -> None:
    """dx = -beta (x/2 + score) dt + sqrt(beta) dW backwards, and half the score for the flow; beta at the start of the step."""
    p = process()
    grid = p.grid(5)
    x, denoised, z = torch.randn(3, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i, step in enumerate(steps_of(grid)):
        beta, dt = float(p.schedule.beta(grid.time[i])), float(grid.time[i] - grid.time[i + 1])
        score = -(x - step.alpha_s * denoised) / step.sigma_s**2
        sde = x + beta * (0.5 * x + score) * dt + (beta * dt) ** 0.5 * z
        ode = x + 0.5 * beta * (x + score) * dt
        assert torch.allclose(STEP_RULES["sde", "em"][0](x, denoised, None, step, z), sde, rtol=1e-10)
        assert torch.allclose(STEP_RULES["ode", "em"][0](x, denoised, None, step, None), ode, rtol=1e-10)


def test_an_unknown_rule_is_refused() -> None:
    for dynamics, rule in (("ode", "ddpm"), ("sde", "heun"), ("pde", "em")):
        with pytest.raises(UserError, match="unknown"):
            sample(SingleLevel(toy_family(1)[0]), process().grid(4), dynamics, rule, [0], SHAPE)


# ----------------------------------------------------------------------------------------------- reproducibility


def convolution_family() -> tuple[Level, ...]:
    """Levels with convolutions, whose arithmetic may differ between batch shapes."""
    family = []
    for k in range(3):
        kernel = 0.1 * torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(k))

        def denoise(x: torch.Tensor, logsnr: torch.Tensor, kernel: torch.Tensor = kernel) -> torch.Tensor:
            return nonlinear_denoise(x + torch.nn.functional.conv2d(x, kernel, padding=1), logsnr)

        family.append(Level(f"c{k}", denoise, 4.0**k))
    return tuple(family)


@pytest.mark.parametrize("coins", COINS)
@pytest.mark.parametrize(("dynamics", "rule"), RULES)
def test_a_sample_depends_on_its_seed_alone(dynamics: str, rule: str, coins: str) -> None:
    """Not on batch size, neighbours or order: to 1e-5 of the largest value."""
    drift, grid = Multilevel(convolution_family(), np.array([1.0, 0.5, 0.3]), coins), process().grid(12)

    def run(seeds: list[int]) -> torch.Tensor:
        return sample(drift, grid, dynamics, rule, seeds, (3, 8, 8))[0]

    together = run([11, 12, 13, 14, 15])
    for others, place in (([13], 0), ([15, 13, 99], 1), ([13, 13], 1)):
        assert (run(others)[place] - together[2]).abs().max() < 1e-5 * together[2].abs().max()
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("coins", COINS)
def test_adding_a_level_leaves_noise_and_lower_coins_alone(coins: str) -> None:
    """A fourth level equal to the third adds nothing, whatever its coins."""
    *lower, top = toy_family()
    grid, p = process().grid(12), [1.0, 0.5, 0.3]
    again = Level("again", top.denoise, 99.0)
    three, _ = sample(Multilevel((*lower, top), np.array(p), coins), grid, "sde", "ddpm", [5, 6], SHAPE)
    four, _ = sample(Multilevel((*lower, top, again), np.array([*p, 0.2]), coins), grid, "sde", "ddpm", [5, 6], SHAPE)
    assert (three - four).abs().max() < 1e-4 * three.abs().max()  # terms of size 1/p cancel to rounding


def test_increments_may_be_passed_in() -> None:
    grid, drift = process().grid(12), SingleLevel(toy_family(1)[0])
    for rule, clock in (("em", "time"), ("ddpm", "snr")):
        increments = path_increments([5, 6], SHAPE, grid, clock, CPU)
        given, _ = sample(drift, grid, "sde", rule, [5, 6], SHAPE, increments=increments)
        assert torch.equal(given, sample(drift, grid, "sde", rule, [5, 6], SHAPE)[0])


# ------------------------------------------------------------------------------- convergence on Gaussian data
# Data N(0, S^2 I): the denoiser is linear and the flow has the closed form x_t = x_s sqrt(v_t / v_s), v = alpha^2 S^2 + sigma^2.

STEPS = (16, 32, 64, 128)


def slope(steps: tuple[int, ...], errors: list[float]) -> float:
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("spacing", ["time", "logsnr"])
@pytest.mark.parametrize(("rule", "order"), [("em", 1), ("ddim", 1), ("dpmpp_2m", 2)])
def test_ode_rules_converge_to_the_exact_flow(rule: str, order: int, spacing: str) -> None:
    p, drift = process(1009, spacing, reach=4.0), SingleLevel(gaussian_level(S))
    seeds, shape = [0, 1], (3, 8, 8)
    end = initial_noise(seeds, shape, CPU) * float(np.sqrt(gaussian_variance(4.0, S) / gaussian_variance(-4.0, S)))
    exact = drift.level.denoise(end, torch.full((2,), 4.0))
    errors = [rms(sample(drift, p.grid(n), "ode", rule, seeds, shape)[0] - exact) for n in STEPS]
    assert slope(STEPS, errors) == pytest.approx(order, abs=0.25), errors


@pytest.mark.parametrize(("rule", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_order_survives_uneven_steps(rule: str, order: int) -> None:
    """Steps alternating 1 : 3 in log-SNR: the multistep rule must weigh its history by the ratio of step sizes."""
    drift, errors = SingleLevel(gaussian_level(S)), []
    end = initial_noise([0], SHAPE, CPU) * float(np.sqrt(gaussian_variance(4.0, S) / gaussian_variance(-4.0, S)))
    exact = drift.level.denoise(end, torch.full((1,), 4.0))
    for n in STEPS:
        position = np.cumsum([0.0, *np.resize([1.0, 3.0], n)])
        grid = grid_of(-4 + 8 * position / position[-1])
        errors.append(rms(sample(drift, grid, "ode", rule, [0], SHAPE)[0] - exact))
    assert slope(STEPS, errors) == pytest.approx(order, abs=0.25), errors


@pytest.mark.parametrize("spacing", ["time", "logsnr"])
@pytest.mark.parametrize("rule", ["em", "ddpm"])
def test_sde_rules_converge_strongly_at_order_one(rule: str, spacing: str) -> None:
    """Additive noise: order 1 in the root mean square, along one Brownian path, to the reference of the comparison."""
    p, drift = process(2048, spacing, reach=4.0), SingleLevel(gaussian_level(S))
    seeds, shape = [0, 1], (3, 16, 16)
    reference, _ = sample(drift, p.grid(), "sde", REFERENCE_RULE["sde"], seeds, shape)
    errors = [rms(sample(drift, p.grid(n), "sde", rule, seeds, shape)[0] - reference) for n in STEPS]
    assert slope(STEPS, errors) == pytest.approx(1, abs=0.2), errors


@pytest.mark.parametrize("rule", ["em", "ddpm"])
def test_an_unrelated_path_does_not_converge(rule: str) -> None:
    """What the shared path is for: with fresh noise the distance to the reference stays at the size of the samples."""
    p, drift, shape = process(512, reach=4.0), SingleLevel(gaussian_level(S)), (3, 16, 16)
    reference, _ = sample(drift, p.grid(), "sde", "ddpm", [0], shape)
    fresh = torch.randn(127, 1, *shape, generator=torch.Generator().manual_seed(0))
    images, _ = sample(drift, p.grid(128), "sde", rule, [0], shape, increments=fresh)
    shared, _ = sample(drift, p.grid(128), "sde", rule, [0], shape)
    assert rms(images - reference) > 10 * rms(shared - reference)


@pytest.mark.parametrize(("dynamics", "rule"), RULES)
def test_fine_grids_give_the_variance_of_the_data(dynamics: str, rule: str) -> None:
    """20480 pixels: standard error 1% of the variance; 4%, and 2% more for the discretisation at 256 steps.

    The final image is the denoised end point, of variance alpha^2 S^4 / v; S^2 as the last noise level tends to none.
    """
    p = process(256, "logsnr")
    drift = SingleLevel(gaussian_level(S))
    images, _ = sample(drift, p.grid(), dynamics, rule, range(5), (4, 32, 32))
    assert float(images.double().var()) == pytest.approx(S**2, rel=0.06)
    assert abs(float(images.double().mean())) < 4 * S / 20480**0.5
