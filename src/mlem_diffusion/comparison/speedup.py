"""Speed-ups of multilevel settings over the baselines, for each dynamics: the content of speedup.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from ..multilevel.timing import Timing
from .curves import Group, Measurements, compare, errors_of
from .settings import Row, is_multilevel, method_of, trusted

FIRST_ORDER = ("em", "ddpm", "ddim")
METHODS = {"coins": "independent coins", "any": "any multilevel"}
# em_data: what one has without levels made for ML-EM; without levels that have a teacher it is not reported
AGAINST = {
    "em_largest": "EM, largest level", "em_any": "EM, any level", "em_data": "levels trained on data alone",
    "all": "all baselines",
}  # fmt: skip
UNITS = {"flops": "FLOPs", "seconds": "seconds"}
Choice = Callable[[Row], bool]
_TITLES = ("protocol", "dynamics", "method", "against", "counted in")


@dataclass(frozen=True)
class Field:
    """All settings of one dynamics that can be trusted, with errors and costs in the same replicates."""

    rows: list[Row]
    errors: np.ndarray  # [S, 1 + R]
    costs: Mapping[str, np.ndarray]  # "flops" and, with a timing, "seconds": [S, 1 + R]
    taught: Collection[str]  # levels that were trained on another's outputs
    largest: str  # the level with the most FLOPs of those that were run alone
    coarsest: float  # the smallest squared error of the cheapest such level: coarser points need no sampler of ours

    @classmethod
    def of(
        cls, settings: Measurements, dynamics: str, replicates: int, seed: int, timing: Timing | None, column: str,
        taught: Collection[str] = (),
    ) -> Field:  # fmt: skip
        """column: that of the FLOPs, "gflops_realised" or "gflops_expected"."""
        chosen = [m for m in settings if m.row["dynamics"] == dynamics and trusted(m.row)]
        rows, errors = [m.row for m in chosen], errors_of(chosen, replicates, seed)
        flops = np.array([row[column] for row in rows], dtype=np.float64)
        costs = {"flops": np.broadcast_to(flops[:, None], errors.shape)}
        if timing is not None:  # another seed than that of the resamples
            costs["seconds"] = timing.draws([m.work for m in chosen], errors.shape[1] - 1, seed + 1)
        singles = [row for row in rows if row["estimator"] == "single"]
        per_call = {row["levels"]: row["gflops_expected"] / row["network_calls"] for row in singles}
        names = sorted(per_call, key=lambda name: per_call[name])
        cheapest = [row["estimator"] == "single" and row["levels"] == names[0] for row in rows]
        coarsest = float(errors[cheapest, 0].min()) if len(names) > 1 else math.inf
        return cls(rows, errors, costs, taught, names[-1] if names else "", coarsest)

    def against(self, name: str) -> Choice:
        """Whether a row is one of these baselines, a name of AGAINST."""
        if name == "all":
            return lambda row: not is_multilevel(row)
        if name == "em_data":
            return lambda row: row["estimator"] == "single" and row["levels"] not in self.taught
        levels = {"em_largest": [self.largest], "em_any": {row["levels"] for row in self.rows}}[name]
        return lambda row: row["estimator"] == "single" and row["step_rule"] in FIRST_ORDER and row["levels"] in levels

    def group(self, choice: Choice, unit: str) -> Group:
        found = [i for i, row in enumerate(self.rows) if choice(row) and self.costs[unit][i, 0] > 0]
        return Group([self.rows[i] for i in found], self.costs[unit][found], self.errors[found])


def is_method(name: str) -> Choice:
    """Whether a row is a multilevel setting of this method, a name of METHODS."""
    return lambda row: is_multilevel(row) and name in ("any", method_of(row))


def speedups(
    settings: Measurements, timing: Timing | None = None, replicates: int = 200, seed: int = 0,
    taught: Collection[str] = (),
) -> dict:  # fmt: skip
    """The content of speedup.json: {protocol: {dynamics: {method: {against: {unit: entry}}}}}.
    protocol: "strict", all settings on the same seeds and paths, with their squared error to one reference; methods,
    baselines and units: METHODS, AGAINST, UNITS, seconds only with a timing. entry: `curves.compare`, without points
    coarser than the best of the cheapest level alone. The window is the headline. "max" is the largest of many
    noisy ratios, and so no headline. taught: the levels that were trained on another's outputs."""
    found, rivals = {}, [name for name in AGAINST if taught or name != "em_data"]
    for dynamics in dict.fromkeys(m.row["dynamics"] for m in settings):
        field = Field.of(settings, dynamics, replicates, seed, timing, "gflops_realised", taught)
        found[dynamics] = {method: {against: {} for against in rivals} for method in METHODS}
        for unit in field.costs:
            base = {name: field.group(field.against(name), unit) for name in rivals}
            ours = {name: field.group(is_method(name), unit) for name in METHODS}
            for method, against in product(METHODS, rivals):
                found[dynamics][method][against][unit] = compare(base[against], ours[method], field.coarsest)
    return {"strict": found}


def table(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each entry of speedup.json: first its window, then its largest single point."""
    rows: list[dict[str, str]] = []
    for protocol, found in result.items():
        for dynamics, method, against, unit in product(found, METHODS, AGAINST, UNITS):
            entry = found[dynamics][method].get(against, {}).get(unit)
            if entry is not None:
                wide, best = entry["window"], entry["max"]
                names = (protocol, dynamics, METHODS[method], AGAINST[against], UNITS[unit])
                row: dict[str, str] = dict(zip(_TITLES, names, strict=True))
                row["at least, in a window"] = f"{wide['lower95']:.3g}" if wide else "–"
                row["its rms errors"] = "{:.3g} to {:.3g}".format(*wide["rms_error"]) if wide else "–"
                bound = "" if best is None or best["lower95"] is None else f" (at least {best['lower95']:.3g})"
                largest = "–" if best is None else f"{best['speedup']:.3g}{bound}"
                rows.append(row | {"largest at one point, not a headline": largest})
    return rows


def lower_bounds(result: dict[str, Any]) -> dict[str, float]:
    """The lower bounds of the windows in speedup.json, by keys such as speedup/strict/sde/coins/em_any/flops."""
    found, end = pd.json_normalize({"speedup": result}, sep="/").iloc[0].to_dict(), "/window/lower95"
    return {key.removesuffix(end): bound for key, bound in found.items() if key.endswith(end)}


def summary(result: dict[str, Any]) -> str:
    return pd.DataFrame(table(result)).to_string(index=False)
