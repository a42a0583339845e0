"""Plans (which levels, how many steps, which probabilities or weights) and their files."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .. import statistics
from ..diffusion.level import Level
from ..diffusion.sampler import Estimator, SingleLevel
from ..errors import UserError
from ..files import Damaged, expect_content, read_arrays, read_json, write_arrays, write_json
from .estimators import Multilevel, Quadrature, following

AGAIN = "run make optimise with the same EXPERIMENT"
Progress = Callable[[int, int], object]  # called with (done, total)


@dataclass(frozen=True)
class Plan:
    """One way to sample with a family.
    predicted and largest_effect: squared error, and largest rms effect of one coin's firing on the final image;
    predictions are first order in it."""

    method: str  # kind of coins, or "quadrature" for fixed weights
    probabilities: str  # origin of the table: "optimal", "measured" or "learned"
    levels: tuple[str, ...]  # names, cheap to expensive
    steps: int
    table: np.ndarray  # [n, K] probabilities p, or weights W, for n evaluations
    cost: float  # expected, per image (plans.json: FLOPs)
    predicted: float | None  # None if the error of the plan's largest level at these steps is unknown
    largest_effect: float | None

    @property
    def id(self) -> str:
        """Hash of method, levels, steps and table; predictions do not enter."""
        text = json.dumps([self.method, self.levels, self.steps, list(self.table.shape)]).encode()
        return hashlib.sha256(text + np.ascontiguousarray(self.table, dtype=np.float32).tobytes()).hexdigest()[:12]

    @property
    def stages(self) -> list[tuple[str, int]] | None:
        """The levels in order of use and the first evaluation of each, if one network alone, with weight 1, runs at
        every evaluation: such a plan is a stitched schedule. Else None."""
        networks = self.table - following(self.table)  # with coins only p = 1 everywhere passes
        if np.any((networks != 0).sum(axis=1) != 1) or np.any(networks.sum(axis=1) != 1):
            return None
        used = networks.argmax(axis=1)
        return [(self.levels[used[j]], int(j)) for j in np.flatnonzero(np.diff(used, prepend=-1))]

    @property
    def is_baseline(self) -> bool:
        """Whether this is a single level or a stitched schedule."""
        return self.stages is not None

    def build(self, family: Iterable[Level], pattern: int | None = None) -> Estimator:
        """The estimator of this plan; UserError if the family lacks one of its levels. pattern: see `Multilevel`."""
        known = {level.name: level for level in family}
        if missing := [name for name in self.levels if name not in known]:
            raise UserError(f"A plan needs the level {missing[0]}; the family has {', '.join(known)}.")
        used = tuple(known[name] for name in self.levels)
        if len(used) == 1:
            return SingleLevel(used[0])
        if self.method == "quadrature":
            return Quadrature(used, self.table)
        return Multilevel(used, self.table, self.method, pattern)


_READABLE = [field.name for field in fields(Plan) if field.name != "table"]  # what plans.json holds


def frontier(found: Iterable[Plan], error: Callable[[Plan], float | None]) -> list[Plan]:
    """The plans with a smaller error than all plans of equal or lower cost, from cheap to expensive."""
    rows = [{"plan": plan, "cost": plan.cost, "error": error(plan)} for plan in found]
    return [row["plan"] for row in statistics.frontier(rows, "cost", "error")]


def save_plans(path: Path, plans: Sequence[tuple[Plan, Mapping[str, Any]]], **facts: Any) -> None:
    """Write plans.json (readable, with further facts about each plan), and the tables to an npz file beside it."""
    described = [{"id": plan.id, **{name: getattr(plan, name) for name in _READABLE}, **more} for plan, more in plans]
    write_arrays(path.with_suffix(".npz"), {plan.id: plan.table.astype(np.float32) for plan, _ in plans})
    write_json(path, {**facts, "plans": described})


def load_plans(path: Path) -> tuple[dict[str, Plan], dict[str, Any]]:
    """{id: plan} and the content of plans.json; UserError if a file is missing or the two do not match."""
    content, tables = read_json(path, AGAIN), read_arrays(path.with_suffix(".npz"), AGAIN)
    out = {}
    with expect_content(path, AGAIN):
        for entry in content["plans"]:
            values: dict[str, Any] = {name: entry[name] for name in _READABLE} | {"levels": tuple(entry["levels"])}
            out[entry["id"]] = Plan(table=tables[entry["id"]], **values)
    if any(plan.id != name for name, plan in out.items()):
        raise Damaged(path, f"{path} and its tables do not match: {AGAIN}.")
    return out, content
