"""The sampling loop and its step rules: programs, reductions, reproducibility, orders of convergence, bad levels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from toys import SHAPE, gaussian_level, gaussian_variance, grid_of, nonlinear_denoise, process, toy_family

from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import TimeGrid, alpha_sigma
from mlem_diffusion.diffusion.sampler import SingleLevel, sample
from mlem_diffusion.diffusion.step_rules import REFERENCE_RULE, STEP_RULES, Evaluation, StepRule, step_rule, steps_of
from mlem_diffusion.errors import UserError
from mlem_diffusion.multilevel.estimators import COINS, Multilevel

SDE_RULES = [rule for rule in STEP_RULES.values() if rule.dynamics == "sde"]
every_rule = pytest.mark.parametrize("rule", list(STEP_RULES.values()), ids=list(STEP_RULES))
Denoise = Callable[[np.ndarray, float], np.ndarray]
S = 0.8  # standard deviation of the Gaussian data; at 0.5 the leading error of Euler in t happens to cancel


def run(program: list[Evaluation], x: np.ndarray, denoise: Denoise, increments: Any = None) -> list[np.ndarray]:
    """Apply a program's matrices in float64; return state 0 [n + 1, *x.shape] before each evaluation and at the end."""
    state = np.zeros((len(program[0].update), *x.shape))
    state[0], seen = x, [x]
    for evaluation in program:
        z = np.zeros_like(x) if increments is None or evaluation.noise is None else increments[evaluation.noise]
        inputs = np.concatenate([state, [denoise(state[0], evaluation.logsnr), z]])
        state = np.tensordot(evaluation.update, inputs, axes=1)
        seen.append(state[0])
    return seen


def nonlinear(x: np.ndarray, logsnr: float) -> np.ndarray:
    return nonlinear_denoise(torch.from_numpy(x)[None], torch.tensor([logsnr], dtype=torch.float64))[0].numpy()


# --------------------------------------------------------------------------------------------------- programs
@pytest.mark.parametrize("steps", [2, 3, 7])
@every_rule
def test_a_constant_image_is_preserved(rule: StepRule, steps: int) -> None:
    """Without noise and with all estimates c, alpha_s c becomes alpha_t c at every evaluation, and the image is c."""
    program = rule.program(process().grid(steps))
    alpha = alpha_sigma(np.array([e.logsnr for e in program]))[0]
    seen = run(program, np.array([alpha[0] * 0.7]), lambda x, logsnr: np.full_like(x, 0.7))
    exact = 1 if rule.name == "em" else len(alpha)  # Euler in t follows the equations to first order only
    np.testing.assert_allclose(np.ravel(seen)[:exact], 0.7 * alpha[:exact])
    elsewhere = np.random.default_rng(0).normal(size=(steps - 1, 3))
    final = run(program, elsewhere[0], lambda x, logsnr: np.full_like(x, 0.7), elsewhere)[-1]
    assert np.array_equal(final, [0.7, 0.7, 0.7])


@every_rule
def test_the_loop_applies_the_program_matrices(rule: StepRule) -> None:
    """Agreement to 1e-5 of the largest value, float32 against float64: no state changes in place."""
    grid, shape, seeds = process().grid(9), (3, 6, 6), [4]
    program, clock = rule.program(grid), rule.clock
    path = BrownianPath([4], shape)
    increments = None if clock is None else path.increments(grid, clock)
    images, _ = sample(SingleLevel(Level("n", nonlinear_denoise, 1.0)), rule, grid, BrownianPath(seeds, shape))
    x = path.initial()[0].double().numpy()
    expected = run(program, x, nonlinear, None if increments is None else increments[:, 0].double().numpy())[-1]
    assert np.abs(images[0].numpy() - expected).max() < 1e-5 * np.abs(expected).max()


# --------------------------------------------------------------------------------------------------- reductions
@pytest.mark.parametrize("coins", COINS)
@every_rule
def test_certain_coins_equal_sampling_with_the_top_level(rule: StepRule, coins: str) -> None:
    """Images are equal bit for bit, at the same cost."""
    family, grid, seeds = toy_family(), process().grid(9), [3, 1, 4]
    n = 17 if rule.name == "heun" else 9
    single = SingleLevel(family[-1])
    multilevel = Multilevel(family, np.ones(3), coins)
    expected, single_ledger = sample(single, rule, grid, BrownianPath(seeds, SHAPE))
    images, ledger = sample(multilevel, rule, grid, BrownianPath(seeds, SHAPE))
    assert torch.equal(images, expected)
    assert ledger.evaluations == [0, 0, *single_ledger.evaluations] == [0, 0, 3 * n]
    assert ledger.flops_per_image == single_ledger.flops_per_image == multilevel.expected_flops(n) == n * 16.0
    assert single_ledger.seconds > 0


@pytest.mark.parametrize("rule", ["ddpm", "dpmpp_2m"])
def test_ancestral_steps_sample_the_posterior(rule: str) -> None:
    """For a known image the chain stays on the forward marginal: mean alpha c, variance sigma^2, over any step."""
    grid = grid_of(np.array([-4.0, -3.0, 0.5, 5.0]))
    for evaluation, step in zip(STEP_RULES[f"sde/{rule}"].program(grid), steps_of(grid), strict=False):
        keep, *estimates, fresh = evaluation.update[0]
        assert keep * step.alpha_s + sum(estimates) == pytest.approx(step.alpha_t, rel=1e-12)
        assert keep**2 * step.sigma_s**2 + fresh**2 == pytest.approx(step.sigma_t**2, rel=1e-12)


def test_euler_rules_are_one_step_of_the_equations_in_time() -> None:
    """dx = -beta (x/2 + score) dt + sqrt(beta) dW backwards in time; the flow has half the score.
    beta is taken at the start of the step."""
    p = process()
    grid = p.grid(5)
    x, denoised, z = np.random.default_rng(0).normal(size=(3, 6))
    sde_program, ode_program = (STEP_RULES[f"{dynamics}/em"].program(grid) for dynamics in ("sde", "ode"))
    for i, step in enumerate(steps_of(grid)):
        beta, dt = float(p.schedule.beta(grid.time[i])), float(grid.time[i] - grid.time[i + 1])
        score = -(x - step.alpha_s * denoised) / step.sigma_s**2
        sde = x + beta * (0.5 * x + score) * dt + (beta * dt) ** 0.5 * z
        ode = x + 0.5 * beta * (x + score) * dt
        inputs = np.stack([x, denoised, z])
        np.testing.assert_allclose((sde_program[i].update @ inputs)[0], sde, rtol=1e-10)
        np.testing.assert_allclose((ode_program[i].update @ inputs)[0], ode, rtol=1e-10)


def test_heun_is_edms_algorithm() -> None:
    """Karras et al. 2022, algorithm 1, written in its own coordinates x / alpha and sigma / alpha."""
    grid, x = process(reach=6.0).grid(12), np.random.default_rng(0).normal(size=(3, 4, 4))
    alpha, sigma = alpha_sigma(grid.logsnr)
    y, t = x / alpha[0], sigma / alpha
    for i in range(11):
        d = (y - nonlinear(alpha[i] * y, grid.logsnr[i])) / t[i]
        predicted = y + (t[i + 1] - t[i]) * d
        d_there = (predicted - nonlinear(alpha[i + 1] * predicted, grid.logsnr[i + 1])) / t[i + 1]
        y = y + (t[i + 1] - t[i]) * 0.5 * (d + d_there)
    before, image = run(STEP_RULES["ode/heun"].program(grid), x, nonlinear)[-2:]
    np.testing.assert_allclose(before, alpha[-1] * y, rtol=1e-10)
    np.testing.assert_allclose(image, nonlinear(alpha[-1] * y, grid.logsnr[-1]), rtol=1e-10)


def test_an_unknown_rule_is_refused() -> None:
    for dynamics, rule in (("ode", "ddpm"), ("sde", "heun"), ("sde", "unipc"), ("pde", "em")):
        with pytest.raises(UserError, match="unknown"):
            step_rule(dynamics, rule)


# ----------------------------------------------------------------------------------------------- reproducibility
def convolution(k: int) -> Level:
    """A level whose rounding may differ between batch shapes."""
    kernel = 0.1 * torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(k))
    return Level(f"c{k}", lambda x, u: nonlinear_denoise(x + torch.conv2d(x, kernel, padding=1), u), 4.0**k)


@pytest.mark.parametrize("coins", COINS)
@every_rule
def test_a_sample_depends_on_its_seed_alone(rule: StepRule, coins: str) -> None:
    """It does not depend on batch size, neighbours or order, to 1e-5 of the largest value."""
    family, grid = [convolution(k) for k in range(3)], process().grid(12)
    estimator = Multilevel(family, np.array([1.0, 0.5, 0.3]), coins)

    def run(seeds: list[int]) -> torch.Tensor:
        return sample(estimator, rule, grid, BrownianPath(seeds, (3, 8, 8)))[0]

    together = run([11, 12, 13, 14, 15])
    for others, place in (([13], 0), ([15, 13, 99], 1), ([13, 13], 1)):
        assert (run(others)[place] - together[2]).abs().max() < 1e-5 * together[2].abs().max()
    assert (together[0] - together[1]).abs().max() > 0.1


# ------------------------------------------------------------------------------- convergence on Gaussian data
# Data N(0, S^2 I): the denoiser is linear, and the flow has the closed form
# x_t = x_s sqrt(v_t / v_s), v = alpha^2 S^2 + sigma^2.

STEPS = (16, 32, 64, 128)


def slope(steps: tuple[int, ...], errors: list[float]) -> float:
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


ORDERS = [("em", 1), ("ddim", 1), ("dpmpp_2m", 2), ("heun", 2), ("unipc", 3)]  # UniPC-2's corrector gains one


def flow_errors(rule: str, grids: list[TimeGrid]) -> list[float]:
    """Errors of the final images from x = 1 at log-SNR -4 to 4, in float64."""

    def denoise(x: np.ndarray, logsnr: float) -> np.ndarray:
        return alpha_sigma(logsnr)[0] * S**2 / gaussian_variance(logsnr, S) * x

    end = np.sqrt(gaussian_variance(4.0, S) / gaussian_variance(-4.0, S))
    exact, start = denoise(end, 4.0), np.ones(1)
    return [abs((run(STEP_RULES[f"ode/{rule}"].program(grid), start, denoise)[-1] - exact).item()) for grid in grids]


def uneven(steps: int) -> TimeGrid:
    """Steps alternating 1 : 3 in log-SNR: multistep rules must weigh their history by the ratio of step sizes."""
    position = np.cumsum([0.0, *np.resize([1.0, 3.0], steps)])
    return grid_of(-4 + 8 * position / position[-1])


@pytest.mark.parametrize("spacing", ["time", "logsnr", "uneven"])
@pytest.mark.parametrize(("rule", "order"), ORDERS)
def test_ode_rules_converge_to_the_exact_flow(rule: str, order: int, spacing: str) -> None:
    grid = uneven if spacing == "uneven" else process(1009, spacing, reach=4.0).grid
    errors = flow_errors(rule, [grid(n) for n in STEPS])
    assert slope(STEPS, errors) == pytest.approx(order, abs=0.25), errors


def test_two_step_sde_rule_is_of_order_two_where_noise_is_absent() -> None:
    """z = 0 and a smooth nonlinear denoiser, against the same equation on a fine grid."""
    p, x = process(4097, "logsnr", reach=4.0), np.random.default_rng(0).normal(size=(3, 4, 4))

    def end(rule: str, steps: int | None = None) -> np.ndarray:
        return run(STEP_RULES[f"sde/{rule}"].program(p.grid(steps)), x, nonlinear)[-1]

    fine = end("dpmpp_2m")
    for rule, order in (("ddpm", 1), ("dpmpp_2m", 2)):
        errors = [float(np.sqrt(np.mean((end(rule, n) - fine) ** 2))) for n in STEPS]
        assert slope(STEPS, errors) == pytest.approx(order, abs=0.25), errors


@pytest.mark.parametrize("spacing", ["time", "logsnr"])
def test_sde_rules_converge_strongly_at_order_one(spacing: str) -> None:
    """Additive noise: order 1 in the root mean square, along one Brownian path, to the reference of the comparison."""
    p, estimator = process(2048, spacing, reach=4.0), SingleLevel(gaussian_level(S))
    path = BrownianPath([0, 1], (3, 16, 16))
    reference, _ = sample(estimator, REFERENCE_RULE["sde"], p.grid(), path)
    for rule in SDE_RULES:
        errors = [float(torch.dist(sample(estimator, rule, p.grid(n), path)[0], reference)) for n in STEPS]
        assert slope(STEPS, errors) == pytest.approx(1, abs=0.2), (rule.name, errors)


@every_rule
def test_fine_grids_give_the_variance_of_the_data(rule: StepRule) -> None:
    """20480 pixels: standard error 1% of the variance; 4%, and 2% more for the discretisation at 256 steps.
    The final image is the denoised end point, of variance alpha^2 S^4 / v; S^2 as the last noise tends to none."""
    p = process(256, "logsnr")
    estimator = SingleLevel(gaussian_level(S))
    images, _ = sample(estimator, rule, p.grid(), BrownianPath(range(5), (4, 32, 32)))
    assert float(images.double().var()) == pytest.approx(S**2, rel=0.06)
    assert abs(float(images.double().mean())) < 4 * S / 20480**0.5


def samples(level: Level) -> torch.Tensor:
    path = BrownianPath(range(3), (3, 4, 4))
    return sample(SingleLevel(level), step_rule("sde/ddpm"), process().grid(5), path)[0]


def test_defaults_of_torch_do_not_change_the_samples() -> None:
    level = Level("net", nonlinear_denoise, 1.0)
    expected = samples(level)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(samples(level), expected) and expected.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):  # a stand-in for torch.set_default_device("cuda")
        assert torch.equal(samples(level), expected)


@pytest.mark.parametrize(("denoise", "sentence"), [
    (lambda x, logsnr: x.mul_(0.5), "net writes into its input"),
    (lambda x, logsnr: x[:, :1], r"net returned the shape \[3, 1, 4, 4\] for images of \[3, 3, 4, 4\]"),
])  # fmt: skip
def test_a_level_that_breaks_the_sampler_is_one_sentence(denoise, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        samples(Level("net", denoise, 1.0))
