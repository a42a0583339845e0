"""Plans (which levels, how many steps, which probabilities or weights) and their files."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..diffusion.level import Level
from ..diffusion.sampler import Estimator, SingleLevel
from ..errors import UserError
from ..files import Damaged, expect_content, read_arrays, read_json, write_arrays, write_json
from .estimators import Multilevel, Quadrature

AGAIN = "run make optimise with the same EXPERIMENT"


@dataclass(frozen=True)
class Plan:
    """One way to sample with a family.

    method: kind of coins, or "quadrature" for fixed weights. probabilities: origin of the table ("optimal", "measured",
    "learned"). levels: names, cheap to expensive. table [n, K]: probabilities p, or weights W, for n evaluations. cost:
    expected cost per image (plans.json: FLOPs). added: predicted squared error beyond that of the plan's largest level
    at these steps. predicted: the sum of both. largest_effect: largest rms effect of one coin's firing on the final
    image; predictions are first order in it. seconds: expected seconds per image of the networks in full batches.
    """

    method: str
    probabilities: str
    levels: tuple[str, ...]
    steps: int
    table: np.ndarray
    cost: float
    added: float | None = None
    predicted: float | None = None
    largest_effect: float | None = None
    seconds: float | None = None

    @property
    def id(self) -> str:
        """Hash of method, levels, steps and table; predictions do not enter."""
        text = json.dumps([self.method, self.levels, self.steps, list(self.table.shape)]).encode()
        return hashlib.sha256(text + np.ascontiguousarray(self.table, dtype=np.float32).tobytes()).hexdigest()[:12]

    def build(self, family: Iterable[Level]) -> Estimator:
        """The estimator of this plan; UserError if the family lacks one of its levels."""
        known = {level.name: level for level in family}
        if missing := [name for name in self.levels if name not in known]:
            raise UserError(f"A plan needs the level {missing[0]}; the family has {', '.join(known)}.")
        used = tuple(known[name] for name in self.levels)
        if len(used) == 1:
            return SingleLevel(used[0])
        if self.method == "quadrature":
            return Quadrature(used, self.table)
        return Multilevel(used, self.table, self.method)


def frontier(found: Iterable[Plan], error: Callable[[Plan], float | None]) -> list[Plan]:
    """The plans with a smaller error than all plans of equal or lower cost, from cheap to expensive."""
    out, lowest = [], np.inf
    known = [(value, p) for p in found if (value := error(p)) is not None]
    for value, plan in sorted(known, key=lambda pair: (pair[1].cost, pair[0])):
        if value < lowest:
            out.append(plan)
            lowest = value
    return out


def choose(found: Sequence[Plan], *, cost: float | None = None, error: float | None = None) -> Plan:
    """The plan of smallest predicted error within a cost, or the cheapest within a predicted squared error.

    Raises UserError if no plan qualifies, and unless exactly one of cost and error is given.
    """
    if (cost is None) == (error is None):
        raise UserError("Give either the cost or the error that a plan may have.")
    limited, wanted, limit = ("cost", "predicted", cost) if error is None else ("predicted", "cost", error)
    known = [(getattr(p, limited), getattr(p, wanted), p) for p in found if p.predicted is not None]
    within = [entry for entry in known if entry[0] <= limit]
    if not within:
        words = "cost per image" if error is None else "predicted squared error"
        least = min((entry[0] for entry in known), default=float("nan"))
        raise UserError(f"No plan has a {words} of {limit:.4g} or less; the least is {least:.4g}.")
    return min(within, key=lambda entry: entry[1])[2]


def save_plans(path: Path, plans: Sequence[tuple[Plan, Mapping[str, Any]]], **facts: Any) -> None:
    """Write plans.json (readable, with further facts about each plan), and the tables to an npz file beside it."""
    described = []
    for plan, more in plans:
        values = {k: v for k, v in asdict(plan).items() if k != "table"}
        described.append({"id": plan.id, **values, **more})
    write_arrays(path.with_suffix(".npz"), {plan.id: plan.table.astype(np.float32) for plan, _ in plans})
    write_json(path, {**facts, "plans": described})


def load_plans(path: Path) -> tuple[dict[str, Plan], dict[str, Any]]:
    """{id: plan} and the content of plans.json; UserError if a file is missing or the two do not match."""
    content, tables = read_json(path, AGAIN), read_arrays(path.with_suffix(".npz"), AGAIN)
    names = [field.name for field in fields(Plan) if field.name != "table"]
    out = {}
    with expect_content(path, AGAIN):
        for entry in content["plans"]:
            values: dict[str, Any] = {name: entry[name] for name in names} | {"levels": tuple(entry["levels"])}
            out[entry["id"]] = Plan(table=tables[entry["id"]], **values)
    if any(plan.id != name for name, plan in out.items()):
        raise Damaged(path, f"{path} and its tables do not match: {AGAIN}.")
    return out, content
