"""The optimiser's foresight: its choices judged on other seeds, and its predicted errors against measured ones."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .settings import Measurement, Row
from .speedup import errors_of


def chosen_blindly(
    ours: Sequence[Measurement], theirs: Sequence[Measurement], cost: str = "gflops_expected", seed: int = 0
) -> dict[str, Any]:
    """Whether an optimiser's choices are nowhere above the frontier of `theirs`.

    At the cost of each frontier point, the optimiser chooses within that cost the setting of `ours` with the lowest
    error on the selection seeds ("selected_error" of its row). "ratio" is the squared error of this choice on the
    seeds of the comparison, divided by the point's. It counts as above if the one-sided 95% lower bound exceeds 1.
    """
    known = [m for m in ours if m.row.get("selected_error") is not None]
    values = errors_of([*known, *theirs], 200, seed)
    mine, others = values[: len(known)], values[len(known) :]
    points, lowest, unserved = [], math.inf, 0
    for i in sorted(range(len(theirs)), key=lambda i: (theirs[i].row[cost], others[i, 0])):
        if others[i, 0] >= lowest:
            continue  # not on the frontier
        lowest = others[i, 0]
        within = [j for j, m in enumerate(known) if m.row[cost] <= 1.001 * theirs[i].row[cost]]
        if not within:
            unserved += 1
            continue
        ratios = mine[min(within, key=lambda j: known[j].row["selected_error"])] / others[i]
        lower = float(np.quantile(ratios[1:], 0.05)) if len(ratios) > 1 else 0.0
        points.append(
            {cost.removesuffix("_expected"): theirs[i].row[cost], "ratio": float(ratios[0]), "lower95": lower}
        )
    worst = max(points, key=lambda p: p["lower95"], default=None)
    never = all(p["lower95"] <= 1 for p in points) if points else None
    return {"never_above": never, "worst": worst, "points": len(points), "unserved": unserved}


def prediction(rows: Iterable[Row], tolerance: float = 0.25) -> dict[str, Any]:
    """How far measured errors are from predicted ones: {kind of coins: {"rows", "within", "largest_effect", ...}}.

    A setting agrees if its squared error is within the tolerance of the prediction, up to two standard errors of the
    measurement. "largest_effect" is the largest effect in the comparison, "largest_effect_up_to_which_all_agree" the
    largest one such that all settings up to it agree.
    """

    def agrees(row: Row) -> bool:
        slack = 2 * (row.get("error_se") or 0.0)
        low, high = (1 - tolerance) * row["predicted"], (1 + tolerance) * row["predicted"]
        return row["error"] - slack <= high and row["error"] + slack >= low

    known: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("predicted") is not None:
            known.setdefault(row.get("coins") or row["estimator"], []).append(row)
    out = {}
    for kind, mine in sorted(known.items()):
        mine.sort(key=lambda row: row["largest_effect"])
        good = [agrees(row) for row in mine]
        small = [*good, False].index(False)
        ratios = [row["error"] / row["predicted"] for row in mine]
        out[kind] = {
            "rows": len(mine), "within": sum(good), "largest_effect": mine[-1]["largest_effect"],
            "largest_effect_up_to_which_all_agree": mine[small - 1]["largest_effect"] if small else None,
            "rows_up_to_it": small,
            "measured_over_predicted": [min(ratios), float(np.median(ratios)), max(ratios)],
        }  # fmt: skip
    return out
