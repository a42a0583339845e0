"""compare.csv: its columns, reading and writing it, and functions of its rows for figures and the report.

One row is one sampler setting; all costs are per image (GFLOPs, not GMACs; seconds of wall clock). A row is
a plain dict: numbers are numbers, an empty field is None.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

from ..diffusion.step_rules import STEP_RULE_NAMES
from ..errors import UserError
from ..files import write_text

Row = dict[str, Any]

# fmt: off
COLUMNS = [
    "dynamics", "step_rule", "estimator", "probabilities", "coins", "c", "switch", "levels", "steps", "seed",
    "error", "error_se", "distance", "distance_name", "distance_floor",
    "num_samples", "network_calls", "gflops_expected", "gflops_realised", "seconds",
]
# fmt: on
EXTRA_COLUMNS = ["top_evaluations", "plan", "predicted", "largest_effect", "selected_error", "diverged"]

_TEXT = {"dynamics", "step_rule", "estimator", "probabilities", "coins", "levels", "distance_name", "plan"}
_WHOLE = {"steps", "num_samples", "seed"}
# Two rows that agree in all these columns are one setting, run from different seeds.
_SETTING = ("dynamics", "step_rule", "estimator", "probabilities", "coins", "c", "switch", "levels", "steps", "plan")

BASELINES = ("single", "stitched")

MIN_FIRES = 100
"""With fewer evaluations of the top level in a run, neither the error nor its standard error is reliable."""


def write_rows(rows: Iterable[Row], csv_path: Path) -> Path:
    """Write rows, the columns in their fixed order and extra columns after them, to a CSV file.

    None and non-finite values become empty fields. Floats have six significant digits. The file is written atomically.
    """
    rows = list(rows)
    for row in rows:
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise UserError(f"A row for {csv_path.name} lacks the column(s) {', '.join(missing)}.")
    extra = [name for name in EXTRA_COLUMNS if any(name in row for row in rows)]
    extra += sorted({name for row in rows for name in row} - set(COLUMNS) - set(extra))
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS + extra)
    writer.writerows([_to_field(row.get(name)) for name in COLUMNS + extra] for row in rows)
    write_text(csv_path, text.getvalue())
    return csv_path


def read_rows(csv_path: Path) -> list[Row]:
    """The rows that `write_rows` wrote. Raises UserError if the file is missing, lacks a column or has a bad number."""
    if not csv_path.is_file():
        raise UserError(f"{csv_path} does not exist.")
    with csv_path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, restkey="", restval=None)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise UserError(f"{csv_path.name} lacks the column(s) {', '.join(missing)}.")
        rows = []
        for record in reader:
            if "" in record or any(value is None for value in record.values()):
                raise UserError(f"{csv_path.name}, line {reader.line_num}: the number of fields is wrong.")
            where = f"{csv_path.name}, line {reader.line_num}"
            rows.append({name: _from_field(name, text, where) for name, text in record.items()})
    return rows


def _to_field(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _from_field(name: str, text: str, where: str) -> Any:
    # "" is a value in a text column (no coins, no probabilities), but means a missing number in other columns.
    if name in _TEXT:
        return text
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        if name in COLUMNS and name != "seed":
            raise UserError(f"{where}: {name} is not a number ({text[:40]!r}).") from None
        return text
    if not math.isfinite(number):
        return None
    whole = name in _WHOLE if name in COLUMNS else text.lstrip("+-").isdigit()
    return int(number) if whole else number


def key_of(row: Row) -> tuple:
    """The values that identify a row's setting, without its seed."""
    return tuple(row.get(name) for name in _SETTING)


def pool_seeds(rows: Iterable[Row]) -> list[Row]:
    """Average the rows that differ only in their seed: means of errors, distances and costs.

    Standard errors are combined in quadrature. `num_samples` stays the number of images per seed, `top_evaluations`
    is summed, and `runs` counts the averaged rows.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(key_of(row), []).append(row)
    pooled = []
    for group in groups.values():
        merged = dict(group[0], runs=len(group))
        if len(group) > 1:
            for name in (
                "error",
                "distance",
                "network_calls",
                "gflops_expected",
                "gflops_realised",
                "seconds",
            ):
                values = _numbers(group, name)
                merged[name] = sum(values) / len(values) if values else None
            spread = _numbers(group, "error_se")
            merged["error_se"] = math.sqrt(sum(v * v for v in spread)) / len(spread) if spread else None
            fires = _numbers(group, "top_evaluations")
            merged["top_evaluations"] = sum(fires) if fires else None
        pooled.append(merged)
    return pooled


def _numbers(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def method_of(row: Row) -> str:
    """The method of a row: "single", "stitched", "paper" or "other".

    The first two are baselines. "paper" means independent coins with any probabilities, "other" means nested or
    systematic coins, or quadrature.
    """
    if row["estimator"] in BASELINES:
        return row["estimator"]
    return "paper" if row["estimator"] == "ml_em" and row.get("coins") == "independent" else "other"


def trusted(row: Row) -> bool:
    """False for an ML-EM row with fewer than MIN_FIRES evaluations of its top level; True if they were not counted."""
    fires = row.get("top_evaluations")
    return row["estimator"] != "ml_em" or fires in (None, "") or float(fires) >= MIN_FIRES


def describe(row: Row) -> str:
    """A readable name of a row's setting.

    Examples: "DDIM, w64, 16 steps" or "ML-EM w4+w8+w16, DDIM, 64 steps, systematic coins, C = 0.3"."""
    rule = STEP_RULE_NAMES.get(str(row.get("step_rule")), str(row.get("step_rule") or ""))
    names, steps = str(row.get("levels") or "").split("+"), row.get("steps")
    levels = "+".join(names) if len(names) <= 4 else f"{names[0]}+…+{names[-1]} ({len(names)} levels)"
    parts = [rule, f"{steps} steps" if steps is not None else ""]
    if row.get("estimator") in ("ml_em", "quadrature"):
        parts.insert(0, f"{'ML-EM' if row['estimator'] == 'ml_em' else 'quadrature'} {levels}".strip())
        if row.get("coins"):
            parts.append(
                row["coins"].replace("-shared", "") + " coins" + (", shared" if "-shared" in row["coins"] else "")
            )
        if row.get("probabilities") not in (None, "", "constant"):
            parts.append(f"{row['probabilities']} probabilities")
        parts.append(f"C = {row['c']:.3g}" if isinstance(row.get("c"), (int, float)) else "")
    elif row.get("estimator") == "stitched":
        parts.insert(0, f"stitched {levels}".strip())
        if isinstance(row.get("switch"), (int, float)):
            parts.append(f"switch at {row['switch']:.3g}")
    else:
        parts.insert(1, levels)
    return ", ".join(part for part in parts if part)


def for_figures(rows: Iterable[Row]) -> list[Row]:
    """The pooled rows with two columns that the figures need: "method" (`method_of`) and "trusted"."""
    return [row | {"method": method_of(row), "trusted": trusted(row)} for row in pool_seeds(rows)]
