"""Estimators: weights, one multilevel step against the top level's, expected and realised cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import SHAPE, process, toy_family

from mlem_diffusion.diffusion.estimator import Estimator, SingleLevel, Stitched, weighted_estimate
from mlem_diffusion.diffusion.ledger import Ledger
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.sampler import sample
from mlem_diffusion.diffusion.step_rules import STEP_RULES
from mlem_diffusion.errors import UserError
from mlem_diffusion.multilevel.estimators import Multilevel, Quadrature
from mlem_diffusion.multilevel.probabilities import COINS

FLOPS = [1.0, 4.0, 16.0]


def test_one_multilevel_step_is_unbiased_with_the_stated_variance() -> None:
    """8000 coin draws of one ancestral step from one x have the stated mean and variance.

    The mean is within 4.5 standard errors of the top level's step at each of 48 pixels. The estimate's variance is
    within 5% of sum_k (1/p_k - 1) |f^k - f^(k-1)|^2.
    """
    family, p, draws = toy_family(), np.array([1.0, 0.4, 0.2]), 8000
    step = STEP_RULES["sde", "ddpm"].program(process().grid(8))[4]
    keep, take, _ = step.update[0]
    one = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    x = one.expand(draws, *SHAPE).contiguous()
    weights = Multilevel(family, p).weights(8, range(draws))[4]
    estimate = weighted_estimate(family, weights, x, step.logsnr, Ledger(FLOPS, draws)).double()

    f = [level.denoise(one, torch.tensor([step.logsnr])).double() for level in family]
    stepped = keep * x.double() + take * estimate
    top = (keep * one.double() + take * f[-1])[0]
    z = (stepped.mean(0) - top) / (stepped.std(0) / draws**0.5)
    assert z.abs().max() < 4.5
    assert estimate.std(0).min() > 0

    predicted = sum((1 / p[k] - 1) * (f[k] - f[k - 1])[0].square().sum() for k in (1, 2))
    measured = (estimate - f[-1]).square().flatten(1).sum(1).mean()
    assert float(measured) == pytest.approx(float(predicted), rel=0.05)


def table(n: int) -> np.ndarray:
    t = np.linspace(0, 1, n)
    return np.stack([np.ones(n), 0.5 - 0.3 * t, 0.1 + 0.3 * t**2], axis=1)


@pytest.mark.parametrize("coins", COINS)
@pytest.mark.parametrize(
    "p", [np.array([1.0, 0.4, 0.1]), np.array([1.0, 0.3, 0.3]), np.array([1.0, 1.0, 0.3]), table(12)]
)
def test_mean_realised_cost_is_the_expected_cost(p: np.ndarray, coins: str) -> None:
    """They agree within 4 standard errors over 1500 samples; equal neighbouring probabilities cancel sometimes."""
    estimator, grid, seeds = Multilevel(toy_family(), p, coins), process().grid(12), range(1500)
    _, ledger = sample(estimator, grid, "ode", "ddim", seeds, (1, 1, 1))
    counts = (estimator.weights(12, seeds) != 0).sum(axis=0)
    assert np.array_equal(ledger.per_sample, counts)  # the ledger counts what ran, image by image
    per_sample = counts @ np.array(FLOPS)
    assert ledger.flops_per_image == pytest.approx(per_sample.mean(), rel=1e-12)
    error = per_sample.std() / len(seeds) ** 0.5
    assert error > 0
    assert abs(ledger.flops_per_image - estimator.expected_flops(12)) < 4 * error
    assert error < 0.02 * estimator.expected_flops(12)


def test_cancelled_levels_are_not_evaluated() -> None:
    """p_2 = p_3: level 2 runs only when exactly one of the two coins fires."""
    estimator, grid = Multilevel(toy_family(), np.array([1.0, 0.5, 0.5])), process().grid(20)
    assert estimator.expected_flops(20) == pytest.approx(20 * (1.0 + 0.5 * 4 + 0.5 * 16))
    calls: list[int] = []

    def counted(x: torch.Tensor, logsnr: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return 0 * x

    family = tuple(Level(level.name, counted, level.flops) for level in toy_family())
    _, ledger = sample(Multilevel(family, estimator.p), grid, "ode", "ddim", range(50), (1, 1, 1))
    assert (sum(calls), len(calls)) == (sum(ledger.evaluations), sum(ledger.launches))


def test_single_level_and_stitched_costs_are_exact() -> None:
    small, _, large = toy_family()
    grid = process().grid(10)
    for estimator, evaluations in (
        (SingleLevel(large), [30]),
        (Stitched(small, large, 0.0), [0, 30]),
        (Stitched(small, large, 0.3), [9, 21]),
        (Stitched(small, large, 1.0), [30, 0]),
    ):
        _, ledger = sample(estimator, grid, "sde", "ddpm", [1, 2, 3], SHAPE)
        assert ledger.evaluations == evaluations
        assert ledger.launches == [n // 3 for n in evaluations]
        assert ledger.flops_per_image == estimator.expected_flops(10)
        assert ledger.calls_per_image == 10


def test_stitched_is_small_at_high_noise_and_large_after() -> None:
    small, _, large = toy_family()
    grid = process().grid(8)
    weights = Stitched(small, large, 0.25).weights(8, [0, 1])
    assert np.array_equal(weights[:, 0], [[1, 0]] * 2 + [[0, 1]] * 6)
    alone, _ = sample(SingleLevel(large), grid, "ode", "ddim", [0, 1], SHAPE)
    assert torch.equal(sample(Stitched(small, large, 0.0), grid, "ode", "ddim", [0, 1], SHAPE)[0], alone)


@pytest.mark.parametrize("estimator", [
    SingleLevel(toy_family()[1]),
    Stitched(toy_family()[0], toy_family()[1], 0.5),
    Multilevel(toy_family(), np.array([1.0, 0.5, 0.3])),
    Multilevel(toy_family(), table(7), "systematic", shared=True),
    Multilevel(toy_family(), table(7), "nested"),
    Quadrature(toy_family(), np.tile([1.0, 2.5, 0.0], (7, 1))),
], ids=lambda d: type(d).__name__)  # fmt: skip
def test_an_estimator_gives_the_weighted_estimates_and_records_them(estimator: Estimator) -> None:
    x, seeds = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)), [7, 8, 9]
    ledger = Ledger([level.flops for level in estimator.levels], 3)
    weights, estimate = estimator.weights(7, seeds), estimator.weight_table(7, seeds, ledger)
    for j, logsnr in enumerate(np.linspace(-5, 5, 7)):
        found = estimate(j, x, float(logsnr))
        terms = [level.denoise(x, torch.full((3,), float(logsnr))) for level in estimator.levels]
        expected = sum(torch.tensor(weights[j, :, k])[:, None, None, None] * term for k, term in enumerate(terms))
        assert torch.allclose(found.double(), torch.as_tensor(expected), atol=1e-5)
        assert np.array_equal(ledger.per_sample, (weights[: j + 1] != 0).sum(axis=0))


@pytest.mark.parametrize("coins", COINS)
@pytest.mark.parametrize(("dynamics", "rule"), STEP_RULES)
def test_expected_cost_follows_the_evaluations_of_the_rule(dynamics: str, rule: str, coins: str) -> None:
    """Heun's two evaluations per step have separate coins; agreement within 4.5 standard errors over 400 samples."""
    grid, p = process().grid(12), np.array([1.0, 0.4, 0.15])
    evaluations = len(STEP_RULES[dynamics, rule].program(grid))
    estimator = Multilevel(toy_family(), p, coins)
    _, ledger = sample(estimator, grid, dynamics, rule, range(400), (1, 1, 1))
    costs = ledger.per_sample @ np.array(FLOPS)
    assert abs(costs.mean() - estimator.expected_flops(evaluations)) < 4.5 * costs.std() / 400**0.5
    assert np.all(ledger.per_sample[:, 0] == evaluations)


@pytest.mark.parametrize("coins", COINS)
def test_shared_coins_depend_on_the_batch_and_form_one_cluster(coins: str) -> None:
    grid, p = process().grid(16), np.array([1.0, 0.5, 0.3])
    shared, own = (Multilevel(toy_family(), p, coins, shared) for shared in (True, False))
    weights = shared.weights(16, [4, 5, 6])
    assert np.array_equal(weights, np.repeat(weights[:, :1], 3, axis=1))
    assert np.array_equal(weights[:, :1], own.weights(16, [4]))
    assert not np.array_equal(shared.weights(16, [5, 6])[:, 0], weights[:, 1])
    assert shared.clusters([4, 5, 6]) == [4, 4, 4]
    assert own.clusters([4, 5, 6]) == [4, 5, 6]
    assert shared.expected_flops(16) == own.expected_flops(16)
    _, ledger = sample(shared, grid, "ode", "ddim", [4, 5, 6], SHAPE)
    assert ledger.evaluations == [3 * n for n in ledger.launches]  # whole batches


def test_bad_estimators_are_refused() -> None:
    family = toy_family()
    for p in ([1.0, 0.5], [0.9, 0.5, 0.2], [1.0, 0.0, 0.2], [1.0, 1.1, 0.2], [1.0, float("nan"), 0.2]):
        with pytest.raises(UserError):
            Multilevel(family, np.array(p))
    with pytest.raises(UserError):
        Multilevel(family[::-1], np.ones(3))
    with pytest.raises(UserError):
        Multilevel((family[0], family[0]), np.ones(2))
    with pytest.raises(UserError):
        Multilevel((), np.ones(0))
    for switch in (-0.1, 1.5):
        with pytest.raises(UserError):
            Stitched(family[0], family[1], switch)
    with pytest.raises(UserError):
        Stitched(family[1], family[0], 0.5)
    estimator: Estimator = Multilevel(family, table(12))
    with pytest.raises(UserError, match="12 evaluations"):
        estimator.weights(10, [0])
    with pytest.raises(UserError, match="coins"):
        Multilevel(family, np.ones(3), "stratified").weights(10, [0])
    good = weights_of(12)
    endless = np.where(good == good[1, 1], np.inf, good)
    bad = [good[:, :2], good[0], good * [np.nan, 1, 1], endless, good * [1, 1, np.nan], 2 * good]
    for weights in bad:
        with pytest.raises(UserError, match=r"weights|Quadrature"):
            Quadrature(family, weights)
    with pytest.raises(UserError):
        Quadrature(family[::-1], good)
    with pytest.raises(UserError, match="12 evaluations do not fit a run of 10"):
        Quadrature(family, good).expected_evaluations(10)


# ----------------------------------------------------------------------------------------------------- quadrature


def weights_of(n: int) -> np.ndarray:
    """Weights W [n, 3] of the differences: mostly zero, some above one, one negative, and a tail of ones."""
    weights = np.zeros((n, 3))
    weights[:, 0] = 1
    weights[1::4, 1], weights[2::5, 2], weights[4, 1] = 3.7, 5.2, -0.4
    weights[n - 2 :] = 1
    return weights


def test_a_quadrature_is_the_weighted_sum_of_differences() -> None:
    family, weights = toy_family(), weights_of(12)
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(2)).double()
    ledger = Ledger(FLOPS, 4)
    estimate = Quadrature(family, weights).weight_table(12, [3, 4, 5, 6], ledger)
    for j, logsnr in enumerate(np.linspace(-6, 6, 12)):
        f = [level.denoise(x, torch.full((4,), float(logsnr))) for level in family]
        expected = f[0] + weights[j, 1] * (f[1] - f[0]) + weights[j, 2] * (f[2] - f[1])
        assert torch.allclose(estimate(j, x, float(logsnr)), expected, atol=1e-5)


def test_a_quadrature_costs_exactly_its_expected_cost() -> None:
    """Networks whose weights cancel do not run: at the tail of ones only the largest does."""
    estimator, grid = Quadrature(toy_family(), weights_of(12)), process().grid(12)
    for rule in (("sde", "ddpm"), ("ode", "dpmpp_2m")):
        _, ledger = sample(estimator, grid, *rule, range(5), (1, 1, 1))
        assert np.array_equal(ledger.per_sample, np.tile(estimator.expected_evaluations(12), (5, 1)))
        assert ledger.flops_per_image == estimator.expected_flops(12)
    assert estimator.expected_evaluations(12)[2] == 4  # evaluations 2 and 7, and the last two
    assert np.array_equal(estimator.weights(12, [0, 1])[-1], [[0, 0, 1], [0, 0, 1]])


def test_special_quadratures_equal_other_estimators() -> None:
    family, grid = toy_family(), process().grid(8)
    n = np.arange(8)

    def images(estimator: Estimator) -> torch.Tensor:
        return sample(estimator, grid, "sde", "ddpm", [1, 2, 3], SHAPE)[0]

    ones, none = np.ones((8, 3)), np.tile([1.0, 0, 0], (8, 1))
    assert torch.equal(images(Quadrature(family, ones)), images(SingleLevel(family[2])))
    assert torch.equal(images(Quadrature(family, none)), images(SingleLevel(family[0])))
    tail = np.stack([np.ones(8), n >= 2], axis=1)
    stitched = Stitched(family[0], family[2], 0.25)
    quadrature = Quadrature((family[0], family[2]), tail)
    assert torch.equal(images(quadrature), images(stitched))
    assert quadrature.expected_flops(8) == stitched.expected_flops(8)


def test_quadratures_ignore_seeds_and_batches() -> None:
    estimator, grid = Quadrature(toy_family(), weights_of(12)), process().grid(12)
    together = sample(estimator, grid, "sde", "ddpm", range(6), SHAPE)[0]
    apart = torch.cat([sample(estimator, grid, "sde", "ddpm", [s], SHAPE)[0] for s in range(6)])
    assert torch.allclose(together, apart, atol=1e-5)
    assert estimator.clusters([4, 5]) == [4, 5]


# ------------------------------------------------------------------------------------------ coins of planned tables


@pytest.mark.parametrize("coins", ["nested", "systematic"])
def test_coins_depend_on_the_sample_alone(coins: str) -> None:
    """A sample's images and evaluations do not depend on its batch, and no two samples share coins."""
    estimator, grid = Multilevel(toy_family(), table(16), coins), process().grid(16)
    images, ledger = sample(estimator, grid, "ode", "ddim", range(10, 22), SHAPE)
    for seeds in ([10, 11, 12, 13, 14], [21], [20, 15]):
        part, own = sample(estimator, grid, "ode", "ddim", seeds, SHAPE)
        rows = [s - 10 for s in seeds]
        assert torch.allclose(part, images[rows], atol=1e-5)
        assert np.array_equal(own.per_sample, ledger.per_sample[rows])
    weights = estimator.weights(16, range(400))
    fires = weights[:, :, 2] != 0
    # of 79800 pairs of samples: pairwise correlations of fires, pooled over steps, vanish to 4.5 standard errors
    centred = fires - table(16)[:, 2, None]
    pooled = centred.sum(axis=1) ** 2 - (centred**2).sum(axis=1)
    scale = table(16)[:, 2] * (1 - table(16)[:, 2]) * 400
    z = (pooled / scale).sum() / np.sqrt(2 * 16)
    assert abs(z) < 4.5 * (np.sqrt(16) if coins == "systematic" else 1)  # systematic ones depend over steps


@pytest.mark.parametrize(
    "p", [table(12), np.array([1.0, 0.5, 0.5]), np.array([1.0, 0.2, 0.7])], ids=["table", "equal", "rising"]
)
def test_nested_costs_are_exact_by_the_coins_of_many_seeds(p: np.ndarray) -> None:
    """Over 20000 seeds evaluations per level agree to 4 standard errors and 0.5%; equal probabilities always cancel."""
    estimator, seeds = Multilevel(toy_family(), p, "nested"), range(20000)
    counts = (estimator.weights(12, seeds) != 0).sum(axis=0)
    expected = estimator.expected_evaluations(12)
    error = counts.std(axis=0) / len(seeds) ** 0.5
    assert np.all(np.abs(counts.mean(axis=0) - expected) <= 4 * error + 1e-12)
    assert np.all(error <= 0.01 * np.maximum(expected, 0.5))
    if np.array_equal(p, [1.0, 0.5, 0.5]):
        assert expected == pytest.approx([12.0, 0.0, 6.0]) and not counts[:, 1].any()


def test_levels_may_reuse_their_output_buffer_and_share_one_noise_level() -> None:
    """An estimate must not change when a level is called again, as in networks replayed from a CUDA graph."""
    buffer, seen = torch.empty(4, *SHAPE), []

    def denoise(x: torch.Tensor, logsnr: torch.Tensor) -> torch.Tensor:
        seen.append((logsnr.shape, logsnr.stride()))
        return torch.mul(x, logsnr.view(-1, 1, 1, 1), out=buffer[: len(x)])

    level = Level("replayed", denoise, 1.0)
    estimate = SingleLevel(level).weight_table(2, range(4), Ledger([1.0], 4))
    x = torch.ones(4, *SHAPE)
    first = estimate(0, x, 0.5)
    second = estimate(1, x, -2.0)
    assert torch.all(first == 0.5) and torch.all(second == -2.0)
    assert seen == [((4,), (0,))] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_loop_never_waits_for_the_device() -> None:
    family = tuple(Level(v.name, v.denoise, v.flops) for v in toy_family())
    estimator = Multilevel(family, np.array([1.0, 0.5, 0.2]))
    estimate = estimator.weight_table(12, range(16), Ledger([v.flops for v in family], 16))
    x = torch.randn(16, *SHAPE, device="cuda")
    estimate(0, x, 0.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for j in range(1, 12):
            estimate(j, x, 0.1 * j)
    finally:
        torch.cuda.set_sync_debug_mode("default")
