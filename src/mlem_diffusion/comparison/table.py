"""compare.csv as a DataFrame: a row a setting. Costs are per image (GFLOPs, not GMACs; seconds of wall clock)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ..diffusion.step_rules import STEP_RULE_NAMES

# fmt: off
COLUMNS = [
    "dynamics", "step_rule", "estimator", "probabilities", "coins", "c", "switch", "levels", "steps", "seed",
    "error", "error_se", "distance", "distance_name", "distance_floor",
    "num_samples", "network_calls", "gflops_expected", "gflops_realised", "seconds",
    "top_evaluations", "plan", "predicted", "largest_effect", "selected_error", "diverged",  # the last five if known
]
_TEXT = ["dynamics", "step_rule", "estimator", "probabilities", "coins", "levels", "distance_name", "plan"]
_WHOLE = ["steps", "seed", "num_samples", "top_evaluations", "diverged"]
# fmt: on
BASELINES = ("single", "stitched")
MIN_FIRES = 100  # with fewer evaluations of the top level in a run, the error and its standard error are not reliable


def frame_of(rows: Iterable[Mapping[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    """Rows as a DataFrame: an empty number is NaN, an empty text "". ValueError for a number that is none."""
    frame = pd.DataFrame(rows)
    frame = frame.astype({column: object if column in _TEXT else float for column in frame})
    whole = [column for column in _WHOLE if column in frame and frame[column].notna().all()]
    return frame.fillna(dict.fromkeys(_TEXT, "")).astype(dict.fromkeys(whole, int))


def to_text(frame: pd.DataFrame) -> str:
    """The content of compare.csv: columns in their fixed order, numbers with six digits."""
    columns = [name for name in COLUMNS if name in frame]
    whole = {name: "Int64" for name in _WHOLE if name in frame}
    return frame[columns].astype(whole).to_csv(index=False, float_format="%.6g", lineterminator="\n")


def read(path: Path) -> pd.DataFrame:
    """The frame of a compare.csv; ValueError if it is damaged."""
    return frame_of(pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str)))


def for_figures(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with two columns that the figures need: "method" (`method_of`) and "trusted"."""
    rows = frame.to_dict("records")
    return frame.assign(method=[method_of(row) for row in rows], trusted=[trusted(row) for row in rows])


def method_of(row: Mapping[str, Any]) -> str:
    """The method of a row: "single" or "stitched" (the baselines), "paper" or "other".

    "paper" means independent coins with any probabilities, "other" means nested or systematic coins, or quadrature."""
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
