"""Plans from gains: each part against a brute-force answer, and predicted errors against measured errors."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from mlem_diffusion.diffusion.estimator import SingleLevel
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.diffusion.sampler import sample
from mlem_diffusion.diffusion.step_rules import REFERENCE_RULE
from mlem_diffusion.errors import UserError
from mlem_diffusion.models.analytic import analytic_family
from mlem_diffusion.multilevel.gains import Effects, measure_effects
from mlem_diffusion.multilevel.plan import Plan
from mlem_diffusion.multilevel.planner import (
    METHODS,
    Option,
    Planner,
    densities,
    fill,
    independent_probabilities,
    nested_probabilities,
    plans,
    quadrature_options,
    systematic_options,
    used,
)
from mlem_diffusion.multilevel.probabilities import draw_coins, evaluation_probabilities
from mlem_diffusion.statistics import squared_errors

SHAPE, PROCESS, FAMILY = (1, 4, 4), Process(LinearSchedule(), base_steps=257), analytic_family(levels=3, amplitude=0.1)
STEPS, JUDGED = (17, 33), range(1000, 1256)
RULES = [("sde", "ddpm"), ("ode", "dpmpp_2m")]


# ------------------------------------------------------------------------------------- independent coins


def objective(p: np.ndarray, gains: np.ndarray, costs: np.ndarray, price: float) -> np.ndarray:
    """Variance plus price times the exact expected cost, at each evaluation [n]."""
    return (gains.T * (1 / p - 1)).sum(axis=1) + price * evaluation_probabilities(p) @ costs


def random_problem(seed: int, levels: int, n: int = 24) -> tuple[np.ndarray, np.ndarray, float]:
    """Gains [K, n] that may rise with the level, costs [K] and a price, over several orders of magnitude."""
    rng = np.random.default_rng(seed)
    gains = np.exp(rng.normal(0, 1, (levels, n)) - rng.uniform(0.5, 2.5) * np.arange(levels)[:, None])
    gains[0] = 0
    return gains, np.cumprod(rng.uniform(1.3, 8, levels)), float(np.exp(rng.uniform(-6, 2)))


def test_one_difference_has_a_closed_form() -> None:
    """K = 2: level 1 always runs, so p_2 = sqrt(A / (price T_2)); if that exceeds 1, only f^2 runs."""
    gains = np.array([[0, 0, 0], [1e-3, 4e-3, 0.3]])
    costs, price = np.array([1.0, 16.0]), 1e-3
    p = independent_probabilities(gains, costs, price)
    closed = np.sqrt(gains[1] / (price * 16))
    assert np.allclose(p[:2, 1], closed[:2]) and closed[2] > 1 and p[2, 1] == 1


def test_certain_is_better_than_nearly_certain() -> None:
    """With T_1 = 0.9 T_2, p = 0.95 would pay for both networks nearly always."""
    gains, costs = np.array([[0.0], [0.95**2]]), np.array([0.9, 1.0])
    assert np.array_equal(independent_probabilities(gains, costs, 1.0), [[1.0, 1.0]])


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(8))
def test_no_simple_answer_is_better(levels: int, seed: int) -> None:
    gains, costs, price = random_problem(seed, levels)
    p = independent_probabilities(gains, costs, price)
    assert p.shape == gains.T.shape and np.all(p[:, 0] == 1) and np.all((p > 0) & (p <= 1))
    found = objective(p, gains, costs, price)
    square_root = np.ones_like(p)
    before = np.concatenate([[0.0], costs[:-1]])
    square_root[:, 1:] = np.minimum(1, np.sqrt(gains / (price * (costs + before)[:, None])))[1:].T
    law = np.ones_like(p)
    law[:, 1:] = np.minimum(1, np.sqrt(gains / (price * costs[:, None])))[1:].T
    # gains below a thousandth of their mean are raised to it: none of these is, up to the comparison's rounding
    for other in (square_root, law, np.ones_like(p)):
        assert np.all(found <= objective(other, gains, costs, price) * (1 + 1e-9))


@pytest.mark.parametrize("seed", range(12))
def test_small_changes_do_not_improve_the_solution(seed: int) -> None:
    """For four levels, none of 200 random perturbations of up to 20% improves the objective by more than 1e-4 of it."""
    gains, costs, price = random_problem(100 + seed, 4, n=6)
    p = independent_probabilities(gains, costs, price)
    found, rng = objective(p, gains, costs, price), np.random.default_rng(seed)
    for _ in range(200):
        other = np.minimum(1, p * np.exp(rng.uniform(-0.2, 0.2, p.shape) * rng.integers(0, 2, p.shape)))
        other[:, 0] = 1
        assert np.all(found <= objective(other, gains, costs, price) * (1 + 1e-4))


def test_one_level_always_runs_and_zero_gains_give_positive_probabilities() -> None:
    assert np.array_equal(independent_probabilities(np.zeros((1, 4)), np.array([2.0]), 1.0), np.ones((4, 1)))
    gains = np.array([[0, 0, 0.0], [0.0, 1e-3, 1e-3]])
    assert np.all(independent_probabilities(gains, np.array([1.0, 4.0]), 1.0) > 0)


def nested_objective(p: np.ndarray, squares: np.ndarray, costs: np.ndarray, price: float) -> np.ndarray:
    cost = evaluation_probabilities(p, nested=True) @ costs
    return (squares[1:].T * np.diff(1 / p, axis=1)).sum(axis=1) + price * cost


@pytest.mark.parametrize("seed", range(8))
def test_nested_probabilities_decrease_and_no_scaling_of_them_is_better(seed: int) -> None:
    """They minimise variance + price sum_k p_k T_k: none of 300 random decreasing tables nearby is better."""
    rng = np.random.default_rng(seed)
    squares = np.sort(np.exp(rng.normal(0, 2, (4, 5))), axis=0)[::-1]
    costs, price = np.cumprod(rng.uniform(1.3, 8, 4)), float(np.exp(rng.uniform(-6, 2)))
    p = nested_probabilities(squares, costs, price)
    assert np.all(p[:, 0] == 1) and np.all(np.diff(p, axis=1) <= 0) and np.all(p > 0)

    def value(q: np.ndarray) -> np.ndarray:
        return (squares[1:].T * np.diff(1 / q, axis=1)).sum(axis=1) + price * q @ costs

    found = value(p)
    for _ in range(300):
        other = p * np.exp(0.3 * rng.normal(size=p.shape))
        other[:, 0] = 1
        other = np.minimum.accumulate(np.minimum(other, 1), axis=1)
        assert np.all(found <= value(other) * (1 + 1e-6))
    # the real cost is no higher: if levels fire together, only the larger one runs
    assert np.all(nested_objective(p, squares, costs, price) <= found + 1e-12)


# ------------------------------------------------------------------------------- one difference: fires and weights


@pytest.mark.parametrize("total", [0.3, 1.0, 5.5, 19.999])
def test_fill_sums_to_the_total_capped_at_one_and_proportional_below(total: float) -> None:
    density = np.random.default_rng(0).lognormal(0, 2, 20)
    p = fill(density, total)
    assert p.sum() == pytest.approx(total) and np.all((p > 0) & (p <= 1))
    below = p < 1
    assert np.ptp(p[below] / density[below]) < 1e-9 * np.max(p[below] / density[below])
    if below.any() and not below.all():
        assert density[below].max() <= density[~below].min()
    assert np.array_equal(fill(density, 25.0), np.ones(20))  # a total above the number of entries


def random_effects(seed: int, rows: int = 400, n: int = 40, smooth: float = 6.0) -> np.ndarray:
    """Effects [R, n] that are correlated along the trajectory, of unequal size."""
    rng = np.random.default_rng(seed)
    distance = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    factor = np.linalg.cholesky(np.exp(-((distance / smooth) ** 2)) + 1e-6 * np.eye(n))
    return (0.5 + rng.standard_normal((rows, n)) @ factor.T) * np.linspace(1, 0.2, n)


@pytest.mark.parametrize("seed", [0, 1])
def test_added_error_of_systematic_coins_matches_drawn_coins(seed: int) -> None:
    """Coins of 4000 seeds on the same table agree to 5% (the prediction uses 32 offsets) or 4 standard errors."""
    effects = random_effects(seed)
    for option in systematic_options(effects, [1, 3, 8, 20]):
        table = np.stack([np.ones(40), option.table], axis=1)
        coins = draw_coins(table, range(4000), "systematic")[:, :, 1]
        error = (coins / option.table[:, None] - 1).T @ effects.T  # [4000, R]
        per_seed = (error**2).mean(axis=1)
        spread = per_seed.std() / np.sqrt(4000)
        assert abs(per_seed.mean() - option.added) < 0.05 * option.added + 4 * spread
        assert option.fires == pytest.approx(option.table.sum())


def test_more_fires_add_less_error_and_none_of_the_densities_is_better() -> None:
    effects = random_effects(3)
    added = [o.added for o in systematic_options(effects, [2, 4, 8, 16])]
    assert np.all(np.diff(added) < 0)
    assert all(shape.shape == (40,) and np.all(shape > 0) for shape in densities(effects))
    even = np.full(40, 0.2)  # a constant effect and even coins: hardly any error at all
    constant = systematic_options(np.ones((10, 40)) * np.arange(10)[:, None], [8])[0]
    assert np.allclose(constant.table, even) and constant.added < 1e-12


def split(options: list[Option]) -> tuple[list[Option], list[Option]]:
    return [o for o in options if not o.certain], [o for o in options if o.certain]


def test_least_squares_beats_equal_weights_on_the_same_nodes() -> None:
    effects = random_effects(4)
    total = effects.sum(axis=1)
    for option in split(quadrature_options(effects, [1, 2, 5, 10], 200))[0]:
        nodes = np.flatnonzero(option.table)
        assert option.fires == len(nodes)
        error = ((effects @ option.table - total) ** 2).mean()
        equal = ((effects[:, nodes].sum(axis=1) * 40 / len(nodes) - total) ** 2).mean()
        assert error < equal
        # nor does a fit that is free of the trace of ridge do much better
        free = np.linalg.lstsq(effects[:, nodes], total, rcond=None)[0]
        assert error <= 1.01 * ((effects[:, nodes] @ free - total) ** 2).mean() + 1e-4 * (total**2).mean()


def test_one_node_is_exact_for_constant_effects() -> None:
    effects = np.repeat(np.random.default_rng(0).standard_normal((60, 1)), 40, axis=1)
    option = quadrature_options(effects, [1], 30)[0]
    assert option.fires == 1 and option.table.sum() == pytest.approx(40, rel=2e-3)
    assert option.added < 1e-5 * (effects.sum(axis=1) ** 2).mean()


def test_tails_are_stitched_schedules() -> None:
    effects = random_effects(5)
    tails = split(quadrature_options(effects, [1], 200))[1]
    assert tails[0].added == 0 and np.all(tails[0].table == 1)
    for option in tails:
        first = int(np.argmax(option.table))
        assert option.fires == 40 - first and np.all(option.table[first:] == 1) and not option.table[:first].any()
        assert option.added == pytest.approx((effects[:, :first].sum(axis=1) ** 2).mean())


def test_cross_validated_error_is_that_on_fresh_rows() -> None:
    """Agreement to 15% on average over ten draws of 2 x 100 rows; the error on the fitted rows is far too small."""
    found, fresh, fitted = [], [], []
    for seed in range(10):
        effects, new = random_effects(10 + seed, rows=200), random_effects(900 + seed, rows=4000)
        option = split(quadrature_options(effects, [16], 100))[0][0]
        found.append(option.added)
        for rows, where in ((new, fresh), (effects, fitted)):
            where.append(((rows @ option.table - rows.sum(axis=1)) ** 2).mean())
    # weights of half of the rows are a little worse than those of all
    assert 0.95 * np.mean(fresh) < np.mean(found) < 1.35 * np.mean(fresh)
    assert np.mean(fitted) < 0.95 * np.mean(fresh)


def test_networks_needed_by_a_table_of_weights() -> None:
    table = np.array([[1, 1.0, 0], [1, 0, 0], [1, 2, 0], [1, 1, 1], [1, 0.5, 3]])
    assert np.array_equal(used(table), [[0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1]])


# --------------------------------------------------------------------------------------------------- whole plans


@lru_cache
def calibration(rule: tuple[str, str]) -> tuple[Effects, dict[tuple[int, int], float], Tensor]:
    """Effects on seeds 0..63, the levels' own errors on the seeds that judge the plans, and the reference."""
    effects = measure_effects(FAMILY, PROCESS.grid(33), *rule, range(64), SHAPE, probes=8)
    reference = run(SingleLevel(FAMILY[-1]), None, (rule[0], REFERENCE_RULE[rule[0]]))
    own = {}
    for k, level in enumerate(FAMILY):
        for steps in STEPS:
            images = run(SingleLevel(level), steps, rule)
            own[k, steps] = float(squared_errors(images, reference).mean())
    return effects, own, reference


def run(estimator: SingleLevel, steps: int | None, rule: tuple[str, str]) -> Tensor:
    return sample(estimator, PROCESS.grid(steps), *rule, JUDGED, SHAPE)[0]


@lru_cache
def planned(rule: tuple[str, str], method: str) -> list[Plan]:
    effects, own, _ = calibration(rule)
    return plans(effects, method, {n: PROCESS.grid(n).logsnr for n in STEPS}, own)


def several(found: list[Plan], count: int = 6) -> list[Plan]:
    multilevel = [plan for plan in found if len(plan.levels) > 1]
    return [multilevel[i] for i in np.unique(np.linspace(0, len(multilevel) - 1, count).astype(int))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES)
def test_predicted_errors_match_measured_errors(rule: tuple[str, str], method: str) -> None:
    """For small effects and 256 seeds, errors agree with their predictions to 25% plus 3 standard errors.

    This holds for the error against the fine reference. It also holds for the error added to that of the largest level
    on the same grid, unless that is as small as the terms of second order in the effects (1e-4 of it).
    """
    effects, _, reference = calibration(rule)
    index = {name: k for k, name in enumerate(effects.names)}
    compared = 0
    for plan in several(planned(rule, method)):
        assert plan.largest_effect is not None and plan.largest_effect < 0.05
        images, ledger = sample(plan.build(FAMILY), PROCESS.grid(plan.steps), *rule, JUDGED, SHAPE)
        top = run(SingleLevel(FAMILY[index[plan.levels[-1]]]), plan.steps, rule)
        whole = effects.difference(index[plan.levels[0]], index[plan.levels[-1]]).sum(axis=1)
        for predicted, against in ((plan.predicted, reference), (plan.added, top)):
            assert predicted is not None
            if predicted < 0.02 * (whole**2).mean():
                continue
            errors = squared_errors(images, against)
            slack = 3 * float(errors.std()) / np.sqrt(len(JUDGED))
            assert abs(float(errors.mean()) - predicted) < 0.25 * predicted + slack, (
                plan.levels,
                plan.steps,
                plan.cost,
            )
            compared += 1
        # costs are exact in expectation
        assert plan.cost == pytest.approx(plan.build(FAMILY).expected_flops(plan.steps), rel=1e-6)
        realised = ledger.per_sample @ ledger.flops
        sampling = 4 * realised.std() / np.sqrt(len(JUDGED))
        assert abs(realised.mean() - plan.cost) <= sampling + 1e-6 * plan.cost
    assert compared >= 4


@pytest.mark.parametrize("method", METHODS)
def test_the_frontier_is_monotone_and_starts_at_the_cheapest_level(method: str) -> None:
    own, found = calibration(RULES[0])[1], planned(RULES[0], method)
    costs, errors = [p.cost for p in found], [p.predicted or np.nan for p in found]
    assert np.all(np.diff(costs) > 0) and np.all(np.diff(errors) < 0) and len(found) >= 10
    assert found[0].levels == ("f1",) and found[0].steps == 17 and found[0].cost == 17 * FAMILY[0].flops
    assert {p.levels[-1] for p in found} == {"f1", "f2", "f3"}
    for plan in found:
        assert plan.table.shape == (plan.steps, len(plan.levels)) and plan.probabilities == "optimal"
        assert (plan.method, plan.predicted) == (
            method,
            own[int(plan.levels[-1][1:]) - 1, plan.steps] + (plan.added or 0),
        )
        if len(plan.levels) == 1:
            assert plan.added == 0 and np.all(plan.table == 1)
        else:  # a plan that always runs its largest level would equal that level
            assert not np.all(plan.table == 1)
    assert min(errors) == pytest.approx(own[2, 33], rel=1e-3)  # the largest level alone is on the frontier, or nearly


def test_better_estimators_add_less_error_at_the_same_cost() -> None:
    """Along a smooth trajectory, quadrature is below systematic coins, which are below independent coins.

    Both gaps are a factor, at 20% of f3's cost.
    """
    budget = 0.2 * 33 * FAMILY[-1].flops

    def least(method: str) -> float:
        return min(p.added or 0.0 for p in planned(RULES[1], method) if p.cost <= budget and p.levels[-1] == "f3")

    assert 5 * least("quadrature") < least("independent") and 5 * least("systematic") < least("independent")


def synthetic(levels: int, n: int = 32, decay: float = 2.0) -> Effects:
    """Smooth effects along a trajectory on a uniform grid, smaller by a factor from level to level."""
    rng = np.random.default_rng(0)
    waves = np.stack([np.cos(m * np.linspace(0, 2, n)) for m in range(4)])
    values = rng.standard_normal((50, 2, levels, 4)) @ waves * decay ** -np.arange(levels)[:, None] / n
    logsnr = np.linspace(-9, 9, n)
    flops = 4.0 ** np.arange(levels)
    names = tuple(f"w{k}" for k in range(levels))
    return Effects(names, flops, "sde", "ddpm", logsnr, values.astype(np.float32), np.ones((levels, n)), 0.0, 0.0)


def own_of(effects: Effects) -> dict[tuple[int, int], float]:
    """The levels' own errors if the effects were the only error, plus a little for the grid."""
    top = len(effects.names) - 1
    rest = [effects.difference(k, top).sum(axis=1) if k < top else np.zeros(1) for k in range(top + 1)]
    return {(k, len(effects.logsnr)): 1e-6 + float((r**2).mean()) for k, r in enumerate(rest)}


@pytest.mark.parametrize("method", METHODS)
def test_other_costs_make_other_plans(method: str) -> None:
    """If the middle level costs as much as the largest (in seconds), no plan uses it; if it is free, many do."""
    effects = synthetic(3)
    grids, own = {32: effects.logsnr}, own_of(effects)

    def share(costs: list[float]) -> float:
        found = [p for p in plans(effects, method, grids, own, np.array(costs)) if len(p.levels) > 1]
        assert found and all(p.cost <= 32 * sum(costs) for p in found)
        return float(np.mean(["w1" in p.levels for p in found]))

    assert share([1.0, 15.99, 16.0]) < 0.5 < share([1.0, 1.01, 16.0])
    # only ratios matter: seconds instead of FLOPs, the same levels and tables
    one, other = (plans(effects, method, grids, own, c) for c in (effects.flops, 1e-9 * effects.flops))
    assert [(p.levels, p.id) for p in one] == [(p.levels, p.id) for p in other]
    assert np.allclose([p.cost for p in other], [1e-9 * p.cost for p in one])


@pytest.mark.parametrize("method", METHODS)
def test_a_level_slower_and_worse_than_another_is_not_used(method: str) -> None:
    """In FLOPs the middle level is between the others; in seconds it takes three times as long as the largest."""
    effects = synthetic(3)
    grids, own = {32: effects.logsnr}, own_of(effects)
    assert any("w1" in p.levels for p in plans(effects, method, grids, own))
    found = plans(effects, method, grids, own, np.array([1.0, 48.0, 16.0]))
    assert len(found) > 3 and not any("w1" in p.levels for p in found)
    assert all(p.cost <= 32 * 17.0 for p in found)


@pytest.mark.parametrize("method", METHODS)
def test_a_subset_of_the_levels_plans_like_a_family_of_them(method: str) -> None:
    """The best path among some levels is the best path of a family in which the other levels are merged away.

    A planner given other costs returns what a new planner returns.
    """
    effects, costs = synthetic(4), np.array([1.0, 3.0, 5.0, 90.0])
    values = np.stack([effects.values[:, :, 0], effects.values[:, :, 1:3].sum(axis=2), effects.values[:, :, 3]], axis=2)
    merged = replace(
        effects, names=("w0", "w2", "w3"), flops=effects.flops[[0, 2, 3]], squares=effects.squares[:3], values=values
    )
    planner = Planner(effects, method, effects.flops)
    for price in (1e-6, 1e-4, 1e-2):
        one = planner.plan(3, price, among=(0, 2, 3))
        other = Planner(merged, method, merged.flops).plan(2, price)
        assert one.levels == other.levels and one.cost == pytest.approx(other.cost, rel=1e-4)
        assert one.added == pytest.approx(other.added, rel=1e-3, abs=1e-12)
        repriced, new = planner.priced(costs).plan(3, price), Planner(effects, method, costs).plan(3, price)
        assert repriced.id == new.id and repriced.cost == new.cost


def test_levels_with_equal_outputs_do_no_harm() -> None:
    effects = synthetic(3)
    values = effects.values.copy()
    values[:, :, 1] = 0
    same = replace(effects, values=values)
    for method in METHODS:
        found = plans(same, method, {32: same.logsnr}, own_of(same))
        assert all(np.isfinite([p.cost, p.predicted or np.nan]).all() and np.isfinite(p.table).all() for p in found)
        assert found and all(np.all(p.table > 0) for p in found if p.method != "quadrature")


def test_prices_and_unknown_own_errors() -> None:
    effects = synthetic(3)
    grids = {32: effects.logsnr}
    own = {(1, 32): 1e-3}  # of the middle level alone: the largest is never the top
    for method in METHODS:
        assert {p.levels[-1] for p in plans(effects, method, grids, own)} == {"w1"}
    cheap, dear = (plans(effects, "independent", grids, own, prices=[price])[0] for price in (1e-9, 1e-1))
    assert cheap.cost > dear.cost and (cheap.added or 0.0) < (dear.added or 0.0)
    assert plans(effects, "systematic", grids, {}) == []
    with pytest.raises(UserError, match="method = 'magic' is unknown"):
        plans(effects, "magic", grids, own)


@pytest.mark.parametrize("method", METHODS)
def test_the_base_level_can_be_named(method: str) -> None:
    """The best base is at least as good at every price; no plan uses a level below the named one."""
    effects = synthetic(3)
    grids, own = {32: effects.logsnr}, own_of(effects)
    for base, lowest in ((0, {"w0", "w1", "w2"}), (1, {"w1", "w2"}), (2, {"w2"})):
        found = plans(effects, method, grids, own, base=base)
        assert found and {p.levels[0] for p in found} <= lowest
    assert any(p.levels[0] == "w1" and len(p.levels) == 2 for p in plans(effects, method, grids, own, base=1))


def test_progress_counts_grids() -> None:
    effects, seen = synthetic(2), []
    grids = {32: effects.logsnr, 16: np.linspace(-9, 9, 16)}
    plans(effects, "nested", grids, {(1, 32): 1e-3}, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_skipping_a_level_equals_a_family_without_it() -> None:
    """A plan that skips a level merges two differences into one."""
    effects = synthetic(3)
    alone = replace(
        effects, names=("w0", "w2"), flops=effects.flops[[0, 2]], squares=effects.squares[[0, 2]],
        values=np.stack([effects.values[:, :, 0], effects.values[:, :, 1:].sum(axis=2)], axis=2),
    )  # fmt: skip
    grids, own = {32: effects.logsnr}, {(2, 32): 1e-5}
    direct = plans(alone, "quadrature", grids, {(1, 32): 1e-5}, prices=[1e-5])
    skipping = plans(effects, "quadrature", grids, own, np.array([1.0, 15.999, 16.0]), prices=[1e-5])
    assert direct[0].levels == skipping[0].levels == ("w0", "w2")
    assert torch.allclose(torch.tensor(direct[0].table), torch.tensor(skipping[0].table), atol=1e-4)
