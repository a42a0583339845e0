"""Coins and weights: unbiased at every step, with the expected cost, and evenly spread if systematic."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mlem_diffusion.errors import UserError
from mlem_diffusion.multilevel.probabilities import (
    COINS,
    constant_probabilities,
    draw_coins,
    evaluation_probabilities,
    measured_probabilities,
    probabilities_for_cost,
    telescope_weights,
)

TABLES = [
    np.array([1.0, 0.4, 0.1]),
    np.array([1.0, 0.3, 0.3, 0.05]),
    np.array([1.0, 1.0, 0.5]),
    np.array([1.0, 1.0, 1.0]),
    np.array([1.0, 0.2, 0.7]),  # not ordered
    np.array([1.0]),
]


def outcomes(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All coin outcomes [2^K, K] and their probabilities for independent coins."""
    coins = np.array(list(product([False, True], repeat=len(p))))
    return coins, np.where(coins, p, 1 - p).prod(axis=1)


@pytest.mark.parametrize("p", TABLES)
def test_weights_are_unbiased_for_the_top_level(p: np.ndarray) -> None:
    coins, chance = outcomes(p)
    weights = telescope_weights(p[None], coins[None])[0]
    np.testing.assert_allclose(chance @ weights, np.eye(len(p))[-1], atol=1e-12)


@pytest.mark.parametrize("p", TABLES)
def test_weights_are_the_telescope(p: np.ndarray) -> None:
    """sum_k w_k f^k = sum_k (B_k / p_k) (f^k - f^(k-1)) with f^0 = 0, for every outcome."""
    f = np.random.default_rng(0).standard_normal(len(p))
    coins, _ = outcomes(p)
    telescope = (coins / p) @ np.diff(f, prepend=0.0)
    np.testing.assert_allclose(telescope_weights(p[None], coins[None])[0] @ f, telescope, atol=1e-12)


@pytest.mark.parametrize("p", TABLES)
def test_variance_is_the_sum_over_levels(p: np.ndarray) -> None:
    """sum_k (1/p_k - 1) |f^k - f^(k-1)|^2, by enumeration."""
    f = np.random.default_rng(1).standard_normal(len(p))
    coins, chance = outcomes(p)
    estimate = telescope_weights(p[None], coins[None])[0] @ f
    variance = chance @ (estimate - f[-1]) ** 2
    assert variance == pytest.approx(((1 / p - 1) * np.diff(f, prepend=0.0) ** 2).sum(), abs=1e-12)


@pytest.mark.parametrize("p", TABLES)
def test_evaluation_probabilities_by_enumeration(p: np.ndarray) -> None:
    coins, chance = outcomes(p)
    runs = telescope_weights(p[None], coins[None])[0] != 0
    np.testing.assert_allclose(evaluation_probabilities(p[None])[0], chance @ runs, atol=1e-12)


def test_certain_coins_run_the_top_level_alone() -> None:
    p = np.ones((5, 4))
    for kind in COINS:
        weights = telescope_weights(p, draw_coins(p, [0, 1, 2], kind))
        assert np.array_equal(weights, np.broadcast_to([0.0, 0, 0, 1], (5, 3, 4)))
    assert np.array_equal(evaluation_probabilities(p), np.broadcast_to([0.0, 0, 0, 1], (5, 4)))


def time_dependent(n: int) -> np.ndarray:
    t = np.linspace(0, 1, n)
    return np.stack([np.ones(n), 0.2 + 0.7 * t, 0.6 * np.exp(-3 * t)], axis=1)


@pytest.mark.parametrize("kind", COINS)
def test_coins_fire_with_their_probability_at_every_step(kind: str) -> None:
    """Frequencies over 4000 seeds within 4.5 standard errors (24 steps, 2 levels)."""
    p, seeds = time_dependent(24), range(4000)
    coins = draw_coins(p, seeds, kind)
    frequency = coins.mean(axis=1)
    assert np.all(coins[:, :, 0])
    z = (frequency - p)[:, 1:] / np.sqrt(p * (1 - p) / len(seeds))[:, 1:]
    assert np.abs(z).max() < 4.5
    assert 0.5 < z.std() < 1.5  # and they do fluctuate
    # levels are independent: the covariance of two coins of a step vanishes; nested ones fire together where they can
    pair = (coins[:, :, 1] & coins[:, :, 2]).mean(axis=1)
    chance = np.minimum(p[:, 1], p[:, 2]) if kind == "nested" else p[:, 1] * p[:, 2]
    assert np.abs((pair - chance) / np.sqrt(chance * (1 - chance) / len(seeds))).max() < 4.5


@pytest.mark.parametrize("kind", ["independent", "nested"])
def test_coins_are_independent_over_steps(kind: str) -> None:
    coins = draw_coins(np.full((2, 2), [1.0, 0.3]), range(4000), kind)[:, :, 1].astype(float)
    assert abs(np.corrcoef(coins)[0, 1]) < 4.5 / np.sqrt(4000)


@pytest.mark.parametrize("p", [np.full((50, 2), [1.0, 0.13]), time_dependent(37), np.full((40, 2), [1.0, 0.25])])
def test_systematic_fires_are_the_sum_of_p_rounded(p: np.ndarray) -> None:
    coins = draw_coins(p, range(300), "systematic")
    for k in range(p.shape[1]):
        fires, total = coins[:, :, k].sum(axis=0), p[:, k].sum()
        # to 1e-9, because integer sums have rounding errors
        assert np.all((fires == np.floor(total + 1e-9)) | (fires == np.ceil(total - 1e-9)))
        # fires are evenly spread: every range of steps has its share to within one fire
        running = np.cumsum(p[:, k])[:, None] - np.cumsum(coins[:, :, k], axis=0)
        assert np.ptp(running, axis=0).max() < 1 + 1e-9


def test_systematic_coins_keep_certain_steps() -> None:
    p = np.full((30, 2), [1.0, 0.37])
    p[::4, 1] = 1
    assert np.all(draw_coins(p, range(500), "systematic")[::4, :, 1])


@pytest.mark.parametrize("kind", COINS)
def test_coins_of_a_level_ignore_the_other_levels_and_samples(kind: str) -> None:
    p = time_dependent(20)
    all_levels = draw_coins(p, [7, 8, 9], kind)
    assert np.array_equal(draw_coins(p[:, :2], [7, 8, 9], kind), all_levels[:, :, :2])
    assert np.array_equal(draw_coins(p, [8], kind), all_levels[:, 1:2])
    assert not np.array_equal(all_levels[:, 0], all_levels[:, 1])


def test_constant_probabilities_are_the_square_root_law() -> None:
    """Error T^(-1/gamma) and cost T give sqrt(V/T) = T^-(1/2 + 1/gamma).

    For gamma 2.5 and 5 that is a factor of 0.287 and 0.379 per fourfold cost.
    """
    flops = [3.0, 12.0, 48.0, 192.0]
    for gamma, ratio in ((2.5, 0.287), (5.0, 0.379)):
        p = constant_probabilities(flops, gamma, 0.9)
        assert p[0] == 1
        assert p[1] == pytest.approx(0.9 * ratio, rel=2e-3)
        np.testing.assert_allclose(p[2:] / p[1:-1], ratio, rtol=2e-3)
    assert np.array_equal(constant_probabilities(flops, 2.5, 1e6), np.ones(4))


def test_bad_arguments_are_refused() -> None:
    for flops, gamma, c in (
        ([1, 4], 0.0, 1.0),
        ([1, 4], 2.5, -1.0),
        ([1, 4], float("nan"), 1.0),
        ([4, 1], 2.5, 1.0),
        ([0, 1], 2.5, 1.0),
        ([], 2.5, 1.0),
    ):
        with pytest.raises(UserError):
            constant_probabilities(flops, gamma, c)
    with pytest.raises(UserError, match="coins"):
        draw_coins(np.ones((2, 2)), [0], "stratified")
    for squares in ([1.0, 0.0], [1.0, float("nan")], [1.0, -1.0]):
        with pytest.raises(UserError, match="Measured probabilities"):
            measured_probabilities(squares, [1.0, 4.0], 1.0)
    with pytest.raises(UserError, match="positive c"):
        measured_probabilities([1.0, 0.1], [1.0, 4.0], 0.0)


# -------------------------------------------------------------------------------------------------- nested coins

NESTED = [*TABLES, np.array([1.0, 0.6, 0.6, 0.6, 0.1]), np.array([1.0, 1.0, 0.5, 0.5])]


def nested_outcomes(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All coin outcomes of one uniform number and their probabilities."""
    edges = np.unique([0.0, *p, 1.0])
    middle = 0.5 * (edges[1:] + edges[:-1])
    return p > middle[:, None], np.diff(edges)


@pytest.mark.parametrize("p", NESTED)
def test_nested_evaluation_probabilities_by_enumeration(p: np.ndarray) -> None:
    coins, chance = nested_outcomes(p)
    weights = telescope_weights(p[None], coins[None])[0]
    np.testing.assert_allclose(chance @ weights, np.eye(len(p))[-1], atol=1e-12)  # unbiased
    np.testing.assert_allclose(evaluation_probabilities(p[None], nested=True)[0], chance @ (weights != 0), atol=1e-12)


@pytest.mark.parametrize("p", [np.array([1.0, 0.4, 0.1]), np.array([1.0, 0.3, 0.3, 0.05]), np.array([1.0, 1.0, 0.5])])
def test_nested_variance_is_that_of_differences_to_the_top(p: np.ndarray) -> None:
    """sum_{k>1} (1/p_k - 1/p_{k-1}) |f^K - f^{k-1}|^2 for decreasing p."""
    f = np.random.default_rng(1).standard_normal(len(p))
    coins, chance = nested_outcomes(p)
    variance = chance @ (telescope_weights(p[None], coins[None])[0] @ f - f[-1]) ** 2
    assert variance == pytest.approx((np.diff(1 / p) * (f[-1] - f[:-1]) ** 2).sum(), abs=1e-12)


def test_nested_coins_fire_only_where_those_below_do() -> None:
    p = np.full((200, 4), [1.0, 0.7, 0.4, 0.1])
    coins = draw_coins(p, range(20), "nested")
    assert np.all(coins[:, :, 1:] <= coins[:, :, :-1])
    assert set(coins.sum(axis=2).ravel()) == {1, 2, 3, 4}
    assert not np.all(draw_coins(p, range(20), "independent")[:, :, 1:] <= coins[:, :, :-1])


# ------------------------------------------------------------------------------------------ measured probabilities


def test_measured_probabilities_follow_the_square_root_law_of_the_measurements() -> None:
    flops, squares = [1.0, 4.0, 16.0, 64.0], np.array([9.0, 0.4, 0.02, 0.01])
    p = measured_probabilities(squares, flops, 0.3)
    assert p[:2] == pytest.approx([1.0, 0.3])
    assert p[2] / p[1] == pytest.approx(np.sqrt(0.02 / 16) / np.sqrt(0.4 / 4))
    assert p[3] / p[2] == pytest.approx(np.sqrt(0.01 / 64) / np.sqrt(0.02 / 16))
    assert np.array_equal(measured_probabilities(squares, flops, 1e9), np.ones(4))
    # for a power law V = T^(-2/gamma), these are the probabilities that assume the law, up to c
    law = measured_probabilities(np.array(flops) ** (-2 / 2.5), flops, 0.2)
    ratio = constant_probabilities(flops, 2.5, 0.2)
    np.testing.assert_allclose(law[1:] / law[1], ratio[1:] / ratio[1])


@pytest.mark.parametrize("wanted", [3.0, 60.0, 900.0, 6000.0])
def test_c_is_found_for_a_cost(wanted: float) -> None:
    flops = [1.0, 4.0, 16.0, 64.0]

    def table(c: float) -> np.ndarray:
        return measured_probabilities([9.0, 0.4, 0.02, 0.01], flops, c)

    steps = 100 if wanted >= 900 else 2
    p = probabilities_for_cost(table, flops, steps, wanted)
    assert p is not None and p[0] == 1 and np.any(p < 1)
    assert float(evaluation_probabilities(p[None])[0] @ flops) * steps == pytest.approx(wanted, rel=1e-9)


def test_a_cost_that_no_c_reaches_gives_none() -> None:
    flops = [1.0, 4.0]

    def table(c: float) -> np.ndarray:
        return measured_probabilities([9.0, 0.4], flops, c)

    assert probabilities_for_cost(table, flops, 10, 9.9) is None  # below the cost of level 1 alone
    assert probabilities_for_cost(table, flops, 10, 51.0) is None  # above the cost of all levels
