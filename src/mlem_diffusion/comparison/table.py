"""compare.csv as a DataFrame: a row a setting. Costs are per image (GFLOPs, not GMACs; seconds of wall clock)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..diffusion.step_rules import STEP_RULES
from ..errors import UserError
from ..files import expect_content, write_text

# fmt: off
COLUMNS = [
    "dynamics", "step_rule", "estimator", "probabilities", "coins", "c", "switch", "levels", "steps", "seed",
    "error", "error_se", "distance", "distance_name", "distance_floor",
    "num_samples", "network_calls", "gflops_expected", "gflops_realised", "seconds",
]
EXTRA_COLUMNS = ["top_evaluations", "plan", "predicted", "largest_effect", "selected_error", "diverged"]
_TEXT = ["dynamics", "step_rule", "estimator", "probabilities", "coins", "levels", "distance_name", "plan"]
_WHOLE = ["steps", "seed", "num_samples", "top_evaluations", "diverged"]
# two rows that agree in all these columns are one setting, run from different seeds
_SETTING = ["dynamics", "step_rule", "estimator", "probabilities", "coins", "c", "switch", "levels", "steps", "plan"]
_MEANS = ["error", "distance", "network_calls", "gflops_expected", "gflops_realised", "seconds"]
# fmt: on
BASELINES = ("single", "stitched")
MIN_FIRES = 100  # with fewer evaluations of the top level in a run, the error and its standard error are not reliable


def frame_of(rows: Iterable[Mapping[str, Any]], name: str = "compare.csv") -> pd.DataFrame:
    """Rows as a DataFrame: an empty number is NaN, an empty text "". UserError for a missing column or a bad number."""
    frame = pd.DataFrame(list(rows))
    missing = [column for column in COLUMNS if column not in frame]
    if missing:
        raise UserError(f"{name} lacks the column(s) {', '.join(missing)}.")
    for column in frame:
        if column in _TEXT:
            frame[column] = frame[column].fillna("")
            continue
        try:
            numbers: Any = pd.Series(pd.to_numeric(frame[column].replace("", np.nan)), dtype=float)
        except ValueError as error:
            raise UserError(f"{name}: the column {column} does not hold numbers ({error}).") from error
        frame[column] = numbers.astype(int) if column in _WHOLE and numbers.notna().all() else numbers
    return frame


def to_text(frame: pd.DataFrame) -> str:
    """The content of compare.csv: columns in their fixed order, then extra ones; numbers with six digits."""
    columns = [name for name in COLUMNS + EXTRA_COLUMNS if name in frame]
    whole = {name: "Int64" for name in _WHOLE if name in frame}
    return frame[columns].astype(whole).to_csv(index=False, float_format="%.6g", lineterminator="\n")


def write(frame: pd.DataFrame, path: Path) -> None:
    """Write compare.csv, atomically."""
    write_text(path, to_text(frame))


def read(path: Path) -> pd.DataFrame:
    """The frame that `write` wrote; UserError if the file is missing, lacks a column or has a bad number."""
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    with path.open(newline="", encoding="utf-8") as file, expect_content(path, "run make sample-compare again"):
        header, *rows = [*csv.reader(file)] or [[]]
    if any(len(row) != len(header) for row in rows):  # pandas would fill them up
        raise UserError(f"{path.name} has rows with a wrong number of fields.")
    return frame_of((dict(zip(header, row, strict=True)) for row in rows), path.name)


def pool_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Average the rows that differ only in their seed: means of errors, distances and costs.

    Standard errors are combined in quadrature. `num_samples` stays the number of images per seed, `top_evaluations`
    is summed, and `runs` counts the averaged rows.
    """
    pooled = []
    for _, group in frame.groupby([name for name in _SETTING if name in frame], sort=False, dropna=False):
        row = group.iloc[0].to_dict() | {"runs": len(group)}
        if len(group) > 1:
            spread = group["error_se"].dropna()
            row |= group[_MEANS].mean().to_dict()
            row["error_se"] = np.sqrt((spread**2).sum()) / len(spread) if len(spread) else np.nan
            if "top_evaluations" in frame:
                row["top_evaluations"] = group["top_evaluations"].sum(min_count=1)
        pooled.append(row)
    return pd.DataFrame(pooled)


def for_figures(frame: pd.DataFrame) -> pd.DataFrame:
    """The pooled rows with two columns that the figures need: "method" (`method_of`) and "trusted"."""
    pooled = pool_seeds(frame)
    rows = pooled.to_dict("records")
    return pooled.assign(method=[method_of(row) for row in rows], trusted=[trusted(row) for row in rows])


def method_of(row: Mapping[str, Any]) -> str:
    """The method of a row: "single" or "stitched" (the baselines), "paper" or "other".

    "paper" means independent coins with any probabilities, "other" means nested or systematic coins, or quadrature.
    """
    if row["estimator"] in BASELINES:
        return row["estimator"]
    return "paper" if row["estimator"] == "ml_em" and row["coins"] == "independent" else "other"


def trusted(row: Mapping[str, Any]) -> bool:
    """False for an ML-EM row with fewer than MIN_FIRES evaluations of its top level; True if they were not counted."""
    fires = row.get("top_evaluations")
    return row["estimator"] != "ml_em" or fires is None or not fires < MIN_FIRES


def describe(row: Mapping[str, Any]) -> str:
    """A readable name of a row's setting.

    Examples: "DDIM, w64, 16 steps" or "ML-EM w4+w8+w16, DDIM, 64 steps, systematic coins, C = 0.3"."""
    names, key = row["levels"].split("+"), f"{row['dynamics']}/{row['step_rule']}"
    levels = "+".join(names) if len(names) <= 4 else f"{names[0]}+…+{names[-1]} ({len(names)} levels)"
    rule = STEP_RULES[key].label if key in STEP_RULES else row["step_rule"]
    steps, kind = f"{row['steps']} steps", row["estimator"].replace("ml_em", "ML-EM")
    parts = [rule, levels, steps] if kind == "single" else [f"{kind} {levels}", rule, steps]
    if row["coins"]:
        parts.append(row["coins"].replace("-shared", "") + " coins" + (", shared" if "-shared" in row["coins"] else ""))
    if row["probabilities"] not in ("", "constant"):
        parts.append(f"{row['probabilities']} probabilities")
    for name, label in (("c", "C ="), ("switch", "switch at")):
        if row[name] is not None and not np.isnan(row[name]):
            parts.append(f"{label} {row[name]:.3g}")
    return ", ".join(parts)
