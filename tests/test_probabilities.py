"""Coins and weights: unbiased at every step, with the expected cost, and evenly spread if systematic."""

from itertools import product

import numpy as np
import pytest

from mlem_diffusion.errors import UserError
from mlem_diffusion.multilevel.estimators import (
    COINS,
    constant_probabilities,
    draw_coins,
    evaluation_probabilities,
    measured_for_cost,
    measured_probabilities,
    telescope_weights,
)

TABLES = [
    np.array(p) for p in ([1.0, 0.4, 0.1], [1, 0.3, 0.3, 0.05], [1.0, 1, 0.5], [1.0, 1, 1], [1.0, 0.2, 0.7], [1.0])
]
NESTED = [*TABLES, np.array([1.0, 0.6, 0.6, 0.6, 0.1]), np.array([1.0, 1.0, 0.5, 0.5])]
FLOPS, SQUARES = np.array([1.0, 4.0, 16.0, 64.0]), np.array([9.0, 0.4, 0.02, 0.01])


def outcomes(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All coin outcomes [2^K, K] and their probabilities for independent coins."""
    coins = np.array(list(product([False, True], repeat=len(p))))
    return coins, np.where(coins, p, 1 - p).prod(axis=1)


def nested_outcomes(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All coin outcomes of one uniform number and their probabilities."""
    edges = np.unique([0.0, *p, 1.0])
    middle = 0.5 * (edges[1:] + edges[:-1])
    return p > middle[:, None], np.diff(edges)


@pytest.mark.parametrize("p", TABLES)
def test_independent_coins_by_enumeration(p: np.ndarray) -> None:
    """The weights are the telescope sum_k (B_k/p_k) (f^k - f^(k-1)) for every outcome, and unbiased for the top level.
    The variance is sum_k (1/p_k - 1) |f^k - f^(k-1)|^2, and networks run with the stated probabilities."""
    f = np.random.default_rng(0).standard_normal(len(p))
    coins, chance = outcomes(p)
    weights = telescope_weights(p[None], coins[None])[0]
    np.testing.assert_allclose(weights @ f, (coins / p) @ np.diff(f, prepend=0.0), atol=1e-12)
    np.testing.assert_allclose(chance @ weights, np.eye(len(p))[-1], atol=1e-12)
    variance = chance @ (weights @ f - f[-1]) ** 2
    assert variance == pytest.approx(((1 / p - 1) * np.diff(f, prepend=0.0) ** 2).sum(), abs=1e-12)
    np.testing.assert_allclose(evaluation_probabilities(p[None])[0], chance @ (weights != 0), atol=1e-12)


@pytest.mark.parametrize("p", NESTED)
def test_nested_coins_by_enumeration(p: np.ndarray) -> None:
    """Unbiased, with the stated evaluations; for decreasing p the variance is that of differences to the top."""
    f = np.random.default_rng(1).standard_normal(len(p))
    coins, chance = nested_outcomes(p)
    weights = telescope_weights(p[None], coins[None])[0]
    np.testing.assert_allclose(chance @ weights, np.eye(len(p))[-1], atol=1e-12)
    np.testing.assert_allclose(evaluation_probabilities(p[None], nested=True)[0], chance @ (weights != 0), atol=1e-12)
    if np.all(np.diff(p) <= 0):
        variance = chance @ (weights @ f - f[-1]) ** 2
        assert variance == pytest.approx((np.diff(1 / p) * (f[-1] - f[:-1]) ** 2).sum(), abs=1e-12)


def time_dependent(n: int) -> np.ndarray:
    t = np.linspace(0, 1, n)
    return np.stack([np.ones(n), 0.2 + 0.7 * t, 0.6 * np.exp(-3 * t)], axis=1)


@pytest.mark.parametrize("kind", COINS)
def test_coins_fire_with_their_probability_at_every_step(kind: str) -> None:
    """Frequencies over 4000 seeds within 4.5 standard errors (24 steps, 2 levels), alone and in pairs of levels."""
    p, seeds = time_dependent(24), range(4000)
    coins = draw_coins(p, seeds, kind)
    z = (coins.mean(axis=1) - p)[:, 1:] / np.sqrt(p * (1 - p) / len(seeds))[:, 1:]
    assert np.all(coins[:, :, 0]) and np.abs(z).max() < 4.5
    more = draw_coins(np.column_stack([p, np.full(24, 0.1)]), seeds[:9], kind)
    assert np.array_equal(more[..., :-1], coins[:, :9])  # another level leaves the coins of those below alone
    assert 0.5 < z.std() < 1.5  # and they do fluctuate
    pair = (coins[:, :, 1] & coins[:, :, 2]).mean(axis=1)
    chance = np.minimum(p[:, 1], p[:, 2]) if kind == "nested" else p[:, 1] * p[:, 2]
    assert np.abs((pair - chance) / np.sqrt(chance * (1 - chance) / len(seeds))).max() < 4.5
    if kind != "systematic":
        even = draw_coins(np.full((2, 2), [1.0, 0.3]), seeds, kind)[:, :, 1].astype(float)
        assert abs(np.corrcoef(even)[0, 1]) < 4.5 / np.sqrt(len(seeds))
    if kind == "nested":
        ordered = draw_coins(np.full((50, 4), [1.0, 0.7, 0.4, 0.1]), range(20), kind)
        assert np.all(ordered[:, :, 1:] <= ordered[:, :, :-1])


@pytest.mark.parametrize("p", [np.full((50, 2), [1.0, 0.13]), time_dependent(37), np.full((40, 2), [1.0, 0.25])])
def test_systematic_fires_are_the_sum_of_p_rounded_and_evenly_spread(p: np.ndarray) -> None:
    coins = draw_coins(p, range(200), "systematic")
    for k in range(p.shape[1]):
        fires, total = coins[:, :, k].sum(axis=0), p[:, k].sum()
        # to 1e-9, because integer sums have rounding errors
        assert np.all((fires == np.floor(total + 1e-9)) | (fires == np.ceil(total - 1e-9)))
        # every range of steps has its share to within one fire
        running = np.cumsum(p[:, k])[:, None] - np.cumsum(coins[:, :, k], axis=0)
        assert np.ptp(running, axis=0).max() < 1 + 1e-9
    p = np.full((30, 2), [1.0, 0.37])
    p[::4, 1] = 1
    assert np.all(draw_coins(p, range(200), "systematic")[::4, :, 1])


def test_constant_and_measured_probabilities_are_the_square_root_law() -> None:
    """Error T^(-1/gamma) and cost T give sqrt(V/T) = T^-(1/2 + 1/gamma): a factor 0.287 per fourfold cost for 2.5."""
    for gamma, ratio in ((2.5, 0.287), (5.0, 0.379)):
        p = constant_probabilities([3.0, 12.0, 48.0, 192.0], gamma, 0.9)
        assert p[0] == 1 and p[1] == pytest.approx(0.9 * ratio, rel=2e-3)
        np.testing.assert_allclose(p[2:] / p[1:-1], ratio, rtol=2e-3)
    p = measured_probabilities(SQUARES, FLOPS, 0.3)
    assert p[:2] == pytest.approx([1.0, 0.3]) and p[2] / p[1] == pytest.approx(np.sqrt(0.02 / 16) / np.sqrt(0.4 / 4))
    # for a power law V = T^(-2/gamma), these are the probabilities that assume the law, up to c
    law, assumed = measured_probabilities(FLOPS**-0.8, FLOPS, 0.2), constant_probabilities(FLOPS, 2.5, 0.2)
    np.testing.assert_allclose(law[1:] / law[1], assumed[1:] / assumed[1])
    for of in (lambda c: constant_probabilities(FLOPS, 2.5, c), lambda c: measured_probabilities(SQUARES, FLOPS, c)):
        assert np.array_equal(of(1e9), np.ones(4))


@pytest.mark.parametrize(("wanted", "steps"), [(3.0, 2), (60.0, 2), (900.0, 100), (6000.0, 100)])
def test_c_is_found_for_a_cost(wanted: float, steps: int) -> None:
    p = measured_for_cost(SQUARES, FLOPS, steps, wanted)
    assert p is not None and p[0] == 1 and np.any(p < 1)
    assert float(evaluation_probabilities(p[None])[0] @ FLOPS) * steps == pytest.approx(wanted, rel=1e-9)
    for impossible in (0.99 * steps, 86.0 * steps):  # below the cost of level 1 alone; above that of all levels
        assert measured_for_cost(SQUARES, FLOPS, steps, impossible) is None


@pytest.mark.parametrize("arguments", [
    ([1, 4], 0.0, 1.0), ([1, 4], 2.5, -1.0), ([1, 4], float("nan"), 1.0), ([4, 1], 2.5, 1.0), ([0, 1], 2.5, 1.0),
    ([], 2.5, 1.0),
])  # fmt: skip
def test_bad_arguments_are_refused(arguments: tuple) -> None:
    with pytest.raises(UserError):
        constant_probabilities(*arguments)
    for squares, c in (([1.0, 0.0], 1.0), ([1.0, float("nan")], 1.0), ([1.0, 0.1], 0.0)):
        with pytest.raises(UserError, match="Measured probabilities"):
            measured_probabilities(np.array(squares), np.array([1.0, 4.0]), c)
    with pytest.raises(UserError, match="coins"):
        draw_coins(np.ones((2, 2)), [0], "stratified")
