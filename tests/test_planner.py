"""Plans from gains and ablations: each part against a brute-force answer, and predicted against measured errors."""

from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from toys import effects_of, smooth_effects

from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.diffusion.sampler import SingleLevel, sample
from mlem_diffusion.diffusion.step_rules import REFERENCE_RULE, STEP_RULES, StepRule
from mlem_diffusion.models.analytic import analytic_family
from mlem_diffusion.multilevel import options as ways
from mlem_diffusion.multilevel.ablation import Frontiers, remove_levels, table
from mlem_diffusion.multilevel.candidates import candidates
from mlem_diffusion.multilevel.estimators import draw_coins, evaluation_probabilities
from mlem_diffusion.multilevel.gains import measure_effects
from mlem_diffusion.multilevel.plan import Plan
from mlem_diffusion.multilevel.planner import METHODS, Calibration
from mlem_diffusion.statistics import squared_errors

SHAPE, PROCESS, FAMILY = (1, 4, 4), Process(LinearSchedule(), base_steps=129), analytic_family(levels=3, amplitude=0.1)
STEPS, JUDGED = (17, 33), BrownianPath(range(1000, 1192), SHAPE)
RULES = ["sde/ddpm", "ode/dpmpp_2m"]


# ------------------------------------------------------------------------------------- independent and nested coins


def objective(p: np.ndarray, gains: np.ndarray, costs: np.ndarray, price: float) -> np.ndarray:
    """Variance plus price times the exact expected cost, at each evaluation [n]."""
    return (gains.T * (1 / p - 1)).sum(axis=1) + price * evaluation_probabilities(p) @ costs


def random_problem(seed: int, levels: int, n: int = 12) -> tuple[np.ndarray, np.ndarray, float]:
    """Gains [K, n] that may rise with the level, costs [K] and a price, over several orders of magnitude."""
    rng = np.random.default_rng(seed)
    gains = np.exp(rng.normal(0, 1, (levels, n)) - rng.uniform(0.5, 2.5) * np.arange(levels)[:, None])
    gains[0] = 0
    return gains, np.cumprod(rng.uniform(1.3, 8, levels)), float(np.exp(rng.uniform(-6, 2)))


def test_one_difference_has_a_closed_form() -> None:
    """K = 2: level 1 always runs, so p_2 = sqrt(A / (price T_2)); if that exceeds 1, only f^2 runs.
    With T_1 = 0.9 T_2, p = 0.95 would pay for both networks nearly always, so 1 is better."""
    gains, price = np.array([[0, 0, 0], [1e-3, 4e-3, 0.3]]), 1e-3
    p, closed = ways.independent_probabilities(gains, np.array([1.0, 16.0]), price), np.sqrt(gains[1] / (price * 16))
    assert np.allclose(p[:2, 1], closed[:2]) and closed[2] > 1 and p[2, 1] == 1
    near = ways.independent_probabilities(np.array([[0.0], [0.95**2]]), np.array([0.9, 1.0]), 1.0)
    assert np.array_equal(near, [[1.0, 1.0]])
    assert np.array_equal(ways.independent_probabilities(np.zeros((1, 4)), np.array([2.0]), 1.0), np.ones((4, 1)))
    assert np.all(ways.independent_probabilities(np.array([[0, 0], [0.0, 1e-3]]), np.array([1.0, 4.0]), 1.0) > 0)


@pytest.mark.parametrize(("levels", "seed"), [(2, 0), (3, 1), (5, 2), (5, 3)])
def test_neither_simple_answers_nor_small_changes_are_better(levels: int, seed: int) -> None:
    """None of 100 random perturbations of up to 20% improves the objective by more than 1e-4 of it."""
    gains, costs, price = random_problem(seed, levels)
    p, rng = ways.independent_probabilities(gains, costs, price), np.random.default_rng(seed)
    assert p.shape == gains.T.shape and np.all(p[:, 0] == 1) and np.all((p > 0) & (p <= 1))
    found, before = objective(p, gains, costs, price), np.concatenate([[0.0], costs[:-1]])
    for unit in (costs, costs + before, np.zeros(levels) + 1e-300):
        other = np.minimum(1, np.sqrt(gains / (price * unit[:, None]))).T
        other[:, 0] = 1
        assert np.all(found <= objective(other, gains, costs, price) * (1 + 1e-9))
    for _ in range(100):
        other = np.minimum(1, p * np.exp(rng.uniform(-0.2, 0.2, p.shape) * rng.integers(0, 2, p.shape)))
        other[:, 0] = 1
        assert np.all(found <= objective(other, gains, costs, price) * (1 + 1e-4))


@pytest.mark.parametrize("seed", range(3))
def test_nested_probabilities_decrease_and_no_scaling_of_them_is_better(seed: int) -> None:
    """They minimise variance + price sum_k p_k T_k: none of 200 random decreasing tables nearby is better."""
    rng = np.random.default_rng(seed)
    squares = np.sort(np.exp(rng.normal(0, 2, (4, 5))), axis=0)[::-1]
    costs, price = np.cumprod(rng.uniform(1.3, 8, 4)), float(np.exp(rng.uniform(-6, 2)))
    p = ways.nested_probabilities(squares, costs, price)
    assert np.all(p[:, 0] == 1) and np.all(np.diff(p, axis=1) <= 0) and np.all(p > 0)

    def value(q: np.ndarray, evaluations: np.ndarray) -> np.ndarray:
        return (squares[1:].T * np.diff(1 / q, axis=1)).sum(axis=1) + price * evaluations @ costs

    for _ in range(200):
        other = p * np.exp(0.3 * rng.normal(size=p.shape))
        other[:, 0] = 1
        other = np.minimum.accumulate(np.minimum(other, 1), axis=1)
        assert np.all(value(p, p) <= value(other, other) * (1 + 1e-6))
    # the real cost is no higher: if levels fire together, only the larger one runs
    assert np.all(value(p, evaluation_probabilities(p, nested=True)) <= value(p, p) + 1e-12)


# ------------------------------------------------------------------------------- one difference: fires and weights


def random_effects(seed: int, rows: int = 400, n: int = 40, smooth: float = 6.0) -> np.ndarray:
    """Effects [R, n] that are correlated along the trajectory, of unequal size."""
    rng = np.random.default_rng(seed)
    distance = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    factor = np.linalg.cholesky(np.exp(-((distance / smooth) ** 2)) + 1e-6 * np.eye(n))
    return (0.5 + rng.standard_normal((rows, n)) @ factor.T) * np.linspace(1, 0.2, n)


def test_added_error_of_systematic_coins_matches_drawn_coins() -> None:
    """Coins of 1500 seeds on the same table agree to 5% (the prediction uses 32 offsets) or 4 standard errors."""
    effects, counts = random_effects(0), [1, 3, 8, 20]
    options = ways.systematic_options(effects, counts)
    assert np.all(np.diff([o.added for o in options]) < 0)  # more fires add less error
    for option in options:
        table = np.stack([np.ones(40), option.table], axis=1)
        coins = draw_coins(table, range(1500), "systematic")[:, :, 1]
        per_seed = (((coins / option.table[:, None] - 1).T @ effects.T) ** 2).mean(axis=1)
        slack = 0.05 * option.added + 4 * per_seed.std() / np.sqrt(1500)
        assert abs(per_seed.mean() - option.added) < slack and option.fires == pytest.approx(option.table.sum())
    # a constant effect and even coins: hardly any error at all
    constant = ways.systematic_options(np.ones((10, 40)) * np.arange(10)[:, None], [8])[0]
    assert np.allclose(constant.table, 0.2) and constant.added < 1e-12


def test_quadratures_are_least_squares_fits_and_tails_stitched_schedules() -> None:
    effects = random_effects(4)
    total = effects.sum(axis=1)
    options = ways.quadrature_options(effects, [1, 2, 5, 10], 200)
    for option in (o for o in options if not o.certain):
        nodes = np.flatnonzero(option.table)
        error = ((effects @ option.table - total) ** 2).mean()
        assert option.fires == len(nodes)
        # a fit that is free of the trace of ridge is not much better
        free = np.linalg.lstsq(effects[:, nodes], total, rcond=None)[0]
        assert error <= 1.01 * ((effects[:, nodes] @ free - total) ** 2).mean() + 1e-4 * (total**2).mean()
    tails = [o for o in options if o.certain]
    assert tails[0].added == 0 and np.all(tails[0].table == 1)
    for option in tails:
        first = int(np.argmax(option.table))
        assert option.fires == 40 - first and np.array_equal(option.table, np.arange(40) >= first)
        assert option.added == pytest.approx((effects[:, :first].sum(axis=1) ** 2).mean())
    # one node is exact for constant effects
    constant = np.repeat(np.random.default_rng(0).standard_normal((60, 1)), 40, axis=1)
    option = ways.quadrature_options(constant, [1], 30)[0]
    assert option.table.sum() == pytest.approx(40, rel=2e-3)
    assert option.added < 1e-5 * (constant.sum(axis=1) ** 2).mean()


# --------------------------------------------------------------------------------------------------- whole plans


def test_quadrature_weights_of_few_noisy_effects_are_nearly_equal_masses() -> None:
    """Effects without correlation in time: least squares on 6 rows fits their noise, equal masses do not."""
    effects = np.random.default_rng(0).standard_normal((6, 40)) * 0.05 + 1.0
    few = [o for o in ways.quadrature_options(effects, [4, 8, 12], 6) if not o.certain]
    for option in few:
        weights = option.table[option.table != 0]
        assert weights.sum() == pytest.approx(40, rel=0.05) and weights.min() > 0 and weights.max() < 2 * weights.mean()
    drifting = ways.quadrature_options(effects, [4, 8, 12], 6, 0.1)
    assert all(d.added > o.added for d, o in zip(drifting, few, strict=False))


def run(estimator, steps: int | None, rule: StepRule) -> Tensor:
    return sample(estimator, rule, PROCESS.grid(steps), JUDGED)[0]


@lru_cache
def calibration(key: str) -> tuple[Calibration, Tensor]:
    """Effects on seeds 0..63, the levels' own errors on the seeds that judge the plans; and the reference."""
    rule = STEP_RULES[key]
    effects = measure_effects(FAMILY, rule, PROCESS.grid(33), BrownianPath(range(64), SHAPE), probes=8)
    reference = run(SingleLevel(FAMILY[-1]), None, REFERENCE_RULE[rule.dynamics])
    own = {
        (k, steps): float(squared_errors(run(SingleLevel(level), steps, rule), reference).mean())
        for k, level in enumerate(FAMILY)
        for steps in STEPS
    }
    return Calibration(effects, {n: PROCESS.grid(n).logsnr for n in STEPS}, own, effects.flops), reference


@lru_cache
def planned(key: str, method: str) -> list[Plan]:
    return calibration(key)[0].plans(method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", RULES)
def test_predicted_errors_match_measured_errors(key: str, method: str) -> None:
    """For small effects and 192 seeds, errors agree with their predictions to 25% plus 3 standard errors.
    This holds for the error against the fine reference. It also holds for the error added to that of the largest level
    on the same grid, unless that is as small as the terms of second order in the effects (1e-4 of it)."""
    inputs, reference = calibration(key)
    effects, rule, compared = inputs.effects, STEP_RULES[key], 0
    index = {name: k for k, name in enumerate(effects.names)}
    several = [plan for plan in planned(key, method) if len(plan.levels) > 1]
    for plan in (several[i] for i in np.unique(np.linspace(0, len(several) - 1, 4).astype(int))):
        assert plan.largest_effect is not None and plan.largest_effect < 0.05
        images, ledger = sample(plan.build(FAMILY), rule, PROCESS.grid(plan.steps), JUDGED)
        top = run(SingleLevel(FAMILY[index[plan.levels[-1]]]), plan.steps, rule)
        whole = effects.difference(index[plan.levels[0]], index[plan.levels[-1]]).sum(axis=1)
        assert plan.predicted is not None
        added = plan.predicted - inputs.own_errors[index[plan.levels[-1]], plan.steps]
        for predicted, against in ((plan.predicted, reference), (added, top)):
            if predicted >= 0.02 * (whole**2).mean():
                errors = squared_errors(images, against)
                slack = 3 * float(errors.std()) / np.sqrt(len(errors))
                assert abs(float(errors.mean()) - predicted) < 0.25 * predicted + slack, (plan.levels, plan.steps)
                compared += 1
        assert plan.cost == pytest.approx(plan.build(FAMILY).expected_flops(plan.steps), rel=1e-6)
        realised = ledger.per_sample @ ledger.flops
        assert abs(realised.mean() - plan.cost) <= 4 * realised.std() / np.sqrt(len(realised)) + 1e-6 * plan.cost
    assert compared >= 3


def synthetic(levels: int, n: int = 32, decay: float = 2.0) -> Calibration:
    """Smooth effects along a trajectory, smaller by a factor from level to level."""
    return smooth_effects([decay**-k for k in range(levels)], [4.0**k for k in range(levels)], {n: 1e-6})


@pytest.mark.parametrize("method", METHODS)
def test_other_costs_make_other_plans(method: str) -> None:
    """A level as dear as the largest (in seconds) is hardly used, a dearer one never, a free one often."""
    inputs = synthetic(3)

    def share(costs: list[float]) -> float:
        found = [p for p in replace(inputs, costs=np.array(costs)).plans(method) if len(p.levels) > 1]
        assert found and all(p.cost <= 32 * sum(costs) for p in found)
        return float(np.mean(["w1" in p.levels for p in found]))

    assert share([1.0, 48.0, 16.0]) == 0 <= share([1.0, 15.99, 16.0]) < 0.5 < share([1.0, 1.01, 16.0])
    # only ratios matter: seconds instead of FLOPs, the same levels and tables
    one, other = (replace(inputs, costs=unit * inputs.costs).plans(method) for unit in (1.0, 1e-9))
    assert [(p.levels, p.id) for p in one] == [(p.levels, p.id) for p in other]
    assert np.allclose([p.cost for p in other], [1e-9 * p.cost for p in one])


@pytest.mark.parametrize("method", METHODS)
def test_equal_levels_and_a_wanted_cost(method: str) -> None:
    inputs = synthetic(3)
    values = inputs.effects.values.copy()
    values[:, :, 1] = 0  # two levels with the same output
    for plan in replace(inputs, effects=replace(inputs.effects, values=values)).plans(method):
        assert np.isfinite([plan.cost, plan.predicted or np.nan]).all() and np.isfinite(plan.table).all()
    for wanted in (40.0, 200.0):
        plan, within = inputs.plan_for_cost(method, wanted), [p for p in inputs.plans(method) if p.cost <= wanted]
        assert plan is not None and plan.cost <= wanted
        assert plan.predicted <= min(p.predicted for p in within) * 1.05  # type: ignore[operator, type-var]
    assert inputs.plan_for_cost(method, 1.0) is None


def test_the_drift_is_what_explains_a_plan_and_spreads_firings_less() -> None:
    inputs = replace(synthetic(3), methods=METHODS)
    probe = inputs.probe()
    assert probe is not None and probe.method == "systematic" and probe.cost <= 4 * inputs.unit and probe.predicted
    drifts = [inputs.drift_of(probe, factor * probe.predicted) for factor in (0.5, 1.0, 1.2, 1e9)]
    assert drifts[0] == drifts[1] == 0 < drifts[2] < drifts[3] == 1
    again = replace(inputs, drift=drifts[2]).planners("systematic")[0]
    low, high = inputs.effects.names.index(probe.levels[0]), inputs.effects.names.index(probe.levels[1])
    before = inputs.planners("systematic")[0].options(low, high)
    assert all(new.added > old.added for new, old in zip(again.options(low, high), before, strict=True))
    assert replace(inputs, methods=("independent",)).probe() is None


def test_a_plan_uses_the_gains_of_the_next_finer_grid() -> None:
    fine = synthetic(2, n=32)
    inputs = replace(fine, coarser=[synthetic(2, n=8).effects, synthetic(2, n=16).effects])
    for n, source in ((6, 8), (8, 8), (9, 16), (17, 32), (64, 32)):
        known = {len(e.logsnr): e for e in (*inputs.coarser, inputs.effects)}[source]
        grid = np.linspace(known.logsnr[0], known.logsnr[-1], n)
        assert np.array_equal(inputs.effects_on(grid).values, known.on(grid).values)


def test_candidates_of_all_levels_and_of_the_best_chain_follow_the_gains() -> None:
    """w1 is far from both others, so the best chain leaves it out. p ~ sqrt(gain / cost), although the mean squared
    differences are all 1. Stitched schedules are a group of their own."""
    inputs, learned_from = synthetic(3), []
    values = inputs.effects.values * np.array([1, 6, 1])[:, None]
    values[:, :, 2] -= 5 * inputs.effects.values[:, :, 1]  # w2 - w0 stays
    inputs = replace(inputs, effects=replace(inputs.effects, values=values), methods=("systematic", "quadrature"))
    assert inputs.chain == (0, 2) and synthetic(3).chain == (0, 1, 2)
    node = SimpleNamespace(costs=[4, 8], steps=[32])
    options = SimpleNamespace(bases=[None], plans=5, measured=node, learned=SimpleNamespace(costs=[4], steps=32))

    def learn(cost: float, start: Plan) -> np.ndarray:
        learned_from.append(start)
        return np.array([1.0, 0.5, 0.25])[: len(start.levels)]

    *found, schedules, measured, learned = candidates(inputs, PROCESS, options, learn, max)
    assert [p.levels for p in measured] == [("w0", "w1", "w2")] * 2 + [("w0", "w2")] * 2
    gains, short = inputs.effects.gains()[0].sum(axis=1), (inputs.effects.difference(0, 2) ** 2).mean(0).sum()
    p, added = measured[0].table[0], (measured[2].predicted or 0) - inputs.own_errors[2, 32]
    assert p[1] < 1 and p[2] / p[1] == pytest.approx(np.sqrt(gains[2] / 16 / (gains[1] / 4)), rel=1e-5)
    assert added == pytest.approx(short * (1 / measured[2].table[0, 1] - 1), rel=1e-2)  # on almost the same grid
    assert [plan.cost for plan in measured] == pytest.approx([64, 128] * 2, rel=1e-5)
    assert [p.levels for p in learned] == [p.levels for p in learned_from] == [("w0", "w1", "w2"), ("w0", "w2")]
    assert not schedules and all(found)
    # where effects are rough in time, no difference stands for its neighbours, and late ones are all that counts
    rough = np.random.default_rng(0).standard_normal(values.shape) * np.linspace(0, 0.01, 32) ** 4
    inputs = replace(inputs, effects=replace(inputs.effects, values=rough))
    *found, schedules, _, _ = candidates(inputs, PROCESS, options, None, max)
    assert schedules and all(p.is_baseline and p.method == "quadrature" for p in schedules)
    assert found[0] and not any(p.is_baseline for group in found for p in group)


N = 16
TWO = ("independent", "quadrature")


def smooth(sizes: list[float], flops: list[float], seed: int = 0, methods: tuple[str, ...] = TWO) -> Calibration:
    """Levels whose differences have smooth random effects of these sizes, on two grids."""
    return replace(smooth_effects(sizes, flops, {n: 8 / n**2 for n in (8, N)}, seed), methods=methods)


def ablated(rules: list[Calibration], limits: tuple[float, float] = (0.02, 0.1), progress: Any = max) -> tuple:
    return remove_levels(rules, *limits, progress)


def test_the_cost_ratio_of_a_needed_level_matches_brute_force() -> None:
    """Two levels with effects of size A at every evaluation and independent coins.
    The error is own + n A (1/p - 1) at cost n (T_1 + p T_2), or own at n T_2 for the largest level alone. The cost at
    an error is that of the best mixture of two such plans."""
    rng = np.random.default_rng(0)
    values, gain, own, costs = rng.choice([-1.0, 1.0], (40, 2, 2, N)), 1e-4, 1e-3, (1.0, 20.0)
    values[:, :, 1] *= np.sqrt(gain)
    effects = effects_of(values, list(costs))
    measured = Calibration(effects, {N: effects.logsnr}, {(1, N): own}, effects.flops, ["independent"])
    found = Frontiers(measured).cost_ratio([0, 1], without=0)

    p = np.geomspace(1e-3, 0.999, 600)
    error = np.append(own + N * gain * (1 / p - 1), own)
    cost = np.append(N * (costs[0] + p * costs[1]), N * costs[1])
    ratios = []
    for e in np.geomspace(*found["errors"], 97):
        low, high = error <= e, error > e
        cheapest = cost[low].min()
        if high.any():
            share = (e - error[low])[:, None] / (error[high] - error[low][:, None])
            cheapest = min(cheapest, (cost[low][:, None] * (1 - share) + cost[high] * share).min())
        ratios.append(N * costs[1] / cheapest)
    assert found["errors"][0] == pytest.approx(1.1 * own)
    assert found["largest"] == pytest.approx(max(ratios), rel=0.02) and found["largest"] > 5
    assert found["mean"] == pytest.approx(np.exp(np.log(ratios).mean()), rel=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_a_duplicate_has_cost_ratio_one(method: str) -> None:
    """The second level has the output of the first, at twice its cost; so it can replace the first at twice the cost.
    Only ratios of costs matter."""
    inputs = smooth([1, 0, 0.3], [1, 2, 16], methods=(method,))
    found, scaled = Frontiers(inputs), Frontiers(replace(inputs, costs=1e-6 * inputs.costs))
    assert found.cost_ratio([0, 1, 2], without=1)["largest"] < 1 + 1e-6
    mean = found.cost_ratio([0, 1, 2], without=0)["mean"]
    assert 1.0 <= mean < 2.0 and found.cost_ratio([0, 2], without=0)["mean"] > 1.2 * mean
    assert scaled.cost_ratio([0, 1, 2], without=0)["mean"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_no_cost_ratio_is_below_one_and_parts_are_never_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = list(np.cumprod(rng.uniform(1.2, 5, 4)))
    methods = METHODS if seed == 0 else ("nested", "systematic")
    found = Frontiers(smooth(list(rng.uniform(0.1, 1, 4)), costs, seed, methods))
    for k in range(3):
        ratio = found.cost_ratio(range(4), without=k)
        assert ratio["mean"] >= 1 - 1e-12 and ratio["largest"] >= ratio["mean"]
        assert 0 < ratio["errors"][0] < ratio["errors"][1]
    errors, costs_ = found.hull(range(4))
    assert np.all(np.diff(errors) > 0) and np.all(np.diff(costs_) < 0)
    assert np.all(np.diff(np.diff(costs_) / np.diff(errors)) > 0)  # convex
    part = found.hull([1, 3])
    at = np.geomspace(part[0][0], errors[-1], 50)
    assert np.all(np.interp(at, *found.hull(range(4))) <= np.interp(at, *part) * (1 + 1e-9))


def test_a_level_that_is_cheap_in_flops_alone_is_not_kept_in_seconds() -> None:
    """If launches dominate, the first level takes as long as the second, which is better."""
    flops = smooth([1, 0.3, 0.1], [1, 16, 256])
    ratios, kept = ablated([flops])
    assert kept == ["w0", "w1", "w2"] and ratios["w0"]["sde/ddpm"]["mean"] > 1.1
    ratios, kept = ablated([replace(flops, costs=np.array([16.0, 16.0, 256.0]))])
    assert kept == ["w1", "w2"] and ratios.keys() == {"w0", "w1"} and ratios["w0"]["sde/ddpm"]["largest"] < 1.001
    levels = [{"name": w, "flops": 1e6, "seconds": 1e-6, "cost_ratio_seconds": ratios.get(w)} for w in ("w0", "w2")]
    text = table({"levels": levels, "kept": {"seconds": kept}})
    assert "Levels that pay off in seconds: w1 + w2." in text and "ratio, seconds" in text


def test_of_two_near_duplicates_exactly_one_is_kept() -> None:
    """Removing one of them costs almost nothing; removing both costs much. Of exact duplicates the dearer goes."""
    ratios, kept = ablated([smooth([1, 0.01, 0.3], [1, 1.02, 32])])
    assert all(ratios[name]["sde/ddpm"]["mean"] < 1.02 for name in ("w0", "w1"))
    assert len(kept) == 2 and kept[-1] == "w2"
    exact = smooth([1, 0, 0.3], [1, 2, 16])
    for costs in (exact.costs, np.array([1.0, 1.0, 16.0])):
        assert ablated([replace(exact, costs=costs)])[1] == ["w0", "w2"]
    # errors are measured against the largest level, so it stays
    assert ablated([exact], (1e6, 1e6))[1] == ["w2"]


def test_a_level_that_one_rule_needs_is_kept() -> None:
    """For the other rule the second level has the output of the first."""
    needed, useless = smooth([1, 0.3, 0.02], [1, 8, 64]), smooth([1, 0, 0.3], [1, 8, 64])
    assert ablated([useless])[1] == ["w0", "w2"]
    other = replace(useless, effects=replace(useless.effects, dynamics="ode", step_rule="ddim"))
    seen: list[tuple[int, int]] = []
    found, kept = ablated([needed, other], progress=lambda *at: seen.append(at))
    ratios = found["w1"]
    assert "w1" in kept and set(ratios) == {"sde/ddpm", "ode/ddim"}
    assert ratios["ode/ddim"]["largest"] < 1.001 < 1.1 < ratios["sde/ddpm"]["largest"] and seen[0] == (1, 3)
