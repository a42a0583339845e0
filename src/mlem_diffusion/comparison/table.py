"""compare.csv as a DataFrame: a row a setting. Costs are per image (GFLOPs, not GMACs; seconds of wall clock)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ..diffusion.step_rules import STEP_RULE_NAMES
from ..errors import UserError

# fmt: off
COLUMNS = [
    "dynamics", "step_rule", "estimator", "probabilities", "coins", "c", "switch", "levels", "steps", "seed",
    "error", "error_se", "distance", "distance_name", "distance_floor",
    "num_samples", "network_calls", "gflops_expected", "gflops_realised", "seconds",
]
EXTRA_COLUMNS = ["top_evaluations", "plan", "predicted", "largest_effect", "selected_error", "diverged"]
_TEXT = ["dynamics", "step_rule", "estimator", "probabilities", "coins", "levels", "distance_name", "plan"]
_WHOLE = ["steps", "seed", "num_samples", "top_evaluations", "diverged"]
# fmt: on
BASELINES = ("single", "stitched")
MIN_FIRES = 100  # with fewer evaluations of the top level in a run, the error and its standard error are not reliable


def frame_of(rows: Iterable[Mapping[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    """Rows as a DataFrame: an empty number is NaN, an empty text "". UserError for a missing column or a bad number."""
    frame = pd.DataFrame(rows)
    missing = [column for column in COLUMNS if column not in frame]
    if missing:
        raise UserError(f"compare.csv lacks the column(s) {', '.join(missing)}.")
    texts = [column for column in _TEXT if column in frame]
    try:
        frame = frame.astype({column: object if column in texts else float for column in frame})
    except ValueError as error:
        raise UserError(f"compare.csv has a column that does not hold numbers ({error}).") from error
    whole = [column for column in _WHOLE if column in frame and frame[column].notna().all()]
    return frame.fillna(dict.fromkeys(texts, "")).astype(dict.fromkeys(whole, int))


def to_text(frame: pd.DataFrame) -> str:
    """The content of compare.csv: columns in their fixed order, then extra ones; numbers with six digits."""
    columns = [name for name in COLUMNS + EXTRA_COLUMNS if name in frame]
    whole = {name: "Int64" for name in _WHOLE if name in frame}
    return frame[columns].astype(whole).to_csv(index=False, float_format="%.6g", lineterminator="\n")


def read(path: Path) -> pd.DataFrame:
    """The frame of a compare.csv; UserError if it is missing or damaged."""
    try:
        return frame_of(pd.read_csv(path, dtype={name: str for name in _TEXT}))
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path} cannot be read ({error}).".replace("\n", " ")) from error


def for_figures(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with two columns that the figures need: "method" (`method_of`) and "trusted"."""
    rows = frame.to_dict("records")
    return frame.assign(method=[method_of(row) for row in rows], trusted=[trusted(row) for row in rows])


def method_of(row: Mapping[str, Any]) -> str:
    """The method of a row: "single" or "stitched" (the baselines), "paper" or "other".

    "paper" means independent coins with any probabilities, "other" means nested or systematic coins, or quadrature.
    """
    if row["estimator"] in BASELINES:
        return row["estimator"]
    return "paper" if row["coins"] == "independent" else "other"


def trusted(row: Mapping[str, Any]) -> bool:
    """False for an ML-EM row with fewer than MIN_FIRES evaluations of its top level."""
    return row["estimator"] != "ml_em" or row["top_evaluations"] >= MIN_FIRES


def describe(row: Mapping[str, Any]) -> str:
    """A readable name of a row's setting.

    Examples: "DDIM, w64, 16 steps" or "ML-EM w4+w8+w16, DDIM, 64 steps, systematic coins, C = 0.3"."""
    names, kind = row["levels"].split("+"), row["estimator"].replace("ml_em", "ML-EM")
    levels = "+".join(names) if len(names) <= 4 else f"{names[0]}+…+{names[-1]} ({len(names)} levels)"
    rule, steps = STEP_RULE_NAMES[row["step_rule"]], f"{row['steps']} steps"
    parts = [rule, levels, steps] if kind == "single" else [f"{kind} {levels}", rule, steps]
    if row["coins"]:
        parts.append(f"{row['coins']} coins")
    if row["probabilities"] not in ("", "constant"):
        parts.append(f"{row['probabilities']} probabilities")
    for name, label in (("c", "C ="), ("switch", "switch at")):
        if pd.notna(row[name]):
            parts.append(f"{label} {row[name]:.3g}")
    return ", ".join(parts)
