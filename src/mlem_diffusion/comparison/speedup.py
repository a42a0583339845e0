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
METHODS = {
    "coins": "independent coins", "shared": "one shared pattern, at random", "pattern": "best shared pattern",
    "any": "any multilevel",
}  # fmt: skip
# em_data: what one has without levels made for ML-EM; without levels that have a teacher it is not reported
AGAINST = {
    "em_largest": "EM, largest level", "em_any": "EM, any level", "em_data": "levels trained on data alone",
    "all": "all baselines",
}  # fmt: skip
UNITS = {"flops": "FLOPs", "seconds": "seconds"}
PROTOCOLS = {  # the methods and baselines that each has
    "paper": (("coins", "shared", "pattern", "any"), ("em_largest", "em_any", "em_data")),
    "strict": (("coins", "any"), tuple(AGAINST)),
}
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
    protocol: "paper" (comparison/paper.py), "paper_data", the same without levels trained on another's outputs, and
    "strict", this repository's own, with every solver as a rival. All settings are on the same seeds and paths, with
    their squared error to one reference. Methods, baselines and units: METHODS, AGAINST, UNITS, seconds only with a
    timing. entry: `curves.compare`, without points coarser than the best of the cheapest level alone. The window is
    the headline. "max" is the largest of many noisy ratios, and so no headline. Under the paper's protocol
    "equal_cost" has the ratio of squared errors at equal cost. taught: the levels trained on another's outputs."""
    out: dict[str, Any] = {}
    for name, (methods, rivals) in PROTOCOLS.items():
        own = [m for m in settings if m.row.get("protocol", "strict") == name]
        data = [m for m in own if not set(m.row["levels"].split("+")) & set(taught)]
        parts = {name: own} | ({"paper_data": data} if name == "paper" and taught else {})
        for key, part in parts.items():
            known = [against for against in rivals if taught or against != "em_data"]
            found = _speedups(part, timing, replicates, seed, taught, methods, known, name == "paper")
            out |= {key: found} if found else {}
    return out


def _speedups(
    settings: Measurements, timing: Timing | None, replicates: int, seed: int, taught: Collection[str],
    methods: Collection[str], rivals: Collection[str], both_ways: bool,
) -> dict[str, Any]:  # fmt: skip
    found: dict[str, Any] = {}
    for dynamics in dict.fromkeys(m.row["dynamics"] for m in settings):
        field = Field.of(settings, dynamics, replicates, seed, timing, "gflops_realised", taught)
        found[dynamics] = {method: {against: {} for against in rivals} for method in methods}
        for unit in field.costs:
            base = {name: field.group(field.against(name), unit) for name in rivals}
            ours = {name: field.group(is_method(name), unit) for name in methods}
            for method, against in product(methods, rivals):
                entry = compare(base[against], ours[method], field.coarsest)
                if both_ways and unit == "flops":
                    entry["equal_cost"] = error_ratio(base[against], ours[method])
                found[dynamics][method][against][unit] = entry
    return found


def error_ratio(base: Group, ours: Group) -> dict[str, Any] | None:
    """The baselines' squared error over ours at equal cost, where it is largest: {"gflop", "ratio", "lower95"}."""
    best = compare(base.turned, ours.turned)["max"]
    return best and {"gflop": best["at"], "ratio": best["speedup"], "lower95": best["lower95"]}


def table(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each entry of speedup.json: first its window, then its largest single point."""
    rows: list[dict[str, str]] = []
    for protocol, found in result.items():
        for dynamics, method, against, unit in product(found, METHODS, AGAINST, UNITS):
            entry = found[dynamics].get(method, {}).get(against, {}).get(unit)
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
