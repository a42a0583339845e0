"""Plans: their ids, the estimators they build, and their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toys import toy_family

from mlem_diffusion.comparison.settings import SamplerSetting, setting_of
from mlem_diffusion.diffusion.estimator import SingleLevel
from mlem_diffusion.errors import UserError
from mlem_diffusion.files import write_json
from mlem_diffusion.multilevel.estimators import Multilevel, Quadrature
from mlem_diffusion.multilevel.plan import Plan, choose, frontier, load_plans, save_plans

FAMILY = toy_family()
TABLE = np.stack([np.ones(6), np.linspace(0.3, 0.6, 6), np.linspace(0.05, 0.2, 6)], axis=1).astype(np.float32)
PLAN = Plan("nested", "optimal", ("w0", "w1", "w2"), 6, TABLE, 20.5, 1e-3, 3e-3, 0.02)
WEIGHTS = replace(PLAN, method="quadrature", table=np.where(TABLE > 0.15, 2 * TABLE, 0) * [0, 1, 1] + [1, 0, 0])
SINGLE = Plan("systematic", "optimal", ("w1",), 6, np.ones((6, 1), np.float32), 24.0, 0.0, 2e-3, 0.0)


def test_the_id_depends_on_the_computation_alone() -> None:
    """The id depends on every part of the computation, but not on predictions or on the table's number type."""
    assert len(PLAN.id) == 12 and PLAN.id == replace(PLAN, table=TABLE.copy()).id
    same = (
        {"cost": 1.0}, {"added": None, "predicted": None, "largest_effect": None}, {"probabilities": "learned"},
        {"table": TABLE.astype(np.float64)}, {"table": np.asfortranarray(TABLE)},
    )  # fmt: skip
    for change in same:
        assert replace(PLAN, **change).id == PLAN.id
    bent = TABLE.copy()
    bent[3, 1] += 1e-3
    others = [
        replace(PLAN, **change)
        for change in (
            {"method": "systematic"}, {"levels": ("w0", "w1", "w3")}, {"steps": 7}, {"table": bent},
            {"table": TABLE[::-1]}, {"table": TABLE.reshape(3, 6)},
        )
    ]  # fmt: skip
    assert len({PLAN.id, *(p.id for p in others)}) == 1 + len(others)


def test_a_plan_builds_its_estimator_from_any_family_that_has_its_levels() -> None:
    estimator = PLAN.build(FAMILY)
    assert isinstance(estimator, Multilevel) and estimator.coins == "nested" and np.array_equal(estimator.p, TABLE)
    assert isinstance(WEIGHTS.build(FAMILY), Quadrature)
    assert PLAN.build(reversed(FAMILY)).levels == list(FAMILY)
    alone = SINGLE.build(FAMILY)
    assert isinstance(alone, SingleLevel) and alone.level.name == "w1"
    with pytest.raises(UserError, match="needs the level w2; the family has w0, w1"):
        PLAN.build(FAMILY[:2])


def test_settings_that_run_plans() -> None:
    names = ("w0", "w1", "w2")
    assert setting_of(PLAN, "sde", "ddpm") == SamplerSetting(
        "sde", "ddpm", "ml_em", names, 6, "optimal", "nested", plan=PLAN.id
    )
    assert setting_of(WEIGHTS, "ode", "ddim") == SamplerSetting(
        "ode", "ddim", "quadrature", names, 6, "optimal", plan=WEIGHTS.id
    )
    # a plan of one level is a baseline, whichever method found it, and does not run twice
    assert setting_of(SINGLE, "ode", "ddim") == SamplerSetting("ode", "ddim", "single", ("w1",), 6)


def priced(*points: tuple[float, float | None]) -> list[Plan]:
    return [replace(PLAN, cost=cost, predicted=error) for cost, error in points]


def test_the_frontier_holds_plans_that_no_cheaper_plan_matches() -> None:
    found = frontier(
        priced((4, 1.0), (1, 3.0), (2, 3.0), (3, None), (1, 5.0), (3, 2.0), (9, 1.0), (8, 0.5)), lambda p: p.predicted
    )
    assert [(p.cost, p.predicted) for p in found] == [(1, 3.0), (3, 2.0), (4, 1.0), (8, 0.5)]
    assert frontier([], lambda p: p.predicted) == []


def test_choosing_by_cost_and_by_error() -> None:
    some = priced((1, 3.0), (2, 1.0), (4, 2.0), (8, 0.5), (0.5, None))
    assert choose(some, cost=4).cost == 2 and choose(some, cost=100).cost == 8
    assert choose(some, error=2.0).cost == 2 and choose(some, error=3.0).cost == 1
    with pytest.raises(UserError, match=r"No plan costs 0\.9 per image or less; the cheapest costs 1"):
        choose(some, cost=0.9)
    with pytest.raises(UserError, match=r"squared error of 0\.4; the best is 0\.5"):
        choose(some, error=0.4)
    for both in ({}, {"cost": 1.0, "error": 1.0}):
        with pytest.raises(UserError, match="either the cost or the error"):
            choose(some, **both)


# --------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "plans.json"
    more = [{"dynamics": "sde", "selected_error": 0.1}, {"dynamics": "ode"}, {}]
    save_plans(
        path, list(zip((PLAN, WEIGHTS, SINGLE), more, strict=True)), calibration={"flops": 7.0}, seeds_used=[1, 2]
    )
    return path


def test_plans_round_trip_through_files(stored: Path) -> None:
    found, content = load_plans(stored)
    assert list(found) == [PLAN.id, WEIGHTS.id, SINGLE.id]
    for plan in (PLAN, WEIGHTS, SINGLE):
        again = found[plan.id]
        assert again.id == plan.id and again.levels == plan.levels and again.table.shape == plan.table.shape
        assert np.array_equal(again.table, plan.table.astype(np.float32))
        for name in ("method", "probabilities", "steps", "cost", "added", "predicted", "largest_effect"):
            assert getattr(again, name) == getattr(plan, name)
    assert content["calibration"] == {"flops": 7.0} and content["seeds_used"] == [1, 2]
    assert content["plans"][0]["selected_error"] == 0.1 and "table" not in content["plans"][0]
    nothing = stored.with_name("none.json")
    save_plans(nothing, [])
    assert load_plans(nothing)[0] == {}


def test_unknown_predictions_round_trip(tmp_path: Path) -> None:
    plan = replace(PLAN, added=None, predicted=None, largest_effect=None)
    save_plans(tmp_path / "plans.json", [(plan, {})])
    assert load_plans(tmp_path / "plans.json")[0][plan.id].predicted is None
    save_plans(tmp_path / "plans.json", [(replace(plan, seconds=0.25), {})])
    assert load_plans(tmp_path / "plans.json")[0][plan.id].seconds == 0.25
    content = json.loads((tmp_path / "plans.json").read_text())
    del content["plans"][0]["seconds"]  # a file from before plans had predictions
    write_json(tmp_path / "plans.json", content)
    assert load_plans(tmp_path / "plans.json")[0][plan.id].seconds is None


def spoil(path: Path, how: str) -> None:
    content = json.loads(path.read_text())
    tables = path.with_suffix(".npz")
    if how == "no json":
        path.unlink()
    elif how == "broken json":
        path.write_text(path.read_text()[:-20])
    elif how == "no tables":
        tables.unlink()
    elif how == "empty tables":
        tables.write_bytes(b"")
    elif how == "foreign tables":
        tables.write_bytes(b"not a zip archive at all")
    elif how == "cut tables":
        tables.write_bytes(tables.read_bytes()[:-40])
    elif how == "other tables":
        save_plans(path.with_name("other.json"), [(SINGLE, {})])
        path.with_name("other.npz").replace(tables)
    elif how == "another number of steps":
        content["plans"][0]["steps"] = 7
        write_json(path, content)
    elif how == "a field is missing":
        content["plans"][0].pop("cost")
        write_json(path, content)
    elif how == "another format":
        write_json(path, {"plans": {"a": 1}})
    elif how == "a list":
        path.write_text("[]")
    else:
        raise AssertionError(how)


@pytest.mark.parametrize("how", [
    "no json", "broken json", "no tables", "empty tables", "foreign tables", "cut tables", "other tables",
    "another number of steps", "a field is missing", "another format", "a list",
])  # fmt: skip
def test_broken_or_mismatched_files_give_one_sentence(stored: Path, how: str) -> None:
    spoil(stored, how)
    with pytest.raises(UserError, match="make optimise") as error:
        load_plans(stored)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
