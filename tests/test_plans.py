"""Plans: ids, estimators, files and selection; coins and weights: unbiased, and with the expected cost."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from toys import probabilities, toy_family

from mlem_diffusion.comparison.settings import BASELINES, SamplerSetting, setting_of
from mlem_diffusion.diffusion.sampler import SingleLevel
from mlem_diffusion.errors import UserError
from mlem_diffusion.multilevel import estimators
from mlem_diffusion.multilevel.candidates import select, spread
from mlem_diffusion.multilevel.estimators import COINS, Multilevel, Quadrature, draw_coins, telescope_weights
from mlem_diffusion.multilevel.plan import Plan, load_plans, save_plans

FAMILY = toy_family()
TABLE = np.stack([np.ones(6), np.linspace(0.3, 0.6, 6), np.linspace(0.05, 0.2, 6)], axis=1).astype(np.float32)
PLAN = Plan("nested", "optimal", ("w0", "w1", "w2"), 6, TABLE, 20.5, 3e-3, 0.02)
WEIGHTS = replace(PLAN, method="quadrature", table=np.where(TABLE > 0.15, 2 * TABLE, 0) * [0, 1, 1] + [1, 0, 0])
SINGLE = Plan("systematic", "optimal", ("w1",), 6, np.ones((6, 1), np.float32), 24.0, 2e-3, 0.0)


def test_the_id_depends_on_the_computation_alone() -> None:
    """The id depends on every part of the computation, but not on predictions or on the table's number type."""
    same = (
        {"cost": 1.0}, {"predicted": None, "largest_effect": None}, {"probabilities": "learned"},
        {"table": TABLE.astype(np.float64)}, {"table": np.asfortranarray(TABLE)},
    )  # fmt: skip
    assert len(PLAN.id) == 12 and {replace(PLAN, **change).id for change in same} == {PLAN.id}
    bent = TABLE.copy()
    bent[3, 1] += 1e-3
    others = (
        {"method": "systematic"}, {"levels": ("w0", "w1", "w3")}, {"steps": 7}, {"table": bent},
        {"table": TABLE[::-1]}, {"table": TABLE.reshape(3, 6)},
    )  # fmt: skip
    assert len({PLAN.id, *(replace(PLAN, **change).id for change in others)}) == 1 + len(others)


def test_a_plan_builds_its_estimator_and_setting_from_any_family_that_has_its_levels() -> None:
    estimator = PLAN.build(reversed(FAMILY))
    assert isinstance(estimator, Multilevel) and estimator.coins == "nested" and np.array_equal(estimator.p, TABLE)
    assert estimator.levels == list(FAMILY) and isinstance(WEIGHTS.build(FAMILY), Quadrature)
    alone = SINGLE.build(FAMILY)
    assert isinstance(alone, SingleLevel) and alone.levels[0].name == "w1"
    with pytest.raises(UserError, match="needs the level w2; the family has w0, w1"):
        PLAN.build(FAMILY[:2])
    # a plan of one level is a baseline, whichever method found it, and does not run twice
    assert setting_of(SINGLE, "ode", "ddim") == SamplerSetting("ode", "ddim", "single", ("w1",), 6)
    assert setting_of(PLAN, "sde", "ddpm").coins == "nested" and setting_of(PLAN, "sde", "ddpm").plan == PLAN.id
    assert setting_of(WEIGHTS, "sde", "ddpm").estimator == "quadrature" and not WEIGHTS.is_baseline


@pytest.mark.parametrize(("columns", "order", "switch"), [
    ("000001 000001", ("w0", "w2"), (0.833333,)), ("001111 000111", ("w0", "w1", "w2"), (0.333333, 0.5)),
    ("111001 111000", ("w2", "w0", "w1"), (0.5, 0.833333)), ("111111 000000", ("w1",), ()),
    ("000011 000111", None, ()),  # w0 - w1 + w2
    ("000020 000020", None, ()),  # a weight of 2
])  # fmt: skip
def test_a_plan_of_one_network_at_a_time_is_a_stitched_baseline(columns, order, switch) -> None:
    plan = replace(WEIGHTS, table=np.array([list(column) for column in ("111111 " + columns).split()], np.float32).T)
    found = setting_of(plan, "sde", "ddpm")
    assert (found.estimator in BASELINES) == plan.is_baseline == (order is not None)
    if order is not None:
        assert found == SamplerSetting("sde", "ddpm", "stitched" if switch else "single", order, 6, switch=switch)
        built = found.build({level.name: level for level in FAMILY}, 2.5, {})
        assert built.expected_flops(6) == plan.build(FAMILY).expected_flops(6)


def test_selection_keeps_the_measured_frontier_of_each_group() -> None:
    plans = [replace(PLAN, steps=steps, cost=cost) for steps, cost in ((6, 1.0), (7, 2.0), (8, 3.0), (9, 4.0))]
    errors = dict(zip([p.id for p in plans], (3.0, 3.0, None, 1.0), strict=True))
    assert select([plans[:2], plans[1:], []], errors) == [plans[0], plans[1], plans[3]]
    assert spread(plans, 2) == [plans[0], plans[3]] and spread(plans, 4) == plans


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "plans.json"
    unknown = replace(WEIGHTS, predicted=None, largest_effect=None)
    more = [{"dynamics": "sde", "selected_error": 0.1}, {"dynamics": "ode"}, {}]
    save_plans(path, list(zip((PLAN, unknown, SINGLE), more, strict=True)), calibration={"flops": 7.0})
    return path


def test_plans_round_trip_through_files(stored: Path) -> None:
    found, content = load_plans(stored)
    assert list(found) == [PLAN.id, WEIGHTS.id, SINGLE.id] and found[WEIGHTS.id].predicted is None
    for plan in (PLAN, SINGLE):
        again = found[plan.id]
        assert np.array_equal(again.table, plan.table) and replace(again, table=TABLE) == replace(plan, table=TABLE)
    assert content["calibration"] == {"flops": 7.0} and content["plans"][0]["selected_error"] == 0.1
    save_plans(stored.with_name("none.json"), [])
    assert load_plans(stored.with_name("none.json"))[0] == {}


@pytest.mark.parametrize("how", ["no json", "no tables", "cut tables", "other tables", "steps", "cost", "a list"])
def test_broken_or_mismatched_files_give_one_sentence(stored: Path, how: str) -> None:
    content, tables = json.loads(stored.read_text()), stored.with_suffix(".npz")
    if how.startswith("no "):
        (stored if how == "no json" else tables).unlink()
    elif how == "cut tables":
        tables.write_bytes(tables.read_bytes()[:-40])
    elif how == "other tables":
        save_plans(stored.with_name("other.json"), [(SINGLE, {})])
        stored.with_name("other.npz").replace(tables)
    elif how == "a list":
        stored.write_text("[]")
    else:
        value = content["plans"][0].pop(how)
        content["plans"][0] |= {"steps": value + 1} if how == "steps" else {}
        stored.write_text(json.dumps(content))
    with pytest.raises(UserError, match="make optimise") as error:
        load_plans(stored)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


SHARES = [1, 0.4, 0.1], [1, 0.3, 0.3, 0.05], [1, 1, 0.5], [1.0, 1, 1], [1, 0.2, 0.7], [1.0]
TABLES = [np.array(p) for p in SHARES]
NESTED = [*TABLES, np.array([1.0, 0.6, 0.6, 0.6, 0.1]), np.array([1.0, 1.0, 0.5, 0.5])]
FLOPS, SQUARES = np.array([1.0, 4.0, 16.0, 64.0]), np.array([9.0, 0.4, 0.02, 0.01])


def outcomes(p: np.ndarray, nested: bool) -> tuple[np.ndarray, np.ndarray]:
    """All outcomes [N, K] of independent coins, or of nested coins (one uniform number), and their probabilities."""
    if nested:
        edges = np.unique([0.0, *p, 1.0])
        return p > 0.5 * (edges[1:] + edges[:-1])[:, None], np.diff(edges)
    coins = np.array(list(product([False, True], repeat=len(p))))
    return coins, np.where(coins, p, 1 - p).prod(axis=1)


@pytest.mark.parametrize(("p", "nested"), [*((p, False) for p in TABLES), *((p, True) for p in NESTED)])
def test_coins_by_enumeration(p: np.ndarray, nested: bool) -> None:
    """The weights are the telescope sum_k (B_k/p_k) (f^k - f^(k-1)) for every outcome, and unbiased for the top level.
    Networks run with the stated probabilities. The variance is sum_k (1/p_k - 1) |f^k - f^(k-1)|^2; for nested coins
    with decreasing p it is that of the differences to the top."""
    f = np.random.default_rng(0).standard_normal(len(p))
    coins, chance = outcomes(p, nested)
    weights = telescope_weights(p[None], coins[None])[0]
    np.testing.assert_allclose(weights @ f, (coins / p) @ np.diff(f, prepend=0.0), atol=1e-12)
    np.testing.assert_allclose(chance @ weights, np.eye(len(p))[-1], atol=1e-12)
    stated = estimators.evaluation_probabilities(p[None], nested)[0]
    np.testing.assert_allclose(stated, chance @ (weights != 0), atol=1e-12)
    terms = np.diff(1 / p) * (f[-1] - f[:-1]) ** 2 if nested else (1 / p - 1) * np.diff(f, prepend=0.0) ** 2
    if not nested or np.all(np.diff(p) <= 0):
        assert chance @ (weights @ f - f[-1]) ** 2 == pytest.approx(terms.sum(), abs=1e-12)


@pytest.mark.parametrize("kind", COINS)
def test_coins_fire_with_their_probability_at_every_step(kind: str) -> None:
    """Frequencies over 4000 seeds within 4.5 standard errors (24 steps, 2 levels), alone and in pairs of levels."""
    p, seeds = probabilities(24), range(4000)
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


@pytest.mark.parametrize("p", [np.full((50, 2), [1.0, 0.13]), probabilities(37), np.full((40, 2), [1.0, 0.25])])
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
    constant, measured = estimators.constant_probabilities, estimators.measured_probabilities
    for gamma, ratio in ((2.5, 0.287), (5.0, 0.379)):
        p = constant([3.0, 12.0, 48.0, 192.0], gamma, 0.9)
        assert p[0] == 1 and p[1] == pytest.approx(0.9 * ratio, rel=2e-3)
        np.testing.assert_allclose(p[2:] / p[1:-1], ratio, rtol=2e-3)
    p = measured(SQUARES, FLOPS, 0.3)
    assert p[:2] == pytest.approx([1.0, 0.3]) and p[2] / p[1] == pytest.approx(np.sqrt(0.02 / 16) / np.sqrt(0.4 / 4))
    # for a power law V = T^(-2/gamma), these are the probabilities that assume the law, up to c
    law, assumed = measured(FLOPS**-0.8, FLOPS, 0.2), constant(FLOPS, 2.5, 0.2)
    np.testing.assert_allclose(law[1:] / law[1], assumed[1:] / assumed[1])
    assert np.array_equal(constant(FLOPS, 2.5, 1e9), np.ones(4))
    assert np.array_equal(measured(SQUARES, FLOPS, 1e9), np.ones(4))


@pytest.mark.parametrize(("wanted", "steps"), [(3.0, 2), (60.0, 2), (900.0, 100), (6000.0, 100)])
def test_c_is_found_for_a_cost(wanted: float, steps: int) -> None:
    p = estimators.measured_for_cost(SQUARES, FLOPS, steps, wanted)
    assert p is not None and p[0] == 1 and np.any(p < 1)
    assert float(estimators.evaluation_probabilities(p[None])[0] @ FLOPS) * steps == pytest.approx(wanted, rel=1e-9)
    for impossible in (0.99 * steps, 86.0 * steps):  # below the cost of level 1 alone; above that of all levels
        assert estimators.measured_for_cost(SQUARES, FLOPS, steps, impossible) is None


@pytest.mark.parametrize("arguments", [
    ([1, 4], 0.0, 1.0), ([1, 4], 2.5, -1.0), ([1, 4], float("nan"), 1.0), ([4, 1], 2.5, 1.0), ([0, 1], 2.5, 1.0),
    ([], 2.5, 1.0),
])  # fmt: skip
def test_bad_arguments_are_refused(arguments: tuple) -> None:
    with pytest.raises(UserError):
        estimators.constant_probabilities(*arguments)
    for squares, c in (([1.0, 0.0], 1.0), ([1.0, float("nan")], 1.0), ([1.0, 0.1], 0.0)):
        with pytest.raises(UserError, match="Measured probabilities"):
            estimators.measured_probabilities(np.array(squares), np.array([1.0, 4.0]), c)
    with pytest.raises(UserError, match="coins"):
        draw_coins(np.ones((2, 2)), [0], "stratified")
