"""Drifts: weights, one multilevel step against the top level's, expected and realised cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import SHAPE, process, toy_family

from mlem_diffusion.cost import Ledger
from mlem_diffusion.drift import Drift, Multilevel, SingleLevel, Stitched, weighted_estimate
from mlem_diffusion.errors import UserError
from mlem_diffusion.levels import Level
from mlem_diffusion.probabilities import COINS
from mlem_diffusion.samplers import sample
from mlem_diffusion.step_rules import STEP_RULES

FLOPS = [1.0, 4.0, 16.0]


def test_one_multilevel_step_is_unbiased_with_the_stated_variance() -> None:
    """8000 coin draws of one ancestral step from one x: mean within 4.5 standard errors of the top level's at each of 48
    pixels, variance sum_k (1/p_k - 1) |f^k - f^(k-1)|^2 of the estimate within 5%."""
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
    """Over 1500 samples, within 4 standard errors; equal neighbouring probabilities cancel now and then."""
    drift, grid, seeds = Multilevel(toy_family(), p, coins), process().grid(12), range(1500)
    _, ledger = sample(drift, grid, "ode", "ddim", seeds, (1, 1, 1))
    counts = (drift.weights(12, seeds) != 0).sum(axis=0)
    assert np.array_equal(ledger.per_sample, counts)  # the ledger counts what ran, image by image
    per_sample = counts @ np.array(FLOPS)
    assert ledger.flops_per_image == pytest.approx(per_sample.mean(), rel=1e-12)
    error = per_sample.std() / len(seeds) ** 0.5
    assert error > 0
    assert abs(ledger.flops_per_image - drift.expected_flops(12)) < 4 * error
    assert error < 0.02 * drift.expected_flops(12)


def test_cancelled_levels_are_not_evaluated() -> None:
    """p_2 = p_3: level 2 runs only when exactly one of the two coins fires."""
    drift, grid = Multilevel(toy_family(), np.array([1.0, 0.5, 0.5])), process().grid(20)
    assert drift.expected_flops(20) == pytest.approx(20 * (1.0 + 0.5 * 4 + 0.5 * 16))
    calls: list[int] = []

    def counted(x: torch.Tensor, logsnr: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return 0 * x

    family = tuple(Level(level.name, counted, level.flops) for level in toy_family())
    _, ledger = sample(Multilevel(family, drift.p), grid, "ode", "ddim", range(50), (1, 1, 1))
    assert (sum(calls), len(calls)) == (sum(ledger.evaluations), sum(ledger.launches))


def test_single_level_and_stitched_costs_are_exact() -> None:
    small, _, large = toy_family()
    grid = process().grid(10)
    for drift, evaluations in (
        (SingleLevel(large), [30]),
        (Stitched(small, large, 0.0), [0, 30]),
        (Stitched(small, large, 0.3), [9, 21]),
        (Stitched(small, large, 1.0), [30, 0]),
    ):
        _, ledger = sample(drift, grid, "sde", "ddpm", [1, 2, 3], SHAPE)
        assert ledger.evaluations == evaluations
        assert ledger.launches == [n // 3 for n in evaluations]
        assert ledger.flops_per_image == drift.expected_flops(10)
        assert ledger.calls_per_image == 10


def test_stitched_is_small_at_high_noise_and_large_after() -> None:
    small, _, large = toy_family()
    grid = process().grid(8)
    weights = Stitched(small, large, 0.25).weights(8, [0, 1])
    assert np.array_equal(weights[:, 0], [[1, 0]] * 2 + [[0, 1]] * 6)
    alone, _ = sample(SingleLevel(large), grid, "ode", "ddim", [0, 1], SHAPE)
    assert torch.equal(sample(Stitched(small, large, 0.0), grid, "ode", "ddim", [0, 1], SHAPE)[0], alone)


@pytest.mark.parametrize("drift", [
    SingleLevel(toy_family()[1]),
    Stitched(toy_family()[0], toy_family()[1], 0.5),
    Multilevel(toy_family(), np.array([1.0, 0.5, 0.3])),
    Multilevel(toy_family(), table(7), "systematic", shared=True),
], ids=lambda d: type(d).__name__)  # fmt: skip
def test_an_estimator_gives_the_weighted_estimates_and_records_them(drift: Drift) -> None:
    x, seeds = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)), [7, 8, 9]
    ledger = Ledger([level.flops for level in drift.levels], 3)
    weights, estimate = drift.weights(7, seeds), drift.estimator(7, seeds, ledger)
    for j, logsnr in enumerate(np.linspace(-5, 5, 7)):
        found = estimate(j, x, float(logsnr))
        terms = [level.denoise(x, torch.full((3,), float(logsnr))) for level in drift.levels]
        expected = sum(torch.tensor(weights[j, :, k])[:, None, None, None] * term for k, term in enumerate(terms))
        assert torch.allclose(found.double(), torch.as_tensor(expected), atol=1e-5)
        assert np.array_equal(ledger.per_sample, (weights[: j + 1] != 0).sum(axis=0))


@pytest.mark.parametrize("coins", COINS)
@pytest.mark.parametrize(("dynamics", "rule"), STEP_RULES)
def test_expected_cost_follows_the_evaluations_of_the_rule(dynamics: str, rule: str, coins: str) -> None:
    """Heun's two evaluations per step have coins of their own; over 400 samples, within 4.5 standard errors."""
    grid, p = process().grid(12), np.array([1.0, 0.4, 0.15])
    evaluations = len(STEP_RULES[dynamics, rule].program(grid))
    drift = Multilevel(toy_family(), p, coins)
    _, ledger = sample(drift, grid, dynamics, rule, range(400), (1, 1, 1))
    costs = ledger.per_sample @ np.array(FLOPS)
    assert abs(costs.mean() - drift.expected_flops(evaluations)) < 4.5 * costs.std() / 400**0.5
    assert np.all(ledger.per_sample[:, 0] == evaluations)


@pytest.mark.parametrize("coins", COINS)
def test_shared_coins_depend_on_the_batch_and_say_so(coins: str) -> None:
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


def test_bad_drifts_are_refused() -> None:
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
    drift: Drift = Multilevel(family, table(12))
    with pytest.raises(UserError, match="12 evaluations"):
        drift.weights(10, [0])
    with pytest.raises(UserError, match="coins"):
        Multilevel(family, np.ones(3), "nested").weights(10, [0])
