"""Plans: their ids, the estimators they build, their files, and the selection of candidates."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toys import toy_family

from mlem_diffusion.comparison.settings import BASELINES, SamplerSetting, setting_of
from mlem_diffusion.diffusion.sampler import SingleLevel
from mlem_diffusion.errors import UserError
from mlem_diffusion.multilevel.candidates import select, spread
from mlem_diffusion.multilevel.estimators import Multilevel, Quadrature
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
