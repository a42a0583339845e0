"""The sampler of make sample: the best multilevel setting of a comparison for a wanted cost or error."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import filterfalse
from typing import Any

from ..errors import UserError
from .settings import Measurement, Row, describe, is_multilevel

GOOD_ENOUGH = 1e-3  # squared error that hardly shows: its root is four grey levels
_SHOWN = 1.005  # a limit may be a number as it was printed, in three digits
_OTHER = {"error": "gflops_realised", "gflops_realised": "error"}


def candidates(frontiers: Iterable[Measurement]) -> dict[str, list[Row]]:
    """The rows of best.json, {"multilevel", "baselines"}, from the settings on the frontiers of each dynamics."""
    rows = [m.row for m in frontiers]
    return {"multilevel": list(filter(is_multilevel, rows)), "baselines": list(filterfalse(is_multilevel, rows))}


def choose(best: Mapping[str, Any] | None, wanted: Mapping[str, Any], largest: str) -> tuple[Row, str]:
    """The multilevel row of best.json to sample with, and sentences that say why, and what a baseline would do.
    wanted: "gflops", at most this cost per image; "error", at most this squared error; with neither the cheapest row
    with an error of at most GOOD_ENOUGH, or else the most accurate row; "dynamics". Without a comparison it is
    DPM-Solver++(2M) with the largest level. Raises UserError if no row fits."""
    gflops, error, dynamics = (wanted[key] for key in ("gflops", "error", "dynamics"))
    if gflops is not None and error is not None:
        raise UserError("sample.gflops and sample.error are both given: give one of them.")
    if best is None:
        if gflops is not None or error is not None:
            raise UserError("There is no comparison to choose from by cost or error: run make sample-compare first.")
        text = "No comparison has been run, so the sampler is DPM-Solver++(2M), 20 steps of the largest level."
        keys = ("dynamics", "step_rule", "estimator", "levels", "steps")
        return dict(zip(keys, ("ode", "dpmpp_2m", "single", largest, 20), strict=True)), text
    ours, base = ([r for r in best[kind] if dynamics in ("any", r["dynamics"])] for kind in ("multilevel", "baselines"))
    if not ours:
        text = f"The comparison has no multilevel setting to sample with (sample.dynamics={dynamics}): it ran none, or "
        raise UserError(text + "they diverged or fired their top level too rarely; give a sampler={...}.")
    ranges = ([row[key] for row in ours] for key in ("gflops_realised", "error"))
    costs, errors = (f"{min(values):.3g} to {max(values):.3g}" for values in ranges)
    by, limit, asked = "error", max(GOOD_ENOUGH, min(row["error"] for row in ours)), ""
    if gflops is not None:
        by, limit, asked = "gflops_realised", gflops, f"sample.gflops={gflops}"
    elif error is not None:
        limit, asked = error, f"sample.error={error}"
    row, other = _least(ours, by, limit), _least(base, by, limit)
    if row is None:
        what = f"squared errors are {errors}" if by == "error" else f"costs are {costs} GFLOP per image"
        raise UserError(f"No multilevel setting reaches {asked}: their {what} (sample.dynamics={dynamics}).")
    if by == "error":
        best_of, within = "cheapest", f"with a squared error of at most {limit:.3g}"
    else:
        best_of, within = "most accurate", f"that costs at most {limit:.3g} GFLOP per image"
    lines = [f"{_words(row)}: the {best_of} multilevel setting {within}."]
    lines += [f"The {best_of} baseline {within}: {_words(other)}." if other else f"There is no baseline {within}."]
    return row, "\n".join([*lines, f"Others: ARGS=sample.gflops=... ({costs}) or ARGS=sample.error=... ({errors})."])


def _least(rows: Sequence[Row], by: str, limit: float) -> Row | None:
    """Of the rows with row[by] up to the limit that with the least error, or cost if `by` is the error."""
    within = [row for row in rows if row[by] <= _SHOWN * limit]
    return min(within, key=lambda row: (row[_OTHER[by]], row[by]), default=None)


def _words(row: Row) -> str:
    name = f"{describe(row)} ({row['dynamics'].upper()})"
    return f"{name}, squared error {row['error']:.3g} for {row['gflops_realised']:.3g} GFLOP per image"
