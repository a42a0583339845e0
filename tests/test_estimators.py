"""Estimators: weights (test_plans.py enumerates those of coins), expected and realised cost."""

import numpy as np
import pytest
import torch
from toys import SHAPE, probabilities, process, toy_family

from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import Level, base_of
from mlem_diffusion.diffusion.sampler import Estimator, SingleLevel, Stitched, WeightTable, sample
from mlem_diffusion.diffusion.step_rules import STEP_RULES
from mlem_diffusion.errors import UserError
from mlem_diffusion.multilevel.estimators import COINS, Multilevel, Quadrature
from mlem_diffusion.multilevel.plan import Plan
from mlem_diffusion.multilevel.timing import work_of

FLOPS, FAMILY, SMALL = [1.0, 4.0, 16.0], toy_family(), (1, 1, 1)
DDPM, DDIM = STEP_RULES["sde/ddpm"], STEP_RULES["ode/ddim"]


def weights_of(n: int) -> np.ndarray:
    """Weights W [n, 3] of the differences: mostly zero, some above one, one negative, and a tail of ones."""
    weights = np.zeros((n, 3))
    weights[:, 0] = 1
    weights[1::4, 1], weights[2::5, 2], weights[4, 1] = 3.7, 5.2, -0.4
    weights[n - 2 :] = 1
    return weights


def normal(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("coins", COINS)
@pytest.mark.parametrize("p", [np.array([1.0, 0.3, 0.3]), np.array([1.0, 1.0, 0.3]), probabilities(12)])
def test_mean_realised_cost_is_the_expected_cost(p: np.ndarray, coins: str) -> None:
    """Evaluations per level agree within 4 standard errors over 1000 samples; equal neighbours cancel sometimes."""
    calls: list[int] = []
    family = [Level(level.name, lambda x, u: calls.append(len(x)) or 0 * x, level.flops) for level in FAMILY]
    estimator, path = Multilevel(family, p, coins), BrownianPath(range(1000), SMALL)
    _, ledger = sample(estimator, DDIM, process().grid(12), path)
    counts = (estimator.weights(12, path.seeds) != 0).sum(axis=0)
    assert np.array_equal(ledger.per_sample, counts) and counts.sum() == sum(calls)  # image by image, what ran
    error = counts.std(axis=0) / len(path.seeds) ** 0.5
    assert np.all(np.abs(counts.mean(axis=0) - estimator.expected_evaluations(12)) <= 4 * error + 1e-12)
    assert ledger.flops_per_image == pytest.approx((counts @ FLOPS).mean(), rel=1e-12)
    assert 0 < (counts @ FLOPS).std() / 1000**0.5 < 0.03 * estimator.expected_flops(12)


def test_single_level_and_stitched_costs_are_exact() -> None:
    small, middle, large = FAMILY
    path, grid = BrownianPath([1, 2, 3], SHAPE), process().grid(10)
    for estimator, evaluations in (
        (SingleLevel(large), [30]),
        (Stitched([small, large], [0.0]), [0, 30]),
        (Stitched([small, large], [0.3]), [9, 21]),
        (Stitched([large, small], [0.3]), [21, 9]),  # the large level first
        (Stitched([middle, small, large], [0.2, 0.9]), [21, 6, 3]),
        (Stitched([small, large], [1.0]), [30, 0]),
    ):
        _, ledger = sample(estimator, DDPM, grid, path)
        assert ledger.evaluations == evaluations
        assert ledger.flops_per_image == estimator.expected_flops(10)
    three = Stitched([large, small, middle], [0.25, 0.5]).weights(8, [1])[:, 0]
    assert np.array_equal(three, [[0, 0, 1]] * 2 + [[1, 0, 0]] * 2 + [[0, 1, 0]] * 4)


def test_a_base_that_levels_share_runs_once_per_estimate_and_counts_once() -> None:
    """The estimates equal those of levels that evaluate it themselves, and cost less; the plans' costs agree."""
    calls: list[int] = []

    def linear(x: torch.Tensor, logsnr: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return 0.3 * x

    base = Level("base", linear, 0.5)

    def level(k: int, based: bool) -> Level:
        def denoise(x: torch.Tensor, logsnr: torch.Tensor, common: torch.Tensor | None = None) -> torch.Tensor:
            return (linear(x, logsnr) if common is None else common) + (x * k).sin() / 4

        return Level(f"w{k}", denoise, FLOPS[k], base if based else None)

    path, grid, p = BrownianPath(range(40), SHAPE), process().grid(12), np.array([1.0, 0.5, 0.2])
    shared, apart = ([base, level(1, based), level(2, based)] for based in (True, False))
    for make in (
        lambda family: SingleLevel(family[2]), lambda family: Stitched([family[2], family[0]], [0.4]),
        lambda family: Multilevel(family, p), lambda family: Multilevel(family[1:], p[[0, 2]], "systematic"),
        lambda family: Quadrature(family, weights_of(12)),
    ):  # fmt: skip
        estimator = make(shared)
        calls.clear()
        images, ledger = sample(estimator, DDPM, grid, path)
        assert calls == [40] * 12  # not even where its own weight is zero
        assert torch.allclose(images, sample(make(apart), DDPM, grid, path)[0], atol=1e-6)
        own = np.array([{"base": 0.0}.get(v.name, v.flops - 0.5) for v in estimator.levels])
        assert ledger.flops_per_image == pytest.approx(12 * 0.5 + float((ledger.per_sample @ own).mean()))
        expected = estimator.expected_evaluations(12) @ own + 12 * 0.5
        assert estimator.expected_flops(12) == pytest.approx(float(expected))
        work = work_of([estimator.weights(12, path.seeds)], estimator.levels, DDPM, 40, [0.0] * 12)
        assert work["base"] == 12 and "few base" not in work
    plan = Plan("independent", "optimal", ("base", "w1", "w2"), 12, np.tile(p, (12, 1)), 0.0, None, None)
    assert plan.build(shared).expected_flops(12) == pytest.approx(12 * (0.5 + 3.5 * 0.6 + 15.5 * 0.2))
    with pytest.raises(UserError, match="Levels can share one base, not base, w1"):
        base_of([shared[1], Level("w3", linear, 9.0, shared[1])])


@pytest.mark.parametrize("estimator", [
    SingleLevel(FAMILY[1]),
    Stitched([FAMILY[1], FAMILY[0], FAMILY[2]], [0.3, 0.5]),
    Multilevel(FAMILY, np.array([1.0, 0.5, 0.3])),
    Multilevel(FAMILY, probabilities(12), "systematic"),
    Multilevel(FAMILY, probabilities(12), "nested"),
    Quadrature(FAMILY, weights_of(12)),
], ids=lambda d: type(d).__name__)  # fmt: skip
def test_an_estimator_gives_the_weighted_estimates_and_records_them(estimator: Estimator) -> None:
    x, weights = normal(3), estimator.weights(12, [7, 8, 9])
    estimate = WeightTable(estimator.levels, weights)
    for j, logsnr in enumerate(np.linspace(-5, 5, 12)):
        found = estimate(j, x, float(logsnr))
        terms = [level.denoise(x, torch.tensor(float(logsnr))) for level in estimator.levels]
        expected = sum(torch.tensor(weights[j, :, k])[:, None, None, None] * term for k, term in enumerate(terms))
        assert torch.allclose(found.double(), torch.as_tensor(expected), atol=1e-5)
        assert np.array_equal(estimate.evaluations, (weights[: j + 1] != 0).sum(axis=0))


def test_special_quadratures_equal_other_estimators() -> None:
    def images(estimator: Estimator) -> torch.Tensor:
        return sample(estimator, DDPM, process().grid(8), BrownianPath([1, 2, 3], SHAPE))[0]

    assert torch.equal(images(Quadrature(FAMILY, np.ones((8, 3)))), images(SingleLevel(FAMILY[2])))
    assert torch.equal(images(Quadrature(FAMILY, np.tile([1.0, 0, 0], (8, 1)))), images(SingleLevel(FAMILY[0])))
    assert torch.equal(images(Multilevel(FAMILY[:1], np.ones(1))), images(SingleLevel(FAMILY[0])))
    ends = FAMILY[::2]
    for order, weights in ((ends, np.arange(8) >= 2), (ends[::-1], np.arange(8) < 2)):
        tail = Quadrature(ends, np.stack([np.ones(8), weights], axis=1))
        assert torch.equal(images(tail), images(Stitched(order, [0.25])))


@pytest.mark.parametrize("make", [
    *(lambda p=p: Multilevel(FAMILY, np.array(p)) for p in (
        [1.0, 0.5], [0.9, 0.5, 0.2], [1.0, 0.0, 0.2], [1.0, 1.1, 0.2], [1.0, float("nan"), 0.2])),
    lambda: Multilevel(FAMILY[::-1], np.ones(3)),
    lambda: Multilevel((FAMILY[0], FAMILY[0]), np.ones(2)),
    lambda: Multilevel((), np.ones(0)),
    lambda: Multilevel(FAMILY, probabilities(12)).expected_evaluations(10),
    lambda: Multilevel(FAMILY, np.ones(3), "stratified").weights(10, [0]),
    *(lambda switches=s: Stitched(FAMILY, switches) for s in ([0.5, 1.5], [0.5, 0.2], [0.5], [0.1, float("nan")])),
    lambda: Stitched([FAMILY[0], Level("w0", FAMILY[1].denoise, 9.0)], [0.5]),
    lambda: Stitched([FAMILY[0], Level("b", FAMILY[1].denoise, float("nan"))], [0.5]),
    *(lambda bad=bad: Quadrature(FAMILY, bad) for bad in (
        weights_of(12)[:, :2], weights_of(12) * [1, 1, np.nan], 2 * weights_of(12))),
    lambda: Quadrature(FAMILY, weights_of(12)).expected_evaluations(10),
])  # fmt: skip
def test_bad_estimators_are_refused(make) -> None:
    with pytest.raises(UserError):
        make()


def test_levels_may_reuse_their_output_buffer_and_share_one_noise_level() -> None:
    """An estimate must not change when a level is called again, as in networks replayed from a CUDA graph."""
    buffer, seen = torch.empty(4, *SHAPE), []
    level = Level("replayed", lambda x, u: seen.append(u.ndim) or torch.mul(x, u, out=buffer[: len(x)]), 1.0)
    estimate = WeightTable([level], np.ones((2, 4, 1)))
    first, second = estimate(0, torch.ones(4, *SHAPE), 0.5), estimate(1, torch.ones(4, *SHAPE), -2.0)
    assert torch.all(first == 0.5) and torch.all(second == -2.0) and seen == [0, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_loop_never_waits_for_the_device() -> None:
    estimate = WeightTable(FAMILY, Multilevel(FAMILY, np.array([1.0, 0.5, 0.2])).weights(12, range(16)))
    x = torch.randn(16, *SHAPE, device="cuda")
    estimate(0, x, 0.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for j in range(1, 12):
            estimate(j, x, 0.1 * j)
    finally:
        torch.cuda.set_sync_debug_mode("default")
